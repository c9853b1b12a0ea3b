"""Tokenizers with a SentencePiece model, and the training of such models."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from cyb_jax.data.tokenizers.description import MODEL_FILE, save_description
from cyb_jax.data.tokenizers.huggingface_export import write_folder
from cyb_jax.data.tokenizers.interface import (
  character_places,
  checked_rows,
  is_unused,
  num_threads,
  special_pattern,
  surrogate,
)
from cyb_jax.data.tokenizers.sentencepiece_export import huggingface_content
from cyb_jax.data.tokenizers.sentencepiece_model import with_control
from cyb_jax.data.tokenizers.special_tokens import SpecialTokens
from cyb_jax.errors import InputError

# The trainer computes this many partial sums over its sentences, so the number affects the last bits of the model. It
# is a constant rather than the machine's core count, so that equal text gives an equal model on every machine.
_TRAINER_THREADS = 2
# Longer lines are cut for training, because the trainer's time is quadratic in the length of a sentence.
_LONGEST_SENTENCE = 1000
# Longer words are rare in text with spaces. The trainer processes equal words once, so text without spaces takes many
# times longer: half a mebibyte takes a quarter of a minute.
_LONG_WORD = 200
_LONG_WORDS_BYTES = 1 << 19


class SentencePieceTokenizer:
  """A SentencePiece model; its end-of-sentence piece is the end token. See `Tokenizer` for the methods.

  Args:
    model: the serialised model (the bytes of a `.model` file).
    rows: number of rows of a pretrained model's embedding; None means the number of pieces.
    separator_id: the token that separates documents in the training data of a pretrained model; None means the
      end-of-sentence piece.
    start_id, adds_start, special_tokens: see `Tokenizer`; start_id None means separator_id.
    name: prefix of error messages: the file.

  Attributes:
    model: the serialised model.
    bos_id: the begin-of-sentence piece, or None.

  Raises:
    InputError: the bytes are not a SentencePiece model, the model has no end-of-sentence piece, or `rows` does not
      match.
  """

  def __init__(
    self,
    model: bytes,
    *,
    rows: int | None = None,
    separator_id: int | None = None,
    start_id: int | None = None,
    adds_start: bool = True,
    special_tokens: SpecialTokens | None = None,
    name: str = "data.tokenizer",
  ):
    import sentencepiece  # imported here, because programs that use no SentencePiece model do not need the package

    self.model = bytes(model)
    try:
      processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
      self._pieces = int(processor.vocab_size())
    except (RuntimeError, TypeError, ValueError) as error:
      raise InputError(
        f"{name}: the file ({len(self.model)} bytes) is not a SentencePiece model; give a .model file"
      ) from error
    if separator_id is None and processor.eos_id() < 0:
      raise InputError(f"{name}: the SentencePiece model has no </s> piece (eos_id -1); give a model that has one")
    self.separator_id = int(processor.eos_id()) if separator_id is None else separator_id
    self.start_id, self.adds_start = self.separator_id if start_id is None else start_id, adds_start
    self.bos_id = int(processor.bos_id()) if processor.bos_id() >= 0 else None
    self._own_end = processor.eos_id()
    self.vocab_size = checked_rows(name, self._pieces, rows)
    for role, token in (("end", self.separator_id), ("start", self.start_id)):
      if not 0 <= token < self._pieces or token == processor.unk_id():
        raise InputError(
          f"{name}: the {role} token {token} is the unknown token or is not among the {self._pieces} pieces; give the"
          " right id"
        )
    self.special_tokens = special_tokens or SpecialTokens()
    self.special_tokens.check(range(self._pieces).__contains__, name)
    self.chat_template = self.special_tokens.chat_template
    everything = list(range(self._pieces))
    self._unused = [i for i, piece in enumerate(processor.id_to_piece(everything)) if is_unused(piece)]
    self._processor = self._with_control_pieces(processor, (*self._unused, self.separator_id, self.start_id), name)
    self._control = {i for i, control in enumerate(self._processor.is_control(everything)) if control}
    self._escape = self._space_symbol()

  def _with_control_pieces(self, processor, ids: Sequence[int], name: str):
    """A processor for which these pieces are control pieces, so no text encodes to them."""
    import sentencepiece

    if all(processor.is_control(list(ids))):
      return processor
    try:
      return sentencepiece.SentencePieceProcessor(model_proto=with_control(self.model, ids))
    except Exception as error:  # of the package, or of protobuf, which reads the model in another way
      raise InputError(
        f"{name}: the pieces {sorted(set(ids))[:8]} can't be control pieces ({' '.join(str(error).split())[:200]});"
        " give a valid model, or the right ids of its end and start tokens"
      ) from error

  def _space_symbol(self) -> list[int] | None:
    """Ids of the three bytes of U+2581; None if parts of a text cannot be encoded separately.

    SentencePiece represents a space as U+2581, so a U+2581 in the text would decode to a space; its three byte pieces
    decode to U+2581. A model that puts a space before every text cannot encode the parts of a text separately.
    """
    ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
    prefixed = self._processor.encode("x", out_type=str)[0].startswith("▁")
    return ids if not prefixed and all(self._processor.is_byte(i) for i in ids) else None

  def encode(self, text: str) -> list[int]:
    if self._escape is None or "▁" not in text:
      return self._processor.encode(text)
    first, *rest = (self._processor.encode(part) for part in text.split("▁"))
    return first + [i for part in rest for i in (*self._escape, *part)]

  def encode_with_special(self, text: str) -> list[int]:
    return self.encode_spans_with_special(text)[0]

  def encode_spans_with_special(self, text: str) -> tuple[list[int], Int[np.ndarray, "N 2"]]:
    special, pattern = self._special_entries
    parts = [text] if pattern is None else pattern.split(text)
    ids: list[int] = []
    spans, offset = [np.zeros((0, 2), np.int64)], 0
    for number, part in enumerate(parts):
      size = len(part.encode())
      found, places = ([special[part]], np.array([[0, size]])) if number % 2 else self.encode_spans([part])[0]
      ids += found
      spans.append(places + offset)
      offset += size
    return ids, np.concatenate(spans)

  @functools.cached_property
  def _special_entries(self) -> tuple[dict[str, int], re.Pattern[str] | None]:
    """(ids by name, a pattern whose group matches the names); the pattern is None if there are no special entries."""
    pattern = special_pattern(self)
    ids = {name: i for i, name in self.special_names().items()}
    return ids, pattern and re.compile(f"({pattern.pattern})")

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    encoded = self._processor.encode(list(texts), num_threads=num_threads())
    if self._escape is not None:
      for row, text in enumerate(texts):
        if "▁" in text:
          encoded[row] = self.encode(text)
    return encoded

  def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], Int[np.ndarray, "N 2"]]]:
    encoded = self.encode_batch(texts)
    spans = [self._counted_spans(ids, text) for ids, text in zip(encoded, texts, strict=True)]
    missing = [number for number, found in enumerate(spans) if found is None]
    for number, found in zip(missing, self._library_spans([texts[number] for number in missing])):
      spans[number] = found
    return list(zip(encoded, spans))

  def _counted_spans(self, ids: Sequence[int], text: str) -> Int[np.ndarray, "N 2"] | None:
    """The spans of a text, from the lengths of its pieces; None if their sum is not the length of the text."""
    if self._piece_bytes is None:
      return None
    prefix, lengths = self._piece_bytes
    ends = np.cumsum(lengths[np.array(ids, np.int64)]) - prefix
    if len(ids) and ends[-1] != len(text.encode()):
      return None
    spans = np.stack([np.append(0, ends[:-1]), ends], 1) if len(ids) else np.zeros((0, 2), np.int64)
    return _with_characters(spans, text)

  @functools.cached_property
  def _piece_bytes(self) -> tuple[int, Int[np.ndarray, "P"]] | None:
    """(number of bytes put before a text, the number of bytes of each piece, int64[P]).

    The result is None if the model normalizes texts. The unknown piece is assigned more bytes than any text has.
    """
    from sentencepiece import sentencepiece_model_pb2

    spec = sentencepiece_model_pb2.ModelProto.FromString(self.model).normalizer_spec
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces or not spec.escape_whitespaces:
      return None
    everything = list(range(self._pieces))
    names = self._processor.id_to_piece(everything)
    lengths = [
      1 if is_byte else len(name.replace("▁", " ").encode())
      for name, is_byte in zip(names, self._processor.is_byte(everything), strict=True)
    ]
    lengths[self._processor.unk_id()] = 1 << 40
    return int(spec.add_dummy_prefix), np.array(lengths, np.int64)

  def _library_spans(self, texts: Sequence[str]) -> Iterator[Int[np.ndarray, "N 2"]]:
    """The spans of texts, from the library, whose alignment accounts for normalization and takes longer."""
    from sentencepiece import sentencepiece_pb2

    # If `encode` splits a text at each U+2581, the parts are encoded here too.
    parts = [text.split("▁") if self._escape is not None else [text] for text in texts]
    flat = [part for row in parts for part in row]
    encoded = iter(self._processor.encode(flat, out_type="serialized_proto", num_threads=num_threads()))
    for text, row in zip(texts, parts, strict=True):
      spans: list[tuple[int, int]] = []
      offset = 0
      for number, part in enumerate(row):
        if number and self._escape is not None:
          spans += [(offset, offset + len("▁".encode()))] * len(self._escape)
          offset += len("▁".encode())
        pieces = sentencepiece_pb2.SentencePieceText.FromString(next(encoded)).pieces
        spans += [(offset + piece.begin, offset + piece.end) for piece in pieces]
        offset += len(part.encode())
      yield _with_characters(np.array(spans, np.int64).reshape(-1, 2), text)

  def unencodable(self, text: str) -> str | None:
    found = surrogate(text)
    if found is not None:
      return found
    unknown = self._processor.unk_id()
    if unknown not in self.encode(text):
      return None
    return next((character for character in text if unknown in self.encode(character)), text[:1])

  def decode(self, ids: Iterable[int]) -> str:
    return self._processor.decode([i for i in map(int, ids) if i < self._pieces and i not in self._control])

  def piece(self, token: int) -> str:
    return self._processor.id_to_piece(int(token)) if token < self._pieces else f"<row_{token}>"

  def special_names(self) -> dict[int, str]:
    return {i: self._processor.id_to_piece(i) for i in sorted(self._control)}

  def unused_ids(self) -> list[int]:
    return list(self._unused)

  def describe(self) -> dict[str, Any]:
    result = {"kind": "sentencepiece", "vocab_size": self.vocab_size, "end_id": self.separator_id}
    digest = hashlib.sha256(self.model)
    settings = {"start_id": self.start_id, "adds_start": self.adds_start}
    # The description of a model with default settings depends on its file alone, as in the first version.
    plain = result | settings == result | {"end_id": self._own_end, "start_id": self._own_end, "adds_start": True}
    if not plain or self.vocab_size != self._pieces:
      result |= settings
      digest.update(json.dumps(result, sort_keys=True).encode())
    return result | {"sha256": digest.hexdigest()}

  def save(self, directory: str | os.PathLike) -> None:
    self._write_model(directory)
    save_description(directory, self.describe(), self.special_tokens)

  def write_huggingface(
    self, directory: str | os.PathLike, added: Sequence[tuple[int, str]] = (), *, starts: bool | None = None
  ) -> None:
    starts = self.adds_start if starts is None else starts
    content, names = huggingface_content(self.model, self.separator_id, self.start_id, starts)
    write_folder(content, names, self, directory, added, starts=starts)
    # Because of this file, `open_tokenizer` opens the folder as a SentencePieceTokenizer again.
    self._write_model(directory)

  def _write_model(self, directory: str | os.PathLike) -> None:
    with open(os.path.join(directory, MODEL_FILE), "wb") as file:
      file.write(self.model)


def _with_characters(spans: Int[np.ndarray, "N 2"], text: str) -> Int[np.ndarray, "N 2"]:
  """Extends spans to complete characters; an empty span becomes the character at its position.

  The library assigns a character to the last of the tokens that encode it. The other tokens have an empty span before
  the character, and so does a space that the tokenizer puts before a text.
  """
  places = character_places(text)
  first = np.searchsorted(places, spans[:, 0], "right") - 1
  end = np.maximum(np.searchsorted(places, spans[:, 1], "left"), first + 1)
  return places[np.stack([first, end], 1)]


def _sentences(texts: Iterable[str]) -> Iterator[str]:
  """Lines of texts; long lines are cut, and only the first `_LONG_WORDS_BYTES` of lines with long words are kept."""
  left = _LONG_WORDS_BYTES
  for text in texts:
    for line in text.split("\n"):
      for start in range(0, len(line), _LONGEST_SENTENCE):
        sentence = line[start : start + _LONGEST_SENTENCE]
        if max(map(len, sentence.split(" "))) > _LONG_WORD:
          left -= len(sentence.encode())
          if left < 0:
            continue
        yield sentence


def train_sentencepiece(texts: Iterable[str], pieces: int) -> SentencePieceTokenizer:
  """Trains a unigram model of exactly `pieces` pieces; decoding always reproduces the encoded text.

  The same texts in the same order give the same model, byte for byte, on any number of cores.

  Raises:
    InputError: there is too little text for the number of pieces, or there are fewer pieces than characters.
  """
  import sentencepiece

  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_sentences(texts),
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
    # The rest of the message mentions flags of the library.
    reason = " ".join(str(error).split("] ")[-1].split()).partition(". Increase")[0]
    raise InputError(
      f"data.tokenizer='sentencepiece:{pieces}': training on the task's text failed ({reason or 'too little text'}); "
      "give another number of pieces, or 'bytes'"
    ) from error
  return SentencePieceTokenizer(model.getvalue())
