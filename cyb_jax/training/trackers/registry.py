"""Trackers by name."""

from __future__ import annotations

import importlib.util

from cyb_jax.errors import InputError, did_you_mean
from cyb_jax.training.trackers.interface import Tracker
from cyb_jax.training.trackers.mlflow import MLflow
from cyb_jax.training.trackers.tensorboard import TensorBoard
from cyb_jax.training.trackers.trackio import Trackio
from cyb_jax.training.trackers.wandb import WeightsAndBiases

TRACKERS: dict[str, type[Tracker]] = {
  "tensorboard": TensorBoard,
  "wandb": WeightsAndBiases,
  "trackio": Trackio,
  "mlflow": MLflow,
}


def parse(names: str) -> list[str]:
  """The names in 'tensorboard,wandb'; none in ''."""
  return [name.strip() for name in names.split(",") if name.strip()]


def check_trackers(names: str) -> None:
  """Checks the field `train.trackers`.

  Raises:
    InputError: an unknown name, or a name that is given twice.
  """
  found = parse(names)
  for name in found:
    if name not in TRACKERS:
      raise InputError(f"train.trackers: {name!r} is unknown; {did_you_mean(name, TRACKERS)}")
    if found.count(name) > 1:
      raise InputError(f"train.trackers: {name!r} is given twice in {names!r}; give it once")


def check_installed(names: str) -> None:
  """Checks that the packages of trackers are installed; nothing is imported.

  Raises:
    InputError: one is not.
  """
  for name in parse(names):
    tracker = TRACKERS[name]
    # A folder of the same name, such as one that wandb has made here, has no origin.
    spec = importlib.util.find_spec(tracker.package)
    if spec is None or spec.origin is None:
      package = f"cyb_jax[{tracker.extra}]" if tracker.extra else tracker.package
      raise InputError(
        f"train.trackers: {name!r} needs the package {tracker.package}, which is not installed; pip install"
        f" '{package}', or leave it out"
      )
