"""Splash attention on TPUs: flash attention that skips the blocks that a static mask hides completely.

The kernels are JAX's own (jax.experimental.pallas.ops.tpu.splash_attention). This module adds the masks, the choice of
blocks, the padding and, under a mesh, the split over its devices, because XLA cannot partition a Pallas call.

Letters: B batch, T tokens, W slots, S = T*W flattened, N heads, G kv heads, H head size.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from cyb_jax.decoder.blocked_attention import KERNEL_RESULTS
from cyb_jax.partitioning.rules import RULES, target_kind

_BATCH_AXES, (_HEADS_AXIS,) = RULES["batch"], RULES["heads"]
_LANES = 128
# Two sides of blocks. Small blocks waste less computation on hidden keys. Every block of n queries reads the keys once,
# which is n operations per byte, so chips with more operations per byte of their memory's bandwidth need large ones; at
# head size 256 a block of 1,024 still fits into vector memory, even in float32. Hidden slots need few blocks, most of
# them at the mask's edge, so theirs are small.
_SMALL, _LARGE = 512, 1024
# These chips have at most 240 operations per byte; the settings below are for them and for others.
_LOW_INTENSITY = ("TPU v4", "TPU v5")
# The longest rows with small blocks.
_SMALL_UP_TO = {True: 4096, False: 2048}
# One backward kernel computes the weights once for all three gradients, but writes the queries' gradient once for each
# block of keys, and visits hidden blocks too. So it is used where half of the blocks are visible, and up to this number
# of blocks of keys, beyond which the copies would take too much memory, or too much bandwidth.
_MOST_COPIES = {True: 8, False: 4}


@dataclasses.dataclass(frozen=True)
class Plan:
  """How the kernels compute attention over rows of S slots.

  Attributes:
    block: the side of a block.
    keys: the number of keys that the kernels multiply with a slot's query, averaged over the slots of a row. The
      kernels compute complete blocks, parts of which the mask then hides, and the padding of the last blocks. The
      forward kernel computes 2 products with that many keys, weights and values.
    backward_products: the number of products of the backward kernels with that many keys. One kernel computes the
      weights, their gradient, and the gradients of queries, keys and values: 5. Two kernels compute the first two
      products twice: 7.
  """

  block: int
  keys: float
  backward_products: int


def plan(length: int, num_slots: int = 1, *, window: int | None = None, device_kind: str | None = None) -> Plan:
  """The plan of `attend`.

  Args:
    length: S.
    num_slots: W of hidden slots; 1: every slot sees the slots before it.
    window: as in `attend`. The keys before a window count as if there were none.
    device_kind: the kind of the devices, such as 'TPU v5 lite'; None: that of the traced program.
  """
  kind = target_kind() if device_kind is None else device_kind
  if num_slots > 1:
    block = _even_block(-(-length // num_slots), _SMALL)
    return Plan(block, _executed_keys(length, num_slots, block), 7)
  low = kind.startswith(_LOW_INTENSITY)
  block = _even_block(length, _SMALL if length <= _SMALL_UP_TO[low] else _LARGE)
  fused = window is None and length <= _MOST_COPIES[low] * block
  return Plan(block, _executed_keys(length, 1, block), 5 if fused else 7)


def attend(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B S G H"],
  value: Float[Array, "B S G H"],
  num_slots: int = 1,
  segment_ids: Int[Array, "B T"] | None = None,
  *,
  scale: float | None = None,
  soft_cap: float | None = None,
  window: int | None = None,
  window_slots: int | None = None,
  interpret: bool = False,
) -> Float[Array, "B S N H"]:
  """softmax(q k^T / sqrt(H)) v, causal in the order of the slots.

  Under a mesh (`jax.set_mesh`) the batch is split over the axes data and fsdp and the heads over the axis tensor, if
  the mesh has these axes and XLA partitions them; inside pmap or shard_map the arrays are already split. If the kv
  heads do not divide over tensor, each device gets the kv heads that its heads read.

  Args:
    query: [B, S, N, H]; it is scaled in float32 and rounded back to its dtype.
    key, value: [B, S, G, H].
    num_slots: W; 1: every slot sees the slots before it. Otherwise other tokens see only the first slot of a token, see
      `attention.HiddenSlots`.
    segment_ids: i32[B, T]; tokens with different ids do not see each other. No blocks are skipped because of them.
    scale, soft_cap: see `attention.attend`.
    window: the number of positions that a query sees, its own included; None: all. Blocks before it are skipped.
    window_slots: the number of consecutive slots with the same position; with hidden slots `num_slots`.
    interpret: run the kernels as plain JAX operations, on any device; for tests.

  Returns:
    [B, S, N, H] in the dtype of `query`.
  """
  run = functools.partial(
    _attend_here,
    num_slots=num_slots,
    scale=query.shape[-1] ** -0.5 if scale is None else scale,
    soft_cap=soft_cap,
    window=window,
    window_slots=window_slots,
    interpret=interpret,
  )
  batch_axes, heads_axis = _axes()
  if not batch_axes and heads_axis is None:
    return run(query, key, value, segment_ids)
  if heads_axis is not None:
    # Head n reads kv head n // (N / G). The kv heads are repeated until each device holds the kv heads that it reads.
    groups, parts = key.shape[2], jax.sharding.get_abstract_mesh().shape[heads_axis]
    key, value = (jnp.repeat(x, math.lcm(groups, parts) // groups, axis=2) for x in (key, value))
  heads, rows = PartitionSpec(batch_axes, None, heads_axis), PartitionSpec(batch_axes)
  split = jax.shard_map(
    run,
    in_specs=(heads, heads, heads, None if segment_ids is None else rows),
    out_specs=heads,
    axis_names={*batch_axes, heads_axis} - {None},
    check_vma=False,  # Pallas calls do not declare over which axes their results vary.
  )
  return split(query, key, value, segment_ids)


def uneven(query: Float[Array, "B S N H"]) -> str | None:
  """Why the shape cannot be split over the mesh that is current while tracing, or None."""
  batch_axes, heads_axis = _axes()
  shape = jax.sharding.get_abstract_mesh().shape
  shards = math.prod(shape[axis] for axis in batch_axes)
  if query.shape[0] % shards:
    return f"a batch of {query.shape[0]} rows doesn't divide over {shards} devices"
  if heads_axis is not None and query.shape[2] % shape[heads_axis]:
    return f"{query.shape[2]} heads don't divide over {shape[heads_axis]} devices"
  return None


def _executed_keys(length: int, num_slots: int, block: int) -> float:
  """`Plan.keys` for a side of blocks."""
  rows = -(-length // block)
  if num_slots == 1:
    return rows * (rows + 1) / 2 * block**2 / length
  count = 0
  for row in range(rows):
    first, last = row * block, (row + 1) * block - 1
    # Among the columns of all slots: the row's own block, and the block before it if a token has slots in both.
    own = (first // num_slots * num_slots + 1) // block if first % num_slots else row
    count += last // num_slots // block + 1 + row - own + 1
  return count * block**2 / length


def _axes() -> tuple[tuple[str, ...], str | None]:
  """The axes of the current mesh over which the batch is split, and the axis over which the heads are split."""
  mesh = jax.sharding.get_abstract_mesh()
  free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}
  return tuple(axis for axis in _BATCH_AXES if axis in free), _HEADS_AXIS if _HEADS_AXIS in free else None


def _even_block(size: int, largest: int) -> int:
  """The side of a block: a multiple of the lanes, chosen so that the fewest blocks of equal size cover the row."""
  return _round_up(-(-size // -(-size // largest)), _LANES)


def _round_up(size: int, step: int) -> int:
  return -(-size // step) * step


def _attend_here(query, key, value, segment_ids, *, num_slots, scale, soft_cap, window, window_slots, interpret):
  """`attend` on one device, or on one device's part of the arrays."""
  length, heads = query.shape[1:3]
  planned = plan(length, num_slots, window=window)
  block = planned.block
  rows = _round_up(length, block)
  query = (query.astype(jnp.float32) * scale).astype(query.dtype)
  seen_from = None if segment_ids is None else jnp.repeat(segment_ids, num_slots, 1)
  seen = seen_from
  if num_slots == 1:
    mask = masks.CausalMask((rows, rows)) if window is None else _WindowMask(rows, window, window_slots)
  else:
    # The keys are the tokens' first slots, then all slots. In the order of the slots every block below the diagonal
    # would hold some first slots; with the first slots separate, the other slots need only the blocks on the diagonal.
    firsts = _round_up(length // num_slots, block)
    key, value = (jnp.concatenate((_pad(x[:, ::num_slots], firsts), x), 1) for x in (key, value))
    if segment_ids is not None:
      seen = jnp.concatenate((_pad(segment_ids, firsts), seen_from), 1)
    mask = _HiddenMask(rows, firsts, num_slots, window)
  # The padding of the last blocks follows all slots, so no slot sees it, and its outputs are cut off.
  query, key, value = _pad(query, rows), _pad(key, mask.shape[1]), _pad(value, mask.shape[1])
  segments = None if segment_ids is None else kernels.SegmentIds(_pad(seen_from, rows), _pad(seen, mask.shape[1]))
  # Half a block of keys at a time, because the float32 weights of a whole block would fill the vector memory.
  part = block // 2 if block % (2 * _LANES) == 0 else block
  fused = planned.backward_products == 5
  sizes = kernels.BlockSizes(
    block_q=block, block_kv=block, block_kv_compute=part,
    block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=part,
    block_q_dq=None if fused else block, block_kv_dq=None if fused else block, use_fused_bwd_kernel=fused,
  )  # fmt: skip
  kernel = kernels.make_splash_mha(
    masks.MultiHeadMask([mask] * heads),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=KERNEL_RESULTS,
    attn_logits_soft_cap=soft_cap,
    interpret=interpret,
  )
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
  out = jax.vmap(kernel)(query, key, value, segments)
  return jnp.swapaxes(out, 1, 2)[:, :length]


def _pad(x: Array, length: int) -> Array:
  """[B, L, ...], padded with zeros on the right up to the length."""
  return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2)))


@dataclasses.dataclass(frozen=True)
class _SlotMask(masks.Mask):
  """A mask that the kernels compute for every attention weight, instead of reading it.

  A row's token and slot are packed into one integer, because dividing by the number of slots in the kernels would cost
  more than the softmax.
  """

  rows: int

  def slots_per_token(self) -> int:
    raise NotImplementedError

  @property
  def shape(self) -> tuple[int, int]:
    return self.rows, self.rows

  @property
  def q_sequence(self) -> np.ndarray:
    width = self.slots_per_token()
    token, slot = np.divmod(np.arange(self.rows, dtype=np.int32), np.int32(width))
    return token << width.bit_length() | slot

  @property
  def mask_function(self) -> _SlotMask:
    return self

  def __call__(self, rows, columns):
    bits = self.slots_per_token().bit_length()
    return self.seen(rows >> bits, rows & ((1 << bits) - 1), columns)

  def seen(self, token, slot, columns):
    """Whether the slot of a token sees the key at a column."""
    raise NotImplementedError

  def __getitem__(self, index) -> np.ndarray:
    rows, columns = index
    return self(self.q_sequence[rows][:, None], np.arange(self.shape[1], dtype=np.int32)[columns][None])


@dataclasses.dataclass(frozen=True)
class _WindowMask(_SlotMask):
  """Causal attention within a window of `size` positions; `num_slots` consecutive slots have the same position."""

  size: int
  num_slots: int

  def slots_per_token(self) -> int:
    return self.num_slots

  def seen(self, token, slot, columns):
    own = columns - token * self.num_slots  # 0: the first slot with the query's position
    return (own <= slot) & (own >= -(self.size - 1) * self.num_slots)


@dataclasses.dataclass(frozen=True)
class _HiddenMask(_SlotMask):
  """Hidden slots: rows are slots; columns are the tokens' first slots, padded to full blocks, then all slots.

  T = 2, W = 3, the first slots padded to 4:

                f0 f1 . .   t0 . .  t1 . .
      t0 first   1  . . .    . . .   . . .
         second  1  . . .    . 1 .   . . .
         third   1  . . .    . 1 1   . . .
      t1 first   1  1 . .    . . .   . . .
         second  1  1 . .    . . .   . 1 .
         third   1  1 . .    . . .   . 1 1

  With a window, only the first slots of the last `window` tokens are seen.
  """

  firsts: int
  num_slots: int
  window: int | None = None

  @property
  def shape(self) -> tuple[int, int]:
    return self.rows, self.firsts + self.rows

  def slots_per_token(self) -> int:
    return self.num_slots

  def seen(self, token, slot, columns):
    key_slot = columns - self.firsts - token * self.num_slots
    far = columns <= token
    if self.window is not None:
      far &= columns > token - self.window
    return far | ((key_slot > 0) & (key_slot <= slot))
