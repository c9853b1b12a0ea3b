"""The group `method` of a config: the name and the options of the method.

In a ConfigDict, the group has `name` and the options of all methods, initially unset. An unset option has the default
of the method; options of other methods must not be set. An unset option is None, except `dont_know_prior`, for which
None means "no shift" and NaN means unset. A config.json omits unset options.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ml_collections import config_dict

from cyb_jax import methods
from cyb_jax.configs import lists
from cyb_jax.configs.typed import typed
from cyb_jax.errors import InputError, did_you_mean
from cyb_jax.methods import MethodConfig

# Options for which None is a value and does not mean unset.
_NONE_IS_A_VALUE = ("dont_know_prior",)
# Version 0.1 wrote these options into config.json for every method, even if the method did not have them.
_WRITTEN_BY_0_1: dict[str, Any] = {
  "loss": "ap", "pauses": 0, "omega": "", "gamma": "", "rho": "", "alpha": 0.0, "recipe": "constant",
  "slot_budget": 0.0, "policy_floor": 0.1, "dont_know": "token", "dont_know_prior": 0.9,
  "calibration_batches": 0, "stopping_warmup": 0,
  "pause_input": "pause", "pause_visibility": "visible", "pause_offset": False, "pause_shared": False,
  "pause_positions": "token", "pause_places": "random", "pause_fraction": 0.1, "jacobi": "2:3", "router_penalty": 0.0,
  "prune_below": 1e-4, "fork_layers": "", "stream_budget": 2.0, "combine": "probabilities",
}  # fmt: skip


def all_options() -> dict[str, type]:
  """The options of all methods with their types in a ConfigDict; lists are strings such as '0:0:0:1'."""
  options: dict[str, type] = {}
  for name in methods.METHODS:
    for field, hint in _hints(name).items():
      kind = _kinds(hint)[0]
      options[field] = str if kind is tuple else kind
  return dict(sorted(options.items()))


def default_method() -> dict[str, Any]:
  """The default values of the group `method`: `cyb`, with all options unset."""
  values: dict[str, Any] = {"name": "cyb"}
  for name, kind in all_options().items():
    if name in _NONE_IS_A_VALUE:
      # A FieldReference of this type also accepts None.
      values[name] = config_dict.FieldReference(math.nan, field_type=kind)
    else:
      values[name] = config_dict.placeholder(kind)
  return values


def without_unset(values: Mapping[str, Any]) -> dict[str, Any]:
  """The options of the group in a ConfigDict that are set."""

  def is_unset(name: str, value: Any) -> bool:
    if name in _NONE_IS_A_VALUE:
      return isinstance(value, float) and math.isnan(value)
    return value is None

  return {name: value for name, value in values.items() if not is_unset(name, value)}


def parse_method(values: Mapping[str, Any], elsewhere: Collection[str] = ()) -> MethodConfig:
  """The method's config dataclass, from the options that are set.

  Args:
    values: the values of the group.
    elsewhere: the fields of other groups, for the hint in an error about an unknown option.

  Raises:
    InputError: the method is unknown, does not have an option, or a value is invalid.
  """
  values = without_unset(values)
  name = values.pop("name", "cyb")
  hints = _hints(name) if isinstance(name, str) else methods.config_class(name)
  for option in values:
    if option not in hints:
      raise InputError(f"config.method.{option}: unknown field; {_hint(name, option, list(hints), elsewhere)}")
  parsed = {}
  num_slots = _num_slots(name, values)
  for option, value in values.items():
    hint = hints[option]
    if _kinds(hint)[0] is tuple:
      value = _parse_list(option, value, hint, num_slots)
      if value is None:
        continue  # '' means the default
    parsed[option] = typed(f"method.{option}", value, hint)
  return methods.configure(name, **parsed)


def written_method(method: MethodConfig) -> dict[str, Any]:
  """The name and all options of a method, with the values that they have in a ConfigDict: lists are 'a:b', or ''."""
  values: dict[str, Any] = {"name": method.name}
  hints = _hints(method.name)
  for field in dataclasses.fields(method):
    value = getattr(method, field.name)
    values[field.name] = lists.written(value) if _kinds(hints[field.name])[0] is tuple else value
  return values


def migrated(values: Mapping[str, Any]) -> dict[str, Any]:
  """The group of a config.json without the options of other methods that version 0.1 wrote."""
  name = values.get("name", "cyb")
  if not isinstance(name, str) or name not in methods.METHODS:
    return dict(values)
  own = methods.option_names(name)
  return {
    option: value
    for option, value in values.items()
    if option == "name" or option in own or option not in _WRITTEN_BY_0_1 or value != _WRITTEN_BY_0_1[option]
  }


def defaults(name: str) -> dict[str, Any]:
  """The defaults of a method's options in the form that they have in a config.json; empty for an unknown method."""
  if name not in methods.METHODS:
    return {}
  hints = _hints(name)
  return {
    field.name: lists.written(field.default) if _kinds(hints[field.name])[0] is tuple else field.default
    for field in dataclasses.fields(methods.config_class(name))
  }


def filled(values: Mapping[str, Any]) -> dict[str, Any]:
  """The group of a config.json in which all missing options have their defaults."""
  name = values.get("name", "cyb")
  return {"name": name} | defaults(name) | without_unset(migrated(values))


def _hints(name: str) -> dict[str, Any]:
  """The type of each option of a method."""
  config = methods.config_class(name)
  hints = typing.get_type_hints(config)
  return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def _kinds(hint: Any) -> list[Any]:
  """The types of a type hint: int for `int`; tuple and NoneType for `tuple[float, ...] | None`."""
  kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  return [typing.get_origin(kind) or kind for kind in kinds]


def _num_slots(name: str, values: Mapping[str, Any]) -> int:
  """W, for messages about lists with one number for each slot."""
  (default,) = [f.default for f in dataclasses.fields(methods.config_class(name)) if f.name == "pauses"] or [0]
  pauses = values.get("pauses", default)
  return pauses + 1 if isinstance(pauses, int) and pauses >= 0 else 1


def _parse_list(option: str, value: Any, hint: Any, num_slots: int) -> tuple[float, ...] | tuple[int, ...] | None:
  """A list of numbers; None if the value is the default."""
  path = f"method.{option}"
  (of_tuple,) = [kind for kind in _members(hint) if typing.get_origin(kind) is tuple]
  if typing.get_args(of_tuple)[0] is int:
    return lists.parse_whole_numbers(path, value, "3:7:11" if option == "fork_layers" else "2:3")
  numbers = lists.parse_weights(path, value, num_slots, discounts=option == "gamma")
  if option == "omega" and isinstance(value, str) and _is_last_slot(numbers, num_slots):
    return None
  return numbers


def _members(hint: Any) -> Iterator[Any]:
  yield from typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _is_last_slot(omega: tuple[float, ...] | None, num_slots: int) -> bool:
  """Whether omega equals its default: all weight is on the last slot."""
  return omega is not None and len(omega) == num_slots and omega[-1] > 0 and not any(omega[:-1])


def _hint(name: str, option: str, own: list[str], elsewhere: Collection[str]) -> str:
  """A hint for an option that a method does not have; `elsewhere` has the fields of other groups."""
  having = [other for other in methods.METHODS if option in _hints(other)]
  if having:
    return (
      f"method {name!r} has no such option; it accepts {', '.join(sorted(own)) or 'none'} (methods with this option:"
      f" {', '.join(having)})"
    )
  accepted = [f"method.{field}" for field in (*own, "name")]
  return did_you_mean(f"method.{option}", [*accepted, *elsewhere], written=str, listed=[*own, "name"])
