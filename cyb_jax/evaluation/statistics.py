"""What a model's pauses do, over a whole split: when it stops, what that is worth, and after which tokens.

Ranks must be known before they can be correlated, so an adaptive method passes over the split twice; a few evenly
spaced windows, which are evaluated first, show where its values crowd (`ranks`). Everything is summed on the devices in
whole numbers (`fixed_point`): memory does not grow with the split, and neither batching nor devices change a sum.

Dimensions: B batch, T tokens, W slots, K = W - 1 pauses, V vocabulary, G groups of documents, C tokens before a window.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import PyTree

from cyb_jax.configs import Config
from cyb_jax.data import Tokenizer, TokenStore
from cyb_jax.evaluation import pause_records, pause_sums, ranks
from cyb_jax.evaluation.abilities import is_adaptive
from cyb_jax.evaluation.accumulation import Accumulator, Sums
from cyb_jax.evaluation.bootstrap import GROUPS
from cyb_jax.evaluation.pause_sums import NATS
from cyb_jax.evaluation.type_table import TypeTable
from cyb_jax.evaluation.windows import StatisticsWindows
from cyb_jax.methods import Batch, FusedSlots, Method
from cyb_jax.partitioning.mesh import batch_sharding, replicated, shard_batch

# Thresholds on the odds of d that are tried whatever d is; quantiles of the sample's odds are tried in addition.
_THRESHOLDS = np.arange(-16, 17) / 2
_THRESHOLD_QUANTILES = 64


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
    store: each of its windows is read once a pass, in order.
    config: gives the window's length and, by default, the batch size.
    split: 'validation', 'test' or 'train'.
    step: the training step of the parameters.
    limit: at most so many windows; None: the whole split.
    batch_size: windows at a time; a multiple of the devices that the batch is spread over.

  Returns:
    `method`, `step`, `split`, `limit` (None: the whole split), `windows`, and what `PauseStatistics` returns.

  Raises:
    InputError: the store has no such split, or the split is empty.
  """
  read = StatisticsWindows.of(store, config, split, limit, batch_size=batch_size, context=statistics.context)
  logging.info("pause statistics of %s: %d windows of %d tokens", split, read.windows, read.length)
  record = {"method": config.method.name, "step": step, "split": split, "limit": read.limit, "windows": read.windows}
  return record | statistics(params, read.batches, read.sample, documents=read.documents)


class PauseStatistics:
  """Pause statistics of a method's parameters; compiled once, used for any number of splits.

  Args:
    method: any; of a method without pauses most of the record is None.
    mesh: the batch is spread over it.
    tokenizer: of the method's vocabulary.
    min_count: types of fewer tokens are not among those that stand out.

  Attributes:
    context: C, how many tokens before a window are needed.
  """

  def __init__(self, method: Method, mesh: Mesh, tokenizer: Tokenizer, *, min_count: int = 20):
    self.method = method
    self._table = TypeTable(tokenizer, min_count)
    self.context = self._table.context
    self._batch_sharding, everywhere = batch_sharding(mesh), replicated(mesh)
    self._decisions = jax.jit(
      functools.partial(pause_sums.decisions, method), in_shardings=(None, self._batch_sharding), out_shardings=None
    )
    # All steps of a token may fall to one threshold.
    most = max(method.num_slots - 1, 1)
    first_pass = functools.partial(pause_sums.first_pass, method, self._table.num_rows)
    self._first = Accumulator(first_pass, everywhere, most)
    self._second = Accumulator(functools.partial(pause_sums.second_pass, method), everywhere, most)

  def __call__(
    self,
    params: PyTree,
    batches: Callable[[], Iterable[dict[str, Any]]],
    sample: Callable[[], Iterable[dict[str, Any]]],
    *,
    documents: int,
  ) -> dict[str, Any]:
    """The statistics of the tokens of weight; `pause_records` lists what they are.

    Args:
      params: of the method, bare arrays.
      batches: begins the split's batches anew, the same each time; see `methods.Batch`. In addition they hold `before`
        int[B, C], the tokens before each window, `group` i32[B, T], the number of each target's document modulo 1,024,
        and where it is known `difficulty` i32[B, T] of each target.
      sample: some of the windows, from all over the split.
      documents: how many have a target among the tokens.
    """
    method, groups = self.method, min(GROUPS, documents)
    is_paced = is_adaptive(method) and method.num_slots > 1
    edges = thresholds = None
    if is_paced:
      edges, thresholds = self._look(params, sample())
    sums = self._first(self._with_rows(batches()), params, edges, thresholds)
    if sums["not_finite"]:
      logging.warning("the loss of %d tokens isn't finite: each counts as %g nats", sums["not_finite"], NATS)
    result = pause_records.of_first_pass(sums, method.num_slots, documents, groups)
    result["fused"] = isinstance(method, FusedSlots)
    if method.num_slots > 1:
      result |= self._table.records(sums, method.num_slots - 1)
    if is_paced:
      second = self._second_pass(params, batches(), sums, edges)
      result |= pause_records.of_decisions(sums, second, edges[0], thresholds, groups)
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

  def _second_pass(self, params: PyTree, batches: Iterable[dict[str, Any]], first: Sums, edges: np.ndarray) -> Sums:
    """Sums of ranks, whose bins `first` has counted."""
    counts = first["ranks"]
    centred = ranks.centred(counts).astype(np.float32)
    return self._second(self._with_rows(batches), params, edges, centred, ranks.deciles(counts[0]))

  def _put(self, batch: dict[str, Any]) -> Batch:
    return shard_batch(batch, self._batch_sharding)

  def _with_rows(self, batches: Iterable[dict[str, Any]]) -> Iterator[Batch]:
    """The batches with `rows` i32[B, T, 4], the rows of the table that count each token, in place of `before`."""
    for batch in batches:
      rows = self._table.rows(batch["before"], batch["tokens"], batch["targets"])
      yield self._put({key: array for key, array in batch.items() if key != "before"} | {"rows": rows})
