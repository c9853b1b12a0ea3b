"""Tokenizers of pretrained models: of Hugging Face folders, of GGUF files, of llama2.c.

What they share with every `Tokenizer`: no text, whatever it spells, encodes to a special id (but for the unknown one,
where the vocabulary can't encode a character), and special ids decode to no text. On all other text they give what
their own libraries give.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from cyb_jax.data import gguf_metadata
from cyb_jax.data.tokenizers import (
  HUGGINGFACE_FILE,
  MODEL_FILE,
  SentencePieceTokenizer,
  Tokenizer,
  checked_rows,
  is_unused,
  save_description,
  surrogate,
)
from cyb_jax.errors import InputError

# What joins the documents that a model was trained on, whatever its chats end with.
_JOINERS = ("<|endoftext|>", "<|end_of_text|>")
# Entries of an export of ours that no tokenizer has: they go when it comes back.
_APPENDED = re.compile(r"<pause_\d+>|<dont_know>|<row_\d+>")
_MERGES_OF_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
_MERGES_OF_LLAMA3 = (
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}%s| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+"
  "|\\s+(?!\\S)|\\s+"
)
# tokenizer.ggml.pre -> how text is cut before its bytes are merged. 'default' is GPT-2's.
_PRE = (
  dict.fromkeys(("default", "gpt-2", "gpt2", "olmo", "mpt", "phi-2", "jais", "roberta-bpe"), "gpt2")
  | dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "digits")
  | dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), "llama3")
  | dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), "qwen2")
)
# Of tokenizer.ggml.token_type, which are SentencePiece's.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6


class HuggingFaceTokenizer:
  """A tokenizer of the package tokenizers.

  Args:
    content: what a tokenizer.json says.
    end_id: the token that joins documents.
    start_id, adds_start: see `Tokenizer`; None: end_id.
    rows: of the model's embedding; None: as many as there are entries.
    name: what errors begin with: the file.

  Raises:
    InputError: if the package can't read it, ids aren't in the vocabulary, or the rows don't fit.
  """

  def __init__(
    self,
    content: Mapping[str, Any],
    *,
    end_id: int,
    start_id: int | None = None,
    adds_start: bool = False,
    rows: int | None = None,
    name: str = "data.tokenizer",
  ):
    self.content = dict(content)
    self._names = _names(content, name)
    self._added = {entry["id"]: entry for entry in content.get("added_tokens") or ()}
    entries = max(self._names, default=-1) + 1
    self.vocab_size = checked_rows(name, entries, rows)
    self.end_id, self.start_id, self.adds_start = end_id, end_id if start_id is None else start_id, adds_start
    for role, token in (("end", self.end_id), ("start", self.start_id)):
      if token not in self._names:
        raise InputError(f"{name}: the {role} token {token} is not among its {entries} entries; give the right id")
    self._special = {i for i, entry in self._added.items() if entry.get("special")}
    self._special |= {self.end_id, self.start_id, *self.unused_ids()}
    working = _without_special(content, self._names, self._special, name)
    self._tokenizer = _built(working, name)
    unknown = content["model"].get("unk_token")
    self._unknown = content["model"].get("unk_id") if unknown is None else _ids(self._names).get(unknown)
    self._byte_level = "ByteLevel" in _types(content.get("decoder"))
    self._missing = (
      _missing_bytes(name for i, name in self._names.items() if i not in self._added) if self._byte_level else set()
    )

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [row.ids for row in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

  def unencodable(self, text: str) -> str | None:
    found = surrogate(text)
    if found is not None:
      return found
    if self._missing:
      # Where a byte has no entry the library leaves it out, and says nothing.
      return next((c for c in text if not self._missing.isdisjoint(c.encode())), None)
    if self._unknown is None or self._unknown not in self.encode(text):
      return None
    return next((c for c in text if self._unknown in self.encode(c)), text[:1])

  def decode(self, ids: Iterable[int]) -> str:
    kept = [i for i in map(int, ids) if i in self._names and i not in self._special]
    return self._tokenizer.decode(kept, skip_special_tokens=False)

  def piece(self, token: int) -> str:
    name = self._names.get(int(token), f"<row_{token}>")
    if token in self._special or not self._byte_level:
      return name
    content = name.encode() if token in self._added else _bytes(name)
    if content is None:
      return name
    return "".join(map(_shown, content.decode(errors="surrogateescape")))

  def unused_ids(self) -> list[int]:
    return sorted(i for i, name in self._names.items() if is_unused(name))

  def describe(self) -> dict[str, Any]:
    return {"kind": "huggingface"} | self._settings | {"sha256": self._digest}

  @functools.cached_property
  def _settings(self) -> dict[str, Any]:
    return {name: getattr(self, name) for name in ("vocab_size", "end_id", "start_id", "adds_start")}

  @functools.cached_property
  def _digest(self) -> str:
    canonical = json.dumps([self.content, self._settings], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()

  def save(self, directory: str | os.PathLike) -> None:
    with open(os.path.join(directory, HUGGINGFACE_FILE), "w", encoding="utf-8") as file:
      json.dump(self.content, file, ensure_ascii=False)
    save_description(directory, self.describe())

  def write_huggingface(self, directory: str | os.PathLike, added: Sequence[tuple[int, str]] = ()) -> None:
    write_folder(self.content, self._names, self, directory, added)


def _names(content: Mapping[str, Any], where: str) -> dict[int, str]:
  """The entries by id, ascending: the model's and those added."""
  try:
    vocabulary = content["model"]["vocab"]
    pairs = vocabulary.items() if isinstance(vocabulary, Mapping) else ((p, i) for i, (p, _) in enumerate(vocabulary))
    names = {int(i): name for name, i in pairs}
    names |= {int(entry["id"]): entry["content"] for entry in content.get("added_tokens") or ()}
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise InputError(
      f"{where}: it holds no tokenizer of the package tokenizers (model.vocab); give a tokenizer.json"
    ) from error
  odd = next((name for name in names.values() if not isinstance(name, str)), None)
  if odd is not None:
    raise InputError(f"{where}: an entry is {odd!r}, where a text is needed; fetch it again")
  return dict(sorted(names.items()))


def _ids(names: Mapping[int, str]) -> dict[str, int]:
  return {name: i for i, name in names.items()}


def _types(component: Any) -> set[str]:
  """The types in a normalizer, pre-tokenizer or decoder, those within sequences included."""
  if isinstance(component, list):
    return set().union(*map(_types, component))
  if not isinstance(component, dict):
    return set()
  return {component.get("type", "")}.union(*map(_types, component.values()))


def _without_special(
  content: Mapping[str, Any], names: Mapping[int, str], special: set[int], where: str
) -> dict[str, Any]:
  """A tokenizer that no text leads to the special ids of, nor to pad or cut what it encodes.

  The library can be told not to look for special entries in a text, but its model may still spell them: a unigram
  model holds '</s>' like any other piece. Their names get a space, which no piece of text has by the time it comes to
  a model.
  """
  renamed = {names[i]: f"{names[i]} {names[i]}" for i in special}
  model = dict(content["model"])
  if isinstance(model["vocab"], Mapping):
    model["vocab"] = {renamed.get(name, name): i for name, i in model["vocab"].items()}
  else:
    model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
  if "merges" in model:
    pairs = ((merge, _pair(merge, where)) for merge in _list(model["merges"], "model.merges", where))
    model["merges"] = [merge for merge, (left, right) in pairs if not {left, right, left + right}.intersection(renamed)]
  if isinstance(model.get("unk_token"), str):
    model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
  added = [
    entry | {"content": renamed[entry["content"]], "special": True} if entry["id"] in special else entry
    for entry in content.get("added_tokens") or ()
  ]
  return dict(content) | {
    "model": model, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None,
  }  # fmt: skip


def _list(value: Any, field: str, where: str) -> list:
  if not isinstance(value, list):
    raise InputError(f"{where}: {field} is {value!r}, where a list is needed; fetch it again")
  return value


def _pair(merge: Any, where: str) -> Sequence[str]:
  """The two pieces of a merge, in the older form (one text) or the newer one."""
  pair = merge.split(" ", 1) if isinstance(merge, str) else merge
  if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(piece, str) for piece in pair)):
    raise InputError(f"{where}: model.merges holds {merge!r}, where two pieces are needed; fetch it again")
  return pair


def _built(content: Mapping[str, Any], where: str):
  """The library's tokenizer, which looks for no special entries in a text."""
  try:
    import tokenizers
  except ImportError as error:
    raise InputError(f"{where}: reading it needs the package tokenizers; pip install 'cyb_jax[pretrained]'") from error
  try:
    # The library raises plain Exceptions.
    built = tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
  except Exception as error:
    reason = " ".join(str(error).split())[:200]
    raise InputError(
      f"{where}: the package tokenizers can't read it ({reason}); give a whole tokenizer.json"
    ) from error
  built.encode_special_tokens = True
  for entry in content["added_tokens"]:
    if built.token_to_id(entry["content"]) != entry["id"]:
      raise InputError(
        f"{where}: added_tokens give {entry['content']!r} the id {entry['id']}, but the entries before it leave"
        f" {built.token_to_id(entry['content'])}; give a whole tokenizer.json"
      )
  return built


@functools.cache
def _byte_characters() -> tuple[str, ...]:
  """How byte-level vocabularies write bytes: one that can be seen as itself, the others as characters from 256 on."""
  seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = iter(range(256, 512))
  return tuple(chr(byte if byte in seen else next(others)) for byte in range(256))


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
  return {character: byte for byte, character in enumerate(_byte_characters())}


def _missing_bytes(names: Iterable[str]) -> set[int]:
  """The bytes that no entry stands for."""
  entries = set(names)
  return {byte for byte, character in enumerate(_byte_characters()) if character not in entries}


def _bytes(name: str) -> bytes | None:
  """What a byte-level entry stands for; None where it isn't spelt so."""
  of = _bytes_of_characters()
  return bytes(of[c] for c in name) if all(c in of for c in name) else None


def _shown(character: str) -> str:
  if character == " ":
    return "▁"
  code = ord(character)
  # Bytes that are a part of a character stand as surrogates.
  return f"<0x{code & 0xFF:02X}>" if code < 32 or code == 127 or 0xDC80 <= code <= 0xDCFF else character


# Hugging Face folders.


def open_huggingface(path: Path, rows: int | None) -> Tokenizer:
  """The tokenizer of a Hugging Face folder, or of the one around a tokenizer.json.

  Of the files beside it, tokenizer_config.json says more than special_tokens_map.json, generation_config.json and
  config.json. Where `rows` isn't given, config.json's vocab_size is taken.

  Raises:
    InputError: no tokenizer, damaged files, no end token, or rows that don't fit.
  """
  folder = path if path.is_dir() else path.parent
  file = folder / "tokenizer.json" if path.is_dir() else path
  beside = _Beside(folder)
  if rows is None:
    rows = beside.number("config.json", "vocab_size")
  if not file.exists():
    return _sentencepiece_of_folder(folder, beside, rows)
  content = _read_json(file)
  names = _names(content, os.fspath(file))
  ours = beside.ours()
  content, rows = _without_appended(content, names, rows, ours)
  names = _names(content, os.fspath(file))
  if ours and ours.get("kind") == "sentencepiece" and (folder / MODEL_FILE).exists():
    return SentencePieceTokenizer(
      (folder / MODEL_FILE).read_bytes(),
      rows=ours["vocab_size"], end_id=ours["end_id"], start_id=ours.get("start_id"),
      adds_start=ours.get("adds_start", True), name=os.fspath(folder / MODEL_FILE),
    )  # fmt: skip
  if ours and ours.get("kind") == "huggingface":
    settings = {name: ours[name] for name in ("end_id", "start_id", "adds_start")}
    return HuggingFaceTokenizer(content, **settings, rows=rows, name=os.fspath(file))
  ids = _ids(names)
  end = next((ids[name] for name in _JOINERS if name in ids), None)
  if end is None:
    end = beside.token("eos", ids)
  if end is None:
    raise InputError(
      f"{file}: no end token: no {_JOINERS[0]} in it, and no eos_token in the files beside it; name one in"
      " tokenizer_config.json"
    )
  start, adds = beside.token("bos", ids), beside.flag("add_bos_token")
  if adds is None:
    first = _first_added(content, os.fspath(file))
    start, adds = (first, True) if first is not None else (None, False)
  adds = adds and start is not None
  return HuggingFaceTokenizer(
    content, end_id=end, start_id=start if adds else end, adds_start=adds, rows=rows, name=os.fspath(file)
  )


def _sentencepiece_of_folder(folder: Path, beside: _Beside, rows: int | None) -> Tokenizer:
  file = folder / MODEL_FILE
  if not file.exists():
    raise InputError(f"{folder}: no tokenizer.json and no tokenizer.model in it; give a folder with one of them")
  plain = SentencePieceTokenizer(file.read_bytes(), name=os.fspath(file))
  ids = {plain.piece(i): i for i in range(plain.vocab_size)}
  end = beside.token("eos", ids)
  start = beside.token("bos", ids) if beside.token("bos", ids) is not None else plain.bos_id
  adds = start is not None and beside.flag("add_bos_token") is not False
  return SentencePieceTokenizer(
    plain.model, rows=rows, end_id=end, start_id=start if adds else end, adds_start=adds, name=os.fspath(file)
  )


class _Beside:
  """What the files beside a tokenizer say of it."""

  def __init__(self, folder: Path):
    self._files = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
      if (folder / name).exists():
        self._files[folder / name] = _read_json(folder / name)

  def number(self, file: str, key: str) -> int | None:
    values = [content.get(key) for path, content in self._files.items() if path.name == file]
    return values[0] if values and isinstance(values[0], int) else None

  def flag(self, key: str) -> bool | None:
    return next((bool(content[key]) for content in self._files.values() if content.get(key) is not None), None)

  def ours(self) -> dict[str, Any] | None:
    """What an export of ours says of its tokenizer."""
    found = next((content["cyb_jax"] for content in self._files.values() if "cyb_jax" in content), None)
    wanted = ("kind", "vocab_size", "end_id", "sha256")
    return found if isinstance(found, dict) and all(name in found for name in wanted) else None

  def token(self, role: str, ids: Mapping[str, int]) -> int | None:
    """The id of eos or bos."""
    for path, content in self._files.items():
      named, number = content.get(f"{role}_token"), content.get(f"{role}_token_id")
      named = named.get("content") if isinstance(named, dict) else named
      if named is not None:
        if not isinstance(named, str) or named not in ids:
          raise InputError(f"{path}: {role}_token {named!r} is not in the vocabulary; give the tokenizer of this model")
        return ids[named]
      number = number[0] if isinstance(number, list) and number else number
      if isinstance(number, int):
        if number not in ids.values():
          raise InputError(f"{path}: {role}_token_id {number} has no entry; give the tokenizer of this model")
        return number
    return None


def _read_json(path: Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise InputError(f"{path}: it can't be read ({error.strerror}); give a tokenizer.json") from error
  except ValueError as error:
    raise InputError(f"{path}: it is no JSON, or not whole ({error}); fetch it again") from error
  if not isinstance(content, dict):
    raise InputError(f"{path}: a JSON {type(content).__name__}, not an object; fetch it again")
  return content


def _first_added(content: Mapping[str, Any], where: str) -> int | None:
  """The id that the library puts before a text by itself."""
  if _types(content.get("post_processor")) <= {"", "ByteLevel"}:
    return None
  built = _built(dict(content) | {"added_tokens": content.get("added_tokens") or [], "truncation": None}, where)
  plain, whole = (built.encode("a", add_special_tokens=added).ids for added in (False, True))
  return whole[0] if len(whole) > len(plain) and whole[:1] != plain[:1] else None


def _without_appended(
  content: dict[str, Any], names: Mapping[int, str], rows: int | None, ours: Mapping[str, Any] | None
) -> tuple[dict[str, Any], int | None]:
  """A tokenizer as it was before an export of ours, and its rows.

  Pauses and the rest stand behind all the model's rows, those that fill the gap up to them in front.
  """
  added = content.get("added_tokens") or []
  appended = {entry["id"] for entry in added if _APPENDED.fullmatch(entry["content"])}
  # Only what stands at the end can go without moving others.
  last = max(names, default=-1)
  gone = set()
  while last in appended:
    gone.add(last)
    last -= 1
  if not gone:
    return content, rows
  if ours is not None:
    rows = ours["vocab_size"]
  elif rows is not None and rows > min(gone):
    pauses = [i for i in gone if not names[i].startswith("<row_")]
    rows = min(pauses, default=rows)
  return content | {"added_tokens": [entry for entry in added if entry["id"] not in gone]}, rows


def write_folder(
  content: Mapping[str, Any],
  names: Mapping[int, str],
  tokenizer: Tokenizer,
  directory: str | os.PathLike,
  added: Sequence[tuple[int, str]],
) -> None:
  """Writes tokenizer.json and tokenizer_config.json, from which transformers makes the tokenizer.

  Args:
    content: of tokenizer.json.
    names: its entries by id.
    tokenizer: whose it is.
    directory: that exists.
    added: (id, name) of special entries that come to it, ids ascending, none in the vocabulary. The library numbers
      its entries without gaps: what lies between gets entries named `<row_N>`.

  Raises:
    InputError: an id or name that is taken.
  """
  content = copy.copy(dict(content))
  entries, taken = list(content.get("added_tokens") or ()), set(names.values())
  free = max(names) + 1
  for number, name in added:
    if number < free or name in taken:
      raise InputError(f"{name}: the entry {number} of the vocabulary, or the name, is taken; free is {free} and above")
    filled = ((i, f"<row_{i}>") for i in range(free, number))
    entries += [_entry(i, text, special=True) for i, text in (*filled, (number, name))]
    taken.add(name)
    free = number + 1
  content["added_tokens"] = entries
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": names[tokenizer.end_id],
    "clean_up_tokenization_spaces": False,
    "add_bos_token": tokenizer.adds_start,
    "cyb_jax": tokenizer.describe(),
  }
  if tokenizer.adds_start:
    settings["bos_token"] = names[tokenizer.start_id]
  for file, value in (("tokenizer.json", content), ("tokenizer_config.json", settings)):
    with open(os.path.join(directory, file), "w", encoding="utf-8") as opened:
      json.dump(value, opened, ensure_ascii=False, indent=2)
      opened.write("\n")


def _entry(number: int, name: str, *, special: bool) -> dict[str, Any]:
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  return {"id": number, "content": name} | flags | {"special": special}


def sentencepiece_content(model: bytes, end_id: int, start_id: int, adds_start: bool) -> tuple[dict, dict[int, str]]:
  """A SentencePiece model as a tokenizer.json of the package tokenizers, and its entries by id.

  It encodes as the model does, but for two things: a U+2581 of the text is a space to it; and where a model puts a
  space before every text, it puts one behind each user-defined piece too.

  Raises:
    InputError: a model of words or characters, or one that puts its spaces behind words.
  """
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  kinds, normal = sentencepiece_model_pb2.TrainerSpec, proto.normalizer_spec
  names = {i: piece.piece for i, piece in enumerate(proto.pieces)}
  scores = [(piece.piece, piece.score) for piece in proto.pieces]
  unknown = next((i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN), None)
  fallback = proto.trainer_spec.byte_fallback
  if proto.trainer_spec.treat_whitespace_as_suffix or not normal.escape_whitespaces:
    raise InputError("data.tokenizer: a SentencePiece model with spaces behind words can't be written for transformers")
  if proto.trainer_spec.model_type == kinds.UNIGRAM:
    # Nothing but text may lead to a byte or a special piece.
    scores = [(p.piece, p.score if p.type in (1, _USER_DEFINED) else -1000.0) for p in proto.pieces]
    spec = {"type": "Unigram", "unk_id": unknown, "vocab": [list(pair) for pair in scores], "byte_fallback": fallback}
  elif proto.trainer_spec.model_type == kinds.BPE:
    spec = {
      "type": "BPE", "dropout": None, "unk_token": names.get(unknown), "continuing_subword_prefix": None,
      "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": fallback, "ignore_merges": False,
      "vocab": {name: i for i, name in names.items()}, "merges": _merges(proto),
    }  # fmt: skip
  else:
    raise InputError(
      "data.tokenizer: only SentencePiece models of type unigram and bpe can be written for transformers"
    )
  steps: list[dict[str, Any]] = []
  if normal.precompiled_charsmap:
    import base64

    charsmap = base64.b64encode(normal.precompiled_charsmap).decode()
    steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
  if normal.remove_extra_whitespaces:
    steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
    steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
  if normal.add_dummy_prefix:
    steps.append({"type": "Prepend", "prepend": "▁"})
  steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
  decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
  decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
  if normal.add_dummy_prefix:
    decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
  first = names[start_id]
  pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
  start = {"SpecialToken": {"id": first, "type_id": 0}}
  template = {
    "type": "TemplateProcessing", "single": [start, pair[0]], "pair": [start, *pair],
    "special_tokens": {first: {"id": first, "ids": [start_id], "tokens": [first]}},
  }  # fmt: skip
  special = {i for i, piece in enumerate(proto.pieces) if piece.type in (_UNKNOWN, _CONTROL)} | {end_id, start_id}
  own = {i for i, piece in enumerate(proto.pieces) if piece.type == _USER_DEFINED}
  return {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [_entry(i, names[i], special=i in special) for i in sorted(special | own)],
    "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None,
    "post_processor": template if adds_start else None,
    "decoder": {"type": "Sequence", "decoders": decoders}, "model": spec,
  }, names  # fmt: skip


def _merges(proto) -> list[list[str]]:
  """The pairs that a BPE model of SentencePiece joins, first those that it joins first.

  It joins whatever makes the piece of the highest score, however the piece is parted.
  """
  scores = {piece.piece: piece.score for piece in proto.pieces if piece.type in (1, _USER_DEFINED)}
  ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
  found = []
  for piece, score in scores.items():
    parts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
    parts = sorted((ids[a], ids[b], a, b) for a, b in parts if a in scores and b in scores)
    found += [(-score, ids[piece], *part) for part in parts]
  return [[left, right] for *_, left, right in sorted(found)]


# GGUF files.


def open_gguf(path: Path, rows: int | None) -> Tokenizer:
  """The tokenizer inside a GGUF file, by what its `tokenizer.ggml.*` say.

  Raises:
    InputError: no GGUF file, no tokenizer in it, one of an unknown kind, no end token, or rows that don't fit.
  """
  metadata = gguf_metadata.read_metadata(path)
  prefix = "tokenizer.ggml."
  found = {key[len(prefix) :]: value for key, value in metadata.items() if key.startswith(prefix)}
  if "model" not in found or not isinstance(found.get("tokens"), list) or not found["tokens"]:
    raise InputError(f"{path}: no tokenizer in it (tokenizer.ggml.model, .tokens); give a GGUF file with one")
  if rows is None:
    rows = metadata.get(f"{metadata.get('general.architecture')}.vocab_size")
  kinds = found.setdefault("token_type", [1] * len(found["tokens"]))
  if len(kinds) != len(found["tokens"]):
    raise InputError(f"{path}: tokenizer.ggml.token_type has {len(kinds)} values for {len(found['tokens'])} tokens")
  ids = {name: i for i, name in enumerate(found["tokens"])}
  end = next((ids[name] for name in _JOINERS if name in ids), found.get("eos_token_id"))
  if end is None or not 0 <= end < len(ids):
    raise InputError(f"{path}: no end token: tokenizer.ggml.eos_token_id is {end}; give a GGUF file that names one")
  where = os.fspath(path)
  if found["model"] == "gpt2":
    pre = found.get("pre")
    if pre is None:
      pre = "default"
      logging.warning(
        "%s: tokenizer.ggml.pre is missing, so text is taken to be cut as GPT-2 cuts it; if this model cuts it"
        " otherwise, give its tokenizer.json",
        path,
      )
    if not isinstance(pre, str) or pre not in _PRE:
      raise InputError(f"{path}: tokenizer.ggml.pre {pre!r} is unknown; known are {', '.join(_PRE)}")
    content = _byte_level_content(found, _PRE[pre], where)
    adds = bool(found.get("add_bos_token", _PRE[pre] == "llama3")) and found.get("bos_token_id") is not None
    start = found["bos_token_id"] if adds else end
    return HuggingFaceTokenizer(content, end_id=end, start_id=start, adds_start=adds, rows=rows, name=where)
  if found["model"] == "llama":
    scores = found.get("scores")
    if not isinstance(scores, list) or len(scores) != len(kinds):
      raise InputError(f"{path}: tokenizer.ggml.scores are missing, or not one for each token; fetch it again")
    start = found.get("bos_token_id", 1)
    model = _sentencepiece_model(
      list(zip(found["tokens"], scores, kinds)), start, found.get("eos_token_id", end), where,
      dummy_prefix=bool(found.get("add_space_prefix", True)),
    )  # fmt: skip
    adds = bool(found.get("add_bos_token", True))
    return SentencePieceTokenizer(
      model, rows=rows, end_id=end, start_id=start if adds else end, adds_start=adds, name=where
    )
  raise InputError(f"{path}: tokenizer.ggml.model {found['model']!r} is unknown; known are gpt2 and llama")


def _byte_level_content(found: Mapping[str, Any], cut: str, where: str) -> dict[str, Any]:
  """Byte-level BPE of a GGUF as a tokenizer.json."""
  byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
  if cut in ("gpt2", "digits"):
    steps = [byte_level | {"use_regex": True}]
    if cut == "digits":
      steps.insert(0, {"type": "Digits", "individual_digits": True})
  else:
    pattern = _MERGES_OF_LLAMA3 % ("{1,3}" if cut == "llama3" else "")
    steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, byte_level]
  if not isinstance(found.get("merges"), list):
    raise InputError(f"{where}: tokenizer.ggml.merges are missing; fetch it again")
  kinds = enumerate(zip(found["tokens"], found["token_type"]))
  return {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [
      _entry(i, name, special=kind != _USER_DEFINED) for i, (name, kind) in kinds if kind in (2, 3, 4)
    ],
    "normalizer": {"type": "NFC"} if cut == "qwen2" else None,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "post_processor": None,
    "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
    "model": {
      "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
      "fuse_unk": False, "byte_fallback": False, "ignore_merges": cut == "llama3",
      "vocab": {name: i for i, name in enumerate(found["tokens"])}, "merges": found["merges"],
    },
  }  # fmt: skip


def _sentencepiece_model(
  pieces: Sequence[tuple[str, float, int]], bos: int, eos: int, where: str, *, dummy_prefix: bool
) -> bytes:
  """A BPE model of SentencePiece of (piece, score, type) each, in Llama's manner."""
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto()
  for piece, score, kind in pieces:
    proto.pieces.add(piece=piece, score=score, type=kind)
  spec, names = proto.trainer_spec, [piece for piece, _, _ in pieces]
  unknown = [i for i, (_, _, kind) in enumerate(pieces) if kind == _UNKNOWN]
  if len(unknown) != 1 or not (0 <= bos < len(pieces) and 0 <= eos < len(pieces)):
    raise InputError(
      f"{where}: {len(unknown)} unknown tokens, bos {bos} and eos {eos} among {len(pieces)} entries make no"
      " SentencePiece model; it takes one unknown token, and both others among the entries"
    )
  spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
  spec.vocab_size = len(pieces)
  spec.byte_fallback = any(kind == _BYTE for _, _, kind in pieces)
  spec.unk_id, spec.unk_piece = unknown[0], names[unknown[0]]
  spec.bos_id, spec.bos_piece, spec.eos_id, spec.eos_piece = bos, names[bos], eos, names[eos]
  spec.pad_id = -1
  proto.normalizer_spec.name = "identity"
  proto.normalizer_spec.add_dummy_prefix = dummy_prefix
  proto.normalizer_spec.remove_extra_whitespaces = False
  return proto.SerializeToString()


# llama2.c.


def open_llama2c(path: Path, rows: int | None) -> Tokenizer:
  """llama2.c's tokenizer.bin: the pieces of Llama 2's SentencePiece model, or of one that is trained as it was.

  int32 length of the longest piece; then of each piece a float32 score, its int32 length in bytes, its bytes. Its
  models are trained on documents that each follow the begin token, and on no end token: it is both here.

  Raises:
    InputError: another file, a truncated one, or rows that don't fit.
  """
  content = path.read_bytes()
  pieces, place = [], 4
  try:
    (longest,) = struct.unpack_from("<i", content, 0)
    while place < len(content):
      score, length = struct.unpack_from("<fi", content, place)
      text = content[place + 8 : place + 8 + length]
      if not 0 <= length <= longest or len(text) < length or longest > 1 << 16:
        raise ValueError(f"a piece of {length} bytes")
      pieces.append((text.decode(), score))
      place += 8 + length
    if len(pieces) < 3:
      raise ValueError(f"{len(pieces)} pieces")
  except (struct.error, ValueError) as error:
    raise InputError(
      f"{path}: it is no tokenizer.bin of llama2.c, or ends too early ({error}, at byte {place} of {len(content)})"
    ) from error
  control = {"\n<s>\n": "<s>", "\n</s>\n": "</s>", "<s>": "<s>", "</s>": "</s>"}
  typed = []
  for number, (piece, score) in enumerate(pieces):
    if number == 0:
      typed.append((piece, score, _UNKNOWN))
    elif number in (1, 2):
      typed.append((control.get(piece, piece), score, _CONTROL))
    else:
      typed.append((piece.replace(" ", "▁"), score, _BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else 1))
  model = _sentencepiece_model(typed, 1, 2, os.fspath(path), dummy_prefix=True)
  return SentencePieceTokenizer(model, rows=rows, end_id=1, start_id=1, adds_start=True, name=os.fspath(path))
