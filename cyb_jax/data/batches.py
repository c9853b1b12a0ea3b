"""Batches: batch = f(seed, step), so a run resumes at any step and on any number of hosts from these two numbers.

Letters: B batch size, T tokens of a window, n windows of an epoch, R rows that a process reads.
"""

from __future__ import annotations

import functools
import hashlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cyb_jax.data.store import TokenStore
from cyb_jax.errors import InputError

# 'tokens': int32[B, T], 'targets': int32[B, T], 'weights': float32[B, T].
Batch = dict[str, np.ndarray]

_ROUNDS = 16
# Window numbers are computed for this many steps at once: for a single step, the overhead dominates.
BLOCK_STEPS = 64


class Permutation:
  """A pseudorandom permutation of 0 .. size-1, determined by `key`; it is computed, not stored.

  A Feistel network over pairs (left, right) of numbers below about sqrt(size): each round adds a hash of one half to
  the other, which is invertible for any hash. There are slightly more pairs than `size`; a result outside the range is
  permuted again until it is inside (cycle walking), so the map remains a bijection.
  """

  def __init__(self, size: int, key: str):
    self.size = size
    self._left = math.isqrt(size - 1) + 1
    self._right = -(-size // self._left)
    digest = hashlib.shake_128(key.encode()).digest(8 * _ROUNDS)
    self._keys = np.frombuffer(digest, "<u8").astype(np.uint64)

  def __call__(self, numbers: np.ndarray) -> np.ndarray:
    """Permutes int64[...] of numbers in [0, size)."""
    permuted = self._permute_pairs(np.asarray(numbers).astype(np.uint64))
    while (outside := permuted >= self.size).any():
      permuted[outside] = self._permute_pairs(permuted[outside])
    return permuted.astype(np.int64)

  def _permute_pairs(self, numbers: np.ndarray) -> np.ndarray:
    sizes = np.uint64(self._left), np.uint64(self._right)
    halves = [numbers // sizes[1], numbers % sizes[1]]
    for number, key in enumerate(self._keys):
      turn = number % 2
      halves[turn] = (halves[turn] + _hash(halves[1 - turn] ^ key) % sizes[turn]) % sizes[turn]
    return halves[0] * sizes[1] + halves[1]


def _hash(x: np.ndarray) -> np.ndarray:
  # The finaliser of splitmix64 (Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195); products wrap.
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


class WindowOrder:
  """The order in which the windows of one store are read: an endless sequence of examples, numbered from 0.

  Example g is window `subset[order(seed, epoch)[g mod n]]` with epoch = g // n: each epoch reads every window once, in
  a new order. `subset`, the fraction of the windows that is used, does not depend on the seed, so runs with different
  seeds use the same data.

  Args:
    store: the token store, whose train split is read.
    sequence_length: T.
    seed: seed of the order.
    fraction: fraction of the windows that is used, in (0, 1]; at least one window is used.

  Attributes:
    num_windows: number of windows in the train split.
    windows_per_epoch: n, the number of windows that are used.

  Raises:
    InputError: the split is shorter than a window, or `fraction` is outside (0, 1].
  """

  def __init__(self, store: TokenStore, *, sequence_length: int, seed: int | str, fraction: float = 1.0):
    if not 0 < fraction <= 1:
      raise InputError(f"data.fraction={fraction}: give a fraction of the data in (0, 1]")
    self.num_windows = store.num_windows("train", sequence_length)
    store.require("train", sequence_length)
    self.windows_per_epoch = max(1, math.floor(fraction * self.num_windows))
    self._seed, self._subset = seed, Permutation(self.num_windows, "subset")

  def __call__(self, examples: np.ndarray) -> np.ndarray:
    """The window numbers, int64[...], of the examples with these numbers, int64[...]."""
    epochs, places = np.divmod(examples, self.windows_per_epoch)
    chosen = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
      inside = epochs == epoch
      order = Permutation(self.windows_per_epoch, f"{self._seed}:{epoch}")
      chosen[inside] = order(places[inside])
    return self._subset(chosen)


class TrainBatches:
  """The batches of a run by step number: row r of step i is example i * B + r of the store's `WindowOrder`.

  Args:
    store: the token store, whose train split is read.
    sequence_length: T.
    batch_size: B, over all hosts.
    seed: seed of the order.
    fraction: fraction of the windows that is used, in (0, 1]; at least one window is used.
    rows: int[R], the rows of each batch that this process reads; None means all rows.

  Attributes:
    num_windows: number of windows in the train split.
    windows_per_epoch: n, the number of windows that are used.
    steps_per_epoch: n / B, a float.

  Raises:
    InputError: the batch size is below 1 or exceeds an epoch, or `WindowOrder` raises it.
  """

  def __init__(
    self,
    store: TokenStore,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    fraction: float = 1.0,
    rows: np.ndarray | None = None,
  ):
    self._rows = checked_rows(batch_size, rows)
    self._order = WindowOrder(store, sequence_length=sequence_length, seed=seed, fraction=fraction)
    self.num_windows, self.windows_per_epoch = self._order.num_windows, self._order.windows_per_epoch
    self.steps_per_epoch = self.windows_per_epoch / batch_size
    if batch_size > self.windows_per_epoch:
      raise InputError(
        f"data.batch_size={batch_size}: an epoch has only {self.windows_per_epoch} windows of {sequence_length} tokens"
        " (data.fraction of the train split); give a smaller batch or window, or more text"
      )
    self._store, self._sequence_length = store, sequence_length
    self._batch_size = batch_size
    self._block = functools.lru_cache(maxsize=2)(self._windows_of_block)

  def __call__(self, step: int) -> Batch:
    """This process's rows of a step's batch."""
    return read_windows(self._store, "train", self.windows(step), self._sequence_length)

  def windows(self, step: int) -> np.ndarray:
    """int64[R]: the window numbers of this process's rows of a step's batch."""
    if step < 0:
      raise ValueError(f"step must be at least 0, not {step}")
    block, place = divmod(step, BLOCK_STEPS)
    return self._block(block)[place]

  def _windows_of_block(self, block: int) -> np.ndarray:
    steps = block * BLOCK_STEPS + np.arange(BLOCK_STEPS)
    return self._order(steps[:, None] * self._batch_size + self._rows)


def evaluation_batches(
  store: TokenStore,
  split: str,
  *,
  sequence_length: int,
  batch_size: int,
  limit: int | None = None,
  rows: np.ndarray | None = None,
) -> Iterator[Batch]:
  """The windows of a split in order, each once; the last batch is padded with rows of weight 0.

  Args:
    store: the token store.
    split: name of the split.
    sequence_length: T.
    batch_size: B, over all hosts.
    limit: read only the first `limit` windows; None means all windows.
    rows: int[R], the rows of each batch that this process reads; None means all rows.

  Raises:
    InputError: the split is unknown, or the batch size or the limit is below 1.
  """
  rows = checked_rows(batch_size, rows)
  windows = store.num_windows(split, sequence_length)
  if limit is not None and limit < 1:
    raise InputError(f"limit={limit}: give at least 1 window")
  used = windows if limit is None else min(limit, windows)

  def batches():
    for first in range(0, used, batch_size):
      indices = first + rows
      # The window after the last one consists of padding only.
      yield read_windows(store, split, np.where(indices < used, indices, windows), sequence_length)

  return batches()


def with_segment_ids(batch: Batch, end_id: int) -> Batch:
  """The batch with `segment_ids`, int32[B, T]: each token's document number in its row; see `pauses.document_ids`."""
  return batch | {"segment_ids": np.cumsum(batch["tokens"] == end_id, axis=-1, dtype=np.int32)}


def checked_rows(batch_size: int, rows: np.ndarray | None) -> np.ndarray:
  """The rows of each batch that a process reads, int64[R]; None means all rows.

  Raises:
    InputError: the batch size is below 1.
  """
  if batch_size < 1:
    raise InputError(f"data.batch_size={batch_size}: give at least 1")
  rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
  if not ((rows >= 0) & (rows < batch_size)).all():
    raise ValueError(f"rows must be numbers from 0 to {batch_size - 1}, not {rows}")
  return rows


def read_windows(store: TokenStore, split: str, indices: np.ndarray, sequence_length: int) -> Batch:
  """The batch that consists of the windows with these numbers; see `TokenStore.windows`."""
  tokens, weights = store.windows(split, indices, sequence_length)
  return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


class Prefetch:
  """Prefetches batches in a thread: an iterator, and a context manager that ends the thread.

      with Prefetch(batches, start=step) as ahead:
        batch = next(ahead)

  Args:
    read: maps a step to its batch; for example, a `TrainBatches`.
    start: the first step.
    stop: the first step that is not read; None means that the iterator never ends.
    depth: the number of batches that are read ahead.

  Attributes:
    waited: total seconds that the consumer has spent waiting for batches.
  """

  def __init__(self, read: Callable[[int], Any], start: int = 0, stop: int | None = None, *, depth: int = 2):
    self.waited = 0.0
    self._ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._run, args=(read, start, stop), name="cyb-prefetch", daemon=True)
    self._thread.start()

  def __iter__(self) -> Prefetch:
    return self

  def __next__(self) -> Any:
    """The next step's batch; an error in `read` is raised here, at the step at which it occurred."""
    if self._closed.is_set():
      raise StopIteration
    start = time.perf_counter()
    batch, error = self._ready.get()
    self.waited += time.perf_counter() - start
    if error is not None:
      self.close()
      raise error
    return batch

  def close(self) -> None:
    """Ends the thread; a second call does nothing."""
    self._closed.set()
    while not self._ready.empty():  # the thread may be waiting for a free slot in the queue
      self._ready.get_nowait()
    self._thread.join()

  def __enter__(self) -> Prefetch:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _run(self, read, start: int, stop: int | None) -> None:
    step = start
    while not self._closed.is_set():
      try:
        item = (None, StopIteration()) if step == stop else (read(step), None)
      except BaseException as error:  # re-raised in the consumer
        item = None, error
      self._put(item)
      if item[1] is not None:
        return
      step += 1

  def _put(self, item) -> None:
    while not self._closed.is_set():
      try:
        return self._ready.put(item, timeout=0.1)
      except queue.Full:
        continue
