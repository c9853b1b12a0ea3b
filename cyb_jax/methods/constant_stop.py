"""A control: the mixture over slots of CYB, with a stopping distribution that doesn't look at the context.

CYB reads a mixture of slots, and a mixture alone helps (method.md 5). Here the shares are W trained numbers, the same
for every token: what CYB gains over this it owes to deciding token by token.

Parameters beside the decoder's and the pauses': `stopping_logits` f32[W], to be multiplied by D.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cyb_jax.errors import InputError
from cyb_jax.methods.method import Batch, Params, Reading, TokenLosses
from cyb_jax.methods.paused import PAUSE_OPTIONS, PausedMethod
from cyb_jax.stopping import SlotScores, log_stopping_distribution


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

  def losses(self, params: Params, batch: Batch, rng: Array, step: Any = None) -> TokenLosses:
    reading = self.read(params, batch)
    return TokenLosses(
      loss=reading.loss,
      log_likelihood=jax.nn.logsumexp(reading.log_stopping + reading.scores.log_target, -1),
      stopping=jnp.exp(reading.log_stopping),
    )

  def read(self, params: Params, batch: Batch, omega: Any = None) -> Reading:
    scores = self.scores(params, self.hidden(params, batch), batch["targets"])
    log_stopping = jnp.broadcast_to(self.log_shares(params), scores.log_target.shape)
    log_likelihood = jax.nn.logsumexp(log_stopping + scores.log_target, -1)
    return Reading(loss=self.objective(scores, log_likelihood), scores=scores, log_stopping=log_stopping)


class ConstantStop(Mixture):
  """-log sum_i s_i t_i with s = softmax of W trained numbers, which start where CYB's prior has them."""

  name = "constant_stop"
  options = PAUSE_OPTIONS | {"dont_know_prior"}

  def init_own(self, rng: Array) -> Params:
    del rng
    prior = self.config.dont_know_prior
    log_shares = jnp.zeros(self.num_slots)
    if prior is not None:
      d = jnp.full(self.num_slots, prior)
      log_shares = log_stopping_distribution(jnp.log(d), jnp.log1p(-d))
    return {"stopping_logits": nn.LogicallyPartitioned(log_shares / self._scale, (None,))}

  @property
  def _scale(self) -> float:
    # Adam moves a parameter by about the rate a step, whatever its gradient: a logit of a few nats would not be reached
    # at the rates that matrices want. That of a decision d, a sum over D features of size 1, moves D times as fast.
    return float(self.decoder.config.d_model)

  def log_shares(self, params: Params) -> Float[Array, "W"]:
    return jax.nn.log_softmax(self._scale * params["stopping_logits"])

  def objective(self, scores: SlotScores, log_likelihood: Float[Array, "B T"]) -> Float[Array, "B T"]:
    return -log_likelihood
