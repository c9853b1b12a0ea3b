"""The tokenizer whose tokens are UTF-8 bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from cyb_jax.data.tokenizers.description import save_description
from cyb_jax.data.tokenizers.interface import surrogate
from cyb_jax.data.tokenizers.special_tokens import SpecialTokens
from cyb_jax.errors import InputError


class ByteTokenizer:
  """The 256 byte values and one end token, 257 ids in total; see `Tokenizer` for the methods."""

  vocab_size = 257
  separator_id = start_id = 256
  adds_start = True
  special_tokens = SpecialTokens()
  chat_template: str | None = None

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  def encode_with_special(self, text: str) -> list[int]:
    return self.encode(text)

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]

  def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], Int[np.ndarray, "N 2"]]]:
    encoded = self.encode_batch(texts)
    return [(ids, np.arange(len(ids))[:, None] + np.arange(2)) for ids in encoded]

  def encode_spans_with_special(self, text: str) -> tuple[list[int], Int[np.ndarray, "N 2"]]:
    return self.encode_spans([text])[0]

  def unencodable(self, text: str) -> str | None:
    return surrogate(text)

  def decode(self, ids: Iterable[int]) -> str:
    return bytes(i for i in map(int, ids) if i != self.separator_id).decode(errors="replace")

  def piece(self, token: int) -> str:
    if token == self.separator_id:
      return "<end>"
    return chr(token) if 32 < token < 127 else f"<0x{token:02X}>"

  def describe(self) -> dict[str, Any]:
    return {
      "kind": "bytes",
      "vocab_size": self.vocab_size,
      "end_id": self.separator_id,
      "sha256": hashlib.sha256(b"bytes").hexdigest(),
    }

  def save(self, directory: str | os.PathLike) -> None:
    save_description(directory, self.describe(), self.special_tokens)

  def special_names(self) -> dict[int, str]:
    return {}

  def unused_ids(self) -> list[int]:
    return []

  def write_huggingface(
    self, directory: str | os.PathLike, added: Sequence[tuple[int, str]] = (), *, starts: bool | None = None
  ) -> None:
    raise InputError("data.tokenizer='bytes': transformers has no such tokenizer; export a run with another tokenizer")
