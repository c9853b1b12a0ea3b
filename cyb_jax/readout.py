"""From hidden states to `SlotScores` without ever holding the logits.

Of the V logits of a slot three numbers are needed: the target's z_y, that of `<don't know>` z_dk, and the log-sum-exp
l over the vocabulary. The dense way keeps f32[slots, V] twice (value and gradient); here a scan walks over chunks of
slots, each with the full vocabulary, and the backward pass makes each chunk's logits again. The gradient is exact,
written by hand: with p = softmax(z) and cotangents g of (z_y, l),

    dz = g_l p + g_y onehot(y),    dh = dz U,    dU = sum over chunks of dz^T h.

This file needs jax and `stopping` alone.

Dimensions: ... leading shape (batch, tokens), W slots, D model, V vocabulary rows, N slots flattened, G shards, C slots
of a shard in a chunk, J chunks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

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
      gradient is then summed on each part by itself and reduced once, not once a chunk.
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
  row = unembedding[dont_know] if excluded is not None else dont_know
  dont_know_logit = _dont_know_logit(hidden, row, form, soft_cap)
  shift = prior_shift(form, prior, real + (excluded is None)) + dont_know_bias
  return SlotScores.from_readout(target_logit, dont_know_logit, log_normalizer, form=form, shift=shift)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WordScores:
  """What a slot says of every word, for decoding.

  Attributes:
    log_words: f32[..., V], the log-probability of every word, given that the slot answers; sums to one over V.
    log_dont_know: f32[...], log d.
    log_answer: f32[...], log(1 - d).
  """

  log_words: Float[Array, "... V"]
  log_dont_know: Float[Array, "..."]
  log_answer: Float[Array, "..."]


def word_scores(
  hidden: Float[Array, "... D"],
  unembedding: Float[Array, "V D"],
  dont_know: Float[Array, "D"] | None,
  *,
  form: Form = "token",
  prior: float | None = None,
  soft_cap: float | None = None,
  vocab_size: int | None = None,
  dont_know_bias: Float[Array, ""] | float = 0.0,
) -> WordScores:
  """`slot_scores` for all words at once, dense and without a gradient of its own; arguments as there.

  `log_words` has `vocab_size` columns: rows of the unembedding that only pad are no words. `dont_know` is a row of its
  own, or None for a model that can't abstain.
  """
  real = unembedding.shape[0] if vocab_size is None else vocab_size
  words = unembedding[:real].astype(hidden.dtype)
  logits = _cap(jnp.einsum("...d,vd->...v", hidden, words, preferred_element_type=_sum_dtype(hidden)), soft_cap)
  log_normalizer = jax.nn.logsumexp(logits, -1)
  log_words = logits - log_normalizer[..., None]
  if dont_know is None:
    zeros = jnp.zeros_like(log_normalizer)
    return WordScores(log_words, zeros - jnp.inf, zeros)
  scores = SlotScores.from_readout(
    log_normalizer,
    _dont_know_logit(hidden, dont_know, form, soft_cap),
    log_normalizer,
    form=form,
    shift=prior_shift(form, prior, real + 1) + dont_know_bias,
  )
  return WordScores(log_words, scores.log_dont_know, scores.log_answer)


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
  of_a_shard = max(1, -(-count // shards))
  chunk_size = min(chunk_size, of_a_shard)
  chunks = -(-of_a_shard // chunk_size)
  padding = shards * chunk_size * chunks - count
  hidden = hidden.reshape(count, hidden.shape[-1])
  targets = targets.reshape(count)
  if padding:
    # Rows are padded, tiles are not shrunk: a last chunk of another size would be a second, slower program.
    hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    targets = jnp.pad(targets, (0, padding))
  # [G, C, J]: the batch axis stays the major one, so that every device works on its own rows of every chunk and no row
  # changes its device.
  hidden = hidden.reshape(shards, chunk_size, chunks, -1)
  targets = targets.reshape(shards, chunk_size, chunks)
  target_logit, log_normalizer = _chunked(real, excluded, soft_cap, frozen, hidden, unembedding, targets)
  return (
    target_logit.reshape(-1)[:count].reshape(shape),
    log_normalizer.reshape(-1)[:count].reshape(shape),
  )


def _sum_dtype(hidden: Array) -> jnp.dtype:
  """f32, or f64 where jax's 64-bit mode is used to check this file."""
  return jnp.promote_types(hidden.dtype, jnp.float32)


def _logits(
  chunk: Float[Array, "G C D"],
  unembedding: Float[Array, "V D"],
  real: int,
  excluded: int | None,
  soft_cap: float | None,
) -> tuple[Float[Array, "G C V"], Float[Array, "G C V"] | None]:
  """Capped logits with -inf in columns that are no words, and the cap's derivative."""
  logits = jnp.einsum("gcd,vd->gcv", chunk, unembedding, preferred_element_type=_sum_dtype(chunk))
  slope = None
  if soft_cap is not None:
    tanh = jnp.tanh(logits / soft_cap)
    logits, slope = soft_cap * tanh, 1.0 - tanh**2
  if real < unembedding.shape[0] or excluded is not None:
    column = _columns(logits)
    word = column < real
    if excluded is not None:
      word &= column != excluded
    logits = jnp.where(word, logits, -jnp.inf)
  return logits, slope


def _columns(logits: Float[Array, "G C V"]) -> Int[Array, "G C V"]:
  return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _chunked(real, excluded, soft_cap, frozen, hidden, unembedding, targets):
  return _chunked_forward(real, excluded, soft_cap, frozen, hidden, unembedding, targets)[0]


def _chunked_forward(real, excluded, soft_cap, frozen, hidden, unembedding, targets):
  del frozen
  words = unembedding.astype(hidden.dtype)

  def read(_, j):
    chunk, target = (jax.lax.dynamic_index_in_dim(x, j, 2, keepdims=False) for x in (hidden, targets))
    logits, _slope = _logits(chunk, words, real, excluded, soft_cap)
    # A masked sum rather than a gather: it fuses, and it stays local where the vocabulary is sharded.
    target_logit = jnp.where(_columns(logits) == target[..., None], logits, 0.0).sum(-1)
    return None, (target_logit, jax.nn.logsumexp(logits, axis=-1))

  _, outputs = jax.lax.scan(read, None, jnp.arange(hidden.shape[2]))
  target_logit, log_normalizer = (jnp.moveaxis(x, 0, 2) for x in outputs)  # [J, G, C] -> [G, C, J]
  return (target_logit, log_normalizer), (hidden, unembedding, targets, log_normalizer)


def _chunked_backward(real, excluded, soft_cap, frozen, residuals, cotangents):
  hidden, unembedding, targets, log_normalizer = residuals
  target_cotangent, normalizer_cotangent = cotangents
  # The cast is inside, so that the gradient of an f32 unembedding is summed and returned in f32 under bf16 activations.
  words = unembedding.astype(hidden.dtype)

  def read(carry, j):
    d_hidden, d_unembedding = carry
    chunk, target, normalizer, d_target, d_normalizer = (
      jax.lax.dynamic_index_in_dim(x, j, 2, keepdims=False)
      for x in (hidden, targets, log_normalizer, target_cotangent, normalizer_cotangent)
    )
    logits, slope = _logits(chunk, words, real, excluded, soft_cap)
    d_logits = jnp.exp(logits - normalizer[..., None]) * d_normalizer[..., None]
    d_logits = d_logits + jnp.where(_columns(logits) == target[..., None], d_target[..., None], 0.0)
    if slope is not None:
      d_logits = d_logits * slope
    d_logits = d_logits.astype(hidden.dtype)
    d_chunk = jnp.einsum("gcv,vd->gcd", d_logits, words, preferred_element_type=_sum_dtype(hidden))
    d_hidden = jax.lax.dynamic_update_index_in_dim(d_hidden, d_chunk.astype(hidden.dtype), j, 2)
    if not frozen:
      d_unembedding += jnp.einsum("gcv,gcd->gvd", d_logits, chunk, preferred_element_type=d_unembedding.dtype)
    return (d_hidden, d_unembedding), None

  sums = None if frozen else jnp.zeros((hidden.shape[0], *unembedding.shape), _sum_dtype(hidden))
  (d_hidden, d_unembedding), _ = jax.lax.scan(read, (jnp.zeros_like(hidden), sums), jnp.arange(hidden.shape[2]))
  return d_hidden, None if frozen else d_unembedding.sum(0).astype(unembedding.dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward)
