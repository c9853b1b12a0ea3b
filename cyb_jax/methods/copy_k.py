"""Copies: every token's embedding K times more, and the rightmost is read. What streams buy that don't decide anything:
the baseline of Thoughtbubbles (Liu et al. 2025, https://arxiv.org/abs/2510.00219).

Copies are streams of the plain decoder under plain causal attention: nothing marks them but where they stand, copy j
(from 1) of the W = K + 1 of token t at position t - 1 + j / W, as the streams of `cyb_jax.methods.thoughtbubbles` do.
It has no parameters beside the decoder's. It is trained and read as `tbys` is, at the last of a token's slots; the
evaluation shows what the copies before it know.

Dimensions: B batch, T tokens, W slots, S slots of a row, Q slots that run together, D model.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cyb_jax.decoder import Cache, SegmentMask
from cyb_jax.methods.interface import Batch, Params
from cyb_jax.methods.tbys import Tbys
from cyb_jax.pauses import slot_positions


class CopyK(Tbys):
  """-log t_W behind the last of W equal inputs."""

  name = "copy_k"
  exports = False
  options = frozenset()

  @property
  def num_pauses(self) -> int:
    return 0  # none has an embedding of its own

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T W D"]:
    tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
    (batch_size, length), width = tokens.shape, self.num_slots
    variables = {"params": params["decoder"]}
    inputs = jnp.repeat(self.decoder.apply(variables, tokens, method="embed"), width, 1)
    positions = self._places(slot_positions(1, length, width), jnp.arange(width)).reshape(1, -1)
    mask = None if segment_ids is None else SegmentMask(jnp.repeat(segment_ids, width, 1))
    outputs = self.decoder.apply(variables, inputs, positions, mask=mask)
    return outputs.reshape(batch_size, length, width, -1)

  def extend(
    self,
    params: Params,
    tokens: Int[Array, "B Q"],
    slots: Int[Array, "B Q"],
    positions: Int[Array, "B Q"],
    cache: Cache,
    start: Int[Array, "B"] | None,
    first: Int[Array, "B"] | None = None,
  ) -> tuple[Float[Array, "B Q D"], Cache]:
    return super().extend(params, tokens, slots, self._places(positions, slots), cache, start, first)

  def hidden_slots(
    self,
    params: Params,
    tokens: Int[Array, "B S"],
    slots: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    mask: Bool[Array, "B 1 S S"],
  ) -> Float[Array, "B S D"]:
    return super().hidden_slots(params, tokens, slots, self._places(positions, slots), mask)

  def _slot_inputs(self, params: Params, tokens: Int[Array, "B Q"], slots: Int[Array, "B Q"]) -> tuple[Array, None]:
    del slots
    return self.decoder.apply({"params": params["decoder"]}, tokens, method="embed"), None

  def _places(self, positions: Int[Array, "..."], slots: Int[Array, "..."]) -> Float[Array, "..."]:
    """Where slots stand whose token stands at `positions`."""
    return positions - 1 + (slots + 1) / self.num_slots
