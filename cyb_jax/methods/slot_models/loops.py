"""Loops as slots: all layers run again on their own output, and the state after each loop is a slot.

The layers run W times with the same parameters; the final norm is applied after a loop only to read its state.
Universal Transformers: Dehghani et al. 2019, https://arxiv.org/abs/1807.03819; Saunshi et al. 2025,
https://arxiv.org/abs/2502.17416. There are no parameters outside of the decoder.

Every loop has its own keys and values: the cache holds W * L layers, in the order of the loops.

Dimensions: B batch, T tokens, W loops, S slots of a row, Q slots that run together, C cache entries, D model, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cyb_jax.costs import flops
from cyb_jax.decoder import Cache, DecoderConfig
from cyb_jax.decoder.attention import Mask
from cyb_jax.methods.abilities import SlotInputs
from cyb_jax.methods.backbone import Backbone, segment_mask
from cyb_jax.methods.interface import Batch, Params
from cyb_jax.methods.slot_models.plain import Plain


class Loops(Plain):
  """W loops over the layers; the state after the last loop is read: one slot per token.

  Args:
    backbone: the decoder and its readout.
    loops: W.
  """

  def __init__(self, backbone: Backbone, loops: int):
    super().__init__(backbone)
    self.loops = loops
    self.layer_passes = float(loops)

  @property
  def cache_config(self) -> DecoderConfig:
    config = self.backbone.decoder_config
    return dataclasses.replace(config, num_layers=self.loops * config.num_layers)

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T 1 D"]:
    return self._states(params, *self._inputs(params, batch))[-1][:, :, None]

  def hidden_slots(self, params: Params, inputs: SlotInputs, mask: Mask) -> Float[Array, "B Q D"]:
    return self._states(params, self.backbone.embed(params, inputs.tokens), inputs.positions, mask)[-1]

  def _inputs(self, params: Params, batch: Batch) -> tuple[Array, Array, Any, int]:
    tokens = batch["tokens"]
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return self.backbone.embed(params, tokens), positions, segment_mask(batch.get("segment_ids")), 1

  def _states(
    self,
    params: Params,
    inputs: Array,
    positions: Array,
    mask: Any,
    slots_per_position: int | None = None,
    *,
    every: bool = False,
  ) -> list[Float[Array, "B S D"]]:
    """The states after the last loop, or after every loop."""
    hidden, states = inputs, []
    for loop in range(self.loops):
      hidden, _ = self.backbone.apply(
        params, hidden, positions, mask=mask, slots_per_position=slots_per_position, method="run_layers"
      )
      if every or loop == self.loops - 1:
        states.append(self.backbone.apply(params, hidden, method="finish"))
    return states

  def extend(
    self,
    params: Params,
    inputs: SlotInputs,
    cache: Any,
    start: Int[Array, "B"] | None,
    first: Int[Array, "B"] | None = None,
  ) -> tuple[Float[Array, "B Q D"], Any]:
    embedded = self.backbone.embed(params, inputs.tokens)
    states, cache = self._extend(params, embedded, inputs.positions, cache, start, first)
    return self.backbone.apply(params, states[-1], method="finish"), cache

  def _extend(
    self, params: Params, inputs: Array, positions: Array, cache: Cache, start: Array | None, first: Array | None
  ) -> tuple[list[Float[Array, "B Q D"]], Cache]:
    """Runs all loops over new tokens; returns the residual stream after each loop, before the final norm."""
    layers = self.backbone.decoder_config.num_layers
    hidden, states, parts = inputs, [], []
    for loop in range(self.loops):
      part = cache.layers(loop * layers, (loop + 1) * layers)
      hidden, part = self.backbone.apply(params, hidden, positions, part, start, first=first, method="extend_layers")
      states.append(hidden)
      parts.append(part)
    return states, Cache.join(parts)

  def train_slots(self, sequence_length: int) -> float:
    return sequence_length * self.loops

  def forward_slots(self, sequence_length: int) -> float:
    return sequence_length * self.loops

  def train_cost(self, sequence_length: int, *, slots_read: float, executed: bool) -> flops.Cost:
    config = self.backbone.decoder_config
    return flops.train_pass_cost(
      config,
      slots=1,
      keys=flops.causal_keys(sequence_length, executed),
      local_keys=flops.local_keys(config, sequence_length, executed=executed),
      slots_read=slots_read,
      layers=[*range(config.num_layers)] * self.loops,
      executed=executed,
      frozen=self.backbone.is_frozen,
    )

  def forward_cost(self, sequence_length: int, *, slots_read: float, executed: bool) -> flops.Cost:
    return self._loop_cost(sequence_length, self.loops, slots_read, executed)

  def inference_cost(self, sequence_length: int, *, slots_read: float, slots: float | None) -> flops.Cost:
    if slots is None or self.num_slots == 1:
      return super().inference_cost(sequence_length, slots_read=slots_read, slots=slots)
    return self._loop_cost(sequence_length, slots, slots_read, executed=False)

  def _loop_cost(self, length: int, loops: float, slots_read: float, executed: bool) -> flops.Cost:
    config = self.backbone.decoder_config
    local = flops.local_keys(config, length, executed=executed)
    once = flops.pass_cost(config, slots=1, keys=flops.causal_keys(length, executed), local_keys=local)
    return once.times(loops) + flops.pass_cost(config, slots=0, keys=0, slots_read=slots_read)
