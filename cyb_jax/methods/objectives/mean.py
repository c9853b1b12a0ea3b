"""The mean over slots of the cross-entropy; evaluation reads the mixture of all slots with equal shares.

Dimensions: B batch, T tokens, W slots.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from cyb_jax.methods.interface import Params
from cyb_jax.methods.objectives.constant import ConstantMixture
from cyb_jax.stopping import SlotScores


class MeanSlots(ConstantMixture):
  """-(1/W) sum_i log t_i: every slot is trained independently, with equal weight."""

  def log_shares(self, params: Params) -> Float[Array, "W"]:
    del params
    return jnp.full(self.num_slots, -math.log(self.num_slots))

  def token_loss(self, scores: SlotScores, log_likelihood: Float[Array, "..."]) -> Float[Array, "..."]:
    del log_likelihood
    return -scores.log_target.mean(-1)
