"""A control: a mixture of W softmaxes without pauses (Yang et al. 2018, https://arxiv.org/abs/1711.03953).

CYB with the step budget 0:..:0:1 reads a mixture of softmaxes with a stick-breaking gate. Here all components of the
mixture read the one hidden state h of a plain model: component k reads tanh(h A_k + b_k), or without the activation
h A_k + b_k, with the shared unembedding, and the gate softmax(h G + g) depends on the context. The gain of CYB over
this method is due to the pauses, not to the richer output distribution.

Parameters: `mos_heads` f32[W, D, D], A, which starts near the identity (`slot_models.heads`); `mos_bias` f32[W, D], b,
`mos_gate` f32[D, W], G, and `mos_gate_bias` f32[W], g, initialised to zero.

The prediction of a token is one distribution, so W output heads are one slot: text is generated without pauses. Heads
and gate read the same state, so slot model and objective cannot be separated; this file implements both.

Dimensions: B batch, T tokens, W heads, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cyb_jax.costs import flops
from cyb_jax.field_rules import number_of_slots, one_of
from cyb_jax.methods.backbone import Backbone, boxed
from cyb_jax.methods.composite import CachedSlotMethod
from cyb_jax.methods.interface import Batch, EvalOutput, Params, TokenLosses
from cyb_jax.methods.options import MethodConfig
from cyb_jax.methods.slot_models.heads import heads_cost, init_heads
from cyb_jax.methods.slot_models.plain import Plain
from cyb_jax.readout import TokenScores
from cyb_jax.stopping import SlotScores


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosConfig(MethodConfig):
  """The options of `mos`.

  Attributes:
    heads: W, the number of softmaxes that are mixed.
    head_activation: 'tanh', as published; or 'none': the heads then start at the identity, so that fine-tuning starts
      at the pretrained model.
  """

  name: ClassVar[str] = "mos"
  RULES: ClassVar = {
    "heads": number_of_slots(2, note="; with 1 it is 'baseline'"),
    "head_activation": one_of("tanh", "none"),
  }

  heads: int = 4
  head_activation: str = "tanh"

  def build(self, backbone: Backbone) -> Mos:
    return Mos(self, backbone)


class MixtureOfSoftmaxes:
  """-log sum_k pi_k t_k, with the gate pi and the heads reading one hidden state."""

  slots_trained = 1
  slots_decoded = 1
  decides_by_logits = False

  def __init__(self, backbone: Backbone, options: MosConfig):
    self.backbone, self.heads, self.activation = backbone, options.heads, options.head_activation

  def init(self, rng: Array) -> Params:
    width = self.backbone.decoder_config.d_model
    return {
      "mos_heads": init_heads(rng, self.heads, width),
      "mos_bias": boxed(jnp.zeros((self.heads, width)), None, "embed"),
      "mos_gate": boxed(jnp.zeros((width, self.heads)), "embed", None),
      "mos_gate_bias": boxed(jnp.zeros(self.heads)),
    }

  def outputs(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... W D"]:
    """The states that the heads read, in the dtype of `hidden`."""
    heads, bias = (params[name].astype(hidden.dtype) for name in ("mos_heads", "mos_bias"))
    outputs = jnp.einsum("...d,kde->...ke", hidden, heads) + bias
    return jnp.tanh(outputs) if self.activation == "tanh" else outputs

  def log_gate(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... W"]:
    """log pi, f32."""
    hidden = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    logits = jnp.matmul(hidden, params["mos_gate"], precision="highest") + params["mos_gate_bias"]
    return jax.nn.log_softmax(logits)

  def loss(self, params: Params, hidden: Float[Array, "B T 1 D"], batch: Batch, step: Any = None) -> TokenLosses:
    del step
    hidden = hidden[..., 0, :]
    log_gate = self.log_gate(params, hidden)
    total, heads = self.backbone.weighted_loss(params, self.outputs(params, hidden), batch, _token_loss, log_gate)
    loss = _token_loss(heads, log_gate)
    return TokenLosses(loss=loss, log_likelihood=-loss, stopping=jnp.ones_like(loss)[..., None], total=total)

  def evaluate(
    self, params: Params, hidden: Float[Array, "B T 1 D"], targets: Int[Array, "B T"], omega: Any = None
  ) -> EvalOutput:
    """`extra_metrics`: `head_k`, the gate's share of head k."""
    del omega
    hidden = hidden[..., 0, :]
    log_gate = self.log_gate(params, hidden)
    heads = self.backbone.slot_scores(params, self.outputs(params, hidden), targets)
    log_target = -_token_loss(heads, log_gate)[..., None]
    scores = SlotScores(log_target, jnp.full_like(log_target, -jnp.inf), jnp.zeros_like(log_target))
    shares = jnp.exp(log_gate)
    return EvalOutput(
      loss=-log_target[..., 0],
      scores=scores,
      log_stopping=jnp.zeros_like(log_target),
      extra_metrics={f"head_{k + 1}": shares[..., k] for k in range(self.heads)},
    )

  def token_scores(self, params: Params, hidden: Float[Array, "... D"], slot: Int[Array, "..."]) -> TokenScores:
    del slot
    heads = self.backbone.token_scores(params, self.outputs(params, hidden))
    log_probs = jax.nn.logsumexp(self.log_gate(params, hidden)[..., None] + heads.log_probs, -2)
    return TokenScores(log_probs, heads.log_dont_know[..., 0], heads.log_answer[..., 0])


def _token_loss(heads: SlotScores, log_gate: Float[Array, "... W"]) -> Float[Array, "..."]:
  """-log sum_k pi_k t_k."""
  return -jax.nn.logsumexp(log_gate + heads.log_target, -1)


class Mos(CachedSlotMethod):
  """Cross-entropy of a mixture of softmaxes; also implements `abilities.ExtraMetrics`."""

  config: MosConfig
  objective: MixtureOfSoftmaxes

  def __init__(self, config: MosConfig, backbone: Backbone):
    super().__init__(config, backbone, HeadedPlain(backbone, config.heads), MixtureOfSoftmaxes(backbone, config))

  def summarize_metrics(self, means: dict[str, float]) -> dict[str, Any]:
    """`heads`: the mean share of each head."""
    return {"heads": [means[f"head_{k + 1}"] for k in range(self.config.heads)]}


class HeadedPlain(Plain):
  """A plain model with several heads per token: each head costs a matrix and a readout."""

  def __init__(self, backbone: Backbone, heads: int):
    super().__init__(backbone)
    self.heads = heads

  def _head_cost(self) -> flops.Cost:
    """The cost of the heads' matrices and of the gate, per token."""
    width = self.backbone.decoder_config.d_model
    return heads_cost(width, self.heads) + flops.Cost(routing=2 * self.heads * width)

  def train_cost(self, sequence_length: int, *, slots_read: float, executed: bool) -> flops.Cost:
    cost = super().train_cost(sequence_length, slots_read=slots_read * self.heads, executed=executed)
    return cost + self._head_cost().times(3)

  def forward_cost(self, sequence_length: int, *, slots_read: float, executed: bool) -> flops.Cost:
    cost = super().forward_cost(sequence_length, slots_read=slots_read * self.heads, executed=executed)
    return cost + self._head_cost()

  def inference_cost(self, sequence_length: int, *, slots_read: float, slots: float | None) -> flops.Cost:
    del slots  # a token has one slot
    return self.forward_cost(sequence_length, slots_read=slots_read, executed=False)
