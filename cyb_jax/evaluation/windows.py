"""The windows of a split that an evaluation reads, and the batches of windows for pause statistics.

Dimensions: B batch, T tokens, C tokens before a window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from cyb_jax.configs import Config
from cyb_jax.data import TokenStore, evaluation_batches, with_segment_ids
from cyb_jax.errors import InputError
from cyb_jax.evaluation.bootstrap import GROUPS
from cyb_jax.progress import track

# The minimum number of tokens in the sample of windows that is read before the first pass.
_SAMPLE_TOKENS = 8192


def used_windows(store: TokenStore, config: Config, split: str, limit: int | None) -> tuple[int, int | None]:
  """The number of windows of a split that are used, and the limit, or None if the limit leaves no window out.

  Raises:
    InputError: the store has no such split, the split is empty, or the limit is below 1.
  """
  if limit is not None and limit < 1:
    raise InputError(f"limit: {limit} must be at least 1 window")
  if split not in store.splits:
    raise InputError(f"split: {split!r} is not in the token store of {store.path}; it has {', '.join(store.splits)}")
  windows = store.num_windows(split, config.data.sequence_length)
  if windows == 0:
    raise InputError(f"split: {split!r} of {store.path} is empty")
  if limit is None or limit >= windows:
    return windows, None
  return limit, limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatisticsWindows:
  """The windows that pause statistics read, in batches.

  Attributes:
    store: the token store.
    split: a split of the store.
    windows: the number of windows.
    limit: as `used_windows` returns it.
    length: T, the number of tokens of a window.
    batch_size: B; the last batch is padded with windows of weight 0.
    context: C, the number of tokens before each window in a batch.
    document_mask: whether batches hold `segment_ids`.
  """

  store: TokenStore
  split: str
  windows: int
  limit: int | None
  length: int
  batch_size: int
  context: int
  document_mask: bool

  @classmethod
  def of(
    cls, store: TokenStore, config: Config, split: str, limit: int | None, *, batch_size: int | None, context: int
  ) -> StatisticsWindows:
    """The windows of a split that a config's run reads.

    Args:
      store, config: the run's token store and config.
      split: a split of the store.
      limit: the maximum number of windows; None: the complete split.
      batch_size: B; None: as in training.
      context: C.

    Raises:
      InputError: the store has no such split, or the split is empty.
    """
    windows, limit = used_windows(store, config, split, limit)
    return cls(
      store=store,
      split=split,
      windows=windows,
      limit=limit,
      length=config.data.sequence_length,
      batch_size=batch_size or config.evaluation_rows,
      context=context,
      document_mask=config.data.document_mask,
    )

  @property
  def documents(self) -> int:
    """The number of documents that have a target in the windows."""
    # All targets of a document, including its end token, belong to the document.
    last = min(self.windows * self.length, self.store.num_tokens(self.split) - 1)
    return int(np.searchsorted(self._document_starts, last, side="right"))

  def batches(self) -> Iterator[dict[str, Any]]:
    """All windows in order; see `PauseStatistics.__call__` for the contents of a batch."""
    before = np.full(self.context, self.store.end_id, np.int32)
    starts = self._document_starts
    found = evaluation_batches(
      self.store, self.split, sequence_length=self.length, batch_size=self.batch_size, limit=self.limit
    )
    found = track(found, f"pause statistics of {self.split}", total=self.windows, unit="windows", size=self.batch_size)
    for first, batch in zip(range(0, self.windows, self.batch_size), found):
      stream = np.concatenate([before, batch["tokens"].ravel()])
      indices = np.arange(self.batch_size)[:, None] * self.length + np.arange(self.context)
      yield self._numbered(first + np.arange(self.batch_size), batch | {"before": stream[indices]}, starts)
      before = stream[len(stream) - self.context :]

  def sample(self) -> Iterator[dict[str, Any]]:
    """Evenly spaced windows with at least 8,192 tokens together, or all windows if they have fewer tokens."""
    count = min(self.windows, -(-_SAMPLE_TOKENS // self.length))
    spread = np.linspace(0, self.windows - 1, count).astype(np.int64)
    for first in range(0, count, self.batch_size):
      # An index after the last window gives padding of weight 0.
      indices = np.full(self.batch_size, self.store.num_windows(self.split, self.length))
      indices[: count - first] = spread[first : first + self.batch_size]
      tokens, weights = self.store.windows(self.split, indices, self.length)
      yield self._masked({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights})

  @property
  def _document_starts(self) -> np.ndarray:
    return self.store.document_starts(self.split).astype(np.int64)

  def _numbered(self, indices: np.ndarray, batch: dict[str, Any], starts: np.ndarray) -> dict[str, Any]:
    """The batch of the windows with these indices, with `group` and, if it is known, `difficulty` of each target."""
    targets = indices[:, None] * self.length + np.arange(1, self.length + 1)
    batch |= {"group": ((np.searchsorted(starts, targets, side="right") - 1) % GROUPS).astype(np.int32)}
    difficulty = self.store.difficulty(self.split, indices, self.length)
    if difficulty is not None:
      batch["difficulty"] = difficulty.astype(np.int32)
    return self._masked(batch)

  def _masked(self, batch: dict[str, Any]) -> dict[str, Any]:
    return with_segment_ids(batch, self.store.end_id) if self.document_mask else batch
