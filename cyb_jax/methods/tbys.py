"""TBYS, "think before you speak": K pauses after every token, cross-entropy at the last one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cyb_jax.costs import flops
from cyb_jax.errors import InputError
from cyb_jax.losses import last_slot_cross_entropy
from cyb_jax.methods.interface import Batch, EvalOutput, Params, TokenLosses
from cyb_jax.methods.paused import PAUSE_OPTIONS, PausedMethod
from cyb_jax.readout import TokenScores


class Tbys(PausedMethod):
  """-log t_W (method.md 4). The last slot alone is read in training; evaluation reads all, to show what each knows."""

  name = "tbys"
  options = PAUSE_OPTIONS

  def validate(self) -> None:
    super().validate()
    if not self.config.pauses:
      raise InputError(f"method.pauses: 0, but method {self.name!r} needs at least 1; without pauses it is 'baseline'")

  @property
  def slots_trained(self) -> int:
    return 1

  def inference_cost(self, tokens: int, *, slots: float | None = None) -> flops.Cost:
    """With one readout a token, unless it was measured: read one by one, each is read."""
    if slots is not None:
      return super().inference_cost(tokens, slots=slots)
    return flops.forward_cost(
      self.decoder.config, tokens=tokens, slots=self.num_slots, slots_read=1, hidden=self.hides_pauses
    )

  def loss(self, params: Params, batch: Batch, rng: Array, step: Any = None) -> TokenLosses:
    return self.loss_of(params, self.hidden(params, batch), batch)

  def loss_of(self, params: Params, hidden: Float[Array, "B T W D"], batch: Batch) -> TokenLosses:
    """The training objective, from what came out of all slots."""
    loss = last_slot_cross_entropy(self.scores(params, hidden, batch["targets"], slots=(-1,)))
    last = jax.nn.one_hot(self.num_slots - 1, self.num_slots, dtype=loss.dtype)
    return TokenLosses(loss=loss, log_likelihood=-loss, stopping=jnp.broadcast_to(last, (*loss.shape, len(last))))

  def evaluate(self, params: Params, batch: Batch, omega: Any = None) -> EvalOutput:
    scores = self.scores(params, self.hidden(params, batch), batch["targets"])
    log_stopping = jnp.full_like(scores.log_target, -jnp.inf).at[..., -1].set(0.0)
    return EvalOutput(loss=last_slot_cross_entropy(scores), scores=scores, log_stopping=log_stopping)

  def token_scores(self, params: Params, hidden: Float[Array, "... D"], slot: Int[Array, "..."]) -> TokenScores:
    """d = 1 before the last slot."""
    scores = super().token_scores(params, hidden, slot)
    waits = slot < self.config.pauses
    return TokenScores(scores.log_probs, jnp.where(waits, 0.0, -jnp.inf), jnp.where(waits, -jnp.inf, 0.0))
