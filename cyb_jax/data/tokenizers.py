"""Tokenizers: plain objects that need neither TensorFlow nor SeqIO.

A tokenizer turns text into ids in [0, vocab_size) and back. One id, `end_id`, closes a document; no text, whatever
it spells, ever encodes to it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from cyb_jax.errors import InputError

_MODEL_FILE = "tokenizer.model"
_DESCRIPTION_FILE = "tokenizer.json"
# The trainer deals its sentences to this many partial sums, so the number changes the last bits of the model. It is
# a constant rather than the machine's core count: equal text gives an equal model on every machine.
_TRAINER_THREADS = 2
# Longer lines are cut for training: the trainer's time grows with the square of a sentence.
_LONGEST_SENTENCE = 1000


@runtime_checkable
class Tokenizer(Protocol):
  """What every tokenizer offers.

  Attributes:
    vocab_size: number of ids.
    end_id: the end-of-document token, which joins documents.
  """

  vocab_size: int
  end_id: int

  def encode(self, text: str) -> list[int]:
    """Ids of `text`; never `end_id` nor another control id."""

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`[encode(text) for text in texts]`, on all cores."""

  def unencodable(self, text: str) -> str | None:
    """The first character of `text` that no ids stand for; None where all have some."""

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`; `end_id` gives no text, and bytes that are no UTF-8 give U+FFFD."""

  def piece(self, token: int) -> str:
    """A printable name of one id, for reports."""

  def describe(self) -> dict[str, Any]:
    """`kind`, `vocab_size`, `end_id` and the `sha256` of the model: equal when the tokenizers are equal."""

  def save(self, directory: str | os.PathLike) -> None:
    """Writes what `load` reads into an existing folder."""


class ByteTokenizer:
  """The 256 bytes of UTF-8 and one end token: 257 ids."""

  vocab_size = 257
  end_id = 256

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]

  def unencodable(self, text: str) -> str | None:
    return _surrogate(text)

  def decode(self, ids: Iterable[int]) -> str:
    return bytes(i for i in map(int, ids) if i != self.end_id).decode(errors="replace")

  def piece(self, token: int) -> str:
    if token == self.end_id:
      return "<end>"
    return chr(token) if 32 < token < 127 else f"<0x{token:02X}>"

  def describe(self) -> dict[str, Any]:
    return {
      "kind": "bytes",
      "vocab_size": self.vocab_size,
      "end_id": self.end_id,
      "sha256": hashlib.sha256(b"bytes").hexdigest(),
    }

  def save(self, directory: str | os.PathLike) -> None:
    _save(directory, self.describe())


class SentencePieceTokenizer:
  """A SentencePiece model; its end-of-sentence piece is the end token.

  Args:
    model: the serialised model (the bytes of a `.model` file).

  Raises:
    InputError: if it is no SentencePiece model, or has no end-of-sentence piece.
  """

  def __init__(self, model: bytes):
    import sentencepiece  # here: what has no SentencePiece model runs where it isn't installed

    self.model = bytes(model)
    try:
      processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
      self.vocab_size = int(processor.vocab_size())
    except (RuntimeError, TypeError, ValueError) as error:
      raise InputError(
        f"data.tokenizer: {len(self.model)} bytes that are no SentencePiece model; give a .model file"
      ) from error
    if processor.eos_id() < 0:
      raise InputError("data.tokenizer: the SentencePiece model has no </s> piece (eos_id -1); train it with one")
    self.end_id = int(processor.eos_id())
    self._processor = processor
    # SentencePiece writes a space as U+2581, so a U+2581 in the text would come back as a space. Its three bytes come
    # back whole; a model that puts a space before every text cannot be called on parts of one.
    escape = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
    prefixed = processor.encode("x", out_type=str)[0].startswith("▁")
    self._escape = escape if not prefixed and all(processor.is_byte(i) for i in escape) else None

  def encode(self, text: str) -> list[int]:
    if self._escape is None or "▁" not in text:
      return self._processor.encode(text)
    first, *rest = (self._processor.encode(part) for part in text.split("▁"))
    return first + [i for part in rest for i in (*self._escape, *part)]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    encoded = self._processor.encode(list(texts), num_threads=os.cpu_count() or 1)
    if self._escape is not None:
      for row, text in enumerate(texts):
        if "▁" in text:
          encoded[row] = self.encode(text)
    return encoded

  def unencodable(self, text: str) -> str | None:
    found = _surrogate(text)
    if found is not None:
      return found
    unknown = self._processor.unk_id()
    if unknown not in self.encode(text):
      return None
    return next((character for character in text if unknown in self.encode(character)), text[:1])

  def decode(self, ids: Iterable[int]) -> str:
    return self._processor.decode([i for i in map(int, ids) if i != self.end_id])

  def piece(self, token: int) -> str:
    return self._processor.id_to_piece(int(token))

  def describe(self) -> dict[str, Any]:
    return {
      "kind": "sentencepiece",
      "vocab_size": self.vocab_size,
      "end_id": self.end_id,
      "sha256": hashlib.sha256(self.model).hexdigest(),
    }

  def save(self, directory: str | os.PathLike) -> None:
    with open(os.path.join(directory, _MODEL_FILE), "wb") as file:
      file.write(self.model)
    _save(directory, self.describe())


def _save(directory: str | os.PathLike, description: dict[str, Any]) -> None:
  with open(os.path.join(directory, _DESCRIPTION_FILE), "w", encoding="utf-8") as file:
    json.dump(description, file, indent=2)
    file.write("\n")


def load(directory: str | os.PathLike) -> Tokenizer:
  """The tokenizer that `save` wrote into a folder.

  Raises:
    InputError: if there is none, or its model is not the one described.
  """
  description_path = os.path.join(directory, _DESCRIPTION_FILE)
  try:
    with open(description_path, encoding="utf-8") as file:
      description = json.load(file)
    kind = description["kind"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(f"{description_path}: no readable description of a tokenizer; save one there") from error
  if kind == "bytes":
    tokenizer: Tokenizer = ByteTokenizer()
  elif kind == "sentencepiece":
    tokenizer = open_tokenizer(os.path.join(directory, _MODEL_FILE))
  else:
    raise InputError(f'{description_path}: kind {kind!r}; this version reads "bytes" and "sentencepiece"')
  if tokenizer.describe() != description:
    raise InputError(f"{description_path}: it does not describe the tokenizer beside it; restore both files")
  return tokenizer


def encode_whole(tokenizer: Tokenizer, text: str, field: str) -> list[int]:
  """Ids of a text, all of it.

  Args:
    tokenizer: of a run.
    text: that a user gives.
    field: for the error.

  Raises:
    InputError: the vocabulary can't encode one of its characters.
  """
  character = tokenizer.unencodable(text)
  if character is not None:
    raise InputError(f"{field}: the vocabulary can't encode {character!r} (U+{ord(character):04X}); leave it out")
  return tokenizer.encode(text)


def _surrogate(text: str) -> str | None:
  """A character that UTF-8 doesn't have: what Python makes of bytes on the command line that are none."""
  return next((character for character in text if "\ud800" <= character <= "\udfff"), None)


def trained_pieces(spec: str) -> int | None:
  """The number of pieces in a spec `sentencepiece:N` (train one on the task), or None for any other spec."""
  if not spec.startswith("sentencepiece:"):
    return None
  match = re.fullmatch(r"sentencepiece:([1-9]\d{0,6})", spec)
  if not match:
    raise InputError(f"data.tokenizer={spec!r}: give a number of pieces, as in 'sentencepiece:8192'")
  return int(match[1])


def open_tokenizer(spec: str) -> Tokenizer:
  """The tokenizer named by `spec`: 'bytes', or the path of a SentencePiece `.model` file.

  Raises:
    InputError: for any other spec, one that has to be trained ('sentencepiece:8192') included.
  """
  if spec == "bytes":
    return ByteTokenizer()
  try:
    with open(spec, "rb") as file:
      model = file.read()
  except OSError as error:
    raise InputError(
      f"data.tokenizer={spec!r}: no such file; give 'bytes', the path of a SentencePiece .model file, "
      "or 'sentencepiece:8192' where a task is prepared"
    ) from error
  return SentencePieceTokenizer(model)


def train_sentencepiece(texts: Iterable[str], pieces: int) -> SentencePieceTokenizer:
  """Trains a unigram model of exactly `pieces` pieces that gives every text back exactly.

  The same texts in the same order give the same model, byte for byte, on any number of cores.

  Raises:
    InputError: if the texts are too few for so many pieces, or the pieces too few for the characters.
  """
  import sentencepiece

  sentences = (
    line[start : start + _LONGEST_SENTENCE]
    for text in texts
    for line in text.split("\n")
    for start in range(0, len(line), _LONGEST_SENTENCE)
  )
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=sentences,
      model_writer=model,
      vocab_size=pieces,
      model_type="unigram",
      normalization_rule_name="identity",
      byte_fallback=True,
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      split_digits=True,
      unk_id=0,
      eos_id=1,
      bos_id=-1,
      pad_id=-1,
      input_sentence_size=0,
      shuffle_input_sentence=False,
      max_sentence_length=4 * _LONGEST_SENTENCE,
      num_threads=_TRAINER_THREADS,
      minloglevel=2,
    )
  except RuntimeError as error:
    reason = " ".join(str(error).split("] ")[-1].split())
    raise InputError(
      f"data.tokenizer='sentencepiece:{pieces}': the task's text does not allow it: {reason or 'too little text'}; "
      "take another number of pieces, or 'bytes'"
    ) from error
  return SentencePieceTokenizer(model.getvalue())


def seqio_vocabulary(tokenizer: Tokenizer):
  """`tokenizer` as a `seqio.Vocabulary`, for SeqIO preprocessors; its EOS is `end_id`.

  SeqIO pads with id 0, which both kinds of tokenizer here use for something else (a byte, or <unk>): mask by
  length, not by id. Imports seqio, and with it TensorFlow.
  """
  return _vocabulary_class()(tokenizer)


@functools.cache
def _vocabulary_class():
  import seqio
  import tensorflow as tf

  class TokenizerVocabulary(seqio.Vocabulary):
    """A cyb_jax tokenizer as a SeqIO vocabulary."""

    def __init__(self, tokenizer: Tokenizer):
      super().__init__(extra_ids=0)
      self.tokenizer = tokenizer

    bos_id = None
    unk_id = None

    @property
    def eos_id(self):
      return self.tokenizer.end_id

    @property
    def _base_vocab_size(self):
      return self.tokenizer.vocab_size

    def _encode(self, s):
      return self.tokenizer.encode(s)

    def _decode(self, ids):
      return self.tokenizer.decode(ids)

    def _encode_tf(self, s):
      def encode(text):
        return tf.constant(self.tokenizer.encode(text.numpy().decode()), tf.int32)

      return tf.ensure_shape(tf.py_function(encode, [s], tf.int32), [None])

    def _decode_tf(self, ids):
      def decode(row):
        return tf.constant(self.tokenizer.decode(row.numpy().tolist()))

      if ids.shape.rank == 1:
        return tf.ensure_shape(tf.py_function(decode, [ids], tf.string), [])
      return tf.map_fn(self._decode_tf, ids, fn_output_signature=tf.string)

    def __eq__(self, other):
      return isinstance(other, TokenizerVocabulary) and other.tokenizer.describe() == self.tokenizer.describe()

    def __hash__(self):
      return hash(self.tokenizer.describe()["sha256"])

  return TokenizerVocabulary
