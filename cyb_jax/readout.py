"""From hidden states to `SlotScores` without ever holding the logits.

Of the V logits of a slot three numbers are needed: the target's z_y, that of `<don't know>` z_dk, and the log-sum-exp
l over the vocabulary. The dense way keeps f32[slots, V] twice (value and gradient); here a scan walks over chunks of
slots, each with the full vocabulary, and the backward pass makes each chunk's logits again. The gradient is exact,
written by hand: with p = softmax(z) and cotangents g of (z_y, l),

    dz = g_l p + g_y onehot(y),    dh = dz U,    dU = sum over chunks of dz^T h.

Traced under a mesh of devices (`placement`), each works on its own slots and its own rows of the unembedding. Logits
never leave their device, and the loop over chunks sends nothing: behind it, of every slot, the largest logit, the sum
of exponentials and z_y are reduced over the vocabulary's parts, and so is dh; dU, over the batch's.

This file needs jax, `stopping` and `placement` alone.

Dimensions: ... leading shape (batch, tokens), W slots, D model, V vocabulary rows, N slots flattened, G shards, C slots
of a shard in a chunk, J chunks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from cyb_jax.partitioning.rules import constrain, current_mesh, mesh_axes, parts, spec
from cyb_jax.stopping import Form, SlotScores, prior_shift

if TYPE_CHECKING:  # annotations alone: these files need jax and nothing else
  from jaxtyping import Array, Float, Int

# f32 logits of one chunk: large enough for full matrix tiles, small enough that a few copies of it fit anywhere.
_CHUNK_BYTES = 256 * 2**20


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
  """What every slot says of its token's target, and whether it abstains.

  Matrix products run in the dtype of `hidden` (to which `unembedding` is cast) and are summed in f32.

  Args:
    hidden: [..., W, D], after the final norm.
    unembedding: [V, D].
    targets: int[...], the id that all W slots of a token must say. An id that is no row (an ignored label such as -100)
      gives a finite number without meaning, so that a weight of 0 takes it out; a row that is no word gives -inf.
    dont_know: f32[D], an output row of its own for `<don't know>`; or an int, a row of `unembedding`, which then is no
      word; or None for a model that can't abstain: d = 0 exactly (log d = -inf, log a = 0).
    form: 'token': `<don't know>` competes with the vocabulary; 'unit': a logistic unit of its own.
    prior: psi'(dk) in (0, 1), see `stopping.prior_shift`; None: no shift.
    soft_cap: c in z <- c tanh(z / c), applied to all logits, to `<don't know>` in token form too, before any shift.
    slots: static; which of the W slots to compute, e.g. (-1,) for the last one. The others cost nothing. None: all.
    chunk_size: slots worked on at once, per shard; None: as many as make 256 MiB of f32 logits.
    shards: into how many parts the first axis is split over devices, under jit with a sharded batch. The unembedding's
      gradient is then summed on each part by itself and reduced once, not once a chunk. Under a mesh (`jax.set_mesh`)
      there are as many as that has, whatever is said here.
    vocab_size: rows of `unembedding` that are real; those after it only pad and get no probability. None: all V.
    dont_know_bias: a scalar added to z_dk after the soft cap, nats (the unit form's bias).
    frozen: static; `unembedding` isn't trained: words give it no gradient, and none is computed.

  Returns:
    `SlotScores` of f32[..., len(slots)].

  Raises:
    ValueError: on shapes that don't fit, a row or slot that doesn't exist, a prior outside (0, 1).
  """
  num_slots, width = hidden.shape[-2:]
  rows = unembedding.shape[0]
  real = rows if vocab_size is None else vocab_size
  if unembedding.shape[1] != width:
    raise ValueError(f"unembedding: shape {unembedding.shape}, but hidden has {width} features")
  if targets.shape != hidden.shape[:-2]:
    raise ValueError(f"targets: shape {targets.shape}, but hidden has the leading shape {hidden.shape[:-2]}")
  if not 0 < real <= rows:
    raise ValueError(f"vocab_size: {real} is not in 1..{rows}, the rows of the unembedding")
  excluded = None
  if isinstance(dont_know, numbers.Integral):  # numpy's integers too
    dont_know = int(dont_know)
    if not 0 <= dont_know < real:
      raise ValueError(f"dont_know: {dont_know} is not a row of a vocabulary of {real}")
    excluded = dont_know
  if slots is not None:
    if not slots or not all(-num_slots <= slot < num_slots for slot in slots):
      raise ValueError(f"slots: {tuple(slots)} must name some of {num_slots} slots")
    hidden = jnp.stack([hidden[..., slot, :] for slot in slots], -2)
  flat_targets = jnp.broadcast_to(targets[..., None], hidden.shape[:-1]).astype(jnp.int32)
  target_logit, log_normalizer = _word_readout(
    hidden, unembedding, flat_targets, real, excluded, soft_cap, chunk_size, shards, frozen
  )
  if dont_know is None:
    return SlotScores(
      log_target=target_logit - log_normalizer,
      log_dont_know=jnp.full_like(target_logit, -jnp.inf),
      log_answer=jnp.zeros_like(target_logit),
    )
  row = _row(unembedding, dont_know) if excluded is not None else dont_know
  dont_know_logit = _dont_know_logit(hidden, row, form, soft_cap)
  shift = prior_shift(form, prior, real + (excluded is None)) + dont_know_bias
  return SlotScores.from_readout(target_logit, dont_know_logit, log_normalizer, form=form, shift=shift)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
  """What a slot says of every word, for decoding.

  Attributes:
    log_probs: f32[..., V], the log-probability of every word, given that the slot answers; sums to one over V.
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
  """`slot_scores` for all words at once, dense and without a gradient of its own; arguments as there.

  `log_probs` has `vocab_size` columns: rows of the unembedding that only pad are no words. `dont_know` is a row of its
  own, or None for a model that can't abstain.
  """
  real = unembedding.shape[0] if vocab_size is None else vocab_size
  words = constrain(unembedding.astype(hidden.dtype), "vocab", None)
  logits = _cap(jnp.einsum("...d,vd->...v", hidden, words, preferred_element_type=_sum_dtype(hidden)), soft_cap)
  if real < len(unembedding):
    # Masked rather than cut off: a part of the rows would have to be copied, and those of a mesh to be moved.
    logits = jnp.where(_columns(logits) < real, logits, -jnp.inf)
  logits = constrain(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")
  log_normalizer = jax.nn.logsumexp(logits, -1)
  log_probs = (logits - log_normalizer[..., None])[..., :real]
  if dont_know is None:
    zeros = jnp.zeros_like(log_normalizer)
    return TokenScores(log_probs, zeros - jnp.inf, zeros)
  scores = SlotScores.from_readout(
    log_normalizer,
    _dont_know_logit(hidden, dont_know, form, soft_cap),
    log_normalizer,
    form=form,
    shift=prior_shift(form, prior, real + 1) + dont_know_bias,
  )
  return TokenScores(log_probs, scores.log_dont_know, scores.log_answer)


def _dont_know_logit(
  hidden: Float[Array, "... D"], row: Float[Array, "D"], form: Form, soft_cap: float | None
) -> Float[Array, "..."]:
  # A sum of products in f32 rather than a matrix product: the row's gradient, over all slots, is summed in f32 too, and
  # nothing is rounded to bf16 or TF32 on the way to d.
  dtype = _sum_dtype(hidden)
  logit = (hidden.astype(dtype) * row.astype(dtype)).sum(-1)
  return _cap(logit, soft_cap) if form == "token" else logit


def _cap(logits: Array, soft_cap: float | None) -> Array:
  return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _word_readout(
  hidden: Float[Array, "... D"],
  unembedding: Float[Array, "V D"],
  targets: Int[Array, "..."],
  real: int,
  excluded: int | None,
  soft_cap: float | None,
  chunk_size: int | None,
  shards: int,
  frozen: bool,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
  """(z_y, l) of every slot: flattens, pads to whole chunks, and undoes both."""
  shape = hidden.shape[:-1]
  count = math.prod(shape)
  if chunk_size is None:
    chunk_size = max(128, 2 ** int(math.log2(_CHUNK_BYTES / 4 / unembedding.shape[0])))
  elif chunk_size < 1:
    raise ValueError(f"chunk_size: {chunk_size} must be positive")
  if shards < 1:
    raise ValueError(f"shards: {shards} must be positive")
  mesh = current_mesh()
  if mesh is not None:
    shards = parts("batch", mesh)
  of_a_shard = max(1, -(-count // shards))
  chunk_size = min(chunk_size, of_a_shard)
  chunks = -(-of_a_shard // chunk_size)

  def split(x: Array) -> Array:
    # Rows are padded, tiles are not shrunk: a last chunk of another size would be a second, slower program. Each shard
    # has padding of its own, so that no row changes its device.
    rest = x.shape[1:]
    x = _padded(x, shards * of_a_shard).reshape(shards, of_a_shard, *rest)
    x = jnp.moveaxis(_padded(jnp.moveaxis(x, 1, 0), chunk_size * chunks), 0, 1)
    return x.reshape(shards, chunk_size, chunks, *rest)

  def join(x: Array) -> Array:
    return x.reshape(shards, -1)[:, :of_a_shard].reshape(-1)[:count].reshape(shape)

  hidden, targets = split(hidden.reshape(count, -1)), split(targets.reshape(count))
  how = _How(real if real < len(unembedding) else None, excluded, soft_cap, frozen, mesh)
  target_logit, log_normalizer = _chunked(how, hidden, unembedding, targets)
  return join(target_logit), join(log_normalizer)


def _padded(x: Array, length: int) -> Array:
  """With zeros behind its rows, so that there are so many."""
  return x if len(x) == length else jnp.pad(x, ((0, length - len(x)),) + ((0, 0),) * (x.ndim - 1))


def _row(unembedding: Float[Array, "V D"], index: int) -> Float[Array, "D"]:
  if current_mesh() is None:
    return unembedding[index]
  # Of a table in parts, taking a row out would gather all of it; a sum reduces one row.
  number = jax.lax.broadcasted_iota(jnp.int32, unembedding.shape, 0)
  return jnp.where(number == index, unembedding, 0).sum(0)


def _sum_dtype(hidden: Array) -> jnp.dtype:
  """f32, or f64 where jax's 64-bit mode is used to check this file."""
  return jnp.promote_types(hidden.dtype, jnp.float32)


@dataclasses.dataclass(frozen=True)
class _How:
  """What of a readout is static.

  Attributes:
    real: rows from here on are no words; None: all are.
    excluded: a row that is no word.
    soft_cap, frozen: see `slot_scores`.
    mesh: over which the readout is spread; None: over none.
  """

  real: int | None
  excluded: int | None
  soft_cap: float | None
  frozen: bool
  mesh: AbstractMesh | None


def _logits(
  how: _How, chunk: Float[Array, "G C D"], words: Float[Array, "V D"], first: Int[Array, ""] | int
) -> tuple[Float[Array, "G C V"], Float[Array, "G C V"] | None, Int[Array, "G C V"]]:
  """Capped logits with -inf in columns that are no words, the cap's derivative, and the columns' numbers.

  Args:
    how: see there.
    chunk: some slots.
    words: rows of the unembedding.
    first: the number of the first of them.
  """
  logits = jnp.einsum("gcd,vd->gcv", chunk, words, preferred_element_type=_sum_dtype(chunk))
  slope = None
  if how.soft_cap is not None:
    tanh = jnp.tanh(logits / how.soft_cap)
    logits, slope = how.soft_cap * tanh, 1.0 - tanh**2
  column = first + _columns(logits)
  if how.real is not None:
    logits = jnp.where(column < how.real, logits, -jnp.inf)
  if how.excluded is not None:
    logits = jnp.where(column != how.excluded, logits, -jnp.inf)
  return logits, slope, column


def _columns(logits: Float[Array, "... V"]) -> Int[Array, "... V"]:
  return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(how, hidden, unembedding, targets):
  return _chunked_forward(how, hidden, unembedding, targets)[0]


def _chunked_forward(how, hidden, unembedding, targets):
  words = unembedding.astype(hidden.dtype)
  outputs = _spread(how, _read, (hidden, targets), words, gives_table=False)
  return outputs, (hidden, unembedding, targets, outputs[1])


def _chunked_backward(how, residuals, cotangents):
  hidden, unembedding, targets, log_normalizer = residuals
  # The cast is here, so that the gradient of an f32 unembedding is summed and returned in f32 under bf16 activations.
  words = unembedding.astype(hidden.dtype)
  of_slots = (hidden, targets, log_normalizer, *cotangents)
  d_hidden, d_unembedding = _spread(how, _read_backward, of_slots, words, gives_table=True)
  return d_hidden, None if d_unembedding is None else d_unembedding.astype(unembedding.dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _spread(how: _How, function: Callable, of_slots: Sequence[Array], words: Array, *, gives_table: bool) -> Any:
  """`function` of what each device has: all of it where there is no mesh.

  The unembedding's width, which lies over fsdp, is gathered for it, and what it gives of it is scattered again: once,
  not once a chunk.
  """
  if how.mesh is None:
    return function(how, PartitionSpec(None, None), *of_slots, words)
  slots, table = spec(of_slots[0].shape, ("batch",), how.mesh), spec(words.shape, ("vocab", "embed"), how.mesh)
  spread = jax.shard_map(
    functools.partial(function, how, table),
    in_specs=(*(slots,) * len(of_slots), PartitionSpec(table[0], None)),
    out_specs=(slots, table if gives_table else slots),
    check_vma=False,
  )
  return spread(*of_slots, words)


def _first_row(table: PartitionSpec, words: Array) -> Int[Array, ""] | int:
  return 0 if table[0] is None else jax.lax.axis_index(table[0]) * len(words)


def _read(how, table, hidden, targets, words):
  """(z_y, l) of slots; `table`: the axes that the unembedding lies over."""
  first = _first_row(table, words)

  def read(_, j):
    chunk, target = (jax.lax.dynamic_index_in_dim(x, j, 2, keepdims=False) for x in (hidden, targets))
    logits, _slope, column = _logits(how, chunk, words, first)
    # A masked sum rather than a gather: it fuses, and of a vocabulary in parts each gives its own.
    target_logit = jnp.where(column == target[..., None], logits, 0.0).sum(-1)
    return None, (target_logit, jax.nn.logsumexp(logits, axis=-1))

  _, outputs = jax.lax.scan(read, None, jnp.arange(hidden.shape[2]))
  target_logit, log_normalizer = (jnp.moveaxis(x, 0, 2) for x in outputs)  # [J, G, C] -> [G, C, J]
  if table[0] is not None:
    # A part may have no word at all, but not all of them.
    largest = jax.lax.pmax(log_normalizer, table[0])
    total, target_logit = jax.lax.psum((jnp.exp(log_normalizer - largest), target_logit), table[0])
    log_normalizer = largest + jnp.log(total)
  return target_logit, log_normalizer


def _read_backward(how, table, hidden, targets, log_normalizer, target_cotangent, normalizer_cotangent, words):
  """(dh, dU); dU f32[V, D], None where it is frozen."""
  first = _first_row(table, words)

  def read(carry, j):
    d_hidden, d_words = carry
    chunk, target, normalizer, d_target, d_normalizer = (
      jax.lax.dynamic_index_in_dim(x, j, 2, keepdims=False)
      for x in (hidden, targets, log_normalizer, target_cotangent, normalizer_cotangent)
    )
    logits, slope, column = _logits(how, chunk, words, first)
    d_logits = jnp.exp(logits - normalizer[..., None]) * d_normalizer[..., None]
    d_logits = d_logits + jnp.where(column == target[..., None], d_target[..., None], 0.0)
    if slope is not None:
      d_logits = d_logits * slope
    d_logits = d_logits.astype(hidden.dtype)
    d_chunk = jnp.einsum("gcv,vd->gcd", d_logits, words, preferred_element_type=_sum_dtype(hidden))
    d_hidden = jax.lax.dynamic_update_index_in_dim(d_hidden, d_chunk.astype(hidden.dtype), j, 2)
    if not how.frozen:
      d_words += jnp.einsum("gcv,gcd->gvd", d_logits, chunk, preferred_element_type=d_words.dtype)
    return (d_hidden, d_words), None

  sums = None if how.frozen else jnp.zeros((hidden.shape[0], *words.shape), _sum_dtype(hidden))
  (d_hidden, d_words), _ = jax.lax.scan(read, (jnp.zeros_like(hidden), sums), jnp.arange(hidden.shape[2]))
  if table[0] is not None:
    d_hidden = jax.lax.psum(d_hidden, table[0])
  if d_words is not None:
    d_words = d_words.sum(0)
    axes = () if how.mesh is None else mesh_axes("batch", how.mesh)
    if table[1] is not None:
      d_words = jax.lax.psum_scatter(d_words, table[1], scatter_dimension=1, tiled=True)
    rest = tuple(axis for axis in axes if axis != table[1])
    if rest:
      d_words = jax.lax.psum(d_words, rest)
  return d_hidden, d_words
