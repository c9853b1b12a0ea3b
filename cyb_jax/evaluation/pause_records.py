"""The record of statistics.json from the sums of `pause_sums`; computed on the host in float64.

All keys are under the default omega, which allows every token all its slots, unless stated otherwise; the pauses of a
token are their expected number, sum_i (i - 1) s_i. Undefined keys are None: with W = 1 all keys except those marked *,
and all keys about d for a method that is not adaptive.

* `tokens`, `documents`, `num_slots`.
* `perplexity`: `mixture` exp(mean of -log sum_i s_i t_i), or the perplexity of the fused state, and its `interval`;
  `mean_of_logs` exp(mean of -sum_i s_i log t_i); `oracle` from the best slot of each token; `hard` from the first slot
  with d <= 1/2; `slots` of each slot; * `loss` exp(mean of the training objective), which includes the discount, the
  penalty or the bound of CYB's variants; `training` like `mixture`, under the omega and recipe of training if they
  differ.
`latency`, `training_latency`: `mean` of s, `mean_pauses`, `histogram` (`edges`, `counts`) of the tokens' pauses; the
  latter under the omega and recipe of training if they differ.
`calibration`: for each step i < W, d_i against the gain of step i + 1: `spearman` of d_i with t_{i+1} - t_i and its
  `interval`; `density` (`decision_edges`, `gain_edges`, `counts` [64][64]); `reliability`, by even bins of d, the share
  of tokens with t_{i+1} > t_i; `deciles`, by rank of d, the mean gain of t, and of log t in `gain_nats` (the range of a
  decile is known to within a bin of `ranks`).
`curves`: perplexity against mean pauses, read at the first slot with d <= `threshold`, or under a step `budget` set
  through omega: always i steps, or i and i + 1 in equal shares.
`self_paced`, * `autoregressive`: None; other evaluations set them.
`types`: the types of input tokens, see `token_types.summarize`; `paper`: the words that the paper lists, after a space,
  at their last piece.
`word_position`, `word_class` (by the lexicon of the package textblob; None without it; only words of one piece),
  `frequency` (by the number of occurrences of the type in the split): pauses of the input tokens.
* `difficulty`: by difficulty of the target: perplexity, and the share of tokens whose most probable token is the target
  (`accuracy`; of a mixture the share that is expected if a slot is drawn from s); with W > 1 also pauses, s, and the
  accuracy of each slot.
* `groups`: nats and tokens of documents by number modulo G <= 1,024, for paired bootstraps.

Intervals are the central 95% of 1,000 resamples of these groups; a split with at most 1,024 documents has one document
per group. Every resample uses the ranks in the complete split.

Dimensions: W slots, K = W - 1 pauses, G groups of documents, N thresholds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import special

from cyb_jax.evaluation import bootstrap, ranks
from cyb_jax.evaluation.accumulation import Sums
from cyb_jax.evaluation.fixed_point import value
from cyb_jax.evaluation.pause_sums import (
  DECILES,
  DENSITY_BINS,
  HISTOGRAM_BINS,
  NATS,
  RELIABILITY_BINS,
  SHARE,
  budgets,
  pauses_bound,
)


def of_first_pass(sums: Sums, num_slots: int, documents: int, groups: int) -> dict[str, Any]:
  """All keys of the record; the keys that need the table of types or a second pass are None.

  Args:
    sums: the sums of `pause_sums.first_pass`.
    num_slots: W.
    documents: the number of documents that have a target among the tokens.
    groups: G.
  """
  tokens = int(sums["tokens"].sum())
  result = {"tokens": tokens, "documents": documents, "num_slots": num_slots}
  result |= {"perplexity": _perplexity(sums, groups), "latency": None, "training_latency": None}
  result |= dict.fromkeys(("calibration", "curves", "self_paced", "autoregressive"))
  result |= dict.fromkeys(("types", "word_position", "word_class", "frequency", "difficulty"))
  for key, name in (("latency", "reading"), ("training_latency", "training")):
    if name in sums:
      result[key] = _latency(sums[name], tokens)
  if "difficulty" in sums:
    result["difficulty"] = _difficulty(sums["difficulty"], num_slots)
  nats = value(sums["nats"], NATS)[:groups]
  result["groups"] = {"count": groups, "documents": documents, "nats": nats.tolist()}
  result["groups"]["tokens"] = sums["tokens"][:groups].tolist()
  return result


def of_decisions(first: Sums, second: Sums, edges: np.ndarray, thresholds: np.ndarray, groups: int) -> dict[str, Any]:
  """`calibration` and `curves` of an adaptive method with W > 1.

  Args:
    first, second: the sums of the two passes.
    edges: f32[K, bins - 1], the edges of the bins of the odds of d.
    thresholds: f32[N], thresholds on the odds of d.
    groups: G.
  """
  tokens, num_slots = int(first["tokens"].sum()), len(edges) + 1
  return {
    "calibration": _calibration(first, second, first["ranks"][0], edges, groups),
    "curves": {
      "threshold": _threshold_curve(first, thresholds, tokens),
      "budget": _budget_curve(first["budget"], num_slots, tokens),
    },
  }


def _perplexity(sums: Sums, groups: int) -> dict[str, Any]:
  by_group = np.stack([value(sums["nats"], NATS), sums["tokens"]], -1)
  tokens = sums["tokens"].sum()

  def of(nats: np.ndarray) -> Any:
    return np.exp(nats / tokens).tolist()

  return {
    "mixture": of(by_group[:, 0].sum()),
    "interval": bootstrap.interval(by_group[:groups], _exp_mean),
    "mean_of_logs": of(value(sums["mean_of_logs"], NATS)),
    "oracle": of(value(sums["oracle"], NATS)),
    "hard": of(value(sums["hard"], NATS)) if "hard" in sums else None,
    "slots": of(value(sums["slots"], NATS)),
    "loss": of(value(sums["loss"], NATS)),
    "training": of(value(sums["training_nats"], NATS)) if "training_nats" in sums else None,
  }


def _exp_mean(totals: np.ndarray) -> np.ndarray:
  # A resample may consist of groups without tokens.
  with np.errstate(invalid="ignore", divide="ignore"):
    return np.exp(totals[:, 0] / totals[:, 1])


def _latency(sums: Sums, tokens: int) -> dict[str, Any]:
  mean, counts = value(sums["stopping"], SHARE) / tokens, sums["histogram"]
  edges = np.arange(len(counts) + 1) / HISTOGRAM_BINS
  return {
    "mean": mean.tolist(),
    "mean_pauses": float(mean @ np.arange(len(mean))),
    "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
  }


def _difficulty(sums: Sums, num_slots: int) -> list[dict[str, Any]]:
  rows = []
  for level in np.flatnonzero(sums["count"]).tolist():
    count = int(sums["count"][level])

    def mean(name: str, bound: float, level: int = level, count: int = count) -> Any:
      return (value(sums[name][level], bound) / count).tolist()

    row = {"difficulty": level, "count": count, "perplexity": math.exp(mean("nats", NATS))}
    if "accuracy" in sums:
      row["accuracy"] = mean("accuracy", SHARE)
    if num_slots > 1:
      row |= {"mean_pauses": mean("pauses", pauses_bound(num_slots)), "stopping": mean("stopping", SHARE)}
    if "slot_accuracy" in sums:
      row["slot_accuracy"] = (sums["slot_accuracy"][level] / count).tolist()
    rows.append(row)
  return rows


def _calibration(first: Sums, second: Sums, counts: np.ndarray, edges: np.ndarray, groups: int) -> list[dict[str, Any]]:
  """The calibration of each step; `counts` int64[K, bins] and `edges` f32[K, bins - 1] are of the odds of d."""
  tokens = np.broadcast_to(first["tokens"][:, None, None], (*second["ranks"].shape[:2], 1))
  products = np.concatenate([tokens, value(second["ranks"], SHARE)], -1)[:groups]
  steps = []
  for step in range(counts.shape[0]):
    coefficient = float(ranks.correlation(products[:, step].sum(0)))
    density = first["density"][step].reshape(DENSITY_BINS, DENSITY_BINS)
    steps.append(
      {
        "step": step + 1,
        "spearman": coefficient if math.isfinite(coefficient) else None,
        "interval": bootstrap.interval(products[:, step], ranks.correlation),
        "density": {
          "decision_edges": np.linspace(0.0, 1.0, DENSITY_BINS + 1).tolist(),
          "gain_edges": np.linspace(-1.0, 1.0, DENSITY_BINS + 1).tolist(),
          "counts": density.tolist(),
        },
        "reliability": _reliability(first["reliability"], step),
        "deciles": _decile_rows(second["deciles"], step, counts[step], edges[step]),
      }
    )
  return steps


def _reliability(sums: Sums, step: int) -> list[dict[str, Any]]:
  rows = []
  for level in range(RELIABILITY_BINS):
    index = step * RELIABILITY_BINS + level
    if count := int(sums["count"][index]):
      row = {"low": level / RELIABILITY_BINS, "high": (level + 1) / RELIABILITY_BINS, "count": count}
      row["decision"] = float(value(sums["decision"][index], SHARE) / count)
      rows.append(row | {"better": float(sums["better"][index] / count)})
  return rows


def _decile_rows(sums: Sums, step: int, counts: np.ndarray, edges: np.ndarray) -> list[dict[str, Any]]:
  borders = special.expit(np.concatenate([[-np.inf], edges, [np.inf]]).astype(np.float64))
  decile, rows = ranks.deciles(counts), []
  for number in range(DECILES):
    bins = np.flatnonzero((decile == number) & (counts > 0))
    index = step * DECILES + number
    if count := int(sums["count"][index]):
      row = {"low": float(borders[bins[0]]), "high": float(borders[bins[-1] + 1]), "count": count}
      for name, bound in (("decision", SHARE), ("gain", SHARE), ("gain_nats", NATS)):
        row[name] = float(value(sums[name][index], bound) / count)
      rows.append(row | {"better": float(sums["better"][index] / count)})
  return rows


def _threshold_curve(sums: Sums, thresholds: np.ndarray, tokens: int) -> list[dict[str, float]]:
  last, found = value(sums["slots"], NATS)[-1], sums["threshold"]
  nats = (last + np.cumsum(value(found["nats"], NATS))) / tokens
  pauses = len(sums["slots"]) - 1 - np.cumsum(found["steps"]) / tokens
  return [
    {"threshold": float(threshold), "mean_pauses": float(x), "perplexity": math.exp(y)}
    for threshold, x, y in zip(special.expit(thresholds.astype(np.float64)), pauses, nats)
  ]


def _budget_curve(sums: Sums, num_slots: int, tokens: int) -> list[dict[str, Any]]:
  nats = value(sums["nats"], NATS) / tokens
  pauses = value(sums["pauses"], pauses_bound(num_slots)) / tokens
  return [
    {
      "omega": omega.tolist(),
      "mean_steps": float(omega @ np.arange(1, num_slots + 1)),
      "mean_pauses": float(x),
      "perplexity": math.exp(y),
    }
    for omega, x, y in zip(budgets(num_slots), pauses, nats)
  ]
