"""A study compares methods under one or several budgets; see `cyb_jax.cli.study`."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from absl import logging

from cyb_jax import jsonl
from cyb_jax.errors import Failed, InputError
from cyb_jax.storage import atomic_write
from cyb_jax.studies import results
from cyb_jax.studies.options import Options, with_absolute_paths
from cyb_jax.studies.plan import Plan, make_plan
from cyb_jax.studies.runner import MAX_EXTENSIONS, Measured, Study


def run(folder: pathlib.Path, options: Options, *, show: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
  """Runs a study, or its missing runs.

  Args:
    folder: the study's folder, with a folder for each run.
    options: the options of the study.
    show: receives the table of results as Markdown.

  Returns:
    The content of comparison.json.

  Raises:
    InputError: an option is invalid, or the folder holds another study; nothing was run.
    Failed: a program has failed, or a row diverges with all seeds; the exception's result has the other rows, which
      were written.
  """
  options.check()
  # Imported now, so that a missing library for the figures is reported before any run.
  from cyb_jax.report import side_by_side  # noqa: F401

  plan = make_plan(options)
  _claim(folder, options)
  study = Study(folder, options)
  rates = options.learning_rates()
  _announce(study, plan, len(rates))
  measured = study.measure(plan, rates)
  result = _description(options, plan.note)
  if measured:
    result["rows"] = results.write(study, plan, measured, result, show)
    if options.report:
      result["report"] = _report(study, measured)
      atomic_write(folder / "comparison.json", jsonl.dumps(result, indent=2) + "\n")
  failures = study.processes.failures
  if failures:
    raise Failed(
      f"{len(failures)} of the study's programs failed, the first: {failures[0]}. The other rows are written, and the"
      " same command continues with the missing runs",
      result | {"failed": failures},
    )
  return result


def _description(options: Options, note: str | None) -> dict[str, Any]:
  """The keys of comparison.json about the study."""
  return {
    "study": options.config,
    "size": options.size or None,
    "fields": list(options.fields),
    "equal": list(options.equal),
    "reference": options.reference,
    "steps": options.steps,
    "seeds": options.seeds,
    "split": options.split,
    "note": note,
  }


def _announce(study: Study, plan: Plan, rates: int) -> None:
  options = study.options
  logging.info(
    "%d rows, each with the best of %d rates%s, then %d seeds%s%s: %s",
    len(plan.entries), rates, f" and up to {MAX_EXTENSIONS} further rates" * options.search, options.seeds,
    ", then test" * options.test, " and reports" * options.report, "; ".join(map(study.label, plan.entries)),
  )  # fmt: skip


def _report(study: Study, measured: list[Measured]) -> str | None:
  """Writes each run's report, and one page that compares all runs; returns its path, or None without such a page."""
  runs = [run for row in measured for run in row.runs]
  study.processes.map(study.report, runs, description="writing reports", unit="runs")
  if len(runs) == 1 or study.processes.failures:
    return None
  compare = study.processes.map(lambda: study.report_all(runs), [()], description="comparing", unit="reports")
  return compare[0]


def _claim(folder: pathlib.Path, options: Options) -> None:
  """Writes study.json. A run's folder is named after its setting, steps, rate and seed, so all runs in a study's folder
  must have the same other options.

  Raises:
    InputError: the folder holds runs of another study.
  """
  path = folder / "study.json"
  if path.exists():
    # An older version had neither sizes nor fields.
    try:
      found = jsonl.read_object(path)
    except ValueError as error:
      raise InputError(f"--workdir: {error}; remove the file, or give another folder") from error
    recorded = with_absolute_paths({"size": "", "fields": []} | found)
    for name, value in recorded.items():
      if options.identity.get(name) != value:
        raise InputError(
          f"--{name}: {options.identity.get(name)!r}, but {folder} holds a study with {value!r}; give another --workdir"
        )
  folder.mkdir(parents=True, exist_ok=True)
  atomic_write(path, jsonl.dumps(options.identity) + "\n")
