"""The runs of a planned study, as a function of its plan and of the results so far.

A run's rate is known when the search of its row is done, and its initial model when a pretrained model has passed its
gate. Until then the run is listed but not ready.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cyb_jax.studies.plans import PlannedStudy, Pretraining, Row

PRETRAINING = "pretraining"


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of a planned study.

  Attributes:
    key: its name in the results, and its folder in the study's folder.
    stage: 'pretraining', 'search' or 'final'.
    row: the row's name; 'pretraining' for the pretraining.
    setting: the setting of the experiment.
    fields: the config fields of the row.
    steps: the number of training steps.
    seed: the seed of initialisation and data.
    rate: the learning rate; None: not known yet.
    start: the key of the run that it starts from; '': fresh parameters; None: not known yet.
    paced: whether it is also evaluated self-paced.
    cost: the cost of a step relative to the plan's reference.
  """

  key: str
  stage: str
  row: str
  setting: str
  fields: tuple[str, ...]
  steps: int
  seed: int
  rate: float | None
  start: str | None
  paced: bool = False
  cost: float = 1.0

  @property
  def ready(self) -> bool:
    """Whether the rate and the start of the run are known."""
    return self.rate is not None and self.start is not None


@dataclasses.dataclass(frozen=True)
class Gate:
  """The gate of one length of pretraining.

  Attributes:
    length: the number of pretraining steps.
    short, long: the reference's losses after the steps of the plan's reference and of its longer row, nats per token.
    limit: the largest difference with which the gate is passed.
  """

  length: int
  short: float
  long: float
  limit: float

  @property
  def passed(self) -> bool:
    return self.short - self.long <= self.limit

  def __str__(self) -> str:
    verdict = "passed" if self.passed else "not passed"
    return (
      f"gate after {self.length:,} steps of pretraining: {self.short:.4f} - {self.long:.4f} ="
      f" {self.short - self.long:.4f} nats, at most {self.limit:g}: {verdict}"
    )


def expand(plan: PlannedStudy, results: Mapping[str, Mapping[str, Any]]) -> list[Run]:
  """All runs of a plan, each once, in the order of execution.

  While the initial model of the rows is unknown, the keys presume that the current length of pretraining passes its
  gate.

  Args:
    plan: the plan.
    results: the entries of finished runs, by key.
  """
  runs: list[Run] = []
  if plan.pretraining is not None:
    gate_rows = (plan.row(plan.reference), plan.row(plan.longer))
    for start in _tried_starts(plan, results):
      runs.append(_pretraining_run(plan.pretraining, start))
      runs += _runs_of(plan, results, gate_rows, start, seeds=1)
  presumed = _presumed_start(plan, results)
  is_known = _chosen_start(plan, results) is not None
  for group in plan.groups:
    found = _runs_of(plan, results, group, presumed, seeds=max(row.seeds for row in group))
    runs += found if is_known else [dataclasses.replace(run, start=None) for run in found]
  unique: dict[str, Run] = {}
  for run in runs:
    unique.setdefault(run.key, run)
  return list(unique.values())


def gates(plan: PlannedStudy, results: Mapping[str, Mapping[str, Any]]) -> list[Gate]:
  """The decided gates, in the order of the lengths, up to the first gate that is passed."""
  found: list[Gate] = []
  for length in plan.pretraining.lengths if plan.pretraining else ():
    gate = _gate(plan, results, length)
    if gate is None:
      break
    found.append(gate)
    if gate.passed:
      break
  return found


def chosen_rate(plan: PlannedStudy, results: Mapping[str, Mapping[str, Any]], row: Row, start: str) -> float | None:
  """The rate with the lowest validation perplexity in a row's search; None: not known yet.

  Ties are resolved in favour of the lowest rate. A run that diverges, whose perplexity is None, counts as infinite.
  """
  searched = plan.row(row.rate_of) if row.rate_of else row
  keys = {rate: _key(searched, start, f"rate{rate:g}") for rate in plan.rates}
  if not all(key in results for key in keys.values()):
    return None
  perplexities = {rate: perplexity_of(results[key]) for rate, key in keys.items()}
  return min(perplexities, key=lambda rate: (perplexities[rate], rate))


def final_keys(plan: PlannedStudy, results: Mapping[str, Mapping[str, Any]], row: Row) -> list[str]:
  """The keys of a row's runs, by seed."""
  start = _presumed_start(plan, results)
  return [_key(row, start, f"seed{seed}") for seed in range(row.seeds)]


def search_keys(plan: PlannedStudy, results: Mapping[str, Mapping[str, Any]], row: Row) -> dict[float, str]:
  """The keys of a row's search, by rate; empty if the row uses the rate of another row."""
  start = _presumed_start(plan, results)
  return {} if row.rate_of else {rate: _key(row, start, f"rate{rate:g}") for rate in plan.rates}


def perplexity_of(entry: Mapping[str, Any]) -> float:
  """The validation perplexity of a finished run; infinite if it diverges."""
  return math.inf if entry["perplexity"] is None else entry["perplexity"]


def _tried_starts(plan: PlannedStudy, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """The keys of the pretrained models that are needed so far: those with a decided gate, and the next model."""
  assert plan.pretraining is not None
  tried = len(gates(plan, results)) + (_chosen_start(plan, results) is None) or 1
  return [_pretraining_key(length) for length in plan.pretraining.lengths[:tried]]


def _chosen_start(plan: PlannedStudy, results: Mapping[str, Mapping[str, Any]]) -> str | None:
  """The key of the run that all rows start from; '': fresh parameters; None: not known yet."""
  if plan.pretraining is None:
    return ""
  if len(plan.pretraining.lengths) == 1:
    return _pretraining_key(plan.pretraining.lengths[0])  # whatever the gate says
  decided = gates(plan, results)
  if decided and (decided[-1].passed or len(decided) == len(plan.pretraining.lengths)):
    return _pretraining_key(decided[-1].length)
  return None


def _presumed_start(plan: PlannedStudy, results: Mapping[str, Mapping[str, Any]]) -> str:
  """The chosen start; while it is unknown, the current pretrained model."""
  chosen = _chosen_start(plan, results)
  return _tried_starts(plan, results)[-1] if chosen is None else chosen


def _runs_of(
  plan: PlannedStudy, results: Mapping[str, Mapping[str, Any]], rows: Sequence[Row], start: str, seeds: int
) -> list[Run]:
  """The searches of rows, then their runs seed by seed."""
  runs = []
  for row in rows:
    if not row.rate_of:
      steps = plan.steps_of_search(row)
      runs += [_run(row, start, f"rate{rate:g}", "search", steps, 0, rate) for rate in plan.rates]
  for seed in range(seeds):
    for row in rows:
      if seed < row.seeds:
        rate = chosen_rate(plan, results, row, start)
        runs.append(_run(row, start, f"seed{seed}", "final", row.steps, seed, rate))
  return runs


def _run(row: Row, start: str, name: str, stage: str, steps: int, seed: int, rate: float | None) -> Run:
  return Run(
    key=_key(row, start, name),
    stage=stage,
    row=row.name,
    setting=row.setting,
    fields=row.fields,
    steps=steps,
    seed=seed,
    rate=rate,
    start=start,
    paced=row.paced and stage == "final",
    cost=row.cost,
  )


def _pretraining_run(pretraining: Pretraining, key: str) -> Run:
  return Run(
    key=key,
    stage=PRETRAINING,
    row=PRETRAINING,
    setting=pretraining.argument.partition(",")[0],
    fields=pretraining.fields,
    steps=int(key.rpartition("/")[2]),
    seed=0,
    rate=pretraining.rate,
    start="",
    cost=pretraining.cost,
  )


def _pretraining_key(length: int) -> str:
  return f"{PRETRAINING}/{length}"


def _key(row: Row, start: str, name: str) -> str:
  """A key such as 'ap/seed0', or 'ap/from6000/seed0' if the row starts from a pretrained model."""
  return f"{row.name}/from{start.rpartition('/')[2]}/{name}" if start else f"{row.name}/{name}"


def _gate(plan: PlannedStudy, results: Mapping[str, Mapping[str, Any]], length: int) -> Gate | None:
  """The gate of a length; None: not decided yet. A run that diverges has an infinite loss."""
  start = _pretraining_key(length)
  keys = [_key(plan.row(name), start, "seed0") for name in (plan.reference, plan.longer)]
  if plan.pretraining is None or not all(key in results for key in keys):
    return None
  short, long = (math.log(perplexity_of(results[key])) for key in keys)
  return Gate(length, short, long, plan.pretraining.limit)
