"""Opens the tokenizer of a Hugging Face folder; several files of the folder may specify its end and start tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cyb_jax import jsonl
from cyb_jax.data.tokenizers.description import MODEL_FILE, check_settings
from cyb_jax.data.tokenizers.huggingface import (
  DOCUMENT_JOINERS,
  HuggingFaceTokenizer,
  entry_names,
  first_added,
  ids_by_name,
)
from cyb_jax.data.tokenizers.interface import Tokenizer, document_tokens
from cyb_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from cyb_jax.data.tokenizers.special_tokens import SpecialTokens
from cyb_jax.errors import InputError, shown

# Entries that exports of this package append to a tokenizer; they are removed when an export is opened.
_APPENDED = re.compile(r"<pause_\d+>|<dont_know>|<row_\d+>")
# In order of precedence.
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_MODEL_FILES = ("generation_config.json", "config.json")
_SETTINGS_FILES = (*_TOKENIZER_FILES, *_MODEL_FILES)
_TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATE_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def open_huggingface(path: Path, rows: int | None) -> Tokenizer:
  """The tokenizer of a Hugging Face folder.

  If files of the folder disagree about a token, tokenizer_config.json has precedence over special_tokens_map.json,
  generation_config.json and config.json, in this order. A generated text ends at any of the end tokens that the
  tokenizer's files and generation_config.json specify (or config.json, if generation_config.json specifies none).

  Args:
    path: the folder, or a tokenizer.json in it.
    rows: number of rows of the embedding; None means vocab_size of config.json, if there is one.

  Raises:
    InputError: the tokenizer is missing, a file is damaged, there is no end token, or `rows` does not match.
  """
  folder = path if path.is_dir() else path.parent
  file = folder / "tokenizer.json" if path.is_dir() else path
  settings = _Settings(folder)
  if rows is None:
    rows = settings.number("config.json", "vocab_size")
  if not file.exists():
    return _open_sentencepiece(folder, settings, rows)
  content = _read_json(file)
  exported = settings.exported_tokenizer()
  if exported is not None:
    check_settings(exported, os.fspath(folder))
  content, rows = _without_appended(content, entry_names(content, os.fspath(file)), rows, exported)
  if exported and "post_processor" in exported:
    content["post_processor"] = exported["post_processor"]
  names = entry_names(content, os.fspath(file))
  special_tokens = settings.special_tokens(ids_by_name(names))
  if exported and exported.get("kind") == "sentencepiece" and (folder / MODEL_FILE).exists():
    return SentencePieceTokenizer(
      (folder / MODEL_FILE).read_bytes(),
      rows=exported["vocab_size"],
      separator_id=exported["end_id"],
      start_id=exported.get("start_id"),
      adds_start=exported.get("adds_start", True),
      special_tokens=special_tokens,
      name=os.fspath(folder / MODEL_FILE),
    )
  if exported and exported.get("kind") == "huggingface":
    # An export of version 0.1 has more rows than entries, because its tables are padded.
    rows = exported["vocab_size"]
    tokens = {name: exported[name] for name in ("start_id", "adds_start")} | {"separator_id": exported["end_id"]}
  else:
    tokens = _document_tokens(content, ids_by_name(names), settings, file)
  return HuggingFaceTokenizer(content, **tokens, special_tokens=special_tokens, rows=rows, name=os.fspath(file))


def _document_tokens(
  content: Mapping[str, Any], ids: Mapping[str, int], settings: _Settings, file: Path
) -> dict[str, Any]:
  """The end and start tokens that the folder's files specify."""
  end = next((ids[name] for name in DOCUMENT_JOINERS if name in ids), None)
  if end is None:
    end = settings.token("eos", ids)
  if end is None:
    raise InputError(
      f"{file}: no end token: it has no {DOCUMENT_JOINERS[0]}, and no other file of the folder has eos_token; set"
      " eos_token in tokenizer_config.json"
    )
  start, adds = settings.token("bos", ids), settings.flag("add_bos_token")
  if adds is None:
    first = first_added(content, os.fspath(file))
    start, adds = (first, True) if first is not None else (None, False)
  return document_tokens(end, start, adds and start is not None)


def _open_sentencepiece(folder: Path, settings: _Settings, rows: int | None) -> Tokenizer:
  file = folder / MODEL_FILE
  if not file.exists():
    raise InputError(f"{folder}: no tokenizer.json and no tokenizer.model in it; give a folder with one of them")
  plain = SentencePieceTokenizer(file.read_bytes(), name=os.fspath(file))
  ids = {plain.piece(i): i for i in range(plain.vocab_size)}
  end, start = settings.token("eos", ids), settings.token("bos", ids)
  start = plain.bos_id if start is None else start
  adds = start is not None and settings.flag("add_bos_token") is not False
  return SentencePieceTokenizer(
    plain.model,
    special_tokens=settings.special_tokens(ids),
    rows=rows,
    name=os.fspath(file),
    **document_tokens(end, start, adds),
  )


class _Settings:
  """The JSON files of a folder that specify special tokens and sizes."""

  def __init__(self, folder: Path):
    self._files = {folder / name: _read_json(folder / name) for name in _SETTINGS_FILES if (folder / name).exists()}
    self._template_path = folder / _TEMPLATE_FILE

  def number(self, file: str, key: str) -> int | None:
    """The integer with a key in one file; None if there is none."""
    values = [content.get(key) for path, content in self._files.items() if path.name == file]
    return values[0] if values and isinstance(values[0], int) else None

  def flag(self, key: str) -> bool | None:
    """The first value of `key` in the files; None if no file has one."""
    return next((bool(content[key]) for content in self._files.values() if content.get(key) is not None), None)

  def exported_tokenizer(self) -> dict[str, Any] | None:
    """The description of the tokenizer in an export by this package; None for any other folder."""
    found = next((content["cyb_jax"] for content in self._files.values() if "cyb_jax" in content), None)
    wanted = ("kind", "vocab_size", "end_id", "sha256")
    return found if isinstance(found, dict) and all(name in found for name in wanted) else None

  def special_tokens(self, ids: Mapping[str, int]) -> SpecialTokens:
    """The special tokens that the files specify; `ids` has the ids of the vocabulary by name.

    Raises:
      InputError: the vocabulary has no such token, or the chat template is not a string.
    """
    # transformers adds a missing padding token to the vocabulary. Here it would have no row, so it is left out.
    pad = self._tokens("pad", ids, _TOKENIZER_FILES, missing_ok=True) or self._tokens("pad", ids, _MODEL_FILES)
    end_ids = self._tokens("eos", ids, _TOKENIZER_FILES)
    end_ids += self._tokens("eos", ids, _MODEL_FILES[:1]) or self._tokens("eos", ids, _MODEL_FILES[1:])
    names = {}
    for key in _TEMPLATE_TOKENS:
      texts = (_text(content.get(key)) for content in self._of(_TOKENIZER_FILES).values())
      name = next((text for text in texts if isinstance(text, str)), None)
      if name is not None:
        names[key] = name
    return SpecialTokens(
      bos_id=self.token("bos", ids),
      end_ids=tuple(dict.fromkeys(end_ids)),
      pad_id=next(iter(pad), None),
      chat_template=self._chat_template(),
      names=names,
    )

  def _chat_template(self) -> str | None:
    if self._template_path.exists():
      try:
        return self._template_path.read_text(encoding="utf-8")
      except (OSError, ValueError) as error:
        raise InputError(f"{self._template_path}: it can't be read ({error}); fetch it again") from error
    for path, content in self._of(_TOKENIZER_FILES).items():
      template = content.get("chat_template")
      if isinstance(template, list):  # several named ones
        named = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next((entry.get("template") for entry in named), None)
      if isinstance(template, str):
        return template
      if template is not None:
        raise InputError(f"{path}: chat_template is {shown(template)}, but must be a string; fetch it again")
    return None

  def _of(self, names: Sequence[str]) -> dict[Path, dict[str, Any]]:
    """The contents of the files with these names, by path; missing files are omitted."""
    return {path: content for path, content in self._files.items() if path.name in names}

  def _tokens(self, role: str, ids: Mapping[str, int], files: Sequence[str], missing_ok: bool = False) -> list[int]:
    """The ids of a role's tokens in the first of these files that specifies one; empty if none does."""
    entries = set(ids.values())
    for path, content in self._of(files).items():
      named, number = _text(content.get(f"{role}_token")), content.get(f"{role}_token_id")
      if named is not None and not (isinstance(named, str) and named in ids):
        if missing_ok:
          continue
        raise InputError(
          f"{path}: {role}_token {shown(named)} is not in the vocabulary; give the tokenizer of this model"
        )
      if named is not None:
        return [ids[named]]
      numbers = [i for i in (number if isinstance(number, list) else [number]) if isinstance(i, int)]
      wrong = next((i for i in numbers if i not in entries), None)
      if wrong is not None:
        raise InputError(f"{path}: {role}_token_id {wrong} has no entry; give the tokenizer of this model")
      if numbers:
        return numbers
    return []

  def token(self, role: str, ids: Mapping[str, int]) -> int | None:
    """The id of the token of a role, 'eos' or 'bos'; None if no file specifies it.

    Raises:
      InputError: the vocabulary has no such token.
    """
    return next(iter(self._tokens(role, ids, _SETTINGS_FILES)), None)


def _text(token: Any) -> Any:
  """The text of a token, which is a string or an object in the files."""
  return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
  try:
    content = jsonl.loads(path.read_bytes())
  except OSError as error:
    raise InputError(f"{path}: it can't be read ({error.strerror}); give a tokenizer.json") from error
  except ValueError as error:
    raise InputError(f"{path}: it is not JSON, or is truncated ({error}); fetch it again") from error
  if not isinstance(content, dict):
    raise InputError(f"{path}: it contains a JSON {type(content).__name__}, not an object; fetch it again")
  return content


def _without_appended(
  content: dict[str, Any], names: Mapping[int, str], rows: int | None, exported: Mapping[str, Any] | None
) -> tuple[dict[str, Any], int | None]:
  """The content of a tokenizer.json without the entries that an export by this package appended, and its rows.

  Pauses and don't-know entries follow all rows of the model; entries named `<row_N>` fill the gap before them.

  Args:
    content: the content of a tokenizer.json.
    names: the names of its entries by id.
    rows: number of rows of the embedding, or None.
    exported: the exported tokenizer's description, or None.
  """
  added = content.get("added_tokens") or []
  appended = {entry["id"] for entry in added if _APPENDED.fullmatch(entry["content"])}
  # Only entries at the end can be removed without renumbering others.
  last = max(names, default=-1)
  gone = set()
  while last in appended:
    gone.add(last)
    last -= 1
  if not gone:
    return content, rows
  if exported is not None:
    rows = exported["vocab_size"]
  elif rows is not None and rows > min(gone):
    pauses = [i for i in gone if not names[i].startswith("<row_")]
    rows = min(pauses, default=rows)
  return content | {"added_tokens": [entry for entry in added if entry["id"] not in gone]}, rows
