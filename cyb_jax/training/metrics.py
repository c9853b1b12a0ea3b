"""The metrics of a run: metrics.jsonl, and what trackers are given of it."""

from __future__ import annotations

import json
import math
import os
import pathlib
import tempfile
import time
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from cyb_jax import jsonl, storage
from cyb_jax.errors import StorageError, writing
from cyb_jax.training.step import Totals
from cyb_jax.training.trackers import Trackers

# The shortest time between two uploads to a bucket, in seconds.
_UPLOAD_SECONDS = 30.0


def summarize(totals: Totals) -> dict[str, Any]:
  """The fields of a line of metrics: means over the steps of `totals`, or nan if no step was applied.

  Returns:
    `loss` (nats per token, the training objective), `perplexity` (of the targets, under the training omega), `latency`
    (mean of s), `mean_pauses`, `slots_per_token`, `gradient_norm` (mean over steps, before clipping), `tokens`,
    `dropped_tokens` (tokens whose slots did not fit into their row), `skipped` (the number of steps that were not
    applied) and `skipped_steps` (the numbers of the first 16 of these steps).
  """
  host = {k: np.asarray(v, np.float64) for k, v in vars(totals).items()}
  # A batch may have no token of positive weight. If no step was applied, the means are undefined.
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
  """The rows of a run's metrics.jsonl, without invalid lines: if a run was killed, the last line may be incomplete."""
  path = storage.place(workdir) / "metrics.jsonl"
  rows = []
  lines = storage.read_bytes(path).decode(errors="replace").splitlines() if storage.exists(path) else []
  for number, line in enumerate(lines, start=1):
    try:
      row = jsonl.loads(line)
    except ValueError:
      row = None
    if isinstance(row, dict):
      rows.append(row)
    elif number < len(lines):
      logging.warning("%s: line %d is invalid and is skipped", path, number)
  return rows


class MetricsLog:
  """Writes metrics.jsonl, one object per line, and passes each line to the trackers; a context that closes both.

  Because objects in a bucket can't be appended to, this file and those of the trackers are written to a local folder
  and the complete files are uploaded: before each checkpoint, at the end, and otherwise at most every half minute.

  Args:
    workdir: the run's folder.
    resume_step: the step from which the run continues; later lines are dropped, because the run writes them again.
    trackers: the field `train.trackers`.
    config: the config of the run, a nested dict, which the trackers receive.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    resume_step: int,
    *,
    trackers: str = "",
    config: Mapping[str, Any] = types.MappingProxyType({}),
  ):
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
      # Without a buffer, a line is written at once, and closing the file does not retry a failed write.
      self._file = (folder / "metrics.jsonl").open("ab", buffering=0)
    self._trackers = Trackers(trackers, self._workdir, folder, resume_step)
    self._trackers.log_config(config)

  def __enter__(self) -> MetricsLog:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self.close(complete=kind is None)

  def _drop_after(self, step: int) -> None:
    if storage.exists(self._path):
      kept = [json.dumps(row) + "\n" for row in read_metrics(self._path.parent) if row["step"] <= step]
      storage.atomic_write(self._path, "".join(kept))

  def write(self, row: Mapping[str, Any]) -> None:
    """Appends a line. Values that depend on the clock belong under `timing`.

    Raises:
      StorageError: the disk failed. When the run is continued, it drops an incomplete line.
    """
    with writing(f"{self._path} (step {row['step']})"):
      line = memoryview(jsonl.dumps(dict(row)).encode() + b"\n")
      while line:  # if the disk becomes full, only a part of the line is written
        line = line[self._file.write(line) :]
    self._trackers.log_metrics(row)
    if self._scratch is not None and time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
      try:
        self._upload()
      except StorageError as error:  # no checkpoint depends on these lines yet
        logging.warning("%s; the upload will be repeated", error)
        self._uploaded = time.monotonic()

  def flush(self) -> None:
    """Syncs the lines to the disk, or uploads them to the bucket; call it before each checkpoint.

    Raises:
      StorageError: the disk or the bucket failed.
    """
    with writing(str(self._path)):
      os.fsync(self._file.fileno())
    if self._scratch is not None:
      self._upload()

  def _upload(self) -> None:
    self._refused = True
    with writing(f"{self._path} or the files of trackers next to it"):
      storage.upload_folder(self._scratch.name, self._workdir)
    self._uploaded, self._refused = time.monotonic(), False

  def close(self, *, complete: bool = True) -> None:
    """Ends the log; `complete`: the run ends without an error."""
    self._file.close()
    self._trackers.finish(complete=complete)
    if self._scratch is None:
      return
    with self._scratch:
      # After a failed upload, no further upload is tried. An error is only logged, so it does not replace the error
      # that ends the run; the lines before the last checkpoint are already in the bucket.
      try:
        if not self._refused:
          self._upload()
      except StorageError as error:
        logging.warning("the last lines are lost: %s", error)


class NoLog:
  """A log that writes nothing, with the methods of `MetricsLog`: only host 0 writes the metrics of a run."""

  def __enter__(self) -> NoLog:
    return self

  def __exit__(self, *_: object) -> None:
    """Does nothing."""

  def write(self, row: Mapping[str, Any]) -> None:
    """Does nothing."""

  def flush(self) -> None:
    """Does nothing."""

  def close(self, *, complete: bool = True) -> None:
    """Does nothing."""
