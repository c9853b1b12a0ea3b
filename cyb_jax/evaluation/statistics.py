"""What a model's pauses do, over a whole split: when it stops, what that is worth, and after which tokens.

Ranks need to be known before they can be correlated, so that a method that decides is passed over the split twice; a
few evenly spaced windows, read first, say where its values crowd (`ranks`). Everything is summed on the devices in
whole numbers (`fixed_point`): memory does not grow with the split, and neither batching nor devices change a sum.

Dimensions: B batch, T tokens, W slots, K = W - 1 pauses, V vocabulary, G groups of documents, C tokens before a window.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, PyTree
from scipy import special

from cyb_jax.configs import Config
from cyb_jax.data import Tokenizer, TokenStore, evaluation_batches, with_segment_ids
from cyb_jax.evaluation import bootstrap, fixed_point, ranks
from cyb_jax.evaluation.bootstrap import GROUPS
from cyb_jax.evaluation.fixed_point import fixed, total, value
from cyb_jax.evaluation.record import told, used_windows
from cyb_jax.evaluation.token_types import TokenTypes, bins_per_pause, summarize
from cyb_jax.evaluation.words import POSITIONS, Words
from cyb_jax.methods import Batch, EvalOutput, Method
from cyb_jax.partitioning.mesh import batch_sharding, replicated, shard_batch
from cyb_jax.stopping import expected_pauses, hard_slot, log_stopping_distribution

# Bounds of what is summed. A token of more than 1,024 nats counts as one of 1,024, and so does one of nan.
_NATS = 1024.0
_SHARE = 1.0
_HISTOGRAM_BINS = 20  # a pause
_DENSITY_BINS = 64
_RELIABILITY_BINS = 20
_DECILES = 10
_DIFFICULTIES = 256  # what a token store's bytes can say
_EXAMPLES = 5
# Windows read beforehand have at least so many tokens.
_SAMPLE_TOKENS = 8192
# Thresholds on the odds of d that are tried whatever d is; beside them quantiles of the sample's.
_THRESHOLDS = np.arange(-16, 17) / 2
_THRESHOLD_QUANTILES = 64
# When the host takes over what the devices have summed.
_FLUSH_NUMBERS = fixed_point.MOST // 2

Sums = dict[str, Any]


def statistics_of_split(
  statistics: PauseStatistics,
  params: PyTree,
  store: TokenStore,
  config: Config,
  *,
  split: str,
  step: int,
  limit: int | None = None,
  batch_size: int | None = None,
) -> dict[str, Any]:
  """The pause statistics of parameters on a split of a token store.

  Args:
    statistics: of the config's method.
    params: bare arrays.
    store: read in order, each window once a pass.
    config: gives the window's length and, by default, the batch size.
    split: 'validation', 'test' or 'train'.
    step: that the parameters stem from.
    limit: at most so many windows; None: the split whole.
    batch_size: windows at a time; a multiple of the devices that the batch is spread over.

  Returns:
    `method`, `step`, `split`, `limit` (None: the split whole), `windows`, and what `PauseStatistics` gives.

  Raises:
    InputError: the store has no such split, or nothing in it.
  """
  windows, limit = used_windows(store, config, split, limit)
  length, batch_size = config.data.sequence_length, batch_size or config.evaluation_rows
  starts = store.document_starts(split).astype(np.int64)
  # The last target of the windows; each target of a document, its closing end included, is of that document.
  last = min(windows * length, store.num_tokens(split) - 1)
  documents = int(np.searchsorted(starts, last, side="right"))

  def numbered(indices: np.ndarray, batch: dict[str, Any]) -> dict[str, Any]:
    targets = indices[:, None] * length + np.arange(1, length + 1)
    batch |= {"group": ((np.searchsorted(starts, targets, side="right") - 1) % GROUPS).astype(np.int32)}
    difficulty = store.difficulty(split, indices, length)
    if difficulty is not None:
      batch["difficulty"] = difficulty.astype(np.int32)
    return with_segment_ids(batch, store.end_id) if config.data.document_mask else batch

  def batches() -> Iterator[dict[str, Any]]:
    before = np.full(statistics.context, store.end_id, np.int32)
    found = evaluation_batches(store, split, sequence_length=length, batch_size=batch_size, limit=limit)
    for first, batch in zip(range(0, windows, batch_size), told(found, windows, batch_size)):
      stream = np.concatenate([before, batch["tokens"].ravel()])
      places = np.arange(batch_size)[:, None] * length + np.arange(statistics.context)
      yield numbered(first + np.arange(batch_size), batch | {"before": stream[places]})
      before = stream[-statistics.context :]

  def sample() -> Iterator[dict[str, Any]]:
    count = min(windows, -(-_SAMPLE_TOKENS // length))
    spread = np.linspace(0, windows - 1, count).astype(np.int64)
    for first in range(0, count, batch_size):
      indices = np.full(batch_size, store.num_windows(split, length))  # all padding
      indices[: count - first] = spread[first : first + batch_size]
      tokens, weights = store.windows(split, indices, length)
      batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
      yield with_segment_ids(batch, store.end_id) if config.data.document_mask else batch

  logging.info("pause statistics of %s: %d windows of %d tokens", split, windows, length)
  record = {"method": config.method.name, "step": step, "split": split, "limit": limit, "windows": windows}
  return record | statistics(params, batches, sample, documents=documents)


class PauseStatistics:
  """Pause statistics of a method's parameters; compiled once, used as often as wanted.

  Args:
    method: any; of one without pauses there is little to say.
    mesh: the batch is spread over it.
    tokenizer: of the method's vocabulary.
    min_count: what stands out is looked for among types of at least so many tokens.

  Attributes:
    context: C, how many tokens before a window are wanted.
  """

  def __init__(self, method: Method, mesh: Mesh, tokenizer: Tokenizer, *, min_count: int = 20):
    self.method, self._min_count = method, min_count
    self._tokenizer = tokenizer
    self._words = Words(tokenizer)
    self.context = self._words.context
    # A table with a row for each type, and behind these for each of the paper's words, each position, each class.
    sizes = [tokenizer.vocab_size, len(self._words.words), len(POSITIONS), len(self._words.classes or ())]
    self._borders = np.cumsum([0, *sizes])
    self._batch_sharding, self._everywhere = batch_sharding(mesh), replicated(mesh)
    self._decisions = jax.jit(
      functools.partial(_decisions, method), in_shardings=(None, self._batch_sharding), out_shardings=None
    )
    # All steps of a token may fall to one threshold.
    most = max(method.num_slots - 1, 1)
    self._first = _Accumulated(functools.partial(_first_pass, method, int(self._borders[-1])), self._everywhere, most)
    self._second = _Accumulated(functools.partial(_second_pass, method), self._everywhere, most)

  def __call__(
    self,
    params: PyTree,
    batches: Callable[[], Iterable[dict[str, Any]]],
    sample: Callable[[], Iterable[dict[str, Any]]],
    *,
    documents: int,
  ) -> dict[str, Any]:
    """The statistics of the tokens of weight.

    Args:
      params: of the method, bare arrays.
      batches: begins the split's batches anew, the same each time; see `methods.Batch`, and beside these `before`
        int[B, C], the tokens before each window, `group` i32[B, T], the number of each target's document modulo 1,024,
        and where it is known `difficulty` i32[B, T] of each target.
      sample: some of the windows, from all over the split.
      documents: how many have a target among the tokens.

    Returns:
      All under the default world, in which every token is granted all its slots; a token's pauses are the expected
      number of them, sum_i (i - 1) s_i. What is undefined is None: with W = 1 all but the keys marked *, and what is
      of d for a method that doesn't decide.

      * `tokens`, `documents`, `num_slots`.
      * `perplexity`: `mixture` exp(mean of -log sum_i s_i t_i), or that of the state that slots are fused into, and its
        `interval`, `mean_of_logs` exp(mean of -sum_i s_i log t_i), `oracle` the best slot of each token, `hard` the
        first with d <= 1/2, `slots` each alone.
      `latency`, `training_latency`: `mean` of s, `mean_pauses`, `histogram` (`edges`, `counts`) of the tokens'
        pauses; the latter under the omega and the recipe of training, where they are others.
      `calibration`: for each step i < W, d_i against what step i + 1 brings: `spearman` of d_i with t_{i+1} - t_i and
        its `interval`; `density` (`decision_edges`, `gain_edges`, `counts` [64][64]); `reliability`, by even bins of
        d, the share of tokens with t_{i+1} > t_i; `deciles`, by rank of d, the mean gain, in `gain_nats` that of
        log t (the range of a decile is known to the width of a bin of `ranks`).
      `curves`: perplexity against mean pauses, read at the first slot with d <= `threshold`, or under a `budget` of
        steps imposed through omega: all of i steps, or of i and i + 1 in equal shares.
      `self_paced`, * `autoregressive`: None; others fill them in.
      `types`: of input tokens, see `token_types.summarize`; `paper`: the words that the paper lists, after a space,
        at their last piece.
      `word_position`, `word_class` (by the lexicon of the package textblob; None without it; of words that are one
        piece), `frequency` (by how often the type occurs here): pauses of the input tokens.
      * `difficulty`: by that of the target, perplexity; and with W > 1 pauses, and how often the most probable word is
        the target.
      * `groups`: nats and tokens of documents by number modulo G <= 1,024, for paired bootstraps.

      Intervals are the middle 95% of 1,000 resamples of these groups, which are the documents themselves up to 1,024
      of them; ranks are those in the whole split in every resample.
    """
    method = self.method
    groups = min(GROUPS, documents)
    pairs = method.decides and method.num_slots > 1
    edges = thresholds = None
    if pairs:
      edges, thresholds = self._look(params, sample())
    sums = self._first(self._marked(batches()), params, edges, thresholds)
    tokens = int(sums["tokens"].sum())
    if sums["not_finite"]:
      logging.warning("the loss of %d tokens isn't finite: each counts as %g nats", sums["not_finite"], _NATS)
    result = {"tokens": tokens, "documents": documents, "num_slots": method.num_slots}
    result |= {"perplexity": _perplexity(sums, groups), "latency": None, "training_latency": None}
    result |= dict.fromkeys(("calibration", "curves", "self_paced", "autoregressive"))
    result |= dict.fromkeys(("types", "word_position", "word_class", "frequency", "difficulty"))
    if method.num_slots > 1:
      result["latency"] = _latency(sums["reading"], tokens)
      if "training" in sums:
        result["training_latency"] = _latency(sums["training"], tokens)
      result |= self._by_token(sums)
    if "difficulty" in sums:
      result["difficulty"] = _difficulty(sums["difficulty"], method.num_slots)
    if pairs:
      counts = sums["ranks"]
      centred = ranks.centred(counts).astype(np.float32)
      correlated = self._second(self._marked(batches()), params, edges, centred, ranks.deciles(counts[0]))
      result["calibration"] = _calibration(sums, correlated, counts[0], edges[0], groups)
      result["curves"] = {
        "threshold": _threshold_curve(sums, thresholds, tokens),
        "budget": _budget_curve(sums["budget"], method.num_slots, tokens),
      }
    nats = value(sums["nats"], _NATS)[:groups]
    result["groups"] = {"count": groups, "documents": documents, "nats": nats.tolist()}
    result["groups"]["tokens"] = sums["tokens"][:groups].tolist()
    return result

  def _look(self, params: PyTree, batches: Iterable[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Edges of the bins of (odds of d, gain) by step, f32[2, K, bins - 1]; and the thresholds, f32[N]."""
    found = []
    for batch in batches:
      values = np.asarray(self._decisions(params, self._put(batch)))  # [2, B, T, K]
      found.append(values[:, batch["weights"] > 0])
    values = np.concatenate(found, 1)
    edges = np.array([[ranks.edges(column) for column in kind.T] for kind in values])
    quantiles = np.quantile(values[0], np.arange(1, _THRESHOLD_QUANTILES) / _THRESHOLD_QUANTILES, method="nearest")
    thresholds = np.unique(np.concatenate([[-np.inf, np.inf], _THRESHOLDS, quantiles]).astype(np.float32))
    return edges, thresholds

  def _put(self, batch: dict[str, Any]) -> Batch:
    return shard_batch(batch, self._batch_sharding)

  def _marked(self, batches: Iterable[dict[str, Any]]) -> Iterator[Batch]:
    """The batches with `rows` i32[B, T, 4], the rows of the table that count each token, in place of `before`."""
    none = self._borders[-1]
    for batch in batches:
      marks = self._words.mark(batch["before"], batch["tokens"], batch["targets"])
      rows = [np.where(mark < 0, none, mark + border) for mark, border in zip(marks, self._borders[1:])]
      batch = {key: array for key, array in batch.items() if key != "before"}
      yield self._put(batch | {"rows": np.stack([batch["tokens"], *rows], -1).astype(np.int32)})

  def _by_token(self, sums: Sums) -> dict[str, Any]:
    """What is told by the tokens that were read."""
    words, tokenizer = self._words, self._tokenizer
    pauses = self.method.num_slots - 1
    resolution = 1 / bins_per_pause(int(self._borders[-1]), pauses)
    types = TokenTypes(sums["table"], sums["moments"], _pauses_bound(pauses + 1), resolution)
    vocabulary, first_position, first_class, _ = self._borders[1:].tolist()
    paper = []
    for number, ((word, group), spelling) in enumerate(zip(words.words, words.spellings)):
      piece = "".join(map(tokenizer.piece, spelling))
      token = spelling[0] if len(spelling) == 1 else None
      row = {"word": word, "group": group, "piece": piece, "token": token}
      paper.append(row | types.row(vocabulary + number))
    classes = None
    if words.classes is not None:
      classes = []
      for number, name in enumerate(words.classes):
        row = types.row(first_class + number)
        often = np.where(words.class_of_token == number, sums["alone"][:vocabulary], 0)
        members = [token for token in np.argsort(-often, kind="stable")[:_EXAMPLES] if often[token]]
        if row["count"]:
          classes.append({"class": name} | row | {"examples": [words.texts[token] for token in members]})
    return {
      "types": summarize(types, tokenizer, min_count=self._min_count) | {"paper": paper},
      "word_position": [{"position": name} | types.row(first_position + n) for n, name in enumerate(POSITIONS)],
      "word_class": classes or None,
      "frequency": types.frequencies(vocabulary),
    }


class _Accumulated:
  """Contributions of batches, added up: on the devices, and now and then on the host.

  Args:
    contributions: (params, ..., batch) -> a tree of int32.
    everywhere: where the sums live.
    most: how many numbers a token adds to one of the sums.
  """

  def __init__(self, contributions: Callable[..., Sums], everywhere: NamedSharding, most: int):
    self._contributions, self._everywhere, self._most = contributions, everywhere, most

    def add(sums: Sums, *args: Any) -> Sums:
      return jax.tree.map(jnp.add, sums, contributions(*args))

    # In place: the table of types may be large.
    self._add = jax.jit(add, donate_argnums=0, out_shardings=everywhere)

  def __call__(self, batches: Iterable[Batch], params: PyTree, *args: Any) -> Sums:
    """The sums over the batches, a tree of int64."""
    args = (params, *jax.device_put(args, self._everywhere))
    total = sums = None
    pending = 0
    for batch in batches:
      added = batch["tokens"].size * self._most
      if pending + added > _FLUSH_NUMBERS and sums is not None:
        total, sums, pending = _taken_over(total, sums), None, 0
      if sums is None:
        shapes = jax.eval_shape(self._contributions, *args, batch)
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=self._everywhere), shapes)
      sums = self._add(sums, *args, batch)
      pending += added
    return _taken_over(total, sums)


def _taken_over(total: Sums | None, sums: Sums) -> Sums:
  sums = jax.tree.map(lambda x: np.asarray(x, np.int64), sums)
  return sums if total is None else jax.tree.map(np.add, total, sums)


# On the devices. All sums are of int32; `real` says which tokens count.


def _decisions(method: Method, params: PyTree, batch: Batch) -> Float[Array, "2 B T K"]:
  return jnp.stack(_pairs(method.evaluate(params, batch)))


def _pairs(reading: EvalOutput) -> tuple[Float[Array, "B T K"], Float[Array, "B T K"]]:
  """The odds of d_i, nats, which still differ where d is almost 1; and t_{i+1} - t_i."""
  scores = reading.scores
  target = jnp.exp(scores.log_target)
  return (scores.log_dont_know - scores.log_answer)[..., :-1], target[..., 1:] - target[..., :-1]


def _first_pass(
  method: Method,
  num_rows: int,
  params: PyTree,
  edges: Float[Array, "2 K bins-1"] | None,
  thresholds: Float[Array, "N"] | None,
  batch: Batch,
) -> Sums:
  """All that needs no ranks."""
  reading = method.evaluate(params, batch)
  real, log_target = batch["weights"] > 0, reading.scores.log_target
  stopping = jnp.exp(reading.log_stopping)
  nats = -reading.log_likelihood
  finite = jnp.isfinite(nats)
  nats = jnp.where(finite, nats, _NATS)
  # A slot that is never read counts for nothing, even one that gives the target no probability at all.
  mean_of_logs = -jnp.where(stopping > 0, stopping * log_target, 0.0).sum(-1)
  group = jnp.where(real, batch["group"], GROUPS)
  sums = {
    "nats": _added(group, GROUPS, fixed(nats, _NATS)),
    "tokens": _added(group, GROUPS, jnp.ones_like(group)),
    "not_finite": (real & ~finite).sum(),
    "mean_of_logs": total(mean_of_logs, real, _NATS),
    "oracle": total(-log_target.max(-1), real, _NATS),
    "slots": total(-log_target, real, _NATS),
  }
  if method.decides:
    chosen = hard_slot(reading.scores.log_dont_know)[..., None]
    sums["hard"] = total(-jnp.take_along_axis(log_target, chosen, -1)[..., 0], real, _NATS)
  level = jnp.where(real, batch["difficulty"], _DIFFICULTIES) if "difficulty" in batch else None
  if level is not None:
    sums["difficulty"] = {
      "count": _added(level, _DIFFICULTIES, jnp.ones_like(level)),
      "nats": _added(level, _DIFFICULTIES, fixed(nats, _NATS)),
    }
  if method.num_slots == 1:
    return sums
  bound, pauses = _pauses_bound(method.num_slots), expected_pauses(reading.log_stopping)
  sums["reading"] = _stopping_sums(reading, real)
  training = method.evaluate_as_trained(params, batch, reading)
  if training is not None:
    sums["training"] = _stopping_sums(training, real)
  rows = jnp.where(real[..., None], batch["rows"], num_rows)
  bins = bins_per_pause(num_rows, method.num_slots - 1)
  most = (method.num_slots - 1) * bins
  nearest = jnp.clip(jnp.round(pauses * bins).astype(jnp.int32), 0, most)
  sums["table"] = _counted(rows, num_rows, nearest[..., None], most + 1)
  # Words of a class: those whose last row is one of the table's.
  alone = jnp.where(rows[..., -1] < num_rows, batch["tokens"], num_rows)
  sums["alone"] = _added(alone, num_rows, jnp.ones_like(alone))
  parts = fixed_point.moments(pauses, bound)
  sums["moments"] = _added(rows, num_rows, jnp.broadcast_to(parts[..., None, :], (*rows.shape, parts.shape[-1])))
  if level is not None:
    correct, accuracy = _correct(method, params, batch, stopping)
    sums["difficulty"] |= {
      "pauses": _added(level, _DIFFICULTIES, fixed(pauses, bound)),
      "stopping": _added(level, _DIFFICULTIES, fixed(stopping, _SHARE)),
      "accuracy": _added(level, _DIFFICULTIES, fixed(accuracy, _SHARE)),
      "slot_accuracy": _added(level, _DIFFICULTIES, correct),
    }
  if method.decides:
    sums |= _decision_sums(reading, real, edges, thresholds)
  return sums


def _stopping_sums(reading: EvalOutput, real: Bool[Array, "B T"]) -> Sums:
  bins = (reading.log_stopping.shape[-1] - 1) * _HISTOGRAM_BINS
  found = jnp.clip((expected_pauses(reading.log_stopping) * _HISTOGRAM_BINS).astype(jnp.int32), 0, bins - 1)
  return {
    "stopping": total(jnp.exp(reading.log_stopping), real, _SHARE),
    "histogram": _added(jnp.where(real, found, bins), bins, jnp.ones_like(found)),
  }


def _decision_sums(
  reading: EvalOutput,
  real: Bool[Array, "B T"],
  edges: Float[Array, "2 K bins-1"],
  thresholds: Float[Array, "N"],
) -> Sums:
  """What d forecasts, and what is read at another threshold or under another budget."""
  scores = reading.scores
  odds, gain = _pairs(reading)
  real_steps = jnp.broadcast_to(real[..., None], odds.shape)
  steps = odds.shape[-1]
  step = jnp.where(real_steps, jnp.arange(steps), steps)
  d = jnp.exp(scores.log_dont_know[..., :-1])
  better = (scores.log_target[..., 1:] > scores.log_target[..., :-1]).astype(jnp.int32)

  def even(x: Array, low: float, high: float, bins: int) -> Array:
    return jnp.clip(((x - low) * (bins / (high - low))).astype(jnp.int32), 0, bins - 1)

  level = step * _RELIABILITY_BINS + even(d, 0.0, 1.0, _RELIABILITY_BINS)
  levels = steps * _RELIABILITY_BINS
  cell = even(d, 0.0, 1.0, _DENSITY_BINS) * _DENSITY_BINS + even(gain, -1.0, 1.0, _DENSITY_BINS)
  sums = {
    "ranks": jnp.stack([_counted(step, steps, _bins(e, x), ranks.BINS) for e, x in zip(edges, (odds, gain))]),
    "density": _counted(step, steps, cell, _DENSITY_BINS**2),
    "reliability": {
      "count": _added(level, levels, jnp.ones_like(level)),
      "decision": _added(level, levels, fixed(d, _SHARE)),
      "better": _added(level, levels, better),
    },
  }
  # A token is read at slot i under all thresholds from the lowest odds so far up to the lowest before. So the slots
  # read under a threshold are the last one, and a step back for each i whose lowest odds so far are no more than it.
  lowest = jax.lax.cummin(odds, axis=odds.ndim - 1)
  place = jnp.where(real_steps, jnp.searchsorted(thresholds, lowest), len(thresholds))
  saved = scores.log_target[..., 1:] - scores.log_target[..., :-1]
  sums["threshold"] = {
    "nats": _added(place, len(thresholds), fixed(saved, _NATS)),
    "steps": _added(place, len(thresholds), jnp.ones_like(place)),
  }

  def under(omega: Float[Array, "W"]) -> tuple[Array, Array]:
    log_stopping = log_stopping_distribution(scores.log_dont_know, scores.log_answer, omega)
    nats = -jax.nn.logsumexp(log_stopping + scores.log_target, -1)
    pauses = expected_pauses(log_stopping)
    return total(nats, real, _NATS), total(pauses, real, _pauses_bound(steps + 1))

  nats, pauses = jax.lax.map(under, jnp.asarray(_budgets(steps + 1), jnp.float32))
  sums["budget"] = {"nats": nats, "pauses": pauses}
  return sums


def _second_pass(
  method: Method,
  params: PyTree,
  edges: Float[Array, "2 K bins-1"],
  centred: Float[Array, "2 K bins"],
  deciles: Int[Array, "K bins"],
  batch: Batch,
) -> Sums:
  """Sums of ranks and of their products by group of documents, and of gains by decile of d."""
  reading = method.evaluate(params, batch)
  real, log_target = batch["weights"] > 0, reading.scores.log_target
  odds, gain = _pairs(reading)
  steps = odds.shape[-1]
  bins = _bins(edges[0], odds)
  x, y = centred[0][jnp.arange(steps), bins], centred[1][jnp.arange(steps), _bins(edges[1], gain)]
  group = jnp.where(real, batch["group"], GROUPS)
  tenth = jnp.arange(steps) * _DECILES + deciles[jnp.arange(steps), bins]
  tenth, tenths = jnp.where(real[..., None], tenth, steps * _DECILES), steps * _DECILES
  gain_nats = log_target[..., 1:] - log_target[..., :-1]
  return {
    "ranks": _added(group, GROUPS, fixed(jnp.stack([x, y, x * x, y * y, x * y], -1), _SHARE)),
    "deciles": {
      "count": _added(tenth, tenths, jnp.ones_like(tenth)),
      "decision": _added(tenth, tenths, fixed(jnp.exp(reading.scores.log_dont_know[..., :-1]), _SHARE)),
      "gain": _added(tenth, tenths, fixed(gain, _SHARE)),
      "gain_nats": _added(tenth, tenths, fixed(gain_nats, _NATS)),
      "better": _added(tenth, tenths, (gain_nats > 0).astype(jnp.int32)),
    },
  }


def _correct(
  method: Method, params: PyTree, batch: Batch, stopping: Float[Array, "B T W"]
) -> tuple[Int[Array, "B T W"], Float[Array, "B T"]]:
  """Whether each slot's most probable word is the target, 1 or 0; and how likely what is read says it."""
  hidden = method.hidden(params, batch)
  slots = jnp.broadcast_to(jnp.arange(hidden.shape[-2]), hidden.shape[1:-1])

  def row(args: tuple[Array, Array]) -> tuple[Array, Array | None]:
    hidden, targets = args
    by_slot = method.token_scores(params, hidden, slots).log_probs.argmax(-1) == targets[:, None]
    fused = method.mixture_log_probs(params, hidden)[0].argmax(-1) == targets if method.fuses else None
    return by_slot.astype(jnp.int32), fused

  # Row by row: the dense words of a batch may not fit.
  correct, fused = jax.lax.map(row, (hidden, batch["targets"]))
  return correct, (stopping * correct).sum(-1) if fused is None else fused.astype(jnp.float32)


def _bins(edges: Float[Array, "K bins-1"], x: Float[Array, "B T K"]) -> Int[Array, "B T K"]:
  return jax.vmap(functools.partial(jnp.searchsorted, side="right"), in_axes=(0, -1), out_axes=-1)(edges, x)


def _added(index: Int[Array, "*n"], size: int, values: Int[Array, "*n ..."]) -> Int[Array, "size ..."]:
  """Sums of the values by index; an index of `size` counts for nothing."""
  zeros = jnp.zeros((size, *values.shape[index.ndim :]), jnp.int32)
  return zeros.at[index].add(values, mode="drop")


def _counted(row: Int[Array, "*n"], rows: int, column: Int[Array, "*n"], columns: int) -> Int[Array, "rows columns"]:
  """How often each pair occurs; a row of `rows` counts for nothing."""
  row, column = jnp.broadcast_arrays(row, column)
  return jnp.zeros((rows, columns), jnp.int32).at[row, column].add(1, mode="drop")


# On the host: from sums to numbers.


def _pauses_bound(num_slots: int) -> float:
  return float(1 << (num_slots - 2).bit_length())


def _budgets(num_slots: int) -> np.ndarray:
  """f64[2 W - 1, W]: all of i steps, and i and i + 1 in equal shares, in between."""
  whole = np.eye(num_slots)
  between = (whole[1:] + whole[:-1]) / 2
  return np.concatenate([np.stack([whole[:-1], between], 1).reshape(-1, num_slots), whole[-1:]])


def _perplexity(sums: Sums, groups: int) -> dict[str, Any]:
  by_group = np.stack([value(sums["nats"], _NATS), sums["tokens"]], -1)
  tokens = sums["tokens"].sum()

  def of(nats: np.ndarray) -> Any:
    return np.exp(nats / tokens).tolist()

  return {
    "mixture": of(by_group[:, 0].sum()),
    "interval": bootstrap.interval(by_group[:groups], _exp_mean),
    "mean_of_logs": of(value(sums["mean_of_logs"], _NATS)),
    "oracle": of(value(sums["oracle"], _NATS)),
    "hard": of(value(sums["hard"], _NATS)) if "hard" in sums else None,
    "slots": of(value(sums["slots"], _NATS)),
  }


def _exp_mean(totals: np.ndarray) -> np.ndarray:
  # A resample may consist of groups without a token.
  with np.errstate(invalid="ignore", divide="ignore"):
    return np.exp(totals[:, 0] / totals[:, 1])


def _latency(sums: Sums, tokens: int) -> dict[str, Any]:
  mean, counts = value(sums["stopping"], _SHARE) / tokens, sums["histogram"]
  edges = np.arange(len(counts) + 1) / _HISTOGRAM_BINS
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

    row = {"difficulty": level, "count": count, "perplexity": math.exp(mean("nats", _NATS))}
    if num_slots > 1:
      row |= {
        "mean_pauses": mean("pauses", _pauses_bound(num_slots)),
        "stopping": mean("stopping", _SHARE),
        "accuracy": mean("accuracy", _SHARE),
        "slot_accuracy": (sums["slot_accuracy"][level] / count).tolist(),
      }
    rows.append(row)
  return rows


def _calibration(first: Sums, second: Sums, counts: np.ndarray, edges: np.ndarray, groups: int) -> list[dict[str, Any]]:
  """For each step; `counts` int64[K, bins] and `edges` f32[K, bins - 1] are those of the odds of d."""
  tokens = np.broadcast_to(first["tokens"][:, None, None], (*second["ranks"].shape[:2], 1))
  products = np.concatenate([tokens, value(second["ranks"], _SHARE)], -1)[:groups]
  steps = []
  for step in range(counts.shape[0]):
    coefficient = float(ranks.correlation(products[:, step].sum(0)))
    density = first["density"][step].reshape(_DENSITY_BINS, _DENSITY_BINS)
    steps.append(
      {
        "step": step + 1,
        "spearman": coefficient if math.isfinite(coefficient) else None,
        "interval": bootstrap.interval(products[:, step], ranks.correlation),
        "density": {
          "decision_edges": np.linspace(0.0, 1.0, _DENSITY_BINS + 1).tolist(),
          "gain_edges": np.linspace(-1.0, 1.0, _DENSITY_BINS + 1).tolist(),
          "counts": density.tolist(),
        },
        "reliability": _reliability(first["reliability"], step),
        "deciles": _decile_rows(second["deciles"], step, counts[step], edges[step]),
      }
    )
  return steps


def _reliability(sums: Sums, step: int) -> list[dict[str, Any]]:
  rows = []
  for level in range(_RELIABILITY_BINS):
    place = step * _RELIABILITY_BINS + level
    if count := int(sums["count"][place]):
      row = {"low": level / _RELIABILITY_BINS, "high": (level + 1) / _RELIABILITY_BINS, "count": count}
      row["decision"] = float(value(sums["decision"][place], _SHARE) / count)
      rows.append(row | {"better": float(sums["better"][place] / count)})
  return rows


def _decile_rows(sums: Sums, step: int, counts: np.ndarray, edges: np.ndarray) -> list[dict[str, Any]]:
  borders = special.expit(np.concatenate([[-np.inf], edges, [np.inf]]).astype(np.float64))
  decile, rows = ranks.deciles(counts), []
  for number in range(_DECILES):
    bins = np.flatnonzero((decile == number) & (counts > 0))
    place = step * _DECILES + number
    if count := int(sums["count"][place]):
      row = {"low": float(borders[bins[0]]), "high": float(borders[bins[-1] + 1]), "count": count}
      for name, bound in (("decision", _SHARE), ("gain", _SHARE), ("gain_nats", _NATS)):
        row[name] = float(value(sums[name][place], bound) / count)
      rows.append(row | {"better": float(sums["better"][place] / count)})
  return rows


def _threshold_curve(sums: Sums, thresholds: np.ndarray, tokens: int) -> list[dict[str, float]]:
  last, found = value(sums["slots"], _NATS)[-1], sums["threshold"]
  nats = (last + np.cumsum(value(found["nats"], _NATS))) / tokens
  pauses = len(sums["slots"]) - 1 - np.cumsum(found["steps"]) / tokens
  return [
    {"threshold": float(threshold), "mean_pauses": float(x), "perplexity": math.exp(y)}
    for threshold, x, y in zip(special.expit(thresholds.astype(np.float64)), pauses, nats)
  ]


def _budget_curve(sums: Sums, num_slots: int, tokens: int) -> list[dict[str, Any]]:
  nats = value(sums["nats"], _NATS) / tokens
  pauses = value(sums["pauses"], _pauses_bound(num_slots)) / tokens
  return [
    {
      "omega": omega.tolist(),
      "mean_steps": float(omega @ np.arange(1, num_slots + 1)),
      "mean_pauses": float(x),
      "perplexity": math.exp(y),
    }
    for omega, x, y in zip(_budgets(num_slots), pauses, nats)
  ]
