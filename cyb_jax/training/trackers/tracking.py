"""The trackers of a run, none of which can stop it."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import logging

from cyb_jax import jsonl, storage
from cyb_jax.training.trackers.interface import TrackedRun, Tracker
from cyb_jax.training.trackers.registry import TRACKERS, parse

# In the work directory: by tracker, with which id a later process continues the run there.
IDS = "trackers.json"


class Trackers:
  """Passes a run's config and metrics on to all trackers that it names.

  A tracker that raises an exception is logged once, as a warning, and left out from then on. What trackers write to
  standard output goes to standard error.

  Args:
    names: the field `train.trackers`, which has been checked.
    workdir: the run's folder, which holds the ids of the trackers.
    folder: where trackers may keep files, see `TrackedRun`.
    step: the step that the run continues from.
  """

  def __init__(self, names: str, workdir: storage.Place, folder: pathlib.Path, step: int):
    self._workdir = workdir
    self._ids = _read_ids(workdir)
    self._open: dict[str, Tracker] = {}
    for name in parse(names):
      self._guard(name, functools.partial(self._start, name, folder, step))

  def _start(self, name: str, folder: pathlib.Path, step: int) -> None:
    run = TrackedRun(self._workdir.name, folder, step, self._ids.get(name))
    self._open[name] = TRACKERS[name](run)
    run_id = self._open[name].run_id
    if run_id != run.run_id:
      # At once: a run that is killed is continued too.
      self._ids[name] = run_id
      storage.atomic_write(self._workdir / IDS, jsonl.dumps(self._ids, indent=2) + "\n")

  def log_config(self, config: Mapping[str, Any]) -> None:
    """Passes on the run's config, a nested dict."""
    self._each(lambda tracker: tracker.log_config(config))

  def log_metrics(self, row: Mapping[str, Any]) -> None:
    """Passes on the numbers of a line of metrics, which has `split` and `step`."""
    metrics = dict(_numbers(row["split"], row))
    self._each(lambda tracker: tracker.log_metrics(int(row["step"]), metrics))

  def log_report(self, folder: pathlib.Path) -> None:
    """Passes on the files of a report, which is in a folder on a disk."""
    self._each(lambda tracker: tracker.log_report(folder))

  def finish(self, *, complete: bool = True) -> None:
    """Delivers what is left; `complete`: there was no error."""
    self._each(lambda tracker: tracker.finish(complete=complete))
    self._open.clear()

  def _each(self, call: Callable[[Tracker], None]) -> None:
    for name, tracker in list(self._open.items()):
      self._guard(name, functools.partial(call, tracker))

  def _guard(self, name: str, call: Callable[[], None]) -> None:
    try:
      with contextlib.redirect_stdout(sys.stderr):
        call()
    except Exception as error:  # whatever it is, the run goes on
      self._open.pop(name, None)
      reason = next(iter(str(error).splitlines()), "")
      logging.warning("tracker %s has failed and is left out: %s: %s", name, type(error).__name__, reason)


def log_report(names: str, workdir: storage.Place, report: storage.Place) -> None:
  """Passes a report on to the trackers that have seen the run.

  Args:
    names: the field `train.trackers` of the run.
    workdir: of the run.
    report: the folder of the report.
  """
  ids = _read_ids(workdir)
  known = [name for name in parse(names) if name in ids and name in TRACKERS]
  if not known:
    return
  with contextlib.ExitStack() as stack:
    try:
      folder = stack.enter_context(storage.local_folder(report))
      own = folder if storage.in_bucket(workdir) else pathlib.Path(workdir)
    except OSError as error:
      logging.warning("the report isn't passed on to trackers: %s", error)
      return
    trackers = Trackers(",".join(known), workdir, own, 0)
    trackers.log_report(folder)
    trackers.finish()


def _read_ids(workdir: storage.Place) -> dict[str, Any]:
  path = workdir / IDS
  try:
    found = jsonl.loads(storage.read_bytes(path)) if storage.exists(path) else {}
    return found if isinstance(found, dict) else {}
  except (OSError, ValueError) as error:
    logging.warning("%s can't be read, and trackers begin new runs: %s", path, error)
    return {}


def _numbers(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
  """(name, number) of a line of metrics, such as ('train/loss', 2.5) and ('train/latency/0', 0.1)."""
  if isinstance(value, Mapping):
    for name, inner in value.items():
      if name not in ("split", "step"):
        yield from _numbers(f"{prefix}/{name}", inner)
  elif isinstance(value, list | tuple):
    for i, inner in enumerate(value):
      yield from _numbers(f"{prefix}/{i}", inner)
  elif isinstance(value, int | float) and not isinstance(value, bool):
    yield prefix, float(value)
