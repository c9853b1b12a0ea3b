"""Scaling of RoPE's wavelengths, with which models read longer texts than those of their first training.

A scaling is a kind with numbers, written as one string, 'llama3:context=8192,factor=32,high=4,low=1':

- linear (Chen et al. 2023, https://arxiv.org/abs/2306.15595): every wavelength is multiplied by `factor`.
- dynamic (https://www.reddit.com/r/LocalLLaMA/comments/14mrgpr): if the positions of a pass exceed `context`, the base
  grows with the highest position. Up to `context` it changes nothing.
- llama3 (https://arxiv.org/abs/2407.21783; the formula is that of
  https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py): wavelengths above context / low are
  multiplied by `factor`, those below context / high are kept, and those in between are interpolated.
- yarn (Peng et al. 2023, https://arxiv.org/abs/2309.00071): the dimensions that turn fewer than `slow` times within
  `context` are multiplied by `factor`, those that turn more than `fast` times are kept, and those in between are
  interpolated; cosine and sine are multiplied by `attention`, so that attention weights are sharper.

Letters: R rotated part of a head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cyb_jax.errors import InputError, did_you_mean, shown
from cyb_jax.option_syntax import parse_options

# The numbers of each kind, with their defaults; None: required.
_NUMBERS: dict[str, dict[str, float | None]] = {
  "linear": {"factor": None},
  "dynamic": {"context": None, "factor": None},
  "llama3": {"context": None, "factor": None, "high": 4.0, "low": 1.0},
  # `truncate` is 1 or 0: whether the ends of the interpolated range are rounded to whole dimensions.
  "yarn": {"attention": 0.0, "context": None, "factor": None, "fast": 32.0, "slow": 1.0, "truncate": 1.0},
}
KINDS = tuple(_NUMBERS)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """A scaling of RoPE; `str` gives the form that `parse` reads.

  Attributes:
    kind: one of `KINDS`.
    numbers: (name, value) of all numbers of the kind, by name.
  """

  kind: str
  numbers: tuple[tuple[str, float], ...]

  def __str__(self) -> str:
    return f"{self.kind}:" + ",".join(f"{name}={_shown(value)}" for name, value in self.numbers)

  def __getitem__(self, name: str) -> float:
    return dict(self.numbers)[name]

  @property
  def amplitude(self) -> float:
    """The factor of cosine and sine."""
    return self["attention"] if self.kind == "yarn" else 1.0

  def frequencies(self, rotated_size: int, base: float) -> np.ndarray:
    """The angle per position of each pair, f64[R/2]; with 'dynamic' that of short texts.

    Args:
      rotated_size: R.
      base: the base of the wavelengths without the scaling.
    """
    plain = base ** -(np.arange(0, rotated_size, 2) / rotated_size)
    return _FORMULAS[self.kind](plain, rotated_size, base, dict(self.numbers))

  def dynamic_base(self, rotated_size: int, base: float, length: Float[Array, ""]) -> Float[Array, ""]:
    """The base of 'dynamic' for a pass over `length` positions, f32."""
    factor, context = self["factor"], self["context"]
    stretched = factor * jnp.maximum(length, context) / context - (factor - 1)
    return base * stretched ** (rotated_size / (rotated_size - 2))


def parse(field: str, text: str) -> RopeScaling | None:
  """The scaling that a string describes; None for ''.

  Args:
    field: the name of the field, for errors.
    text: 'kind:name=number,name=number'.

  Raises:
    InputError: it is not a string, the kind or a name is unknown, or a number is missing or out of range.
  """
  if not isinstance(text, str):
    raise InputError(f"{field}: {shown(text)} must be a string, such as 'linear:factor=2'; '' for none")
  if not text:
    return None
  kind, _, options = text.partition(":")
  if kind not in _NUMBERS:
    raise InputError(f"{field}: {kind!r} is not a kind of RoPE scaling; {did_you_mean(kind, KINDS)}")
  return scaling(field, kind, parse_options(field, options))


def scaling(field: str, kind: str, given: Mapping[str, str | float]) -> RopeScaling:
  """The scaling of a kind with these numbers; missing numbers have their defaults.

  Raises:
    InputError: see `parse`.
  """
  known = _NUMBERS[kind]
  for name in given:
    if name not in known:
      raise InputError(f"{field}: {name!r} is no number of {kind!r}; {did_you_mean(name, known)}")
  numbers: dict[str, float] = {}
  for name, default in known.items():
    value = given.get(name, default)
    if value is None:
      raise InputError(f"{field}: {name!r} is missing; {kind!r} needs {', '.join(known)}")
    try:
      numbers[name] = float(value)
    except ValueError:
      raise InputError(f"{field}: {name} = {value!r} must be a number") from None
    if not math.isfinite(numbers[name]) or (numbers[name] <= 0 and name not in ("attention", "truncate")):
      raise InputError(f"{field}: {name} = {value!r} must be positive")
  if numbers["factor"] < 1:
    raise InputError(f"{field}: factor = {_shown(numbers['factor'])} must be at least 1")
  if kind == "llama3" and numbers["high"] <= numbers["low"]:
    raise InputError(f"{field}: high = {_shown(numbers['high'])} must be above low = {_shown(numbers['low'])}")
  if kind == "yarn":
    if numbers["truncate"] not in (0, 1):
      raise InputError(f"{field}: truncate = {_shown(numbers['truncate'])} must be 1 or 0")
    if numbers["fast"] < numbers["slow"]:
      raise InputError(f"{field}: fast = {_shown(numbers['fast'])} must be at least slow = {_shown(numbers['slow'])}")
    numbers["attention"] = numbers["attention"] or yarn_attention(numbers["factor"])
    if numbers["attention"] < 0:
      raise InputError(f"{field}: attention = {_shown(numbers['attention'])} must be positive, or 0 for the default")
  return RopeScaling(kind, tuple(numbers.items()))


def yarn_attention(factor: float, weight: float = 1.0) -> float:
  """YaRN's factor of cosine and sine, 0.1 weight log(factor) + 1 (equation 22); 1 for a factor of at most 1."""
  return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _linear(plain: np.ndarray, size: int, base: float, numbers: Mapping[str, float]) -> np.ndarray:
  return plain / numbers["factor"]


def _dynamic(plain: np.ndarray, size: int, base: float, numbers: Mapping[str, float]) -> np.ndarray:
  return plain


def _llama3(plain: np.ndarray, size: int, base: float, numbers: Mapping[str, float]) -> np.ndarray:
  turns = numbers["context"] * plain / (2 * math.pi)  # within the context
  kept = np.clip((turns - numbers["low"]) / (numbers["high"] - numbers["low"]), 0, 1)
  return (1 - kept) * plain / numbers["factor"] + kept * plain


def _yarn(plain: np.ndarray, size: int, base: float, numbers: Mapping[str, float]) -> np.ndarray:
  def dimension(turns: float) -> float:
    """The dimension that turns so often within the context."""
    return size * math.log(numbers["context"] / (turns * 2 * math.pi)) / (2 * math.log(base))

  first, last = dimension(numbers["fast"]), dimension(numbers["slow"])
  if numbers["truncate"]:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, size - 1)
  if first == last:
    last += 0.001
  scaled = np.clip((np.arange(size // 2) - first) / (last - first), 0, 1)
  return scaled * plain / numbers["factor"] + (1 - scaled) * plain


_FORMULAS: dict[str, Callable[[np.ndarray, int, float, Mapping[str, float]], np.ndarray]] = {
  "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn,
}  # fmt: skip


def _shown(value: float) -> str:
  return repr(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
