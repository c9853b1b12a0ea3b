"""Files of a token store whose digests are checked chunk by chunk while they are read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from cyb_jax.storage.streams import Output, read, read_parts

# Every chunk of this many bytes has its own digest, so a chunk can be read and checked without the rest of the file.
CHUNK_BYTES = 4 << 20


def parts(path: epath.Path) -> Iterator[bytes]:
  """The content of a file in parts of `CHUNK_BYTES`."""
  return read_parts(path, CHUNK_BYTES)


class Sink:
  """Writes a file in parts and computes its digests.

  Args:
    file: the result of `cyb_jax.storage.streams.new_file`.
    chunked: whether every `CHUNK_BYTES` of the file get a digest, for `Chunked`; otherwise the file gets a single one.
  """

  def __init__(self, file: Output, *, chunked: bool = False):
    self._file, self._chunked = file, chunked
    self._size = 0
    self._chunks: list[str] = []
    self._chunk_bytes = self._missing = CHUNK_BYTES
    self._whole, self._chunk = hashlib.sha256(), hashlib.sha256()

  def write(self, array: np.ndarray | bytes) -> None:
    content = memoryview(array if isinstance(array, bytes) else np.ascontiguousarray(array)).cast("B")
    self._file.write(content)
    self._size += len(content)
    if not self._chunked:
      self._whole.update(content)
      return
    while len(content) >= self._missing:
      self._chunk.update(content[: self._missing])
      content = content[self._missing :]
      self._next_chunk()
    self._chunk.update(content)
    self._missing -= len(content)

  def close(self) -> dict[str, Any]:
    """The description of the file: `bytes`, and hexadecimal `sha256`.

    `sha256` is the digest of the file, or a list of the digests of its chunks of `chunk_bytes` bytes. The last chunk
    may be shorter.
    """
    if not self._chunked:
      return {"bytes": self._size, "sha256": self._whole.hexdigest()}
    if self._missing < self._chunk_bytes:
      self._next_chunk()
    return {"bytes": self._size, "chunk_bytes": self._chunk_bytes, "sha256": self._chunks}

  def _next_chunk(self) -> None:
    self._chunks.append(self._chunk.hexdigest())
    self._chunk, self._missing = hashlib.sha256(), self._chunk_bytes


class Damaged(Exception):
  """A file is missing or altered; the message names the file."""


class Chunked:
  """Reads a file that `Sink` has written and checks each chunk; the last chunk is cached.

  Args:
    path: path of the file.
    described: the value that `Sink.close` returned.

  Raises:
    Damaged: a chunk that is read is missing or altered.
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
      raise Damaged(f"{os.fspath(self.path)} was altered after it was written")
    return content
