"""Thoughtbubbles: cross-entropy of the joint prediction of a token's streams (Liu et al. 2025,
https://arxiv.org/abs/2510.00219); see `cyb_jax.methods.slot_models.streams`.

The prediction of a token is the mixture of its streams' predictions, in proportion to P = exp(c); or, as in the
authors' code, the prediction from the sum of its streams' P x.

All streams of a row compete, so `evaluate` is not causal, and its log-likelihoods are not those of an autoregressive
model. `autoregressive_log_likelihood` computes autoregressive log-likelihoods: every target from a pass over its prefix
only, with the budget of a text of that length.

Dimensions: B batch, T tokens, M maximum number of streams of a token.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cyb_jax.decoder import init_params
from cyb_jax.errors import InputError
from cyb_jax.field_rules import Rule, one_of
from cyb_jax.losses import last_slot_cross_entropy
from cyb_jax.methods.backbone import Backbone
from cyb_jax.methods.composite import SlotMethod
from cyb_jax.methods.interface import Batch, DataFacts, EvalOutput, MethodCosts, Params, TokenLosses
from cyb_jax.methods.objectives.last import LastSlot
from cyb_jax.methods.options import MethodConfig
from cyb_jax.methods.slot_models.streams import ForkedStreams, by_token, own_tokens, real_lengths
from cyb_jax.stopping import SlotScores


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThoughtbubblesConfig(MethodConfig):
  """The options of `thoughtbubbles`.

  Attributes:
    fork_layers: the layers (from 1) before which streams fork. '': the published layers, which are 3, 7 and 11 with 12
      or more layers, and 3 and 5 with 6 to 8 layers; our choice otherwise: with 9 to 11 layers the existing ones of 3,
      7 and 11, with fewer than 6 layers in proportion, but never the first layer, where the router would see bare
      embeddings.
    stream_budget: the number of streams per token that a row may have; at most 2 to the power of the number of forks,
      which is the number of streams that a token can have.
    combine: how a token's streams are read: 'probabilities', the mixture of their predictions (the paper); 'states',
      the prediction from their sum (the authors' code).
  """

  name: ClassVar[str] = "thoughtbubbles"
  RULES: ClassVar = {
    "fork_layers": Rule(
      lambda value: value is None or list(value) == sorted(set(value)),
      "numbers of layers, each once and in order, such as '3:7:11'; '' for the default",
    ),
    "stream_budget": Rule(lambda value: 1 < value < math.inf, "finite and more than 1; with 1 nothing can fork"),
    "combine": one_of("probabilities", "states"),
  }

  fork_layers: tuple[int, ...] | None = None
  stream_budget: float = 2.0
  combine: str = "probabilities"

  def build(self, backbone: Backbone) -> Thoughtbubbles:
    layers = backbone.decoder_config.num_layers
    forks = _default_forks(layers) if self.fork_layers is None else self.fork_layers
    if not forks or not 1 <= forks[0] <= forks[-1] <= layers:
      raise InputError(
        f"method.fork_layers: {':'.join(map(str, forks))!r} must be layers in 1..{layers}, each once and in order, such"
        f" as {':'.join(map(str, _default_forks(layers)))!r}; '' for the default"
      )
    if backbone.decoder_config.scan_layers:
      raise InputError(
        "decoder.scan_layers: True, but method 'thoughtbubbles' forks streams between layers; set it to False"
      )
    return Thoughtbubbles(self, backbone, forks)


class Thoughtbubbles(SlotMethod):
  """Cross-entropy of the joint prediction of a token's streams; also implements `abilities.NonCausal`."""

  config: ThoughtbubblesConfig
  slot_model: ForkedStreams

  def __init__(self, config: ThoughtbubblesConfig, backbone: Backbone, fork_layers: tuple[int, ...]):
    self._mixes = config.combine == "probabilities"
    slots = ForkedStreams(backbone, fork_layers, config.stream_budget, reads_streams=self._mixes)
    super().__init__(config, backbone, slots, LastSlot(backbone, slots.num_slots))

  def init(self, rng: Array) -> Params:
    # The slot model uses the third key, which other methods use for the objective, as in runs of version 0.1.
    decoder_key, _, streams_key = jax.random.split(rng, 3)
    return {"decoder": init_params(self.decoder, decoder_key)} | self.slot_model.init(streams_key)

  def validate_data(self, data: DataFacts | None, sequence_length: int) -> None:
    self.slot_model.budgets(sequence_length)
    forks, budget = len(self.slot_model.fork_layers), self.config.stream_budget
    # Only new runs are checked, which have data: a run of an earlier version still loads.
    if data is not None and budget > 2**forks:
      raise InputError(
        f"method.stream_budget: {budget:g}, but {forks} {'fork gives' if forks == 1 else 'forks give'} a token at most"
        f" {2**forks} streams; set at most {2**forks}, or more layers in method.fork_layers"
      )

  def loss(self, params: Params, batch: Batch, rng: Array, step: Any = None) -> TokenLosses:
    if not self._mixes:
      return super().loss(params, batch, rng, step)
    output = self.evaluate(params, batch)
    return TokenLosses(loss=output.loss, log_likelihood=-output.loss, stopping=jnp.ones_like(output.log_stopping))

  def evaluate(self, params: Params, batch: Batch, omega: Any = None) -> EvalOutput:
    if not self._mixes:
      return super().evaluate(params, batch, omega)
    length = batch["tokens"].shape[1]
    streams = self.slot_model.streams(params, batch, real_lengths(batch))
    targets = jnp.take_along_axis(batch["targets"], own_tokens(streams.token, length), 1)
    hidden = self.slot_model.finish(params, streams.hidden)[:, :, None]
    scores = self.backbone.slot_scores(params, hidden, targets)
    # One scan for both sums.
    terms = jnp.stack([streams.log_score + scores.log_target[..., 0], streams.log_score], -1)
    sums = by_token(jnp.logaddexp, terms, streams.token, length)
    log_target = sums[..., :1] - sums[..., 1:]
    scores = SlotScores(log_target, jnp.full_like(log_target, -jnp.inf), jnp.zeros_like(log_target))
    return EvalOutput(loss=last_slot_cross_entropy(scores), scores=scores, log_stopping=jnp.zeros_like(log_target))

  def _read(self, params: Params, hidden: Float[Array, "... W D"], targets: Int[Array, "..."]) -> SlotScores:
    return self.backbone.slot_scores(params, self.slot_model.finish(params, hidden), targets)

  def autoregressive_log_likelihood(self, params: Params, batch: Batch) -> Float[Array, "B T"]:
    """f32[B, T]; runs T passes one after the other, pass t over the first t tokens, and reads the last of them."""
    tokens, targets = batch["tokens"], batch["targets"]
    length = tokens.shape[1]
    model = self.slot_model
    most = min(2 ** len(model.fork_layers), int(model.budgets(length)[-1]) - length + 1)  # M

    def read(last: Int[Array, ""]) -> Float[Array, "B"]:
      streams = model.streams(params, batch, jnp.full(len(tokens), last + 1))
      ends = (streams.token <= last).sum(-1, keepdims=True)
      places = ends - most + jnp.arange(most)
      own = jnp.take_along_axis(streams.token, jnp.maximum(places, 0), 1) == last
      own &= places >= 0
      places = jnp.maximum(places, 0)
      log_score = jnp.where(own, jnp.take_along_axis(streams.log_score, places, 1), -jnp.inf)
      hidden = jnp.take_along_axis(streams.hidden, places[..., None], 1)
      target = jnp.take(targets, last, axis=1)
      if not self._mixes:
        hidden = (hidden.astype(jnp.float32) * jnp.exp(log_score)[..., None]).sum(1, keepdims=True)
        return self._read(params, hidden, target).log_target[:, 0]
      log_target = self._read(params, hidden, target).log_target
      return jax.nn.logsumexp(log_score + log_target, -1) - jax.nn.logsumexp(log_score, -1)

    return jnp.moveaxis(jax.lax.map(read, jnp.arange(length)), 0, 1)

  def costs(self, sequence_length: int, *, slots: float | None = None) -> MethodCosts:
    costs = super().costs(sequence_length, slots=slots)
    return dataclasses.replace(costs, autoregressive=self.slot_model.autoregressive_cost(sequence_length))


def _default_forks(layers: int) -> tuple[int, ...]:
  """The default of `ThoughtbubblesConfig.fork_layers`; a decoder with one layer forks before it."""
  if layers >= 9:
    return tuple(layer for layer in (3, 7, 11) if layer <= layers)
  if layers >= 6:
    return (3, 5)
  return tuple(sorted({min(max(-(-layers * twelfths // 12), 2), layers) for twelfths in (3, 7, 11)}))
