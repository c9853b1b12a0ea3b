"""Computes `SlotScores` from hidden states without materialising the logits.

Only three numbers are needed of the V logits of a slot: z_y of the target, z_dk of `<don't know>`, and l, the
log-sum-exp over the vocabulary. A dense computation would store f32[slots, V] twice (value and gradient). This module
instead scans over chunks of slots, each with the full vocabulary. The gradient is exact and written by hand, see
`chunked_readout`.

Dimensions: ... leading shape (batch, tokens), W slots, D model, V vocabulary rows.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp

from cyb_jax import fused_readout
from cyb_jax.chunked_readout import ChunkedReadout, columns, sum_dtype, target_logits
from cyb_jax.partitioning.rules import constrain, current_mesh
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
  inputs = _inputs(
    hidden, unembedding, targets, dont_know, form=form, prior=prior, soft_cap=soft_cap, slots=slots,
    vocab_size=vocab_size, dont_know_bias=dont_know_bias, frozen=frozen,
  )  # fmt: skip
  hidden, readout = inputs.hidden, inputs.readout
  tiling = Tiling.of(hidden.shape[:-1], len(unembedding), chunk_size, shards, readout.mesh)
  readout = dataclasses.replace(readout, keeps_softmax=tiling.keeps_softmax(len(unembedding), readout.mesh))
  flat_targets = jnp.broadcast_to(targets[..., None], hidden.shape[:-1]).astype(jnp.int32)
  outputs = target_logits(readout, tiling.split(hidden), unembedding, tiling.split(flat_targets))
  return inputs.scores(tuple(tiling.join(x) for x in outputs), targets)


def weighted_loss(
  token_loss: Callable[[SlotScores, Any], Float[Array, "..."]],
  hidden: Float[Array, "... W D"],
  unembedding: Float[Array, "V D"],
  targets: Int[Array, "..."],
  dont_know: Float[Array, "D"] | int | None,
  weights: Float[Array, "..."],
  arguments: Any = (),
  *,
  chunk_size: int | None = None,
  shards: int = 1,
  frozen: bool = False,
  **options: Any,
) -> tuple[Float[Array, ""], SlotScores]:
  """Returns the sum over tokens of weight times loss, and the scores of every slot.

  The sum equals `(weights * token_loss(slot_scores(...), arguments)).sum()`. Its gradients are formed in the forward
  pass, chunk by chunk: three matrix products with the unembedding, where `slot_scores` needs four unless the softmax is
  small. The scores can be differentiated too, at the cost of three more products. Only first derivatives exist.

  Args:
    token_loss: computes the loss of each token from its scores, such as `losses.cyb`; it must treat tokens
      independently, and must not close over arrays that need a gradient.
    hidden, unembedding, targets, dont_know: see `slot_scores`.
    weights: f32[...], for instance 1 for a token that counts and 0 for padding.
    arguments: the second argument of `token_loss`: a tree of arrays f32[..., *], whose leading axes are those of
      `targets`, with anything else that the loss of a token depends on.
    chunk_size, shards, frozen, options: see `slot_scores`, which has the same options.

  Returns:
    (f32[], `SlotScores` of f32[..., len(slots)]).

  Raises:
    ValueError: see `slot_scores`; or `weights` or `arguments` do not have the shape of `targets`.

  Example:
    >>> from cyb_jax import losses
    >>> hidden, unembedding = jnp.zeros((2, 5, 3, 8)), jnp.zeros((10, 8))  # uniform logits: 2 rows, 5 tokens, 3 slots
    >>> targets, weights = jnp.zeros((2, 5), int), jnp.ones((2, 5))
    >>> total, scores = weighted_loss(lambda s, _: losses.cyb(s), hidden, unembedding, targets, jnp.zeros(8), weights)
    >>> print(f"{total / weights.sum():.3f}", scores.log_target.shape)
    2.303 (2, 5, 3)
  """
  _check_of_tokens({"weights": weights, "arguments": arguments}, targets)
  if frozen:  # the gradient of the hidden states alone needs two products
    options |= {"chunk_size": chunk_size, "shards": shards, "frozen": True}
    scores = slot_scores(hidden, unembedding, targets, dont_know, **options)
    return (weights * token_loss(scores, arguments)).sum(), scores
  inputs = _inputs(hidden, unembedding, targets, dont_know, **options)
  tiling = Tiling.of_tokens(inputs.hidden.shape[:-1], len(unembedding), chunk_size, shards, inputs.readout.mesh)
  total, *outputs = fused_readout.weighted_loss(
    fused_readout.WeightedLoss(inputs.readout, token_loss, inputs.form),
    tiling.split(inputs.hidden),
    unembedding,
    # The loss of padding must be finite, so its arguments are those of a token.
    jax.tree.map(lambda x: tiling.split(x, "edge"), (inputs.dont_know_logit, arguments)),
    tiling.split(targets.astype(jnp.int32)),
    tiling.split(jnp.asarray(weights, sum_dtype(inputs.hidden))),
  )
  return total, inputs.scores(tuple(tiling.join(x) for x in outputs), targets)


@dataclasses.dataclass(frozen=True)
class _Inputs:
  """The checked inputs of a readout.

  Attributes:
    hidden: [..., W, D], of the slots that are computed.
    dont_know_logit: f32[..., W], z_dk with all terms that are added to it; None for a model that cannot abstain.
    form: see `slot_scores`.
    readout: the static part; it keeps no softmax.
  """

  hidden: Float[Array, "... W D"]
  dont_know_logit: Float[Array, "... W"] | None
  form: Form
  readout: ChunkedReadout

  def scores(self, outputs: tuple[Array, ...], targets: Int[Array, "..."]) -> SlotScores:
    """Returns the scores from (z_y, l), f32[..., W] each."""
    target_logit, log_normalizer = outputs
    scores = SlotScores.from_readout(target_logit, self.dont_know_logit, log_normalizer, form=self.form)
    return scores.without_ignored(targets)


def _inputs(
  hidden: Float[Array, "... W D"],
  unembedding: Float[Array, "V D"],
  targets: Int[Array, "..."],
  dont_know: Float[Array, "D"] | int | None,
  *,
  form: Form = "token",
  prior: float | None = None,
  soft_cap: float | None = None,
  slots: Sequence[int] | None = None,
  vocab_size: int | None = None,
  dont_know_bias: Float[Array, ""] | float = 0.0,
  frozen: bool = False,
) -> _Inputs:
  """Checks the arguments of `slot_scores`."""
  tokens = _num_tokens(hidden, unembedding, targets, vocab_size)
  excluded = _excluded_row(dont_know, tokens)
  hidden = _chosen_slots(hidden, slots)
  logit = None
  if dont_know is not None:
    row = cast("Array", dont_know) if excluded is None else _row(unembedding, excluded)
    shift = prior_shift(form, prior, tokens + (excluded is None)) + dont_know_bias
    logit = _dont_know_logit(hidden, row, form, soft_cap) + shift
  readout = ChunkedReadout(
    tokens=tokens if tokens < len(unembedding) else None,
    excluded=excluded,
    soft_cap=soft_cap,
    frozen=frozen,
    keeps_softmax=False,
    mesh=current_mesh(),
  )
  return _Inputs(hidden, logit, form, readout)


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


def _check_of_tokens(trees: dict[str, Any], targets: Array) -> None:
  for name, tree in trees.items():
    for x in jax.tree.leaves(tree):
      if jnp.shape(x)[: targets.ndim] != targets.shape:
        raise ValueError(f"{name}: shape {jnp.shape(x)}, but targets has the shape {targets.shape}")


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
  logits = _cap(jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=sum_dtype(hidden)), soft_cap)
  if tokens < len(unembedding):
    # A slice of the rows would be copied, and moved between devices under a mesh, so the rows are masked instead.
    logits = jnp.where(columns(logits) < tokens, logits, -jnp.inf)
  logits = constrain(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")
  log_normalizer = jax.nn.logsumexp(logits, -1)
  # Not the logits minus the normaliser, which in float32 has a coarse last bit if the logits are large.
  log_probs = jax.nn.log_softmax(logits, -1)[..., :tokens]
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
  dtype = sum_dtype(hidden)
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
