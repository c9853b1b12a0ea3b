"""The last slot is read and trained with cross-entropy.

Dimensions: B batch, T tokens, W slots, D model.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cyb_jax.losses import last_slot_cross_entropy
from cyb_jax.methods.backbone import Backbone
from cyb_jax.methods.interface import Batch, EvalOutput, Params, TokenLosses
from cyb_jax.readout import TokenScores
from cyb_jax.stopping import SlotScores


class LastSlot:
  """-log t_W. Training reads only the last slot; evaluation reads all slots to report a loss for each of them.

  References: "think before you speak", https://arxiv.org/abs/2310.02226; with W = 1 plain cross-entropy.
  """

  slots_trained = 1
  slots_decoded = 1
  decides_by_logits = False

  def __init__(self, backbone: Backbone, num_slots: int):
    self.backbone, self.num_slots = backbone, num_slots

  def init(self, rng: Array) -> Params:
    del rng
    return {}

  def loss(self, params: Params, hidden: Float[Array, "B T W D"], batch: Batch, step: Any = None) -> TokenLosses:
    del step
    total, scores = self.backbone.weighted_loss(
      params, hidden, batch, cross_entropy, slots=None if self.num_slots == 1 else (-1,)
    )
    loss = last_slot_cross_entropy(scores)
    last = jax.nn.one_hot(self.num_slots - 1, self.num_slots, dtype=loss.dtype)
    stopping = jnp.broadcast_to(last, (*loss.shape, len(last)))
    return TokenLosses(loss=loss, log_likelihood=-loss, stopping=stopping, total=total)

  def evaluate(
    self, params: Params, hidden: Float[Array, "B T W D"], targets: Int[Array, "B T"], omega: Any = None
  ) -> EvalOutput:
    del omega
    scores = self.backbone.slot_scores(params, hidden, targets)
    log_stopping = jnp.full_like(scores.log_target, -jnp.inf).at[..., -1].set(0.0)
    return EvalOutput(loss=last_slot_cross_entropy(scores), scores=scores, log_stopping=log_stopping)

  def token_scores(self, params: Params, hidden: Float[Array, "... D"], slot: Int[Array, "..."]) -> TokenScores:
    """d = 1 before the last slot, and 0 at the last slot."""
    scores = self.backbone.token_scores(params, hidden)
    if self.num_slots == 1:
      return scores
    waits = slot < self.num_slots - 1
    return TokenScores(scores.log_probs, jnp.where(waits, 0.0, -jnp.inf), jnp.where(waits, -jnp.inf, 0.0))


def cross_entropy(scores: SlotScores, _: Any) -> Float[Array, "..."]:
  """-log t of the last slot, as the token loss of `Backbone.weighted_loss`."""
  return last_slot_cross_entropy(scores)
