"""The progress of a run: the state that the training loop and its hooks share."""

from __future__ import annotations

import dataclasses
from typing import Any

from cyb_jax import __version__
from cyb_jax.training.preflight import RunPlan
from cyb_jax.training.start import Start
from cyb_jax.training.step import TrainState


class Progress:
  """The progress of a run.

  Attributes:
    plan: the plan of the run.
    state: the train state after `step` steps, in the strategy's layout.
    first: the number of the first step that this process runs.
    step: the number of the latest step; steps are counted from 1.
    tokens: the number of tokens of positive weight that this host has counted.
    stopping: whether all hosts stop after this step.
    loss: the validation loss of this step, by which the best checkpoint is selected; None without a validation.
  """

  def __init__(self, plan: RunPlan, start: Start):
    self.plan = plan
    self.state: TrainState = start.state
    self.first, self.step, self.tokens = start.step + 1, start.step, start.tokens
    self.stopping = False
    self.loss: float | None = None
    self._meta: dict[str, Any] | None = None

  @property
  def is_first(self) -> bool:
    """Whether this is the first step of this process, at which the step is compiled."""
    return self.step == self.first

  @property
  def is_last(self) -> bool:
    """Whether this is the last step of the run."""
    return self.step == self.plan.steps

  def is_due(self, every: int) -> bool:
    """Whether a period of `every` steps ends at this step; a period of 0 never ends."""
    return every > 0 and self.step % every == 0

  def begin_step(self, tokens: int) -> None:
    """Begins the next step, with the number of tokens of its batch that this host counts."""
    self.step += 1
    self.tokens += tokens
    self.stopping, self.loss, self._meta = False, None, None

  def meta(self) -> dict[str, Any]:
    """The JSON object of a checkpoint at this step; all hosts must call it at the same step."""
    if self._meta is None:
      data, method, store = self.plan.config.data, self.plan.method, self.plan.store
      windows, costs = self.step * data.batch_size, method.costs(data.sequence_length)
      self._meta = {
        "train_tokens": sum(self.plan.cluster.gather(self.tokens)),
        "train_slots": windows * costs.train_slots,
        "train_flops": float(windows * data.sequence_length * costs.train.total),
        "store": store.fingerprint,
        "store_path": str(store.path),
        "version": __version__,
      }
      if self.plan.base is not None:
        self._meta["base"] = dataclasses.asdict(self.plan.base.source.reference)
    return self._meta
