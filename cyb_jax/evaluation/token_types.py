"""The pauses after each type of token: counts, medians, means and variances, and the types with extreme statistics.

Dimensions: R types, K pauses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cyb_jax.data import Tokenizer
from cyb_jax.evaluation import fixed_point

_ROWS = 20
# The maximum total number of bins of the histograms of all types (32 MiB), but at least 16 bins per pause.
_TABLE = 1 << 23
_COARSEST, _FINEST = 16, 256
_FREQUENCIES = (1, 3)  # multiplied by powers of ten


def bins_per_pause(rows: int, pauses: int) -> int:
  """The number of bins per pause of a table of `rows` histograms of 0 to `pauses` pauses: the resolution of medians."""
  most = max(1, _TABLE // (rows * pauses))
  return min(_FINEST, max(_COARSEST, 1 << (most.bit_length() - 1)))


class TokenTypes:
  """Statistics of the pauses by type.

  Args:
    histograms: int64[R, bins per pause * K + 1]; bin b counts the values that are nearest to b * `resolution`.
    sums: int64[R, 17], the sums of `fixed_point.moments`.
    bound: the bound of the moments.
    resolution: 1 / bins per pause.

  Attributes:
    count: int64[R].
    median, mean, variance: f64[R], nan if the type has no tokens; the variance is the population variance.
  """

  def __init__(self, histograms: np.ndarray, sums: np.ndarray, bound: float, resolution: float):
    self._sums, self._bound, self.resolution = sums, bound, resolution
    self.count, self.mean, self.variance = fixed_point.mean_and_variance(sums, bound)
    ends = np.cumsum(histograms, -1)
    # The two middle values if their number is even; indices count from 0.
    middle = [(ends <= index[:, None]).sum(-1) for index in ((self.count - 1) // 2, self.count // 2)]
    self.median = np.where(self.count > 0, (middle[0] + middle[1]) / 2 * resolution, np.nan)

  def row(self, number: int) -> dict[str, Any]:
    """`count`, `median`, `mean` and `variance` of a type."""
    return {"count": int(self.count[number])} | {
      name: _or_none(getattr(self, name)[number]) for name in ("median", "mean", "variance")
    }

  def frequencies(self, vocab_size: int) -> list[dict[str, Any]]:
    """Statistics of the first `vocab_size` types by their number of occurrences."""
    count, result, scale = self.count[:vocab_size], [], 1
    while scale <= count.max():
      for low, high in zip(_FREQUENCIES, (*_FREQUENCIES[1:], 10 * _FREQUENCIES[0])):
        inside = (count >= low * scale) & (count < high * scale)
        tokens, mean, variance = fixed_point.mean_and_variance(self._sums[:vocab_size][inside].sum(0), self._bound)
        if tokens:
          result.append(
            {"low": low * scale, "high": high * scale - 1, "types": int(inside.sum()), "count": int(tokens)}
            | {"mean": float(mean), "variance": float(variance)}
          )
      scale *= 10
    return result


def summarize(types: TokenTypes, tokenizer: Tokenizer, *, min_count: int) -> dict[str, Any]:
  """The types of a tokenizer with extreme statistics.

  The corners hold the most frequent of the eligible types (at least `min_count` tokens) whose median and variance are
  in the lowest or the highest quarter: at or beyond the thresholds. If the low and the high threshold are equal, the
  quarters can't be distinguished, and the corners are empty.

  Returns:
    `min_count`, `eligible`, `thresholds`, `median_resolution`, `corners`, `most_paused` and `least_paused` (by mean).
  """
  count = types.count[: tokenizer.vocab_size]
  eligible = np.flatnonzero(count >= min_count)
  thresholds, low, high = {}, {}, {}
  for name in ("median", "variance"):
    values = getattr(types, name)[eligible]
    quarters = np.quantile(values, [0.25, 0.75]).tolist() if len(values) else [None, None]
    thresholds[name] = quarters
    apart = len(values) > 0 and quarters[0] < quarters[1]
    low[name] = values <= quarters[0] if apart else np.zeros(len(values), bool)
    high[name] = values >= quarters[1] if apart else np.zeros(len(values), bool)

  def rows(tokens: np.ndarray, order: np.ndarray) -> list[dict[str, Any]]:
    # Ties are sorted by id, so that the order is deterministic.
    chosen = tokens[np.argsort(order, kind="stable")][:_ROWS]
    return [{"piece": tokenizer.piece(int(token)), "token": int(token)} | types.row(token) for token in chosen]

  corners = {}
  for name, median, variance in (
    ("low_low", low, low), ("high_low", high, low), ("low_high", low, high), ("high_high", high, high),
  ):  # fmt: skip
    tokens = eligible[median["median"] & variance["variance"]]
    corners[name] = rows(tokens, -count[tokens])
  return {
    "min_count": min_count,
    "eligible": len(eligible),
    "thresholds": thresholds,
    "median_resolution": types.resolution,
    "corners": corners,
    "most_paused": rows(eligible, -types.mean[eligible]),
    "least_paused": rows(eligible, types.mean[eligible]),
  }


def _or_none(x: float) -> float | None:
  return float(x) if np.isfinite(x) else None
