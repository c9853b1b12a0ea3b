"""Reads the metadata of a GGUF file: the keys and values before its tensors.

The package gguf also reads them, but it creates an array for every string, which takes seconds for a vocabulary; this
module takes a few hundredths of a second.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Any

from cyb_jax.errors import InputError

MAGIC = b"GGUF"
# The format characters of the module struct by type number. Type 8 is a string, and type 9 is an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
  """The values by key, arrays as lists. Bytes of strings that are not UTF-8 become U+FFFD.

  Raises:
    InputError: the file is missing, is not a GGUF file of version 2 or 3, or is truncated within its metadata.
  """
  try:
    with open(path, "rb") as file:
      content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: it can't be read ({error}); give a GGUF file") from error
  with content:
    version = struct.unpack("<I", content[4:8])[0] if content[:4] == MAGIC and len(content) >= 8 else None
    if version not in (2, 3):
      found = f"GGUF version {version}" if version is not None else "not a GGUF file"
      raise InputError(f"{path}: {found}; give a GGUF file of version 2 or 3, little-endian")
    try:
      return _Reader(content).pairs()
    except (struct.error, LookupError, OverflowError, MemoryError, RecursionError) as error:
      raise InputError(f"{path}: its metadata is truncated or damaged; fetch it again") from error


class _Reader:
  """Reads consecutive values; the position of a new reader is after the magic and the version."""

  def __init__(self, content: mmap.mmap):
    self._content, self._offset = content, 8

  def pairs(self) -> dict[str, Any]:
    _, count = self._take("<QQ")
    pairs = {}
    for _ in range(count):
      key = self._string()
      pairs[key] = self._value(*self._take("<I"))
    return pairs

  def _value(self, kind: int) -> Any:
    if kind == _STRING:
      return self._string()
    if kind != _ARRAY:
      return self._take("<" + _NUMBERS[kind])[0]
    item, count = self._take("<IQ")
    if item in (_STRING, _ARRAY):
      return [self._value(item) for _ in range(count)]
    return list(self._take(f"<{count}{_NUMBERS[item]}"))

  def _string(self) -> str:
    (length,) = self._take("<Q")
    text = self._content[self._offset : self._offset + length]
    if len(text) < length:
      raise IndexError
    self._offset += length
    return text.decode(errors="replace")

  def _take(self, form: str) -> tuple:
    values = struct.unpack_from(form, self._content, self._offset)
    self._offset += struct.calcsize(form)
    return values
