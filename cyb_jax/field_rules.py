"""Rules for the values of config fields: a rule checks a value and describes the accepted values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from cyb_jax.errors import InputError, is_seed


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule for a field's value.

  Attributes:
    accepts: value -> whether it is valid.
    wanted: a description of the accepted values that can follow 'must be'.
  """

  accepts: Callable[[Any], bool]
  wanted: str


def _is_finite(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


AT_LEAST_1 = Rule(lambda value: _is_integer(value) and value >= 1, "at least 1")
NOT_NEGATIVE = Rule(lambda value: _is_finite(value) and value >= 0, "not negative")
POSITIVE = Rule(lambda value: _is_finite(value) and value > 0, "positive")
SHARE = Rule(lambda value: _is_finite(value) and 0 <= value <= 1, "in [0, 1]")
POSITIVE_SHARE = Rule(lambda value: _is_finite(value) and 0 < value <= 1, "in (0, 1]")
INNER_SHARE = Rule(lambda value: _is_finite(value) and 0 < value < 1, "inside (0, 1)")
SEED = Rule(is_seed, "in [0, 2^32)")
DECAY = Rule(lambda value: _is_finite(value) and 0 <= value < 1, "in [0, 1)")
SWITCH = Rule(lambda value: isinstance(value, bool), "True or False")


def not_negative(zero: str) -> Rule:
  """Accepts finite numbers that are not negative; `zero` describes the meaning of 0, such as 'means no clipping'."""
  return Rule(NOT_NEGATIVE.accepts, f"{NOT_NEGATIVE.wanted}; 0 {zero}")


def whole_number(minimum: int = 0, maximum: float = math.inf, *, note: str = "") -> Rule:
  """Accepts integers from `minimum` to `maximum`; `note` is added to the description."""
  limit = "" if maximum == math.inf else f" and at most {maximum}"
  return Rule(
    lambda value: _is_integer(value) and minimum <= value <= maximum,
    f"a whole number of at least {minimum}{limit}{note}",
  )


def number_of_slots(minimum: int = 0, *, note: str = "") -> Rule:
  """Accepts numbers of a token's slots, or pauses; the maximum keeps arrays with one entry per slot small."""
  return whole_number(minimum, 1000, note=note)


def one_of(*accepted: str, wanted: str = "") -> Rule:
  """Accepts one of these strings; `wanted` replaces their description."""
  return Rule(lambda value: value in accepted, wanted or f"one of {', '.join(accepted)}")


def checked_later(wanted: str) -> Rule:
  """Accepts every value, for fields whose check needs other information; `wanted` describes the accepted values."""
  return Rule(lambda value: True, wanted)


def or_none(rule: Rule, none: str) -> Rule:
  """Accepts None and the values that a rule accepts; `none` describes the meaning of None, such as 'for no cap'."""
  return Rule(lambda value: value is None or rule.accepts(value), f"{rule.wanted}, or None {none}")


def check_fields(group: str, holder: object, rules: Mapping[str, Rule], *, prefix: str = "") -> None:
  """Checks the attributes of an object by the rules of a config group.

  Args:
    group: the name of the config group.
    holder: the object with the attributes.
    rules: the rules by field name.
    prefix: a prefix of field names that the names of the attributes lack.

  Raises:
    InputError: an attribute violates its rule. The message names 'group.field', the value, and the accepted values;
      only the first violation is reported.
  """
  for name, rule in rules.items():
    value = getattr(holder, name.removeprefix(prefix))
    if not rule.accepts(value):
      raise InputError(f"{group}.{name}: {_written(value)} must be {rule.wanted}")


def _written(value: Any) -> str:
  """A value in a message; lists have the form that they have in a config."""
  if not isinstance(value, tuple):
    return repr(value)
  return repr(("," if any(isinstance(x, str) for x in value) else ":").join(map(str, value)))
