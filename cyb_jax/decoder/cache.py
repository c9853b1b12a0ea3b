"""Keys and values of slots that were run, so that later slots need not run them again.

Every row has places 0 .. C-1, filled from the front, each row as far as it has come. What lies behind a row's end is
never seen and is written over: a slot is taken back by writing the next one in its place.

    capacity 6, two rows      k0 k1 k2  .  .  .      the next slot of the first row goes to place 3,
                              k0 k1 k2 k3 k4  .      of the second to place 5

Letters: B batch, Q slots that are run together, C capacity, G kv heads, H head size, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

if TYPE_CHECKING:
  from cyb_jax.decoder.decoder import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What attention has seen, of all layers.

  Attributes:
    keys: rotated, [B, C, G, H] of each layer; with `scan_layers` one array [L, B, C, G, H].
    values: the same.
  """

  keys: tuple[Float[Array, "B C G H"], ...] | Float[Array, "L B C G H"]
  values: tuple[Float[Array, "B C G H"], ...] | Float[Array, "L B C G H"]

  @property
  def capacity(self) -> int:
    """C, places of a row."""
    return jax.tree.leaves(self.keys)[0].shape[-3]

  @property
  def nbytes(self) -> int:
    """Bytes of all layers."""
    return sum(x.nbytes for x in jax.tree.leaves(self))


def empty_cache(config: DecoderConfig, batch_size: int, capacity: int) -> Cache:
  """A cache without a slot, in the dtype of activations."""
  shape = (batch_size, capacity, config.num_kv_heads, config.head_size)
  dtype = jnp.dtype(config.dtype)
  if config.scan_layers:
    shape = (config.num_layers, *shape)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
  # Arrays of their own: a buffer can't be donated twice.
  return Cache(*(tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)) for _ in range(2)))


def seen_places(
  start: Int[Array, "B"], count: int, capacity: int, first: Int[Array, "B"] | None = None
) -> Bool[Array, "B 1 Q C"]:
  """Which places the slots written to start .. start + count - 1 see: those up to their own, from `first` on.

  start = 2, count = 2, capacity = 5, first = 1:

      slot at 2    . 1 1 . .
      slot at 3    . 1 1 1 .
  """
  place = jnp.arange(capacity)
  own = start[:, None] + jnp.arange(count)
  seen = place <= own[..., None]
  if first is not None:
    seen &= place >= first[:, None, None]
  return seen[:, None]


def write(cached: Float[Array, "B C G H"], new: Float[Array, "B Q G H"], start: Int[Array, "B"]) -> Array:
  """Puts every row's new slots at its own place."""
  put = jax.vmap(lambda row, slots, place: jax.lax.dynamic_update_slice(row, slots, (place, 0, 0)))
  return put(cached, new.astype(cached.dtype), start)
