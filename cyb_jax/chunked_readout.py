"""z_y and l of every slot, the target's logit and the log-sum-exp of all logits, computed in chunks of slots.

The computation scans over chunks, each with the full vocabulary. The gradient is exact and written by hand: with
p = softmax(z) and cotangents g of (z_y, l),

    dz = g_l p + g_y onehot(y),    dh = dz U,    dU = sum over chunks of dz^T h.

The backward pass recomputes the logits of each chunk, with two exceptions. If all of them fit into one chunk of an
accelerator (`tiling.KEPT`), the forward pass keeps p. And if the unembedding is frozen, it keeps the two means that
dh = g_l (p U) + g_y U_y needs, of the size of h, and the backward pass has no matrix product.

Under a mesh of devices (`partitioning.rules`), each device processes its own slots and its own rows of the unembedding.
The logits stay on their device, and the scan does not communicate. After the scan, three numbers of every slot (the
largest logit, the sum of exponentials, z_y) and dh are reduced over the parts of the vocabulary, and dU is reduced over
the parts of the batch.

Dimensions: D model, V vocabulary rows, G shards, C slots of a shard in a chunk, J chunks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from cyb_jax.partitioning.rules import mesh_axes, spec, target_platform

if TYPE_CHECKING:  # at run time, the core needs only jax
  from jaxtyping import Array, Float, Int


def sum_dtype(hidden: Array) -> jnp.dtype:
  """Returns f32, or f64 in tests that use the 64-bit mode of jax."""
  return jnp.promote_types(hidden.dtype, jnp.float32)


@dataclasses.dataclass(frozen=True)
class ChunkedReadout:
  """The static part of a readout.

  Attributes:
    tokens: the number of rows before the padding; None if there is no padding.
    excluded: a row that is not a token; None if there is no such row.
    soft_cap, frozen: see `slot_scores`.
    keeps_softmax: whether the forward pass keeps p for the backward pass.
    mesh: the mesh over which the readout is sharded, or None.
  """

  tokens: int | None
  excluded: int | None
  soft_cap: float | None
  frozen: bool
  keeps_softmax: bool
  mesh: AbstractMesh | None

  def logits(
    self, chunk: Float[Array, "G C D"], table: Float[Array, "V D"], first: Int[Array, ""] | int
  ) -> tuple[Float[Array, "G C V"], Float[Array, "G C V"] | None, Int[Array, "G C V"]]:
    """Returns the capped logits, the derivative of the cap (None without a cap), and the row number of each column.

    Args:
      chunk: hidden states.
      table: rows of the unembedding; the logits of rows that are not tokens are -inf.
      first: the number of the first of these rows.
    """
    logits = jnp.einsum("gcd,vd->gcv", chunk, table, preferred_element_type=sum_dtype(chunk))
    slope = None
    if self.soft_cap is not None:
      tanh = jnp.tanh(logits / self.soft_cap)
      logits, slope = self.soft_cap * tanh, 1.0 - tanh**2
    column = first + columns(logits)
    if self.tokens is not None:
      logits = jnp.where(column < self.tokens, logits, -jnp.inf)
    if self.excluded is not None:
      logits = jnp.where(column != self.excluded, logits, -jnp.inf)
    return logits, slope, column

  def before_cap(self, cotangent: Float[Array, "..."], target_logit: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the cotangent of the target's logit before the soft cap; 0 if the target is not a token."""
    if self.soft_cap is None:
      return cotangent
    is_token = target_logit > -jnp.inf
    return jnp.where(is_token, cotangent * (1.0 - (jnp.where(is_token, target_logit, 0.0) / self.soft_cap) ** 2), 0.0)

  def spread(
    self,
    function: Callable[..., Any],
    of_slots: Sequence[Any],
    table: Array,
    *,
    of_chunks: Array | None = None,
    results: Sequence[str],
  ) -> Any:
    """Calls `function(self, spec of the table, *of_slots, [of_chunks], table)` on each device's shards.

    The width of the unembedding, which is split over fsdp, is gathered before the call.

    Args:
      function: returns a tuple.
      of_slots: trees of arrays [G, C, J, ...]; the first is an array.
      table: [V, D], the unembedding.
      of_chunks: an array [J, G, C, ...].
      results: of each result of `function`, 'slots' for a tree of arrays [G, C, J, ...], 'chunks' for an array
        [J, G, C, ...], or 'table' for the gradient of the table, which is scattered once after the call, not once per
        chunk.
    """
    given = [*of_slots, *(() if of_chunks is None else (of_chunks,)), table]
    if self.mesh is None:
      return function(self, PartitionSpec(None, None), *given)
    slots, rows = spec(of_slots[0].shape, ("batch",), self.mesh), spec(table.shape, ("vocab", "embed"), self.mesh)
    specs = {"slots": slots, "chunks": PartitionSpec(None, *slots), "table": rows}
    spread = jax.shard_map(
      functools.partial(function, self, rows),
      in_specs=(
        *(slots,) * len(of_slots), *(() if of_chunks is None else (specs["chunks"],)), PartitionSpec(rows[0], None),
      ),
      out_specs=tuple(specs[result] for result in results),
      check_vma=False,
    )  # fmt: skip
    return spread(*given)


def columns(logits: Float[Array, "... V"]) -> Int[Array, "... V"]:
  return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def target_logits(
  readout: ChunkedReadout,
  hidden: Float[Array, "G C J D"],
  unembedding: Float[Array, "V D"],
  targets: Int[Array, "G C J"],
) -> tuple[Float[Array, "G C J"], Float[Array, "G C J"]]:
  """Returns (z_y, l) of every slot."""
  table = unembedding.astype(hidden.dtype)
  target_logit, log_normalizer = readout.spread(_read, (hidden, targets), table, results=("slots", "slots"))
  return target_logit, log_normalizer


def _forward(
  readout: ChunkedReadout, hidden: Array, unembedding: Array, targets: Array
) -> tuple[tuple[Array, Array], tuple[Array | None, ...]]:
  table = unembedding.astype(hidden.dtype)
  if readout.frozen:
    *outputs, mean, gap = readout.spread(_read_means, (hidden, targets), table, results=("slots",) * 4)
    return tuple(outputs), (mean, gap, outputs[0])
  read, results = (_read_and_keep, ("slots", "slots", "chunks")) if readout.keeps_softmax else (_read, ("slots",) * 2)
  target_logit, log_normalizer, *kept = readout.spread(read, (hidden, targets), table, results=results)
  outputs = target_logit, log_normalizer
  return outputs, (hidden, unembedding, targets, *outputs, *kept)


def backward(
  readout: ChunkedReadout, residuals: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array | None, None]:
  """Returns the cotangents of (hidden, unembedding, targets) from those of (z_y, l)."""
  d_target, d_normalizer = cotangents
  if readout.frozen:
    mean, gap, target_logit = residuals
    d_target = readout.before_cap(d_target, target_logit)
    dtype = sum_dtype(mean)
    # g_l mean + g_y U_y: the two terms cancel where the target is nearly certain, so their difference was kept.
    d_hidden = (d_normalizer + d_target)[..., None] * mean.astype(dtype) - d_target[..., None] * gap.astype(dtype)
    return d_hidden.astype(mean.dtype), None, None
  hidden, unembedding, targets, target_logit, log_normalizer, *kept = residuals
  # The cast is inside the custom gradient, so the gradient of an f32 unembedding is accumulated and returned in f32
  # even if activations are bf16.
  table = unembedding.astype(hidden.dtype)
  of_slots = (hidden, targets, log_normalizer, readout.before_cap(d_target, target_logit), d_normalizer)
  d_hidden, d_unembedding = readout.spread(
    _read_backward, of_slots, table, of_chunks=kept[0] if kept else None, results=("slots", "table")
  )
  return d_hidden, d_unembedding.astype(unembedding.dtype), None


target_logits.defvjp(_forward, backward)


def first_row(rows: PartitionSpec, table: Array) -> Int[Array, ""] | int:
  """Returns the number of the first row of this device's part of the unembedding."""
  return 0 if rows[0] is None else jax.lax.axis_index(rows[0]) * len(table)


def _read(
  readout: ChunkedReadout, rows: PartitionSpec, hidden: Array, targets: Array, table: Array
) -> tuple[Float[Array, "G C J"], Float[Array, "G C J"]]:
  """Returns (z_y, l) of slots; `rows` has the mesh axes that split the unembedding."""
  target_logit, log_normalizer = _scan(readout, rows, hidden, targets, table, lambda *_: ())
  log_normalizer, target_logit = over_parts(rows, log_normalizer, target_logit)
  return target_logit, log_normalizer


def _read_and_keep(
  readout: ChunkedReadout, rows: PartitionSpec, hidden: Array, targets: Array, table: Array
) -> tuple[Float[Array, "G C J"], Float[Array, "G C J"], Float[Array, "J G C V"]]:
  """Returns (z_y, l, p) of slots, p times the derivative of the cap; the vocabulary must not be split."""

  def softmax(chunk: Array, target: Array, shares: Array) -> tuple[Array]:
    del chunk, target
    return (shares,)

  target_logit, log_normalizer, kept = _scan(readout, rows, hidden, targets, table, softmax)
  return target_logit, log_normalizer, jnp.moveaxis(kept, 2, 0)


def _read_means(
  readout: ChunkedReadout, rows: PartitionSpec, hidden: Array, targets: Array, table: Array
) -> tuple[Float[Array, "G C J"], Float[Array, "G C J"], Float[Array, "G C J D"], Float[Array, "G C J D"]]:
  """Returns (z_y, l, mean, mean - U_y) of slots: the mean of the rows is p U, where the cap's slope multiplies p."""
  first = first_row(rows, table)

  def means(chunk: Array, target: Array, shares: Array) -> tuple[Array, Array]:
    row = target - first
    here = (row >= 0) & (row < len(table))
    own = jnp.where(here[..., None], jnp.take(table, row, axis=0, mode="clip"), 0).astype(sum_dtype(chunk))
    # p_y - 1 is formed before anything is rounded to bf16: it is small where the target is nearly certain.
    shares = jnp.where(columns(shares) == row[..., None], shares - 1.0, shares).astype(table.dtype)
    gap = jnp.einsum("gcv,vd->gcd", shares, table, preferred_element_type=own.dtype)
    # The sums over parts of a vocabulary are rounded after all parts have been added.
    return (gap, own) if rows[0] is not None else (gap.astype(chunk.dtype), (gap + own).astype(chunk.dtype))

  target_logit, log_normalizer, gap, mean = _scan(readout, rows, hidden, targets, table, means)
  if rows[0] is None:
    return target_logit, log_normalizer, mean, gap
  own, of_part = mean, log_normalizer
  log_normalizer, target_logit = over_parts(rows, log_normalizer, target_logit)
  # p over all parts is `share` times p of this part.
  log_share = (of_part - log_normalizer)[..., None]
  gap, own = jax.lax.psum((jnp.exp(log_share) * gap + jnp.expm1(log_share) * own, own), rows[0])
  return target_logit, log_normalizer, (gap + own).astype(hidden.dtype), gap.astype(hidden.dtype)


def _scan(
  readout: ChunkedReadout,
  rows: PartitionSpec,
  hidden: Array,
  targets: Array,
  table: Array,
  keep: Callable[[Array, Array, Array], tuple[Array, ...]],
) -> list[Array]:
  """Returns (z_y, l, *keep(chunk, targets, p)) of slots over this device's part of the vocabulary, [G, C, J, ...] each;
  p is multiplied by the derivative of the cap.
  """
  first = first_row(rows, table)

  def read(_: None, j: Array) -> tuple[None, tuple[Array, ...]]:
    chunk, target = (jax.lax.dynamic_index_in_dim(x, j, 2, keepdims=False) for x in (hidden, targets))
    target_logit, log_normalizer, logits, slope, _column = read_slots(readout, chunk, target, table, first)
    # A part of the vocabulary may consist of padding only (l = -inf).
    shares = shares_of(logits, jnp.where(log_normalizer > -jnp.inf, log_normalizer, 0.0), slope)
    return None, (target_logit, log_normalizer, *keep(chunk, target, shares))

  _, outputs = jax.lax.scan(read, None, jnp.arange(hidden.shape[2]))
  return [jnp.moveaxis(x, 0, 2) for x in outputs]  # [J, G, C] -> [G, C, J]


def read_slots(
  readout: ChunkedReadout,
  chunk: Float[Array, "G C D"],
  target: Int[Array, "G C"],
  table: Float[Array, "V D"],
  first: Int[Array, ""] | int,
) -> tuple[Float[Array, "G C"], Float[Array, "G C"], Float[Array, "G C V"], Array | None, Array]:
  """Returns (z_y, l) over these rows of the unembedding, and the results of `ChunkedReadout.logits`."""
  logits, slope, column = readout.logits(chunk, table, first)
  # A masked sum is used instead of a gather: it is fused, and each part of a split vocabulary contributes its term.
  target_logit = jnp.where(column == target[..., None], logits, 0.0).sum(-1)
  return target_logit, jax.nn.logsumexp(logits, axis=-1), logits, slope, column


def shares_of(logits: Array, log_normalizer: Array, slope: Array | None) -> Float[Array, "... V"]:
  """Returns p times the derivative of the cap."""
  shares = jnp.exp(logits - log_normalizer[..., None])
  return shares if slope is None else shares * slope


def over_parts(
  rows: PartitionSpec, log_normalizer: Array, target_logit: Array
) -> tuple[Float[Array, "G C J"], Float[Array, "G C J"]]:
  """Returns l and z_y over all parts of the vocabulary."""
  if rows[0] is None:
    return log_normalizer, target_logit
  # A part of the vocabulary may consist of padding only (l = -inf), but not all parts do.
  largest = jax.lax.pmax(log_normalizer, rows[0])
  total, target_logit = jax.lax.psum((jnp.exp(log_normalizer - largest), target_logit), rows[0])
  return largest + jnp.log(total), target_logit


@dataclasses.dataclass(frozen=True)
class TableSum:
  """The sum of dz^T h over chunks, for each shard.

  Attributes:
    transposed: whether the sum is [G, D, V]. XLA's CPU compiler is slow at products that contract the rows of both
      operands, so the small operand is transposed in memory first.
  """

  transposed: bool

  @classmethod
  def here(cls) -> TableSum:
    """The sum that is fast on the device that the program is compiled for."""
    return cls(transposed=target_platform() == "cpu")

  def zeros(self, hidden: Float[Array, "G C J D"], table: Float[Array, "V D"]) -> Array:
    shape = table.shape[::-1] if self.transposed else table.shape
    return jnp.zeros((len(hidden), *shape), sum_dtype(hidden))

  def add(self, total: Array, d_logits: Float[Array, "G C V"], chunk: Float[Array, "G C D"]) -> Array:
    if not self.transposed:
      return total + jnp.einsum("gcv,gcd->gvd", d_logits, chunk, preferred_element_type=total.dtype)
    # The barrier keeps XLA from merging the transposition with the product.
    columns = jax.lax.optimization_barrier(chunk.swapaxes(1, 2))
    return total + jnp.einsum("gdc,gcv->gdv", columns, d_logits, preferred_element_type=total.dtype)

  def total(self, total: Array) -> Float[Array, "V D"]:
    return total.sum(0).T if self.transposed else total.sum(0)


def _read_backward(
  readout: ChunkedReadout,
  rows: PartitionSpec,
  hidden: Array,
  targets: Array,
  log_normalizer: Array,
  target_cotangent: Array,
  normalizer_cotangent: Array,
  *kept_and_table: Array,
) -> tuple[Float[Array, "G C J D"], Float[Array, "V D"]]:
  """Returns (dh, dU); dU is f32. `target_cotangent` is that of the logit before the cap."""
  *kept, table = kept_and_table
  first = first_row(rows, table)

  def read(carry: tuple[Array, Array], of_chunk: tuple[Array, Array | None]) -> tuple[tuple[Array, Array], None]:
    d_hidden, d_table = carry
    j, shares = of_chunk
    chunk, target, normalizer, d_target, d_normalizer = (
      jax.lax.dynamic_index_in_dim(x, j, 2, keepdims=False)
      for x in (hidden, targets, log_normalizer, target_cotangent, normalizer_cotangent)
    )
    if shares is None:
      logits, slope, column = readout.logits(chunk, table, first)
      shares = shares_of(logits, normalizer, slope)
    else:
      column = columns(shares)
    d_logits = shares * d_normalizer[..., None]
    d_logits = d_logits + jnp.where(column == target[..., None], d_target[..., None], 0.0)
    d_logits = d_logits.astype(hidden.dtype)
    d_chunk = jnp.einsum("gcv,vd->gcd", d_logits, table, preferred_element_type=sum_dtype(hidden))
    d_hidden = jax.lax.dynamic_update_index_in_dim(d_hidden, d_chunk.astype(hidden.dtype), j, 2)
    return (d_hidden, table_sum.add(d_table, d_logits, chunk)), None

  table_sum = TableSum.here()
  start = (jnp.zeros_like(hidden), table_sum.zeros(hidden, table))
  of_chunks = (jnp.arange(hidden.shape[2]), kept[0] if kept else None)
  (d_hidden, d_table), _ = jax.lax.scan(read, start, of_chunks)
  if rows[0] is not None:
    d_hidden = jax.lax.psum(d_hidden, rows[0])
  return d_hidden, over_batch(readout, rows, table_sum.total(d_table))


def over_batch(readout: ChunkedReadout, rows: PartitionSpec, d_table: Float[Array, "V D"]) -> Float[Array, "V D"]:
  """Returns the sum of dU over the parts of the batch, of which each device keeps its part."""
  axes = () if readout.mesh is None else mesh_axes("batch", readout.mesh)
  if rows[1] is not None:
    d_table = jax.lax.psum_scatter(d_table, rows[1], scatter_dimension=1, tiled=True)
  rest = tuple(axis for axis in axes if axis != rows[1])
  return jax.lax.psum(d_table, rest) if rest else d_table
