"""The formulas of the paper in float64 numpy, one token at a time: a slow reference for the library.

The code uses the definitions only (probabilities, products and sums; no log space, no vectorisation).
"""

import numpy as np


def normalized(weights, num_slots):
  weights = np.asarray([0.0] * (num_slots - 1) + [1.0] if weights is None else weights, np.float64)
  return weights / weights.sum()


def probabilities(logits, target, dont_know_id, prior=None):
  """(t, d, a) of one slot from its dense logits."""
  logits = np.asarray(logits, np.longdouble).copy()
  size = len(logits)
  if prior is not None:
    logits[dont_know_id] += np.log(np.longdouble(9 * (size - 1)) if prior == 0.9 else prior * (size - 1) / (1 - prior))
  weights = np.exp(logits - logits.max())
  words = weights.sum() - weights[dont_know_id]
  words = np.delete(weights, dont_know_id).sum()
  total = weights.sum()
  return weights[target] / words, weights[dont_know_id] / total, words / total


def stopping(d, a, omega=None):
  """s_i = (omega_i + a_i Omega_{>i}) prod_{j<i} d_j."""
  omega = normalized(omega, len(d))
  s = []
  waited = np.longdouble(1.0)
  for i in range(len(d)):
    s.append((omega[i] + a[i] * sum(omega[i + 1 :])) * waited)
    waited = waited * d[i]
  return np.array(s)


def cyb(t, d, a, omega=None, gamma=None):
  gamma = np.ones(len(t)) if gamma is None else np.asarray(gamma, np.float64)
  return -np.log(sum(stopping(d, a, omega) * gamma * t))


def cyb_va(t, d, a, rho):
  rho = normalized(rho, len(t))
  s = stopping(d, a)
  return -sum(s * np.log(t)) + sum(si * np.log(si / ri) for si, ri in zip(s, rho) if si > 0)


def cyb_dp(t, d, a, rho, alpha):
  rho = normalized(rho, len(t))
  s = stopping(d, a)
  return cyb(t, d, a) + alpha * sum(ri * np.log(ri / si) for si, ri in zip(s, rho) if ri > 0)
