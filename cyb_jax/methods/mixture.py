"""What the controls share: a mixture over slots whose shares don't look at the token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cyb_jax.errors import InputError
from cyb_jax.methods.interface import Batch, EvalOutput, Params, TokenLosses
from cyb_jax.methods.paused import PAUSE_OPTIONS, PausedMethod
from cyb_jax.readout import TokenScores
from cyb_jax.stopping import SlotScores


class Mixture(PausedMethod):
  """Every slot of every token is read with a share that is the same for all tokens."""

  options = PAUSE_OPTIONS

  def validate(self) -> None:
    super().validate()
    if not self.config.pauses:
      raise InputError(f"method.pauses: 0, but method {self.name!r} needs at least 1; without pauses it is 'baseline'")

  def log_shares(self, params: Params) -> Float[Array, "W"]:
    """Log of the shares, the same for every token."""
    raise NotImplementedError

  def objective(self, scores: SlotScores, log_likelihood: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """The training objective, nats."""
    raise NotImplementedError

  def loss(self, params: Params, batch: Batch, rng: Array, step: Any = None) -> TokenLosses:
    reading = self.evaluate(params, batch)
    return TokenLosses(
      loss=reading.loss,
      log_likelihood=jax.nn.logsumexp(reading.log_stopping + reading.scores.log_target, -1),
      stopping=jnp.exp(reading.log_stopping),
    )

  def evaluate(self, params: Params, batch: Batch, omega: Any = None) -> EvalOutput:
    scores = self.scores(params, self.hidden(params, batch), batch["targets"])
    log_stopping = jnp.broadcast_to(self.log_shares(params), scores.log_target.shape)
    log_likelihood = jax.nn.logsumexp(log_stopping + scores.log_target, -1)
    return EvalOutput(loss=self.objective(scores, log_likelihood), scores=scores, log_stopping=log_stopping)

  def token_scores(self, params: Params, hidden: Float[Array, "... D"], slot: Int[Array, "..."]) -> TokenScores:
    """Read slot by slot, d_i is the part of the shares not yet read that lies behind slot i."""
    scores = super().token_scores(params, hidden, slot)
    log_shares = self.log_shares(params)
    # Exclusive sums from the right, so that nothing is left behind the last slot.
    log_from = jnp.flip(jax.lax.cumlogsumexp(jnp.flip(log_shares)))
    log_behind = jnp.append(log_from[1:], -jnp.inf)
    return TokenScores(scores.log_probs, (log_behind - log_from)[slot], (log_shares - log_from)[slot])
