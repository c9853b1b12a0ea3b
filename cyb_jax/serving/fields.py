"""Reading the fields of a request's JSON object, with an error that names the field and the accepted values."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from cyb_jax.data.tokenizers import surrogate
from cyb_jax.errors import did_you_mean
from cyb_jax.serving.errors import ApiError

# A value of a request is quoted up to this number of characters.
_QUOTED = 60


class Fields:
  """The fields of a JSON object; null is the same as an absent field.

  Args:
    body: the parsed JSON.
    known: the names of all fields that are accepted, whether they have an effect or not.

  Raises:
    ApiError: the body is not an object, or has an unknown field.
  """

  def __init__(self, body: Any, known: Collection[str]):
    if not isinstance(body, Mapping):
      raise ApiError(f"body: {quoted(body)} must be a JSON object")
    unknown = sorted(body.keys() - set(known))
    if unknown:
      hint = did_you_mean(unknown[0], sorted(known), listed=["the fields in the documentation of cyb-serve"])
      # Other names may have characters that an answer can't have.
      name = unknown[0] if unknown[0].isidentifier() and len(unknown[0]) <= _QUOTED else quoted(unknown[0])
      raise ApiError(f"{name}: unknown field; {hint}", param=name)
    self._body = {name: value for name, value in body.items() if value is not None}

  def get(self, name: str) -> Any:
    """The value; None if the field is absent."""
    return self._body.get(name)

  def text(self, name: str, default: str) -> str:
    """A string; the default if the field is absent."""
    value = self._body.get(name, default)
    if not isinstance(value, str):
      raise wrong(name, value, "a string")
    return value

  def optional_text(self, name: str) -> str | None:
    """A string; None if the field is absent."""
    return self.text(name, "") if name in self._body else None

  def flag(self, name: str, default: bool = False) -> bool:
    """True or false; the default if the field is absent."""
    value = self._body.get(name, default)
    if not isinstance(value, bool):
      raise wrong(name, value, "true or false")
    return value

  def optional_integer(self, name: str, low: int, high: int) -> int | None:
    """A whole number in low..high; None if the field is absent."""
    return self.integer(name, low, low, high) if name in self._body else None

  def integer(self, name: str, default: int, low: int, high: int) -> int:
    """A whole number in low..high; the default if the field is absent."""
    value = self._body.get(name, default)
    # Some clients send 16.0.
    whole = isinstance(value, float) and value.is_integer()
    if isinstance(value, bool) or not (isinstance(value, int) or whole) or not low <= value <= high:
      raise wrong(name, value, f"a whole number in {low}..{high}")
    return int(value)

  def number(self, name: str, default: float, low: float, high: float) -> float:
    """A number in low..high; the default if the field is absent."""
    value = self._body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isnan(value):
      raise wrong(name, value, f"a number in {low:g}..{high:g}")
    return float(value)

  def texts(self, name: str, most: int) -> tuple[str, ...]:
    """A string or a list of at most `most` strings, none of them empty."""
    value = self._body.get(name, [])
    values = [value] if isinstance(value, str) else value
    valid = isinstance(values, list) and all(isinstance(each, str) and each for each in values)
    if not valid or len(values) > most:
      raise wrong(name, value, f"a nonempty string, or a list of at most {most} of them")
    for each in values:
      check_characters(name, each)
    return tuple(values)

  def neutral(self, name: str, *values: Any) -> None:
    """Checks that a field without support is absent, or has one of the values that change nothing."""
    value = self._body.get(name)
    if value is not None and not any(
      value == each and isinstance(value, bool) == isinstance(each, bool) for each in values
    ):
      accepted = " or ".join(["null", *(quoted(each) for each in values)])
      raise ApiError(f"{name}: {quoted(value)} is unsupported; leave it out, or give {accepted}", param=name)


def wrong(name: str, value: Any, accepted: str) -> ApiError:
  """The error for a field with a wrong value."""
  return ApiError(f"{name}: {quoted(value)} must be {accepted}", param=name)


def quoted(value: Any) -> str:
  """A short form of a value for an error."""
  text = repr(value) if not isinstance(value, dict | list) else str(value)
  return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 3]}..."


def check_characters(name: str, text: str) -> None:
  """
  Raises:
    ApiError: the text has half of a surrogate pair, which is not a character.
  """
  if surrogate(text) is not None:
    raise ApiError(f"{name}: it has {surrogate(text)!r}, which is not a character; remove it", param=name)
