"""What a report needs to know of a run, from the run's own records: its config, its statistics.

A report knows methods by what their records hold, not by name. What no record holds, the registry of methods answers;
it is asked here alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cyb_jax import configs
from cyb_jax.methods import METHODS, option_names

Statistics = Mapping[str, Any]
"""An object of statistics.json, see `evaluation.pause_records`."""

ONE_SLOT = "This method has one slot a token and no pauses: there is nothing to show."
_FIXED = "This method doesn't decide when it stops: there is nothing to show."

# Methods whose name the literature writes in its own way.
_AS_PUBLISHED = {"cyb": "CYB", "tbys": "TBYS"}


def read_on(statistics: Statistics) -> str:
  """Which text the numbers are about, in words."""
  limit = "whole" if statistics["limit"] is None else f"its first {statistics['limit']:,} windows"
  return f"the {statistics['split']} split, {limit}: {statistics['tokens']:,} tokens"


def why_no_decisions(statistics: Statistics) -> str:
  """Why a record has nothing about d: the method has one slot, or a rule decides when it stops."""
  return ONE_SLOT if statistics["num_slots"] == 1 else _FIXED


def looks_ahead(statistics: Statistics) -> bool:
  """Whether the method isn't causal: its text was evaluated token by token in addition."""
  return statistics.get("autoregressive") is not None


def fuses_slots(statistics: Statistics) -> bool:
  """Whether one state is read that all slots are fused into; else the slots are a mixture."""
  # Records of version 0.1 do not tell; one of its methods fuses its slots.
  return statistics.get("fused", statistics["method"] == "ponderlm3")


def stopping_loss(method: Mapping[str, Any]) -> str | None:
  """'ap', 'va' or 'dp' for a method with a learned stopping time; None for the others, trained by cross-entropy.

  Args:
    method: the part `method` of a config.
  """
  if method["name"] not in METHODS or "loss" not in option_names(method["name"]):
    return None
  return str(_filled(method)["loss"])


def method_name(method: Mapping[str, Any]) -> str:
  """A method as its paper calls it, from the part `method` of a config."""
  name, pauses, loss = str(method["name"]), _filled(method).get("pauses", 0), stopping_loss(method)
  published = _AS_PUBLISHED.get(name, name)
  if loss is not None:
    return f"{published}-{loss.upper()}"
  return f"{published}-{pauses}" if pauses else name


def _filled(method: Mapping[str, Any]) -> Mapping[str, Any]:
  """The part `method` of a config, which leaves out options that are not set, with their defaults."""
  return configs.filled({"method": method})["method"]
