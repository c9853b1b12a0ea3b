"""The token store: a task's tokens, prepared once, memory-mapped, and read by window number.

A store is a folder:

    store.json                 the description; its fingerprint covers all its other fields, including the file hashes
    sample.json                digests of some blocks of the files, of a store of more than 8 GiB
    tokenizer.json             the tokenizer; its model is in tokenizer.model or huggingface.json
    train-00000.tokens         little-endian uint16 (uint32 beyond 65,536 ids)
    train-00000.documents      little-endian uint64: the position in its split of each document that begins here
    train-00000.difficulty     uint8 for each token, if the task defines difficulties
    train-00000.weights        uint8, 0 or 1, for each token, if some tokens have weight 0

The stream of a split is `end doc1 end doc2 end ... docN end`. It is divided into windows that overlap by one token, so
every token of every document, and the end token after every document, is a target exactly once. If a pretrained model
was trained with a start token before each text (the tokenizer's start_id), this token follows each end token. It has
weight 0: it is an input but never a target of the loss.

Letters: N rows, T tokens of a window.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from absl import logging
from etils import epath

from cyb_jax import jsonl
from cyb_jax.data import block_sample, chunks, locks, tokenizers
from cyb_jax.data.store_fields import check_fields
from cyb_jax.errors import InputError, StorageError, shown
from cyb_jax.progress import Meter
from cyb_jax.storage import in_bucket, streams, user_cache
from cyb_jax.storage.paths import absolute, unchecked_place

FORMAT = 1
DESCRIPTION = "store.json"
SHARD_TOKENS = 1 << 28
VERIFIED_BYTES = 8 << 30  # of larger stores, the sizes of the files and a sample of their blocks are checked
_WINDOWS_AT_ONCE = 4096
# The annotations that a store may have, one byte for each token.
ANNOTATIONS = ("difficulty", "weights")


class TokenStore:
  """A prepared store, open for reading. TensorFlow is not needed.

  Attributes:
    path: the store's folder, on a local disk.
    description: the content of store.json.
    fingerprint: hexadecimal sha256 of the description.
    vocab_size, end_id: the vocabulary size and the end token of the tokenizer.
    splits: names of the splits that have documents, train first.
    maps: (split, 'tokens' or an annotation) -> the memory-mapped shards, and their borders, int64[shards + 1].
  """

  def __init__(self, path: Path, description: dict[str, Any]):
    """Use `TokenStore.open`."""
    self.path = path
    self.description = description
    self.fingerprint: str = description["fingerprint"]
    self.vocab_size: int = description["tokenizer"]["vocab_size"]
    self.end_id: int = description["tokenizer"]["end_id"]
    self.splits = tuple(description["splits"])
    self._dtype = token_dtype(self.vocab_size)
    self.maps = functools.cache(self._open_maps)

  @classmethod
  def open(cls, path: str | os.PathLike, *, verify: bool | Literal["auto"] = "auto") -> TokenStore:
    """Opens the store of one task and checks it; `mixtures.open_token_store` also opens mixtures.

    Args:
      path: the store's folder. A store in a bucket is first copied to the user's cache folder, unless a copy exists.
      verify: whether every file is hashed: True, False (only sizes are checked), or 'auto' (True if the store has at
        most 8 GiB; otherwise a sample of blocks is hashed, see `block_sample`). True also records a missing sample.

    Raises:
      InputError: there is no store, or it has another format, or is truncated or altered; the message names the file.
      StorageError: the bucket or the disk of the copy failed.
    """
    if in_bucket(path):
      path = _local_copy(unchecked_place(path), read_description(path))
    path = Path(absolute(path))
    description = read_description(path)
    files = list(files_of(description))
    for name, size, _ in files:
      found = (path / name).stat().st_size if (path / name).is_file() else None
      if found != size:
        state = "missing" if found is None else f"{found} bytes"
        raise InputError(f"data.store: {path / name} is {state}, not {size} bytes; prepare the store again")
    if verify:
      _verify(path, description, files, whole=verify is True)
    if tokenizers.load(path).describe() != description["tokenizer"]:
      raise InputError(f"data.store: {path} has a different tokenizer than it was prepared with; prepare it again")
    return cls(path, description)

  @functools.cached_property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer that encoded the text."""
    return tokenizers.load(self.path)

  def num_tokens(self, split: str) -> int:
    """Number of tokens in a split's stream, including the first end token and the end token after each document."""
    return self._split(split)["tokens"]

  def has_weights(self, split: str) -> bool:
    """Whether some of a split's tokens have weight 0: they are inputs but not targets of the loss."""
    return self.has_annotation(split, "weights")

  def has_annotation(self, split: str, kind: str) -> bool:
    """Whether the tokens of a split have an annotation, one of `ANNOTATIONS`."""
    return kind in self._split(split)["shards"][0]

  @property
  def task(self) -> str:
    """The name of the store's task."""
    return self.description["task"]

  def has_prefixes(self, split: str) -> bool:
    """Whether tokens other than start tokens have weight 0, so that documents consist of prefixes and targets."""
    starts = self.tokenizer.adds_start and self.tokenizer.start_id != self.end_id
    begins = self._split(split)["documents"] * starts
    return self.has_weights(split) and self.num_tokens(split) - 1 - self.num_targets(split) > begins

  def prefixes(self, split: str, sequence_length: int) -> np.ndarray:
    """int64[windows]: the number of times, in each window, that a target of weight 1 follows a target of weight 0."""
    windows = self.num_windows(split, sequence_length)
    counts = np.zeros(windows, np.int64)
    if self.has_weights(split):
      for first in range(0, windows, _WINDOWS_AT_ONCE):
        indices = np.arange(first, min(first + _WINDOWS_AT_ONCE, windows))
        _, weights = self.windows(split, indices, sequence_length)
        counts[indices] = (np.diff(weights) > 0).sum(-1)
    return counts

  def num_targets(self, split: str) -> int:
    """Number of tokens that are targets of weight 1."""
    return self._split(split).get("weighted_tokens", self.num_tokens(split) - 1)

  def num_bytes(self, split: str) -> int:
    """Number of UTF-8 bytes that the targets of weight 1 represent, for bits per byte."""
    return self._split(split).get("weighted_bytes", self._split(split)["bytes"])

  def num_windows(self, split: str, sequence_length: int) -> int:
    """Number of windows of `sequence_length` targets that cover a split; the last window may be partial."""
    if sequence_length < 1:
      raise InputError(f"data.sequence_length={sequence_length}: give at least 1")
    return -(-(self.num_tokens(split) - 1) // sequence_length)

  def require(self, split: str, sequence_length: int) -> None:
    """Checks that a split fills at least one window.

    Raises:
      InputError: the split has fewer than sequence_length + 1 tokens.
    """
    tokens = self.num_tokens(split)
    if tokens < sequence_length + 1:
      raise InputError(
        f"data.sequence_length={sequence_length}: the {split} split has only {tokens} tokens; "
        f"give at most {tokens - 1}, or more text"
      )

  def windows(self, split: str, indices: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads windows; window j consists of the tokens j T to j T + T, inclusive.

    Args:
      split: name of a split.
      indices: int[N], the window numbers, each at least 0. A window after the last one consists of padding only.
      sequence_length: T.

    Returns:
      tokens: int32[N, T + 1], padded with end_id after the end of the stream; inputs are [:, :-1], targets [:, 1:].
      weights: float32[N, T], the weights of the targets, 0 or 1; 0 after the end of the stream.
    """
    starts = _starts(indices, sequence_length)
    tokens = self._gather(split, "tokens", starts, sequence_length + 1, self.end_id, np.int32)
    targets = np.arange(1, sequence_length + 1)
    if self.has_weights(split):
      return tokens, self._gather(split, "weights", starts + 1, sequence_length, 0, np.float32)
    weights = (starts[:, None] + targets < self.num_tokens(split)).astype(np.float32)
    return tokens, weights

  def difficulty(self, split: str, indices: np.ndarray, sequence_length: int) -> np.ndarray | None:
    """uint8[N, T]: the difficulty of each target of the windows, 0 after the end; None if the task defines none."""
    if not self.has_annotation(split, "difficulty"):
      return None
    starts = _starts(indices, sequence_length) + 1
    return self._gather(split, "difficulty", starts, sequence_length, 0, np.uint8)

  def document_starts(self, split: str) -> np.ndarray:
    """uint64[documents]: the position of each document's first token in the split's stream, ascending."""
    shards = self._split(split)["shards"]
    files = [self.path / shard["documents"]["file"] for shard in shards if shard["documents"]["count"]]
    return np.concatenate([np.fromfile(file, "<u8") for file in files])

  def _split(self, split: str) -> dict[str, Any]:
    try:
      return self.description["splits"][split]
    except KeyError:
      raise InputError(f"split={split!r}: the store {self.path} has {', '.join(self.splits)}") from None

  def _open_maps(self, split: str, kind: str) -> tuple[list[np.ndarray], np.ndarray]:
    """The memory-mapped shards of a split, and the borders between them, int64[shards + 1]."""
    shards = self._split(split)["shards"]
    if kind == "tokens":
      maps = [np.memmap(self.path / shard["file"], self._dtype, "r") for shard in shards]
    else:
      maps = [np.memmap(self.path / shard[kind]["file"], np.uint8, "r") for shard in shards]
    # Plain arrays over the same memory: slicing a memmap object costs several times as much.
    borders = np.cumsum([0, *map(len, maps)])
    return [np.asarray(part) for part in maps], borders

  def _gather(self, split, kind, starts, length, padding, dtype) -> np.ndarray:
    """dtype[N, length]: `length` values of the stream from each start; `padding` after the end of the stream."""
    maps, borders = self.maps(split, kind)
    rows = np.full((len(starts), length), padding, dtype)
    shards = np.searchsorted(borders, starts, side="right") - 1
    # One slice is copied for each row. For T in the hundreds, this takes a few percent longer than a plain memory copy
    # and is faster than fancy indexing of a strided view.
    for row, start, shard in zip(rows, starts.tolist(), shards.tolist(), strict=True):
      done = 0
      while done < length and shard < len(maps):
        offset = start + done - int(borders[shard])
        piece = maps[shard][offset : offset + length - done]
        row[done : done + len(piece)] = piece
        done += len(piece)
        shard += 1
    return rows


def _verify(path: Path, description: dict[str, Any], files: list[tuple[str, int, str]], *, whole: bool) -> None:
  """Hashes all files of a store on a disk, or, of a large one, only a sample unless `whole` is set.

  Raises:
    InputError: a file was altered.
  """
  sizes = {name: size for name, size, _ in files}
  is_large = sum(sizes.values()) > VERIFIED_BYTES
  is_sampled = is_large and block_sample.check(path, sizes, description["fingerprint"])
  if is_large and not whole:
    if not is_sampled:
      logging.info("only the sizes of the files of %s are checked; cyb-prepare --verify=%s checks all", path, path)
    return
  for name, _, sha256 in files:
    with open(path / name, "rb") as file:
      if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
        raise InputError(f"data.store: {path / name} was altered; prepare the store again")
  if is_large and not is_sampled:
    with contextlib.suppress(StorageError):  # the folder may be read-only
      block_sample.record(epath.Path(path), sizes, description["fingerprint"])


def is_store(path: str | os.PathLike) -> bool:
  """Whether a folder, on a local disk or in a bucket, is a token store.

  Raises:
    StorageError: the bucket failed.
  """
  return streams.size_of(unchecked_place(path) / DESCRIPTION) is not None


def tokenizer_spec(path: str | os.PathLike) -> str:
  """The spec of a store's tokenizer, as a value of the config field data.tokenizer.

  It is 'sentencepiece:N' if the tokenizer was trained for the store, 'bytes', or the store's folder, which contains the
  tokenizer.

  Args:
    path: the store's folder, on a local disk or in a bucket.

  Raises:
    InputError: there is no store, or its description is damaged.
  """
  description = read_description(path)
  if tokenizers.trained_pieces(description["tokenizer_from"]):
    return description["tokenizer_from"]
  return "bytes" if description["tokenizer"]["kind"] == "bytes" else absolute(path)


def _local_copy(path: epath.Path, description: dict[str, Any]) -> Path:
  """Copies a store from a bucket to the user's cache, unless the copy is complete; returns the folder of the copy."""
  copy = user_cache() / "copies" / description["fingerprint"]
  if (copy / DESCRIPTION).is_file():  # a complete copy may be on a read-only disk, so nothing is written
    return copy
  copy.mkdir(parents=True, exist_ok=True)
  with locks.held(unchecked_place(copy / ".lock"), wait=f"{path} is being copied by another process; waiting for it"):
    if (copy / DESCRIPTION).is_file():
      return copy
    files = list(files_of(description))
    missing = [(name, size, sha) for name, size, sha in files if streams.size_of(copy / name) != size]
    total = sum(size for _, size, _ in missing)
    free = shutil.disk_usage(copy).free
    if total > free:
      raise StorageError(
        f"data.store: copying {os.fspath(path)} to {copy} needs {total:,} more bytes, and {free:,} are free; set"
        " XDG_CACHE_HOME to a folder on a larger disk"
      )
    for name in tokenizers.files(description["tokenizer"]):
      streams.write(epath.Path(copy / name), streams.read(path / name))
    with Meter(f"copying {os.fspath(path)} to {copy}", total=total, unit="bytes") as meter:
      for name, size, sha256 in missing:
        digest = hashlib.sha256()
        with streams.new_file(epath.Path(copy / name)) as file:
          for content in chunks.parts(path / name):
            file.write(content)
            digest.update(content)
            meter.advance(len(content))
          if digest.hexdigest() != sha256:
            raise InputError(
              f"data.store: {os.fspath(path / name)} differs from the {size} bytes of the prepared store; prepare"
              " it again"
            )
    if streams.size_of(path / block_sample.NAME) is not None:
      streams.write(epath.Path(copy / block_sample.NAME), streams.read(path / block_sample.NAME))
    streams.write(epath.Path(copy / DESCRIPTION), streams.read(path / DESCRIPTION))
  return copy


def token_dtype(vocab_size: int) -> np.dtype:
  """The dtype of a store's tokens."""
  return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _starts(indices: np.ndarray, sequence_length: int) -> np.ndarray:
  indices = np.asarray(indices, np.int64)
  if indices.ndim != 1 or (indices < 0).any():
    raise ValueError(f"window numbers must be int[N] and at least 0, not {indices}")
  return indices * sequence_length


def canonical(value: Any) -> bytes:
  """The value as JSON; equal values give equal bytes."""
  return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(value: Any) -> str:
  """Hexadecimal sha256 of a value as JSON."""
  return hashlib.sha256(canonical(value)).hexdigest()


def fingerprint(description: dict[str, Any]) -> str:
  """Hexadecimal sha256 of a description without its fingerprint."""
  return digest({k: v for k, v in description.items() if k != "fingerprint"})


def read_description(path: str | os.PathLike) -> dict[str, Any]:
  """The content of store.json of a store on a local disk or in a bucket.

  Raises:
    InputError: the file is missing, has another format, or was altered.
  """
  file = unchecked_place(path) / DESCRIPTION
  try:
    description = jsonl.loads(streams.read(file) if in_bucket(path) else file.read_bytes())
  except OSError as error:
    raise InputError(
      f"data.store: {os.fspath(file)} cannot be read ({error.strerror or 'no such file'}); prepare a store with"
      " cyb-prepare"
    ) from error
  except ValueError as error:
    raise InputError(f"data.store: {os.fspath(file)} is not valid JSON ({error}); prepare the store again") from error
  if not isinstance(description, dict) or description.get("format") != FORMAT:
    found = description.get("format") if isinstance(description, dict) else None
    raise InputError(
      f"data.store: {os.fspath(file)} has format {shown(found)}, but this version reads {FORMAT}; prepare the store"
      " again"
    )
  if description.get("fingerprint") != fingerprint(description):
    raise InputError(
      f"data.store: {os.fspath(file)} was altered: its fingerprint does not match; prepare the store again"
    )
  check_fields(description, os.fspath(file))
  return description


def files_of(description: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
  """(name, bytes, sha256) of every file in a store's description."""
  itemsize = token_dtype(description["tokenizer"]["vocab_size"]).itemsize
  for split in description["splits"].values():
    for shard in split["shards"]:
      yield shard["file"], itemsize * shard["tokens"], shard["sha256"]
      yield shard["documents"]["file"], 8 * shard["documents"]["count"], shard["documents"]["sha256"]
      for kind in ANNOTATIONS:
        if kind in shard:
          yield shard[kind]["file"], shard["tokens"], shard[kind]["sha256"]
