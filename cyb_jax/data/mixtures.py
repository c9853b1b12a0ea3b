"""Mixtures: several token stores, sampled by weight in training and read one after the other in evaluation.

A mixture is a folder that resembles a token store. Its store.json describes sources instead of shards, it contains the
tokenizer that all sources share, and sources.json has the paths of the sources' stores. The fingerprint does not cover
sources.json.

In training, `mixture_batches` reads the sources. In evaluation, a split is the concatenation of the sources' splits,
so all tokens of all sources have equal weight.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from etils import epath

from cyb_jax.data import preparation, task_tokenizer, tasks, tokenizers
from cyb_jax.data import store as stores
from cyb_jax.data.mixture_batches import Source, of_source, period
from cyb_jax.data.store import TokenStore
from cyb_jax.data.tokenizers.description import DESCRIPTION_FILE
from cyb_jax.errors import InputError, shown
from cyb_jax.option_syntax import Item
from cyb_jax.storage import absolute, streams, user_cache

_SOURCES = "sources.json"
# Counts that add up over the sources of a mixture.
_COUNTS = ("documents", "bytes", "duplicates_dropped")


class MixtureStore(TokenStore):
  """The token stores of a mixture as a single store; see `TokenStore`.

  A split concatenates the streams of its sources. The end token that closes one stream is also the end token with which
  the next stream begins.

  Attributes:
    sources: the sources in the mixture's order.
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
        # In a store without weights, every token has weight 1. Difficulty 0 means unknown.
        parts = [np.broadcast_to(np.uint8(kind == "weights"), (store.num_tokens(split),))]
      if number:
        parts[0] = parts[0][1:]
      maps += parts
    return maps, np.cumsum([0, *map(len, maps)])


def open_token_store(path: str | os.PathLike, *, verify: bool | Literal["auto"] = "auto") -> TokenStore:
  """Opens the store of a task, or the store of a mixture with all its sources.

  Args:
    path: the store's folder; see `TokenStore.open`.
    verify: see `TokenStore.open`.

  Raises:
    InputError, StorageError: as `TokenStore.open`; or a source of the mixture is missing or is a different store.
  """
  description = stores.read_description(path)
  if "mixture" not in description:
    return TokenStore.open(path, verify=verify)
  path = Path(path)
  if tokenizers.load(path).describe() != description["tokenizer"]:
    raise InputError(f"data.store: {path} has a different tokenizer than it was prepared with; prepare it again")
  found = streams.read_json(epath.Path(path / _SOURCES))
  places = found if isinstance(found, dict) else {}
  sources = []
  for entry in description["mixture"]:
    place = places.get(entry["name"], "")
    if not isinstance(place, str) or not place or not stores.is_store(place):
      raise InputError(
        f"data.store: {path}: its source {entry['name']!r} is not in {shown(place)}; prepare the mixture again"
      )
    store = open_token_store(place, verify=verify)
    if store.fingerprint != entry["fingerprint"]:
      raise InputError(
        f"data.store: {path}: the store in {place} is not the source {entry['name']!r} with which the mixture was"
        " prepared; prepare the mixture again"
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
    items: the sources: tasks with their options, or folders of token stores.
    tokenizer: as for `preparation.prepare`; 'sentencepiece:N' is trained on text of all tasks in proportion to their
      weights. Sources that are token stores must have been prepared with this tokenizer.
    output: the mixture's folder on a local disk; None means a folder in the user's cache folder.
    limit, progress, workers: as for `preparation.prepare`, for each source that is a task.
    write: if False, nothing is written, and the result is None if anything is missing.

  Raises:
    InputError: a source is unknown, a store has a different tokenizer, or `preparation.prepare` raises it.
  """
  names = _unique_names(items)
  opened: dict[int, TokenStore] = {}
  for number, item in enumerate(items):
    with of_source(names[number]):
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
      with of_source(names[number]):
        prepared = preparation.prepare(
          item.name, spec, options=item.options, limit=limit, progress=progress, workers=workers, write=write
        )
      if prepared is None:
        return None
      opened[number] = prepared
  total = sum(item.weight for item in items)
  sources = [Source(name, item.weight / total, opened[number]) for number, (name, item) in enumerate(zip(names, items))]
  period([source.weight for source in sources])
  description = _describe(sources)
  default = user_cache() / "stores" / f"mixture-{description['fingerprint'][:16]}"
  path = Path(absolute(output)) if output else default
  if write:
    _write(path, description, sources)
  return MixtureStore(path, description, sources)


def check_sources(items: Sequence[Item]) -> None:
  """Checks that every source is a known task with known options, or the folder of a store; no text is read.

  Raises:
    InputError: a source is neither.
  """
  for name, item in zip(_unique_names(items), items):
    with of_source(name):
      if not _is_folder(item):
        tasks.settle_options(item.name, item.options)


def _is_folder(item: Item) -> bool:
  """Whether a source is the folder of a token store.

  Raises:
    InputError: the name is a path without a token store, or options are given for a store.
  """
  if item.name in tasks.TASKS or item.name.startswith("seqio:"):
    return False
  if stores.is_store(absolute(item.name)):
    if item.options:
      raise InputError(f"{item.name!r} is a token store, which has no options; give its name alone")
    if "mixture" in stores.read_description(absolute(item.name)):
      raise InputError(f"{item.name!r} is a mixture; give its sources and their weights instead")
    return True
  if os.sep in item.name:
    raise InputError(f"there is no token store in {item.name!r}; prepare one with cyb-prepare")
  return False


def _unique_names(items: Sequence[Item]) -> list[str]:
  """A short name for each source: the name of its task or folder, numbered if several sources have the same name."""
  names: list[str] = []
  for item in items:
    base = re.sub(r"[^\w.-]+", "_", os.path.basename(item.name.rstrip("/")))
    count = sum(re.fullmatch(rf"{re.escape(base)}(-\d+)?", name) is not None for name in names)
    names.append(f"{base}-{count + 1}" if count else base)
  return names


def _tokenizer_of(opened: Sequence[TokenStore], spec: str) -> str:
  """The path of the tokenizer that all these stores share.

  Args:
    opened: at least one store.
    spec: the spec of the required tokenizer.

  Raises:
    InputError: a store has a different tokenizer.
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
        f"data.tokenizer={spec!r}: the token store {store.path} of data.mixture was prepared with"
        f" {found['tokenizer_from'][:24]}; give that tokenizer, or another store"
      )
  return os.fspath(first.path)


def _trained(items: Sequence[Item], spec: str, limit: int | None, *, write: bool) -> str | None:
  """The folder of the tokenizer trained on text of all sources in proportion to their weights.

  Returns:
    the path; None if the tokenizer is not trained yet and `write` is False.
  """
  opened = []
  for name, item in zip(_unique_names(items), items):
    with of_source(name):
      opened.append(tasks.open_task(item.name, item.options))
  made_of = [[task.name, task.options, task.identity, item.weight] for task, item in zip(opened, items)]
  folder = user_cache() / "tokenizers" / f"{spec.replace(':', '-')}-{stores.digest([made_of, limit])[:16]}"
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


def _describe(sources: Sequence[Source]) -> dict[str, Any]:
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
  """Writes the mixture's folder if it is missing; the description, which makes the folder a store, is written last."""
  places = {source.name: os.fspath(source.store.path) for source in sources}
  if stores.is_store(path):
    found = stores.read_description(path)
    if found["fingerprint"] != description["fingerprint"]:
      raise InputError(f"output={os.fspath(path)!r}: it contains a different store; give another folder, or remove it")
    if streams.read_json(epath.Path(path / _SOURCES)) == places:
      return
  elif path.exists() and any(path.iterdir()):
    raise InputError(f"output={os.fspath(path)!r}: it exists and is not a token store; give another folder")
  path.mkdir(parents=True, exist_ok=True)
  first = sources[0].store
  for name in tokenizers.files(description["tokenizer"]):
    streams.write(epath.Path(path / name), (first.path / name).read_bytes())
  streams.write_json(epath.Path(path / _SOURCES), places)
  streams.write_json(epath.Path(path / stores.DESCRIPTION), dict(description))
