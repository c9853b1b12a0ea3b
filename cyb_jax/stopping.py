"""The stopping-time distribution of a self-paced model, in log space.

A token has W slots. At slot i the model abstains with probability d_i (it emits `<don't know>`) and answers with
probability a_i = 1 - d_i; given that it answers, the target has probability t_i. The step budget is i steps with
probability omega_i. The answer is read at the first slot that answers, or at the last slot of the budget if no slot
answers before. The slot at which it is read therefore has the distribution

    s_i = (omega_i + a_i * Omega_{>i}) * prod_{j<i} d_j,        Omega_{>i} = sum_{j>i} omega_j,

which sums to one ("Catch Your Breath", arXiv 2510.13879). This module depends only on jax.

Dimensions: ... any leading shape (tokens), W slots, V vocabulary entries.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:  # at run time, the core needs only jax
  from jaxtyping import Array, ArrayLike, Float, Int

Form = Literal["token", "unit"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotScores:
  """Scores of the slots of each token. They are raw: the last slot is not forced to answer.

  Attributes:
    log_target: f32[..., W], log t: the log-probability of the target, given that the slot answers.
    log_dont_know: f32[..., W], log d: the log-probability of abstaining.
    log_answer: f32[..., W], log a = log(1 - d). It is stored because f32 cannot represent it by log d as d -> 1.

  Example:
    >>> d = jnp.array([0.75, 0.25])
    >>> scores = SlotScores(jnp.log(jnp.array([0.5, 0.8])), log_dont_know=jnp.log(d), log_answer=jnp.log1p(-d))
    >>> scores.log_target.shape
    (2,)
  """

  log_target: Float[Array, "... W"]
  log_dont_know: Float[Array, "... W"]
  log_answer: Float[Array, "... W"]

  @classmethod
  def from_logits(
    cls,
    logits: Float[Array, "... W V"],
    targets: Int[Array, "..."],
    dont_know_id: int,
    prior: float | None = None,
  ) -> SlotScores:
    """Returns the scores of dense logits; one of the V columns is `<don't know>`.

        log d = z_dk - lse(z),   log a = lse(z without dk) - lse(z),   log t = z_y - lse(z without dk)

    Args:
      logits: [..., W, V], any float dtype; the computation is in f32 or wider.
      targets: int[...], the target token of all slots; no target may equal `dont_know_id`. A negative target, such as
        -100, is an ignored label: its log t is 0, with a gradient of 0, so that every cross-entropy of it is 0.
      dont_know_id: the column of `<don't know>`; negative values count from the end.
      prior: psi'(dk), the probability of abstaining under uniform logits; None leaves the logits as they are.

    Returns:
      `SlotScores` of f32[..., W].

    Raises:
      ValueError: `dont_know_id` is not a column, or the prior is not inside (0, 1).

    Example:
      >>> scores = SlotScores.from_logits(jnp.zeros((5, 4, 11)), jnp.zeros(5, int), dont_know_id=10, prior=0.9)
      >>> print(f"{jnp.exp(scores.log_dont_know[0, 0]):.3f}")
      0.900
    """
    logits = jnp.asarray(logits)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    vocabulary = logits.shape[-1]
    if not -vocabulary <= dont_know_id < vocabulary:
      raise ValueError(f"dont_know_id: {dont_know_id} is not a column of logits with {vocabulary} columns")
    column = jnp.arange(vocabulary) == dont_know_id % vocabulary
    answers = jnp.where(column, -jnp.inf, logits)
    targets = jnp.asarray(targets)
    indices = jnp.broadcast_to(jnp.maximum(targets, 0)[..., None, None], (*logits.shape[:-1], 1))
    return cls.from_readout(
      target_logit=jnp.take_along_axis(answers, indices, axis=-1)[..., 0],
      dont_know_logit=logits[..., dont_know_id],
      log_normalizer=jax.nn.logsumexp(answers, axis=-1),
      shift=prior_shift("token", prior, vocabulary),
    ).without_ignored(targets)

  def without_ignored(self, targets: Int[Array, "..."]) -> SlotScores:
    """Returns the scores with log t = 0 where the target is negative, an ignored label.

    Example:
      >>> scores = SlotScores(jnp.full((2, 3), -4.0), *jnp.full((2, 2, 3), -0.7)).without_ignored(jnp.array([5, -100]))
      >>> print(scores.log_target[:, 0])
      [-4.  0.]
    """
    return dataclasses.replace(self, log_target=jnp.where((targets < 0)[..., None], 0.0, self.log_target))

  @classmethod
  def from_readout(
    cls,
    target_logit: Float[Array, "... W"],
    dont_know_logit: Float[Array, "... W"] | None,
    log_normalizer: Float[Array, "... W"],
    *,
    form: Form = "token",
    shift: Float[ArrayLike, ""] = 0.0,
  ) -> SlotScores:
    """Returns scores from the three numbers that a readout computes for a slot.

    Args:
      target_logit: f32[..., W], z_y, the logit of the target.
      dont_know_logit: f32[..., W], z_dk, the logit of `<don't know>`; None for a model that cannot abstain: d = 0
        (log d = -inf, log a = 0).
      log_normalizer: f32[..., W], l, the log-sum-exp over the vocabulary without `<don't know>`.
      form: 'token': `<don't know>` competes with the vocabulary, d = sigmoid(z_dk + shift - l).
        'unit': `<don't know>` is a separate logistic unit, d = sigmoid(z_dk + shift).
      shift: a number in nats that is added to z_dk; see `prior_shift`.

    Returns:
      `SlotScores` of f32[..., W].

    Raises:
      ValueError: `form` is unknown.

    Example:
      >>> zero = jnp.zeros(2)
      >>> scores = SlotScores.from_readout(zero, zero, jnp.log(jnp.array([1.0, 3.0])))
      >>> print(f"{jnp.exp(scores.log_dont_know[1]):.3f} {jnp.exp(scores.log_target[1]):.3f}")
      0.250 0.333
    """
    if dont_know_logit is None:
      never = jnp.full_like(target_logit, -jnp.inf)
      return cls(target_logit - log_normalizer, never, jnp.zeros_like(never))
    log_odds = dont_know_logit + shift
    if form == "token":
      log_odds = log_odds - log_normalizer
    elif form != "unit":
      raise ValueError(f"form: {form!r} is unknown; give 'token' or 'unit'")
    return cls(
      log_target=target_logit - log_normalizer,
      # Both are log-sigmoids, because each one is accurate where the other one is close to 0.
      log_dont_know=jax.nn.log_sigmoid(log_odds),
      log_answer=jax.nn.log_sigmoid(-log_odds),
    )


def prior_shift(form: Form, prior: float | None, vocabulary: int) -> float:
  """Returns the shift of the `<don't know>` logit under which uniform logits abstain with probability `prior`.

      token form: log(psi' (V - 1) / (1 - psi'))        unit form: log(psi' / (1 - psi'))

  The token form is the logarithm of psi'(dk)/psi(dk) divided by psi'(v)/psi(v) for another entry v, where psi is the
  uniform distribution and psi' is the prior, which is uniform over the other entries.

  Args:
    form: 'token' or 'unit'.
    prior: psi'(dk), inside (0, 1); for None, the shift is 0.
    vocabulary: V, the number of entries including `<don't know>`; the unit form ignores it.

  Returns:
    The shift in nats.

  Raises:
    ValueError: the prior is not inside (0, 1), or `<don't know>` is the only entry.

  Example:
    >>> round(prior_shift("token", 0.5, 11), 3), prior_shift("unit", 0.5, 11)
    (2.303, 0.0)
  """
  if prior is None:
    return 0.0
  if not 0.0 < prior < 1.0:
    raise ValueError(f"prior: {prior} must be inside (0, 1)")
  odds = math.log(prior) - math.log1p(-prior)
  if form == "unit":
    return odds
  if vocabulary < 2:
    raise ValueError(f"vocabulary: {vocabulary} must be at least 2, one entry in addition to <don't know>")
  return odds + math.log(vocabulary - 1)


def normalize(
  weights: Float[ArrayLike, "... W"] | None,
  num_slots: int,
  *,
  name: str,
  positive: bool = False,
  dtype: jnp.dtype = jnp.float32,
) -> Float[Array, "... W"]:
  """Returns weights over slots as a distribution.

      weights_i / sum_j weights_j

  Args:
    weights: [W] or [..., W], non-negative, not all zero, not necessarily normalised; may be traced. None means
      0:..:0:1.
    num_slots: W.
    name: the name of the weights in error messages.
    positive: whether a zero is an error. A weight that is zero after the conversion to `dtype` is also an error.
    dtype: the dtype of the result.

  Returns:
    `dtype`[W] or [..., W]; sums to one over the last axis.

  Raises:
    ValueError: the last axis does not have length W. For concrete values also: a value is negative or not finite, their
      sum is not finite, all values are zero, or one value is zero with `positive`. Traced values are not checked.

  Example:
    >>> print(normalize((1, 0, 3), 3, name="omega"))
    [0.25 0.   0.75]
  """
  if weights is None:
    return jnp.zeros(num_slots, dtype).at[-1].set(1.0)
  shape = np.shape(weights)
  if not shape or shape[-1] != num_slots:
    raise ValueError(f"{name}: shape {shape}, but there are {num_slots} slots on the last axis")
  if not isinstance(weights, jax.core.Tracer):
    values = np.asarray(weights, np.float64)
    with np.errstate(over="ignore"):
      total = values.sum(-1)
    if not np.isfinite(total).all() or (values < 0).any():
      raise ValueError(f"{name}: {_show(values)} must be finite and not negative, with a finite sum")
    if (values.sum(-1) <= 0).any():
      raise ValueError(f"{name}: {_show(values)} is all zero; give at least one positive weight")
    values = (values / values.sum(-1, keepdims=True)).astype(dtype)
    # Subnormal numbers count as zero, because a compiled program may flush them to zero.
    if positive and (values < np.finfo(dtype).tiny).any():
      raise ValueError(f"{name}: {_show(np.asarray(weights, np.float64))} must be positive at every slot")
    return jnp.asarray(values)
  traced = weights.astype(dtype)
  return traced / traced.sum(-1, keepdims=True)


def _show(values: np.ndarray) -> str:
  return ":".join(f"{v:g}" for v in values) if values.ndim == 1 else f"array of shape {values.shape}"


def log_stopping_distribution(
  log_dont_know: Float[Array, "... W"],
  log_answer: Float[Array, "... W"],
  omega: Float[ArrayLike, "... W"] | None = None,
) -> Float[Array, "... W"]:
  """Returns log s_i, the log-probability that the answer is read at slot i.

      log s_i = sum_{j<i} log d_j + logaddexp(log omega_i, log a_i + log Omega_{>i})

  The last slot always answers. This needs no special case, because there Omega_{>i} = 0 and log d is not used.

  Args:
    log_dont_know: f32[..., W], log d.
    log_answer: f32[..., W], log a.
    omega: [W] or [..., W], the distribution of the step budget, see `normalize`; None means that the budget is always W
      steps.

  Returns:
    f32[..., W], nats; -inf where s_i is exactly 0. Its exponentials sum to one over W. Gradients are finite where the
    value is finite.

  Raises:
    ValueError: see `normalize`.

  References:
    "Catch Your Breath", https://arxiv.org/abs/2510.13879

  Example:
    >>> d = jnp.array([0.5, 0.5, 0.5])
    >>> print(jnp.exp(log_stopping_distribution(jnp.log(d), jnp.log1p(-d))))
    [0.5  0.25 0.25]
    >>> print(jnp.exp(log_stopping_distribution(jnp.log(d), jnp.log1p(-d), omega=(0, 1, 0))))
    [0.5 0.5 0. ]
  """
  num_slots = log_dont_know.shape[-1]
  omega = normalize(omega, num_slots, name="omega", dtype=log_dont_know.dtype)
  # The exclusive sum from the right is a shifted inclusive sum: total - cumsum would have rounding errors where
  # Omega_{>i} is 0.
  tail = jnp.flip(jnp.cumsum(jnp.flip(omega, -1), -1), -1)
  tail = jnp.concatenate([tail[..., 1:], jnp.zeros_like(tail[..., :1])], -1)
  log_omega, may_end = _safe_log(omega)
  log_tail, may_go_on = _safe_log(tail)
  # All branches have only finite operands, so no gradient contains -inf - (-inf); the last `where` sets the value.
  stop = jnp.where(
    may_end & may_go_on,
    _log_add(log_omega, log_answer + log_tail),
    jnp.where(may_end, log_omega, log_answer + log_tail),
  )
  stop = jnp.where(may_end | may_go_on, stop, -jnp.inf)
  # This exclusive sum also shifts its terms: with log d = -inf, a difference of sums would be nan.
  waited = jnp.concatenate([jnp.zeros_like(log_dont_know[..., :1]), log_dont_know[..., :-1]], -1)
  return jnp.cumsum(waited, -1) + stop


def _safe_log(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Array]:
  """Returns log x with 0 in place of -inf, and whether x > 0: the inner half of a double `where`."""
  positive = x > 0
  return jnp.log(jnp.where(positive, x, 1.0)), positive


def _log_add(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
  """Returns log(e^x + e^y) for finite x. For y = -inf (d is exactly 1) the value is x and the gradient is (1, 0)."""
  finite = y > -jnp.inf
  return jnp.where(finite, jnp.logaddexp(x, jnp.where(finite, y, 0.0)), x)


def expected_pauses(log_stopping: Float[Array, "... W"]) -> Float[Array, "..."]:
  """Returns the mean number of pauses before the answer.

      sum_i (i - 1) s_i,   i = 1..W

  Args:
    log_stopping: f32[..., W], log s, see `log_stopping_distribution`.

  Returns:
    f32[...].

  Example:
    >>> print(expected_pauses(jnp.log(jnp.array([0.5, 0.25, 0.25]))))
    0.75
  """
  # A sum of products, because accelerators would round the operands of a matrix product.
  return (jnp.exp(log_stopping) * jnp.arange(log_stopping.shape[-1], dtype=log_stopping.dtype)).sum(-1)


def hard_slot(log_dont_know: Float[Array, "... W"], threshold: Float[ArrayLike, ""] = 0.5) -> Int[Array, "..."]:
  """Returns the index of the first slot with d <= `threshold`, or the index of the last slot if there is none.

  Args:
    log_dont_know: f32[..., W], log d.
    threshold: a probability.

  Returns:
    i32[...], in 0..W-1.

  Example:
    >>> hard_slot(jnp.log(jnp.array([[0.9, 0.2, 0.1], [0.9, 0.9, 0.9]]))).tolist()
    [1, 2]
  """
  answers = (log_dont_know <= jnp.log(threshold)).at[..., -1].set(True)
  return jnp.argmax(answers, -1)
