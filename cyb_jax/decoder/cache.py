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
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cyb_jax.decoder.config import DecoderConfig

# Parts of a cache: the most, the shortest, and the number that their sizes are multiples of.
_MOST_PARTS, _SHORTEST_PART, _MULTIPLE = 4, 512, 64
# The bytes of a layer's keys, or values, that are read in less time than it takes to choose a part.
_SMALL_BYTES = 2**20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of all layers.

  Attributes:
    keys: rotated, [B, C, G, H] of each layer; with `scan_layers` one array [L, B, C, G, H].
    values: the same shapes.
    positions: with a window the positions of the entries, f32[B, C, 1, 1] of each layer (f32, because the copies of a
      token have fractions), or f32[L, B, C, 1, 1]; else None.
  """

  keys: tuple[Float[Array, "B C G H"], ...] | Float[Array, "L B C G H"]
  values: tuple[Float[Array, "B C G H"], ...] | Float[Array, "L B C G H"]
  positions: tuple[Float[Array, "B C 1 1"], ...] | Float[Array, "L B C 1 1"] | None = None

  def layers(self, first: int, end: int) -> Cache:
    """The cache of the layers first .. end - 1."""
    return Cache(*(None if x is None else x[first:end] for x in (self.keys, self.values, self.positions)))

  def layer(self, number: int) -> tuple[Array, Array, Array | None]:
    """(keys, values, positions) of one layer; without `scan_layers`."""
    return self.keys[number], self.values[number], None if self.positions is None else self.positions[number]

  @classmethod
  def of_layers(cls, layers: Sequence[tuple[Array, Array, Array | None]]) -> Cache:
    """The cache of these layers, each as `layer` gives it."""
    keys, values, positions = zip(*layers)
    return cls(keys, values, None if positions[0] is None else positions)

  @classmethod
  def join(cls, parts: Sequence[Cache]) -> Cache:
    """The inverse of `layers`: the cache of the layers of all parts, in order."""
    if not isinstance(parts[0].keys, tuple):
      return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

    def joined(name: str) -> tuple[Array, ...] | None:
      values = [getattr(part, name) for part in parts]
      return None if values[0] is None else tuple(x for value in values for x in value)

    return cls(joined("keys"), joined("values"), joined("positions"))

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
  arrays = [(shape, dtype), (shape, dtype)]
  if config.window is not None:
    arrays.append(((batch_size, capacity, 1, 1), jnp.dtype(jnp.float32)))
  if config.scan_layers:
    return Cache(*(jnp.zeros((config.num_layers, *shape), dtype) for shape, dtype in arrays))
  # Every layer has its own arrays, because a buffer cannot be donated twice.
  return Cache(*(tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)) for shape, dtype in arrays))


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


def parts(keys: Float[Array, "*L B C G H"]) -> tuple[int, ...]:
  """The numbers of entries, from the front, that attention can read instead of all; the last one is the capacity.

  A program has a branch for each part, so there are few. A small cache is read completely: reading it takes less time
  than choosing a branch.

  Args:
    keys: the keys of a layer, or of all layers; only their shape and dtype are used.
  """
  batch, capacity, *head = keys.shape[-4:]
  entry_bytes = keys.dtype.itemsize * batch * math.prod(head)  # of one index, in a layer
  shortest = max(_SHORTEST_PART, _SMALL_BYTES // entry_bytes)
  sizes = [capacity]
  while len(sizes) < _MOST_PARTS and sizes[0] >= 2 * shortest:
    sizes.insert(0, -(-sizes[0] // (2 * _MULTIPLE)) * _MULTIPLE)
  return tuple(sizes)


def mean_part(sizes: Sequence[int], first: int, last: int) -> float:
  """The mean number of entries that attention reads, over steps that fill a cache from `first` to `last` entries.

  Args:
    sizes: the `parts`.
    first, last: at most the last one of the parts.
  """
  return float(np.mean([next(size for size in sizes if size >= n) for n in range(first, last + 1)]))


def read_filled(attend: Callable[[int], Array], start: Int[Array, "B"], count: int, sizes: Sequence[int]) -> Array:
  """Attention over the smallest part of a cache that has every row's new slots and those before them.

  Args:
    attend: attention over the first n entries, for a static n of `parts`.
    start: i32[B], the index of each row's first new slot.
    count: Q.
    sizes: the `parts`.
  """
  if len(sizes) == 1:
    return attend(sizes[0])
  number = jnp.searchsorted(jnp.asarray(sizes), start.max() + count)
  return jax.lax.switch(number, [functools.partial(attend, size) for size in sizes])


def write(cached: Float[Array, "B C G H"], new: Float[Array, "B Q G H"], start: Int[Array, "B"]) -> Array:
  """The cache of a layer with every row's Q new slots written from that row's index `start` on."""
  put = jax.vmap(lambda row, slots, index: jax.lax.dynamic_update_slice(row, slots, (index, 0, 0)))
  return put(cached, new.astype(cached.dtype), start)
