"""Runs a planned study, several runs at a time, until all runs are done; see `cyb_jax.cli.study`.

A run is written to the results file when it is finished, and its folder is then no longer needed. The exception is a
pretrained model: if its folder was deleted before all runs that start from it are done, it is trained again.
"""

from __future__ import annotations

import concurrent.futures
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import logging

from cyb_jax.checkpointing.workdir import Lock
from cyb_jax.errors import Failed, InputError
from cyb_jax.progress import Meter
from cyb_jax.studies import planned_runs
from cyb_jax.studies.planned_runs import PRETRAINING, Run, expand
from cyb_jax.studies.plans import PlannedStudy
from cyb_jax.studies.processes import Processes
from cyb_jax.studies.results_file import Entry, ResultsFile, entry_of


def default_results(plan: PlannedStudy, folder: pathlib.Path) -> pathlib.Path:
  """The path of a plan's results: experiments/results/PLAN.json in a checkout, otherwise PLAN.json in the folder."""
  root = pathlib.Path(__file__).parents[2]
  parent = root / "experiments" / "results" if (root / "pyproject.toml").exists() else folder
  return parent / f"{plan.name}.json"


def check_stores(plan: PlannedStudy, stores: str) -> pathlib.Path | None:
  """The folder of a plan's prepared token stores; None: the plan prepares its own.

  Args:
    plan: the plan.
    stores: the value of the flag `--stores`.

  Raises:
    InputError: the plan needs prepared stores and they are not in the folder, or the plan needs none.
  """
  prepared = plan.pretraining is not None and not plan.pretraining.task
  if not prepared:
    if stores:
      raise InputError(f"--stores: the plan {plan.name!r} prepares its own token stores; omit it")
    return None
  from cyb_jax.data import is_store
  from cyb_jax.studies.documents import PARTS

  if not stores:
    raise InputError(
      f"--stores: the plan {plan.name!r} trains on prepared token stores; give the folder stores of a pack, which"
      " experiments/gpu_pack.py writes"
    )
  for part in PARTS[:2]:
    if not is_store(pathlib.Path(stores) / part):
      raise InputError(f"--stores: {stores}/{part} is not a token store; experiments/gpu_pack.py writes a pack with it")
  return pathlib.Path(stores)


def run(
  plan: PlannedStudy, folder: pathlib.Path, results: ResultsFile, jobs: int, stores: pathlib.Path | None = None
) -> dict[str, Any]:
  """Runs the missing runs of a planned study.

  Args:
    plan: the plan.
    folder: the folder of the runs, which is created if it does not exist.
    results: the results of the plan.
    jobs: the number of runs at a time, each on its share of the CPU's cores and of a GPU's memory.
    stores: the folder of the plan's prepared token stores; see `check_stores`.

  Returns:
    `plan`, `results` (the path), and the numbers of runs `done` and `missing`.

  Raises:
    InputError: `jobs` is below 1, or another study runs in the folder.
    Failed: a program has failed; the runs that do not depend on it are done.
    Interrupted: a signal has stopped a run, which has saved.
  """
  if jobs < 1:
    raise InputError(f"--jobs: {jobs} must be at least 1")
  folder.mkdir(parents=True, exist_ok=True)
  with Lock(folder) as lock:
    lock.hold()
    runner = PlannedRunner(plan, folder, results, Processes(jobs), jobs, stores)
    runner.run()
  runs = expand(plan, results.runs)
  done = sum(run.key in results.runs for run in runs)
  result = {"plan": plan.name, "results": str(results.path), "done": done, "missing": len(runs) - done}
  if runner.failures:
    first = next(iter(runner.failures.values()))
    raise Failed(
      f"{len(runner.failures)} runs of the study failed, the first: {first}. The same command continues with the"
      " missing runs",
      result | {"failed": runner.failures},
    )
  return result


class PlannedRunner:
  """The runs of a planned study.

  Args:
    plan: the plan.
    folder: the folder of the runs.
    results: the results of the plan.
    processes: the processes that run the programs.
    jobs: the number of runs at a time.
    stores: the folder of the plan's prepared token stores; None: the plan prepares its own.

  Attributes:
    failures: the error message of each failed run, by key.
  """

  def __init__(
    self,
    plan: PlannedStudy,
    folder: pathlib.Path,
    results: ResultsFile,
    processes: Processes,
    jobs: int,
    stores: pathlib.Path | None = None,
  ):
    self.failures: dict[str, str] = {}
    self._plan, self._folder, self._results = plan, folder, results
    self._processes, self._jobs, self._stores = processes, jobs, stores

  def run(self) -> None:
    """Runs all missing runs."""
    # Without a terminal, one line for each finished run is enough.
    with Meter(self._plan.name, total=0, unit="runs", lines=False) as meter:
      self._count(meter)
      meter.restart()  # runs of earlier processes do not count for the rate
      self._run(meter)

  def _count(self, meter: Meter) -> None:
    """Shows how many of the known runs are finished."""
    runs = expand(self._plan, self._results.runs)
    meter.total = len(runs)
    meter.reach(sum(run.key in self._results.runs for run in runs))

  def _run(self, meter: Meter) -> None:
    running: dict[concurrent.futures.Future[Any], Run] = {}
    try:
      while True:
        for run in self._next(list(running.values())):
          running[self._processes.submit(self.measure, run)] = run
        if not running:
          return
        finished, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in finished:
          self._finish(running.pop(future), future)
        self._count(meter)
    finally:
      self._processes.shut_down(sys.exception())

  def _next(self, running: Sequence[Run]) -> list[Run]:
    """The runs to start now, at most as many as there are free jobs."""
    busy = {run.key for run in running} | set(self.failures)
    found: dict[str, Run] = {}
    runs = expand(self._plan, self._results.runs)
    by_key = {run.key: run for run in runs}
    for run in runs:
      if len(running) + len(found) >= self._jobs:
        break
      if run.key in self._results.runs or not run.ready:
        continue
      if run.start and not self._is_trained(run.start):
        run = by_key[run.start]
      if run.key not in busy:
        found.setdefault(run.key, run)
    return list(found.values())

  def _finish(self, run: Run, future: concurrent.futures.Future[Any]) -> None:
    """Records the result of a run."""
    try:
      entry, tokens = future.result()
    except Failed as error:
      logging.warning("%s", error)
      self.failures[run.key] = str(error)
      return
    if run.stage == PRETRAINING and entry["perplexity"] is None:
      self.failures[run.key] = f"{run.key} diverges at rate {run.rate:g}, and nothing can start from it"
      return
    before = self._results.runs.get(run.key)
    if before is not None:  # a pretrained model whose folder was deleted
      if before["perplexity"] != entry["perplexity"]:
        found = before["perplexity"], entry["perplexity"]
        logging.warning(
          "%s: its perplexity was %s, and is %s now, so the rows that start from it now cannot be compared with earlier"
          " ones; keep its folder, or compare them with a reference that starts from it too (`Row.compared_with`)",
          run.key, *found,
        )  # fmt: skip
      return
    decided = len(planned_runs.gates(self._plan, self._results.runs))
    self._results.add(run.key, entry, tokens)
    runs = expand(self._plan, self._results.runs)
    done = sum(other.key in self._results.runs for other in runs)
    logging.info(
      "%s: perplexity %s, %.0f s; %d of %d runs are done", run.key, entry["perplexity"], entry["seconds"], done,
      len(runs),
    )  # fmt: skip
    for gate in planned_runs.gates(self._plan, self._results.runs)[decided:]:
      logging.info("%s", gate)

  def measure(self, run: Run) -> tuple[Entry, list[int] | None]:
    """Trains a run, or continues its training, and evaluates it.

    Returns:
      Its entry; and the number of targets of each validation document, None if they are not recorded.

    Raises:
      Failed: a program has failed.
    """
    from cyb_jax.training.metrics import read_metrics

    began = time.monotonic()
    workdir = self._folder / run.key
    record = self._processes.program("cyb_jax.cli.train", *self._options(run, workdir))
    paced = documents = None
    if record["perplexity"] is not None and run.stage == "final":
      documents = self._processes.program("cyb_jax.studies.documents", str(workdir))
      if run.paced:
        limit = f"--limit={self._plan.paced_windows}"
        options = [f"--workdir={workdir}", "--split=validation", "--context=self_paced", limit]
        paced = self._processes.program("cyb_jax.cli.evaluate", *options)
    # For an interrupted run the file also has the seconds of earlier processes.
    trained = sum(line["timing"]["seconds"] for line in read_metrics(workdir) if "seconds" in line.get("timing", {}))
    seconds = max(time.monotonic() - began, trained)
    losses, tokens = (None, None) if documents is None else (documents["losses"], documents["tokens"])
    return entry_of(run, record, seconds, paced, losses), tokens

  def _options(self, run: Run, workdir: pathlib.Path) -> list[str]:
    """The arguments of cyb-train."""
    plan, pretraining = self._plan, self._plan.pretraining
    if run.stage == PRETRAINING:
      assert pretraining is not None
      config, fields = f"{pretraining.config}:{pretraining.argument}", [*run.fields]
    else:
      size = f",{plan.size}" if plan.size else ""
      config, fields = f"{plan.config}:{run.setting}{size}", [*plan.fields, *run.fields]
    if pretraining is not None:
      fields += self._data_fields(run)
    if run.start:
      fields.append(f"init_from={self._folder / run.start}")
    return [
      f"--config={config}",
      f"--workdir={workdir}",
      *(f"--config.{field}" for field in fields),
      f"--config.optimizer.learning_rate={run.rate:g}",
      f"--config.train.seed={run.seed}",
      f"--config.data.seed={run.seed}",
      f"--config.train.steps={run.steps}",
    ]

  def _data_fields(self, run: Run) -> list[str]:
    """The fields of the run's part of the divided text: the part of pretraining, or the part of the rows."""
    from cyb_jax.studies.documents import PARTS, SPLIT, write_parts

    assert self._plan.pretraining is not None
    part = PARTS[0] if run.stage == PRETRAINING else PARTS[1]
    if self._stores is not None:
      return ["data.task=jsonl", f"data.store={self._stores / part}"]
    paths = write_parts(self._plan.pretraining.task, self._plan.pretraining.percent, self._folder / "text")
    train = paths[part]
    return ["data.task=jsonl", f"data.options=pattern={train},validation_pattern={paths[SPLIT]}"]

  def _is_trained(self, key: str) -> bool:
    """Whether a run's folder has its last evaluation, which is written when the run is done."""
    return (self._folder / key / "evaluation.json").exists()
