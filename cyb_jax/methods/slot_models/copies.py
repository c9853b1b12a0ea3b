"""Copies as slots: the embedding of every token is repeated W times, and the plain decoder runs all copies under causal
attention.

Only the position distinguishes the copies of a token: copy j (from 1) of token t has the position t - 1 + j / W, like
the streams of `cyb_jax.methods.thoughtbubbles`. There are no parameters outside of the decoder.

Dimensions: B batch, T tokens, W slots, Q slots that run together, D model.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cyb_jax.methods.backbone import segment_mask
from cyb_jax.methods.interface import Batch, Params
from cyb_jax.methods.slot_models.plain import Plain
from cyb_jax.pauses import slot_positions


class Copies(Plain):
  """W equal inputs of every token."""

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T W D"]:
    tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
    (batch_size, length), width = tokens.shape, self.num_slots
    inputs = jnp.repeat(self.backbone.embed(params, tokens), width, 1)
    positions = self.slot_positions(slot_positions(1, length, width), jnp.arange(width)).reshape(1, -1)
    mask = segment_mask(None if segment_ids is None else jnp.repeat(segment_ids, width, 1))
    outputs = self.backbone.apply(params, inputs, positions, mask=mask)
    return outputs.reshape(batch_size, length, width, -1)

  def slot_positions(self, positions: Int[Array, "..."], slots: Int[Array, "..."]) -> Float[Array, "..."]:
    return positions - 1 + (slots + 1) / self.num_slots
