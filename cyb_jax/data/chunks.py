"""Files of a store and of its pieces, on a local disk or in a bucket, through epath.

Beside what `cyb_jax.storage` has for a run: large files, written and read in parts. An object of a bucket appears whole
when it is closed; a file of a local disk is written beside its place and moved there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from etils import epath

from cyb_jax.errors import InputError, StorageError, bucket_cause, storage_cause
from cyb_jax.storage import in_bucket

# A digest for each so many bytes of a file: parts of it are read and checked by themselves.
CHUNK_BYTES = 4 << 20


def place(path: str | os.PathLike) -> epath.Path:
  """A folder or a file; a local one is made absolute."""
  return epath.Path(path) if in_bucket(path) else epath.Path(Path(path).expanduser().absolute())


@contextlib.contextmanager
def _told(path: str | os.PathLike, what: str) -> Iterator[None]:
  """Errors of a disk or a bucket inside become a StorageError, in one line; that a file isn't there goes through.

  Nothing but the access itself may be inside: clients of buckets have errors of many kinds.
  """
  try:
    yield
  except FileNotFoundError:
    raise
  except ImportError as error:
    raise InputError(
      f"{os.fspath(path)}: the package gcsfs is not installed ({error}); pip install 'cyb_jax[gcs]'"
    ) from error
  except Exception as error:
    if not isinstance(error, OSError) and not in_bucket(path):
      raise
    reason = storage_cause(error) if isinstance(error, OSError) and error.errno else bucket_cause(error)
    reason = reason or " ".join(str(error).split())[:200] or type(error).__name__
    raise StorageError(
      f"{os.fspath(path)} can't be {what}: {reason}; what is whole is kept, and the same command continues"
    ) from error


class _Told:
  """A file being written, whose errors are told."""

  def __init__(self, file: IO[bytes], path: epath.Path):
    self._file, self._path = file, path

  def write(self, content: bytes | memoryview) -> None:
    with _told(self._path, "written"):
      self._file.write(bytes(content) if in_bucket(self._path) else content)  # TensorFlow's take nothing else


@contextlib.contextmanager
def new_file(path: epath.Path) -> Iterator[_Told]:
  """A file to write, which appears when it is whole.

  Raises:
    StorageError: the disk or the bucket fails.
  """
  with contextlib.ExitStack() as stack:
    if in_bucket(path):
      with _told(path, "written"):
        file = stack.enter_context(path.open("wb"))
      yield _Told(file, path)
      with _told(path, "written"):
        stack.close()
      return
    # Of two that write the same file, each writes its own.
    scratch = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
      with _told(path, "written"):
        file = stack.enter_context(open(scratch, "wb"))
      yield _Told(file, path)
      with _told(path, "written"):
        stack.close()
        os.replace(scratch, path)
    except BaseException:
      with contextlib.suppress(OSError):
        stack.close()
      scratch.unlink(missing_ok=True)
      raise


def write(path: epath.Path, content: bytes) -> None:
  """Writes a file, whole."""
  with new_file(path) as file:
    file.write(content)


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a JSON file, whole."""
  write(path, (json.dumps(value, indent=2) + "\n").encode())


def read(path: epath.Path, begin: int = 0, end: int | None = None) -> bytes:
  """The bytes [begin, end) of a file, or less where it ends before.

  Raises:
    FileNotFoundError: there is none.
    StorageError: the disk or the bucket fails.
  """
  with _told(path, "read"), path.open("rb") as file:
    if begin:
      file.seek(begin)
    return file.read() if end is None else file.read(end - begin)


def read_json(path: epath.Path) -> Any:
  """What a JSON file says; None where there is none, or it is none."""
  try:
    return json.loads(read(path))
  except (FileNotFoundError, ValueError):
    return None


def parts(path: epath.Path) -> Iterator[bytes]:
  """A file in parts of `CHUNK_BYTES`."""
  with contextlib.ExitStack() as stack:
    with _told(path, "read"):
      file = stack.enter_context(path.open("rb"))
    while True:
      with _told(path, "read"):
        content = file.read(CHUNK_BYTES)
      if not content:
        return
      yield content


def size_of(path: epath.Path) -> int | None:
  """Bytes of a file; None where there is none."""
  try:
    with _told(path, "read"):
      return int(path.stat().length if in_bucket(path) else os.stat(path).st_size)
  except FileNotFoundError:
    return None


def names(path: epath.Path) -> list[str]:
  """What is in a folder; nothing where there is none."""
  try:
    with _told(path, "read"):
      return sorted(found.name for found in path.iterdir()) if in_bucket(path) else sorted(os.listdir(path))
  except FileNotFoundError:
    return []


def make_folder(path: epath.Path) -> None:
  """A folder, and those that it is in."""
  with _told(path, "written"):
    path.mkdir(parents=True, exist_ok=True)


def remove(path: epath.Path) -> None:
  """Deletes a file or a folder and what is in it, if it is there."""
  with contextlib.suppress(FileNotFoundError), _told(path, "written"):
    path.rmtree() if path.is_dir() else path.unlink()


class Sink:
  """A file that is written in parts, and its digests.

  Args:
    file: of `new_file`.
    chunked: each `CHUNK_BYTES` of it have a digest, for `Chunked`; else all of it has one.
  """

  def __init__(self, file: _Told, *, chunked: bool = False):
    self._file, self._chunked = file, chunked
    self._size = 0
    self._chunks: list[str] = []
    self._chunk_bytes = self._room = CHUNK_BYTES
    self._whole, self._chunk = hashlib.sha256(), hashlib.sha256()

  def write(self, array: np.ndarray | bytes) -> None:
    content = memoryview(array if isinstance(array, bytes) else np.ascontiguousarray(array)).cast("B")
    self._file.write(content)
    self._size += len(content)
    if not self._chunked:
      self._whole.update(content)
      return
    while len(content) >= self._room:
      self._chunk.update(content[: self._room])
      content = content[self._room :]
      self._next_chunk()
    self._chunk.update(content)
    self._room -= len(content)

  def close(self) -> dict[str, Any]:
    """`bytes`, and hexadecimal `sha256`: of all, or of each of the chunks of `chunk_bytes`, the last one shorter."""
    if not self._chunked:
      return {"bytes": self._size, "sha256": self._whole.hexdigest()}
    if self._room < self._chunk_bytes:
      self._next_chunk()
    return {"bytes": self._size, "chunk_bytes": self._chunk_bytes, "sha256": self._chunks}

  def _next_chunk(self) -> None:
    self._chunks.append(self._chunk.hexdigest())
    self._chunk, self._room = hashlib.sha256(), self._chunk_bytes


class Damaged(Exception):
  """A file isn't what was written; the message says which."""


class Chunked:
  """A file that `Sink` wrote, read in parts, each of them checked; the chunk last read is kept.

  Args:
    path: of the file.
    described: what `Sink.close` said.

  Raises:
    Damaged: when a part is read that isn't what was written.
  """

  def __init__(self, path: epath.Path, described: dict[str, Any]):
    self.path = path
    self.size: int = described["bytes"]
    self._chunk_bytes: int = described["chunk_bytes"]
    self._digests: list[str] = described["sha256"]
    self._number, self._content = -1, b""

  def read(self, begin: int, end: int) -> Iterator[memoryview]:
    """The bytes [begin, end), in parts."""
    while begin < end:
      number, offset = divmod(begin, self._chunk_bytes)
      if number != self._number:
        self._content, self._number = self._load(number), number
      part = memoryview(self._content)[offset : offset + end - begin]
      begin += len(part)
      yield part

  def _load(self, number: int) -> bytes:
    begin = number * self._chunk_bytes
    end = min(begin + self._chunk_bytes, self.size)
    try:
      content = read(self.path, begin, end)
    except FileNotFoundError:
      raise Damaged(f"{os.fspath(self.path)} is missing") from None
    if len(content) != end - begin or hashlib.sha256(content).hexdigest() != self._digests[number]:
      raise Damaged(f"{os.fspath(self.path)} isn't what was written")
    return content


@contextlib.contextmanager
def scratch_folder(beside: epath.Path) -> Iterator[Path]:
  """A folder on a local disk that goes again: in `beside` where that is local, else where temporary files are."""
  with tempfile.TemporaryDirectory(prefix="scratch.", dir=None if in_bucket(beside) else beside) as folder:
    yield Path(folder)
