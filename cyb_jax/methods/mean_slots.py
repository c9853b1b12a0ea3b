"""A control: the mean over slots of the cross-entropy (method.md 5). Read as the mixture of all slots alike."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from cyb_jax.methods.interface import Params
from cyb_jax.methods.mixture import Mixture
from cyb_jax.stopping import SlotScores


class MeanSlots(Mixture):
  """-(1/W) sum_i log t_i: every slot is trained by itself, and none is preferred."""

  name = "mean_slots"

  def log_shares(self, params: Params) -> Float[Array, "W"]:
    del params
    return jnp.full(self.num_slots, -math.log(self.num_slots))

  def objective(self, scores: SlotScores, log_likelihood: Float[Array, "B T"]) -> Float[Array, "B T"]:
    del log_likelihood
    return -scores.log_target.mean(-1)
