"""The token store: a task's tokens, prepared once, memory-mapped, read by window number.

A store is a folder:

    store.json                 what it is; its fingerprint covers everything else in it, and so every file's hash
    tokenizer.json             the tokenizer; its model beside it, tokenizer.model or huggingface.json
    train-00000.tokens         little-endian uint16 (uint32 beyond 65,536 ids)
    train-00000.documents      little-endian uint64: where each document that begins in this shard starts in its split
    train-00000.difficulty     uint8 beside each token, where the task knows it
    train-00000.weights        uint8, 0 or 1, beside each token, where not every one is to be learnt

The stream of a split is `end doc1 end doc2 end ... docN end`. Cut into windows that overlap by one token, every token
of every document, and every closing end, is a target exactly once. Where a pretrained model was trained to see a
token of its own before each text (the tokenizer's start_id), that stands after each end, with weight 0: it is read, and
never learnt.

Letters: N rows, T tokens of a window.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import heapq
import itertools
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from absl import logging

from cyb_jax.data import tasks, tokenizers
from cyb_jax.errors import REFUSALS, InputError, StorageError

FORMAT = 1
_DESCRIPTION = "store.json"
_SHARD_TOKENS = 1 << 28
_VERIFIED_BYTES = 8 << 30  # larger stores are opened with their sizes checked only
_BATCH_BYTES = 4 << 20  # text tokenized at once
# SentencePiece is trained on at most this much text, the documents of smallest hash among the first so many.
_SAMPLE_BYTES = 4 << 20
_SAMPLED_BYTES = 256 << 20
_SECONDS_BETWEEN_LINES = 5.0
# What may stand beside the tokens, a byte for each.
_BESIDE = ("difficulty", "weights")


class TokenStore:
  """A prepared store, open for reading; needs no TensorFlow.

  Attributes:
    path: its folder.
    description: what store.json says.
    fingerprint: hexadecimal sha256 over the description.
    vocab_size, end_id: of its tokenizer.
    splits: names of the splits that hold documents, train first.
  """

  def __init__(self, path: Path, description: dict[str, Any]):
    """Use `TokenStore.open`."""
    self.path = path
    self.description = description
    self.fingerprint: str = description["fingerprint"]
    self.vocab_size: int = description["tokenizer"]["vocab_size"]
    self.end_id: int = description["tokenizer"]["end_id"]
    self.splits = tuple(description["splits"])
    self._dtype = _token_dtype(self.vocab_size)
    self._maps = functools.cache(self._open_maps)

  @classmethod
  def open(cls, path: str | os.PathLike, *, verify: bool | Literal["auto"] = "auto") -> TokenStore:
    """Opens a store and checks it.

    Args:
      path: its folder, on a local disk.
      verify: whether every file is hashed: True, False (sizes are checked all the same), or 'auto': where the
        store is at most 8 GiB.

    Raises:
      InputError: if there is no store, or it is of another format, truncated or altered; it names the file.
    """
    path = Path(path)
    description = _read_description(path)
    files = list(_files(description))
    for name, size, _ in files:
      found = (path / name).stat().st_size if (path / name).is_file() else None
      if found != size:
        state = "missing" if found is None else f"{found} bytes"
        raise InputError(f"data.store: {path / name} is {state}, not {size} bytes; prepare the store again")
    if verify is True or (verify == "auto" and sum(size for _, size, _ in files) <= _VERIFIED_BYTES):
      for name, _, sha256 in files:
        with open(path / name, "rb") as file:
          if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise InputError(f"data.store: {path / name} was altered; prepare the store again")
    if tokenizers.load(path).describe() != description["tokenizer"]:
      raise InputError(f"data.store: {path} holds another tokenizer than it was prepared with; prepare it again")
    return cls(path, description)

  @functools.cached_property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer that made the tokens."""
    return tokenizers.load(self.path)

  def num_tokens(self, split: str) -> int:
    """Tokens in a split's stream, the first and all closing end tokens included."""
    return self._split(split)["tokens"]

  def has_weights(self, split: str) -> bool:
    """Whether some of a split's tokens are read only."""
    return "weights" in self._split(split)["shards"][0]

  def num_targets(self, split: str) -> int:
    """Tokens that are targets of weight 1."""
    return self._split(split).get("weighted_tokens", self.num_tokens(split) - 1)

  def num_bytes(self, split: str) -> int:
    """Bytes of UTF-8 that the targets of weight 1 stand for, for bits per byte."""
    return self._split(split).get("weighted_bytes", self._split(split)["bytes"])

  def num_windows(self, split: str, sequence_length: int) -> int:
    """Windows of `sequence_length` targets that cover a split; the last one may be partial."""
    if sequence_length < 1:
      raise InputError(f"data.sequence_length={sequence_length}: give at least 1")
    return -(-(self.num_tokens(split) - 1) // sequence_length)

  def require(self, split: str, sequence_length: int) -> None:
    """Checks that a split fills one window.

    Raises:
      InputError: if it has fewer than sequence_length + 1 tokens.
    """
    tokens = self.num_tokens(split)
    if tokens < sequence_length + 1:
      raise InputError(
        f"data.sequence_length={sequence_length}: the {split} split has only {tokens} tokens; "
        f"give at most {tokens - 1}, or more text"
      )

  def windows(self, split: str, indices: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads windows; window j is the tokens [j T, j T + T], both ends included.

    Args:
      split: name of a split.
      indices: int[N], each at least 0. A window past the last one is all padding.
      sequence_length: T.

    Returns:
      tokens: int32[N, T + 1], padded with end_id beyond the stream's end; inputs are [:, :-1], targets [:, 1:].
      weights: float32[N, T], 1 for a target within the stream that is to be learnt, 0 for others and beyond.
    """
    starts = _starts(indices, sequence_length)
    tokens = self._gather(split, "tokens", starts, sequence_length + 1, self.end_id, np.int32)
    targets = np.arange(1, sequence_length + 1)
    if self.has_weights(split):
      return tokens, self._gather(split, "weights", starts + 1, sequence_length, 0, np.float32)
    weights = (starts[:, None] + targets < self.num_tokens(split)).astype(np.float32)
    return tokens, weights

  def difficulty(self, split: str, indices: np.ndarray, sequence_length: int) -> np.ndarray | None:
    """uint8[N, T]: the difficulty of each target of the windows, 0 beyond the end; None if the task knows none."""
    if "difficulty" not in self._split(split)["shards"][0]:
      return None
    starts = _starts(indices, sequence_length) + 1
    return self._gather(split, "difficulty", starts, sequence_length, 0, np.uint8)

  def document_starts(self, split: str) -> np.ndarray:
    """uint64[documents]: where each document's first token stands in the split's stream, ascending."""
    shards = self._split(split)["shards"]
    files = [self.path / shard["documents"]["file"] for shard in shards if shard["documents"]["count"]]
    return np.concatenate([np.fromfile(file, "<u8") for file in files])

  def _split(self, split: str) -> dict[str, Any]:
    try:
      return self.description["splits"][split]
    except KeyError:
      raise InputError(f"split={split!r}: the store {self.path} has {', '.join(self.splits)}") from None

  def _open_maps(self, split: str, kind: str) -> tuple[list[np.ndarray], np.ndarray]:
    """The shards of a split, mapped, and the borders between them: int64[shards + 1]."""
    shards = self._split(split)["shards"]
    if kind == "tokens":
      maps = [np.memmap(self.path / shard["file"], self._dtype, "r") for shard in shards]
    else:
      maps = [np.memmap(self.path / shard[kind]["file"], np.uint8, "r") for shard in shards]
    # Plain arrays over the same memory: slicing a memmap object costs several times as much.
    borders = np.cumsum([0, *map(len, maps)])
    return [np.asarray(part) for part in maps], borders

  def _gather(self, split, kind, starts, length, padding, dtype) -> np.ndarray:
    """dtype[N, length]: the stream from each start on, `padding` beyond its end."""
    maps, borders = self._maps(split, kind)
    rows = np.full((len(starts), length), padding, dtype)
    shards = np.searchsorted(borders, starts, side="right") - 1
    # One slice copy a row: within some percent of a plain memory copy for T in the hundreds, and faster than fancy
    # indexing of a strided view.
    for row, start, shard in zip(rows, starts.tolist(), shards.tolist(), strict=True):
      done = 0
      while done < length and shard < len(maps):
        offset = start + done - int(borders[shard])
        piece = maps[shard][offset : offset + length - done]
        row[done : done + len(piece)] = piece
        done += len(piece)
        shard += 1
    return rows


def prepare(
  task: str,
  tokenizer: str,
  output: str | os.PathLike | None = None,
  *,
  options: Mapping[str, Any] | None = None,
  limit: int | None = None,
  progress: bool = True,
  shard_tokens: int = _SHARD_TOKENS,
  write: bool = True,
) -> TokenStore | None:
  """Prepares a task's tokens, or opens them where they are prepared already.

  The store is written beside its place and moved there when it is whole; a second call for the same place waits for
  the first. Exact duplicates of a document are dropped over the whole task (of two in different splits, train's).

  Args:
    task: a name of `tasks.TASKS`, or 'seqio:NAME'.
    tokenizer: 'sentencepiece:N' (N pieces trained on the task's train split), or what `open_tokenizer` takes.
    output: the store's folder; None for one in the user's cache, named by what it holds.
    options: the task's options.
    limit: at most so many documents are read of each split.
    progress: whether progress is logged every few seconds.
    shard_tokens: tokens in a file at most.
    write: False: what is prepared already is opened, and nothing is written; None where it isn't.

  Raises:
    InputError: for an unknown task or option, an unusable tokenizer, a source that is missing or empty, an output that
      holds something else or cannot be written.
    StorageError: the disk is full.
  """
  if limit is not None and limit < 1:
    raise InputError(f"limit={limit}: give at least 1 document, or none for all")
  source = tasks.open_task(task, options)
  pieces = tokenizers.trained_pieces(tokenizer)
  given = None if pieces else tokenizers.open_tokenizer(tokenizer)
  recipe = {
    "format": FORMAT,
    "task": task,
    "options": {name: value for name, value in source.options.items() if name not in tasks.PLACES},
    "source": source.identity,
    # A model file is what is in it, wherever it lies.
    "tokenizer_from": given.describe()["sha256"] if given else tokenizer,
    "limit": limit,
    "shard_tokens": shard_tokens,
  }
  path = Path(output).expanduser().absolute() if output else _default_path(recipe, tokenizer)
  if not write:
    return _reuse(path, recipe) if (path / _DESCRIPTION).is_file() else None
  with _locked(path):
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
      return _reuse(path, recipe)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
      log = _Progress(task, progress)
      if pieces:
        log.say(f"training a SentencePiece model of {pieces} pieces")
        sample = _sample(itertools.islice(source.documents("train"), limit))
        if not sample:
          raise InputError(f"data.task={task!r}: no text in train; options {source.options}")
        given = tokenizers.train_sentencepiece(sample, pieces)
      given.save(scratch)
      splits = _write_splits(scratch, source, given, limit, shard_tokens, log)
      if "train" not in splits:
        raise InputError(f"data.task={task!r}: no text in train; options {source.options}")
      description = recipe | {"tokenizer": given.describe(), "splits": splits}
      description["fingerprint"] = _fingerprint(description)
      (scratch / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
      os.chmod(scratch, 0o777 & ~_umask())  # a temporary folder is private; a store need not be
      os.rename(scratch, path)
    except BaseException as error:
      shutil.rmtree(scratch, ignore_errors=True)
      if isinstance(error, OSError) and error.errno in REFUSALS:
        raise StorageError(
          f"data.store: {path} can't be written: {REFUSALS[error.errno]}; nothing is left of it"
        ) from error
      raise
  log.say(f"prepared {path}")
  return TokenStore.open(path, verify=False)


def _default_path(recipe: dict[str, Any], tokenizer: str) -> Path:
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
  name = re.sub(r"[^\w.-]+", "_", f"{recipe['task']}-{os.path.basename(tokenizer)}")
  key = hashlib.sha256(_canonical(recipe)).hexdigest()[:16]
  return Path(cache).expanduser() / "cyb_jax" / "stores" / f"{name}-{key}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
  """Holds the one right to write at `path`; the system takes it back when the process dies, however it does."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path.parent / f".{path.name}.lock", "w")  # noqa: SIM115
  except OSError as error:
    raise InputError(
      f"output={os.fspath(path)!r}: cannot be written ({error.strerror}); give a folder that can"
    ) from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      logging.info("%s is being prepared by another process; waiting for it", path)
      fcntl.flock(lock, fcntl.LOCK_EX)
    # Whoever left these is dead: the lock is ours.
    for leftover in path.parent.glob(f".{path.name}.*.partial"):
      shutil.rmtree(leftover, ignore_errors=True)
    yield


def _reuse(path: Path, recipe: dict[str, Any]) -> TokenStore:
  if not (path / _DESCRIPTION).is_file():
    raise InputError(f"output={os.fspath(path)!r}: it exists and is no token store; give another folder")
  store = TokenStore.open(path)
  for name, value in recipe.items():
    if store.description.get(name) != value:
      raise InputError(
        f"output={os.fspath(path)!r}: it holds a store with {name}={store.description.get(name)!r}, not {value!r}; "
        "give another folder, or remove it"
      )
  logging.info("%s is prepared already", path)
  return store


def _sample(documents: Iterable[tasks.Document]) -> list[str]:
  """The texts to train a tokenizer on, the same for the same documents in whatever order they come.

  The first documents alone would be of one kind where a corpus is sorted; a draw over all would have to read it all.
  """
  heap: list[tuple[int, str]] = []
  kept = seen = 0
  for document in documents:
    # Not the part of the digest that the split hangs on.
    digest = int.from_bytes(tasks.text_digest(document.text)[8:], "little")
    heapq.heappush(heap, (-digest, document.text))
    size = len(document.text.encode())
    kept, seen = kept + size, seen + size
    while kept > _SAMPLE_BYTES and len(heap) > 1:
      kept -= len(heapq.heappop(heap)[1].encode())
    if seen >= _SAMPLED_BYTES:
      break
  return [text for _, text in sorted(heap, reverse=True) if text]


def _write_splits(folder, source, tokenizer, limit, shard_tokens, log) -> dict[str, Any]:
  splits, seen = {}, set()
  # Held-out documents are kept and their copies in train dropped, so the train split comes last.
  for split in reversed(source.splits):
    log.start()
    writer = _SplitWriter(folder, split, tokenizer, shard_tokens, source.beside)
    batch, size = [], 0
    for document in itertools.islice(source.documents(split), limit):
      if not document.text:
        continue
      digest = tasks.text_digest(document.text)
      if digest in seen:
        writer.duplicates += 1
        continue
      seen.add(digest)
      batch.append(document)
      size += len(document.text)
      if size >= _BATCH_BYTES:
        writer.write(batch)
        batch, size = [], 0
        log.report(split, writer.documents, writer.tokens)
    writer.write(batch)
    described = writer.close()
    log.report(split, writer.documents, writer.tokens, last=True)
    if writer.documents:
      splits[split] = described
    else:
      for leftover in folder.glob(f"{split}-*"):
        leftover.unlink()
  return {split: splits[split] for split in source.splits if split in splits}


class _SplitWriter:
  """Writes one split's stream into shards, hashing as it goes."""

  def __init__(self, folder: Path, split: str, tokenizer, shard_tokens: int, beside: tuple[str, ...]):
    self.documents = self.tokens = self.bytes = self.duplicates = 0
    self._folder, self._split, self._tokenizer = folder, split, tokenizer
    self._shard_tokens = shard_tokens
    # What stands before each document.
    self._start = [tokenizer.start_id] * (tokenizer.adds_start and tokenizer.start_id != tokenizer.end_id)
    self._beside = tuple(kind for kind in _BESIDE if kind in beside or (kind == "weights" and self._start))
    self._weighted_tokens = self._weighted_bytes = 0
    self._dtype = _token_dtype(tokenizer.vocab_size)
    self._shards: list[dict[str, Any]] = []
    self._open: dict[str, tuple[BinaryIO, Any]] = {}
    end = np.array([tokenizer.end_id], self._dtype)
    self._append(end, dict.fromkeys(self._beside, np.zeros(1, np.uint8)), np.zeros(0, np.uint64))

  def write(self, documents: list[tasks.Document]) -> None:
    if not documents:
      return
    encoded = self._tokenizer.encode_batch([document.text for document in documents])
    lengths = np.array([len(self._start) + len(ids) + 1 for ids in encoded])
    total = int(lengths.sum())
    end = (self._tokenizer.end_id,)
    flat = itertools.chain.from_iterable(itertools.chain(self._start, ids, end) for ids in encoded)
    tokens = np.fromiter(flat, self._dtype, total)
    beside = {}
    if "difficulty" in self._beside:
      parts = [self._difficulties(*row) for row in zip(documents, encoded, strict=True)]
      beside["difficulty"] = np.concatenate(parts)
    if "weights" in self._beside:
      beside["weights"] = np.concatenate(self._weights(documents, encoded))
      self._weighted_tokens += int(beside["weights"].sum())
      self._weighted_bytes += sum(
        len(d.text.encode()) if d.weights is None else int(d.weights.sum()) for d in documents
      )
    starts = self.tokens + np.concatenate([[0], np.cumsum(lengths)[:-1]]) + len(self._start)
    self.documents += len(documents)
    self.bytes += sum(len(document.text.encode()) for document in documents)
    self._append(tokens, beside, starts.astype(np.uint64))

  def close(self) -> dict[str, Any]:
    self._close_shard()
    weighted = {"weighted_tokens": self._weighted_tokens, "weighted_bytes": self._weighted_bytes}
    return {
      "tokens": self.tokens,
      "documents": self.documents,
      "bytes": self.bytes,
      **(weighted if "weights" in self._beside else {}),
      "duplicates_dropped": self.duplicates,
      "shards": self._shards,
    }

  def _difficulties(self, document: tasks.Document, ids: list[int]) -> np.ndarray:
    """uint8[start + tokens + 1]: a token is as hard as its hardest byte; the start and the end are 0."""
    sizes = np.array([len(self._tokenizer.decode([token]).encode()) for token in ids])
    if sizes.sum() != len(document.difficulty):
      raise InputError(
        "data.tokenizer: it does not give the text back exactly, so its tokens' difficulties are unknown; "
        "take 'bytes' or 'sentencepiece:N'"
      )
    starts = np.cumsum(sizes) - sizes
    hardest = np.maximum.reduceat(document.difficulty, starts)
    return np.concatenate([np.zeros(len(self._start)), hardest, [0]]).astype(np.uint8)

  def _weights(self, documents: list[tasks.Document], encoded: list[list[int]]) -> list[np.ndarray]:
    """uint8[start + tokens + 1] of each document; the start is 0, the end as the last byte.

    Where the weights of the bytes change, the tokens of the text up to there are counted, as lm-evaluation-harness
    parts a prompt and its continuation: a token over the border is of what follows.
    """
    borders = [
      [] if document.weights is None else (np.flatnonzero(np.diff(document.weights)) + 1).tolist()
      for document in documents
    ]
    texts = (document.text.encode() for document in documents)
    before = [text[:border].decode(errors="replace") for text, of in zip(texts, borders) for border in of]
    counts = iter(map(len, self._tokenizer.encode_batch(before)) if before else ())
    result = []
    for document, ids, of in zip(documents, encoded, borders, strict=True):
      values = [1] if document.weights is None else document.weights[[0, *of]].tolist()
      places = [0, *(min(next(counts), len(ids)) for _ in of), len(ids) + 1]
      # What a tokenizer makes of a part may be longer than what it makes of more.
      weights = np.repeat(np.array(values, np.uint8), np.diff(np.maximum.accumulate(places)))
      result.append(np.concatenate([np.zeros(len(self._start), np.uint8), weights]))
    return result

  def _append(self, tokens: np.ndarray, beside: dict[str, np.ndarray], starts: np.ndarray) -> None:
    while len(tokens):
      if not self._open:
        self._open_shard()
      shard = self._shards[-1]
      room = self._shard_tokens - shard["tokens"]
      inside = int(np.searchsorted(starts, np.uint64(self.tokens + room)))
      self._put("tokens", tokens[:room])
      self._put("documents", starts[:inside].astype("<u8"))
      for kind, values in beside.items():
        self._put(kind, values[:room])
      written = len(tokens[:room])
      shard["tokens"] += written
      shard["documents"]["count"] += inside
      self.tokens += written
      tokens, starts = tokens[room:], starts[inside:]
      beside = {kind: values[room:] for kind, values in beside.items()}
      if shard["tokens"] == self._shard_tokens:
        self._close_shard()

  def _open_shard(self) -> None:
    stem = f"{self._split}-{len(self._shards):05d}"
    shard: dict[str, Any] = {"file": f"{stem}.tokens", "tokens": 0, "sha256": ""}
    shard["documents"] = {"file": f"{stem}.documents", "count": 0, "sha256": ""}
    for kind in self._beside:
      shard[kind] = {"file": f"{stem}.{kind}", "sha256": ""}
    self._shards.append(shard)
    for kind in ("tokens", "documents", *self._beside):
      self._open[kind] = open(self._folder / f"{stem}.{kind}", "wb"), hashlib.sha256()  # noqa: SIM115

  def _put(self, kind: str, array: np.ndarray) -> None:
    file, digest = self._open[kind]
    content = array.tobytes()
    file.write(content)
    digest.update(content)

  def _close_shard(self) -> None:
    for kind, (file, digest) in self._open.items():
      file.close()
      entry = self._shards[-1] if kind == "tokens" else self._shards[-1][kind]
      entry["sha256"] = digest.hexdigest()
    self._open = {}


class _Progress:
  """Says what is being done, every few seconds."""

  def __init__(self, task: str, enabled: bool):
    self._task, self._enabled = task, enabled
    self._last = self._start = time.monotonic()

  def say(self, line: str) -> None:
    if self._enabled:
      logging.info("%s: %s", self._task, line)

  def start(self) -> None:
    self._start = time.monotonic()

  def report(self, split: str, documents: int, tokens: int, *, last: bool = False) -> None:
    now = time.monotonic()
    if last or now - self._last >= _SECONDS_BETWEEN_LINES:
      rate = tokens / max(now - self._start, 1e-9)
      self.say(f"{split}: {documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s")
      self._last = now


def _token_dtype(vocab_size: int) -> np.dtype:
  return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _starts(indices: np.ndarray, sequence_length: int) -> np.ndarray:
  indices = np.asarray(indices, np.int64)
  if indices.ndim != 1 or (indices < 0).any():
    raise ValueError(f"window numbers must be int[N] from 0 on, not {indices}")
  return indices * sequence_length


def _canonical(value: Any) -> bytes:
  return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _fingerprint(description: dict[str, Any]) -> str:
  return hashlib.sha256(_canonical({k: v for k, v in description.items() if k != "fingerprint"})).hexdigest()


def _read_description(path: Path) -> dict[str, Any]:
  file = path / _DESCRIPTION
  try:
    description = json.loads(file.read_text())
  except OSError as error:
    raise InputError(f"data.store: {file} cannot be read ({error.strerror}); prepare one with cyb-prepare") from error
  except ValueError as error:
    raise InputError(f"data.store: {file} is no JSON ({error}); prepare the store again") from error
  if not isinstance(description, dict) or description.get("format") != FORMAT:
    found = description.get("format") if isinstance(description, dict) else None
    raise InputError(f"data.store: {file} has format {found!r}, this version reads {FORMAT}; prepare the store again")
  if description.get("fingerprint") != _fingerprint(description):
    raise InputError(f"data.store: {file} was altered: its fingerprint does not fit; prepare the store again")
  return description


def _files(description: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
  """(name, bytes, sha256) of every file that a store's description vouches for."""
  itemsize = _token_dtype(description["tokenizer"]["vocab_size"]).itemsize
  for split in description["splits"].values():
    for shard in split["shards"]:
      yield shard["file"], itemsize * shard["tokens"], shard["sha256"]
      yield shard["documents"]["file"], 8 * shard["documents"]["count"], shard["documents"]["sha256"]
      for kind in _BESIDE:
        if kind in shard:
          yield shard[kind]["file"], shard["tokens"], shard[kind]["sha256"]


def _umask() -> int:
  current = os.umask(0o022)
  os.umask(current)
  return current
