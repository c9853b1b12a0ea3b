"""Pauses as slots: every token is followed by K pauses, whose inputs are learned rows; one decoder pass runs all slots.

Parameters: with K > 0 `pause_input` f32[K, D], whose row k - 1 is `<pause_k>` (f32[1, D] if all pauses share one row);
with learned offsets also `pause_offset` f32[K, D]; with heads also `slot_heads` f32[W, D, D], initialised to the
identity plus normal noise with a standard deviation of 0.02 / sqrt(D). Method of arXiv 2510.13879.

Dimensions: B batch, T tokens, W slots, K pauses, S slots of a row (T*W flattened, or the size of a packed row), Q slots
that run together, D model.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cyb_jax.costs import flops
from cyb_jax.decoder import HiddenSlots, SegmentMask, embedding_init
from cyb_jax.field_rules import SWITCH, one_of
from cyb_jax.methods.abilities import SlotInputs
from cyb_jax.methods.backbone import Backbone, boxed_row
from cyb_jax.methods.interface import Batch, Params
from cyb_jax.methods.options import MethodConfig
from cyb_jax.methods.slot_models.heads import heads_cost, init_heads
from cyb_jax.methods.slot_models.plain import Plain
from cyb_jax.pauses import Packing, attention_mask, slot_positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class PauseOptions(MethodConfig):
  """The options of pauses.

  Attributes:
    pauses: K, the number of pauses after every token.
    pause_input: the input of a pause: 'pause', its own row (the paper); 'token+pause', its row plus the embedding of
      its token.
    pause_visibility: which slots attend to a pause: 'visible', all later ones; 'hidden', later slots of its own token
      only; see `cyb_jax.pauses`.
    pause_offset: whether a learned offset for each pause index is added before the query and key projections.
    pause_shared: whether all pauses share one row (the form of earlier work).
    pause_positions: the position of a pause: 'token', the position of its token; 'shifting', its own position (the form
      of earlier work).
    slot_heads: whether each slot has its own projection: the readout gets h_i A_i instead of the state h_i of slot i.
      The heads of `mos` do this without pauses.
  """

  RULES: ClassVar = {
    "pause_input": one_of("pause", "token+pause"),
    "pause_visibility": one_of("visible", "hidden"),
    "pause_offset": SWITCH,
    "pause_shared": SWITCH,
    "pause_positions": one_of("token", "shifting"),
    "slot_heads": SWITCH,
  }

  pauses: int = 3
  pause_input: str = "pause"
  pause_visibility: str = "visible"
  pause_offset: bool = False
  pause_shared: bool = False
  pause_positions: str = "token"
  slot_heads: bool = False


class Pauses(Plain):
  """K pauses after every token.

  Args:
    backbone: the decoder and its readout.
    options: the options, validated.
    num_slots: W, the number of slots of a token that are read; None: K + 1.
  """

  def __init__(self, backbone: Backbone, options: PauseOptions, num_slots: int | None = None):
    super().__init__(backbone, options.pauses + 1 if num_slots is None else num_slots)
    self.options = options
    self.num_pauses = options.pauses
    self.hides_pauses = options.pause_visibility == "hidden" and self.num_slots > 1
    self.shifts_positions = options.pause_positions == "shifting"

  def init(self, rng: Array) -> Params:
    params = {}
    if self.num_pauses:
      # The same initialiser as for the input rows of tokens.
      config = self.backbone.decoder_config
      shape = (self.num_pauses, config.d_model)
      rows = (1, shape[1]) if self.options.pause_shared else shape
      params["pause_input"] = boxed_row(embedding_init(config)(rng, rows, jnp.float32))
      if self.options.pause_offset:
        # Initialised to zero, so that an offset initially changes nothing.
        params["pause_offset"] = boxed_row(jnp.zeros(shape))
    if self.options.slot_heads:
      params["slot_heads"] = init_heads(rng, self.num_slots, self.backbone.decoder_config.d_model)
    return params

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T W D"]:
    tokens = batch["tokens"]
    batch_size, length = tokens.shape
    inputs, offset = self._inputs(params, tokens)
    positions = slot_positions(1, length, self.num_slots).reshape(1, -1)
    if self.shifts_positions:
      positions = jnp.arange(length * self.num_slots, dtype=jnp.int32)[None]
    segment_ids = batch.get("segment_ids")
    # A structured mask where one exists: it avoids materialising the [S, S] mask, which no kernel supports.
    config = self.backbone.decoder_config
    structured = config.attention != "cudnn" or (segment_ids is None and config.window is None)
    if self.hides_pauses and structured:
      mask = HiddenSlots(self.num_slots, segment_ids)
    elif segment_ids is not None and not self.hides_pauses:
      mask = SegmentMask(jnp.repeat(segment_ids, self.num_slots, 1))
    else:
      mask = attention_mask(length, self.num_slots, visibility=self.options.pause_visibility, segment_ids=segment_ids)
    outputs = self.backbone.apply(
      params,
      inputs,
      positions,
      mask=mask,
      query_key_offset=None if offset is None else jnp.tile(offset, (length, 1)),
      slots_per_position=1 if self.shifts_positions else self.num_slots,
    )
    outputs = outputs.reshape(batch_size, length, self.num_slots, -1)
    if not self.options.slot_heads:
      return outputs
    return jnp.einsum("btwd,wde->btwe", outputs, params["slot_heads"].astype(outputs.dtype))

  def hidden_packed(self, params: Params, batch: Batch, packing: Packing) -> Float[Array, "B S D"]:
    """The states of the packed slots, in one decoder pass over packed rows."""
    tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
    inputs, offset = self._inputs(params, tokens)
    source = packing.token * self.num_slots + packing.slot
    positions = packing.token
    if self.shifts_positions:
      positions = jnp.arange(source.shape[-1], dtype=jnp.int32)[None]
    if segment_ids is not None and not self.hides_pauses:
      mask = SegmentMask(jnp.take_along_axis(segment_ids, packing.token, 1))
    else:
      mask = attention_mask(
        tokens.shape[1],
        self.num_slots,
        visibility=self.options.pause_visibility,
        segment_ids=segment_ids,
        packing=packing,
      )
    outputs = self.backbone.apply(
      params,
      jnp.take_along_axis(inputs, source[..., None], 1),
      positions,
      mask=mask,
      query_key_offset=None if offset is None else offset[packing.slot],
    )
    return self.project(params, outputs, packing.slot)

  def project(self, params: Params, outputs: Float[Array, "B Q D"], slots: Int[Array, "B Q"]) -> Float[Array, "B Q D"]:
    if not self.options.slot_heads:
      return outputs
    # One matrix for each slot would have to be copied, so every state is multiplied by all W matrices instead.
    heads = params["slot_heads"].astype(outputs.dtype)
    chosen = jax.nn.one_hot(slots, self.num_slots, dtype=outputs.dtype)
    return jnp.einsum("bqw,bqd,wde->bqe", chosen, outputs, heads)

  def embed_slots(
    self, params: Params, inputs: SlotInputs
  ) -> tuple[Float[Array, "B Q D"], Float[Array, "B Q D"] | None]:
    slots = inputs.slots
    embedded = self.backbone.embed(params, inputs.tokens)
    offset = None
    if self.num_pauses:
      pause = jnp.maximum(slots - 1, 0)
      row = jnp.minimum(pause, len(params["pause_input"]) - 1)  # with `pause_shared` all pauses have row 0
      pauses = self.backbone.apply(params, params["pause_input"][row], method="scale_inputs")
      if self.options.pause_input == "token+pause":
        pauses = pauses + embedded
      is_pause = (slots > 0)[..., None]
      embedded = jnp.where(is_pause, pauses, embedded)
      if self.options.pause_offset:
        offset = jnp.where(is_pause, params["pause_offset"][pause], 0.0)
    return embedded, offset

  def _inputs(
    self, params: Params, tokens: Int[Array, "B T"]
  ) -> tuple[Float[Array, "B T*W D"], Float[Array, "W D"] | None]:
    """The inputs of all slots; and the learned offsets of queries and keys by slot, or None."""
    batch_size, length = tokens.shape
    inputs = self.backbone.embed(params, tokens)[:, :, None]
    offset = None
    if self.num_slots > 1:
      rows = self.backbone.apply(params, params["pause_input"], method="scale_inputs")
      pauses = jnp.broadcast_to(rows, (batch_size, length, self.num_pauses, rows.shape[-1]))
      if self.options.pause_input == "token+pause":
        pauses = pauses + inputs
      inputs = jnp.concatenate([inputs, pauses], axis=2)
      if self.options.pause_offset:
        offset = jnp.pad(params["pause_offset"], ((1, 0), (0, 0)))  # a token's first slot has no offset
    return inputs.reshape(batch_size, length * self.num_slots, -1), offset

  def train_cost(self, sequence_length: int, *, slots_read: float, executed: bool) -> flops.Cost:
    cost = super().train_cost(sequence_length, slots_read=slots_read, executed=executed)
    return cost + self.heads_cost(self.num_slots).times(3)

  def forward_cost(self, sequence_length: int, *, slots_read: float, executed: bool) -> flops.Cost:
    cost = super().forward_cost(sequence_length, slots_read=slots_read, executed=executed)
    return cost + self.heads_cost(self.num_slots)

  def inference_cost(self, sequence_length: int, *, slots_read: float, slots: float | None) -> flops.Cost:
    cost = super().inference_cost(sequence_length, slots_read=slots_read, slots=slots)
    # Without `slots` it is the cost of a forward pass, which includes the heads.
    return cost if slots is None else cost + self.heads_cost(slots)

  def heads_cost(self, slots: float) -> flops.Cost:
    """The cost of the projections of this number of slots."""
    return heads_cost(self.backbone.decoder_config.d_model, slots) if self.options.slot_heads else flops.Cost()
