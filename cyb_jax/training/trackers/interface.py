"""What a tracker is given of a run, and what it does with it. To add one: a file with its class, and a line in
`registry`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

# The project, or experiment, that the runs of this package are in; each tracker has an environment variable for it.
PROJECT = "cyb_jax"


@dataclasses.dataclass(frozen=True)
class TrackedRun:
  """A run as a tracker is opened for it.

  Attributes:
    name: that of the work directory.
    folder: where the tracker may keep files, on a disk: the work directory, or a folder that is uploaded to it.
    step: the step that the run continues from; 0: it begins.
    run_id: the tracker's own name of the run, from an earlier process; None: the tracker hasn't seen it.
  """

  name: str
  folder: pathlib.Path
  step: int
  run_id: str | None


class Tracker(Protocol):
  """Passes a run on to a tracker's library, which is imported when the tracker is opened.

  The constructor takes a `TrackedRun`. Every method may raise any exception: the tracker is then left out, see
  `tracking.Trackers`. A method that waits for a network holds up training, so metrics are handed to the library's own
  thread.

  Attributes:
    package: the Python package of the library.
    extra: the extra of cyb_jax that installs it; '': it is installed always.
  """

  package: ClassVar[str]
  extra: ClassVar[str]

  def __init__(self, run: TrackedRun) -> None: ...

  @property
  def run_id(self) -> str | None:
    """The library's name of the run, with which a later process continues it; None: it needs none."""

  def log_config(self, config: Mapping[str, Any]) -> None:
    """Takes the config, a nested dict; it may be called for a run that has one already."""

  def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
    """Takes numbers of a step, by names such as 'train/loss'; nan is a number. Steps of a continued run may repeat."""

  def log_report(self, folder: pathlib.Path) -> None:
    """Takes the files of a report (`cyb-report`)."""

  def finish(self, *, complete: bool) -> None:
    """Delivers what is left. `complete`: the run, or what was done of it, has come to its end without an error."""
