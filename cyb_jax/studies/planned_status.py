"""The progress of a planned study: the runs that are done, running and missing, and the remaining time."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cyb_jax.checkpointing.workdir import Lock
from cyb_jax.errors import InputError
from cyb_jax.report.trade_off import markdown
from cyb_jax.studies import planned_runs
from cyb_jax.studies.planned_runs import Run, expand
from cyb_jax.studies.plans import PlannedStudy
from cyb_jax.studies.results_file import Entry
from cyb_jax.training.metrics import read_metrics


def status(
  plan: PlannedStudy, folder: pathlib.Path, results: Mapping[str, Entry], jobs: int
) -> tuple[str, dict[str, Any]]:
  """The state of a planned study.

  Args:
    plan: the plan.
    folder: the folder of the runs; it need not exist.
    results: the entries of finished runs, by key.
    jobs: the number of runs at a time, for the estimate.

  Returns:
    A text, and the same as an object: `plan`; `done`, the number of finished runs; `begun`, the completed steps of
    unfinished runs by key; `missing`, the keys of the other runs; `is_running`, whether a study runs in the folder;
    `hours_left`, None if no run has measured the time of a step.
  """
  runs = expand(plan, results)
  left = [run for run in runs if run.key not in results]
  progress = {run.key: _progress(folder / run.key) for run in left if (folder / run.key).exists()}
  is_running = _is_running(folder)
  hours = _hours_left(runs, left, results, progress, jobs)
  lines = [f"{plan.name}: {len(runs) - len(left)} of {len(runs)} runs are done."]
  lines += [str(gate) for gate in planned_runs.gates(plan, results)]
  word = "running" if is_running else "interrupted"
  by_key = {run.key: run for run in left}
  lines += [f"{word}: {key}, step {steps:,} of {by_key[key].steps:,}" for key, (steps, _) in progress.items()]
  if left:
    known = "unknown, because no run has measured the time of a step" if hours is None else f"about {hours:.1f}"
    lines.append(f"hours left with --jobs={jobs}: {known}")
  text = "\n".join([*lines, "", markdown(("row", "rates", "seeds", "missing"), _by_row(plan, runs, results))])
  return text, {
    "plan": plan.name,
    "done": len(runs) - len(left),
    "begun": {key: steps for key, (steps, _) in progress.items()},
    "missing": [run.key for run in left if run.key not in progress],
    "is_running": is_running,
    "hours_left": None if hours is None else round(hours, 2),
  }


def _by_row(plan: PlannedStudy, runs: Sequence[Run], results: Mapping[str, Entry]) -> list[tuple[str, ...]]:
  """The number of finished runs of each row."""
  rows = []
  for name in dict.fromkeys(run.row for run in runs):
    own = [run for run in runs if run.row == name]
    cells = []
    for is_search in (True, False):
      found = [run for run in own if (run.stage == "search") == is_search]
      done = sum(run.key in results for run in found)
      cells.append(f"{done} of {len(found)}" if found else "")
    missing = ", ".join(run.key.partition("/")[2] for run in own if run.key not in results)
    rows.append((name, *cells, missing))
  return rows


def _progress(workdir: pathlib.Path) -> tuple[int, float]:
  """(completed steps, their seconds) of an unfinished run, from its metrics."""
  lines = [line for line in read_metrics(workdir) if line.get("split") == "train" and "timing" in line]
  return (lines[-1]["step"] if lines else 0), sum(line["timing"]["seconds"] for line in lines)


def _is_running(folder: pathlib.Path) -> bool:
  """Whether a study holds the folder."""
  if not folder.exists():
    return False
  try:
    with Lock(folder):
      return False
  except InputError:
    return True


def _hours_left(
  runs: Sequence[Run],
  left: Sequence[Run],
  results: Mapping[str, Entry],
  progress: Mapping[str, tuple[int, float]],
  jobs: int,
) -> float | None:
  """The hours of all missing runs, divided by the jobs; None: unknown.

  The seconds of a step are estimated from runs of the same row or, if there are none, from other rows in proportion to
  their costs.
  """
  seen = [(run, results[run.key]["seconds"] / run.steps) for run in runs if run.key in results]
  steps_of = {run.key: run for run in left}
  seen += [(steps_of[key], seconds / steps) for key, (steps, seconds) in progress.items() if steps]
  if not left:
    return 0.0
  if not seen:
    return None
  unit = statistics.median(seconds / run.cost for run, seconds in seen)
  own: dict[str, list[float]] = {}
  for run, seconds in seen:
    own.setdefault(run.row, []).append(seconds)
  total = 0.0
  for run in left:
    step = statistics.fmean(own[run.row]) if run.row in own else unit * run.cost
    total += step * (run.steps - progress.get(run.key, (0, 0.0))[0])
  return total / jobs / 3600
