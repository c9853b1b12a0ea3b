"""The interface of all tokenizers, and the rules that their implementations share."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from cyb_jax.data.tokenizers.special_tokens import SpecialTokens
from cyb_jax.errors import InputError

# An embedding may have a few rows more than there are entries, so that it divides evenly over devices. A larger gap
# means that the embedding belongs to another tokenizer.
_SPARE_ROWS = 512
_UNUSED = re.compile(r"<unused_?\d+>|<\|unused_?\d+\|>|<\|reserved_special_token_\d+\|>|<reserved_\d+>|\[unused\d+\]")


@runtime_checkable
class Tokenizer(Protocol):
  """Turns text into ids in [0, vocab_size) and back.

  Attributes:
    vocab_size: number of ids, which is the number of rows of the model's embedding. A pretrained embedding may have a
      few rows more than the tokenizer has entries; ids without an entry decode to no text.
    separator_id: the token that joins documents in training. Which tokens end a generated text is another matter, see
      `special_tokens` and `text_boundaries`.
    start_id: the token before a text that begins a document: the one that a pretrained model was trained to see there
      (bos), else separator_id.
    adds_start: whether the model expects start_id before a text that is given alone.
    special_tokens: what else the model's files say about special tokens. They are no part of `describe`, because they
      do not change how a text is encoded; `save` and `write_huggingface` keep them.
    chat_template: that of the special tokens; `chat.render_chat` renders it.
  """

  vocab_size: int
  separator_id: int
  start_id: int
  adds_start: bool
  special_tokens: SpecialTokens
  chat_template: str | None

  def encode(self, text: str) -> list[int]:
    """Ids of `text`; `separator_id` and other control ids never occur, whatever the text spells."""

  def encode_with_special(self, text: str) -> list[int]:
    """Ids of a rendered chat: a special entry that the text spells (`<|im_start|>`) becomes its id.

    The other parts are encoded as `encode` does, and nothing is added before or after the text. Prompts of models of
    other projects are encoded in this way, as transformers does. A message of a chat must not be: it could spell the
    end of its own turn, see `chat.encode_chat`.
    """

  def encode_spans_with_special(self, text: str) -> tuple[list[int], Int[np.ndarray, "N 2"]]:
    """(`encode_with_special(text)`, int64[N, 2]): where the N tokens are in the text; see `encode_spans`."""

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`[encode(text) for text in texts]`, on all cores."""

  def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], Int[np.ndarray, "N 2"]]]:
    """(`encode(text)`, int64[N, 2]) for each text: where the N tokens are in the text.

    A span is the token's first byte in the UTF-8 of the text and the byte after its last one. Spans may overlap: tokens
    that encode a part of a character may each have all of it, and a token without a character of its own, such as a
    space that is put before the text, has the character at its place. One after the text has a span after it.
    """

  def unencodable(self, text: str) -> str | None:
    """The first character of `text` that the vocabulary cannot encode; None if it can encode all of them."""

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`; `separator_id` gives no text, and bytes that are not UTF-8 give U+FFFD."""

  def piece(self, token: int) -> str:
    """A printable name of one id, for reports."""

  def describe(self) -> dict[str, Any]:
    """`kind`, `vocab_size`, `end_id`, the `sha256` of the model, and the settings that belong to the kind.

    `end_id` is the separator, by the name that it has in the files of the first version.

    The descriptions of two tokenizers are equal if and only if the tokenizers are equal. The sha256 alone already
    distinguishes them.
    """

  def special_names(self) -> dict[int, str]:
    """Names, such as '<|im_end|>', of the vocabulary's special entries: those that decode to no text, by id."""

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
      InputError: the tokenizer has no such form, or an id or a name is taken.
    """


def document_tokens(separator_id: int | None, start_id: int | None, adds_start: bool) -> dict[str, Any]:
  """The arguments of a tokenizer of these names; without a start token, the separator begins texts."""
  return {"separator_id": separator_id, "start_id": start_id if adds_start else separator_id, "adds_start": adds_start}


def encode_whole(tokenizer: Tokenizer, text: str, field: str, *, special: bool = False) -> list[int]:
  """Ids of a text, none of whose characters may be lost.

  Args:
    tokenizer: of a run.
    text: given by a user.
    field: the flag or config field that holds the text, for the error.
    special: whether the name of a special entry becomes its id (`encode_with_special`) instead of the ids of a text.

  Raises:
    InputError: the vocabulary cannot encode one of the characters.
  """
  check_encodable(tokenizer, text, field, special=special)
  return tokenizer.encode_with_special(text) if special else tokenizer.encode(text)


def check_encodable(tokenizer: Tokenizer, text: str, field: str, *, special: bool = False) -> None:
  """Checks that the vocabulary can encode all characters of a text; the arguments are those of `encode_whole`.

  Raises:
    InputError: the vocabulary cannot encode one of the characters.
  """
  pattern = special_pattern(tokenizer) if special else None
  for part in [text] if pattern is None else pattern.split(text):
    character = tokenizer.unencodable(part)
    if character is not None:
      raise InputError(f"{field}: the vocabulary can't encode {character!r} (U+{ord(character):04X}); leave it out")


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
  """A pattern that finds the names of special entries in a text; None: the vocabulary has no special entries."""
  # The longest name first, where one is the beginning of another.
  names = sorted(filter(None, tokenizer.special_names().values()), key=len, reverse=True)
  return re.compile("|".join(map(re.escape, names))) if names else None


def surrogate(text: str) -> str | None:
  """The first character that UTF-8 cannot represent, or None. Python decodes invalid bytes of a command line to such
  characters.
  """
  return next((character for character in text if "\ud800" <= character <= "\udfff"), None)


def character_places(text: str) -> Int[np.ndarray, "P"]:
  """int64[C + 2]: the first byte, in UTF-8, of each of the C characters, then the number S of bytes, then S + 1."""
  content = np.frombuffer(text.encode(), np.uint8)
  # All bytes of a character but the first are 0b10xxxxxx.
  return np.append(np.flatnonzero(content & 0xC0 != 0x80), [len(content), len(content) + 1])


def is_unused(piece: str) -> bool:
  """Whether the name of an entry says that the model's authors left it unused."""
  return _UNUSED.fullmatch(piece) is not None


def checked_rows(name: str, entries: int, rows: int | None) -> int:
  """The number of rows of the embedding that belongs to a tokenizer.

  Args:
    name: prefix of the error message.
    entries: number of entries of the tokenizer.
    rows: of the embedding; None: one for each entry.

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
  """Number of threads that tokenize: RAYON_NUM_THREADS if it is set, else the number of cores of this process.

  The package tokenizers reads the same variable.
  """
  setting = os.environ.get("RAYON_NUM_THREADS", "")
  if setting.isdecimal() and int(setting):
    return int(setting)
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
