"""Loops as slots that are all read: slot i of a token is the state after its i-th pass through the layers.

The final norm is applied only to read a loop: the next loop continues from the residual stream before that norm. All
slots of a token share one cache index, at which every loop has its own keys and values.

A token that answers at loop i does not run its later loops. The cache then holds the keys and values of loop i for the
later loops too.

Exactness: if every token runs all W loops, decoding computes the states of training. If tokens exit early, a later
token that runs loop j sees, at a token that answered at loop i < j, the keys and values of loop i instead of loop j,
because loop j was never computed. The states then differ from those of training by an amount that depends on the model;
an evaluation in the self-paced context measures the effect.

Dimensions: B batch, T tokens, W loops, S slots of a row, Q slots that run together, C cache entries, D model,
G kv heads, H head size; ... one axis of layers if the decoder scans over them, else none.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cyb_jax.decoder import Cache, DecoderConfig, empty_cache
from cyb_jax.decoder.attention import Mask
from cyb_jax.methods.abilities import SlotInputs
from cyb_jax.methods.backbone import Backbone
from cyb_jax.methods.interface import Batch, Params
from cyb_jax.methods.slot_models.loops import Loops


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopCache:
  """Keys and values of all loops, and the residual stream of the current token.

  Attributes:
    slots: as in `Cache`, with an axis of W loops before the axis of rows: [..., W, B, C, G, H].
    residual: [B, D], the residual stream of each row's last token after its last loop.
  """

  slots: Cache
  residual: Float[Array, "B D"]

  @property
  def nbytes(self) -> int:
    return self.slots.nbytes + self.residual.nbytes


class ReadLoops(Loops):
  """W loops over the layers, with the state after each loop as a slot.

  Args:
    backbone: the decoder and its readout.
    loops: W.
  """

  # The later loops of a token have no cache entries of their own that other tokens could see.
  hides_pauses = True

  def __init__(self, backbone: Backbone, loops: int):
    super().__init__(backbone, loops)
    self.num_slots = loops

  @property
  def cache_config(self) -> DecoderConfig:
    """A slot is one loop."""
    return self.backbone.decoder_config

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T W D"]:
    return jnp.stack(self._states(params, *self._inputs(params, batch), every=True), 2)

  def hidden_slots(self, params: Params, inputs: SlotInputs, mask: Mask) -> Float[Array, "B Q D"]:
    """See `abilities.Decoding`. The slots of a token must be contiguous and in order, and in `mask` only their own
    token may see the slots after the first one.
    """
    # All loops run at a token's first slot, which sees no later slot; their states become the token's other slots.
    embedded = self.backbone.embed(params, inputs.tokens)
    states = jnp.stack(self._states(params, embedded, inputs.positions, mask, every=True))
    rows, count = inputs.tokens.shape
    first = jnp.maximum(jnp.arange(count) - inputs.slots, 0)
    return states[inputs.slots, jnp.arange(rows)[:, None], first]

  def empty_cache(self, rows: int, capacity: int) -> LoopCache:
    config = self.backbone.decoder_config
    cache = empty_cache(config, rows, capacity)
    slots = jax.tree.map(lambda x: jnp.stack([x] * self.loops, -5), cache)
    return LoopCache(slots, jnp.zeros((rows, config.d_model), jnp.dtype(config.dtype)))

  def extend(
    self,
    params: Params,
    inputs: SlotInputs,
    cache: LoopCache,
    start: Int[Array, "B"] | None,
    first: Int[Array, "B"] | None = None,
  ) -> tuple[Float[Array, "B Q D"], LoopCache]:
    """See `abilities.CachedDecoding`; there are three forms.

    - `start` None: Q tokens of a prompt, one slot each. All loops run, and the state after the last loop is returned.
    - Q = 1: one loop of one token in each row; rows may be at different loops.
    - Q > 1: the first Q loops of one token in each row.
    """
    tokens, positions = inputs.tokens, inputs.positions
    if start is None:
      states, cache = self._run_loops(params, self.backbone.embed(params, tokens), positions, cache, None, first)
      return self.finish(params, states[-1]), cache
    count = tokens.shape[1]
    if count == 1:
      slot = inputs.slots[:, 0]
      return self._run_loop(params, tokens, slot, positions, cache, start - slot, first)
    embedded = self.backbone.embed(params, tokens[:, :1])
    states, cache = self._run_loops(params, embedded, positions[:, :1], cache, start, first, count)
    return self.finish(params, jnp.concatenate(states, 1)), cache

  def finish(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """The final norm."""
    return self.backbone.apply(params, hidden, method="finish")

  def _run_loops(
    self,
    params: Params,
    hidden: Float[Array, "B Q D"],
    positions: Int[Array, "B Q"],
    cache: LoopCache,
    start: Int[Array, "B"] | None,
    first: Int[Array, "B"] | None,
    count: int | None = None,
  ) -> tuple[list[Float[Array, "B Q D"]], LoopCache]:
    """Runs the first `count` loops (None: all) over new tokens: the residual stream after each loop, and the cache."""
    states, parts = [], []
    for loop in range(self.loops if count is None else count):
      part = jax.tree.map(lambda x, loop=loop: jax.lax.index_in_dim(x, loop, x.ndim - 5, keepdims=False), cache.slots)
      hidden, part = self.backbone.apply(params, hidden, positions, part, start, first=first, method="extend_layers")
      states.append(hidden)
      parts.append(part)
    filled = jax.tree.map(lambda *x: jnp.stack(x, -5), *parts, *parts[-1:] * (self.loops - len(parts)))
    return states, LoopCache(filled, hidden[:, -1])

  def _run_loop(
    self,
    params: Params,
    tokens: Int[Array, "B 1"],
    loop: Int[Array, "B"],
    positions: Int[Array, "B 1"],
    cache: LoopCache,
    cache_index: Int[Array, "B"],
    first: Int[Array, "B"] | None,
  ) -> tuple[Float[Array, "B 1 D"], LoopCache]:
    """Runs loop `loop` (from 0) of the token at `cache_index`; its keys and values also fill all later loops."""
    embedded = self.backbone.embed(params, tokens)
    hidden = jnp.where((loop == 0)[:, None, None], embedded, cache.residual[:, None].astype(embedded.dtype))
    part = jax.tree.map(lambda x: _of_loop(x, loop), cache.slots)
    hidden, part = self.backbone.apply(
      params, hidden, positions, part, cache_index, first=first, method="extend_layers"
    )
    return self.finish(params, hidden), LoopCache(_filled(cache.slots, part, loop, cache_index), hidden[:, 0])

  def fill_cache(self, cache: LoopCache, *, cache_index: Int[Array, "B"], slots: Int[Array, "B"]) -> LoopCache:
    """See `abilities.EarlyExit`: the loops after the first `slots` get the keys and values of loop `slots`."""
    part = jax.tree.map(lambda x: _of_loop(x, slots - 1), cache.slots)
    return dataclasses.replace(cache, slots=_filled(cache.slots, part, slots - 1, cache_index))


def _of_loop(x: Float[Array, "... W B C G H"], loop: Int[Array, "B"]) -> Float[Array, "... B C G H"]:
  """Selects loop `loop[b]` of each row b."""
  index = loop.reshape((1,) * (x.ndim - 4) + (-1, 1, 1, 1))
  return jnp.squeeze(jnp.take_along_axis(x, index, x.ndim - 5), x.ndim - 5)


def _filled(cache: Cache, part: Cache, loop: Int[Array, "B"], cache_index: Int[Array, "B"]) -> Cache:
  """The cache of all loops; from loop `loop` on, its entries at `cache_index` are replaced by those of `part`."""

  def fill(old: Float[Array, "... W B C G H"], new: Float[Array, "... B C G H"]) -> Float[Array, "... W B C G H"]:
    later = jnp.arange(old.shape[-5])[:, None] >= loop
    at_index = jnp.arange(old.shape[-3]) == cache_index[:, None]
    return jnp.where((later[:, :, None] & at_index)[..., None, None], jnp.expand_dims(new, -5), old)

  return jax.tree.map(fill, cache, part)
