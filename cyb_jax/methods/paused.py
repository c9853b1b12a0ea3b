"""What the methods with pauses after every token share: one decoder pass over all slots of all tokens.

Parameters: `decoder`; with K > 0 pauses `pause_input` f32[K, D] (row k - 1 is `<pause_k>`; f32[1, D] where one is
shared), and where offsets are learned `pause_offset` f32[K, D]. A method that abstains adds its own.

Dimensions: B batch, T tokens, W slots, S slots of a row (T*W flattened, or as many as they are packed into), D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from cyb_jax.costs import flops
from cyb_jax.decoder import Cache, DecoderConfig, HiddenSlots, SegmentMask, embedding_init, empty_cache, init_params
from cyb_jax.errors import InputError
from cyb_jax.methods.interface import Batch, Method, Params
from cyb_jax.pauses import Packing, attention_mask, slot_positions
from cyb_jax.readout import TokenScores, slot_scores, token_scores
from cyb_jax.stopping import SlotScores, log_stopping_distribution

PAUSE_OPTIONS = frozenset(
  {"recipe", "pause_input", "pause_visibility", "pause_offset", "pause_shared", "pause_positions"}
)

_CHOICES = {
  "pause_input": ("pause", "token+pause"),
  "pause_visibility": ("visible", "hidden"),
  "pause_positions": ("token", "shifting"),
}


class PausedMethod(Method):
  """Up to K pauses after every token.

  Attributes:
    recipes: the values of `method.recipe` that this method has.
  """

  recipes: ClassVar[tuple[str, ...]] = ("constant",)
  exports = True
  one_pass = True
  decodes = True
  self_paces = True

  def validate(self) -> None:
    for field, choices in {"recipe": self.recipes, **_CHOICES}.items():
      value = getattr(self.config, field)
      if value not in choices:
        raise InputError(f"method.{field}: {value!r} is none of {', '.join(map(repr, choices))}")

  @property
  def num_slots(self) -> int:
    return self.config.pauses + 1

  @property
  def num_pauses(self) -> int:
    """Rows of pauses that a token's slots may have; an embedding of its own for each, unless one is shared."""
    return self.config.pauses

  @property
  def cache_config(self) -> DecoderConfig:
    """The decoder whose layers `extend` caches."""
    return self.decoder.config

  def init(self, rng: Array) -> Params:
    decoder_key, pause_key, own_key = jax.random.split(rng, 3)
    params = {"decoder": init_params(self.decoder, decoder_key)}
    if self.num_pauses:
      # Pauses start as words do.
      shape = (self.num_pauses, self.decoder.config.d_model)
      rows = (1, shape[1]) if self.config.pause_shared else shape
      params["pause_input"] = boxed_row(embedding_init(self.decoder.config)(pause_key, rows, jnp.float32))
      if self.config.pause_offset:
        # Zero: at the start an offset changes nothing.
        params["pause_offset"] = boxed_row(jnp.zeros(shape))
    return params | self.init_own(own_key)

  def init_own(self, rng: Array) -> Params:
    """The parameters beside the decoder and its pauses."""
    del rng
    return {}

  @property
  def hides_pauses(self) -> bool:
    """Whether a token's pauses are seen by that token alone."""
    return self.config.pause_visibility == "hidden" and self.num_slots > 1

  @property
  def shifts_positions(self) -> bool:
    """Whether a pause takes a position of its own, so that later tokens stand further on."""
    return self.config.pause_positions == "shifting"

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T W D"]:
    """One decoder pass over all W slots of all tokens."""
    tokens = batch["tokens"]
    batch_size, length = tokens.shape
    inputs, offset = self._inputs(params, tokens)
    positions = slot_positions(1, length, self.num_slots).reshape(1, -1)
    if self.shifts_positions:
      positions = jnp.arange(length * self.num_slots, dtype=jnp.int32)[None]
    segment_ids = batch.get("segment_ids")
    # Told by its structure where it can be: no kernel takes the square.
    if self.hides_pauses and self.decoder.config.attention != "cudnn":
      mask = HiddenSlots(self.num_slots, segment_ids)
    elif segment_ids is not None and not self.hides_pauses:
      mask = SegmentMask(jnp.repeat(segment_ids, self.num_slots, 1))
    else:
      mask = attention_mask(length, self.num_slots, visibility=self.config.pause_visibility, segment_ids=segment_ids)
    outputs = self.decoder.apply(
      {"params": params["decoder"]},
      inputs,
      positions,
      mask=mask,
      query_key_offset=None if offset is None else jnp.tile(offset, (length, 1)),
    )
    return outputs.reshape(batch_size, length, self.num_slots, -1)

  def hidden_packed(self, params: Params, batch: Batch, packing: Packing) -> Float[Array, "B S D"]:
    """One decoder pass over the slots that tokens were given."""
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
        visibility=self.config.pause_visibility,
        segment_ids=segment_ids,
        packing=packing,
      )
    return self.decoder.apply(
      {"params": params["decoder"]},
      jnp.take_along_axis(inputs, source[..., None], 1),
      positions,
      mask=mask,
      query_key_offset=None if offset is None else offset[packing.slot],
    )

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
    """Runs some more slots of every row behind those in the cache.

    Args:
      params: bare arrays.
      tokens: i32[B, Q], the token that each slot belongs to.
      slots: i32[B, Q], which of its slots it is, from 0.
      positions: i32[B, Q], for the rotary embeddings.
      cache, start, first: see `Decoder.extend`.
    """
    inputs, offset = self._slot_inputs(params, tokens, slots)
    return self.decoder.apply(
      {"params": params["decoder"]},
      inputs, positions, cache, start, first=first, query_key_offset=offset, method="extend",
    )  # fmt: skip

  @property
  def times_run(self) -> float:
    """How often `hidden_slots` passes a slot through all layers."""
    return 1.0

  def empty_cache(self, rows: int, capacity: int) -> PyTree:
    """What `extend` and `run_token` fill, without a slot; `capacity`: slots of a row."""
    return empty_cache(self.cache_config, rows, capacity)

  def run_token(
    self,
    params: Params,
    token: Int[Array, "B"],
    position: Int[Array, "B"],
    cache: PyTree,
    place: Int[Array, "B"],
  ) -> tuple[Float[Array, "B D"], PyTree, Int[Array, "B"]]:
    """Runs a token's slots one after the other, of methods that feed back.

    Args:
      params: bare arrays.
      token: i32[B], of each row.
      position: i32[B], for the rotary embeddings.
      cache: of `empty_cache`.
      place: i32[B], where the token's first slot goes; the slots before it are seen.

    Returns:
      [B, D], the state that is read; the cache; and i32[B], how many slots of the token it now holds.
    """
    raise NotImplementedError

  def hidden_slots(
    self,
    params: Params,
    tokens: Int[Array, "B S"],
    slots: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    mask: Bool[Array, "B 1 S S"],
  ) -> Float[Array, "B S D"]:
    """One decoder pass over slots that lie anywhere, under a mask of the caller's.

    Args:
      params: bare arrays.
      tokens, slots, positions: as in `extend`.
      mask: see `Decoder.__call__`.
    """
    inputs, offset = self._slot_inputs(params, tokens, slots)
    return self.decoder.apply({"params": params["decoder"]}, inputs, positions, mask=mask, query_key_offset=offset)

  def _slot_inputs(
    self, params: Params, tokens: Int[Array, "B Q"], slots: Int[Array, "B Q"]
  ) -> tuple[Float[Array, "B Q D"], Float[Array, "B Q D"] | None]:
    """Slots, embedded one by one; and what offsets their queries and keys, where that is learned."""
    variables = {"params": params["decoder"]}
    inputs = self.decoder.apply(variables, tokens, method="embed")
    offset = None
    if self.num_pauses:
      pause = jnp.maximum(slots - 1, 0)
      row = jnp.minimum(pause, len(params["pause_input"]) - 1)  # one for all, where it is shared
      pauses = self.decoder.apply(variables, params["pause_input"][row], method="scale_inputs")
      if self.config.pause_input == "token+pause":
        pauses = pauses + inputs
      is_pause = (slots > 0)[..., None]
      inputs = jnp.where(is_pause, pauses, inputs)
      if self.config.pause_offset:
        offset = jnp.where(is_pause, params["pause_offset"][pause], 0.0)
    return inputs, offset

  def _inputs(
    self, params: Params, tokens: Int[Array, "B T"]
  ) -> tuple[Float[Array, "B T*W D"], Float[Array, "W D"] | None]:
    """All slots, embedded; and the offsets of queries and keys by slot, where they are learned."""
    batch_size, length = tokens.shape
    variables = {"params": params["decoder"]}
    inputs = self.decoder.apply(variables, tokens, method="embed")[:, :, None]
    offset = None
    if self.num_slots > 1:
      rows = self.decoder.apply(variables, params["pause_input"], method="scale_inputs")
      pauses = jnp.broadcast_to(rows, (batch_size, length, self.config.pauses, rows.shape[-1]))
      if self.config.pause_input == "token+pause":
        pauses = pauses + inputs
      inputs = jnp.concatenate([inputs, pauses], axis=2)
      if self.config.pause_offset:
        offset = jnp.pad(params["pause_offset"], ((1, 0), (0, 0)))  # the token's own slot has none
    return inputs.reshape(batch_size, length * self.num_slots, -1), offset

  def scores(
    self,
    params: Params,
    hidden: Float[Array, "... W D"],
    targets: Int[Array, "..."],
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
      targets,
      dont_know,
      form=self.config.dont_know,
      prior=self.config.dont_know_prior if dont_know is not None else None,
      soft_cap=config.soft_cap,
      slots=slots,
      chunk_size=self.chunk_size,
      shards=self.shards,
      vocab_size=self.vocab_size,
      dont_know_bias=dont_know_bias,
      frozen=self.weights != "all",
    )

  def token_scores(self, params: Params, hidden: Float[Array, "... D"], slot: Int[Array, "..."]) -> TokenScores:
    """What slots say of every word, and whether they abstain; for decoding.

    Args:
      params: bare arrays.
      hidden: [..., D], of slots anywhere.
      slot: i32[...], which of its token's slots each is, from 0. Methods that stop by a rule abstain by it.
    """
    del slot
    return self._token_scores(params, hidden)

  def mixture_log_probs(
    self, params: Params, hidden: Float[Array, "... W D"]
  ) -> tuple[Float[Array, "... V"], Float[Array, "... W"]]:
    """What tokens say of every word, all their slots granted: log sum_i s_i p_i; and log s."""
    slots = jnp.broadcast_to(jnp.arange(self.num_slots, dtype=jnp.int32), hidden.shape[:-1])
    words = self.token_scores(params, hidden, slots)
    log_stopping = log_stopping_distribution(words.log_dont_know, words.log_answer)
    if self.num_slots == 1:
      return words.log_probs[..., 0, :], log_stopping
    return jax.nn.logsumexp(log_stopping[..., None] + words.log_probs, -2), log_stopping

  def _token_scores(
    self,
    params: Params,
    hidden: Float[Array, "... D"],
    dont_know: Array | None = None,
    dont_know_bias: Array | float = 0.0,
  ) -> TokenScores:
    return token_scores(
      hidden,
      self.decoder.apply({"params": params["decoder"]}, method="unembedding"),
      dont_know,
      form=self.config.dont_know,
      prior=self.config.dont_know_prior if dont_know is not None else None,
      soft_cap=self.decoder.config.soft_cap,
      vocab_size=self.vocab_size,
      dont_know_bias=dont_know_bias,
    )

  @property
  def slots_trained(self) -> int:
    """How many of the W slots the training loss reads."""
    return self.num_slots

  def forward_cost(self, tokens: int, *, executed: bool = False) -> flops.Cost:
    return flops.forward_cost(
      self.decoder.config,
      tokens=tokens,
      slots=self.num_slots,
      slots_read=self.num_slots,
      hidden=self.hides_pauses,
      executed=executed,
    )

  def inference_cost(self, tokens: int, *, slots: float | None = None) -> flops.Cost:
    if slots is None:
      return self.forward_cost(tokens)
    # One at a time, each is read, to know whether the next is wanted.
    return flops.forward_cost(
      self.decoder.config, tokens=tokens, slots=slots, slots_read=slots, hidden=self.hides_pauses
    )

  def train_cost(self, tokens: int, *, executed: bool = False) -> flops.Cost:
    return flops.train_cost(
      self.decoder.config,
      tokens=tokens,
      slots=self.num_slots,
      slots_read=self.slots_trained,
      hidden=self.hides_pauses,
      executed=executed,
      frozen=self.weights != "all",
    )


def boxed_row(value: Float[Array, "... D"]) -> nn.LogicallyPartitioned:
  """A parameter whose last axis is the model's width."""
  return nn.LogicallyPartitioned(value, (None,) * (value.ndim - 1) + ("embed",))
