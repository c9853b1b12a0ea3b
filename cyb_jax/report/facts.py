"""The facts about a run that a report needs, from the run's own records: its config and its statistics.

A report distinguishes methods by their records, not by name. Only this module reads the registry of methods, for facts
that no record has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cyb_jax import configs
from cyb_jax.methods import METHODS, option_names

Statistics = Mapping[str, Any]
"""An object of statistics.json, see `evaluation.pause_records`."""

ONE_SLOT = "This method has one slot per token and no pauses, so there is nothing to show."
_FIXED = "This method does not decide when it stops, so there is nothing to show."

# Methods with another spelling in the literature.
_AS_PUBLISHED = {"cyb": "CYB", "tbys": "TBYS"}


def read_on(statistics: Statistics) -> str:
  """A description of the evaluated text."""
  limit = "all windows" if statistics["limit"] is None else f"the first {statistics['limit']:,} windows"
  return f"the {statistics['split']} split, {limit}: {statistics['tokens']:,} tokens"


def why_no_decisions(statistics: Statistics) -> str:
  """The reason why a record has no statistics of d: the method has one slot, or a fixed rule of stopping."""
  return ONE_SLOT if statistics["num_slots"] == 1 else _FIXED


def looks_ahead(statistics: Statistics) -> bool:
  """Whether the method is non-causal: its text was also evaluated token by token."""
  return statistics.get("autoregressive") is not None


def fuses_slots(statistics: Statistics) -> bool:
  """Whether the model reads one state into which all slots are fused; otherwise the slots are a mixture."""
  # Records of version 0.1 do not have this key; only one of its methods fuses slots.
  return statistics.get("fused", statistics["method"] == "ponderlm3")


def stopping_loss(method: Mapping[str, Any]) -> str | None:
  """'ap', 'va' or 'dp' for a method with a learned stopping time; None for methods that are trained by cross-entropy.

  Args:
    method: the part `method` of a config.
  """
  if method["name"] not in METHODS or "loss" not in option_names(method["name"]):
    return None
  return str(_filled(method)["loss"])


def method_name(method: Mapping[str, Any]) -> str:
  """The name of a method in its paper, from the part `method` of a config."""
  name, pauses, loss = str(method["name"]), _filled(method).get("pauses", 0), stopping_loss(method)
  published = _AS_PUBLISHED.get(name, name)
  if loss is not None:
    return f"{published}-{loss.upper()}"
  return f"{published}-{pauses}" if pauses else name


def _filled(method: Mapping[str, Any]) -> Mapping[str, Any]:
  """The part `method` of a config, with defaults for the options that it does not set."""
  return configs.filled({"method": method})["method"]
