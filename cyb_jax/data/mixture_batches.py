"""The batches of a mixture: they determine which source each example of a run is read from.

Among every M consecutive examples of a run, the number of a source's examples is M times its weight, and the seed
determines their order. M is the smallest number from 256 to 10,000 for which all these products are integers; if there
is none, M is 10,000 and the products are rounded. The number of a source's examples before a given example therefore
has a closed form, and batch = f(seed, step), as for a single store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from cyb_jax.data.batches import BLOCK_STEPS, Batch, Permutation, WindowOrder, checked_rows
from cyb_jax.data.store import TokenStore
from cyb_jax.errors import InputError

# The largest M; weights below 1 / M are rejected.
_LARGEST_PERIOD = 10_000
# The smallest M: every M examples need a new permutation, and computing it takes longer than reading it.
_SMALLEST_PERIOD = 256


@dataclasses.dataclass(frozen=True)
class Source:
  """One source of a mixture.

  Attributes:
    name: its name, unique in the mixture.
    weight: its fraction of the examples in training, in (0, 1].
    store: its token store.
  """

  name: str
  weight: float
  store: TokenStore


@contextlib.contextmanager
def of_source(name: str) -> Iterator[None]:
  """Adds the name of a mixture's source to every InputError that the `with` block raises."""
  try:
    yield
  except InputError as error:
    raise InputError(f"data.mixture: source {name!r}: {error}") from error


def period(weights: Sequence[float]) -> list[int]:
  """The number of each source's examples among M examples; M is the sum of the result.

  Args:
    weights: the sources' weights, which sum to 1.

  Raises:
    InputError: a weight is too small.

  Example:
    >>> period([0.7, 0.3])
    [182, 78]
  """
  for size in range(_SMALLEST_PERIOD, _LARGEST_PERIOD + 1):
    counts = np.rint(np.multiply(weights, size))
    if np.abs(np.multiply(weights, size) - counts).max() < 1e-9 * size and counts.sum() == size:
      break
  else:
    # The examples that remain after rounding down go to the sources with the largest remainders.
    size = _LARGEST_PERIOD
    exact = np.multiply(weights, size)
    counts = np.floor(exact)
    counts[np.argsort(counts - exact, kind="stable")[: size - int(counts.sum())]] += 1
  if counts.min() < 1:
    raise InputError(
      f"data.mixture: a source has the relative weight {min(weights):.2g}; give at least 1 / {_LARGEST_PERIOD}, or"
      " leave the source out"
    )
  return [int(count) for count in counts]


class MixtureBatches:
  """The batches of a run over a mixture, by step number; see `batches.TrainBatches`.

  Args:
    sources: the sources of the mixture, in order.
    sequence_length, batch_size, seed, fraction, rows: as for `TrainBatches`; `fraction` applies to each source.

  Attributes:
    windows_per_epoch: total number of windows of all sources. A source is read again when all of its own windows have
      been read.
    steps_per_epoch: windows_per_epoch / B.
  """

  def __init__(
    self,
    sources: Sequence[Source],
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    fraction: float = 1.0,
    rows: np.ndarray | None = None,
  ):
    self._rows = checked_rows(batch_size, rows)
    self._sources, self._sequence_length, self._batch_size, self._seed = sources, sequence_length, batch_size, seed
    self._counts = np.array(period([source.weight for source in sources]))
    self._period = int(self._counts.sum())
    self._orders = [self._order(source, fraction) for source in sources]
    self.windows_per_epoch = sum(order.windows_per_epoch for order in self._orders)
    self.steps_per_epoch = self.windows_per_epoch / batch_size
    self._pattern = functools.lru_cache(maxsize=4)(self._pattern_of)
    self._block = functools.lru_cache(maxsize=2)(self._windows_of_block)

  def _order(self, source: Source, fraction: float) -> WindowOrder:
    """The order of a source's windows.

    Raises:
      InputError: the source's train split is shorter than a window, or has fewer windows than a batch reads from it.
    """
    with of_source(source.name):
      order = WindowOrder(
        source.store, sequence_length=self._sequence_length, seed=f"{self._seed}:{source.name}", fraction=fraction
      )
      share = source.weight * self._batch_size
      if order.windows_per_epoch < int(share):
        raise InputError(
          f"data.batch_size={self._batch_size}: each batch reads about {share:.0f} examples from this source, which has"
          f" only {order.windows_per_epoch} windows of {self._sequence_length} tokens; give it a smaller weight or more"
          " text"
        )
      return order

  def __call__(self, step: int) -> Batch:
    """This process's rows of a step's batch."""
    sources, windows = self.windows(step)
    rows, length = len(windows), self._sequence_length
    tokens, weights = np.empty((rows, length + 1), np.int32), np.empty((rows, length), np.float32)
    for number, source in enumerate(self._sources):
      mask = sources == number
      if mask.any():
        tokens[mask], weights[mask] = source.store.windows("train", windows[mask], length)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}

  def windows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64[R], int64[R]): the sources and the window numbers of this process's rows of a step's batch."""
    if step < 0:
      raise ValueError(f"step must be at least 0, not {step}")
    block, place = divmod(step, BLOCK_STEPS)
    sources, windows = self._block(block)
    return sources[place], windows[place]

  def _windows_of_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
    steps = block * BLOCK_STEPS + np.arange(BLOCK_STEPS)
    sources, examples = self._examples(steps[:, None] * self._batch_size + self._rows)
    windows = np.empty_like(examples)
    for number, order in enumerate(self._orders):
      mask = sources == number
      windows[mask] = order(examples[mask])
    return sources, windows

  def read_windows(self, step: int) -> dict[str, int]:
    """The number of windows of each source that the first `step` steps read, over all hosts."""
    repetitions, rest = divmod(step * self._batch_size, self._period)
    inside, _ = self._pattern(repetitions)
    counts = repetitions * self._counts + np.bincount(inside[:rest], minlength=len(self._counts))
    return {source.name: int(count) for source, count in zip(self._sources, counts)}

  def epochs(self, step: int) -> dict[str, float]:
    """The number of epochs of each source that the first `step` steps read."""
    read = self.read_windows(step)
    return {name: read[name] / order.windows_per_epoch for name, order in zip(read, self._orders)}

  def _examples(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(source, example number in that source) of the mixture's examples with these numbers, each int64[...]."""
    repetitions, places = np.divmod(examples, self._period)
    sources, ranks = np.empty_like(places), np.empty_like(places)
    for repetition in np.unique(repetitions).tolist():
      mask = repetitions == repetition
      sources[mask], ranks[mask] = (values[places[mask]] for values in self._pattern(repetition))
    return sources, repetitions * self._counts[sources] + ranks

  def _pattern_of(self, repetition: int) -> tuple[np.ndarray, np.ndarray]:
    """The sources of M examples, and the number of earlier examples of the same source; each int64[M].

    The examples of a source are numbered in the order in which they are read, so each epoch of the source contains each
    of its windows once.
    """
    shuffled = Permutation(self._period, f"mixture:{self._seed}:{repetition}")(np.arange(self._period))
    sources = np.searchsorted(np.cumsum(self._counts), shuffled, side="right")
    ranks = np.empty_like(sources)
    for number, count in enumerate(self._counts):
      ranks[sources == number] = np.arange(count)
    return sources, ranks
