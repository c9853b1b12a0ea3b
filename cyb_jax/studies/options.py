"""The options of a study: the compared settings, the budgets, and the number of seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cyb_jax.errors import InputError
from cyb_jax.storage import absolute
from cyb_jax.studies import settings

BUDGETS = ("tokens", "training_flops", "inference_flops")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The options of a study; the flags of `cyb-study` have the same names.

  Attributes:
    config: the path of the experiment, which takes settings as arguments.
    settings: names of settings, each once.
    rates: the learning rates, as text, with which the search of each setting starts.
    seeds: the number of seeds; a seed is an initialisation and an order of the data.
    steps: the steps of the reference, and of every run under equal tokens.
    jobs: the number of runs at a time.
    report: whether reports are written.
    search: whether further rates are tried while the best rate is the lowest or the highest.
    equal: some of BUDGETS.
    reference: the setting whose steps define the budget of training FLOPs.
    size: a decoder preset; '': the preset of the experiment.
    fields: fields of every run's config, 'a.b=value' each.
    test: whether the test split is evaluated at the end and compared; otherwise the validation split is compared.
    self_paced: the number of windows on which adaptive models are also evaluated self-paced; 0: none.
    note: a sentence about the study; None: no note.
  """

  config: str
  settings: Sequence[str]
  rates: Sequence[str]
  seeds: int
  steps: int
  jobs: int
  report: bool = True
  search: bool = True
  equal: Sequence[str] = ("tokens",)
  reference: str = settings.PLAIN
  size: str = ""
  fields: Sequence[str] = ()
  test: bool = True
  self_paced: int = 0
  note: str | None = None

  @property
  def split(self) -> str:
    """The split whose perplexities are compared."""
    return "test" if self.test else "validation"

  @property
  def identity(self) -> dict[str, Any]:
    """The options that all runs in a study's folder share; the content of study.json."""
    return with_absolute_paths(
      {"config": self.config, "steps": self.steps, "size": self.size, "fields": list(self.fields)}
    )

  def argument(self, setting: str) -> str:
    """The argument of the experiment for a setting."""
    return f"{setting},{self.size}" if self.size else setting

  def learning_rates(self) -> list[float]:
    """The rates as numbers.

    Raises:
      InputError: a rate is not a positive number.
    """
    text = ",".join(self.rates)
    try:
      rates = [float(rate) for rate in self.rates]
    except ValueError:
      raise InputError(f"--rates: {text!r} must be positive numbers") from None
    if not rates or not all(0 < rate < math.inf for rate in rates):
      raise InputError(f"--rates: {text!r} must be positive numbers")
    return rates

  def check(self) -> None:
    """Raises InputError for an option that is invalid for every config."""
    for name in ("seeds", "steps", "jobs"):
      value = getattr(self, name)
      if value < 1:
        raise InputError(f"--{name}: {value} must be at least 1")
    if self.self_paced < 0:
      raise InputError(f"--self_paced: {self.self_paced} must not be negative; 0 disables self-paced evaluation")
    self.learning_rates()
    if not self.settings or not _each_once(self.settings):
      raise InputError(
        f"--settings: {','.join(self.settings)!r} must be settings of cyb-train --list_settings, each once"
      )
    if not self.equal or not _each_once(self.equal) or not set(self.equal) <= set(BUDGETS):
      raise InputError(f"--equal: {','.join(self.equal)!r} must be some of {', '.join(BUDGETS)}, each once")
    for setting in (*self.settings, self.reference):
      settings.check(setting)


def with_absolute_paths(identity: Mapping[str, Any]) -> dict[str, Any]:
  """The content of a study.json with absolute paths, except experiments/NAME.py, an experiment of this package."""
  config = identity["config"]
  config = config if config.startswith("experiments/") else absolute(config)
  return {**identity, "config": config, "fields": [_with_absolute_path(field) for field in identity["fields"]]}


def _with_absolute_path(field: str) -> str:
  """A field 'a.b=value'; if the value is a path, it is made absolute."""
  from cyb_jax import runs  # imports jax

  name, equals, value = field.partition("=")
  group, dot, leaf = name.partition(".")
  changed = runs.with_absolute_paths({group: {leaf: value} if dot else value})[group]
  return f"{name}{equals}{changed[leaf] if dot else changed}"


def _each_once(names: Sequence[str]) -> bool:
  return len(set(names)) == len(names)
