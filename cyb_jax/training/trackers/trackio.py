"""Trackio: https://huggingface.co/docs/trackio."""

from __future__ import annotations

import os
import pathlib
import re
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar

from cyb_jax.training.trackers.interface import PROJECT, TrackedRun


class Trackio:
  """A run of trackio; its own environment variables apply (TRACKIO_DIR, TRACKIO_SPACE_ID, ...), and TRACKIO_PROJECT.

  Trackio continues runs by their names, so the name is unique.
  """

  package: ClassVar[str] = "trackio"
  extra: ClassVar[str] = "trackio"

  def __init__(self, run: TrackedRun):
    import trackio

    self.run_id: str | None = run.run_id or f"{run.name}-{uuid.uuid4().hex[:8]}"
    self._run = trackio.init(
      os.environ.get("TRACKIO_PROJECT", PROJECT),
      name=self.run_id,
      resume="never" if run.run_id is None else "allow",
      embed=False,
    )
    # Else trackio finishes the run when the process ends, and writes to standard output after the program's last line.
    trackio.context_vars.current_run.set(None)

  def log_config(self, config: Mapping[str, Any]) -> None:
    """See `Tracker`; trackio sends the config with the first metrics."""
    self._run.config.update(config)

  def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
    """See `Tracker`."""
    self._run.log(dict(metrics), step=step)

  def log_report(self, folder: pathlib.Path) -> None:
    """An artifact of the type 'report'."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", f"report-{self.run_id}")
    self._run.log_artifact(str(folder), name=name, type="report")

  def finish(self, *, complete: bool) -> None:
    """See `Tracker`."""
    del complete
    self._run.finish()
