"""The group `method` of a config: which method is trained, with which options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from cyb_jax.configs import lists
from cyb_jax.methods import MethodConfig

# One number for each slot, written '0:0:0:1'; gamma also 'linear:g0' and 'exponential:g0'.
LISTS = ("omega", "gamma", "rho")
# Whole numbers, with an example of each.
_WHOLE_NUMBERS = {"jacobi": "2:3", "fork_layers": "3:7:11"}


def default_method() -> dict[str, Any]:
  """The values of the group `method` that experiments start from: CYB-AP with three pauses."""
  values = written_method(MethodConfig(pauses=3))
  # A reference, so that a flag can also set None (no shift).
  values["dont_know_prior"] = config_dict.FieldReference(0.9, field_type=float)
  return values


def written_method(method: MethodConfig) -> dict[str, Any]:
  """A method's options as a ConfigDict has them: lists as 'a:b', '' where there is none."""
  values = dataclasses.asdict(method)
  for name in (*LISTS, *_WHOLE_NUMBERS):
    values[name] = lists.written(values[name])
  return values


def parse_method(values: Mapping[str, Any]) -> dict[str, Any]:
  """The values of the group `method` with lists as tuples, otherwise as they are.

  Raises:
    InputError: a list that can't be read.
  """
  values = dict(values)
  pauses = values.get("pauses", 0)
  num_slots = pauses + 1 if isinstance(pauses, int) and pauses >= 0 else 1
  for name in LISTS:
    if name in values:
      given = values[name]
      values[name] = lists.parse_weights(f"method.{name}", given, num_slots, discounts=name == "gamma")
      if name == "omega" and isinstance(given, str) and _is_last_slot(values[name], num_slots):
        values[name] = None
  for name, example in _WHOLE_NUMBERS.items():
    if name in values:
      numbers = lists.parse_whole_numbers(f"method.{name}", values[name], example)
      values[name] = getattr(MethodConfig, name) if numbers is None else numbers
  return values


def _is_last_slot(omega: tuple[float, ...] | None, num_slots: int) -> bool:
  """Whether omega spells out its default: all weight on the last slot."""
  return omega is not None and len(omega) == num_slots and omega[-1] > 0 and not any(omega[:-1])
