"""Merges pieces into a store's shards, in the order of the source and without duplicates.

Two passes over the pieces' indices and one over their tokens; each pass keeps only a part of its input in memory:

1. The documents' digests are distributed to files by value, so equal digests are in the same file. In each group of
   equal digests, all but the first in the store's order are marked as duplicates.
2. The indices are merged by the documents' positions, without the duplicates. This determines the position of each
   document's tokens in the store, and the shards' .documents files are written.
3. Several processes copy the tokens and annotations of the shards, each shard independently of the others.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from cyb_jax.data import chunks, tasks
from cyb_jax.data import pieces as piece_files
from cyb_jax.data.pieces import ROW
from cyb_jax.storage import streams

# Rows in memory at once: of digests that are sorted, and of the index of each open piece.
_SORTED_ROWS = 1 << 22
_READ_ROWS = 1 << 15
# The number of pieces that are open at once; it exceeds the number of files that tf.data interleaves.
_OPEN_PIECES = 24
_DIGEST = np.dtype([("digest", "<u8", (2,)), ("order", "<u8"), ("ordinal", "<u8")])
# A run is a part of a shard: the tokens [begin, end) of a piece's split.
_RUN = np.dtype([("piece", "<u8"), ("begin", "<u8"), ("end", "<u8")])
_SPLIT_BITS = np.uint64(56)
_AFTER_ALL = 1 << 63  # greater than every position


@dataclasses.dataclass(frozen=True)
class Pieces:
  """All pieces of a task, each of them complete.

  Attributes:
    folder: the folder of their files.
    pieces: the pieces, as the task defines them.
    documents: number of nonempty documents of each piece.
    splits: the splits of the task, train first.
    splits_of: the splits that the documents of a group belong to, by group.
  """

  folder: epath.Path
  pieces: Sequence[tasks.Piece]
  documents: Sequence[int]
  splits: tuple[str, ...]
  splits_of: dict[str, tuple[str, ...]]

  def open(self, number: int, name: str) -> chunks.Chunked:
    """A file of a piece: 'index', 'train.tokens' and the like."""
    record = streams.read_json(piece_files.record_path(self.folder, number))
    path = piece_files.file_path(self.folder, number, name)
    try:
      return chunks.Chunked(path, record["files"][name])
    except (TypeError, KeyError):
      raise chunks.Damaged(f"{path} is missing") from None

  def rows(self, number: int) -> Iterator[np.ndarray]:
    """The index of a piece, in parts of ROW[at most _READ_ROWS]."""
    index = self.open(number, "index")
    for begin in range(0, index.size, _READ_ROWS * ROW.itemsize):
      end = min(begin + _READ_ROWS * ROW.itemsize, index.size)
      yield np.frombuffer(b"".join(index.read(begin, end)), ROW)


def find_duplicates(pieces: Pieces, scratch: Path) -> np.ndarray:
  """bool[documents], on disk, by document number over all pieces: whether the document duplicates an earlier one.

  Of equal documents, the first in the store's order is kept; in this order, held-out splits precede train.
  """
  total = sum(pieces.documents)
  files = max(1, math.ceil(total / _SORTED_ROWS))
  ranks = np.array([len(pieces.splits) - 1 - i for i in range(len(pieces.splits))], np.uint64)
  ordinal = 0
  with contextlib.ExitStack() as stack:
    buckets = [stack.enter_context(open(scratch / f"digests-{i}", "wb")) for i in range(files)]
    for number, piece in enumerate(pieces.pieces):
      for rows in pieces.rows(number):
        digests = np.zeros(len(rows), _DIGEST)
        digests["digest"] = rows["digest"]
        digests["order"] = (ranks[rows["split"]] << _SPLIT_BITS) | piece.positions(rows["number"])
        digests["ordinal"] = np.arange(ordinal, ordinal + len(rows))
        ordinal += len(rows)
        bucket = ((digests["digest"][:, 0] >> np.uint64(32)) * np.uint64(files)) >> np.uint64(32)
        for i, file in enumerate(buckets):
          file.write(digests[bucket == i].tobytes() if files > 1 else digests.tobytes())
  copies = np.memmap(scratch / "copies", np.bool_, "w+", shape=(max(total, 1),))
  for i in range(files):
    path = scratch / f"digests-{i}"
    found = np.fromfile(path, _DIGEST)
    path.unlink()
    first, second = found["digest"].T
    found = found[np.lexsort((found["order"], second, first))]
    same = (found["digest"][1:] == found["digest"][:-1]).all(-1)
    copies[found["ordinal"][1:][same]] = True
  return copies


@dataclasses.dataclass
class Split:
  """The shards of a split.

  Attributes:
    counts: the counts of the split, for the store's description.
    shards: for each shard, its number of tokens and the entry of its .documents file.
  """

  counts: dict[str, int]
  shards: list[dict[str, Any]]


def lay_out(
  pieces: Pieces,
  copies: np.ndarray,
  output: epath.Path,
  scratch: Path,
  *,
  start: int,
  weighted: bool,
  shard_tokens: int,
) -> tuple[dict[str, Split], dict[str, int]]:
  """Writes the .documents files of all shards, and the lists of token runs that `write_shard` copies.

  Args:
    pieces: the pieces of the task.
    copies: the result of `find_duplicates`.
    output: the store's folder.
    scratch: a folder on a local disk.
    start: number of start tokens before each document.
    weighted: whether the store has weights.
    shard_tokens: number of tokens in a shard.

  Returns:
    the splits that have documents, by name; and, for each split whose documents are all duplicates, their number.
  """
  result: dict[str, Split] = {}
  emptied: dict[str, int] = {}
  bases = np.cumsum([0, *pieces.documents])
  for group, splits in pieces.splits_of.items():
    with contextlib.ExitStack() as stack:
      streams = [_SplitLayout(split, output, scratch, start, shard_tokens, stack) for split in splits]
      for number, ordinals, rows in _merged(pieces, group, bases):
        copied = copies[ordinals]
        for split, stream in zip(splits, streams, strict=True):
          in_split = rows["split"] == pieces.splits.index(split)
          stream.duplicates += int((in_split & copied).sum())
          kept = in_split & ~copied
          if kept.any():
            stream.add(number[kept], rows[kept])
      for split, stream in zip(splits, streams, strict=True):
        if stream.documents:
          result[split] = stream.close(weighted)
        elif stream.duplicates:
          emptied[split] = stream.duplicates
  found = sum(split.counts["documents"] + split.counts["duplicates_dropped"] for split in result.values())
  found += sum(emptied.values())
  assert found == sum(pieces.documents), f"{found} documents of {sum(pieces.documents)} were laid out"
  return {split: result[split] for split in pieces.splits if split in result}, emptied


def _merged(pieces: Pieces, group: str, bases: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """(piece, document number over all pieces, ROW), each [N], of the documents of a group in order, in parts."""
  numbers = [number for number, piece in enumerate(pieces.pieces) if piece.group == group]
  waiting = collections.deque(sorted(numbers, key=lambda number: pieces.pieces[number].start))
  reading: list[_PieceReader] = []
  while waiting or reading:
    # All documents at positions below the bound are loaded.
    bound = min((r.bound for r in reading), default=_AFTER_ALL)
    while waiting and pieces.pieces[waiting[0]].start < bound and len(reading) < _OPEN_PIECES:
      reading.append(_PieceReader(pieces, waiting.popleft(), bases))
      bound = min(bound, reading[-1].bound)
    if waiting:
      bound = min(bound, pieces.pieces[waiting[0]].start)
    parts = [r.take(bound) for r in reading]
    reading = [r for r in reading if not r.done]
    order = np.argsort(np.concatenate([positions for positions, *_ in parts]), kind="stable")
    if len(order):
      yield tuple(np.concatenate(column)[order] for column in list(zip(*parts, strict=True))[1:])


class _PieceReader:
  """A piece whose index is being read.

  Attributes:
    bound: all of the piece's documents at positions below this one are loaded.
    done: whether all documents have been taken.
  """

  def __init__(self, pieces: Pieces, number: int, bases: np.ndarray):
    self._piece, self._number = pieces.pieces[number], number
    self._parts = pieces.rows(number)
    self._ordinal, self._read = int(bases[number]), 0
    self._left = pieces.documents[number]
    self._rows, self._positions = np.zeros(0, ROW), np.zeros(0, np.uint64)
    self._load()

  def _load(self) -> None:
    self._rows = next(self._parts, np.zeros(0, ROW))
    self._left -= len(self._rows)
    self._positions = self._piece.positions(self._rows["number"])
    self.bound = int(self._positions[-1]) + 1 if self._left else _AFTER_ALL
    self.done = not len(self._rows)

  def take(self, bound: int) -> tuple[np.ndarray, ...]:
    """(position, piece, document number over all pieces, ROW), each [N], of the documents before `bound`."""
    count = int(np.searchsorted(self._positions, np.uint64(bound)))
    ordinals = np.arange(self._ordinal, self._ordinal + count)
    taken = self._positions[:count], np.full(count, self._number), ordinals, self._rows[:count]
    self._ordinal += count
    self._positions, self._rows = self._positions[count:], self._rows[count:]
    if not len(self._rows):
      self._load()
    return taken


class _SplitLayout:
  """Assigns the documents of a split to its shards, and counts them."""

  def __init__(self, split: str, output: epath.Path, scratch: Path, start: int, shard_tokens: int, stack):
    self.documents = self.duplicates = 0
    self._split, self._output, self._scratch = split, output, scratch
    self._start, self._shard_tokens = start, shard_tokens
    self._tokens = 1  # a split's stream begins with an end token
    self._sums = np.zeros(3, np.int64)
    self._shards: list[dict[str, Any]] = []
    self._open = stack.enter_context(contextlib.ExitStack())
    self._close_shard = lambda: None

  def add(self, numbers: np.ndarray, rows: np.ndarray) -> None:
    """Appends at least one document, given the piece and the ROW of each, [N]."""
    lengths = rows["tokens"].astype(np.int64)
    offsets = rows["offset"].astype(np.int64)
    ends = self._tokens + np.cumsum(lengths)
    begins = ends - lengths
    new = np.ones(len(rows), bool)
    new[1:] = (numbers[1:] != numbers[:-1]) | (offsets[1:] != offsets[:-1] + lengths[:-1])
    first = np.flatnonzero(new)
    run_numbers, run_offsets, run_begins = numbers[first], offsets[first], begins[first]
    run_ends = np.append(run_begins[1:], ends[-1])
    starts = begins + self._start
    for shard in range(max(len(self._shards) - 1, 0), (int(ends[-1]) - 1) // self._shard_tokens + 1):
      if shard == len(self._shards):
        self._open_shard()
      low, high = shard * self._shard_tokens, (shard + 1) * self._shard_tokens
      inside = slice(np.searchsorted(run_ends, low, side="right"), np.searchsorted(run_begins, high))
      runs = np.zeros(inside.stop - inside.start, _RUN)
      runs["piece"] = run_numbers[inside]
      shift = run_offsets[inside] - run_begins[inside]
      runs["begin"] = np.maximum(run_begins[inside], low) + shift
      runs["end"] = np.minimum(run_ends[inside], high) + shift
      self._runs.write(runs.tobytes())
      places = starts[np.searchsorted(starts, low) : np.searchsorted(starts, high)]
      self._places.write(places.astype("<u8"))
    self._tokens = int(ends[-1])
    self.documents += len(rows)
    self._sums += [int(rows[name].sum(dtype=np.int64)) for name in ("bytes", "weighted_tokens", "weighted_bytes")]

  def close(self, weighted: bool) -> Split:
    self._close_shard()
    for number, shard in enumerate(self._shards):
      shard["tokens"] = min(self._shard_tokens, self._tokens - number * self._shard_tokens)
    size, tokens, size_weighted = self._sums.tolist()
    counts = {"tokens": self._tokens, "documents": self.documents, "bytes": size}
    if weighted:
      counts |= {"weighted_tokens": tokens, "weighted_bytes": size_weighted}
    return Split(counts | {"duplicates_dropped": self.duplicates}, self._shards)

  def _open_shard(self) -> None:
    self._close_shard()
    stem = f"{self._split}-{len(self._shards):05d}"
    self._runs = self._open.enter_context((self._scratch / f"{stem}.runs").open("wb"))
    self._places = chunks.Sink(self._open.enter_context(streams.new_file(self._output / f"{stem}.documents")))
    shard: dict[str, Any] = {"documents": {"file": f"{stem}.documents"}}
    self._shards.append(shard)

    def close():
      self._open.close()
      written = self._places.close()
      shard["documents"] |= {"count": written["bytes"] // 8, "sha256": written["sha256"]}

    self._close_shard = close


def write_shard(
  pieces: Pieces,
  output: epath.Path,
  split: str,
  number: int,
  runs: Path,
  kinds: Sequence[str],
  *,
  dtype: np.dtype,
  end_id: int,
  made_of: str,
) -> dict[str, str]:
  """Copies a shard's tokens and annotations from the pieces; a shard that is already complete is not copied again.

  Args:
    pieces: the pieces of the task; their `documents` aren't needed.
    output: the store's folder.
    split, number: the split and the number of the shard.
    runs: the shard's list of token runs, which `lay_out` has written.
    kinds: 'tokens', and the names of the annotations.
    dtype: the dtype of the tokens.
    end_id: the end token.
    made_of: a digest of everything that determines the shard's content.

  Returns:
    hexadecimal sha256 by kind.

  Raises:
    Damaged: a file of a piece was altered.
  """
  done = pieces.folder / f"shard-{split}-{number:05d}.json"
  record = streams.read_json(done)
  paths = {kind: output / f"{split}-{number:05d}.{kind}" for kind in kinds}
  files = record["files"] if isinstance(record, dict) and record.get("made_of") == made_of else {}
  if files and all(_is_complete(paths[kind], files[kind]) for kind in kinds):
    return {kind: files[kind]["sha256"] for kind in kinds}
  files = {}
  for kind in kinds:
    files[kind] = _copy(pieces, paths[kind], split, number, runs, kind, dtype if kind == "tokens" else None, end_id)
  streams.write_json(done, {"made_of": made_of, "files": files})
  return {kind: files[kind]["sha256"] for kind in kinds}


def _copy(pieces, path, split, number, runs, kind, dtype, end_id) -> dict[str, Any]:
  width = dtype.itemsize if dtype else 1
  sources: collections.OrderedDict[int, chunks.Chunked] = collections.OrderedDict()
  with streams.new_file(path) as file:
    sink = chunks.Sink(file)
    if number == 0:
      sink.write(np.array([end_id], dtype) if dtype else np.zeros(1, np.uint8))
    with open(runs, "rb") as listed:
      while part := listed.read(_READ_ROWS * _RUN.itemsize):
        for piece, begin, end in np.frombuffer(part, _RUN).tolist():
          if piece not in sources:
            sources[piece] = pieces.open(piece, f"{split}.{kind}")
            if len(sources) > _OPEN_PIECES:
              sources.popitem(last=False)
          sources.move_to_end(piece)
          for content in sources[piece].read(begin * width, end * width):
            sink.write(content)
    return sink.close()


def _is_complete(path: epath.Path, described: dict[str, Any]) -> bool:
  if streams.size_of(path) != described["bytes"]:
    return False
  digest = hashlib.sha256()
  for content in chunks.parts(path):
    digest.update(content)
  return digest.hexdigest() == described["sha256"]
