"""Tokenizers: plain objects that need neither TensorFlow nor SeqIO.

A tokenizer turns text into ids in [0, vocab_size) and back. One id, `end_id`, closes a document; no text, whatever
it spells, ever encodes to it. Those of pretrained models are in pretrained_tokenizers.py.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cyb_jax.errors import InputError, reading

MODEL_FILE = "tokenizer.model"
HUGGINGFACE_FILE = "huggingface.json"
# The folder of ours beside what transformers reads, in an export.
EXPORTED = "cyb_jax_tokenizer"
_DESCRIPTION_FILE = "tokenizer.json"
# The trainer deals its sentences to this many partial sums, so the number changes the last bits of the model. It is
# a constant rather than the machine's core count: equal text gives an equal model on every machine.
_TRAINER_THREADS = 2
# Longer lines are cut for training: the trainer's time grows with the square of a sentence.
_LONGEST_SENTENCE = 1000
# Embeddings may have a few rows more than there are entries, to be cut evenly over devices; more is another model's.
_SPARE_ROWS = 512
_UNUSED = re.compile(r"<unused_?\d+>|<\|unused_?\d+\|>|<\|reserved_special_token_\d+\|>|<reserved_\d+>|\[unused\d+\]")


@runtime_checkable
class Tokenizer(Protocol):
  """What every tokenizer offers.

  Attributes:
    vocab_size: number of ids: the rows of the model's embedding, where a pretrained one has a few more than the
      tokenizer has entries; ids without an entry decode to nothing.
    end_id: the end-of-document token, which joins documents.
    start_id: the token that a text which begins a document stands behind: that which a pretrained model was trained to
      see there (bos), else end_id.
    adds_start: whether the model expects it before a text that is given alone.
  """

  vocab_size: int
  end_id: int
  start_id: int
  adds_start: bool

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
    """`kind`, `vocab_size`, `end_id` and the `sha256` of the model, and what else there is to it: equal when the
    tokenizers are equal. The sha256 alone tells them apart.
    """

  def unused_ids(self) -> list[int]:
    """Entries that are meant for nobody, such as Gemma's `<unused0>`, ascending."""

  def save(self, directory: str | os.PathLike) -> None:
    """Writes what `load` reads into an existing folder."""

  def write_huggingface(self, directory: str | os.PathLike, added: Sequence[tuple[int, str]] = ()) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` loads, into a folder.

    Args:
      directory: that exists.
      added: (id, name) of special entries to append, ids ascending and beyond all there are.

    Raises:
      InputError: a tokenizer that has no such form, or an entry that is taken.
    """


class ByteTokenizer:
  """The 256 bytes of UTF-8 and one end token: 257 ids."""

  vocab_size = 257
  end_id = start_id = 256
  adds_start = True

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]

  def unencodable(self, text: str) -> str | None:
    return surrogate(text)

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
    save_description(directory, self.describe())

  def unused_ids(self) -> list[int]:
    return []

  def write_huggingface(self, directory: str | os.PathLike, added: Sequence[tuple[int, str]] = ()) -> None:
    raise InputError("data.tokenizer='bytes': transformers has no such tokenizer; export a run with another one")


class SentencePieceTokenizer:
  """A SentencePiece model; its end-of-sentence piece is the end token.

  Args:
    model: the serialised model (the bytes of a `.model` file).
    rows: of a pretrained model's embedding; None: as many as there are pieces.
    end_id: of a pretrained model that joins its documents by another token; None: the end-of-sentence piece.
    start_id, adds_start: see `Tokenizer`; None: end_id.
    name: what errors begin with: the file.

  Attributes:
    model: as given.
    bos_id: its begin-of-sentence piece, or None.

  Raises:
    InputError: if it is no SentencePiece model, has no end-of-sentence piece, or the rows don't fit.
  """

  def __init__(
    self,
    model: bytes,
    *,
    rows: int | None = None,
    end_id: int | None = None,
    start_id: int | None = None,
    adds_start: bool = True,
    name: str = "data.tokenizer",
  ):
    import sentencepiece  # here: what has no SentencePiece model runs where it isn't installed

    self.model = bytes(model)
    try:
      processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
      self._pieces = int(processor.vocab_size())
    except (RuntimeError, TypeError, ValueError) as error:
      raise InputError(
        f"{name}: {len(self.model)} bytes that are no SentencePiece model; give a .model file"
      ) from error
    if end_id is None and processor.eos_id() < 0:
      raise InputError(f"{name}: the SentencePiece model has no </s> piece (eos_id -1); train it with one")
    self.end_id = int(processor.eos_id()) if end_id is None else end_id
    self.start_id, self.adds_start = self.end_id if start_id is None else start_id, adds_start
    self.bos_id = int(processor.bos_id()) if processor.bos_id() >= 0 else None
    self._own_end = processor.eos_id()
    self.vocab_size = checked_rows(name, self._pieces, rows)
    for role, token in (("end", self.end_id), ("start", self.start_id)):
      if not 0 <= token < self._pieces or token == processor.unk_id():
        raise InputError(f"{name}: the {role} token {token} is the unknown one, or not among its {self._pieces} pieces")
    everything = list(range(self._pieces))
    self._unused = [i for i, piece in enumerate(processor.id_to_piece(everything)) if is_unused(piece)]
    control = processor.is_control(everything)
    if any(not control[i] for i in (*self._unused, self.end_id, self.start_id)):
      processor = _with_control(self.model, (*self._unused, self.end_id, self.start_id))
      control = processor.is_control(everything)
    self._control = {i for i in everything if control[i]}
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
    encoded = self._processor.encode(list(texts), num_threads=num_threads())
    if self._escape is not None:
      for row, text in enumerate(texts):
        if "▁" in text:
          encoded[row] = self.encode(text)
    return encoded

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

  def unused_ids(self) -> list[int]:
    return list(self._unused)

  def describe(self) -> dict[str, Any]:
    result = {"kind": "sentencepiece", "vocab_size": self.vocab_size, "end_id": self.end_id}
    digest = hashlib.sha256(self.model)
    settings = {"start_id": self.start_id, "adds_start": self.adds_start}
    # A model that nothing is said of beside it is described by its file alone, as it has always been.
    plain = result | settings == result | {"end_id": self._own_end, "start_id": self._own_end, "adds_start": True}
    if not plain or self.vocab_size != self._pieces:
      result |= settings
      digest.update(json.dumps(result, sort_keys=True).encode())
    return result | {"sha256": digest.hexdigest()}

  def save(self, directory: str | os.PathLike) -> None:
    with open(os.path.join(directory, MODEL_FILE), "wb") as file:
      file.write(self.model)
    save_description(directory, self.describe())

  def write_huggingface(self, directory: str | os.PathLike, added: Sequence[tuple[int, str]] = ()) -> None:
    from cyb_jax.data import pretrained_tokenizers as pretrained

    content, names = pretrained.sentencepiece_content(self.model, self.end_id, self.start_id, self.adds_start)
    pretrained.write_folder(content, names, self, directory, added)
    # So that it comes back as what it is.
    with open(os.path.join(directory, MODEL_FILE), "wb") as file:
      file.write(self.model)


def num_threads() -> int:
  """Threads that tokenize: as many as there are cores for this process, or what RAYON_NUM_THREADS says, which the
  package tokenizers follows as well.
  """
  told = os.environ.get("RAYON_NUM_THREADS", "")
  if told.isdecimal() and int(told):
    return int(told)
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _with_control(model: bytes, ids: Iterable[int]):
  """A SentencePiece processor that takes these pieces for control pieces: no text leads to one."""
  import sentencepiece
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  for number in ids:
    proto.pieces[number].type = sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
  return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def is_unused(piece: str) -> bool:
  """Whether an entry of this name is meant for nobody."""
  return _UNUSED.fullmatch(piece) is not None


def checked_rows(name: str, entries: int, rows: int | None) -> int:
  """The rows of an embedding that a tokenizer of so many entries stands before; None: as many.

  Raises:
    InputError: entries without a row, or too many rows without an entry.
  """
  if rows is None:
    return entries
  if not entries <= rows <= entries + _SPARE_ROWS:
    raise InputError(
      f"{name}: {entries} entries, but the model's embedding has {rows} rows; give the tokenizer of this model (at most"
      f" {_SPARE_ROWS} rows without an entry)"
    )
  return rows


def save_description(directory: str | os.PathLike, description: dict[str, Any]) -> None:
  with open(os.path.join(directory, _DESCRIPTION_FILE), "w", encoding="utf-8") as file:
    json.dump(description, file, indent=2)
    file.write("\n")


def files(description: Mapping[str, Any]) -> tuple[str, ...]:
  """Names of what `save` writes of the tokenizer that is described so."""
  models = {"sentencepiece": (MODEL_FILE,), "huggingface": (HUGGINGFACE_FILE,)}
  return (*models.get(description["kind"], ()), _DESCRIPTION_FILE)


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
  elif kind in ("sentencepiece", "huggingface"):
    tokenizer = _described(Path(directory), description)
  else:
    raise InputError(
      f'{description_path}: kind {kind!r}; this version reads "bytes", "sentencepiece" and "huggingface"'
    )
  if tokenizer.describe() != description:
    raise InputError(f"{description_path}: it does not describe the tokenizer beside it; restore both files")
  return tokenizer


def _described(directory: Path, description: dict[str, Any], rows: int | None = None) -> Tokenizer:
  """The tokenizer whose model lies in a folder, with the settings of a description."""
  file = directory / (MODEL_FILE if description["kind"] == "sentencepiece" else HUGGINGFACE_FILE)
  try:
    model = file.read_bytes()
    settings = {name: description[name] for name in ("start_id", "adds_start") if name in description}
    settings |= {"end_id": description["end_id"], "rows": rows or description["vocab_size"], "name": os.fspath(file)}
    if description["kind"] == "sentencepiece":
      return SentencePieceTokenizer(model, **settings)
    from cyb_jax.data.pretrained_tokenizers import HuggingFaceTokenizer

    return HuggingFaceTokenizer(json.loads(model), **settings)
  except InputError:
    raise
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(f"{file}: no readable model of the tokenizer described beside it; restore both files") from error


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


def surrogate(text: str) -> str | None:
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


def vocabulary_size(spec: str, rows: int | None = None) -> int:
  """The number of entries of the vocabulary that `spec` names; nothing is trained.

  Args:
    spec: 'sentencepiece:N', or a spec of `open_tokenizer`.
    rows: see `open_tokenizer`.

  Raises:
    InputError: see `open_tokenizer`.
  """
  return trained_pieces(spec) or open_tokenizer(spec, rows).vocab_size


def open_tokenizer(spec: str | os.PathLike, rows: int | None = None) -> Tokenizer:
  """The tokenizer named by `spec`.

  Args:
    spec: 'bytes', or the path of a SentencePiece `.model` file, a Hugging Face folder or its tokenizer.json, a GGUF
      file, llama2.c's tokenizer.bin, a run, or what `save` wrote.
    rows: of the embedding of a pretrained model, where they are known: then they are the tokenizer's `vocab_size`.

  Raises:
    InputError: for any other spec, one that has to be trained ('sentencepiece:8192') included; a damaged file; rows
      that don't fit.
  """
  spec = os.fspath(spec)
  with reading(f"data.tokenizer={spec!r}"):
    return _open(spec, rows)


def _open(spec: str, rows: int | None) -> Tokenizer:
  if spec == "bytes":
    checked_rows("data.tokenizer='bytes'", ByteTokenizer.vocab_size, rows)
    return ByteTokenizer()
  path = Path(spec).expanduser()
  if path.is_dir():
    return _open_folder(path, rows)
  try:
    with open(path, "rb") as file:
      head = file.read(8)
  except FileNotFoundError as error:
    raise InputError(
      f"data.tokenizer={spec!r}: no such file; give 'bytes', the path of a SentencePiece .model file, a Hugging Face "
      "folder, a .gguf file, or 'sentencepiece:8192' where a task is prepared"
    ) from error
  from cyb_jax.data import pretrained_tokenizers as pretrained

  if head[:4] == b"GGUF" or path.suffix == ".gguf":
    return pretrained.open_gguf(path, rows)
  if path.suffix == ".json":
    return _open_folder(path.parent, rows) if _is_description(path) else pretrained.open_huggingface(path, rows)
  if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or path.suffix in (".pt", ".pkl", ".pth"):
    raise InputError(f"data.tokenizer={spec!r}: a pickle or an archive, which isn't read; give a tokenizer.json")
  if path.suffix == ".bin":
    return pretrained.open_llama2c(path, rows)
  return SentencePieceTokenizer(path.read_bytes(), rows=rows, name=f"data.tokenizer={spec!r}")


def _open_folder(path: Path, rows: int | None) -> Tokenizer:
  """The tokenizer of a run, of an export of one, of a folder that `save` wrote, or of a Hugging Face folder."""
  for folder in (path / "tokenizer", path / EXPORTED, path):
    if _is_description(folder / _DESCRIPTION_FILE):
      tokenizer = load(folder)
      if rows in (None, tokenizer.vocab_size):
        return tokenizer
      if isinstance(tokenizer, ByteTokenizer):
        return open_tokenizer("bytes", rows)
      return _described(folder, tokenizer.describe(), rows)
  from cyb_jax.data import pretrained_tokenizers as pretrained

  return pretrained.open_huggingface(path, rows)


def _is_description(path: Path) -> bool:
  """Whether a tokenizer.json is one of ours: a description, not a tokenizer of the package tokenizers."""
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return False
  return isinstance(content, dict) and "kind" in content and "model" not in content


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

  SeqIO pads with id 0, which every kind of tokenizer here uses for something else (a byte, or <unk>): mask by
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
