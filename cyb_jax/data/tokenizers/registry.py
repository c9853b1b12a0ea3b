"""Opens tokenizers: by a spec, the value of the config field data.tokenizer, or from a folder of `Tokenizer.save`."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cyb_jax import hub, jsonl
from cyb_jax.data.tokenizers.byte import ByteTokenizer
from cyb_jax.data.tokenizers.description import (
  DESCRIPTION_FILE,
  EXPORTED,
  MODEL_FILES,
  SPECIAL_TOKENS,
  check_settings,
  files,
)
from cyb_jax.data.tokenizers.gguf import open_gguf
from cyb_jax.data.tokenizers.huggingface import HuggingFaceTokenizer
from cyb_jax.data.tokenizers.huggingface_folder import open_huggingface
from cyb_jax.data.tokenizers.interface import Tokenizer, checked_rows
from cyb_jax.data.tokenizers.llama2c import open_llama2c
from cyb_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from cyb_jax.data.tokenizers.special_tokens import SpecialTokens
from cyb_jax.errors import InputError, reading, shown
from cyb_jax.storage import absolute, in_bucket, streams
from cyb_jax.storage.paths import unchecked_place

_PICKLE_OR_ZIP = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PICKLE_SUFFIXES = (".pt", ".pkl", ".pth")


def trained_pieces(spec: str) -> int | None:
  """The number N of pieces in a spec `sentencepiece:N`, which is trained on the task; None for any other spec.

  Raises:
    InputError: N is not an integer from 1 to 9999999.
  """
  if not spec.startswith("sentencepiece:"):
    return None
  match = re.fullmatch(r"sentencepiece:([1-9]\d{0,6})", spec)
  if not match:
    raise InputError(f"data.tokenizer={spec!r}: give a number of pieces from 1 to 9999999, as in 'sentencepiece:8192'")
  return int(match[1])


def vocabulary_size(spec: str, rows: int | None = None) -> int:
  """The vocabulary size of the tokenizer that `spec` names; no tokenizer is trained.

  Args:
    spec: 'sentencepiece:N', or a spec of `open_tokenizer`.
    rows: see `open_tokenizer`.

  Raises:
    InputError: see `open_tokenizer`.
  """
  return trained_pieces(spec) or open_tokenizer(spec, rows).vocab_size


def open_tokenizer(spec: str | os.PathLike, rows: int | None = None) -> Tokenizer:
  """Opens the tokenizer that `spec` names.

  Args:
    spec: 'bytes', or the path of a SentencePiece `.model` file, a Hugging Face folder or its tokenizer.json, a GGUF
      file, llama2.c's tokenizer.bin, a run, or a folder that `save` has written, such as a token store. A token store
      may be in a bucket, and a Hugging Face folder may be a repository of the hub, see `cyb_jax.hub`.
    rows: number of rows of a pretrained model's embedding, if it is known; it becomes the tokenizer's `vocab_size`.

  Raises:
    InputError: the spec has another form, for example of a tokenizer that has to be trained ('sentencepiece:8192'); a
      file is damaged; or `rows` does not match.
  """
  spec = os.fspath(spec)
  with reading(f"data.tokenizer={spec!r}"):
    if spec == "bytes":
      return _open_bytes(rows)
    if in_bucket(spec):
      return _open_in_bucket(spec, rows)
    if hub.in_hub(spec):
      return _open_folder(Path(hub.fetch(spec, weights=False)), rows)
    path = Path(absolute(spec))
    return _open_folder(path, rows) if path.is_dir() else _open_file(spec, path, rows)


def _open_in_bucket(spec: str, rows: int | None) -> Tokenizer:
  """The tokenizer of a store in a bucket; other files of the store are not read."""
  folder = unchecked_place(spec)
  description = streams.read_json(folder / DESCRIPTION_FILE)
  if not isinstance(description, dict) or "kind" not in description:
    raise InputError(
      f"data.tokenizer={spec!r}: there is no token store at this path; give a token store in a bucket, or a local path"
    )
  with tempfile.TemporaryDirectory() as scratch:
    for name in files(description):
      (Path(scratch) / name).write_bytes(streams.read(folder / name))
    return _open_folder(Path(scratch), rows)


def _open_bytes(rows: int | None) -> Tokenizer:
  checked_rows("data.tokenizer='bytes'", ByteTokenizer.vocab_size, rows)
  return ByteTokenizer()


def _open_file(spec: str, path: Path, rows: int | None) -> Tokenizer:
  """The tokenizer of a file, whose format is detected from its first bytes or its suffix."""
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
    raise InputError(f"data.tokenizer={spec!r}: pickles and archives are unsupported; give a tokenizer.json")
  if path.suffix == ".bin":
    return open_llama2c(path, rows)
  return SentencePieceTokenizer(path.read_bytes(), rows=rows, name=f"data.tokenizer={spec!r}")


def _open_folder(path: Path, rows: int | None) -> Tokenizer:
  """The tokenizer of a run, of an exported run, of a folder that `save` has written, or of a Hugging Face folder."""
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
    content = jsonl.loads(path.read_bytes())
  except (OSError, ValueError):
    return False
  return isinstance(content, dict) and "kind" in content and "model" not in content


def load(directory: str | os.PathLike) -> Tokenizer:
  """The tokenizer that `Tokenizer.save` has written into a folder.

  Raises:
    InputError: the folder has no tokenizer, or the model does not match the description.
  """
  description_path = os.path.join(directory, DESCRIPTION_FILE)
  try:
    with open(description_path, "rb") as file:
      description = jsonl.loads(file.read())
    kind = description["kind"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(
      f"{description_path}: it is missing or not a description of a tokenizer; give a folder with a saved tokenizer"
    ) from error
  special_tokens = SpecialTokens.from_json(description.pop(SPECIAL_TOKENS, {}), description_path)
  if kind == "bytes":
    tokenizer: Tokenizer = ByteTokenizer()
  elif kind in list(MODEL_FILES):  # the kind may be any JSON value, including unhashable ones
    tokenizer = _load_model(Path(directory), description, special_tokens)
  else:
    raise InputError(
      f"{description_path}: kind {shown(kind)} is unknown; this version reads 'bytes', 'sentencepiece' and"
      " 'huggingface'"
    )
  if tokenizer.describe() != description:
    raise InputError(f"{description_path}: it does not match the tokenizer's model; restore both files")
  return tokenizer


def _load_model(
  directory: Path, description: Mapping[str, Any], special_tokens: SpecialTokens, rows: int | None = None
) -> Tokenizer:
  """The tokenizer whose model is in a folder, with the settings of a description.

  Args:
    directory: the folder.
    description: a description of kind 'sentencepiece' or 'huggingface'.
    special_tokens: the special tokens, which are stored with the description.
    rows: number of rows of the embedding; None means the vocab_size of the description.
  """
  check_settings(description, os.fspath(directory / DESCRIPTION_FILE))
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
    raise InputError(
      f"{file}: the tokenizer's model is missing or damaged; restore this file and {DESCRIPTION_FILE}"
    ) from error


# By kind: (bytes of the model's file, settings) -> tokenizer.
_MAKERS: dict[str, Callable[..., Tokenizer]] = {
  "sentencepiece": SentencePieceTokenizer,
  "huggingface": lambda model, **settings: HuggingFaceTokenizer(jsonl.loads(model), **settings),
}
