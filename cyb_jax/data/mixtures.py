"""Mixtures: several token stores, read by weight in training and one after the other in evaluation.

A mixture is a folder like a token store, with a store.json that describes its sources in place of shards, the tokenizer
that all of them have, and sources.json with the paths of their stores, which its fingerprint does not cover.

Of every M consecutive examples of a run, each source has the number that its weight asks for, in an order by the seed.
M is the smallest number up to 10,000 of which all weights are whole shares, or 10,000 with rounded shares. The number
of a source's examples before a given one is therefore a formula, and batch = f(seed, step) as for one store.

In evaluation the splits of the sources are one stream, so that all tokens of all sources count equally.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from etils import epath

from cyb_jax.data import preparation, task_tokenizer, tasks, tokenizers
from cyb_jax.data import store as stores
from cyb_jax.data.batches import BLOCK_STEPS, Batch, Permutation, WindowOrder, checked_rows
from cyb_jax.data.store import TokenStore
from cyb_jax.data.tokenizers.description import DESCRIPTION_FILE
from cyb_jax.errors import InputError
from cyb_jax.option_syntax import Item
from cyb_jax.storage import absolute, streams

_SOURCES = "sources.json"
# The largest M; smaller shares than 1 / M are refused.
_LARGEST_PERIOD = 10_000
# Counts that add up over the sources of a mixture.
_COUNTS = ("documents", "bytes", "duplicates_dropped")


@dataclasses.dataclass(frozen=True)
class Source:
  """One source of a mixture.

  Attributes:
    name: unique in the mixture.
    weight: its share of the examples in training, in (0, 1].
    store: its tokens.
  """

  name: str
  weight: float
  store: TokenStore


class MixtureStore(TokenStore):
  """The token stores of a mixture as one; see `TokenStore`.

  Each split is the streams of its sources joined: the end token that begins a later stream is the one that ends the
  stream before.

  Attributes:
    sources: in the mixture's order.
  """

  def __init__(self, path: Path, description: dict[str, Any], sources: Sequence[Source]):
    """Use `open_token_store`."""
    super().__init__(path, description)
    self.sources = tuple(sources)

  def source(self, name: str) -> TokenStore:
    """The store of a source.

    Raises:
      InputError: there is no such source.
    """
    for source in self.sources:
      if source.name == name:
        return source.store
    raise InputError(f"source={name!r}: the mixture has {', '.join(source.name for source in self.sources)}")

  def has_annotation(self, split: str, kind: str) -> bool:
    return any(store.has_annotation(split, kind) for store in self._with(split))

  def document_starts(self, split: str) -> np.ndarray:
    joined = self._with(split)
    offsets = np.cumsum([0, *(store.num_tokens(split) - 1 for store in joined)])
    parts = (store.document_starts(split) + np.uint64(offset) for store, offset in zip(joined, offsets))
    return np.concatenate(list(parts))

  def _with(self, split: str) -> list[TokenStore]:
    """The stores that have a split."""
    self._split(split)
    return [source.store for source in self.sources if split in source.store.splits]

  def _open_maps(self, split: str, kind: str) -> tuple[list[np.ndarray], np.ndarray]:
    maps: list[np.ndarray] = []
    for number, store in enumerate(self._with(split)):
      if kind == "tokens" or store.has_annotation(split, kind):
        parts = list(store.maps(split, kind)[0])
      else:
        # Every token of a store without weights is learnt; without difficulties, none is known.
        parts = [np.broadcast_to(np.uint8(kind == "weights"), (store.num_tokens(split),))]
      if number:
        parts[0] = parts[0][1:]
      maps += parts
    return maps, np.cumsum([0, *map(len, maps)])


def open_token_store(path: str | os.PathLike, *, verify: bool | Literal["auto"] = "auto") -> TokenStore:
  """Opens the store of a task, or that of a mixture with all its sources.

  Args:
    path: its folder, see `TokenStore.open`.
    verify: see `TokenStore.open`.

  Raises:
    InputError, StorageError: see `TokenStore.open`; a source of a mixture is missing, or another store is in its place.
  """
  description = stores.read_description(path)
  if "mixture" not in description:
    return TokenStore.open(path, verify=verify)
  path = Path(path)
  if tokenizers.load(path).describe() != description["tokenizer"]:
    raise InputError(f"data.store: {path} holds another tokenizer than it was prepared with; prepare it again")
  places = streams.read_json(epath.Path(path / _SOURCES)) or {}
  sources = []
  for entry in description["mixture"]:
    place = places.get(entry["name"], "")
    if not place or not stores.is_store(place):
      raise InputError(
        f"data.store: {path}: its source {entry['name']!r} is not in {place!r}; prepare the mixture again"
      )
    store = open_token_store(place, verify=verify)
    if store.fingerprint != entry["fingerprint"]:
      raise InputError(
        f"data.store: {path}: {place} holds another store than the source {entry['name']!r} that the mixture was"
        " prepared with; prepare the mixture again"
      )
    sources.append(Source(entry["name"], entry["weight"], store))
  return MixtureStore(path, description, sources)


def prepare_mixture(
  items: Sequence[Item],
  tokenizer: str,
  output: str | os.PathLike | None = None,
  *,
  limit: int | None = None,
  progress: bool = True,
  workers: int = 1,
  write: bool = True,
) -> MixtureStore | None:
  """Prepares the sources of a mixture that are not prepared yet, and writes the mixture's folder.

  Args:
    items: its sources: tasks with their options, or folders of token stores.
    tokenizer: as for `preparation.prepare`; 'sentencepiece:N' is trained on text of all tasks by their weights. Sources
      that are token stores must have been prepared with it.
    output: the mixture's folder on a local disk; None: one in the user's cache folder.
    limit, progress, workers: as for `preparation.prepare`, for each source that is a task.
    write: False: nothing is written, and the result is None if anything is missing.

  Raises:
    InputError: an unknown source, stores of another tokenizer, or what `preparation.prepare` raises.
  """
  names = _unique_names(items)
  opened: dict[int, TokenStore] = {}
  for number, item in enumerate(items):
    with _of_source(names[number]):
      if _is_folder(item):
        opened[number] = open_token_store(absolute(item.name))
  spec = _tokenizer_of(list(opened.values()), tokenizer) if opened else tokenizer
  if not opened and tokenizers.trained_pieces(spec):
    found = _trained(items, spec, limit, write=write)
    if found is None:
      return None
    spec = found
  for number, item in enumerate(items):
    if number not in opened:
      with _of_source(names[number]):
        prepared = preparation.prepare(
          item.name, spec, options=item.options, limit=limit, progress=progress, workers=workers, write=write
        )
      if prepared is None:
        return None
      opened[number] = prepared
  total = sum(item.weight for item in items)
  sources = [Source(name, item.weight / total, opened[number]) for number, (name, item) in enumerate(zip(names, items))]
  period([source.weight for source in sources])
  description = _described(sources)
  default = stores.default_cache() / "stores" / f"mixture-{description['fingerprint'][:16]}"
  path = Path(absolute(output)) if output else default
  if write:
    _write(path, description, sources)
  return MixtureStore(path, description, sources)


def check_sources(items: Sequence[Item]) -> None:
  """Checks that every source is a known task with known options, or the folder of a store; nothing is read.

  Raises:
    InputError: one is not.
  """
  for name, item in zip(_unique_names(items), items):
    with _of_source(name):
      if not _is_folder(item):
        tasks.settle_options(item.name, item.options)


@contextlib.contextmanager
def _of_source(name: str) -> Iterator[None]:
  """Names the source of a mixture in the InputErrors of the block."""
  try:
    yield
  except InputError as error:
    raise InputError(f"data.mixture: source {name!r}: {error}") from error


def _is_folder(item: Item) -> bool:
  """Whether a source is the folder of a token store.

  Raises:
    InputError: the name is a path, and no token store is there; or a store has options.
  """
  if item.name in tasks.TASKS or item.name.startswith("seqio:"):
    return False
  if stores.is_store(absolute(item.name)):
    if item.options:
      raise InputError(f"{item.name!r} is a token store, which has no options; give its name alone")
    if "mixture" in stores.read_description(absolute(item.name)):
      raise InputError(f"{item.name!r} is a mixture; name its sources, with the weights that they shall have")
    return True
  if os.sep in item.name:
    raise InputError(f"there is no token store in {item.name!r}; prepare one with cyb-prepare")
  return False


def _unique_names(items: Sequence[Item]) -> list[str]:
  """A short name for each source: that of its task or folder, with a number where several have the same."""
  names: list[str] = []
  for item in items:
    base = re.sub(r"[^\w.-]+", "_", os.path.basename(item.name.rstrip("/")))
    count = sum(re.fullmatch(rf"{re.escape(base)}(-\d+)?", name) is not None for name in names)
    names.append(f"{base}-{count + 1}" if count else base)
  return names


def _tokenizer_of(opened: Sequence[TokenStore], spec: str) -> str:
  """The path of the tokenizer that all these stores have.

  Args:
    opened: at least one.
    spec: the tokenizer that is asked for.

  Raises:
    InputError: a store has another tokenizer.
  """
  wanted = None
  if not tokenizers.trained_pieces(spec):
    wanted = tokenizers.open_tokenizer(spec).describe()["sha256"]
  first = opened[0]
  for store in opened:
    found = store.description
    if found["tokenizer"] != first.description["tokenizer"]:
      raise InputError(
        f"data.mixture: the token stores {first.path} and {store.path} have different tokenizers; prepare them with the"
        " same one"
      )
    if spec != found["tokenizer_from"] and wanted != found["tokenizer"]["sha256"]:
      raise InputError(
        f"data.tokenizer: {spec!r}, but the token store {store.path} of data.mixture was made with"
        f" {found['tokenizer_from'][:24]}; give that tokenizer, or another store"
      )
  return os.fspath(first.path)


def _trained(items: Sequence[Item], spec: str, limit: int | None, *, write: bool) -> str | None:
  """The folder of the tokenizer that is trained on text of all sources by their weights; None: there is none yet."""
  opened = []
  for name, item in zip(_unique_names(items), items):
    with _of_source(name):
      opened.append(tasks.open_task(item.name, item.options))
  made_of = [[task.name, task.options, task.identity, item.weight] for task, item in zip(opened, items)]
  folder = stores.default_cache() / "tokenizers" / f"{spec.replace(':', '-')}-{stores.digest([made_of, limit])[:16]}"
  if (folder / DESCRIPTION_FILE).is_file():
    return os.fspath(folder)
  if not write:
    return None
  trained = task_tokenizer.train_on_tasks(
    [(task, item.weight) for task, item in zip(opened, items)], tokenizers.trained_pieces(spec), limit
  )
  folder.mkdir(parents=True, exist_ok=True)
  with streams.scratch_folder(epath.Path(folder)) as scratch:
    trained.save(scratch)
    for name in tokenizers.files(trained.describe()):  # the description last
      streams.write(epath.Path(folder / name), (scratch / name).read_bytes())
  return os.fspath(folder)


def _described(sources: Sequence[Source]) -> dict[str, Any]:
  """The content of the mixture's store.json."""
  entries = [
    {"name": source.name, "weight": source.weight, "fingerprint": source.store.fingerprint} for source in sources
  ]
  first = sources[0].store
  splits = {}
  for split in sorted({name for s in sources for name in s.store.splits}, key=lambda name: (name != "train", name)):
    having = [source.store for source in sources if split in source.store.splits]
    counts = {name: sum(store.description["splits"][split][name] for store in having) for name in _COUNTS}
    counts["tokens"] = 1 + sum(store.num_tokens(split) - 1 for store in having)
    if any(store.has_weights(split) for store in having):
      counts["weighted_tokens"] = sum(store.num_targets(split) for store in having)
      counts["weighted_bytes"] = sum(store.num_bytes(split) for store in having)
    splits[split] = counts | {"shards": []}
  description = {
    "format": stores.FORMAT,
    "task": "+".join(source.name for source in sources),
    "options": {},
    "tokenizer_from": first.description["tokenizer_from"],
    "tokenizer": first.description["tokenizer"],
    "mixture": entries,
    "splits": splits,
  }
  return description | {"fingerprint": stores.fingerprint(description)}


def _write(path: Path, description: Mapping[str, Any], sources: Sequence[Source]) -> None:
  """Writes the mixture's folder, unless it is there; the description last, without which there is no store."""
  places = {source.name: os.fspath(source.store.path) for source in sources}
  if stores.is_store(path):
    found = stores.read_description(path)
    if found["fingerprint"] != description["fingerprint"]:
      raise InputError(f"output={os.fspath(path)!r}: it holds another store; give another folder, or remove it")
    if streams.read_json(epath.Path(path / _SOURCES)) == places:
      return
  elif path.exists() and any(path.iterdir()):
    raise InputError(f"output={os.fspath(path)!r}: it exists and is no token store; give another folder")
  path.mkdir(parents=True, exist_ok=True)
  first = sources[0].store
  for name in tokenizers.files(description["tokenizer"]):
    streams.write(epath.Path(path / name), (first.path / name).read_bytes())
  streams.write_json(epath.Path(path / _SOURCES), places)
  streams.write_json(epath.Path(path / stores.DESCRIPTION), dict(description))


def period(weights: Sequence[float]) -> list[int]:
  """How many of M examples are of each source; M is the sum of the result.

  Args:
    weights: shares that sum to 1.

  Raises:
    InputError: a share is too small.

  Example:
    >>> period([0.7, 0.3])
    [7, 3]
  """
  for size in range(1, _LARGEST_PERIOD + 1):
    counts = np.rint(np.multiply(weights, size))
    if np.abs(np.multiply(weights, size) - counts).max() < 1e-9 * size and counts.sum() == size:
      break
  else:
    # The largest remainders get the examples that rounding down leaves.
    size = _LARGEST_PERIOD
    exact = np.multiply(weights, size)
    counts = np.floor(exact)
    counts[np.argsort(counts - exact, kind="stable")[: size - int(counts.sum())]] += 1
  if counts.min() < 1:
    raise InputError(
      f"data.mixture: a source has the share {min(weights):.2g} of the examples; give at least 1 / {_LARGEST_PERIOD},"
      " or leave it out"
    )
  return [int(count) for count in counts]


class MixtureBatches:
  """The batches of a run over a mixture, by step number; see `batches.TrainBatches`.

  Args:
    store, sequence_length, batch_size, seed, fraction, rows: as for `TrainBatches`; `fraction` is of each source.

  Attributes:
    windows_per_epoch: windows of all sources together. A source is read again when its own windows have all been read.
    steps_per_epoch: windows_per_epoch / B.
  """

  def __init__(
    self,
    store: MixtureStore,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    fraction: float = 1.0,
    rows: np.ndarray | None = None,
  ):
    self._rows = checked_rows(batch_size, rows)
    self._store, self._sequence_length, self._batch_size, self._seed = store, sequence_length, batch_size, seed
    self._counts = np.array(period([source.weight for source in store.sources]))
    self._period = int(self._counts.sum())
    self._orders = [self._order(source, fraction) for source in store.sources]
    self.windows_per_epoch = sum(order.windows_per_epoch for order in self._orders)
    self.steps_per_epoch = self.windows_per_epoch / batch_size
    self._pattern = functools.lru_cache(maxsize=4)(self._pattern_of)
    self._block = functools.lru_cache(maxsize=2)(self._windows_of_block)

  def _order(self, source: Source, fraction: float) -> WindowOrder:
    """The order of a source's windows.

    Raises:
      InputError: its train split is shorter than a window, or has fewer windows than its share of a batch.
    """
    with _of_source(source.name):
      order = WindowOrder(
        source.store, sequence_length=self._sequence_length, seed=f"{self._seed}:{source.name}", fraction=fraction
      )
      share = source.weight * self._batch_size
      if order.windows_per_epoch < int(share):
        raise InputError(
          f"data.batch_size={self._batch_size}: about {share:.0f} examples of each batch are of it, and it has only"
          f" {order.windows_per_epoch} windows of {self._sequence_length} tokens; give it a smaller weight or more text"
        )
      return order

  def __call__(self, step: int) -> Batch:
    """The rows of a step's batch."""
    sources, windows = self.windows(step)
    rows, length = len(windows), self._sequence_length
    tokens, weights = np.empty((rows, length + 1), np.int32), np.empty((rows, length), np.float32)
    for number, source in enumerate(self._store.sources):
      of = sources == number
      if of.any():
        tokens[of], weights[of] = source.store.windows("train", windows[of], length)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}

  def windows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64[R], int64[R]): source and window in the rows of a step's batch."""
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
      of = sources == number
      windows[of] = order(examples[of])
    return sources, windows

  def read_windows(self, step: int) -> dict[str, int]:
    """How many windows of each source the first `step` steps read, over all hosts."""
    repetitions, rest = divmod(step * self._batch_size, self._period)
    inside, _ = self._pattern(repetitions)
    counts = repetitions * self._counts + np.bincount(inside[:rest], minlength=len(self._counts))
    return {source.name: int(count) for source, count in zip(self._store.sources, counts)}

  def epochs(self, step: int) -> dict[str, float]:
    """How often the first `step` steps read each source."""
    read = self.read_windows(step)
    return {name: read[name] / order.windows_per_epoch for name, order in zip(read, self._orders)}

  def _examples(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(source, number of the example in its source) of examples of the mixture, each int64[...]."""
    repetitions, places = np.divmod(examples, self._period)
    sources, ranks = np.empty_like(places), np.empty_like(places)
    for repetition in np.unique(repetitions).tolist():
      of = repetitions == repetition
      sources[of], ranks[of] = (values[places[of]] for values in self._pattern(repetition))
    return sources, repetitions * self._counts[sources] + ranks

  def _pattern_of(self, repetition: int) -> tuple[np.ndarray, np.ndarray]:
    """The sources of M examples, and how many examples of the same source are before each of them; each int64[M].

    The examples of a source are numbered in the order in which they are read, so that any epoch of it has each window
    once.
    """
    shuffled = Permutation(self._period, f"mixture:{self._seed}:{repetition}")(np.arange(self._period))
    sources = np.searchsorted(np.cumsum(self._counts), shuffled, side="right")
    ranks = np.empty_like(sources)
    for number, count in enumerate(self._counts):
      ranks[sources == number] = np.arange(count)
    return sources, ranks
