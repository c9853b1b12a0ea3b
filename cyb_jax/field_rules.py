"""Which values the fields of a config accept: one rule both checks a value and describes the accepted values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from cyb_jax.errors import InputError, is_seed


@dataclasses.dataclass(frozen=True)
class Rule:
  """What a field's value must be.

  Attributes:
    accepts: whether a value is valid.
    wanted: what would be accepted, after 'must be'.
  """

  accepts: Callable[[Any], bool]
  wanted: str


def _is_finite(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


AT_LEAST_1 = Rule(lambda value: _is_whole(value) and value >= 1, "at least 1")
NOT_NEGATIVE = Rule(lambda value: _is_finite(value) and value >= 0, "not negative")
POSITIVE = Rule(lambda value: _is_finite(value) and value > 0, "positive")
SHARE = Rule(lambda value: _is_finite(value) and 0 <= value <= 1, "in [0, 1]")
POSITIVE_SHARE = Rule(lambda value: _is_finite(value) and 0 < value <= 1, "in (0, 1]")
INNER_SHARE = Rule(lambda value: _is_finite(value) and 0 < value < 1, "inside (0, 1)")
SEED = Rule(is_seed, "in [0, 2^32)")
DECAY = Rule(lambda value: _is_finite(value) and 0 <= value < 1, "in [0, 1)")
SWITCH = Rule(lambda value: isinstance(value, bool), "True or False")


def not_negative(zero: str) -> Rule:
  """A finite number that is not negative; `zero`: what the value 0 means, such as 'clips nothing'."""
  return Rule(NOT_NEGATIVE.accepts, f"{NOT_NEGATIVE.wanted}; 0 {zero}")


def whole_number(minimum: int = 0, *, note: str = "") -> Rule:
  """A whole number of at least `minimum`; `note` is added to the description."""
  return Rule(lambda value: _is_whole(value) and value >= minimum, f"a whole number of at least {minimum}{note}")


def one_of(*accepted: str, wanted: str = "") -> Rule:
  """One of these texts; `wanted`: another description of them."""
  return Rule(lambda value: value in accepted, wanted or f"one of {', '.join(accepted)}")


def checked_later(wanted: str) -> Rule:
  """A rule that accepts every value, for fields that are checked where more is known; `wanted` describes them."""
  return Rule(lambda value: True, wanted)


def or_none(rule: Rule, none: str) -> Rule:
  """What a rule accepts, or None; `none`: what None means, such as 'for no cap'."""
  return Rule(lambda value: value is None or rule.accepts(value), f"{rule.wanted}, or None {none}")


def check_fields(group: str, holder: object, rules: Mapping[str, Rule], *, prefix: str = "") -> None:
  """Checks the attributes of an object by the rules of a group of the config.

  Args:
    group: of the config.
    holder: has the attributes.
    rules: by the field of the config.
    prefix: what the names of the fields have in addition to those of the attributes.

  Raises:
    InputError: an attribute breaks its rule. The message names 'group.field', the value, and what would be accepted;
      the first broken rule is reported.
  """
  for name, rule in rules.items():
    value = getattr(holder, name.removeprefix(prefix))
    if not rule.accepts(value):
      raise InputError(f"{group}.{name}: {_written(value)} must be {rule.wanted}")


def _written(value: Any) -> str:
  """A value in a message; lists as a config writes them."""
  if not isinstance(value, tuple):
    return repr(value)
  return repr(("," if any(isinstance(x, str) for x in value) else ":").join(map(str, value)))
