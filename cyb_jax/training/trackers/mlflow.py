"""MLflow: https://mlflow.org/docs/latest/ml/tracking."""

from __future__ import annotations

import collections
import os
import pathlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from cyb_jax.training.trackers.interface import PROJECT, TrackedRun

# What MLflow accepts of one call, and of one value.
_PARAMS = 100
_CHARACTERS = 6000
# Calls that may be under way.
_PENDING = 64


class MLflow:
  """A run of MLflow; its own environment variables apply (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ...).

  Without MLFLOW_TRACKING_URI, MLflow keeps runs in the working directory, and a run is continued from there alone.
  """

  package: ClassVar[str] = "mlflow"
  extra: ClassVar[str] = "mlflow"

  def __init__(self, run: TrackedRun):
    import mlflow
    import mlflow.entities

    self._entities, self._client = mlflow.entities, mlflow.MlflowClient()
    self._pending: collections.deque[Any] = collections.deque()
    self._is_new = run.run_id is None
    if run.run_id is None:
      experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
      found = self._client.get_experiment_by_name(experiment)
      number = found.experiment_id if found else self._client.create_experiment(experiment)
      self.run_id: str = self._client.create_run(number, run_name=run.name).info.run_id
    else:
      self.run_id = run.run_id
      self._client.update_run(self.run_id, status="RUNNING")

  def log_config(self, config: Mapping[str, Any]) -> None:
    """Parameters 'group.field', which MLflow takes once: those of a run that is continued stay."""
    if not self._is_new:
      return
    values = [self._entities.Param(name, str(value)[:_CHARACTERS]) for name, value in _fields("", config)]
    for start in range(0, len(values), _PARAMS):
      self._client.log_batch(self.run_id, params=values[start : start + _PARAMS])

  def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
    """See `Tracker`."""
    now = int(time.time() * 1000)
    values = [self._entities.Metric(_accepted(name), value, now, step) for name, value in metrics.items()]
    self._pending.append(self._client.log_batch(self.run_id, metrics=values, synchronous=False))
    if len(self._pending) > _PENDING:
      self._pending.popleft().wait()

  def log_report(self, folder: pathlib.Path) -> None:
    """Artifacts in the folder 'report'."""
    self._client.log_artifacts(self.run_id, str(folder), "report")

  def finish(self, *, complete: bool) -> None:
    """See `Tracker`."""
    while self._pending:
      self._pending.popleft().wait()
    self._client.set_terminated(self.run_id, "FINISHED" if complete else "KILLED")


def _accepted(name: str) -> str:
  """The name without characters that MLflow refuses; the sources of a mixture may have such."""
  return re.sub(r"[^\w\-. /]", "_", name)[:250]


def _fields(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  for name, value in values.items():
    if isinstance(value, Mapping):
      yield from _fields(f"{prefix}{name}.", value)
    else:
      yield prefix + name, value
