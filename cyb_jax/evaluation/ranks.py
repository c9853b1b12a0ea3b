"""Spearman's rank correlation: exact if all values are in memory, otherwise from 65,536 bins.

All values of a bin are tied and have their average rank. The correlation differs from `spearman` only by the order
inside the bins, so no bin may hold a large share of different values, even if these are concentrated, such as all d
within a millionth of 0.999, or gains of 1e-9. Therefore half of the edges are values of a sample of tokens, which
follow the distribution; the other half are f32 numbers evenly spaced in their bits (64 per octave), for values outside
of the sample.
"""

from __future__ import annotations

import warnings

import numpy as np
from scipy import stats

BINS = 1 << 16


def spearman(decisions: np.ndarray, gains: np.ndarray) -> list[float | None]:
  """Exact rank correlation over tokens of d_i with t_{i+1} - t_i, for each step i; None if one of them is constant.

  Args:
    decisions: f32[N, W-1].
    gains: f32[N, W-1].
  """
  result = []
  for d, gain in zip(decisions.T, gains.T):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", stats.ConstantInputWarning)
      value = stats.spearmanr(d, gain).statistic if len(d) > 1 else np.nan
    result.append(float(value) if np.isfinite(value) else None)
  return result


def edges(sample: np.ndarray) -> np.ndarray:
  """The lower edges of all bins except the first; bin k holds edges[k - 1] <= x < edges[k].

  Args:
    sample: f32[N], some of the values, at least one.

  Returns:
    f32[65535], ascending; unused edges are inf.
  """
  bits = np.arange(1 << 15, dtype=np.uint32) << 17
  grid = bits.view(np.float32)
  # Devices may flush subnormal numbers to 0.
  grid = grid[np.isfinite(grid) & ((np.abs(grid) >= np.finfo(np.float32).tiny) | (grid == 0))]
  sample = np.unique(sample[np.isfinite(sample)].astype(np.float32))
  most = BINS - 1 - len(grid)
  if len(sample) > most:
    sample = sample[np.linspace(0, len(sample) - 1, most).astype(int)]
  found = np.unique(np.concatenate([grid, sample]))
  return np.concatenate([found, np.full(BINS - 1 - len(found), np.inf, np.float32)])


def centred(counts: np.ndarray) -> np.ndarray:
  """f64[..., bins]: the average rank of each bin's values as a share of all values, from -1/2 to 1/2."""
  total = np.maximum(counts.sum(-1, keepdims=True), 1)
  return (np.cumsum(counts, -1) - counts / 2) / total - 0.5


def deciles(counts: np.ndarray) -> np.ndarray:
  """int32[..., bins]: the decile, from 0, of the average rank of each bin's values."""
  return np.clip(np.floor((centred(counts) + 0.5) * 10), 0, 9).astype(np.int32)


def correlation(sums: np.ndarray) -> np.ndarray:
  """f64[...]: Pearson's correlation from sums f64[..., 6] of 1, x, y, x^2, y^2, x y; nan if x or y is constant."""
  with np.errstate(invalid="ignore", divide="ignore"):
    x, y, xx, yy, xy = np.moveaxis(sums[..., 1:] / sums[..., :1], -1, 0)
    spread = (xx - x * x) * (yy - y * y)
    return np.where(spread > 0, (xy - x * y) / np.sqrt(np.maximum(spread, 0.0)), np.nan)
