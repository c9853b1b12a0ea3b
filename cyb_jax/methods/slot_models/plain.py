"""One slot per token: a plain language model.

Dimensions: B batch, T tokens, S slots of a row, Q slots that run together, D model.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from cyb_jax.costs import flops
from cyb_jax.decoder import DecoderConfig, empty_cache
from cyb_jax.decoder.attention import Mask
from cyb_jax.methods.abilities import SlotInputs
from cyb_jax.methods.backbone import Backbone, segment_mask
from cyb_jax.methods.interface import Batch, Params


class Plain:
  """One pass over the tokens. This is the base class of the slot models that run on a cache.

  Attributes:
    hides_pauses, shifts_positions, keeps_all_pauses, layer_passes: see `abilities.Decoding`.
  """

  hides_pauses = False
  shifts_positions = False
  keeps_all_pauses = True
  layer_passes = 1.0

  def __init__(self, backbone: Backbone, num_slots: int = 1):
    self.backbone = backbone
    self.num_slots = num_slots

  @property
  def cache_config(self) -> DecoderConfig:
    return self.backbone.decoder_config

  def init(self, rng: Array) -> Params:
    del rng
    return {}

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T W D"]:
    tokens = batch["tokens"]
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    inputs = self.backbone.embed(params, tokens)
    mask = segment_mask(batch.get("segment_ids"))
    outputs = self.backbone.apply(params, inputs, positions, mask=mask, slots_per_position=1)
    return outputs[:, :, None]

  def empty_cache(self, rows: int, capacity: int) -> PyTree:
    return empty_cache(self.cache_config, rows, capacity)

  def embed_slots(
    self, params: Params, inputs: SlotInputs
  ) -> tuple[Float[Array, "B Q D"], Float[Array, "B Q D"] | None]:
    """The inputs of slots in any order, [B, Q, D]; and the learned offsets of their queries and keys, or None."""
    return self.backbone.embed(params, inputs.tokens), None

  def slot_positions(self, positions: Int[Array, "B Q"], slots: Int[Array, "B Q"]) -> Array:
    """The positions of slots for the rotary embeddings, from the positions of their tokens."""
    del slots
    return positions

  def extend(
    self,
    params: Params,
    inputs: SlotInputs,
    cache: Any,
    start: Int[Array, "B"] | None,
    first: Int[Array, "B"] | None = None,
  ) -> tuple[Float[Array, "B Q D"], Any]:
    embedded, offset = self.embed_slots(params, inputs)
    positions = self.slot_positions(inputs.positions, inputs.slots)
    outputs, cache = self.backbone.apply(
      params, embedded, positions, cache, start, first=first, query_key_offset=offset, method="extend"
    )
    return self.project(params, outputs, inputs.slots), cache

  def hidden_slots(self, params: Params, inputs: SlotInputs, mask: Mask) -> Float[Array, "B Q D"]:
    embedded, offset = self.embed_slots(params, inputs)
    positions = self.slot_positions(inputs.positions, inputs.slots)
    outputs = self.backbone.apply(params, embedded, positions, mask=mask, query_key_offset=offset)
    return self.project(params, outputs, inputs.slots)

  def project(self, params: Params, outputs: Float[Array, "B Q D"], slots: Int[Array, "B Q"]) -> Float[Array, "B Q D"]:
    """The states that the readout gets, from the states of slots in any order."""
    del params, slots
    return outputs

  def train_slots(self, sequence_length: int) -> float:
    return sequence_length * self.num_slots

  def forward_slots(self, sequence_length: int) -> float:
    return sequence_length * self.num_slots

  def train_cost(self, sequence_length: int, *, slots_read: float, executed: bool) -> flops.Cost:
    return flops.train_cost(
      self.backbone.decoder_config,
      tokens=sequence_length,
      slots=self.num_slots,
      slots_read=slots_read,
      hidden=self.hides_pauses,
      shifting=self.shifts_positions,
      executed=executed,
      frozen=self.backbone.is_frozen,
    )

  def forward_cost(self, sequence_length: int, *, slots_read: float, executed: bool) -> flops.Cost:
    return flops.forward_cost(
      self.backbone.decoder_config,
      tokens=sequence_length,
      slots=self.num_slots,
      slots_read=slots_read,
      hidden=self.hides_pauses,
      shifting=self.shifts_positions,
      executed=executed,
    )

  def inference_cost(self, sequence_length: int, *, slots_read: float, slots: float | None) -> flops.Cost:
    if slots is None:
      return self.forward_cost(sequence_length, slots_read=slots_read, executed=False)
    return flops.forward_cost(
      self.backbone.decoder_config,
      tokens=sequence_length,
      slots=slots,
      slots_read=slots_read,
      hidden=self.hides_pauses,
      shifting=self.shifts_positions,
    )
