"""The tokenizer.bin of llama2.c: the pieces of Llama 2's SentencePiece model, or of a similarly trained model.

The file contains an int32, the length of the longest piece; then, for each piece, its float32 score, its int32 length
in bytes, and its bytes. Files of the first version of the format (that of stories15M, for example) have the bytes
themselves in place of the 256 pieces <0x00> to <0xFF>.

Format: https://github.com/karpathy/llama2.c/blob/master/tokenizer.py
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

from cyb_jax.data.tokenizers.interface import Tokenizer
from cyb_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from cyb_jax.data.tokenizers.sentencepiece_model import PieceType, bpe_model
from cyb_jax.errors import InputError

# The largest value of the header, in bytes: a larger number means another kind of file.
_LONGEST_PIECE = 1 << 16
_CONTROL_NAMES = {"\n<s>\n": "<s>", "\n</s>\n": "</s>"}
_UNKNOWN_ID, _BOS_ID, _EOS_ID = 0, 1, 2
# The ids of the pieces of single bytes.
_BYTES = range(3, 259)


def open_llama2c(path: Path, rows: int | None) -> Tokenizer:
  """The tokenizer of a tokenizer.bin.

  The models of llama2.c are trained on documents that are preceded by the begin token and have no end token, so the
  begin token is both start_id and separator_id.

  Args:
    path: the file.
    rows: number of rows of the embedding; None means the number of pieces.

  Raises:
    InputError: the file has another format or is truncated, or `rows` does not match.
  """
  pieces = [_typed(number, piece, score) for number, (piece, score) in enumerate(_spelled(_read(path), path))]
  model = bpe_model(pieces, _BOS_ID, _EOS_ID, os.fspath(path), dummy_prefix=True)
  return SentencePieceTokenizer(
    model, rows=rows, separator_id=_BOS_ID, start_id=_BOS_ID, adds_start=True, name=os.fspath(path)
  )


def _read(path: Path) -> list[tuple[bytes, float]]:
  """(piece, score) by id."""
  content = path.read_bytes()
  pieces, offset = [], 4
  try:
    (longest,) = struct.unpack_from("<i", content, 0)
    while offset < len(content):
      score, length = struct.unpack_from("<fi", content, offset)
      text = content[offset + 8 : offset + 8 + length]
      if not 0 <= length <= longest or len(text) < length or longest > _LONGEST_PIECE:
        raise ValueError(f"a piece of {length} bytes")
      pieces.append((text, score))
      offset += 8 + length
    if len(pieces) < 3:
      raise ValueError(f"{len(pieces)} pieces")
  except (struct.error, ValueError) as error:
    raise InputError(
      f"{path}: it is not a tokenizer.bin of llama2.c, or is truncated ({error}, at byte {offset} of {len(content)});"
      " fetch it again"
    ) from error
  return pieces


def _spelled(pieces: list[tuple[bytes, float]], path: Path) -> list[tuple[str, float]]:
  """(piece, score) by id, as text; bytes have the form <0x00>.

  Raises:
    InputError: a piece is not UTF-8.
  """
  are_raw = all(number < len(pieces) and pieces[number][0] == bytes([number - _BYTES.start]) for number in _BYTES)
  spelled = []
  for number, (piece, score) in enumerate(pieces):
    if are_raw and number in _BYTES:
      spelled.append((f"<0x{piece[0]:02X}>", score))
      continue
    try:
      spelled.append((piece.decode(), score))
    except UnicodeDecodeError as error:
      raise InputError(
        f"{path}: it is not a tokenizer.bin of llama2.c: piece {number}, {piece!r}, is not UTF-8 ({error.reason});"
        " fetch it again"
      ) from error
  return spelled


def _typed(number: int, piece: str, score: float) -> tuple[str, float, int]:
  """(piece, score, PieceType): the file has no types, so the id and the spelling determine the type."""
  if number == _UNKNOWN_ID:
    return piece, score, PieceType.UNKNOWN
  if number in (_BOS_ID, _EOS_ID):
    return _CONTROL_NAMES.get(piece, piece), score, PieceType.CONTROL
  is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", piece)
  return piece.replace(" ", "▁"), score, PieceType.BYTE if is_byte else PieceType.NORMAL
