"""Bootstrap intervals from sums over groups of documents: resampling them is one matrix product.

Dimensions: R resamples, G groups.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

GROUPS = 1024
"""Documents are divided into at most so many groups; document n is in group n modulo G."""

_RESAMPLES = 1000
_SEED = 0


def interval(sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> list[float] | None:
  """The middle 95% of a statistic over resampled groups; the same bits for the same sums.

  Args:
    sums: f64[G, ...], of each group; the statistic is a function of their totals.
    statistic: f64[R, ...] totals -> f64[R]; nan where it is undefined.

  Returns:
    [low, high]; None for fewer than two groups, or where no resample has a value.
  """
  groups = len(sums)
  if groups < 2:
    return None
  counts = np.random.default_rng(_SEED).multinomial(groups, np.full(groups, 1 / groups), _RESAMPLES)
  values = statistic(np.tensordot(counts.astype(np.float64), sums, 1))
  values = values[np.isfinite(values)]
  return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else None
