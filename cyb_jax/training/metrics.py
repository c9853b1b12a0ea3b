"""What a run tells while it runs: metrics.jsonl, TensorBoard events, the progress line."""

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

# Between two uploads to a bucket, at least.
_UPLOAD_SECONDS = 30.0


def summarize(totals: Totals) -> dict[str, Any]:
  """Means over the steps of `totals`, as they stand in a line of metrics; nan where no step was applied.

  `loss` (nats per token, the training objective), `perplexity` (of the target as it would be read, under the training
  omega), `latency` (mean of s), `mean_pauses`, `slots_per_token` (that tokens were given), `gradient_norm` (mean over
  steps, before clipping), `tokens`, `dropped_tokens` (whose slots didn't fit into their row), `skipped` (steps that
  weren't applied) and `skipped_steps` (the numbers of the first 16 of them).
  """
  host = {k: np.asarray(v, np.float64) for k, v in vars(totals).items()}
  # A batch may well have no token of weight; steps that weren't applied have nothing to be the mean of.
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
  """The rows of a run's metrics.jsonl, but for a line that can't be read: the last one, where a kill has torn it."""
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
  """metrics.jsonl, one object a line; and TensorBoard events beside it.

  Nothing can be added to an object in a bucket: there both are kept on a disk and uploaded whole, before each
  checkpoint, at the end, and otherwise every half minute at most.

  Args:
    workdir: the run's folder.
    resume_step: the step that the run continues from; lines after it are dropped, since they will come again.
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
      # Unbuffered: a line goes out in one piece, and one that the disk refuses isn't tried again when it is closed.
      self._file = (folder / "metrics.jsonl").open("ab", buffering=0)
    with writing(str(self._workdir / "tensorboard")):
      self._events = _EventFile(folder / "tensorboard", resume_step) if tensorboard else None

  def _drop_after(self, step: int) -> None:
    if storage.exists(self._path):
      kept = [json.dumps(row) + "\n" for row in read_metrics(self._path.parent) if row["step"] <= step]
      storage.atomic_write(self._path, "".join(kept))

  def write(self, row: Mapping[str, Any]) -> None:
    """Adds a line. What depends on the clock belongs under `timing`.

    Raises:
      StorageError: the disk fails. A run that continues drops a line that was torn.
    """
    with writing(f"{self._path} (step {row['step']})"):
      line = memoryview(jsonl.dumps(dict(row)).encode() + b"\n")
      while line:  # a disk that is just full takes a part
        line = line[self._file.write(line) :]
    if self._events is not None:
      with writing(f"TensorBoard's events (step {row['step']})"):
        self._events.write(row)
    if self._scratch is not None and time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
      try:
        self._upload()
      except StorageError as error:  # nothing hangs on it before the next checkpoint
        logging.warning("%s; it is tried again", error)
        self._uploaded = time.monotonic()

  def flush(self) -> None:
    """To the disk itself, or to the bucket, before a checkpoint that the lines are older than."""
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
      # A bucket that has just refused isn't asked again; and what ends the run is to be told rather than this. All that
      # a checkpoint stands for is there.
      try:
        if not self._refused:
          self._upload()
      except StorageError as error:
        logging.warning("the last lines are lost: %s", error)


class NoLog:
  """Takes what a `MetricsLog` takes, on the hosts whose lines another one writes."""

  def write(self, row: Mapping[str, Any]) -> None:
    """Nothing."""

  def flush(self) -> None:
    """Nothing."""

  def close(self) -> None:
    """Nothing."""


class _EventFile:
  """TensorBoard's own record format, written without TensorFlow."""

  def __init__(self, directory: pathlib.Path, step: int):
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    directory.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{int(time.time())}.{os.getpid()}.{step}"
    self._records = RecordWriter((directory / name).open("wb"))
    self._event = event_pb2.Event
    # Tells TensorBoard to forget what an interrupted run wrote after this step.
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


def format_seconds(seconds: float) -> str:
  """'42s', '3m10s', '2h05m'."""
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds}s"
  if seconds < 3600:
    return f"{seconds // 60}m{seconds % 60:02}s"
  return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"
