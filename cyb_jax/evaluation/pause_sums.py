"""The sums of pause statistics on the devices, as integers (`fixed_point`): a batch gives a tree of i32 sums.

A first pass sums everything that needs no ranks; a second pass, for adaptive methods, sums products of ranks.

Dimensions: B batch, T tokens, W slots, K = W - 1 pauses, G groups of documents, N thresholds.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from cyb_jax.evaluation import fixed_point, ranks
from cyb_jax.evaluation.abilities import as_trained, is_adaptive
from cyb_jax.evaluation.accumulation import Sums
from cyb_jax.evaluation.bootstrap import GROUPS
from cyb_jax.evaluation.fixed_point import fixed, total
from cyb_jax.evaluation.token_types import bins_per_pause
from cyb_jax.methods import Batch, Decoding, EvalOutput, Method
from cyb_jax.stopping import expected_pauses, hard_slot, log_stopping_distribution

# Bounds of the addends. A token of more than 1,024 nats, or of nan, counts as 1,024 nats.
NATS = 1024.0
SHARE = 1.0
HISTOGRAM_BINS = 20  # per pause
DENSITY_BINS = 64
RELIABILITY_BINS = 20
DECILES = 10
DIFFICULTIES = 256  # a token store stores a difficulty in one byte


def pauses_bound(num_slots: int) -> float:
  """A power of two that is at least the maximum number of pauses, the bound of their `fixed_point` sums."""
  return float(1 << (num_slots - 2).bit_length())


def budgets(num_slots: int) -> np.ndarray:
  """f64[2 W - 1, W]: the step budgets of always i steps, and between them those of i and i + 1 in equal shares."""
  fixed_steps = np.eye(num_slots)
  between = (fixed_steps[1:] + fixed_steps[:-1]) / 2
  return np.concatenate([np.stack([fixed_steps[:-1], between], 1).reshape(-1, num_slots), fixed_steps[-1:]])


def decisions(method: Method, params: PyTree, batch: Batch) -> Float[Array, "2 B T K"]:
  """The log-odds of d_i in nats, and t_{i+1} - t_i."""
  return jnp.stack(_pairs(method.evaluate(params, batch)))


def _pairs(reading: EvalOutput) -> tuple[Float[Array, "B T K"], Float[Array, "B T K"]]:
  """The log-odds of d_i in nats, which still differ where d is almost 1; and t_{i+1} - t_i."""
  scores = reading.scores
  target = jnp.exp(scores.log_target)
  return (scores.log_dont_know - scores.log_answer)[..., :-1], target[..., 1:] - target[..., :-1]


@dataclasses.dataclass(frozen=True)
class _Evaluated:
  """A batch and the method's evaluation of it.

  Attributes:
    output: the result of `Method.evaluate` with all slots allowed.
    real: which tokens have weight.
    nats: -log likelihood of each target; 1,024 where it is not finite.
    finite: where the log-likelihood is finite.
    stopping: s.
    level: the difficulty of each target, 256 for tokens without weight; None if it is unknown.
  """

  method: Method
  params: PyTree
  batch: Batch
  output: EvalOutput
  real: Bool[Array, "B T"]
  nats: Float[Array, "B T"]
  finite: Bool[Array, "B T"]
  stopping: Float[Array, "B T W"]
  level: Int[Array, "B T"] | None

  @classmethod
  def of(cls, method: Method, params: PyTree, batch: Batch) -> _Evaluated:
    output = method.evaluate(params, batch)
    real = batch["weights"] > 0
    nats = -output.log_likelihood
    finite = jnp.isfinite(nats)
    level = jnp.where(real, batch["difficulty"], DIFFICULTIES) if "difficulty" in batch else None
    nats = jnp.where(finite, nats, NATS)
    return cls(method, params, batch, output, real, nats, finite, jnp.exp(output.log_stopping), level)

  def by_difficulty(self, values: Int[Array, "B T ..."]) -> Int[Array, "256 ..."]:
    """The sums of the values by difficulty of the target."""
    return _added(self.level, DIFFICULTIES, values)


def first_pass(
  method: Method,
  num_rows: int,
  params: PyTree,
  edges: Float[Array, "2 K bins-1"] | None,
  thresholds: Float[Array, "N"] | None,
  batch: Batch,
) -> Sums:
  """The sums that need no ranks.

  Args:
    method: evaluated once, and once more as trained if training has another omega or recipe.
    num_rows: the number of rows of the table of token types, see `batch["rows"]`.
    params: bare arrays.
    edges: edges of the bins of (odds of d, gain) by step; None if the method is not adaptive.
    thresholds: thresholds on the odds of d; None if the method is not adaptive.
    batch: see `PauseStatistics.__call__`, with `rows` instead of `before`.
  """
  found = _Evaluated.of(method, params, batch)
  sums = _likelihood_sums(found)
  if found.level is not None:
    sums["difficulty"] = {
      "count": found.by_difficulty(jnp.ones_like(found.level)),
      "nats": found.by_difficulty(fixed(found.nats, NATS)),
    }
  if method.num_slots == 1:
    if found.level is not None and isinstance(method, Decoding):
      sums["difficulty"]["accuracy"] = found.by_difficulty(fixed(_correct(found)[1], SHARE))
    return sums
  pauses = expected_pauses(found.output.log_stopping)
  sums["reading"] = _stopping_sums(found.output, found.real)
  training = as_trained(method, params, batch, found.output)
  if training is not None:
    sums["training"] = _stopping_sums(training, found.real)
    sums["training_nats"] = total(-training.log_likelihood, found.real, NATS)
    sums["loss"] = total(training.loss, found.real, NATS)
  sums |= _type_sums(found, pauses, num_rows)
  if found.level is not None:
    sums["difficulty"] |= _answer_sums(found, pauses)
  if is_adaptive(method):
    sums |= _decision_sums(found.output, found.real, edges, thresholds)
  return sums


def _likelihood_sums(found: _Evaluated) -> Sums:
  """The nats of all tokens for each way of reading slots, and the method's nats by group of documents."""
  real, log_target, stopping = found.real, found.output.scores.log_target, found.stopping
  # A slot that is never read has no effect, even if it gives the target no probability.
  mean_of_logs = -jnp.where(stopping > 0, stopping * log_target, 0.0).sum(-1)
  group = jnp.where(real, found.batch["group"], GROUPS)
  sums = {
    "nats": _added(group, GROUPS, fixed(found.nats, NATS)),
    "tokens": _added(group, GROUPS, jnp.ones_like(group)),
    "not_finite": (real & ~found.finite).sum(),
    "mean_of_logs": total(mean_of_logs, real, NATS),
    "oracle": total(-log_target.max(-1), real, NATS),
    "slots": total(-log_target, real, NATS),
    "loss": total(found.output.loss, real, NATS),
  }
  if is_adaptive(found.method):
    chosen = hard_slot(found.output.scores.log_dont_know)[..., None]
    sums["hard"] = total(-jnp.take_along_axis(log_target, chosen, -1)[..., 0], real, NATS)
  return sums


def _type_sums(found: _Evaluated, pauses: Float[Array, "B T"], num_rows: int) -> Sums:
  """Histograms and moments of the pauses by row of the table of types, and each type's count as a word of a class."""
  rows = jnp.where(found.real[..., None], found.batch["rows"], num_rows)
  bins = bins_per_pause(num_rows, found.method.num_slots - 1)
  most = (found.method.num_slots - 1) * bins
  nearest = jnp.clip(jnp.round(pauses * bins).astype(jnp.int32), 0, most)
  # Words of a class are the tokens whose last row is in the table.
  alone = jnp.where(rows[..., -1] < num_rows, found.batch["tokens"], num_rows)
  parts = fixed_point.moments(pauses, pauses_bound(found.method.num_slots))
  return {
    "table": _counted(rows, num_rows, nearest[..., None], most + 1),
    "alone": _added(alone, num_rows, jnp.ones_like(alone)),
    "moments": _added(rows, num_rows, jnp.broadcast_to(parts[..., None, :], (*rows.shape, parts.shape[-1]))),
  }


def _answer_sums(found: _Evaluated, pauses: Float[Array, "B T"]) -> Sums:
  """By difficulty of the target: pauses, s, and the number of tokens whose most probable token is the target.

  Only a method that decodes has the most probable tokens.
  """
  sums = {
    "pauses": found.by_difficulty(fixed(pauses, pauses_bound(found.method.num_slots))),
    "stopping": found.by_difficulty(fixed(found.stopping, SHARE)),
  }
  if isinstance(found.method, Decoding):
    correct, accuracy = _correct(found)
    sums["accuracy"] = found.by_difficulty(fixed(accuracy, SHARE))
    sums["slot_accuracy"] = found.by_difficulty(correct)
  return sums


def _stopping_sums(reading: EvalOutput, real: Bool[Array, "B T"]) -> Sums:
  bins = (reading.log_stopping.shape[-1] - 1) * HISTOGRAM_BINS
  found = jnp.clip((expected_pauses(reading.log_stopping) * HISTOGRAM_BINS).astype(jnp.int32), 0, bins - 1)
  return {
    "stopping": total(jnp.exp(reading.log_stopping), real, SHARE),
    "histogram": _added(jnp.where(real, found, bins), bins, jnp.ones_like(found)),
  }


def _decision_sums(
  reading: EvalOutput,
  real: Bool[Array, "B T"],
  edges: Float[Array, "2 K bins-1"],
  thresholds: Float[Array, "N"],
) -> Sums:
  """Sums for the calibration of d against the next slot's gain, and likelihoods at other thresholds and budgets."""
  scores = reading.scores
  odds, gain = _pairs(reading)
  real_steps = jnp.broadcast_to(real[..., None], odds.shape)
  steps = odds.shape[-1]
  step = jnp.where(real_steps, jnp.arange(steps), steps)
  d = jnp.exp(scores.log_dont_know[..., :-1])
  better = (scores.log_target[..., 1:] > scores.log_target[..., :-1]).astype(jnp.int32)

  def even(x: Array, low: float, high: float, bins: int) -> Array:
    return jnp.clip(((x - low) * (bins / (high - low))).astype(jnp.int32), 0, bins - 1)

  level = step * RELIABILITY_BINS + even(d, 0.0, 1.0, RELIABILITY_BINS)
  levels = steps * RELIABILITY_BINS
  cell = even(d, 0.0, 1.0, DENSITY_BINS) * DENSITY_BINS + even(gain, -1.0, 1.0, DENSITY_BINS)
  sums = {
    "ranks": jnp.stack([_counted(step, steps, _bins(e, x), ranks.BINS) for e, x in zip(edges, (odds, gain))]),
    "density": _counted(step, steps, cell, DENSITY_BINS**2),
    "reliability": {
      "count": _added(level, levels, jnp.ones_like(level)),
      "decision": _added(level, levels, fixed(d, SHARE)),
      "better": _added(level, levels, better),
    },
  }
  # Under a threshold a token is read at the first slot whose odds do not exceed it. With m_i the minimum of the odds up
  # to slot i, this is the last slot minus the number of slots i with m_i <= threshold.
  lowest = jax.lax.cummin(odds, axis=odds.ndim - 1)
  index = jnp.where(real_steps, jnp.searchsorted(thresholds, lowest), len(thresholds))
  saved = scores.log_target[..., 1:] - scores.log_target[..., :-1]
  sums["threshold"] = {
    "nats": _added(index, len(thresholds), fixed(saved, NATS)),
    "steps": _added(index, len(thresholds), jnp.ones_like(index)),
  }

  def under(omega: Float[Array, "W"]) -> tuple[Array, Array]:
    log_stopping = log_stopping_distribution(scores.log_dont_know, scores.log_answer, omega)
    nats = -jax.nn.logsumexp(log_stopping + scores.log_target, -1)
    pauses = expected_pauses(log_stopping)
    return total(nats, real, NATS), total(pauses, real, pauses_bound(steps + 1))

  nats, pauses = jax.lax.map(under, jnp.asarray(budgets(steps + 1), jnp.float32))
  sums["budget"] = {"nats": nats, "pauses": pauses}
  return sums


def second_pass(
  method: Method,
  params: PyTree,
  edges: Float[Array, "2 K bins-1"],
  centred: Float[Array, "2 K bins"],
  deciles: Int[Array, "K bins"],
  batch: Batch,
) -> Sums:
  """Sums of ranks and of their products by group of documents, and of gains by decile of d.

  Args:
    method: evaluated once.
    params: bare arrays.
    edges: edges of the bins of (odds of d, gain) by step.
    centred: the rank of each bin, from `ranks.centred`.
    deciles: the decile of each bin of d, from `ranks.deciles`.
    batch: as in `first_pass`.
  """
  reading = method.evaluate(params, batch)
  real, log_target = batch["weights"] > 0, reading.scores.log_target
  odds, gain = _pairs(reading)
  steps = odds.shape[-1]
  bins = _bins(edges[0], odds)
  x, y = centred[0][jnp.arange(steps), bins], centred[1][jnp.arange(steps), _bins(edges[1], gain)]
  group = jnp.where(real, batch["group"], GROUPS)
  tenth = jnp.arange(steps) * DECILES + deciles[jnp.arange(steps), bins]
  tenth, tenths = jnp.where(real[..., None], tenth, steps * DECILES), steps * DECILES
  gain_nats = log_target[..., 1:] - log_target[..., :-1]
  return {
    "ranks": _added(group, GROUPS, fixed(jnp.stack([x, y, x * x, y * y, x * y], -1), SHARE)),
    "deciles": {
      "count": _added(tenth, tenths, jnp.ones_like(tenth)),
      "decision": _added(tenth, tenths, fixed(jnp.exp(reading.scores.log_dont_know[..., :-1]), SHARE)),
      "gain": _added(tenth, tenths, fixed(gain, SHARE)),
      "gain_nats": _added(tenth, tenths, fixed(gain_nats, NATS)),
      "better": _added(tenth, tenths, (gain_nats > 0).astype(jnp.int32)),
    },
  }


def _correct(found: _Evaluated) -> tuple[Int[Array, "B T W"], Float[Array, "B T"]]:
  """Whether each slot's most probable token is the target, 1 or 0; and the expected accuracy of the read slot."""
  method, params = found.method, found.params
  hidden = method.hidden(params, found.batch)
  slots = jnp.broadcast_to(jnp.arange(hidden.shape[-2]), hidden.shape[1:-1])
  is_fused = found.output.fused is not None

  def row(args: tuple[Array, Array]) -> tuple[Array, Array | None]:
    hidden, targets = args
    by_slot = method.token_scores(params, hidden, slots).log_probs.argmax(-1) == targets[:, None]
    fused = method.mixture_log_probs(params, hidden)[0].argmax(-1) == targets if is_fused else None
    return by_slot.astype(jnp.int32), fused

  # Row by row, because the dense token distributions of a batch may not fit into memory.
  correct, fused = jax.lax.map(row, (hidden, found.batch["targets"]))
  return correct, (found.stopping * correct).sum(-1) if fused is None else fused.astype(jnp.float32)


def _bins(edges: Float[Array, "K bins-1"], x: Float[Array, "B T K"]) -> Int[Array, "B T K"]:
  return jax.vmap(functools.partial(jnp.searchsorted, side="right"), in_axes=(0, -1), out_axes=-1)(edges, x)


def _added(index: Int[Array, "*n"], size: int, values: Int[Array, "*n ..."]) -> Int[Array, "size ..."]:
  """Sums of the values by index; values with index `size` are dropped."""
  zeros = jnp.zeros((size, *values.shape[index.ndim :]), jnp.int32)
  return zeros.at[index].add(values, mode="drop")


def _counted(row: Int[Array, "*n"], rows: int, column: Int[Array, "*n"], columns: int) -> Int[Array, "rows columns"]:
  """The number of occurrences of each pair (row, column); pairs with row `rows` are dropped."""
  row, column = jnp.broadcast_arrays(row, column)
  return jnp.zeros((rows, columns), jnp.int32).at[row, column].add(1, mode="drop")
