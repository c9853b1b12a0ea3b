"""Keys and values of slots that have run, so that these slots are not run again for later slots.

Every row of the cache has C entries, with indices 0 .. C-1, and is filled from the front; rows may hold different
numbers of slots. Entries after the last slot of a row are never seen, and later slots overwrite them: to drop the last
slot of a row, the caller writes the next slot at the same index.

    capacity 6, two rows      k0 k1 k2  .  .  .      the first row's next slot is written at index 3,
                              k0 k1 k2 k3 k4  .      the second row's at index 5

Letters: B batch, Q slots that are run together, C capacity, G kv heads, H head size, L layers.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cyb_jax.decoder.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of all layers.

  Attributes:
    keys: rotated, [B, C, G, H] of each layer; with `scan_layers` one array [L, B, C, G, H].
    values: the same shapes.
  """

  keys: tuple[Float[Array, "B C G H"], ...] | Float[Array, "L B C G H"]
  values: tuple[Float[Array, "B C G H"], ...] | Float[Array, "L B C G H"]

  @property
  def capacity(self) -> int:
    """C, the number of entries of a row."""
    return jax.tree.leaves(self.keys)[0].shape[-3]

  @property
  def nbytes(self) -> int:
    """The bytes of all layers together."""
    return sum(x.nbytes for x in jax.tree.leaves(self))


def empty_cache(config: DecoderConfig, batch_size: int, capacity: int) -> Cache:
  """An empty cache, in the dtype of activations."""
  shape = (batch_size, capacity, config.num_kv_heads, config.head_size)
  dtype = jnp.dtype(config.dtype)
  if config.scan_layers:
    shape = (config.num_layers, *shape)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
  # Every layer has its own arrays, because a buffer cannot be donated twice.
  return Cache(*(tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)) for _ in range(2)))


def cache_mask(
  start: Int[Array, "B"], count: int, capacity: int, first: Int[Array, "B"] | None = None
) -> Bool[Array, "B 1 Q C"]:
  """Which cache entries the slots written at start .. start + count - 1 see: from `first` up to their own.

  start = 2, count = 2, capacity = 5, first = 1:

      slot at 2    . 1 1 . .
      slot at 3    . 1 1 1 .

  Args:
    start: i32[B], the index of each row's first new slot.
    count: Q.
    capacity: C.
    first: i32[B], entries before this index are not seen; None: all are seen.
  """
  entry = jnp.arange(capacity)
  own = start[:, None] + jnp.arange(count)
  seen = entry <= own[..., None]
  if first is not None:
    seen &= entry >= first[:, None, None]
  return seen[:, None]


def write(cached: Float[Array, "B C G H"], new: Float[Array, "B Q G H"], start: Int[Array, "B"]) -> Array:
  """The cache of a layer with every row's Q new slots written from that row's index `start` on."""
  put = jax.vmap(lambda row, slots, index: jax.lax.dynamic_update_slice(row, slots, (index, 0, 0)))
  return put(cached, new.astype(cached.dtype), start)
