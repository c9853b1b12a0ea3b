"""Computes `SlotScores` from hidden states without materialising the logits.

Only three numbers are needed of the V logits of a slot: z_y of the target, z_dk of `<don't know>`, and l, the
log-sum-exp over the vocabulary. A dense computation would store f32[slots, V] twice (value and gradient). This module
instead scans over chunks of slots, each with the full vocabulary. The gradient is exact and written by hand: with
p = softmax(z) and cotangents g of (z_y, l),

    dz = g_l p + g_y onehot(y),    dh = dz U,    dU = sum over chunks of dz^T h.

The backward pass recomputes the logits of each chunk, with two exceptions. If all of them fit into one chunk of an
accelerator (`tiling.KEPT`), the forward pass keeps p. And if the unembedding is frozen, it keeps the two means that
dh = g_l (p U) + g_y U_y needs, of the size of h, and the backward pass has no matrix product.

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
    frozen: static; whether `unembedding` is not trained. Its gradient through the tokens' logits is then not computed,
      and the backward pass has no product with the unembedding.

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
  mesh = current_mesh()
  tiling = Tiling.of(hidden.shape[:-1], len(unembedding), chunk_size, shards, mesh)
  readout = _Readout(
    tokens=tokens if tokens < len(unembedding) else None,
    excluded=excluded,
    soft_cap=soft_cap,
    frozen=frozen,
    keeps_softmax=tiling.keeps_softmax(len(unembedding), mesh),
    mesh=mesh,
  )
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

  def before_cap(self, cotangent: Float[Array, "..."], target_logit: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the cotangent of the target's logit before the soft cap; 0 if the target is not a token."""
    if self.soft_cap is None:
      return cotangent
    is_token = target_logit > -jnp.inf
    return jnp.where(is_token, cotangent * (1.0 - (jnp.where(is_token, target_logit, 0.0) / self.soft_cap) ** 2), 0.0)

  def spread(
    self,
    function: Callable[..., Any],
    of_slots: Sequence[Array],
    table: Array,
    *,
    of_chunks: Array | None = None,
    results: Sequence[str],
  ) -> Any:
    """Calls `function(self, spec of the table, *of_slots, [of_chunks], table)` on each device's shards.

    The width of the unembedding, which is split over fsdp, is gathered before the call.

    Args:
      function: returns a tuple.
      of_slots: arrays [G, C, J, ...].
      table: [V, D], the unembedding.
      of_chunks: an array [J, G, C, ...].
      results: of each result of `function`, 'slots' for an array [G, C, J, ...], 'chunks' for [J, G, C, ...], or
        'table' for the gradient of the table, which is scattered once after the call, not once per chunk.
    """
    given = [*of_slots, *(() if of_chunks is None else (of_chunks,))]
    if self.mesh is None:
      return function(self, PartitionSpec(None, None), *given, table)
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
    return spread(*given, table)


def _columns(logits: Float[Array, "... V"]) -> Int[Array, "... V"]:
  return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
  readout: _Readout, hidden: Float[Array, "G C J D"], unembedding: Float[Array, "V D"], targets: Int[Array, "G C J"]
) -> tuple[Float[Array, "G C J"], Float[Array, "G C J"]]:
  """Returns (z_y, l) of every slot."""
  table = unembedding.astype(hidden.dtype)
  target_logit, log_normalizer = readout.spread(_read, (hidden, targets), table, results=("slots", "slots"))
  return target_logit, log_normalizer


def _chunked_forward(
  readout: _Readout, hidden: Array, unembedding: Array, targets: Array
) -> tuple[tuple[Array, Array], tuple[Array | None, ...]]:
  table = unembedding.astype(hidden.dtype)
  if readout.frozen:
    *outputs, mean, gap = readout.spread(_read_means, (hidden, targets), table, results=("slots",) * 4)
    return tuple(outputs), (mean, gap, outputs[0])
  read, results = (_read_and_keep, ("slots", "slots", "chunks")) if readout.keeps_softmax else (_read, ("slots",) * 2)
  target_logit, log_normalizer, *kept = readout.spread(read, (hidden, targets), table, results=results)
  outputs = target_logit, log_normalizer
  return outputs, (hidden, unembedding, targets, *outputs, *kept)


def _chunked_backward(
  readout: _Readout, residuals: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array | None, None]:
  d_target, d_normalizer = cotangents
  if readout.frozen:
    mean, gap, target_logit = residuals
    d_target = readout.before_cap(d_target, target_logit)
    dtype = _sum_dtype(mean)
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


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _first_row(rows: PartitionSpec, table: Array) -> Int[Array, ""] | int:
  """Returns the number of the first row of this device's part of the unembedding."""
  return 0 if rows[0] is None else jax.lax.axis_index(rows[0]) * len(table)


def _read(
  readout: _Readout, rows: PartitionSpec, hidden: Array, targets: Array, table: Array
) -> tuple[Float[Array, "G C J"], Float[Array, "G C J"]]:
  """Returns (z_y, l) of slots; `rows` has the mesh axes that split the unembedding."""
  target_logit, log_normalizer = _scan(readout, rows, hidden, targets, table, lambda *_: ())
  log_normalizer, target_logit = _over_parts(rows, log_normalizer, target_logit)
  return target_logit, log_normalizer


def _read_and_keep(
  readout: _Readout, rows: PartitionSpec, hidden: Array, targets: Array, table: Array
) -> tuple[Float[Array, "G C J"], Float[Array, "G C J"], Float[Array, "J G C V"]]:
  """Returns (z_y, l, p) of slots, p times the derivative of the cap; the vocabulary must not be split."""

  def softmax(chunk: Array, target: Array, shares: Array) -> tuple[Array]:
    del chunk, target
    return (shares,)

  target_logit, log_normalizer, kept = _scan(readout, rows, hidden, targets, table, softmax)
  return target_logit, log_normalizer, jnp.moveaxis(kept, 2, 0)


def _read_means(
  readout: _Readout, rows: PartitionSpec, hidden: Array, targets: Array, table: Array
) -> tuple[Float[Array, "G C J"], Float[Array, "G C J"], Float[Array, "G C J D"], Float[Array, "G C J D"]]:
  """Returns (z_y, l, mean, mean - U_y) of slots: the mean of the rows is p U, where the cap's slope multiplies p."""
  first = _first_row(rows, table)

  def means(chunk: Array, target: Array, shares: Array) -> tuple[Array, Array]:
    row = target - first
    here = (row >= 0) & (row < len(table))
    own = jnp.where(here[..., None], jnp.take(table, row, axis=0, mode="clip"), 0).astype(_sum_dtype(chunk))
    # p_y - 1 is formed before anything is rounded to bf16: it is small where the target is nearly certain.
    shares = jnp.where(_columns(shares) == row[..., None], shares - 1.0, shares).astype(table.dtype)
    gap = jnp.einsum("gcv,vd->gcd", shares, table, preferred_element_type=own.dtype)
    # The sums over parts of a vocabulary are rounded after all parts have been added.
    return (gap, own) if rows[0] is not None else (gap.astype(chunk.dtype), (gap + own).astype(chunk.dtype))

  target_logit, log_normalizer, gap, mean = _scan(readout, rows, hidden, targets, table, means)
  if rows[0] is None:
    return target_logit, log_normalizer, mean, gap
  own, of_part = mean, log_normalizer
  log_normalizer, target_logit = _over_parts(rows, log_normalizer, target_logit)
  # p over all parts is `share` times p of this part.
  log_share = (of_part - log_normalizer)[..., None]
  gap, own = jax.lax.psum((jnp.exp(log_share) * gap + jnp.expm1(log_share) * own, own), rows[0])
  return target_logit, log_normalizer, (gap + own).astype(hidden.dtype), gap.astype(hidden.dtype)


def _scan(
  readout: _Readout,
  rows: PartitionSpec,
  hidden: Array,
  targets: Array,
  table: Array,
  keep: Callable[[Array, Array, Array], tuple[Array, ...]],
) -> list[Array]:
  """Returns (z_y, l, *keep(chunk, targets, p)) of slots over this device's part of the vocabulary, [G, C, J, ...] each;
  p is multiplied by the derivative of the cap.
  """
  first = _first_row(rows, table)

  def read(_: None, j: Array) -> tuple[None, tuple[Array, ...]]:
    chunk, target = (jax.lax.dynamic_index_in_dim(x, j, 2, keepdims=False) for x in (hidden, targets))
    logits, slope, column = readout.logits(chunk, table, first)
    # A masked sum is used instead of a gather: it is fused, and each part of a split vocabulary contributes its term.
    target_logit = jnp.where(column == target[..., None], logits, 0.0).sum(-1)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    # A part of the vocabulary may consist of padding only (l = -inf).
    shares = _shares(logits, jnp.where(log_normalizer > -jnp.inf, log_normalizer, 0.0), slope)
    return None, (target_logit, log_normalizer, *keep(chunk, target, shares))

  _, outputs = jax.lax.scan(read, None, jnp.arange(hidden.shape[2]))
  return [jnp.moveaxis(x, 0, 2) for x in outputs]  # [J, G, C] -> [G, C, J]


def _shares(logits: Array, log_normalizer: Array, slope: Array | None) -> Float[Array, "... V"]:
  """Returns p times the derivative of the cap."""
  shares = jnp.exp(logits - log_normalizer[..., None])
  return shares if slope is None else shares * slope


def _over_parts(
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
  *kept_and_table: Array,
) -> tuple[Float[Array, "G C J D"], Float[Array, "V D"]]:
  """Returns (dh, dU); dU is f32. `target_cotangent` is that of the logit before the cap."""
  *kept, table = kept_and_table
  first = _first_row(rows, table)

  def read(carry: tuple[Array, Array], of_chunk: tuple[Array, Array | None]) -> tuple[tuple[Array, Array], None]:
    d_hidden, d_table = carry
    j, shares = of_chunk
    chunk, target, normalizer, d_target, d_normalizer = (
      jax.lax.dynamic_index_in_dim(x, j, 2, keepdims=False)
      for x in (hidden, targets, log_normalizer, target_cotangent, normalizer_cotangent)
    )
    if shares is None:
      logits, slope, column = readout.logits(chunk, table, first)
      shares = _shares(logits, normalizer, slope)
    else:
      column = _columns(shares)
    d_logits = shares * d_normalizer[..., None]
    d_logits = d_logits + jnp.where(column == target[..., None], d_target[..., None], 0.0)
    d_logits = d_logits.astype(hidden.dtype)
    d_chunk = jnp.einsum("gcv,vd->gcd", d_logits, table, preferred_element_type=_sum_dtype(hidden))
    d_hidden = jax.lax.dynamic_update_index_in_dim(d_hidden, d_chunk.astype(hidden.dtype), j, 2)
    return (d_hidden, table_sum.add(d_table, d_logits, chunk)), None

  table_sum = _TableSum(transposed=target_platform() == "cpu")
  start = (jnp.zeros_like(hidden), table_sum.zeros(hidden, table))
  of_chunks = (jnp.arange(hidden.shape[2]), kept[0] if kept else None)
  (d_hidden, d_table), _ = jax.lax.scan(read, start, of_chunks)
  if rows[0] is not None:
    d_hidden = jax.lax.psum(d_hidden, rows[0])
  d_table = table_sum.total(d_table)
  axes = () if readout.mesh is None else mesh_axes("batch", readout.mesh)
  if rows[1] is not None:
    d_table = jax.lax.psum_scatter(d_table, rows[1], scatter_dimension=1, tiled=True)
  rest = tuple(axis for axis in axes if axis != rows[1])
  return d_hidden, jax.lax.psum(d_table, rest) if rest else d_table
