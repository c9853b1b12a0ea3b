"""Bootstrap intervals from sums over groups of documents; resampling the groups is one matrix product.

Dimensions: R resamples, G groups.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

GROUPS = 1024
"""The maximum number of groups of documents; document n is in group n modulo G."""

_RESAMPLES = 1000
_SEED = 0


def interval(sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> list[float] | None:
  """The central 95% interval of a statistic over resampled groups; bit-identical for equal sums.

  Args:
    sums: f64[G, ...], the sums of each group; the statistic is a function of their totals.
    statistic: f64[R, ...] totals -> f64[R]; nan if it is undefined.

  Returns:
    [low, high]; None for fewer than two groups, or if the statistic is undefined for all resamples.
  """
  groups = len(sums)
  if groups < 2:
    return None
  counts = np.random.default_rng(_SEED).multinomial(groups, np.full(groups, 1 / groups), _RESAMPLES)
  values = statistic(np.tensordot(counts.astype(np.float64), sums, 1))
  values = values[np.isfinite(values)]
  return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else None
