"""The three Catch-Your-Breath losses and the cross-entropy at the last slot: pure functions with one loss per token.

With s the stopping-time distribution and t_i the probability of the target at slot i (`stopping.SlotScores`):

    CYB     = -log sum_i s_i gamma_i t_i
    CYB-AP  = CYB with an omega (the distribution of the step budget) and a gamma (a discount)
    CYB-VA  = -sum_i s_i log t_i + KL(s || rho)
    CYB-DP  = CYB + alpha KL(rho || s)

All are exact: nothing is sampled and no gradient is stopped. Reference: "Catch Your Breath", arXiv 2510.13879.
This module depends only on jax and `stopping`.

Dimensions: ... any leading shape (tokens), W slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cyb_jax.stopping import SlotScores, log_stopping_distribution, normalize

if TYPE_CHECKING:  # at run time, the core needs only jax
  from jaxtyping import Array, ArrayLike, Float


def discount(
  kind: Literal["none", "linear", "exponential"], num_slots: int, start: float = 1.0
) -> Float[np.ndarray, "W"]:
  """Returns a discount gamma over slots for CYB-AP.

      none: 1      linear: 1 - (i-1)(1-g0)      exponential: g0^(i-1)         i = 1..W

  Args:
    kind: the kind of discount.
    num_slots: W.
    start: g0, the discount of the first pause, in [0, 1].

  Returns:
    f64[W], each in [0, 1].

  Raises:
    ValueError: `kind` is unknown, g0 is outside [0, 1], or a linear discount is negative at the last slot.

  Example:
    >>> print(discount("linear", 4, 0.9))
    [1.  0.9 0.8 0.7]
  """
  pauses = np.arange(num_slots, dtype=np.float64)
  if not 0.0 <= start <= 1.0:
    raise ValueError(f"gamma: {start} is not in [0, 1]")
  if kind == "none":
    return np.ones(num_slots)
  if kind == "exponential":
    return start**pauses
  if kind != "linear":
    raise ValueError(f"gamma: kind {kind!r} is unknown; give 'none', 'linear' or 'exponential'")
  gamma = 1.0 - pauses * (1.0 - start)
  if gamma[-1] < -1e-9:
    raise ValueError(
      f"gamma: linear:{start:g} falls to {gamma[-1]:g} at slot {num_slots}; for {num_slots} slots, give at least"
      f" {1 - 1 / (num_slots - 1):g}"
    )
  return np.maximum(gamma, 0.0)


def cyb(
  scores: SlotScores,
  omega: Float[ArrayLike, "... W"] | None = None,
  gamma: Float[ArrayLike, "... W"] | None = None,
) -> Float[Array, "..."]:
  """CYB and CYB-AP: minus the log of the expected (discounted) probability of the target at the slot that is read.

      -log sum_i s_i gamma_i t_i = -lse_i(log s_i + log gamma_i + log t_i)

  Args:
    scores: f32[..., W] each.
    omega: [W] or [..., W], the distribution of the step budget: non-negative, normalised here; may be traced. None
      means 0:..:0:1, so the budget is always W steps.
    gamma: [W] or [..., W], the discount, in [0, 1]; may be traced. None means all ones.

  Returns:
    f32[...], nats; infinite where every slot that can be read has gamma 0.

  Raises:
    ValueError: the last axis has the wrong length, or concrete values are out of range.

  References:
    "Catch Your Breath", https://arxiv.org/abs/2510.13879

  Example:
    >>> log = lambda *values: jnp.log(jnp.array(values))
    >>> scores = SlotScores(log_target=log(0.5, 0.8), log_dont_know=log(0.5, 0.1), log_answer=log(0.5, 0.9))
    >>> print(f"{jnp.exp(-cyb(scores)):.3f}")  # 0.5 * 0.5 + 0.5 * 0.8
    0.650
    >>> print(f"{jnp.exp(-cyb(scores, gamma=(1.0, 0.5))):.3f}")  # 0.5 * 0.5 + 0.5 * 0.8 * 0.5
    0.450
  """
  log_stopping = log_stopping_distribution(scores.log_dont_know, scores.log_answer, omega)
  return _cyb(scores, log_stopping, gamma)


def _cyb(scores: SlotScores, log_stopping: Array, gamma: ArrayLike | None) -> Array:
  terms = log_stopping + scores.log_target
  if gamma is not None:
    terms = terms + _log_discount(gamma, terms.shape[-1], terms.dtype)
  return -jax.nn.logsumexp(terms, axis=-1)


def cyb_va(scores: SlotScores, rho: Float[ArrayLike, "... W"]) -> Float[Array, "..."]:
  """CYB-VA: the variational bound with the stopping time as latent variable and rho as its prior.

      -sum_i s_i log t_i + KL(s || rho),      omega = 0:..:0:1

  The minimum over s is -log sum_i rho_i t_i; it is attained where s_i is proportional to rho_i t_i.

  Args:
    scores: f32[..., W] each.
    rho: [W] or [..., W], the prior: positive everywhere, normalised here; may be traced.

  Returns:
    f32[...], nats.

  Raises:
    ValueError: the last axis has the wrong length, or concrete values are not positive.

  References:
    "Catch Your Breath", https://arxiv.org/abs/2510.13879

  Example:
    >>> log = lambda *values: jnp.log(jnp.array(values))
    >>> scores = SlotScores(log_target=log(0.5, 0.5), log_dont_know=log(0.25, 0.1), log_answer=log(0.75, 0.9))
    >>> print(f"{jnp.exp(-cyb_va(scores, rho=(3, 1))):.3f}")  # s = rho = 0.75:0.25
    0.500
  """
  rho = normalize(rho, scores.log_target.shape[-1], name="rho", positive=True, dtype=scores.log_target.dtype)
  log_stopping = log_stopping_distribution(scores.log_dont_know, scores.log_answer)
  # s log s -> 0 as s -> 0. Where log s is -inf (d is exactly 0 or 1), the term is omitted before the product is
  # computed, because 0 * inf is nan.
  reached = log_stopping > -jnp.inf
  log_stopping = jnp.where(reached, log_stopping, 0.0)
  terms = jnp.exp(log_stopping) * (log_stopping - jnp.log(rho) - scores.log_target)
  return jnp.where(reached, terms, 0.0).sum(-1)


def cyb_dp(scores: SlotScores, rho: Float[ArrayLike, "... W"], alpha: Float[ArrayLike, ""]) -> Float[Array, "..."]:
  """CYB-DP: CYB with a penalty on the divergence of the stopping-time distribution from rho.

      CYB + alpha KL(rho || s),      omega = 0:..:0:1, gamma = 1

  Args:
    scores: f32[..., W] each.
    rho: [W] or [..., W], the target distribution: non-negative (zeros are allowed), normalised here; may be traced.
    alpha: the coefficient of the penalty, not negative; may be traced.

  Returns:
    f32[...], nats; infinite where s_i is 0 and rho_i is not.

  Raises:
    ValueError: the last axis of rho has the wrong length, or concrete values of rho or alpha are out of range.

  References:
    "Catch Your Breath", https://arxiv.org/abs/2510.13879

  Example:
    >>> log = lambda *values: jnp.log(jnp.array(values))
    >>> scores = SlotScores(log_target=log(0.5, 0.8), log_dont_know=log(0.5, 0.1), log_answer=log(0.5, 0.9))
    >>> print(f"{jnp.exp(-cyb_dp(scores, rho=(1, 1), alpha=0.1)):.3f}")  # s = rho: the penalty is 0
    0.650
  """
  if not isinstance(alpha, jax.core.Tracer) and not np.all((np.asarray(alpha) >= 0) & np.isfinite(alpha)):
    raise ValueError(f"alpha: {alpha} must be finite and not negative")
  rho = normalize(rho, scores.log_target.shape[-1], name="rho", dtype=scores.log_target.dtype)
  log_stopping = log_stopping_distribution(scores.log_dont_know, scores.log_answer)
  wanted = rho > 0
  log_rho = jnp.log(jnp.where(wanted, rho, 1.0))
  divergence = jnp.where(wanted, rho * (log_rho - jnp.where(wanted, log_stopping, 0.0)), 0.0).sum(-1)
  return _cyb(scores, log_stopping, None) + alpha * divergence


def last_slot_cross_entropy(scores: SlotScores) -> Float[Array, "..."]:
  """The cross-entropy at the last slot, the loss of TBYS ("think before you speak").

      -log t_W

  It equals CYB with d = 1 at every slot before the last. Only the scores of the last slot are used.

  Args:
    scores: f32[..., W] each, W >= 1.

  Returns:
    f32[...], nats.

  References:
    Goyal et al. 2023, "Think before you speak: Training language models with pause tokens",
    https://arxiv.org/abs/2310.02226

  Example:
    >>> scores = SlotScores(jnp.log(jnp.array([0.5, 0.8])), jnp.zeros(2), jnp.full(2, -jnp.inf))
    >>> print(f"{jnp.exp(-last_slot_cross_entropy(scores)):.3f}")
    0.800
  """
  return -scores.log_target[..., -1]


def _log_discount(gamma: ArrayLike, num_slots: int, dtype: jnp.dtype) -> Array:
  """Returns log gamma, -inf where gamma is 0, after the checks that `cyb` documents."""
  shape = np.shape(gamma)
  if not shape or shape[-1] != num_slots:
    raise ValueError(f"gamma: shape {shape}, but there are {num_slots} slots on the last axis")
  if not isinstance(gamma, jax.core.Tracer):
    values = np.asarray(gamma, np.float64)
    if not ((values >= 0) & (values <= 1)).all():
      raise ValueError(f"gamma: {values.tolist()} must be in [0, 1]")
    if (values.max(-1) <= 0).any():
      raise ValueError(f"gamma: {values.tolist()} is all zero; give at least one positive value")
  gamma = jnp.asarray(gamma, dtype)
  return jnp.where(gamma > 0, jnp.log(jnp.where(gamma > 0, gamma, 1.0)), -jnp.inf)
