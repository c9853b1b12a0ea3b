"""Opens tokenizers: by the spec of the config field data.tokenizer, or from a folder that `Tokenizer.save` wrote."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cyb_jax.data.tokenizers.byte import ByteTokenizer
from cyb_jax.data.tokenizers.description import DESCRIPTION_FILE, EXPORTED, MODEL_FILES, SPECIAL_TOKENS, files
from cyb_jax.data.tokenizers.gguf import open_gguf
from cyb_jax.data.tokenizers.huggingface import HuggingFaceTokenizer
from cyb_jax.data.tokenizers.huggingface_folder import open_huggingface
from cyb_jax.data.tokenizers.interface import Tokenizer, checked_rows
from cyb_jax.data.tokenizers.llama2c import open_llama2c
from cyb_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from cyb_jax.data.tokenizers.special_tokens import SpecialTokens
from cyb_jax.errors import InputError, reading
from cyb_jax.storage import absolute, in_bucket, streams
from cyb_jax.storage.paths import unchecked_place

_PICKLE_OR_ZIP = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PICKLE_SUFFIXES = (".pt", ".pkl", ".pth")


def trained_pieces(spec: str) -> int | None:
  """The number of pieces in a spec `sentencepiece:N` (train one on the task), or None for any other spec.

  Raises:
    InputError: N is no number from 1 to 9999999.
  """
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
      file, llama2.c's tokenizer.bin, a run, or a folder that `save` wrote, such as a token store; this one may be in a
      bucket.
    rows: number of rows of a pretrained model's embedding, if it is known; it becomes the tokenizer's `vocab_size`.

  Raises:
    InputError: any other spec, including one that has to be trained ('sentencepiece:8192'); a damaged file; rows that
      don't fit.
  """
  spec = os.fspath(spec)
  with reading(f"data.tokenizer={spec!r}"):
    if spec == "bytes":
      return _open_bytes(rows)
    if in_bucket(spec):
      return _open_in_bucket(spec, rows)
    path = Path(absolute(spec))
    return _open_folder(path, rows) if path.is_dir() else _open_file(spec, path, rows)


def _open_in_bucket(spec: str, rows: int | None) -> Tokenizer:
  """The tokenizer of a store in a bucket; no more of the store is read."""
  folder = unchecked_place(spec)
  description = streams.read_json(folder / DESCRIPTION_FILE)
  if not isinstance(description, dict) or "kind" not in description:
    raise InputError(f"data.tokenizer={spec!r}: no token store in a bucket; give one, or a folder on a disk")
  with tempfile.TemporaryDirectory() as scratch:
    for name in files(description):
      (Path(scratch) / name).write_bytes(streams.read(folder / name))
    return _open_folder(Path(scratch), rows)


def _open_bytes(rows: int | None) -> Tokenizer:
  checked_rows("data.tokenizer='bytes'", ByteTokenizer.vocab_size, rows)
  return ByteTokenizer()


def _open_file(spec: str, path: Path, rows: int | None) -> Tokenizer:
  """The tokenizer of a file, whose format is known by its first bytes or its suffix."""
  try:
    with open(path, "rb") as file:
      head = file.read(8)
  except FileNotFoundError as error:
    raise InputError(
      f"data.tokenizer={spec!r}: no such file; give 'bytes', the path of a SentencePiece .model file, a Hugging Face "
      "folder, a .gguf file, or 'sentencepiece:8192' where a task is prepared"
    ) from error
  if head[:4] == b"GGUF" or path.suffix == ".gguf":
    return open_gguf(path, rows)
  if path.suffix == ".json":
    return _open_folder(path.parent, rows) if _is_description(path) else open_huggingface(path, rows)
  if head[:2] in _PICKLE_OR_ZIP or path.suffix in _PICKLE_SUFFIXES:
    raise InputError(f"data.tokenizer={spec!r}: a pickle or an archive, which isn't read; give a tokenizer.json")
  if path.suffix == ".bin":
    return open_llama2c(path, rows)
  return SentencePieceTokenizer(path.read_bytes(), rows=rows, name=f"data.tokenizer={spec!r}")


def _open_folder(path: Path, rows: int | None) -> Tokenizer:
  """The tokenizer of a run, of an export of one, of a folder that `save` wrote, or of a Hugging Face folder."""
  for folder in (path / "tokenizer", path / EXPORTED, path):
    if _is_description(folder / DESCRIPTION_FILE):
      tokenizer = load(folder)
      if rows in (None, tokenizer.vocab_size):
        return tokenizer
      if isinstance(tokenizer, ByteTokenizer):
        return _open_bytes(rows)
      return _load_model(folder, tokenizer.describe(), tokenizer.special_tokens, rows)
  return open_huggingface(path, rows)


def _is_description(path: Path) -> bool:
  """Whether a tokenizer.json is a description written by `save`, rather than a file of the package tokenizers."""
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return False
  return isinstance(content, dict) and "kind" in content and "model" not in content


def load(directory: str | os.PathLike) -> Tokenizer:
  """The tokenizer that `save` wrote into a folder.

  Raises:
    InputError: there is none, or its model is not the one that is described.
  """
  description_path = os.path.join(directory, DESCRIPTION_FILE)
  try:
    with open(description_path, encoding="utf-8") as file:
      description = json.load(file)
    kind = description["kind"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(f"{description_path}: no readable description of a tokenizer; save one there") from error
  special_tokens = SpecialTokens.from_json(description.pop(SPECIAL_TOKENS, {}), description_path)
  if kind == "bytes":
    tokenizer: Tokenizer = ByteTokenizer()
  elif kind in list(MODEL_FILES):  # the kind may be any JSON, also unhashable
    tokenizer = _load_model(Path(directory), description, special_tokens)
  else:
    raise InputError(
      f'{description_path}: kind {kind!r}; this version reads "bytes", "sentencepiece" and "huggingface"'
    )
  if tokenizer.describe() != description:
    raise InputError(f"{description_path}: it does not describe the tokenizer beside it; restore both files")
  return tokenizer


def _load_model(
  directory: Path, description: Mapping[str, Any], special_tokens: SpecialTokens, rows: int | None = None
) -> Tokenizer:
  """The tokenizer whose model is stored in a folder, with the settings of a description.

  Args:
    directory: the folder.
    description: of kind 'sentencepiece' or 'huggingface'.
    special_tokens: that are stored next to the description.
    rows: of the embedding; None: the described vocab_size.
  """
  file = directory / MODEL_FILES[description["kind"]]
  make: Callable[..., Tokenizer] = _MAKERS[description["kind"]]
  try:
    model = file.read_bytes()
    settings = {name: description[name] for name in ("start_id", "adds_start") if name in description}
    settings |= {"separator_id": description["end_id"], "special_tokens": special_tokens}
    settings |= {"rows": rows or description["vocab_size"], "name": os.fspath(file)}
    return make(model, **settings)
  except InputError:
    raise
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(f"{file}: no readable model of the tokenizer described beside it; restore both files") from error


# Kind: (bytes of the model's file, settings) -> tokenizer.
_MAKERS: dict[str, Callable[..., Tokenizer]] = {
  "sentencepiece": SentencePieceTokenizer,
  "huggingface": lambda model, **settings: HuggingFaceTokenizer(json.loads(model), **settings),
}
