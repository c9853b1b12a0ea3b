"""Checks the types of config values."""

from __future__ import annotations

import math
import types
import typing
from typing import Any

from cyb_jax.errors import InputError, shown


def typed(path: str, value: Any, hint: Any) -> Any:
  """Checks that a value has the type of its field, and returns it; a float field also accepts an int.

  Args:
    path: the path of the field, for the message.
    value: the value.
    hint: a type, or a union of types.

  Raises:
    InputError: the value has another type, or is a float that is not finite.
  """
  accepted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  accepted = tuple(typing.get_origin(kind) or kind for kind in accepted)
  if float in accepted and isinstance(value, int | float) and not isinstance(value, bool):
    try:
      number = float(value)
    except OverflowError:  # an int beyond all floats
      number = math.inf
    if not math.isfinite(number):
      raise InputError(f"{path}: {shown(value)} must be finite")
    return number
  if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
    wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in accepted)
    raise InputError(f"{path}: {value!r} must be {wanted}")
  return value
