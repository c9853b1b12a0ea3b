"""Rank correlation (Spearman's): exact where all values are in memory, and from 65,536 bins where they are not.

All values of a bin are tied: each has their average rank. The correlation is then that of `spearman` but for the order
inside the bins, so that no bin may hold a large share of different values, wherever these crowd: all d within
a millionth of 0.999, or gains of 1e-9. Half of the edges are therefore values of a sample of the tokens, near which
other values are to be expected; the other half are f32 numbers evenly spaced in their bits (64 to an octave), for what
the sample has not seen.
"""

from __future__ import annotations

import warnings

import numpy as np
from scipy import stats

BINS = 1 << 16


def spearman(decisions: np.ndarray, gains: np.ndarray) -> list[float | None]:
  """Exact rank correlation over tokens of d_i with t_{i+1} - t_i, per step i; None where one of them is constant.

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
  """Where bins begin but for the first; bin k holds edges[k - 1] <= x < edges[k].

  Args:
    sample: f32[N], some of the values, at least one.

  Returns:
    f32[65535], ascending; those that aren't needed are inf.
  """
  bits = np.arange(1 << 15, dtype=np.uint32) << 17
  grid = bits.view(np.float32)
  # Devices may take a number below the smallest normal one for 0.
  grid = grid[np.isfinite(grid) & ((np.abs(grid) >= np.finfo(np.float32).tiny) | (grid == 0))]
  sample = np.unique(sample[np.isfinite(sample)].astype(np.float32))
  room = BINS - 1 - len(grid)
  if len(sample) > room:
    sample = sample[np.linspace(0, len(sample) - 1, room).astype(int)]
  found = np.unique(np.concatenate([grid, sample]))
  return np.concatenate([found, np.full(BINS - 1 - len(found), np.inf, np.float32)])


def centred(counts: np.ndarray) -> np.ndarray:
  """f64[..., bins]: the average rank of each bin's values as a share of all, from -1/2 to 1/2."""
  total = np.maximum(counts.sum(-1, keepdims=True), 1)
  return (np.cumsum(counts, -1) - counts / 2) / total - 0.5


def deciles(counts: np.ndarray) -> np.ndarray:
  """int32[..., bins]: the tenth, from 0, that the average rank of each bin's values is in."""
  return np.clip(np.floor((centred(counts) + 0.5) * 10), 0, 9).astype(np.int32)


def correlation(sums: np.ndarray) -> np.ndarray:
  """f64[...]: Pearson's, of sums f64[..., 6] of 1, x, y, x^2, y^2, x y; nan where x or y is constant."""
  with np.errstate(invalid="ignore", divide="ignore"):
    x, y, xx, yy, xy = np.moveaxis(sums[..., 1:] / sums[..., :1], -1, 0)
    spread = (xx - x * x) * (yy - y * y)
    return np.where(spread > 0, (xy - x * y) / np.sqrt(np.maximum(spread, 0.0)), np.nan)
