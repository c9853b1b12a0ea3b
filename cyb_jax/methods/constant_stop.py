"""A control: the mixture over slots of CYB, with a stopping distribution that doesn't look at the context.

CYB reads a mixture of slots, and a mixture alone helps (method.md 5). Here the shares are W trained numbers, the same
for every token: what CYB gains over this it owes to deciding token by token.

Parameters beside the decoder's and the pauses': `stopping_logits` f32[W], to be multiplied by D.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cyb_jax.methods.interface import Params
from cyb_jax.methods.mixture import Mixture
from cyb_jax.methods.paused import PAUSE_OPTIONS
from cyb_jax.stopping import SlotScores, log_stopping_distribution


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
