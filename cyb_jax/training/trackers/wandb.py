"""Weights & Biases: https://docs.wandb.ai."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

from cyb_jax.training.trackers.interface import PROJECT, TrackedRun


class WeightsAndBiases:
  """A run of wandb; its own environment variables apply (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, ...).

  Its files are in WORKDIR/wandb, unless WANDB_DIR names another folder.
  """

  package: ClassVar[str] = "wandb"
  extra: ClassVar[str] = "wandb"

  def __init__(self, run: TrackedRun):
    import wandb

    self._wandb = wandb
    self._run = wandb.init(
      project=os.environ.get("WANDB_PROJECT", PROJECT),
      name=run.name,
      id=run.run_id,
      resume=None if run.run_id is None else "allow",
      dir=os.environ.get("WANDB_DIR", str(run.folder)),
      # Standard output and error are the program's own.
      settings=wandb.Settings(console="off"),
    )
    self.run_id: str | None = self._run.id
    # wandb knows these steps, and would warn of each of them.
    self._first = self._run.step

  def log_config(self, config: Mapping[str, Any]) -> None:
    """See `Tracker`."""
    self._run.config.update(dict(config), allow_val_change=True)

  def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
    """See `Tracker`."""
    if step >= self._first:
      self._run.log(dict(metrics), step=step)

  def log_report(self, folder: pathlib.Path) -> None:
    """An artifact of the type 'report'."""
    artifact = self._wandb.Artifact(f"report-{self.run_id}", type="report")
    artifact.add_dir(str(folder))
    self._run.log_artifact(artifact)

  def finish(self, *, complete: bool) -> None:
    """See `Tracker`."""
    self._run.finish(exit_code=0 if complete else 1)
