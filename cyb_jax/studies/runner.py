"""The runs of a study, each in its own folder; runs that an interrupted study has finished are not repeated."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from cyb_jax import jsonl
from cyb_jax.errors import Failed, InputError
from cyb_jax.storage import atomic_write
from cyb_jax.studies.options import Options
from cyb_jax.studies.plan import Entry, Plan
from cyb_jax.studies.processes import Processes

# The maximum number of rates that are tried in addition to the given rates, in factors of two.
MAX_EXTENSIONS = 4


@dataclasses.dataclass(frozen=True)
class Reading:
  """The evaluation of a run.

  Attributes:
    record: the record of the compared split.
    paced: the record of the self-paced evaluation; None: not evaluated self-paced.
  """

  record: dict[str, Any]
  paced: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Measured:
  """A row whose runs have finished.

  Attributes:
    entry: the row.
    rate: its best learning rate.
    validation_by_rate: the validation perplexity with seed 0, by rate; inf: the run diverges.
    readings: the evaluations by seed of the runs that do not diverge; at least one.
  """

  entry: Entry
  rate: float
  validation_by_rate: Mapping[float, float]
  readings: Mapping[int, Reading]

  @property
  def runs(self) -> list[tuple[Entry, float, int]]:
    """(row, rate, seed) of the runs that do not diverge."""
    return [(self.entry, self.rate, seed) for seed in self.readings]


class Study:
  """The runs of a comparison, each in a folder named after its setting, steps, rate and seed.

  Args:
    folder: the study's folder.
    options: the study's options.
  """

  def __init__(self, folder: pathlib.Path, options: Options):
    self.folder, self.options = folder, options
    self.processes = Processes(options.jobs)

  def measure(self, plan: Plan, rates: Sequence[float]) -> list[Measured]:
    """Trains and evaluates every row with every seed at its best rate.

    Returns:
      The rows whose programs have all succeeded and that have a run that does not diverge; `processes.failures` has a
      line for each other row.
    """
    searches = [(entry, rates) for entry in plan.entries]
    found = self.processes.map(self.tune, searches, description="searching the rates", unit="rows")
    by_rate = dict(zip(plan.entries, found))
    best = {entry: best_rate(found) for entry, found in by_rate.items() if found}
    runs = [(entry, rate, seed) for entry, rate in best.items() for seed in range(self.options.seeds)]
    paced = {entry: self.options.self_paced if plan.models[entry.setting].paced else 0 for entry in plan.entries}
    items = [(*run, paced[run[0]]) for run in runs]
    finish = self.processes.map(lambda *item: (self.finish(*item),), items, description="all seeds", unit="runs")
    finished = dict(zip(runs, finish))
    measured = []
    for entry, rate in best.items():
      results = {seed: finished[entry, rate, seed] for seed in range(self.options.seeds)}
      if not all(results.values()):
        continue
      readings = {seed: reading for seed, (reading,) in results.items() if reading is not None}
      if readings:
        measured.append(Measured(entry, rate, by_rate[entry], readings))
      else:
        label = self.label(entry)
        self.processes.failures.append(f"{label} diverges at rate {rate:g} with all seeds; give lower --rates")
    return measured

  def tune(self, entry: Entry, rates: Sequence[float]) -> dict[float, float]:
    """Validation perplexity by rate: the search continues until there is a worse rate on both sides of the best rate.

    Raises:
      Failed: the run diverges at all rates.
    """
    search = self.options.search
    found = {rate: self._perplexity(entry, rate) for rate in rates}
    for _ in range(MAX_EXTENSIONS if search else 0):
      best = best_rate(found)
      if best == min(found):
        extra = best / 2
      elif best == max(found):
        extra = best * 2
      else:
        break
      found[extra] = self._perplexity(entry, extra)
    best = best_rate(found)
    if found[best] == math.inf:
      tried = ", ".join(f"{rate:g}" for rate in found)
      raise Failed(f"--rates: {self.label(entry)} diverges at {tried}; give lower rates", {})
    if search and best in (min(found), max(found)):
      logging.warning("%s: the best rate, %g, is at the end of the searched range", self.label(entry), best)
    return found

  def _perplexity(self, entry: Entry, rate: float) -> float:
    from cyb_jax.report import trade_off

    return trade_off.compared_perplexity(self.train(entry, rate, 0))

  def train(self, entry: Entry, rate: float, seed: int) -> dict[str, Any]:
    """The validation record of a run, which is trained if necessary; the perplexity is None if the run diverges."""
    workdir = self._workdir(entry, rate, seed)
    start = time.monotonic()

    def train() -> dict[str, Any]:
      record = self._program(
        "train",
        f"--config={self.options.config}:{self.options.argument(entry.setting)}",
        f"--workdir={workdir}",
        *(f"--config.{field}" for field in self.options.fields),
        f"--config.optimizer.learning_rate={rate:g}",
        f"--config.train.seed={seed}",
        f"--config.data.seed={seed}",
        f"--config.train.steps={entry.steps}",
        "--config.train.eval_every=0",
      )
      result = self.label(entry), rate, seed, record["perplexity"], time.monotonic() - start
      logging.info("%s, rate %g, seed %d: perplexity %s, %.0f s", *result)
      return record

    # A separate file, because each evaluation overwrites evaluation.json.
    return _kept(workdir / "validation.json", train)

  def evaluate(self, entry: Entry, rate: float, seed: int, split: str, windows: int | None) -> dict[str, Any]:
    """A record of a trained run: on `windows` windows in a self-paced context, or (None) on the complete split."""
    workdir = self._workdir(entry, rate, seed)
    options = [f"--workdir={workdir}", f"--split={split}"]
    if windows is None:
      return _kept(workdir / f"{split}.json", lambda: self._program("evaluate", *options))
    options += ["--context=self_paced", f"--limit={windows}"]
    return _kept(workdir / f"self_paced-{split}-{windows}.json", lambda: self._program("evaluate", *options))

  def finish(self, entry: Entry, rate: float, seed: int, paced: int) -> Reading | None:
    """The evaluation of a run, which is trained if necessary; None if the run diverges.

    Args:
      entry, rate, seed: identify the run.
      paced: the number of windows that are also evaluated self-paced.

    Raises:
      Failed: a program has failed.
    """
    from cyb_jax.report import trade_off

    record = self.train(entry, rate, seed)
    split = self.options.split
    if self.options.test and record["perplexity"] is not None:
      record = self.evaluate(entry, rate, seed, split, None)
    if trade_off.compared_perplexity(record) == math.inf:
      logging.warning(
        "%s diverges at rate %g with seed %d: the row uses the other seeds", self.label(entry), rate, seed
      )
      return None
    return Reading(record, self.evaluate(entry, rate, seed, split, paced) if paced else None)

  def report(self, entry: Entry, rate: float, seed: int) -> None:
    """Writes a run's report if it does not exist."""
    workdir = self._workdir(entry, rate, seed)
    if not (workdir / "report" / "index.html").exists():
      self._program("report", f"--workdir={workdir}")

  def report_all(self, runs: Sequence[tuple[Entry, float, int]]) -> str:
    """Writes the page that compares runs with existing reports; returns its path."""
    folders = ",".join(str(self._workdir(*run)) for run in runs)
    return self._program("report", f"--compare={folders}", f"--output={self.folder / 'report'}")["report"]

  def label(self, entry: Entry) -> str:
    return entry.label(self.options.steps)

  def _workdir(self, entry: Entry, rate: float, seed: int) -> pathlib.Path:
    steps = "" if entry.steps == self.options.steps else f"steps{entry.steps}-"
    return self.folder / entry.setting.replace("/", "-") / f"{steps}rate{rate:g}-seed{seed}"

  def _program(self, name: str, *options: str) -> dict[str, Any]:
    """The JSON object that a program prints.

    Raises:
      Failed: the program ends with an error.
    """
    return self.processes.program(f"cyb_jax.cli.{name}", *options)


def best_rate(perplexity_by_rate: Mapping[float, float]) -> float:
  """The rate with the lowest perplexity; the lowest rate in case of ties (for example, if several diverge)."""
  return min(perplexity_by_rate, key=lambda rate: (perplexity_by_rate[rate], rate))


def _kept(path: pathlib.Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """The content of a JSON file, which is created if it does not exist."""
  if path.exists():
    try:
      return jsonl.read_object(path)
    except ValueError as error:
      raise InputError(f"--workdir: {error}; remove the file, and the study computes it again") from error
  record = make()
  atomic_write(path, jsonl.dumps(record, indent=2) + "\n")
  return record
