"""The files of a task: the match of a pattern, their identity, their compression, and their division into spans.

The suffix of a file (.gz, .bz2, .xz, .zst) determines its compression. A compressed file can only be read from its
beginning, so it is never divided.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from etils import epath

from cyb_jax.errors import InputError
from cyb_jax.storage import absolute, streams

# Files of up to this many bytes in total are identified by their contents, others by their names and sizes.
_HASHED_BYTES = 256 << 20
_READ_BYTES = 4 << 20
# A span is 1/1024 of all bytes, within these limits: small corpora still keep several workers busy, and large corpora
# do not have many thousands of spans to merge.
_SPAN_BYTES = 8 << 20, 256 << 20
_SPANS = 1024
# The format is detected from the beginnings of at most this many files.
_INSPECTED_FILES = 10_000
_INSPECTED_BYTES = 1 << 16

_SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_MAGIC = {
  b"\x1f\x8b": "gzip",
  b"BZh": "bzip2",
  b"\xfd7zXZ\x00": "xz",
  b"\x28\xb5\x2f\xfd": "zstd",
  b"PK\x03\x04": "zip",
  b"PAR1": "Parquet",
  b"ARROW1": "Arrow",
}
# Errors of the decompressors.
_DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error)


def compression(path: str | os.PathLike) -> str | None:
  """'gzip', 'bzip2', 'xz' or 'zstd' by the suffix of a path; None if the file is not compressed."""
  return _SUFFIXES.get(os.path.splitext(os.fspath(path))[1].lower())


def matching(option: str, pattern: str) -> list[epath.Path]:
  """The files that a pattern matches, sorted by path.

  Args:
    option: the name of the option whose value is the pattern, for errors.
    pattern: a path or a glob, on a local disk or in a bucket; `~` is expanded.

  Raises:
    InputError: the pattern is empty, matches nothing, or has `**` in a bucket.
  """
  if not pattern:
    raise InputError(f"data.options.{option}='': give the files to read, such as 'books/**/*.txt'")
  # Only pathlib supports `**`, only epath supports buckets.
  kind = epath.Path if "://" in pattern else Path
  if kind is epath.Path and "**" in pattern:
    raise InputError(f"data.options.{option}={pattern!r}: ** is unsupported in a bucket; give * for each folder")
  # A glob needs a folder to start from: the part of the pattern before its first wildcard.
  parts = kind(absolute(pattern)).parts
  fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
  root = kind(*parts[:fixed])
  found = [root] if fixed == len(parts) else root.glob("/".join(parts[fixed:]))
  files = [epath.Path(path) for path in sorted(found, key=os.fspath) if path.exists() and not path.is_dir()]
  if not files:
    raise InputError(f"data.options.{option}={pattern!r}: no file matches; give a path or a glob that matches files")
  return files


@dataclasses.dataclass(frozen=True)
class Files:
  """Files in the order in which they are read.

  Attributes:
    option: the option that names them, for errors.
    paths: their paths.
    sizes: bytes of each file.
  """

  option: str
  paths: Sequence[epath.Path]
  sizes: Sequence[int]

  @classmethod
  def find(cls, option: str, pattern: str) -> Files:
    """The files that a pattern matches; raises as `matching`."""
    paths = matching(option, pattern)
    return cls(option, paths, [path.stat().length for path in paths])

  def identity(self) -> dict[str, Any]:
    """The number of files, their total bytes, and a digest of names, sizes and, up to 256 MiB in total, contents."""
    hash_contents = sum(self.sizes) <= _HASHED_BYTES
    digest = hashlib.blake2b(digest_size=16)
    for path, size in zip(self.paths, self.sizes, strict=True):
      digest.update(f"{path.name}\n{size}\n".encode())
      if hash_contents:
        for part in streams.read_parts(path, _READ_BYTES):
          digest.update(part)
    return {"files": len(self.paths), "bytes": sum(self.sizes), "digest": digest.hexdigest()}

  def spans(self, *, whole_files: bool) -> Iterator[tuple[list[int], int]]:
    """The files divided into spans; see `spans`. Compressed files are not divided."""
    lowest, highest = _SPAN_BYTES
    divisible = [not whole_files and compression(path) is None for path in self.paths]
    return spans(self.sizes, divisible, min(max(sum(self.sizes) // _SPANS, lowest), highest))

  def parts(self, span: list[int] | None) -> Iterator[tuple[epath.Path, int, int | None]]:
    """(path, first byte, end byte) of each file in a span of `spans`; end None means the file's end."""
    first, begin, last, end = span or (0, 0, len(self.paths), 0)
    for number in range(first, min(last + 1, len(self.paths))):
      start, stop = begin if number == first else 0, end if number == last else None
      if stop != 0:
        yield self.paths[number], start, stop

  def inspect(self, refuse: Callable[[epath.Path, bytes], str | None]) -> None:
    """Checks the beginnings of the first files.

    Args:
      refuse: (path, the first bytes, decompressed) -> why this task cannot read the file, with a remedy; or None.

    Raises:
      InputError: `refuse` returns a reason for a file, or a file cannot be decompressed.
    """
    for path in self.paths[:_INSPECTED_FILES]:
      with opened(self.option, path) as file, undamaged(self.option, path):
        reason = refuse(path, file.read(_INSPECTED_BYTES))
      if reason is not None:
        raise InputError(f"data.options.{self.option}: {os.fspath(path)} {reason}")


@contextlib.contextmanager
def opened(option: str, path: epath.Path) -> Iterator[IO[bytes]]:
  """The decompressed bytes of a file.

  Raises:
    InputError: the file cannot be opened.
  """
  kind = compression(path)
  with contextlib.ExitStack() as stack:
    try:
      file: Any = stack.enter_context(path.open("rb"))
      if kind == "zstd":
        import pyarrow

        file = stack.enter_context(io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")))
      elif kind is not None:
        file = stack.enter_context({"gzip": gzip, "bzip2": bz2, "xz": lzma}[kind].open(file))
    except OSError as error:
      raise InputError(
        f"data.options.{option}: {os.fspath(path)} cannot be opened ({error.strerror or error}); give readable files"
      ) from error
    yield file


@contextlib.contextmanager
def undamaged(option: str, path: epath.Path, where: Callable[[], str] = lambda: "") -> Iterator[None]:
  """Converts a decompressor's errors inside the `with` block to InputErrors that name the file.

  Args:
    option: the option that names the file.
    path: the path of the file.
    where: () -> the position in the file, such as ', line 7', for the message.
  """
  try:
    yield
  except _DAMAGED as error:
    kind = compression(path)
    if kind is None:
      raise
    reason = " ".join(str(error).split()) or type(error).__name__
    raise InputError(
      f"data.options.{option}: {os.fspath(path)}{where()}: the {kind} file is damaged or truncated ({reason}); fetch it"
      " again"
    ) from error


def format_of(path: epath.Path, head: bytes) -> str | None:
  """The format of a file: 'JSON', 'Parquet', 'Arrow', 'zip', a compression such as 'gzip', or None for plain text.

  A file is taken for JSON if it has a suffix of JSON files, or if its first two lines are JSON objects. If the first
  line is longer than `head`, the beginning of that line decides.

  Args:
    path: path of the file.
    head: the first bytes of the file, decompressed.
  """
  for magic, kind in _MAGIC.items():
    if head.startswith(magic):
      return kind
  suffixes = [suffix.lower() for suffix in Path(path.name).suffixes if suffix.lower() not in _SUFFIXES]
  suffix = suffixes[-1] if suffixes else ""
  head = head.removeprefix(codecs.BOM_UTF8).lstrip()
  if suffix in (".jsonl", ".ndjson") or (suffix == ".json" and head[:1] in (b"{", b"[")):
    return "JSON"
  if suffix in (".parquet", ".arrow"):
    return suffix[1:].capitalize()
  if len(head) > _INSPECTED_BYTES // 2 and b"\n" not in head:
    return "JSON" if re.match(rb'\{\s*"', head) else None
  first = [line for line in head.split(b"\n") if line.strip()][:2]
  return "JSON" if len(first) == 2 and all(map(_is_object, first)) else None


def _is_object(line: bytes) -> bool:
  try:
    return isinstance(json.loads(line), dict)
  except (ValueError, RecursionError):
    return False


def lines(file: IO[bytes], start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
  """(position, line) of the lines that begin in the bytes [start, stop) of a file; stop None means the file's end."""
  if start:
    # A line that begins exactly at `start` belongs to the range, so reading starts one byte earlier, at a line end.
    file.seek(start - 1)
    start += len(file.readline()) - 1
  for line in file:
    if stop is not None and start >= stop:
      return
    yield start, line
    start += len(line)


def line_number(path: epath.Path, position: int) -> int:
  """The number, counted from 1, of the line that begins at a position of an uncompressed file."""
  count = 1
  with path.open("rb") as file:
    while position > 0 and (part := file.read(min(position, 1 << 20))):
      count += part.count(b"\n")
      position -= len(part)
  return count


def spans(sizes: Sequence[int], divisible: Sequence[bool], span_bytes: int) -> Iterator[tuple[list[int], int]]:
  """Divides files into spans of about `span_bytes` bytes.

  Args:
    sizes: bytes of each file.
    divisible: for each file, whether a span may end inside it.
    span_bytes: the target number of bytes of a span.

  Yields:
    [first file, byte in it, last file, byte in it] and the number of bytes. The byte in the last file is exclusive: 0
    excludes that file.
  """
  first, begin, size = 0, 0, 0
  for number, length in enumerate(sizes):
    done = 0
    while length - done + size >= span_bytes:
      end = done + span_bytes - size if divisible[number] else length
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
