"""The weighted loss of all tokens, with the gradients formed in the forward pass: three products with the unembedding.

The loss of a token depends on three numbers of each of its slots: z_y, z_dk and l. A chunk of whole tokens therefore
has all that the gradient of the weighted loss needs, while the chunk's logits exist. `chunked_readout.target_logits`
computes the logits of large readouts twice, since its backward pass learns the cotangents of z_y and l too late.

Dimensions: W slots, D model, V vocabulary rows, G shards, C tokens of a shard in a chunk, J chunks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from cyb_jax.chunked_readout import (
  ChunkedReadout,
  TableSum,
  backward,
  first_row,
  over_batch,
  over_parts,
  read_slots,
  shares_of,
)
from cyb_jax.stopping import Form, SlotScores

if TYPE_CHECKING:  # at run time, the core needs only jax
  from jaxtyping import Array, Float, Int, PyTree

TokenLoss = Callable[..., Any]
"""(`SlotScores` f32[..., W], a tree of arrays f32[..., *]) -> f32[...], nats."""

OfTokens = tuple[Any, Any]
"""z_dk, f32[..., W] or None for a model that cannot abstain, and the second argument of `TokenLoss`."""


@dataclasses.dataclass(frozen=True)
class WeightedLoss:
  """The static part of a weighted loss.

  Attributes:
    readout: the readout of z_y and l.
    token_loss: the loss of each token.
    form: see `slot_scores`.
  """

  readout: ChunkedReadout
  token_loss: TokenLoss
  form: Form

  def losses(
    self,
    target_logit: Float[Array, "... W"],
    log_normalizer: Float[Array, "... W"],
    of_tokens: OfTokens,
    targets: Int[Array, "..."],
  ) -> Float[Array, "..."]:
    """Returns the loss of each token, nats."""
    dont_know_logit, arguments = of_tokens
    scores = SlotScores.from_readout(target_logit, dont_know_logit, log_normalizer, form=self.form)
    return self.token_loss(scores.without_ignored(targets), arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_loss(
  loss: WeightedLoss,
  hidden: Float[Array, "G C J W D"],
  unembedding: Float[Array, "V D"],
  of_tokens: OfTokens,
  targets: Int[Array, "G C J"],
  weights: Float[Array, "G C J"],
) -> tuple[Float[Array, ""], Float[Array, "G C J W"], Float[Array, "G C J W"]]:
  """Returns (the sum of weight times loss, z_y, l)."""
  table = unembedding.astype(hidden.dtype)
  target_logit, log_normalizer = loss.readout.spread(_read, (hidden, targets), table, results=("slots", "slots"))
  losses = loss.losses(target_logit, log_normalizer, of_tokens, targets)
  return (weights * losses).sum(), target_logit, log_normalizer


def _forward(loss: WeightedLoss, *primals: Any) -> tuple[tuple[Array, Array, Array], PyTree]:
  hidden, unembedding, of_tokens, targets, weights = jax.tree.map(lambda x: x.value, primals)
  # The cast is inside the custom gradient, so the gradient of an f32 unembedding is accumulated and returned in f32
  # even if activations are bf16.
  table = unembedding.astype(hidden.dtype)
  target_logit, log_normalizer, d_hidden, d_table, d_of_tokens = loss.readout.spread(
    functools.partial(_read_with_gradients, loss),
    (hidden, targets, weights, of_tokens),
    table,
    results=("slots", "slots", "slots", "table", "slots"),
  )
  losses = loss.losses(target_logit, log_normalizer, of_tokens, targets)
  gradients = (d_hidden, d_table.astype(unembedding.dtype), d_of_tokens)
  outputs = (weights * losses).sum(), target_logit, log_normalizer
  return outputs, (gradients, losses, (hidden, unembedding, targets, target_logit, log_normalizer))


def _backward(loss: WeightedLoss, residuals: PyTree, cotangents: tuple[Any, Any, Any]) -> tuple[Any, ...]:
  gradients, losses, of_readout = residuals
  scale, *of_scores = cotangents
  scale = _array(scale)
  d_hidden, d_unembedding, d_of_tokens = jax.tree.map(lambda x: x * scale.astype(x.dtype), gradients)
  if not all(isinstance(x, SymbolicZero) for x in of_scores):
    # The scores are also used outside of the sum, so the logits are computed again.
    more = _backward_of_scores(loss.readout, of_readout, of_scores)
    d_hidden, d_unembedding = d_hidden + more[0], d_unembedding + more[1]
  return d_hidden, d_unembedding, d_of_tokens, None, losses * scale


def _backward_of_scores(readout: ChunkedReadout, residuals: tuple[Array, ...], cotangents: Any) -> tuple[Array, Any]:
  """Returns (dh, dU) from the cotangents of (z_y, l)."""
  hidden, unembedding, targets, *outputs = residuals
  targets = jnp.broadcast_to(targets[..., None], hidden.shape[:-1])

  def flat(x: Array) -> Array:
    """[G, C, J, W, ...] -> [G, C, J * W, ...]."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])

  residuals = (flat(hidden), unembedding, *(flat(x) for x in (targets, *outputs)))
  d_target, d_normalizer = (flat(_array(x)) for x in cotangents)
  d_hidden, d_unembedding, _ = backward(readout, residuals, (d_target, d_normalizer))
  return d_hidden.reshape(hidden.shape), d_unembedding


def _array(cotangent: Any) -> Array:
  is_zero = isinstance(cotangent, SymbolicZero)
  return jnp.zeros(cotangent.aval.shape, cotangent.aval.dtype) if is_zero else cotangent


weighted_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _read(
  readout: ChunkedReadout, rows: PartitionSpec, hidden: Array, targets: Array, table: Array
) -> tuple[Float[Array, "G C J W"], Float[Array, "G C J W"]]:
  """Returns (z_y, l) of the slots of a device's tokens."""
  first = first_row(rows, table)

  def read(_: None, j: Array) -> tuple[None, tuple[Array, Array]]:
    chunk, target = (jax.lax.dynamic_index_in_dim(x, j, 2, keepdims=False) for x in (hidden, targets))
    slots = chunk.reshape(len(chunk), -1, chunk.shape[-1])
    target_logit, log_normalizer, *_logits = read_slots(readout, slots, _of_slots(target, chunk), table, first)
    return None, (target_logit.reshape(chunk.shape[:-1]), log_normalizer.reshape(chunk.shape[:-1]))

  _, outputs = jax.lax.scan(read, None, jnp.arange(hidden.shape[2]))
  target_logit, log_normalizer = (jnp.moveaxis(x, 0, 2) for x in outputs)
  log_normalizer, target_logit = over_parts(rows, log_normalizer, target_logit)
  return target_logit, log_normalizer


def _of_slots(of_tokens: Array, chunk: Float[Array, "G C W D"]) -> Array:
  """Repeats a number of each token, [G, C], for its slots: [G, C * W]."""
  return jnp.repeat(of_tokens, chunk.shape[2], axis=1)


def _read_with_gradients(
  loss: WeightedLoss,
  readout: ChunkedReadout,
  rows: PartitionSpec,
  hidden: Array,
  targets: Array,
  weights: Array,
  of_tokens: OfTokens,
  table: Array,
) -> tuple[Array, Array, Array, Array, OfTokens]:
  """Returns z_y and l of the slots of a device's tokens, and the gradients of the weighted loss with respect to
  `hidden`, `table` (f32) and `of_tokens`.
  """
  first = first_row(rows, table)
  table_sum = TableSum.here()

  def read(carry: tuple[Array, Array], j: Array) -> tuple[tuple[Array, Array], PyTree]:
    d_hidden, d_table = carry
    chunk, target, weight, of_token = jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, j, 2, keepdims=False), (hidden, targets, weights, of_tokens)
    )
    slots = chunk.reshape(len(chunk), -1, chunk.shape[-1])
    target_of_slot = _of_slots(target, chunk)
    target_logit, log_normalizer, logits, slope, column = read_slots(readout, slots, target_of_slot, table, first)
    log_normalizer, target_logit = over_parts(rows, log_normalizer, target_logit)
    numbers = tuple(x.reshape(chunk.shape[:-1]) for x in (target_logit, log_normalizer))

    def total(numbers: tuple[Array, Array], of_token: OfTokens) -> Array:
      return (weight * loss.losses(*numbers, of_token, target)).sum()

    of_numbers, d_of_token = jax.grad(total, (0, 1))(numbers, of_token)
    d_target, d_normalizer = (x.reshape(slots.shape[:-1]) for x in of_numbers)
    d_target = readout.before_cap(d_target, target_logit)
    d_logits = shares_of(logits, log_normalizer, slope) * d_normalizer[..., None]
    d_logits = d_logits + jnp.where(column == target_of_slot[..., None], d_target[..., None], 0.0)
    d_logits = d_logits.astype(hidden.dtype)
    d_slots = jnp.einsum("gcv,vd->gcd", d_logits, table, preferred_element_type=log_normalizer.dtype)
    d_chunk = d_slots.astype(hidden.dtype).reshape(chunk.shape)
    d_hidden = jax.lax.dynamic_update_index_in_dim(d_hidden, d_chunk, j, 2)
    return (d_hidden, table_sum.add(d_table, d_logits, slots)), (*numbers, d_of_token)

  start = (jnp.zeros_like(hidden), table_sum.zeros(hidden, table))
  (d_hidden, d_table), outputs = jax.lax.scan(read, start, jnp.arange(hidden.shape[2]))
  target_logit, log_normalizer, d_of_tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), outputs)
  if rows[0] is not None:
    d_hidden = jax.lax.psum(d_hidden, rows[0])
  return target_logit, log_normalizer, d_hidden, over_batch(readout, rows, table_sum.total(d_table)), d_of_tokens
