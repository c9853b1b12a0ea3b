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

# The trainer divides its sentences into this many partial sums, so the number changes the last bits of the model. It is
# a constant rather than the machine's core count: equal text gives an equal model on every machine.
_TRAINER_THREADS = 2
# Longer lines are cut for training, because the trainer's time grows with the square of a sentence.
_LONGEST_SENTENCE = 1000
# Words of more characters are rare where words are separated by spaces. The trainer counts equal words once, so that
# text without spaces takes it many times longer: half a mebibyte takes it a quarter of a minute.
_LONG_WORD = 200
_LONG_WORDS_BYTES = 1 << 19


class SentencePieceTokenizer:
  """A SentencePiece model; its end-of-sentence piece is the end token. See `Tokenizer` for the methods.

  Args:
    model: the serialised model (the bytes of a `.model` file).
    rows: number of rows of a pretrained model's embedding; None: the number of pieces.
    separator_id: the token that a pretrained model joins its documents by; None: the end-of-sentence piece.
    start_id, adds_start, special_tokens: see `Tokenizer`; start_id None: separator_id.
    name: prefix of error messages: the file.

  Attributes:
    model: as given.
    bos_id: the begin-of-sentence piece, or None.

  Raises:
    InputError: the bytes are no SentencePiece model, the model has no end-of-sentence piece, or the rows don't fit.
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
    import sentencepiece  # imported late: programs without a SentencePiece model run where it isn't installed

    self.model = bytes(model)
    try:
      processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
      self._pieces = int(processor.vocab_size())
    except (RuntimeError, TypeError, ValueError) as error:
      raise InputError(
        f"{name}: {len(self.model)} bytes that are no SentencePiece model; give a .model file"
      ) from error
    if separator_id is None and processor.eos_id() < 0:
      raise InputError(f"{name}: the SentencePiece model has no </s> piece (eos_id -1); train it with one")
    self.separator_id = int(processor.eos_id()) if separator_id is None else separator_id
    self.start_id, self.adds_start = self.separator_id if start_id is None else start_id, adds_start
    self.bos_id = int(processor.bos_id()) if processor.bos_id() >= 0 else None
    self._own_end = processor.eos_id()
    self.vocab_size = checked_rows(name, self._pieces, rows)
    for role, token in (("end", self.separator_id), ("start", self.start_id)):
      if not 0 <= token < self._pieces or token == processor.unk_id():
        raise InputError(f"{name}: the {role} token {token} is the unknown one, or not among its {self._pieces} pieces")
    self.special_tokens = special_tokens or SpecialTokens()
    self.special_tokens.check(range(self._pieces).__contains__, name)
    self.chat_template = self.special_tokens.chat_template
    everything = list(range(self._pieces))
    self._unused = [i for i, piece in enumerate(processor.id_to_piece(everything)) if is_unused(piece)]
    self._processor = self._without_text_for(processor, (*self._unused, self.separator_id, self.start_id))
    self._control = {i for i, control in enumerate(self._processor.is_control(everything)) if control}
    self._escape = self._space_symbol()

  def _without_text_for(self, processor, ids: Sequence[int]):
    """A processor for which these pieces are control pieces, so that no text encodes to one."""
    import sentencepiece

    if all(processor.is_control(list(ids))):
      return processor
    return sentencepiece.SentencePieceProcessor(model_proto=with_control(self.model, ids))

  def _space_symbol(self) -> list[int] | None:
    """Ids of the three bytes of U+2581; None if parts of a text cannot be encoded separately.

    SentencePiece writes a space as U+2581, so a U+2581 of the text would decode to a space; its three bytes decode to
    U+2581. A model that puts a space before every text cannot encode parts of one.
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
    """(ids by name, a group that finds the names in a text; None: there are no special entries)."""
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
    asked = [number for number, found in enumerate(spans) if found is None]
    for number, found in zip(asked, self._library_spans([texts[number] for number in asked])):
      spans[number] = found
    return list(zip(encoded, spans))

  def _counted_spans(self, ids: Sequence[int], text: str) -> Int[np.ndarray, "N 2"] | None:
    """The spans of a text, from the bytes of its pieces; None if they are not the bytes of the text."""
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
    """(bytes that are put before a text, int64[P], the bytes of each piece); None if the model changes texts.

    An unknown piece has more bytes than any text.
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
    """The spans of texts, from the library; its alignment knows what normalization has changed, and takes longer."""
    from sentencepiece import sentencepiece_pb2

    # Where encode separates a text at each U+2581, the parts are encoded here.
    parts = [text.split("▁") if self._escape is not None else [text] for text in texts]
    flat = [part for of in parts for part in of]
    encoded = iter(self._processor.encode(flat, out_type="serialized_proto", num_threads=num_threads()))
    for text, of in zip(texts, parts, strict=True):
      spans: list[tuple[int, int]] = []
      offset = 0
      for number, part in enumerate(of):
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
    # A model without further settings is described by its file alone: this is the format of the first version.
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
    # With the model, `open_tokenizer` opens the folder as a SentencePieceTokenizer again.
    self._write_model(directory)

  def _write_model(self, directory: str | os.PathLike) -> None:
    with open(os.path.join(directory, MODEL_FILE), "wb") as file:
      file.write(self.model)


def _with_characters(spans: Int[np.ndarray, "N 2"], text: str) -> Int[np.ndarray, "N 2"]:
  """The spans, extended to whole characters; an empty one becomes the character at its place.

  The library gives all of a character to the last of the tokens that encode it. The others have the empty span before
  it, and so has a space that is put before a text.
  """
  places = character_places(text)
  first = np.searchsorted(places, spans[:, 0], "right") - 1
  end = np.maximum(np.searchsorted(places, spans[:, 1], "left"), first + 1)
  return places[np.stack([first, end], 1)]


def _sentences(texts: Iterable[str]) -> Iterator[str]:
  """Lines of texts, long ones cut; of those with long words, only the first `_LONG_WORDS_BYTES`."""
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
  """Trains a unigram model of exactly `pieces` pieces, whose decoded text always equals the encoded text.

  The same texts in the same order give the same model, byte for byte, on any number of cores.

  Raises:
    InputError: the texts are too few for so many pieces, or the pieces too few for the characters.
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
    # Later sentences name flags of the library.
    reason = " ".join(str(error).split("] ")[-1].split()).partition(". Increase")[0]
    raise InputError(
      f"data.tokenizer='sentencepiece:{pieces}': the task's text does not allow it: {reason or 'too little text'}; "
      "take another number of pieces, or 'bytes'"
    ) from error
  return SentencePieceTokenizer(model.getvalue())
