"""A mixture of slots with the same shares for every token: controls for methods that decide for each token.

Dimensions: B batch, T tokens, W slots, D model.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cyb_jax.methods.backbone import Backbone, boxed
from cyb_jax.methods.interface import Batch, EvalOutput, Params, TokenLosses
from cyb_jax.readout import TokenScores
from cyb_jax.stopping import SlotScores, log_stopping_distribution


class ConstantMixture:
  """Every slot of every token is read with a share that does not depend on the token; subclasses define the shares."""

  def __init__(self, backbone: Backbone, num_slots: int):
    self.backbone, self.num_slots = backbone, num_slots
    self.slots_trained = self.slots_decoded = num_slots
    self.decides_by_logits = False

  def init(self, rng: Array) -> Params:
    del rng
    return {}

  def log_shares(self, params: Params) -> Float[Array, "W"]:
    """Log of the shares."""
    raise NotImplementedError

  def token_loss(self, scores: SlotScores, log_likelihood: Float[Array, "..."]) -> Float[Array, "..."]:
    """The training objective, nats, from the scores and log sum_i s_i t_i."""
    raise NotImplementedError

  def loss(self, params: Params, hidden: Float[Array, "B T W D"], batch: Batch, step: Any = None) -> TokenLosses:
    del step
    log_shares = jnp.broadcast_to(self.log_shares(params), hidden.shape[:-1])
    total, scores = self.backbone.weighted_loss(params, hidden, batch, self._loss_of_scores, log_shares)
    log_likelihood = _mixture(scores, log_shares)
    return TokenLosses(
      loss=self.token_loss(scores, log_likelihood),
      log_likelihood=log_likelihood,
      stopping=jnp.exp(log_shares),
      total=total,
    )

  def _loss_of_scores(self, scores: SlotScores, log_shares: Float[Array, "... W"]) -> Float[Array, "..."]:
    return self.token_loss(scores, _mixture(scores, log_shares))

  def evaluate(
    self, params: Params, hidden: Float[Array, "B T W D"], targets: Int[Array, "B T"], omega: Any = None
  ) -> EvalOutput:
    del omega
    scores = self.backbone.slot_scores(params, hidden, targets)
    log_stopping = jnp.broadcast_to(self.log_shares(params), scores.log_target.shape)
    loss = self.token_loss(scores, _mixture(scores, log_stopping))
    return EvalOutput(loss=loss, scores=scores, log_stopping=log_stopping)

  def token_scores(self, params: Params, hidden: Float[Array, "... D"], slot: Int[Array, "..."]) -> TokenScores:
    """When slots are read one by one, d_i is the share of the slots after i among the slots from i on."""
    scores = self.backbone.token_scores(params, hidden)
    log_shares = self.log_shares(params)
    # Exclusive sums from the right, so that d = 0 at the last slot.
    log_from = jnp.flip(jax.lax.cumlogsumexp(jnp.flip(log_shares)))
    log_after = jnp.append(log_from[1:], -jnp.inf)
    return TokenScores(scores.log_probs, (log_after - log_from)[slot], (log_shares - log_from)[slot])


class ConstantShares(ConstantMixture):
  """-log sum_i s_i t_i with s = softmax(D * `stopping_logits`), W trained numbers, f32[W].

  The initial s is the stopping distribution at CYB's prior; `prior` None: all shares are equal.
  """

  def __init__(self, backbone: Backbone, num_slots: int, prior: float | None):
    super().__init__(backbone, num_slots)
    self.prior = prior
    # Adam changes a parameter by about the learning rate per step, whatever its gradient is: at the rates of matrices
    # a logit would not reach a few nats. The logit of d, a sum over D features of size 1, changes D times as fast.
    self.scale = float(backbone.decoder_config.d_model)

  def init(self, rng: Array) -> Params:
    del rng
    log_shares = jnp.zeros(self.num_slots)
    if self.prior is not None:
      d = jnp.full(self.num_slots, self.prior)
      log_shares = log_stopping_distribution(jnp.log(d), jnp.log1p(-d))
    return {"stopping_logits": boxed(log_shares / self.scale)}

  def log_shares(self, params: Params) -> Float[Array, "W"]:
    return jax.nn.log_softmax(self.scale * params["stopping_logits"])

  def token_loss(self, scores: SlotScores, log_likelihood: Float[Array, "..."]) -> Float[Array, "..."]:
    return -log_likelihood


def _mixture(scores: SlotScores, log_shares: Float[Array, "... W"]) -> Float[Array, "..."]:
  """log sum_i s_i t_i."""
  return jax.nn.logsumexp(log_shares + scores.log_target, -1)
