"""Lists of numbers in the form that they have in a config: '0:0:0:1'."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from cyb_jax.errors import InputError
from cyb_jax.losses import discount

# Shapes of a discount over the slots; their form is 'linear:g0'.
_DISCOUNTS = ("linear", "exponential")


def parse_weights(path: str, value: Any, num_slots: int, *, discounts: bool = False) -> tuple[float, ...] | None:
  """One weight for each slot.

  Args:
    path: the path of the field, for the message.
    value: 'a:b:c', a sequence of numbers, or '' or None for the default.
    num_slots: W.
    discounts: whether 'linear:g0' and 'exponential:g0' are also accepted, see `cyb_jax.losses.discount`.

  Returns:
    The weights; None means the default. The method checks their number.

  Raises:
    InputError: the value is invalid.
  """
  if value is None or value == "":
    return None
  if not isinstance(value, str):
    try:
      return tuple(float(x) for x in value)
    except (TypeError, ValueError):
      raise InputError(f"{path}: {value!r} must be weights such as '0:0:0:1', or '' for the default") from None
  kind, _, start = value.partition(":")
  try:
    if discounts and kind in _DISCOUNTS:
      return tuple(discount(kind, num_slots, float(start)).tolist())
    return tuple(float(x) for x in value.split(":"))
  except ValueError as error:
    detail = f" ({error})" if "gamma" in str(error) else ""
    also = ", 'linear:0.9', 'exponential:0.99'" if discounts else ""
    raise InputError(
      f"{path}: {value!r} must be {num_slots} numbers such as '{':'.join('1' * num_slots)}'{also},"
      f" or '' for the default{detail}"
    ) from None


def parse_whole_numbers(path: str, value: Any, example: str) -> tuple[int, ...] | None:
  """A list of integers.

  Args:
    path: the path of the field, for the message.
    value: 'a:b', a sequence of integers, or '' or None for the default.
    example: an example of a valid value, for the message.

  Returns:
    The numbers; None means the default.

  Raises:
    InputError: the value is invalid.
  """
  if value is None or value == "":
    return None
  items: Iterable[Any] = value.split(":") if isinstance(value, str) else value
  try:
    return tuple(int(x) if isinstance(x, str) else operator.index(x) for x in items)
  except (TypeError, ValueError):
    raise InputError(f"{path}: {value!r} must be whole numbers such as {example!r}, or '' for the default") from None


def written(values: Iterable[float] | None) -> str:
  """A list in the form that it has in a config, which preserves the numbers; '' for None."""
  return "" if values is None else ":".join(map(_written, values))


def _written(value: float) -> str:
  """The number with six digits, or with as many digits as are needed to represent it exactly."""
  short = f"{value:g}"
  return short if float(short) == value else repr(float(value))
