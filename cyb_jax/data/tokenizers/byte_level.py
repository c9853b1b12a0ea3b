"""The characters of bytes in byte-level vocabularies: a printable byte is its own, others are mapped from U+0100 on."""

from __future__ import annotations

import functools
from collections.abc import Iterable


@functools.cache
def _characters() -> tuple[str, ...]:
  """The character of each byte."""
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = iter(range(256, 512))
  return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


@functools.cache
def _bytes_by_character() -> dict[str, int]:
  return {character: byte for byte, character in enumerate(_characters())}


def missing_bytes(names: Iterable[str]) -> set[int]:
  """The bytes that have no entry in a vocabulary with these names."""
  entries = set(names)
  return {byte for byte, character in enumerate(_characters()) if character not in entries}


def printable(name: str) -> str | None:
  """The name of an entry with its characters decoded and control characters visible; None if it is not byte-level."""
  byte_of = _bytes_by_character()
  if any(character not in byte_of for character in name):
    return None
  return visible(bytes(byte_of[character] for character in name))


def visible(content: bytes) -> str:
  """UTF-8 as text in which a space is U+2581, and control characters and incomplete bytes have the form `<0x0A>`."""
  return "".join(map(_visible, content.decode(errors="surrogateescape")))


def _visible(character: str) -> str:
  if character == " ":
    return "▁"
  code = ord(character)
  # A byte of an incomplete character is decoded to a surrogate.
  return f"<0x{code & 0xFF:02X}>" if code < 32 or code == 127 or 0xDC80 <= code <= 0xDCFF else character
