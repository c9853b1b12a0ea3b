"""What the methods with a constant number of pauses share: one decoder pass over W slots per token.

Parameters: `decoder`; with K > 0 pauses `pause_input` f32[K, D] (row k - 1 is `<pause_k>`), and where offsets are
learned `pause_offset` f32[K, D]. A method that abstains adds its own.

Dimensions: B batch, T tokens, W slots, S = T*W slots flattened, D model.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cyb_jax import flops
from cyb_jax.decoder import HiddenSlots, embedding_init, init_params
from cyb_jax.errors import InputError
from cyb_jax.methods.method import Batch, Method, Params
from cyb_jax.pauses import attention_mask, slot_positions
from cyb_jax.readout import slot_scores
from cyb_jax.stopping import SlotScores

PAUSE_OPTIONS = frozenset({"recipe", "pause_input", "pause_visibility", "pause_offset"})

_CHOICES = {
  "recipe": ("constant",),
  "pause_input": ("pause", "token+pause"),
  "pause_visibility": ("visible", "hidden"),
}


class PausedMethod(Method):
  """K pauses after every token, in training and in evaluation (recipe *constant*)."""

  def validate(self) -> None:
    for field, choices in _CHOICES.items():
      value = getattr(self.config, field)
      if value not in choices:
        raise InputError(f"method.{field}: {value!r} is none of {', '.join(map(repr, choices))}")

  @property
  def num_slots(self) -> int:
    return self.config.pauses + 1

  def init(self, rng: Array) -> Params:
    decoder_key, pause_key, own_key = jax.random.split(rng, 3)
    params = {"decoder": init_params(self.decoder, decoder_key)}
    if self.config.pauses:
      # Pauses start as words do.
      shape = (self.config.pauses, self.decoder.config.d_model)
      params["pause_input"] = boxed_row(embedding_init(self.decoder.config)(pause_key, shape, jnp.float32))
      if self.config.pause_offset:
        # Zero: at the start an offset changes nothing.
        params["pause_offset"] = boxed_row(jnp.zeros(shape))
    return params | self.init_own(own_key)

  def init_own(self, rng: Array) -> Params:
    """The parameters beside the decoder and its pauses."""
    del rng
    return {}

  @property
  def _hides(self) -> bool:
    return self.config.pause_visibility == "hidden" and self.num_slots > 1

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T W D"]:
    """One decoder pass over all slots of all tokens."""
    tokens = batch["tokens"]
    batch_size, length = tokens.shape
    slots = self.num_slots
    variables = {"params": params["decoder"]}
    inputs = self.decoder.apply(variables, tokens, method="embed")[:, :, None]
    offset = None
    if slots > 1:
      rows = self.decoder.apply(variables, params["pause_input"], method="scale_inputs")
      pauses = jnp.broadcast_to(rows, (batch_size, length, *rows.shape))
      if self.config.pause_input == "token+pause":
        pauses = pauses + inputs
      inputs = jnp.concatenate([inputs, pauses], axis=2)
      if self.config.pause_offset:
        table = jnp.pad(params["pause_offset"], ((1, 0), (0, 0)))  # the token's own slot has none
        offset = jnp.tile(table, (length, 1))
    documents = batch.get("documents")
    if self._hides and self.decoder.config.attention != "cudnn":
      mask = HiddenSlots(slots, documents)
    else:
      mask = attention_mask(length, slots, visibility=self.config.pause_visibility, documents=documents)
    flat = (batch_size, length * slots)
    outputs = self.decoder.apply(
      variables,
      inputs.reshape(*flat, -1),
      slot_positions(1, length, slots).reshape(1, -1),
      mask=mask,
      query_key_offset=offset,
    )
    return outputs.reshape(batch_size, length, slots, -1)

  def scores(
    self,
    params: Params,
    hidden: Float[Array, "B T W D"],
    batch: Batch,
    *,
    slots: Sequence[int] | None = None,
    dont_know: Array | None = None,
    dont_know_bias: Array | float = 0.0,
  ) -> SlotScores:
    """Reads `slots` of every token; see `readout.slot_scores`."""
    config = self.decoder.config
    return slot_scores(
      hidden,
      self.decoder.apply({"params": params["decoder"]}, method="unembedding"),
      batch["targets"],
      dont_know,
      form=self.config.dont_know,
      prior=self.config.dont_know_prior if dont_know is not None else None,
      soft_cap=config.soft_cap,
      slots=slots,
      chunk_size=self.chunk_size,
      shards=self.shards,
      vocab_size=self.vocab_size,
      dont_know_bias=dont_know_bias,
    )

  @property
  def slots_trained(self) -> int:
    """How many of the W slots the training loss reads."""
    return self.num_slots

  def forward_flops(self, tokens: int, *, executed: bool = False) -> float:
    return flops.forward_flops(
      self.decoder.config,
      tokens=tokens,
      slots=self.num_slots,
      slots_read=self.num_slots,
      hidden=self._hides,
      executed=executed,
    )

  def train_flops(self, tokens: int, *, executed: bool = False) -> float:
    return flops.train_flops(
      self.decoder.config,
      tokens=tokens,
      slots=self.num_slots,
      slots_read=self.slots_trained,
      hidden=self._hides,
      executed=executed,
    )


def boxed_row(value: Float[Array, "... D"]) -> nn.LogicallyPartitioned:
  """A parameter whose last axis is the model's width."""
  return nn.LogicallyPartitioned(value, (None,) * (value.ndim - 1) + ("embed",))
