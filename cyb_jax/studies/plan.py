"""The rows of a study: the settings and their numbers of training steps, so that the chosen budgets are equal."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from cyb_jax import command_line, configs
from cyb_jax.errors import InputError
from cyb_jax.methods import Adaptive, Decoding
from cyb_jax.studies import matching, settings
from cyb_jax.studies.options import Options
from cyb_jax.studies.resolution import resolve

# Costs whose ratio differs from 1 by at most this number count as equal and share one pair of plain models.
_ALIKE = 0.02


@dataclasses.dataclass(frozen=True)
class Model:
  """The model of a setting under the study's config.

  Attributes:
    method: the method's name.
    step_flops: the FLOPs of a training step.
    inference_flops: the FLOPs per token with all slots; for a method without a cache, of a blockwise pass.
    paced: whether the method decides the number of slots for each token.
    identity: the resolved config; settings of the same identity are the same runs.
    costs: the costs of its rows, `report.trade_off.Costs`.
    start: the initialisation of its decoder, and whether its unembedding is tied: after few tokens these may matter
      more than the method.
  """

  method: str
  step_flops: float
  inference_flops: float
  paced: bool = False
  identity: str = ""
  costs: Any = None
  start: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Entry:
  """A row of the comparison: a setting for a number of steps, run with every seed.

  Attributes:
    setting: the setting that is trained.
    steps: the number of training steps.
    equal: the budgets that require this row; 'inference_flops' if the row belongs to a matched pair.
    also: further settings that are equal under this config.
  """

  setting: str
  steps: int
  equal: tuple[str, ...]
  also: tuple[str, ...] = ()

  def label(self, steps: int) -> str:
    """The row's name in a study whose reference has `steps` steps."""
    return self.setting if self.steps == steps else f"{self.setting}, {self.steps:,} steps"


@dataclasses.dataclass(frozen=True)
class Plan:
  """The runs of a study.

  Attributes:
    models: the models, by setting.
    shared: see `partners`.
    entries: the rows.
    note: a remark for readers of the results; None: no remark.
  """

  models: Mapping[str, Model]
  shared: Mapping[str, Sequence[str]]
  entries: Sequence[Entry]
  note: str | None


def make_plan(options: Options) -> Plan:
  """The rows of a study.

  Raises:
    InputError: the config does not exist or is invalid with a setting, or a budget is too small for a step.
  """
  named = dict.fromkeys((*options.settings, options.reference, settings.PLAIN))
  models = {setting: model_of(options, setting) for setting in named}
  shared = partners(options.settings, models) if "inference_flops" in options.equal else {}
  models |= {name: model_of(options, name) for first in shared for name in _grown(first)}
  entries = plan(options.settings, options.equal, options.steps, options.reference, models)
  uneven = uneven_starts(models, options.reference)
  if uneven:
    logging.warning("%s", uneven)
  note = " ".join(filter(None, (options.note, uneven))) or None
  return Plan(models, shared, entries, note)


def _grown(setting: str) -> list[str]:
  """The names of the plain models of the same cost as a setting."""
  return [f"{direction}@{setting}" for direction in settings.DIRECTIONS]


def partners(chosen: Sequence[str], models: Mapping[str, Model]) -> dict[str, list[str]]:
  """The settings that cost more than a plain model at inference, grouped by the first setting of nearly equal cost."""
  plain = models[settings.PLAIN]
  found: dict[str, list[str]] = {}
  for setting in chosen:
    cost = models[setting].inference_flops
    if models[setting].method == plain.method or cost <= (1 + _ALIKE) * plain.inference_flops:
      continue
    first = next((f for f in found if abs(cost / models[f].inference_flops - 1) <= _ALIKE), setting)
    found.setdefault(first, []).append(setting)
  return found


def plan(
  chosen: Sequence[str], equal: Sequence[str], steps: int, reference: str, models: Mapping[str, Model]
) -> list[Entry]:
  """The rows of a comparison, each once, in the order of the budgets.

  Args:
    chosen: the settings.
    equal: some of BUDGETS.
    steps: the steps of the reference.
    reference: a setting.
    models: the models by setting; with equal inference FLOPs also the deeper and wider models of `partners`.

  Raises:
    InputError: a budget is too small for a step.
  """
  requested = {
    "tokens": lambda: ((setting, steps, "tokens") for setting in chosen),
    "training_flops": lambda: _of_training_flops(chosen, steps, reference, models),
    "inference_flops": lambda: _of_inference_flops(chosen, steps, models),
  }
  rows: dict[tuple[str, int], Entry] = {}
  for setting, count, budget in [row for name in equal for row in requested[name]()]:
    key = models[setting].identity or setting, count
    row = rows.get(key) or Entry(setting, count, ())
    also = (*row.also, setting) if setting not in (row.setting, *row.also) else row.also
    rows[key] = Entry(row.setting, count, tuple(dict.fromkeys((*row.equal, budget))), also)
  return list(rows.values())


def _of_training_flops(
  chosen: Sequence[str], steps: int, reference: str, models: Mapping[str, Model]
) -> Iterator[tuple[str, int, str]]:
  """(setting, steps, budget) with the number of steps that costs as much as the steps of the reference."""
  total = steps * models[reference].step_flops
  # The quotient of equal numbers may be just below a whole number.
  counts = {setting: math.floor(total / models[setting].step_flops + 1e-9) for setting in chosen}
  for setting, count in counts.items():
    if count < 1:
      needed = math.ceil(models[setting].step_flops / models[reference].step_flops - 1e-9)
      raise InputError(
        f"--steps: {steps} steps of {reference!r} cost {total:.3g} training FLOPs, a budget too small for one step of"
        f" {setting!r}, which costs {models[setting].step_flops:.3g}; give at least {needed}"
      )
  yield from ((setting, count, "training_flops") for setting, count in counts.items())


def _of_inference_flops(
  chosen: Sequence[str], steps: int, models: Mapping[str, Model]
) -> Iterator[tuple[str, int, str]]:
  """(setting, steps, budget) of the settings and of the plain models that are matched to them."""
  matched = partners(chosen, models)
  belong = {setting for alike in matched.values() for setting in alike}
  for setting in chosen:
    # A setting without matched models is also run, under equal tokens.
    yield setting, steps, "inference_flops" if setting in belong else "tokens"
  for first in matched:
    yield from ((name, steps, "inference_flops") for name in _grown(first))


def model_of(options: Options, setting: str) -> Model:
  """The model of a setting under the study's config.

  Raises:
    InputError: the config does not exist, or is invalid with the setting.
  """
  from cyb_jax.report.trade_off import Costs

  config = experiment(options.config).get_config(options.argument(setting))
  config = resolve(command_line.override(config, options.fields))
  rows = matching.vocabulary(config)
  method, costs = config.build_method(rows), Costs.of(config, rows)
  return Model(
    method=config.method.name,
    step_flops=config.data.batch_size * config.data.sequence_length * costs.train,
    inference_flops=costs.inference,
    paced=_is_paced(method),
    identity=configs.to_json(config),
    costs=costs,
    start=tuple(getattr(method.decoder.config, name) for name in settings.PONDER_DECODER),
  )


def experiment(config: str) -> Any:
  """The module of an experiment, which has `get_config(argument)`.

  Raises:
    InputError: there is no file at this path.
  """
  path = pathlib.Path(command_line.installed(config))  # as in the programs
  if not path.is_file():
    raise InputError(f"--config: {config} does not exist; experiments/README.md lists the configs")
  spec = importlib.util.spec_from_file_location(f"_study_{path.stem}", path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _is_paced(method: Any) -> bool:
  """Whether a method decides the number of slots for each token and supports self-paced decoding."""
  return isinstance(method, Adaptive) and isinstance(method, Decoding) and method.num_slots > 1


def uneven_starts(models: Mapping[str, Model], reference: str) -> str | None:
  """A sentence about settings whose decoder has another initialisation than the reference; None if there are none."""
  others = [name for name, model in models.items() if model.start != models[reference].start]
  if not others:
    return None
  fields = ",".join(f"decoder.{name}={value}" for name, value in settings.PONDER_DECODER.items())
  return (
    f"{', '.join(others)}: the decoder has another initialisation than that of {reference}, which by itself changes the"
    f" perplexity; --fields={fields} gives all settings the initialisation of PonderLM-2."
  )
