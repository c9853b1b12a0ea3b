"""The runs of a study, each in a folder of its own; what an interrupted study has finished is not run again."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from cyb_jax import jsonl
from cyb_jax.errors import Failed
from cyb_jax.storage import atomic_write
from cyb_jax.studies.options import Options
from cyb_jax.studies.plan import Entry, Plan
from cyb_jax.studies.processes import Processes

# Rates that are tried beyond the given ones, in factors of two.
MAX_EXTENSIONS = 4


@dataclasses.dataclass(frozen=True)
class Reading:
  """The evaluation of a run.

  Attributes:
    record: of the compared split.
    paced: of a self-paced context; None: the model wasn't read so.
  """

  record: dict[str, Any]
  paced: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Measured:
  """A row whose runs have finished.

  Attributes:
    entry: the row.
    rate: its best learning rate.
    validation_by_rate: the validation perplexity with seed 0, by rate; inf: it diverges.
    readings: by seed, of the runs that don't diverge; at least one.
  """

  entry: Entry
  rate: float
  validation_by_rate: Mapping[float, float]
  readings: Mapping[int, Reading]

  @property
  def runs(self) -> list[tuple[Entry, float, int]]:
    """(row, rate, seed) of the runs that don't diverge."""
    return [(self.entry, self.rate, seed) for seed in self.readings]


class Study:
  """The runs of a comparison, each in a folder named after its setting, steps, rate and seed.

  Args:
    folder: the study's.
    options: the study's.
  """

  def __init__(self, folder: pathlib.Path, options: Options):
    self.folder, self.options = folder, options
    self.processes = Processes(options.jobs, folder / ".compiled")

  def measure(self, plan: Plan, rates: Sequence[float]) -> list[Measured]:
    """Trains and evaluates every row with every seed at its best rate.

    Returns:
      The rows whose programs have all succeeded and of which a run doesn't diverge; of the others
      `processes.failures` has a line.
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
    """Validation perplexity by rate: the search goes on until the best rate has a worse one on either side.

    Raises:
      Failed: it diverges at all of them.
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
      raise Failed(f"--rates: {self.label(entry)} diverges at {tried}; give lower ones", {})
    if search and best in (min(found), max(found)):
      logging.warning("%s: the best rate, %g, is the last that was tried on its side", self.label(entry), best)
    return found

  def _perplexity(self, entry: Entry, rate: float) -> float:
    from cyb_jax.report import trade_off

    return trade_off.compared_perplexity(self.train(entry, rate, 0))

  def train(self, entry: Entry, rate: float, seed: int) -> dict[str, Any]:
    """The validation record of a run, trained where it isn't yet; its perplexity is None where it diverges."""
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

    # A file of its own, because each evaluation overwrites evaluation.json.
    return _kept(workdir / "validation.json", train)

  def evaluate(self, entry: Entry, rate: float, seed: int, split: str, windows: int | None) -> dict[str, Any]:
    """A record of a trained run: of so many windows in a self-paced context, or (None) of the whole split."""
    workdir = self._workdir(entry, rate, seed)
    options = [f"--workdir={workdir}", f"--split={split}"]
    if windows is None:
      return _kept(workdir / f"{split}.json", lambda: self._program("evaluate", *options))
    options += ["--context=self_paced", f"--limit={windows}"]
    return _kept(workdir / f"self_paced-{split}-{windows}.json", lambda: self._program("evaluate", *options))

  def finish(self, entry: Entry, rate: float, seed: int, paced: int) -> Reading | None:
    """The evaluation of a run, trained where it isn't yet; None where it diverges.

    Args:
      entry, rate, seed: of the run.
      paced: windows that are read in a self-paced context too.

    Raises:
      Failed: a program has failed.
    """
    from cyb_jax.report import trade_off

    record = self.train(entry, rate, seed)
    split = self.options.split
    if self.options.test and record["perplexity"] is not None:
      record = self.evaluate(entry, rate, seed, split, None)
    if trade_off.compared_perplexity(record) == math.inf:
      logging.warning("%s diverges at rate %g with seed %d: the row is of the others", self.label(entry), rate, seed)
      return None
    return Reading(record, self.evaluate(entry, rate, seed, split, paced) if paced else None)

  def report(self, entry: Entry, rate: float, seed: int) -> None:
    """Writes a run's own report, where it has none yet."""
    workdir = self._workdir(entry, rate, seed)
    if not (workdir / "report" / "index.html").exists():
      self._program("report", f"--workdir={workdir}")

  def report_all(self, runs: Sequence[tuple[Entry, float, int]]) -> str:
    """The path of the page that compares runs, all of which have their own reports."""
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
      Failed: it ends with an error.
    """
    return self.processes.program(f"cyb_jax.cli.{name}", *options)


def best_rate(perplexity_by_rate: Mapping[float, float]) -> float:
  """The rate of the lowest perplexity; of equal ones (which diverge, for example) the lowest."""
  return min(perplexity_by_rate, key=lambda rate: (perplexity_by_rate[rate], rate))


def _kept(path: pathlib.Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """The content of a file, which is made and written where it doesn't exist."""
  if path.exists():
    return json.loads(path.read_text())
  record = make()
  atomic_write(path, jsonl.dumps(record, indent=2) + "\n")
  return record
