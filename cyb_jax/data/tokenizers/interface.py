"""The interface of all tokenizers, and functions that their implementations share."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from cyb_jax.data.tokenizers.special_tokens import SpecialTokens
from cyb_jax.errors import InputError

# An embedding may have a few more rows than there are entries, so that it divides evenly over devices. A larger
# difference means that the embedding belongs to another tokenizer.
_SPARE_ROWS = 512
_UNUSED = re.compile(r"<unused_?\d+>|<\|unused_?\d+\|>|<\|reserved_special_token_\d+\|>|<reserved_\d+>|\[unused\d+\]")


@runtime_checkable
class Tokenizer(Protocol):
  """Encodes text to ids in [0, vocab_size), and decodes ids.

  Attributes:
    vocab_size: number of ids, which is the number of rows of the model's embedding. A pretrained embedding may have a
      few more rows than the tokenizer has entries; ids without an entry decode to no text.
    separator_id: the token that separates documents in training. The tokens that end a generated text may differ; see
      `special_tokens` and `text_boundaries`.
    start_id: the token before the text of a document: the start token with which a pretrained model was trained (bos),
      or else separator_id.
    adds_start: whether the model expects start_id before a text that is not the continuation of another text.
    special_tokens: further special tokens that the model's files specify. They do not change the encoding of a text, so
      they are not part of `describe`; `save` and `write_huggingface` write them.
    chat_template: `special_tokens.chat_template`; `chat.render_chat` renders it.
  """

  vocab_size: int
  separator_id: int
  start_id: int
  adds_start: bool
  special_tokens: SpecialTokens
  chat_template: str | None

  def encode(self, text: str) -> list[int]:
    """Ids of `text`; they never include `separator_id` and other control ids."""

  def encode_with_special(self, text: str) -> list[int]:
    """Ids of a rendered chat: the name of a special entry in the text (`<|im_start|>`) becomes its id.

    The other parts are encoded as by `encode`, and nothing is added before or after the text. Prompts of imported
    models are encoded in this way, as in transformers. A message of a chat must not be encoded in this way, because it
    could contain the end of its own turn; see `chat.encode_chat`.
    """

  def encode_spans_with_special(self, text: str) -> tuple[list[int], Int[np.ndarray, "N 2"]]:
    """(`encode_with_special(text)`, int64[N, 2]): the ids and the spans of the N tokens; see `encode_spans`."""

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`[encode(text) for text in texts]`, on all cores."""

  def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], Int[np.ndarray, "N 2"]]]:
    """(`encode(text)`, int64[N, 2]) for each text: the ids and the spans of the N tokens.

    A span is the index of the token's first byte in the UTF-8 of the text, and of the byte after its last byte. Spans
    may overlap: if several tokens encode parts of a character, each of their spans may include the entire character. A
    token without a character, such as a space that the tokenizer puts before the text, has the span of the character
    at its position; after the end of the text, it has a span after the text.
    """

  def unencodable(self, text: str) -> str | None:
    """The first character of `text` that the vocabulary cannot encode; None if it can encode all of them."""

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`; `separator_id` decodes to no text, and bytes that are not UTF-8 decode to U+FFFD."""

  def piece(self, token: int) -> str:
    """A printable name of one id, for reports."""

  def describe(self) -> dict[str, Any]:
    """`kind`, `vocab_size`, `end_id`, the `sha256` of the model, and the settings of the kind.

    `end_id` is `separator_id`, under the key that files of the first version use.

    The descriptions of two tokenizers are equal if and only if the tokenizers are equal; the same holds for their
    sha256.
    """

  def special_names(self) -> dict[int, str]:
    """Names, such as '<|im_end|>', of the vocabulary's special entries by id. Special entries decode to no text."""

  def unused_ids(self) -> list[int]:
    """Ids of entries that the model's authors left unused, such as Gemma's `<unused0>`, ascending."""

  def save(self, directory: str | os.PathLike) -> None:
    """Writes the files that `load` reads into an existing folder."""

  def write_huggingface(
    self, directory: str | os.PathLike, added: Sequence[tuple[int, str]] = (), *, starts: bool | None = None
  ) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` loads.

    Args:
      directory: an existing folder.
      added: (id, name) of special entries to append; the ids ascend and are above all existing ids.
      starts: whether transformers puts `start_id` before a text; None: `adds_start`.

    Raises:
      InputError: transformers has no such tokenizer, or an id or a name is already in use.
    """


def document_tokens(separator_id: int | None, start_id: int | None, adds_start: bool) -> dict[str, Any]:
  """The arguments `separator_id`, `start_id` and `adds_start` of a tokenizer.

  If no start token is added, the separator precedes texts.
  """
  return {"separator_id": separator_id, "start_id": start_id if adds_start else separator_id, "adds_start": adds_start}


def encode_whole(tokenizer: Tokenizer, text: str, field: str, *, special: bool = False) -> list[int]:
  """Ids of a text, all of whose characters must be in the vocabulary.

  Args:
    tokenizer: the tokenizer of a run.
    text: a text that the user gives.
    field: the flag or config field whose value is the text, for the error.
    special: whether the name of a special entry becomes its id (`encode_with_special`) instead of being encoded as
      text.

  Raises:
    InputError: the vocabulary cannot encode one of the characters.
  """
  check_encodable(tokenizer, text, field, special=special)
  return tokenizer.encode_with_special(text) if special else tokenizer.encode(text)


def check_encodable(tokenizer: Tokenizer, text: str, field: str, *, special: bool = False) -> None:
  """Checks that the vocabulary can encode all characters of a text; see `encode_whole` for the arguments.

  Raises:
    InputError: the vocabulary cannot encode one of the characters.
  """
  pattern = special_pattern(tokenizer) if special else None
  for part in [text] if pattern is None else pattern.split(text):
    character = tokenizer.unencodable(part)
    if character is not None:
      raise InputError(f"{field}: the vocabulary can't encode {character!r} (U+{ord(character):04X}); remove it")


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
  """A pattern that matches the names of special entries; None if the vocabulary has no special entries."""
  # Longer names precede their own prefixes.
  names = sorted(filter(None, tokenizer.special_names().values()), key=len, reverse=True)
  return re.compile("|".join(map(re.escape, names))) if names else None


def surrogate(text: str) -> str | None:
  """The first character that UTF-8 cannot represent, or None.

  Python decodes invalid bytes of a command line to such characters.
  """
  return next((character for character in text if "\ud800" <= character <= "\udfff"), None)


def character_places(text: str) -> Int[np.ndarray, "P"]:
  """int64[C + 2]: the index of the first UTF-8 byte of each of the C characters; then S, the number of bytes; S + 1."""
  content = np.frombuffer(text.encode(), np.uint8)
  # In UTF-8, all bytes of a character after the first have the form 0b10xxxxxx.
  return np.append(np.flatnonzero(content & 0xC0 != 0x80), [len(content), len(content) + 1])


def is_unused(piece: str) -> bool:
  """Whether an entry's name marks the entry as unused by the model's authors."""
  return _UNUSED.fullmatch(piece) is not None


def checked_rows(name: str, entries: int, rows: int | None) -> int:
  """The number of rows of a tokenizer's embedding.

  Args:
    name: prefix of the error message.
    entries: number of entries of the tokenizer.
    rows: number of rows of the embedding; None means one row for each entry.

  Raises:
    InputError: an entry has no row, or too many rows have no entry.
  """
  if rows is None:
    return entries
  if not entries <= rows <= entries + _SPARE_ROWS:
    raise InputError(
      f"{name}: {entries} entries, but the model's embedding has {rows} rows; give the tokenizer of this model (at most"
      f" {_SPARE_ROWS} rows without an entry)"
    )
  return rows


def num_threads() -> int:
  """Number of tokenizing threads: RAYON_NUM_THREADS if it is set, otherwise the number of cores of this process.

  The package tokenizers uses the same environment variable.
  """
  setting = os.environ.get("RAYON_NUM_THREADS", "")
  if setting.isdecimal() and int(setting):
    return int(setting)
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
