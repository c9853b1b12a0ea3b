"""Computes `SlotScores` from hidden states without materialising the logits.

Only three numbers are needed of the V logits of a slot: z_y of the target, z_dk of `<don't know>`, and l, the
log-sum-exp over the vocabulary. A dense computation would store f32[slots, V] twice (value and gradient). This module
instead scans over chunks of slots, each with the full vocabulary, and the backward pass recomputes the logits of each
chunk. The gradient is exact and written by hand: with p = softmax(z) and cotangents g of (z_y, l),

    dz = g_l p + g_y onehot(y),    dh = dz U,    dU = sum over chunks of dz^T h.

Under a mesh of devices (`partitioning.rules`), each device processes its own slots and its own rows of the unembedding.
The logits stay on their device, and the scan does not communicate. After the scan, three numbers of every slot (the
largest logit, the sum of exponentials, z_y) and dh are reduced over the parts of the vocabulary, and dU is reduced over
the parts of the batch.

Dimensions: ... leading shape (batch, tokens), W slots, D model, V vocabulary rows, N slots flattened, G shards, C slots
of a shard in a chunk, J chunks.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from cyb_jax.partitioning.rules import constrain, current_mesh, mesh_axes, spec, target_platform
from cyb_jax.stopping import Form, SlotScores, prior_shift
from cyb_jax.tiling import Tiling

if TYPE_CHECKING:  # at run time, the core needs only jax
  from jaxtyping import Array, Float, Int


def slot_scores(
  hidden: Float[Array, "... W D"],
  unembedding: Float[Array, "V D"],
  targets: Int[Array, "..."],
  dont_know: Float[Array, "D"] | int | None,
  *,
  form: Form = "token",
  prior: float | None = None,
  soft_cap: float | None = None,
  slots: Sequence[int] | None = None,
  chunk_size: int | None = None,
  shards: int = 1,
  vocab_size: int | None = None,
  dont_know_bias: Float[Array, ""] | float = 0.0,
  frozen: bool = False,
) -> SlotScores:
  """Returns the scores of every slot: the log-probabilities of the target, of abstaining and of answering.

  Matrix products have operands of the dtype of `hidden`, to which `unembedding` is cast, and accumulate in f32.

  Args:
    hidden: [..., W, D], the hidden states after the final norm.
    unembedding: [V, D].
    targets: int[...], the target token of all W slots. A negative id, such as -100, is an ignored label: its log t is
      0, with a gradient of 0, so that every cross-entropy of it is 0. A row that is not a token has the score -inf.
    dont_know: f32[D], a separate output row for `<don't know>`; or an int, the row of `unembedding` that is
      `<don't know>` and not a token; or None for a model that cannot abstain: d = 0 (log d = -inf, log a = 0).
    form: 'token': `<don't know>` competes with the vocabulary; 'unit': it is a separate logistic unit.
    prior: psi'(dk) in (0, 1), see `stopping.prior_shift`; None means no shift.
    soft_cap: c in z <- c tanh(z / c). It applies to all logits, and in the token form also to z_dk, before any shift.
    slots: static; the indices of the slots that are computed, for instance (-1,) for the last; None means all slots.
    chunk_size: the number of slots of a shard in a chunk; None means at least 128, with 256 MiB of
      f32 logits (on a CPU 2 MiB).
    shards: the number of devices over which the first axis is split, under jit with a sharded batch. The gradient of
      the unembedding is then summed on each device and reduced once, instead of once per chunk. Under a mesh
      (`jax.set_mesh`), the number of parts of the mesh replaces this argument.
    vocab_size: the number of token rows of `unembedding`; later rows are padding with probability 0. None means V.
    dont_know_bias: a scalar in nats that is added to z_dk after the soft cap (the bias of the unit form).
    frozen: static; whether `unembedding` is not trained. Its gradient through the tokens' logits is then not computed.

  Returns:
    `SlotScores` of f32[..., len(slots)].

  Raises:
    ValueError: shapes do not match, a row or slot does not exist, or the prior is outside (0, 1).

  Example:
    >>> hidden, unembedding = jnp.zeros((2, 5, 3, 8)), jnp.zeros((10, 8))  # uniform logits: 2 rows, 5 tokens, 3 slots
    >>> scores = slot_scores(hidden, unembedding, jnp.zeros((2, 5), int), dont_know=jnp.zeros(8), prior=0.75)
    >>> print(scores.log_target.shape, f"{jnp.exp(scores.log_dont_know[0, 0, 0]):.3f}")
    (2, 5, 3) 0.750
  """
  tokens = _num_tokens(hidden, unembedding, targets, vocab_size)
  excluded = _excluded_row(dont_know, tokens)
  hidden = _chosen_slots(hidden, slots)
  readout = _Readout(tokens if tokens < len(unembedding) else None, excluded, soft_cap, frozen, current_mesh())
  tiling = Tiling.of(hidden.shape[:-1], len(unembedding), chunk_size, shards, readout.mesh)
  flat_targets = jnp.broadcast_to(targets[..., None], hidden.shape[:-1]).astype(jnp.int32)
  outputs = _chunked(readout, tiling.split(hidden), unembedding, tiling.split(flat_targets))
  target_logit, log_normalizer = (tiling.join(x) for x in outputs)
  if dont_know is None:
    never = jnp.full_like(target_logit, -jnp.inf)
    return SlotScores(target_logit - log_normalizer, never, jnp.zeros_like(never)).without_ignored(targets)
  row = cast("Array", dont_know) if excluded is None else _row(unembedding, excluded)
  dont_know_logit = _dont_know_logit(hidden, row, form, soft_cap)
  shift = prior_shift(form, prior, tokens + (excluded is None)) + dont_know_bias
  scores = SlotScores.from_readout(target_logit, dont_know_logit, log_normalizer, form=form, shift=shift)
  return scores.without_ignored(targets)


def _num_tokens(hidden: Array, unembedding: Array, targets: Array, vocab_size: int | None) -> int:
  """Checks that all shapes match; returns the number of rows of the unembedding that are tokens."""
  width, rows = hidden.shape[-1], unembedding.shape[0]
  tokens = rows if vocab_size is None else vocab_size
  if unembedding.shape[1] != width:
    raise ValueError(f"unembedding: shape {unembedding.shape}, but hidden has {width} features")
  if targets.shape != hidden.shape[:-2]:
    raise ValueError(f"targets: shape {targets.shape}, but hidden has the leading shape {hidden.shape[:-2]}")
  if not 0 < tokens <= rows:
    raise ValueError(f"vocab_size: {tokens} is not in 1..{rows}, the rows of the unembedding")
  return tokens


def _excluded_row(dont_know: object, tokens: int) -> int | None:
  """Returns the row of the unembedding that is `<don't know>`; None if `<don't know>` is not one of its rows."""
  if not isinstance(dont_know, numbers.Integral):  # includes numpy integers
    return None
  row = int(dont_know)
  if not 0 <= row < tokens:
    raise ValueError(f"dont_know: {row} is not a row of the vocabulary; give 0 to {tokens - 1}")
  return row


def _chosen_slots(hidden: Float[Array, "... W D"], slots: Sequence[int] | None) -> Float[Array, "... w D"]:
  if slots is None:
    return hidden
  num_slots = hidden.shape[-2]
  if not slots or not all(-num_slots <= slot < num_slots for slot in slots):
    raise ValueError(f"slots: {tuple(slots)} must be a nonempty list of indices of {num_slots} slots")
  return jnp.stack([hidden[..., slot, :] for slot in slots], -2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
  """Scores of every token at a slot, for decoding.

  Attributes:
    log_probs: f32[..., V], log-probabilities of all tokens, given that the slot answers; the probabilities sum to one.
    log_dont_know: f32[...], log d.
    log_answer: f32[...], log(1 - d).
  """

  log_probs: Float[Array, "... V"]
  log_dont_know: Float[Array, "..."]
  log_answer: Float[Array, "..."]


def token_scores(
  hidden: Float[Array, "... D"],
  unembedding: Float[Array, "V D"],
  dont_know: Float[Array, "D"] | None,
  *,
  form: Form = "token",
  prior: float | None = None,
  soft_cap: float | None = None,
  vocab_size: int | None = None,
  dont_know_bias: Float[Array, ""] | float = 0.0,
) -> TokenScores:
  """Returns dense scores of every token, with jax's automatic gradient; see `slot_scores` for the arguments.

  `log_probs` has `vocab_size` columns, without the padding rows of the unembedding. `dont_know` is a separate row, or
  None for a model that cannot abstain.

  Example:
    >>> scores = token_scores(jnp.zeros((2, 8)), jnp.zeros((16, 8)), dont_know=None, vocab_size=10)
    >>> print(scores.log_probs.shape, f"{jnp.exp(scores.log_probs[0, 0]):.3f}")
    (2, 10) 0.100
  """
  tokens = unembedding.shape[0] if vocab_size is None else vocab_size
  table = constrain(unembedding.astype(hidden.dtype), "vocab", None)
  logits = _cap(jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=_sum_dtype(hidden)), soft_cap)
  if tokens < len(unembedding):
    # A slice of the rows would be copied, and moved between devices under a mesh, so the rows are masked instead.
    logits = jnp.where(_columns(logits) < tokens, logits, -jnp.inf)
  logits = constrain(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")
  log_normalizer = jax.nn.logsumexp(logits, -1)
  log_probs = (logits - log_normalizer[..., None])[..., :tokens]
  if dont_know is None:
    zeros = jnp.zeros_like(log_normalizer)
    return TokenScores(log_probs, zeros - jnp.inf, zeros)
  scores = SlotScores.from_readout(
    log_normalizer,
    _dont_know_logit(hidden, dont_know, form, soft_cap),
    log_normalizer,
    form=form,
    shift=prior_shift(form, prior, tokens + 1) + dont_know_bias,
  )
  return TokenScores(log_probs, scores.log_dont_know, scores.log_answer)


def _dont_know_logit(
  hidden: Float[Array, "... D"], row: Float[Array, "D"], form: Form, soft_cap: float | None
) -> Float[Array, "..."]:
  """Returns z_dk; in the token form, the soft cap is applied."""
  # A sum of products in f32 is used instead of a matrix product: no operand is rounded to bf16 or TF32, and the
  # gradient of the row, a sum over all slots, is also accumulated in f32.
  dtype = _sum_dtype(hidden)
  logit = (hidden.astype(dtype) * row.astype(dtype)).sum(-1)
  return _cap(logit, soft_cap) if form == "token" else logit


def _cap(logits: Array, soft_cap: float | None) -> Array:
  return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _row(unembedding: Float[Array, "V D"], index: int) -> Float[Array, "D"]:
  if current_mesh() is None:
    return unembedding[index]
  # Indexing a table that is split over devices would gather the entire table; this sum reduces one row.
  number = jax.lax.broadcasted_iota(jnp.int32, unembedding.shape, 0)
  return jnp.where(number == index, unembedding, 0).sum(0)


def _sum_dtype(hidden: Array) -> jnp.dtype:
  """Returns f32, or f64 in tests that use the 64-bit mode of jax."""
  return jnp.promote_types(hidden.dtype, jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Readout:
  """The static part of a readout.

  Attributes:
    tokens: the number of rows before the padding; None if there is no padding.
    excluded: a row that is not a token; None if there is no such row.
    soft_cap, frozen: see `slot_scores`.
    mesh: the mesh over which the readout is sharded, or None.
  """

  tokens: int | None
  excluded: int | None
  soft_cap: float | None
  frozen: bool
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
    logits = jnp.einsum("gcd,vd->gcv", chunk, table, preferred_element_type=_sum_dtype(chunk))
    slope = None
    if self.soft_cap is not None:
      tanh = jnp.tanh(logits / self.soft_cap)
      logits, slope = self.soft_cap * tanh, 1.0 - tanh**2
    column = first + _columns(logits)
    if self.tokens is not None:
      logits = jnp.where(column < self.tokens, logits, -jnp.inf)
    if self.excluded is not None:
      logits = jnp.where(column != self.excluded, logits, -jnp.inf)
    return logits, slope, column

  def spread(self, function: Callable[..., Any], of_slots: Sequence[Array], table: Array, *, gives_table: bool) -> Any:
    """Calls `function(self, spec of the table, *of_slots, table)` on the shards of each device, or without a mesh.

    The width of the unembedding, which is split over fsdp, is gathered before the call. With `gives_table`, the second
    result of `function` is the gradient of the table, which is scattered once after the call, not once per chunk.
    """
    if self.mesh is None:
      return function(self, PartitionSpec(None, None), *of_slots, table)
    slots, rows = spec(of_slots[0].shape, ("batch",), self.mesh), spec(table.shape, ("vocab", "embed"), self.mesh)
    spread = jax.shard_map(
      functools.partial(function, self, rows),
      in_specs=(*(slots,) * len(of_slots), PartitionSpec(rows[0], None)),
      out_specs=(slots, rows if gives_table else slots),
      check_vma=False,
    )
    return spread(*of_slots, table)


def _columns(logits: Float[Array, "... V"]) -> Int[Array, "... V"]:
  return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
  readout: _Readout, hidden: Float[Array, "G C J D"], unembedding: Float[Array, "V D"], targets: Int[Array, "G C J"]
) -> tuple[Float[Array, "G C J"], Float[Array, "G C J"]]:
  """Returns (z_y, l) of every slot."""
  return _chunked_forward(readout, hidden, unembedding, targets)[0]


def _chunked_forward(
  readout: _Readout, hidden: Array, unembedding: Array, targets: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array, Array]]:
  table = unembedding.astype(hidden.dtype)
  outputs = readout.spread(_read, (hidden, targets), table, gives_table=False)
  return outputs, (hidden, unembedding, targets, outputs[1])


def _chunked_backward(
  readout: _Readout, residuals: tuple[Array, Array, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array | None, None]:
  hidden, unembedding, targets, log_normalizer = residuals
  # The cast is inside the custom gradient, so the gradient of an f32 unembedding is accumulated and returned in f32
  # even if activations are bf16.
  table = unembedding.astype(hidden.dtype)
  of_slots = (hidden, targets, log_normalizer, *cotangents)
  d_hidden, d_unembedding = readout.spread(_read_backward, of_slots, table, gives_table=True)
  return d_hidden, None if d_unembedding is None else d_unembedding.astype(unembedding.dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _first_row(rows: PartitionSpec, table: Array) -> Int[Array, ""] | int:
  """Returns the number of the first row of this device's part of the unembedding."""
  return 0 if rows[0] is None else jax.lax.axis_index(rows[0]) * len(table)


def _read(
  readout: _Readout, rows: PartitionSpec, hidden: Array, targets: Array, table: Array
) -> tuple[Float[Array, "G C J"], Float[Array, "G C J"]]:
  """Returns (z_y, l) of slots; `rows` has the mesh axes that split the unembedding."""
  first = _first_row(rows, table)

  def read(_: None, j: Array) -> tuple[None, tuple[Array, Array]]:
    chunk, target = (jax.lax.dynamic_index_in_dim(x, j, 2, keepdims=False) for x in (hidden, targets))
    logits, _slope, column = readout.logits(chunk, table, first)
    # A masked sum is used instead of a gather: it is fused, and each part of a split vocabulary contributes its term.
    target_logit = jnp.where(column == target[..., None], logits, 0.0).sum(-1)
    return None, (target_logit, jax.nn.logsumexp(logits, axis=-1))

  _, outputs = jax.lax.scan(read, None, jnp.arange(hidden.shape[2]))
  target_logit, log_normalizer = (jnp.moveaxis(x, 0, 2) for x in outputs)  # [J, G, C] -> [G, C, J]
  if rows[0] is not None:
    # A part of the vocabulary may consist of padding only (l = -inf), but not all parts do.
    largest = jax.lax.pmax(log_normalizer, rows[0])
    total, target_logit = jax.lax.psum((jnp.exp(log_normalizer - largest), target_logit), rows[0])
    log_normalizer = largest + jnp.log(total)
  return target_logit, log_normalizer


@dataclasses.dataclass(frozen=True)
class _TableSum:
  """The sum of dz^T h over chunks, for each shard.

  Attributes:
    transposed: whether the sum is [G, D, V]. XLA's CPU compiler is slow at products that contract the rows of both
      operands, so the small operand is transposed in memory first.
  """

  transposed: bool

  def zeros(self, hidden: Float[Array, "G C J D"], table: Float[Array, "V D"]) -> Array:
    shape = table.shape[::-1] if self.transposed else table.shape
    return jnp.zeros((len(hidden), *shape), _sum_dtype(hidden))

  def add(self, total: Array, d_logits: Float[Array, "G C V"], chunk: Float[Array, "G C D"]) -> Array:
    if not self.transposed:
      return total + jnp.einsum("gcv,gcd->gvd", d_logits, chunk, preferred_element_type=total.dtype)
    # The barrier keeps XLA from merging the transposition with the product.
    columns = jax.lax.optimization_barrier(chunk.swapaxes(1, 2))
    return total + jnp.einsum("gdc,gcv->gdv", columns, d_logits, preferred_element_type=total.dtype)

  def total(self, total: Array) -> Float[Array, "V D"]:
    return total.sum(0).T if self.transposed else total.sum(0)


def _read_backward(
  readout: _Readout,
  rows: PartitionSpec,
  hidden: Array,
  targets: Array,
  log_normalizer: Array,
  target_cotangent: Array,
  normalizer_cotangent: Array,
  table: Array,
) -> tuple[Float[Array, "G C J D"], Float[Array, "V D"] | None]:
  """Returns (dh, dU); dU is f32, or None if the unembedding is frozen."""
  first = _first_row(rows, table)

  def read(carry: tuple[Array, Array | None], j: Array) -> tuple[tuple[Array, Array | None], None]:
    d_hidden, d_table = carry
    chunk, target, normalizer, d_target, d_normalizer = (
      jax.lax.dynamic_index_in_dim(x, j, 2, keepdims=False)
      for x in (hidden, targets, log_normalizer, target_cotangent, normalizer_cotangent)
    )
    logits, slope, column = readout.logits(chunk, table, first)
    d_logits = jnp.exp(logits - normalizer[..., None]) * d_normalizer[..., None]
    d_logits = d_logits + jnp.where(column == target[..., None], d_target[..., None], 0.0)
    if slope is not None:
      d_logits = d_logits * slope
    d_logits = d_logits.astype(hidden.dtype)
    d_chunk = jnp.einsum("gcv,vd->gcd", d_logits, table, preferred_element_type=_sum_dtype(hidden))
    d_hidden = jax.lax.dynamic_update_index_in_dim(d_hidden, d_chunk.astype(hidden.dtype), j, 2)
    if d_table is not None:
      d_table = table_sum.add(d_table, d_logits, chunk)
    return (d_hidden, d_table), None

  table_sum = _TableSum(transposed=target_platform() == "cpu")
  sums = None if readout.frozen else table_sum.zeros(hidden, table)
  (d_hidden, d_table), _ = jax.lax.scan(read, (jnp.zeros_like(hidden), sums), jnp.arange(hidden.shape[2]))
  if rows[0] is not None:
    d_hidden = jax.lax.psum(d_hidden, rows[0])
  if d_table is None:
    return d_hidden, None
  d_table = table_sum.total(d_table)
  axes = () if readout.mesh is None else mesh_axes("batch", readout.mesh)
  if rows[1] is not None:
    d_table = jax.lax.psum_scatter(d_table, rows[1], scatter_dimension=1, tiled=True)
  rest = tuple(axis for axis in axes if axis != rows[1])
  return d_hidden, jax.lax.psum(d_table, rest) if rest else d_table
