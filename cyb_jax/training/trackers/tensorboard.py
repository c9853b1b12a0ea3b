"""Event files of TensorBoard, in WORKDIR/tensorboard."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from cyb_jax.training.trackers.interface import TrackedRun


class TensorBoard:
  """An event file in TensorBoard's record format, written without TensorFlow; it holds metrics alone."""

  package: ClassVar[str] = "tensorboard"
  extra: ClassVar[str] = ""
  run_id: str | None = None

  def __init__(self, run: TrackedRun):
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder = run.folder / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{int(time.time())}.{os.getpid()}.{run.step}"
    self._records = RecordWriter((folder / name).open("wb"))
    self._event = event_pb2.Event
    # TensorBoard then drops the events that an interrupted run wrote after this step.
    start = self._event(wall_time=time.time(), step=run.step + 1, file_version="brain.Event:2")
    self._records.write(start.SerializeToString())
    restart = self._event(wall_time=time.time(), step=run.step + 1)
    restart.session_log.status = restart.session_log.START
    self._records.write(restart.SerializeToString())

  def log_config(self, config: Mapping[str, Any]) -> None:
    """Does nothing."""

  def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
    """See `Tracker`."""
    event = self._event(wall_time=time.time(), step=step)
    for tag, value in metrics.items():
      event.summary.value.add(tag=tag, simple_value=value)
    self._records.write(event.SerializeToString())
    self._records.flush()

  def log_report(self, folder: pathlib.Path) -> None:
    """Does nothing."""

  def finish(self, *, complete: bool) -> None:
    """See `Tracker`."""
    del complete
    self._records.close()
