"""The division of slots into chunks, for the readout.

Dimensions: N slots flattened, G shards, C slots of a shard in a chunk, J chunks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from cyb_jax.partitioning.rules import parts, target_platform

if TYPE_CHECKING:  # at run time, the core needs only jax
  from jaxtyping import Array

# Logits of one chunk: enough for full matrix tiles, and few enough for several copies in any device's memory; on a CPU,
# as many as stay in the cache of a core.
_CHUNK, _CPU_CHUNK = 2**26, 2**19
# The most probabilities that the forward pass keeps for the backward pass: 256 MiB of f32.
KEPT = 2**26


@dataclasses.dataclass(frozen=True)
class Tiling:
  """The division of the N slots of an array into chunks: [N, ...] is padded and reshaped to [G, C, J, ...].

  Attributes:
    shape: the leading shape whose product is N.
    shards: G.
    per_shard: the number of slots of a shard before padding to a multiple of the chunk size.
    chunk_size: C.
    chunks: J.
  """

  shape: tuple[int, ...]
  shards: int
  per_shard: int
  chunk_size: int
  chunks: int

  @classmethod
  def of(
    cls, shape: tuple[int, ...], rows: int, chunk_size: int | None, shards: int, mesh: AbstractMesh | None
  ) -> Tiling:
    """Returns the tiling of slots whose logits have `rows` columns; see `slot_scores` for the other arguments."""
    if chunk_size is None:
      chunk_size = _slots_of_chunk(rows)
    elif chunk_size < 1:
      raise ValueError(f"chunk_size: {chunk_size} must be positive")
    if shards < 1:
      raise ValueError(f"shards: {shards} must be positive")
    if mesh is not None:
      shards = parts("batch", mesh)
    per_shard = max(1, -(-math.prod(shape) // shards))
    chunk_size = min(chunk_size, per_shard)
    return cls(shape, shards, per_shard, chunk_size, chunks=-(-per_shard // chunk_size))

  @classmethod
  def of_tokens(
    cls, shape: tuple[int, ...], rows: int, chunk_size: int | None, shards: int, mesh: AbstractMesh | None
  ) -> Tiling:
    """Returns the tiling of the tokens of slots with the leading shape [..., W]; see `of`.

    `chunk_size` counts slots as in `of`, and a chunk has at least one token.
    """
    chunk_size = _slots_of_chunk(rows) if chunk_size is None else chunk_size
    if chunk_size >= 1:
      chunk_size = max(1, chunk_size // shape[-1])
    return cls.of(shape[:-1], rows, chunk_size, shards, mesh)

  def keeps_softmax(self, rows: int, mesh: AbstractMesh | None) -> bool:
    """Returns whether a device can keep the softmax of its slots over `rows` rows. Rows that are split are not kept."""
    is_split = mesh is not None and parts("vocab", mesh) > 1
    return self.chunk_size * self.chunks * rows <= KEPT and not is_split

  def split(self, x: Array, mode: str = "constant") -> Array:
    """Reshapes an array with the leading axes `shape` to [G, C, J, ...].

    With `mode` 'edge' the padding repeats the last row of its shard; by default it is zero.
    """
    # The rows are padded, because a smaller last chunk would need a second, slower program. Each shard has its own
    # padding, so no row moves to another device.
    rest = x.shape[len(self.shape) :]
    x = _padded(x.reshape(math.prod(self.shape), *rest), self.shards * self.per_shard, mode).reshape(
      self.shards, self.per_shard, *rest
    )
    x = jnp.moveaxis(_padded(jnp.moveaxis(x, 1, 0), self.chunk_size * self.chunks, mode), 0, 1)
    return x.reshape(self.shards, self.chunk_size, self.chunks, *rest)

  def join(self, x: Array) -> Array:
    """Reshapes an array [G, C, J, ...] to `shape`: the inverse of `split`."""
    rest = x.shape[3:]
    x = x.reshape(self.shards, self.chunk_size * self.chunks, *rest)[:, : self.per_shard]
    return x.reshape(self.shards * self.per_shard, *rest)[: math.prod(self.shape)].reshape(*self.shape, *rest)


def _slots_of_chunk(rows: int) -> int:
  """Returns the number of slots of a chunk whose logits have `rows` columns."""
  return max(128, 2 ** int(math.log2((_CPU_CHUNK if target_platform() == "cpu" else _CHUNK) / rows)))


def _padded(x: Array, length: int, mode: str) -> Array:
  if len(x) == length:
    return x
  # There is nothing to repeat in an empty array.
  return jnp.pad(x, ((0, length - len(x)),) + ((0, 0),) * (x.ndim - 1), mode if len(x) else "constant")
