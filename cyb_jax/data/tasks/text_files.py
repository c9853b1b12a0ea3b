"""`text_files`: the user's text files, each a document, or each of their lines."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from etils import epath

from cyb_jax.data.tasks.interface import Piece, Source, TaskKind, consecutive_pieces
from cyb_jax.data.tasks.options import one_of
from cyb_jax.errors import InputError

# Files of up to this many bytes in all are identified by their contents, others by their names and sizes.
_HASHED_BYTES = 256 << 20
_PIECE_BYTES = 256 << 20


def _open(options: Mapping[str, Any]):
  by_line, pattern = one_of(options, "unit", ("file", "line")) == "line", options["pattern"]
  if not pattern:
    raise InputError("data.options.pattern='': give the files of text_files, such as 'books/**/*.txt'")
  files = _matching(pattern)
  if not files:
    raise InputError(f"data.options.pattern={pattern!r}: no file matches; give a glob that matches text files")
  texts = _TextFiles(files, [path.stat().length for path in files], by_line)
  return texts.identity(), lambda: Source(("train",), texts.read, texts.pieces, hash_splits=True)


def _matching(pattern: str) -> list[epath.Path]:
  """The files that a pattern matches, sorted by path."""
  # Only pathlib supports `**`, only epath supports buckets.
  kind = epath.Path if "://" in pattern else Path
  if kind is epath.Path and "**" in pattern:
    raise InputError(f"data.options.pattern={pattern!r}: ** is not possible in a bucket; give * for each folder")
  # A glob needs a folder to start from: the part of the pattern before its first wildcard.
  parts = kind(pattern).expanduser().parts
  fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
  root = kind(*parts[:fixed])
  found = [root] if fixed == len(parts) else root.glob("/".join(parts[fixed:]))
  return [epath.Path(path) for path in sorted(found, key=os.fspath) if path.exists() and not path.is_dir()]


@dataclasses.dataclass(frozen=True)
class _TextFiles:
  """Files in the order in which they are read.

  Attributes:
    files: their paths.
    sizes: bytes of each.
    by_line: whether each line is a document; else each file is one.
  """

  files: Sequence[epath.Path]
  sizes: Sequence[int]
  by_line: bool

  def identity(self) -> dict[str, Any]:
    """See `Task.identity`."""
    hash_contents = sum(self.sizes) <= _HASHED_BYTES
    digest = hashlib.blake2b(digest_size=16)
    for path, size in zip(self.files, self.sizes, strict=True):
      digest.update(f"{path.name}\n{size}\n".encode())
      if hash_contents:
        digest.update(path.read_bytes())
    return {"files": len(self.files), "bytes": sum(self.sizes), "digest": digest.hexdigest()}

  def pieces(self, group: str) -> list[Piece]:
    """See `Source.parts`."""
    return consecutive_pieces(group, spans(self.sizes, whole_files=not self.by_line))

  def read(self, group: str, part: list[int] | None) -> Iterator[str]:
    """See `Source.read`; a part is a span of `spans`."""
    del group
    first, begin, last, end = part or (0, 0, len(self.files), 0)
    for number in range(first, min(last + 1, len(self.files))):
      start, stop = begin if number == first else 0, end if number == last else None
      if stop != 0:
        yield from self._documents(self.files[number], start, stop)

  def _documents(self, path: epath.Path, start: int, stop: int | None) -> Iterator[str]:
    """The documents that begin in the bytes [start, stop) of a file."""
    try:
      # Bytes are read, so that line ends stay as they are.
      if not self.by_line:
        yield path.read_bytes().decode()
        return
      with path.open("rb") as file:
        yield from (line.rstrip(b"\r\n").decode() for line in lines(file, start, stop))
    except UnicodeDecodeError as error:
      raise InputError(f"data.options.pattern: {os.fspath(path)} is no UTF-8 ({error.reason}); convert it") from error


def lines(file: IO[bytes], start: int, stop: int | None) -> Iterator[bytes]:
  """The lines that begin in the bytes [start, stop) of a file; stop None: up to its end."""
  if start:
    # A line that begins exactly at `start` belongs to the range: the byte before it ends the line before.
    file.seek(start - 1)
    start += len(file.readline()) - 1
  for line in file:
    if stop is not None and start >= stop:
      return
    yield line
    start += len(line)


def spans(sizes: Sequence[int], *, whole_files: bool) -> Iterator[tuple[list[int], int]]:
  """Divides files into spans of about `_PIECE_BYTES` bytes.

  Args:
    sizes: bytes of each file.
    whole_files: whether a span may end only where a file ends.

  Yields:
    [first file, byte in it, last file, byte in it] and the number of bytes. A span ends before the byte in its last
    file; byte 0 excludes that file.
  """
  first, begin, size = 0, 0, 0
  for number, length in enumerate(sizes):
    done = 0
    while length - done + size >= _PIECE_BYTES:
      end = length if whole_files else done + _PIECE_BYTES - size
      size += end - done
      done = end
      last = [number + 1, 0] if end == length else [number, end]
      yield [first, begin, *last], size
      (first, begin), size = last, 0
      if done == length:
        break
    else:
      size += length - done
  if first < len(sizes):
    yield [first, begin, len(sizes), 0], size


KIND = TaskKind({"pattern": "", "unit": "file"}, _open)
