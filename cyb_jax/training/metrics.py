"""The metrics of a run: metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from cyb_jax import jsonl, storage
from cyb_jax.errors import StorageError, writing
from cyb_jax.training.step import Totals

# The shortest time between two uploads to a bucket.
_UPLOAD_SECONDS = 30.0


def summarize(totals: Totals) -> dict[str, Any]:
  """The fields of a line of metrics: means over the steps of `totals`, nan where no step was applied.

  Returns:
    `loss` (nats per token, the training objective), `perplexity` (of the targets, under the training omega), `latency`
    (mean of s), `mean_pauses`, `slots_per_token`, `gradient_norm` (mean over steps, before clipping), `tokens`,
    `dropped_tokens` (tokens whose slots did not fit into their row), `skipped` (the number of steps that were not
    applied) and `skipped_steps` (the numbers of the first 16 of those steps).
  """
  host = {k: np.asarray(v, np.float64) for k, v in vars(totals).items()}
  # A batch may have no token of positive weight. Where no step was applied, the means are undefined.
  tokens = max(float(host["tokens"]), 1.0) if host["steps"] else math.nan
  latency = host["stopping"] / tokens
  return {
    "loss": float(host["loss"] / tokens),
    "perplexity": float(np.exp(-host["log_likelihood"] / tokens)),
    "latency": latency.tolist(),
    "mean_pauses": float(latency @ np.arange(len(latency))),
    "slots_per_token": float(host["slots"] / tokens),
    "gradient_norm": float(host["gradient_norm"] / host["steps"]) if host["steps"] else math.nan,
    "tokens": int(host["tokens"]),
    "dropped_tokens": int(host["dropped"]),
    "skipped": int(host["skipped"]),
    "skipped_steps": [int(step) for step in host["skipped_steps"] if step],
  }


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of a run's metrics.jsonl, without lines that can't be read: a kill may leave the last line incomplete."""
  path = storage.place(workdir) / "metrics.jsonl"
  rows = []
  lines = storage.read_bytes(path).decode(errors="replace").splitlines() if storage.exists(path) else []
  for number, line in enumerate(lines, start=1):
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      if number < len(lines):
        logging.warning("%s: line %d can't be read; it is left out", path, number)
  return rows


class MetricsLog:
  """Writes metrics.jsonl, one object a line, and TensorBoard events.

  Objects in a bucket can't be appended to. For a bucket both are kept in a local folder and uploaded as whole files:
  before each checkpoint, at the end, and otherwise at most every half minute.

  Args:
    workdir: the run's folder.
    resume_step: the step that the run continues from; later lines are dropped, since the run will write them again.
    tensorboard: whether event files are written.
  """

  def __init__(self, workdir: str | os.PathLike, resume_step: int, *, tensorboard: bool = True):
    self._workdir = storage.place(workdir)
    self._path = self._workdir / "metrics.jsonl"
    folder = self._workdir
    self._scratch: tempfile.TemporaryDirectory | None = None
    if storage.in_bucket(folder):
      self._scratch = tempfile.TemporaryDirectory(prefix="cyb_jax.")
      folder = pathlib.Path(self._scratch.name)
      self._uploaded, self._refused = time.monotonic(), False
    with writing(str(self._path)):
      self._drop_after(resume_step)
      if self._scratch is not None and storage.exists(self._path):
        (folder / "metrics.jsonl").write_bytes(storage.read_bytes(self._path))
      # Unbuffered: a line is written in one piece, and closing the file does not retry a line that the disk refused.
      self._file = (folder / "metrics.jsonl").open("ab", buffering=0)
    with writing(str(self._workdir / "tensorboard")):
      self._events = _EventFile(folder / "tensorboard", resume_step) if tensorboard else None

  def _drop_after(self, step: int) -> None:
    if storage.exists(self._path):
      kept = [json.dumps(row) + "\n" for row in read_metrics(self._path.parent) if row["step"] <= step]
      storage.atomic_write(self._path, "".join(kept))

  def write(self, row: Mapping[str, Any]) -> None:
    """Appends a line. Values that depend on the clock belong under `timing`.

    Raises:
      StorageError: the disk fails. A run that continues drops an incomplete line.
    """
    with writing(f"{self._path} (step {row['step']})"):
      line = memoryview(jsonl.dumps(dict(row)).encode() + b"\n")
      while line:  # a disk that becomes full writes a part of the line
        line = line[self._file.write(line) :]
    if self._events is not None:
      with writing(f"TensorBoard's events (step {row['step']})"):
        self._events.write(row)
    if self._scratch is not None and time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
      try:
        self._upload()
      except StorageError as error:  # no checkpoint depends on these lines yet
        logging.warning("%s; it is tried again", error)
        self._uploaded = time.monotonic()

  def flush(self) -> None:
    """Syncs the lines to the disk, or uploads them to the bucket; to be called before each checkpoint.

    Raises:
      StorageError: the disk or the bucket fails.
    """
    with writing(str(self._path)):
      os.fsync(self._file.fileno())
    if self._scratch is not None:
      self._upload()

  def _upload(self) -> None:
    self._refused = True
    with writing(f"{self._path} or the events beside it"):
      storage.upload_folder(self._scratch.name, self._workdir)
    self._uploaded, self._refused = time.monotonic(), False

  def close(self) -> None:
    self._file.close()
    if self._events is not None:
      with writing("TensorBoard's events"):
        self._events.close()
    if self._scratch is None:
      return
    with self._scratch:
      # A bucket that has just refused an upload is not asked again. An error here is only logged, so that it does not
      # replace the error that ends the run: the lines before the last checkpoint are in the bucket already.
      try:
        if not self._refused:
          self._upload()
      except StorageError as error:
        logging.warning("the last lines are lost: %s", error)


class NoLog:
  """Has the methods of `MetricsLog` and writes nothing: only host 0 writes the metrics of a run."""

  def write(self, row: Mapping[str, Any]) -> None:
    """Does nothing."""

  def flush(self) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""


class _EventFile:
  """An event file in TensorBoard's record format, written without TensorFlow."""

  def __init__(self, directory: pathlib.Path, step: int):
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    directory.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{int(time.time())}.{os.getpid()}.{step}"
    self._records = RecordWriter((directory / name).open("wb"))
    self._event = event_pb2.Event
    # TensorBoard then drops the events that an interrupted run wrote after this step.
    start = self._event(wall_time=time.time(), step=step + 1, file_version="brain.Event:2")
    self._records.write(start.SerializeToString())
    restart = self._event(wall_time=time.time(), step=step + 1)
    restart.session_log.status = restart.session_log.START
    self._records.write(restart.SerializeToString())

  def write(self, row: Mapping[str, Any]) -> None:
    event = self._event(wall_time=time.time(), step=int(row["step"]))
    for tag, value in _flat(row["split"], row):
      event.summary.value.add(tag=tag, simple_value=value)
    self._records.write(event.SerializeToString())
    self._records.flush()

  def close(self) -> None:
    self._records.close()


def _flat(prefix: str, value: Any):
  if isinstance(value, Mapping):
    for name, inner in value.items():
      if name not in ("split", "step"):
        yield from _flat(f"{prefix}/{name}", inner)
  elif isinstance(value, list | tuple):
    for i, inner in enumerate(value):
      yield from _flat(f"{prefix}/{i}", inner)
  elif isinstance(value, int | float) and not isinstance(value, bool):
    yield prefix, float(value)
