"""No pauses: a plain language model, trained with cross-entropy; and what others are that read a token once."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from cyb_jax.errors import InputError
from cyb_jax.losses import last_slot_cross_entropy
from cyb_jax.methods.interface import Batch, EvalOutput, Params, TokenLosses
from cyb_jax.methods.paused import PausedMethod


class Plain(PausedMethod):
  """One slot a token, cross-entropy at it; subclasses say what is behind `hidden`."""

  options = frozenset()

  @property
  def num_slots(self) -> int:
    return 1

  @property
  def num_pauses(self) -> int:
    return 0

  def loss(self, params: Params, batch: Batch, rng: Array, step: Any = None) -> TokenLosses:
    reading = self.evaluate(params, batch)
    return TokenLosses(
      loss=reading.loss,
      log_likelihood=-reading.loss,
      stopping=jnp.ones_like(reading.log_stopping),
    )

  def evaluate(self, params: Params, batch: Batch, omega: Any = None) -> EvalOutput:
    scores = self.scores(params, self.hidden(params, batch), batch["targets"])
    loss = last_slot_cross_entropy(scores)
    return EvalOutput(loss=loss, scores=scores, log_stopping=jnp.zeros_like(scores.log_target))


class Baseline(Plain):
  """K = 0 (method.md 4)."""

  name = "baseline"

  def validate(self) -> None:
    super().validate()
    if self.config.pauses:
      raise InputError(f"method.pauses: {self.config.pauses}, but method 'baseline' has none; set it to 0")
