"""Latent thoughts as slots: the input of every slot of a token is the state of the previous slot.

E_0 is the token's embedding, and E_i, the input of latent slot i, is the decoder's hidden state at slot i - 1 after the
final norm, without further scaling. Attention is causal over the slots in order, and the slots of a token share its
position. PonderLM-2, https://arxiv.org/abs/2509.23184

Slots that run one after the other cannot be trained in parallel. Therefore the inputs are approximated and refined:
first K passes add slots, pass i running the slots 0 .. i - 1 of all tokens; then J Jacobi passes over all slots each
renew all inputs at once; and the outputs of one more pass are read. With K = 2, tokens a and b, and o the outputs of
the slots in the previous pass:

    grow 1      a           b
    grow 2      a o0        b o0
    Jacobi      a o0 o1     b o0 o1      J times
    read        a o0 o1     b o0 o1

A pass whose inputs are exact up to some slot gives the exact input of the next slot: after at most T*K passes all
inputs equal those of decoding, which runs one slot after the other (`run_token`). J is drawn for each step; evaluation
uses the maximum. Gradients flow through all passes. There are no parameters outside of the decoder.

Dimensions: B batch, T tokens, W slots, K = W - 1 latent slots, S slots of a row, n slots of a token in a pass, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from cyb_jax.costs import flops
from cyb_jax.decoder import KeyWeights
from cyb_jax.methods.abilities import SlotInputs
from cyb_jax.methods.backbone import Backbone, segment_mask
from cyb_jax.methods.interface import Batch, Params
from cyb_jax.methods.slot_models.plain import Plain


class Thoughts(Plain):
  """K latent thoughts after every token.

  Args:
    backbone: the decoder and its readout.
    num_slots: W = K + 1.
    jacobi: the minimum and the maximum number of Jacobi passes of a training step; evaluation uses the maximum.
  """

  def __init__(self, backbone: Backbone, num_slots: int, jacobi: tuple[int, int]):
    super().__init__(backbone, num_slots)
    self.jacobi = jacobi
    self.layer_passes = self.forward_slots(1) / num_slots

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T W D"]:
    return self.ponder(params, batch, self.jacobi[1], is_pruned=True)

  def ponder(
    self, params: Params, batch: Batch, jacobi: int | Int[Array, ""], *, is_pruned: bool
  ) -> Float[Array, "B T W D"]:
    """The states of all slots after J Jacobi passes.

    Args:
      params: bare arrays.
      batch: see `Batch`.
      jacobi: J; a traced number must be between the minimum and the maximum of the slot model.
      is_pruned: whether to leave out the slots that inference leaves out.
    """
    tokens, segment_ids = batch["tokens"], batch.get("segment_ids")

    def mask(slots: int) -> Any:
      return segment_mask(None if segment_ids is None else jnp.repeat(segment_ids, slots, 1))

    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return self._ponder(params, tokens, positions, mask, jacobi, is_pruned)

  def hidden_slots(self, params: Params, inputs: SlotInputs, mask: Any) -> Float[Array, "B Q D"]:
    """See `abilities.Decoding`; runs the same passes as `hidden`. The slots of a token must be contiguous and complete,
    with the first slot at a multiple of W; `mask` must be boolean.
    """
    tokens, positions = inputs.tokens, inputs.positions
    width = self.num_slots
    rows, num_inputs = tokens.shape
    used = num_inputs - num_inputs % width

    def of_pass(count: int) -> Bool[Array, "B 1 T*n T*n"]:
      split = mask[:, 0, :used, :used].reshape(len(mask), used // width, width, used // width, width)
      return split[:, :, :count, :, :count].reshape(len(mask), 1, -1, used // width * count)

    first = slice(0, used, width)
    hidden = self._ponder(params, tokens[:, first], positions[:, first], of_pass, self.jacobi[1], is_pruned=True)
    return jnp.pad(hidden.reshape(rows, used, -1), ((0, 0), (0, num_inputs - used), (0, 0)))

  def _ponder(
    self,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "#B T"],
    mask: Callable[[int], Any],
    jacobi: int | Int[Array, ""],
    is_pruned: bool,
  ) -> Float[Array, "B T W D"]:
    """Runs all passes; `mask(n)` is the mask of a pass over n slots of each token, see `Decoder.__call__`."""

    def run(inputs: Float[Array, "B T n D"], weights: Float[Array, "B T W"] | None) -> Float[Array, "B T n D"]:
      rows, length, count, width = inputs.shape
      if weights is not None:
        weights = KeyWeights(weights[..., :count].reshape(rows, -1))
      outputs = self.run_layers(
        params,
        inputs.reshape(rows, length * count, width),
        jnp.repeat(positions, count, 1),
        mask=mask(count),
        key_weights=weights,
        slots_per_position=count,
      )
      return outputs.reshape(rows, length, count, width)

    def renewed(state: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
      inputs, weights = state
      outputs = run(inputs, weights)
      inputs = jnp.concatenate([inputs[:, :, :1], outputs[:, :, :-1]], 2)
      return inputs, self.key_weights(params, outputs[:, :, 0], is_pruned)

    embedded = self.backbone.embed(params, tokens)[:, :, None]
    inputs, weights = embedded, None
    for count in range(1, self.num_slots):
      outputs = run(inputs, weights)
      if count == 1:
        weights = self.key_weights(params, outputs[:, :, 0], is_pruned)
      inputs = jnp.concatenate([embedded, outputs], 2)
    fewest, most = (jacobi, jacobi) if isinstance(jacobi, int) else self.jacobi
    state = inputs, weights
    for number in range(most):
      if number < fewest:
        state = renewed(state)
      else:
        # `cond` skips both the forward and the backward computation of a pass that is not drawn.
        state = jax.lax.cond(number < jacobi, renewed, lambda state: state, state)
    return run(*state)

  def run_layers(self, params: Params, inputs: Array, positions: Array, **options: Any) -> Float[Array, "B S D"]:
    """All layers and the final norm; `options`: see `Decoder.run_layers`."""
    hidden, _ = self.backbone.apply(params, inputs, positions, **options, method="run_layers")
    return self.backbone.apply(params, hidden, method="finish")

  def key_weights(self, params: Params, first: Float[Array, "B T D"], is_pruned: bool) -> Float[Array, "B T W"] | None:
    """Log of the weight of each slot as a key, from the states of the tokens' first slots; None: all weights are 1."""
    del params, first, is_pruned
    return None

  def draw_passes(self, rng: Array) -> int | Int[Array, ""]:
    """J of a step. It depends only on the step's key: all rows of a step have the same number of passes."""
    fewest, most = self.jacobi
    return most if fewest == most else jax.random.randint(rng, (), fewest, most + 1)

  def run_token(
    self,
    params: Params,
    *,
    token: Int[Array, "B"],
    position: Int[Array, "B"],
    cache: PyTree,
    cache_index: Int[Array, "B"],
  ) -> tuple[Float[Array, "B D"], PyTree, Int[Array, "B"]]:
    state = self.backbone.embed(params, token[:, None])
    for slot in range(self.num_slots):
      state, cache = self.backbone.apply(params, state, position[:, None], cache, cache_index + slot, method="extend")
    return state[:, 0], cache, jnp.full_like(cache_index, self.num_slots)

  def _passes(self, jacobi: float) -> list[tuple[int, float]]:
    """(slots of each token, number of passes with that many slots) for all passes."""
    return [(count, 1.0) for count in range(1, self.num_slots)] + [(self.num_slots, jacobi + 1.0)]

  @property
  def _mean_jacobi(self) -> float:
    return sum(self.jacobi) / 2

  def train_slots(self, sequence_length: int) -> float:
    return sequence_length * sum(count * times for count, times in self._passes(self._mean_jacobi))

  def forward_slots(self, sequence_length: int) -> float:
    return sequence_length * sum(count * times for count, times in self._passes(self.jacobi[1]))

  def routing_cost(self, jacobi: float) -> flops.Cost:
    """The cost of computing key weights in all passes with J = `jacobi`."""
    del jacobi
    return flops.Cost()

  def forward_cost(self, sequence_length: int, *, slots_read: float, executed: bool) -> flops.Cost:
    jacobi, config = self.jacobi[1], self.backbone.decoder_config
    cost = flops.pass_cost(config, slots=0, keys=0, slots_read=slots_read)
    for count, times in self._passes(jacobi):
      keys = self._keys(sequence_length, count, executed)
      cost += flops.pass_cost(config, slots=count, **keys).times(times)
    return cost + self.routing_cost(jacobi)

  def train_cost(self, sequence_length: int, *, slots_read: float, executed: bool) -> flops.Cost:
    config = self.backbone.decoder_config
    options = {"executed": executed, "frozen": self.backbone.is_frozen}
    cost = flops.train_pass_cost(config, slots=0, keys=0, slots_read=slots_read, **options)
    for count, times in self._passes(self._mean_jacobi):
      keys = self._keys(sequence_length, count, executed)
      cost += flops.train_pass_cost(config, slots=count, **keys, **options).times(times)
    return cost + self.routing_cost(self._mean_jacobi).times(3)

  def inference_cost(self, sequence_length: int, *, slots_read: float, slots: float | None) -> flops.Cost:
    """The cost of running one slot after the other on a cache."""
    if slots is not None:
      raise ValueError(f"slots: {slots}, but all latent thoughts of a token run; pass None")
    return self.decoding_cost(sequence_length, self.num_slots)

  def decoding_cost(self, sequence_length: int, slots: float) -> flops.Cost:
    """The cost of `slots` slots per token on a cache with one readout."""
    keys = self._keys(sequence_length, slots, executed=False)
    return flops.pass_cost(self.backbone.decoder_config, slots=slots, slots_read=1, **keys)

  def _keys(self, length: int, slots: float, executed: bool) -> dict[str, Any]:
    """The arguments `keys` and `local_keys` of `flops.pass_cost`; all slots of a token have its position."""
    return {
      "keys": flops.causal_keys(slots * length, executed),
      "local_keys": flops.local_keys(self.backbone.decoder_config, length, slots, executed=executed),
    }
