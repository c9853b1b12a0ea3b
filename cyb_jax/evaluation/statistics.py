"""Statistics of a model's pauses over a complete split: when it stops, the gain in likelihood, and after which tokens.

Ranks must be known before they can be correlated, so an adaptive method reads the split twice. A few evenly spaced
windows, which are evaluated first, give the distribution of its values (`ranks`). All sums on the devices are integers
(`fixed_point`): memory does not grow with the split, and sums do not depend on batches or devices.

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

# Fixed thresholds on the log-odds of d; quantiles of the sample's odds are used in addition.
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
    statistics: the statistics of the config's method.
    params: bare arrays.
    store: the token store; each of its windows is read once per pass, in order.
    config: sets the window's length and, by default, the batch size.
    split: 'validation', 'test' or 'train'.
    step: the training step of the parameters.
    limit: the maximum number of windows; None: the complete split.
    batch_size: the number of windows of a batch; a multiple of the number of devices that shard a batch.

  Returns:
    `method`, `step`, `split`, `limit` (None: the complete split), `windows`, and the keys of `PauseStatistics`.

  Raises:
    InputError: the store has no such split, or the split is empty.
  """
  read = StatisticsWindows.of(store, config, split, limit, batch_size=batch_size, context=statistics.context)
  logging.info("pause statistics of %s: %d windows of %d tokens", split, read.windows, read.length)
  record = {"method": config.method.name, "step": step, "split": split, "limit": read.limit, "windows": read.windows}
  return record | statistics(params, read.batches, read.sample, documents=read.documents)


class PauseStatistics:
  """Pause statistics of a method's parameters; compiles once for any number of splits.

  Args:
    method: any method; without pauses most of the record is None.
    mesh: the mesh over which batches are sharded.
    tokenizer: the tokenizer of the method's vocabulary.
    min_count: the minimum number of tokens of a type in the corners and rankings of types.

  Attributes:
    context: C, the number of tokens that are needed before a window.
  """

  def __init__(self, method: Method, mesh: Mesh, tokenizer: Tokenizer, *, min_count: int = 20):
    self.method = method
    self._table = TypeTable(tokenizer, min_count)
    self.context = self._table.context
    self._batch_sharding, everywhere = batch_sharding(mesh), replicated(mesh)
    self._decisions = jax.jit(
      functools.partial(pause_sums.decisions, method), in_shardings=(None, self._batch_sharding), out_shardings=None
    )
    # All steps of a token may add to the same threshold.
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
    """The statistics of the tokens with weight; `pause_records` documents the keys.

    Args:
      params: the method's parameters, bare arrays.
      batches: returns a new iterator over the split's batches, the same each time; see `methods.Batch`. In addition a
        batch holds `before` int[B, C], the tokens before each window, `group` i32[B, T], the number of each target's
        document modulo 1,024, and, if it is known, `difficulty` i32[B, T] of each target.
      sample: returns some of the windows, evenly spaced over the split.
      documents: the number of documents that have a target among the tokens.
    """
    method, groups = self.method, min(GROUPS, documents)
    is_paced = is_adaptive(method) and method.num_slots > 1
    edges = thresholds = None
    if is_paced:
      edges, thresholds = self._look(params, sample())
    sums = self._first(self._with_rows(batches()), params, edges, thresholds)
    if sums["not_finite"]:
      logging.warning("the loss of %d tokens is not finite: each counts as %g nats", sums["not_finite"], NATS)
    result = pause_records.of_first_pass(sums, method.num_slots, documents, groups)
    result["fused"] = isinstance(method, FusedSlots)
    if method.num_slots > 1:
      result |= self._table.records(sums, method.num_slots - 1)
    if is_paced:
      second = self._second_pass(params, batches(), sums, edges)
      result |= pause_records.of_decisions(sums, second, edges[0], thresholds, groups)
    return result

  def _look(self, params: PyTree, batches: Iterable[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The edges of the bins of (odds of d, gain) by step, f32[2, K, bins - 1]; and the thresholds, f32[N]."""
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
    """The sums of ranks, from the counts of bins in `first`."""
    counts = first["ranks"]
    centred = ranks.centred(counts).astype(np.float32)
    return self._second(self._with_rows(batches), params, edges, centred, ranks.deciles(counts[0]))

  def _put(self, batch: dict[str, Any]) -> Batch:
    return shard_batch(batch, self._batch_sharding)

  def _with_rows(self, batches: Iterable[dict[str, Any]]) -> Iterator[Batch]:
    """The batches with `rows` i32[B, T, 4], the rows of the table that count each token, instead of `before`."""
    for batch in batches:
      rows = self._table.rows(batch["before"], batch["tokens"], batch["targets"])
      yield self._put({key: array for key, array in batch.items() if key != "before"} | {"rows": rows})
