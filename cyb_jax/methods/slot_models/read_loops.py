"""Slots by loops, all of which are read: slot i of a token is the state after its i-th pass through the layers.

The final norm comes after a loop only to read it: the next loop continues from the residual stream before that norm.
All slots of a token share one place in the cache, at which every loop has keys and values of its own.

A token that answers at loop i does not run its later loops. Their keys and values at its place are filled with those of
loop i.

What is exact: when every token runs all W loops, decoding computes the states of training. When tokens exit early, a
later token that runs loop j sees, at a token that answered at loop i < j, the keys and values of loop i instead of
those of loop j, which were never computed. The states then differ from those of training, by an amount that depends on
the model; an evaluation in the self-paced context measures it.

Dimensions: B batch, T tokens, W loops, S slots of a row, Q slots that run together, C places in the cache, D model,
G kv heads, H head size; ... one axis of layers where the decoder scans over them, else none.
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
  """Keys and values of all loops, and the residual stream of the token that is running.

  Attributes:
    slots: as in `Cache`, with an axis of W loops before that of the rows: [..., W, B, C, G, H].
    residual: [B, D], of each row's last token, after the last loop that it has run.
  """

  slots: Cache
  residual: Float[Array, "B D"]

  @property
  def nbytes(self) -> int:
    return self.slots.nbytes + self.residual.nbytes


class ReadLoops(Loops):
  """The layers W times, with the state after each loop as a slot.

  Args:
    backbone: see there.
    loops: W.
  """

  # The later loops of a token have no places of their own that other tokens could see.
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
    """As in `abilities.Decoding`. The slots of a token are contiguous, in order, and under `mask` those after its first
    are seen by their own token alone.
    """
    # All loops run at a token's first slot, which sees no later slot; the token's other slots are read from there.
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
    """As in `abilities.CachedDecoding`, in three forms.

    - `start` None: Q tokens of a prompt, one slot each. All loops run, and the state after the last one is returned.
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
    """The first `count` loops (None: all) over new tokens: the residual streams after each of them, and the cache."""
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
    place: Int[Array, "B"],
    first: Int[Array, "B"] | None,
  ) -> tuple[Float[Array, "B 1 D"], LoopCache]:
    """Loop `loop` (from 0) of the token at `place`, whose keys and values go to this loop and to all later ones."""
    embedded = self.backbone.embed(params, tokens)
    hidden = jnp.where((loop == 0)[:, None, None], embedded, cache.residual[:, None].astype(embedded.dtype))
    part = jax.tree.map(lambda x: _of_loop(x, loop), cache.slots)
    hidden, part = self.backbone.apply(params, hidden, positions, part, place, first=first, method="extend_layers")
    return self.finish(params, hidden), LoopCache(_filled(cache.slots, part, loop, place), hidden[:, 0])

  def fill_cache(self, cache: LoopCache, *, cache_index: Int[Array, "B"], slots: Int[Array, "B"]) -> LoopCache:
    """See `abilities.EarlyExit`: the loops after the first `slots` get the keys and values of the last of these."""
    part = jax.tree.map(lambda x: _of_loop(x, slots - 1), cache.slots)
    return dataclasses.replace(cache, slots=_filled(cache.slots, part, slots - 1, cache_index))


def _of_loop(x: Float[Array, "... W B C G H"], loop: Int[Array, "B"]) -> Float[Array, "... B C G H"]:
  """Every row at its own loop."""
  index = loop.reshape((1,) * (x.ndim - 4) + (-1, 1, 1, 1))
  return jnp.squeeze(jnp.take_along_axis(x, index, x.ndim - 5), x.ndim - 5)


def _filled(cache: Cache, part: Cache, loop: Int[Array, "B"], place: Int[Array, "B"]) -> Cache:
  """The cache of all loops, with what `part`, of one loop, has at `place` in all loops from `loop` on."""

  def fill(old: Float[Array, "... W B C G H"], new: Float[Array, "... B C G H"]) -> Float[Array, "... W B C G H"]:
    later = jnp.arange(old.shape[-5])[:, None] >= loop
    at_place = jnp.arange(old.shape[-3]) == place[:, None]
    return jnp.where((later[:, :, None] & at_place)[..., None, None], jnp.expand_dims(new, -5), old)

  return jax.tree.map(fill, cache, part)
