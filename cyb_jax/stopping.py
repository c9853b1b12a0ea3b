"""When the answer is read: the stopping-time distribution of a self-paced model, in log space.

A token owns W slots. At slot i the model abstains with probability d_i (it emits `<don't know>`), answers with
probability a_i = 1 - d_i, and, given that it answers, says the target with probability t_i. The world grants W steps
with probability omega_W. The step S at which the answer is read is then distributed as

    s_i = (omega_i + a_i * Omega_{>i}) * prod_{j<i} d_j,        Omega_{>i} = sum_{j>i} omega_j,

which sums to one ("Catch Your Breath", arXiv 2510.13879). This file needs jax alone.

Dimensions: ... any leading shape (tokens), W slots, V vocabulary entries.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:  # annotations alone: these files need jax and nothing else
  from jaxtyping import Array, ArrayLike, Float, Int

Form = Literal["token", "unit"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotScores:
  """What the slots of each token say, raw: nothing is forced at the last slot.

  Attributes:
    log_target: f32[..., W], log t: the target's log-probability given that the slot answers.
    log_dont_know: f32[..., W], log d: the log-probability of abstaining.
    log_answer: f32[..., W], log a = log(1 - d), kept apart because it can't be had from log d in f32 as d -> 1.
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
    """Scores of dense logits in which `<don't know>` is one of the V columns.

        log d = z_dk - lse(z),   log a = lse(z without dk) - lse(z),   log t = z_y - lse(z without dk)

    Args:
      logits: [..., W, V], any float dtype; computed in f32.
      targets: int[...], the id that every slot of the token must say; equals `dont_know_id` nowhere.
      dont_know_id: the column of `<don't know>`; negative values count from the end.
      prior: psi'(dk), the probability that uniform logits give to abstaining; None leaves the logits as they are.

    Returns:
      f32[..., W] each.

    Raises:
      ValueError: if `dont_know_id` isn't a column or the prior isn't inside (0, 1).

    Example:
      >>> scores = SlotScores.from_logits(jnp.zeros((5, 4, 11)), jnp.zeros(5, int), dont_know_id=10, prior=0.9)
      >>> float(jnp.exp(scores.log_dont_know[0, 0]))  # doctest: +SKIP
      0.9
    """
    logits = jnp.asarray(logits)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    vocabulary = logits.shape[-1]
    if not -vocabulary <= dont_know_id < vocabulary:
      raise ValueError(f"dont_know_id: {dont_know_id} is not a column of logits with {vocabulary} columns")
    column = jnp.arange(vocabulary) == dont_know_id % vocabulary
    words = jnp.where(column, -jnp.inf, logits)
    targets = jnp.broadcast_to(jnp.asarray(targets)[..., None, None], (*logits.shape[:-1], 1))
    return cls.from_readout(
      target_logit=jnp.take_along_axis(words, targets, axis=-1)[..., 0],
      dont_know_logit=logits[..., dont_know_id],
      log_normalizer=jax.nn.logsumexp(words, axis=-1),
      shift=prior_shift("token", prior, vocabulary),
    )

  @classmethod
  def from_readout(
    cls,
    target_logit: Float[Array, "... W"],
    dont_know_logit: Float[Array, "... W"],
    log_normalizer: Float[Array, "... W"],
    *,
    form: Form = "token",
    shift: Float[ArrayLike, ""] = 0.0,
  ) -> SlotScores:
    """Scores from the three numbers that a readout keeps of a slot's logits.

    Args:
      target_logit: f32[..., W], z_y.
      dont_know_logit: f32[..., W], z of `<don't know>`.
      log_normalizer: f32[..., W], l = the log-sum-exp over the vocabulary without `<don't know>`.
      form: 'token': `<don't know>` competes with the vocabulary, d = sigmoid(z + shift - l).
        'unit': a logistic unit of its own, d = sigmoid(z + shift).
      shift: added to z, nats; see `prior_shift`.
    """
    odds = dont_know_logit + shift
    if form == "token":
      odds = odds - log_normalizer
    elif form != "unit":
      raise ValueError(f"form: {form!r} is none of 'token', 'unit'")
    return cls(
      log_target=target_logit - log_normalizer,
      # Both as a log-sigmoid: each is exact where the other one is almost 0.
      log_dont_know=jax.nn.log_sigmoid(odds),
      log_answer=jax.nn.log_sigmoid(-odds),
    )


def prior_shift(form: Form, prior: float | None, vocabulary: int) -> float:
  """What is added to the `<don't know>` logit so that a model that knows nothing abstains with probability `prior`.

  Token form: log(psi'/psi), psi uniform and psi' the prior on dk and uniform elsewhere, relative to the other entries:
  log(psi' (|V|-1) / (1-psi')). Unit form: log(psi'/(1-psi')).

  Args:
    form: 'token' or 'unit'.
    prior: psi'(dk), inside (0, 1); None gives 0.
    vocabulary: |V|, `<don't know>` counted (token form).
  """
  if prior is None:
    return 0.0
  if not 0.0 < prior < 1.0:
    raise ValueError(f"prior: {prior} is not inside (0, 1)")
  odds = math.log(prior) - math.log1p(-prior)
  if form == "unit":
    return odds
  if vocabulary < 2:
    raise ValueError(f"vocabulary: {vocabulary} leaves no entry beside <don't know>")
  return odds + math.log(vocabulary - 1)


def normalize(
  weights: Float[ArrayLike, "... W"] | None,
  num_slots: int,
  *,
  name: str,
  positive: bool = False,
  dtype: jnp.dtype = jnp.float32,
) -> Float[Array, "... W"]:
  """Weights over slots as a distribution; None is 0:..:0:1.

  Args:
    weights: [W] or [..., W], non-negative, not all zero; need not be normalised; may be traced.
    num_slots: W.
    name: for the errors.
    positive: whether a zero is an error, also one that a tiny weight becomes in `dtype`.
    dtype: of the result.

  Raises:
    ValueError: on another length; and, where the values are concrete, on values that are negative, not finite, all
      zero, or zero with `positive`. Traced values can't be looked at.
  """
  if weights is None:
    return jnp.zeros(num_slots, dtype).at[-1].set(1.0)
  shape = np.shape(weights)
  if not shape or shape[-1] != num_slots:
    raise ValueError(f"{name}: shape {shape}, but there are {num_slots} slots on the last axis")
  if not isinstance(weights, jax.core.Tracer):
    values = np.asarray(weights, np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
      raise ValueError(f"{name}: {_show(values)} must be finite and not negative")
    if (values.sum(-1) <= 0).any():
      raise ValueError(f"{name}: {_show(values)} is all zero; at least one slot needs weight")
    values = (values / values.sum(-1, keepdims=True)).astype(dtype)
    # The smallest normal number counts as zero: the compiled program may flush what is below it.
    if positive and (values < np.finfo(dtype).tiny).any():
      raise ValueError(f"{name}: {_show(np.asarray(weights, np.float64))} must be positive at every slot")
    return jnp.asarray(values)
  weights = weights.astype(dtype)
  return weights / weights.sum(-1, keepdims=True)


def _show(values: np.ndarray) -> str:
  return ":".join(f"{v:g}" for v in values) if values.ndim == 1 else f"array of shape {values.shape}"


def log_stopping_distribution(
  log_dont_know: Float[Array, "... W"],
  log_answer: Float[Array, "... W"],
  omega: Float[ArrayLike, "... W"] | None = None,
) -> Float[Array, "... W"]:
  """log s_i, the log-probability that the answer is read at slot i.

      log s_i = sum_{j<i} log d_j + logaddexp(log omega_i, log a_i + log Omega_{>i})

  That the last slot always answers needs no special case: there Omega_{>i} = 0 and log d is not used.

  Args:
    log_dont_know: f32[..., W], log d.
    log_answer: f32[..., W], log a.
    omega: [W] or [..., W], how many steps the world grants; see `normalize`. None: all W, always.

  Returns:
    f32[..., W]; exp of it sums to 1; -inf where s_i is exactly 0. Gradients are finite wherever the value is.

  Raises:
    ValueError: see `normalize`.
  """
  num_slots = log_dont_know.shape[-1]
  omega = normalize(omega, num_slots, name="omega", dtype=log_dont_know.dtype)
  # An exclusive sum from the right by shifting, since total - cumsum would leave rounding where Omega_{>i} is 0.
  tail = jnp.flip(jnp.cumsum(jnp.flip(omega, -1), -1), -1)
  tail = jnp.concatenate([tail[..., 1:], jnp.zeros_like(tail[..., :1])], -1)
  log_omega, granted = _safe_log(omega)
  log_tail, more = _safe_log(tail)
  # Each branch sees finite numbers only, so that no gradient meets -inf - (-inf); the last `where` picks the value.
  stop = jnp.where(
    granted & more,
    _log_add(log_omega, log_answer + log_tail),
    jnp.where(granted, log_omega, log_answer + log_tail),
  )
  stop = jnp.where(granted | more, stop, -jnp.inf)
  # Exclusive sum of log d, by shifting too: with log d = -inf a difference of sums would be nan.
  waited = jnp.concatenate([jnp.zeros_like(log_dont_know[..., :1]), log_dont_know[..., :-1]], -1)
  return jnp.cumsum(waited, -1) + stop


def _safe_log(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Array]:
  """log x with 0 in place of -inf, and where x > 0 (the inner half of a double `where`)."""
  positive = x > 0
  return jnp.log(jnp.where(positive, x, 1.0)), positive


def _log_add(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
  """log(e^x + e^y) for finite x; y may be -inf (d = 1 exactly): value x, gradient (1, 0)."""
  finite = y > -jnp.inf
  return jnp.where(finite, jnp.logaddexp(x, jnp.where(finite, y, 0.0)), x)


def expected_pauses(log_stopping: Float[Array, "... W"]) -> Float[Array, "..."]:
  """sum_i (i - 1) s_i, the mean number of pauses before the answer; f32[...]."""
  # A sum of products rather than a matrix product, which accelerators would round.
  return (jnp.exp(log_stopping) * jnp.arange(log_stopping.shape[-1], dtype=log_stopping.dtype)).sum(-1)


def hard_slot(log_dont_know: Float[Array, "... W"], threshold: Float[ArrayLike, ""] = 0.5) -> Int[Array, "..."]:
  """The slot, from 0, that a greedy reader takes: the first with d <= `threshold`, else the last; i32[...]."""
  answers = (log_dont_know <= jnp.log(threshold)).at[..., -1].set(True)
  return jnp.argmax(answers, -1)
