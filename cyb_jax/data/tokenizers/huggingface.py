"""Tokenizers of the package tokenizers (tokenizer.json).

No text encodes to a special id, except to the unknown id for characters that the vocabulary lacks, and special ids
decode to no text. All other text is encoded in the same way as by the package.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from cyb_jax.data.tokenizers import byte_level
from cyb_jax.data.tokenizers.description import HUGGINGFACE_FILE, save_description
from cyb_jax.data.tokenizers.huggingface_export import start_template, write_folder
from cyb_jax.data.tokenizers.interface import character_places, checked_rows, is_unused, surrogate
from cyb_jax.data.tokenizers.special_tokens import SpecialTokens
from cyb_jax.errors import InputError, shown

# The tokens that separate the documents in a model's training data, regardless of the token that ends its chats.
DOCUMENT_JOINERS = ("<|endoftext|>", "<|end_of_text|>")


class HuggingFaceTokenizer:
  """A tokenizer of the package tokenizers; see `Tokenizer` for the methods.

  Args:
    content: the content of a tokenizer.json.
    separator_id: the token that separates documents.
    start_id, adds_start, special_tokens: see `Tokenizer`; start_id None means separator_id.
    rows: number of rows of the model's embedding; None means the number of entries.
    name: prefix of error messages: the file.

  Raises:
    InputError: the package can't read the content, ids aren't in the vocabulary, or `rows` does not match.
  """

  def __init__(
    self,
    content: Mapping[str, Any],
    *,
    separator_id: int,
    start_id: int | None = None,
    adds_start: bool = False,
    special_tokens: SpecialTokens | None = None,
    rows: int | None = None,
    name: str = "data.tokenizer",
  ):
    self.content = dict(content)
    self._names = entry_names(content, name)
    self._added = {entry["id"]: entry for entry in content.get("added_tokens") or ()}
    entries = max(self._names, default=-1) + 1
    self.vocab_size = checked_rows(name, entries, rows)
    self.separator_id, self.start_id, self.adds_start = (
      separator_id,
      separator_id if start_id is None else start_id,
      adds_start,
    )
    for role, token in (("end", self.separator_id), ("start", self.start_id)):
      if token not in self._names:
        raise InputError(f"{name}: the {role} token {token} is not among its {entries} entries; give the right id")
    self.special_tokens = special_tokens or SpecialTokens()
    self.special_tokens.check(self._names.__contains__, name)
    self.chat_template = self.special_tokens.chat_template
    self._special = {i for i, entry in self._added.items() if entry.get("special")}
    self._special |= {self.separator_id, self.start_id, *self.unused_ids()}
    self._tokenizer = build(_without_special(content, self._names, self._special, name), name)
    self._name = name
    unknown = content["model"].get("unk_token")
    self._unknown = content["model"].get("unk_id") if unknown is None else ids_by_name(self._names).get(unknown)
    self._byte_level = "ByteLevel" in component_types(content.get("decoder"))
    own = (name for i, name in self._names.items() if i not in self._added)
    self._missing = byte_level.missing_bytes(own) if self._byte_level else set()

  def encode(self, text: str) -> list[int]:
    with _encoding(self._name):
      return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_with_special(self, text: str) -> list[int]:
    with _encoding(self._name):
      return self._with_special.encode(text, add_special_tokens=False).ids

  @functools.cached_property
  def _with_special(self):
    """The library's tokenizer of the unmodified content, which recognizes special entries in a text."""
    disabled: dict[str, Any] = dict.fromkeys(("post_processor", "truncation", "padding"))
    content = self.content | disabled | {"added_tokens": self.content.get("added_tokens") or []}
    built = build(content, self._name)
    built.encode_special_tokens = False
    return built

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    with _encoding(self._name):
      return [row.ids for row in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

  def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], Int[np.ndarray, "N 2"]]]:
    with _encoding(self._name):
      rows = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [(row.ids, _spans(row, text)) for text, row in zip(texts, rows, strict=True)]

  def encode_spans_with_special(self, text: str) -> tuple[list[int], Int[np.ndarray, "N 2"]]:
    with _encoding(self._name):
      row = self._with_special.encode(text, add_special_tokens=False)
    return row.ids, _spans(row, text)

  def unencodable(self, text: str) -> str | None:
    found = surrogate(text)
    if found is not None:
      return found
    if self._missing:
      # The library silently drops a byte that has no entry.
      return next((c for c in text if not self._missing.isdisjoint(c.encode())), None)
    if self._unknown is None or self._unknown not in self.encode(text):
      return None
    return next((c for c in text if self._unknown in self.encode(c)), text[:1])

  def decode(self, ids: Iterable[int]) -> str:
    kept = [i for i in map(int, ids) if i in self._names and i not in self._special]
    with _encoding(self._name):
      return self._tokenizer.decode(kept, skip_special_tokens=False)

  def piece(self, token: int) -> str:
    name = self._names.get(int(token), f"<row_{token}>")
    if token in self._special or not self._byte_level:
      return name
    # The names of added entries are text; the names of the model's own entries encode bytes.
    shown = byte_level.visible(name.encode()) if token in self._added else byte_level.printable(name)
    return name if shown is None else shown

  def special_names(self) -> dict[int, str]:
    return {i: self._names[i] for i in sorted(self._special)}

  def unused_ids(self) -> list[int]:
    return sorted(i for i, name in self._names.items() if is_unused(name))

  def describe(self) -> dict[str, Any]:
    return {"kind": "huggingface"} | self._settings | {"sha256": self._digest}

  @functools.cached_property
  def _settings(self) -> dict[str, Any]:
    settings = {"vocab_size": self.vocab_size, "end_id": self.separator_id}
    return settings | {"start_id": self.start_id, "adds_start": self.adds_start}

  @functools.cached_property
  def _digest(self) -> str:
    canonical = json.dumps([self.content, self._settings], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()

  def save(self, directory: str | os.PathLike) -> None:
    with open(os.path.join(directory, HUGGINGFACE_FILE), "w", encoding="utf-8") as file:
      json.dump(self.content, file, ensure_ascii=False)
    save_description(directory, self.describe(), self.special_tokens)

  def write_huggingface(
    self, directory: str | os.PathLike, added: Sequence[tuple[int, str]] = (), *, starts: bool | None = None
  ) -> None:
    starts = self.adds_start if starts is None else starts
    start = self.start_id if starts else None
    content, changed = self.content, {}
    if first_added(content, self._name) != start:
      # `describe` refers to the original content, so the reader has to restore the original component.
      changed = {"post_processor": content.get("post_processor")}
      content = content | {"post_processor": None if start is None else start_template(self._names[start], start)}
    write_folder(content, self._names, self, directory, added, starts=starts, changed=changed)


def _spans(row: Any, text: str) -> Int[np.ndarray, "N 2"]:
  """The spans of `Tokenizer.encode_spans`, from the library's encoding of a text, whose offsets count characters."""
  first, end = np.array(row.offsets, np.int64).reshape(-1, 2).T
  return character_places(text)[np.stack([first, np.maximum(end, first + 1)], 1)]


def entry_names(content: Mapping[str, Any], where: str) -> dict[int, str]:
  """The names of the model's entries and of the added entries by id, ascending.

  Raises:
    InputError: `content` is not the content of a tokenizer.json; the message begins with `where`.
  """
  try:
    vocabulary = content["model"]["vocab"]
    pairs = vocabulary.items() if isinstance(vocabulary, Mapping) else ((p, i) for i, (p, _) in enumerate(vocabulary))
    entries = [(int(i), name) for name, i in pairs]
    entries += [(int(entry["id"]), entry["content"]) for entry in content.get("added_tokens") or ()]
  except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
    raise InputError(
      f"{where}: it contains no tokenizer of the package tokenizers (model.vocab); give a tokenizer.json"
    ) from error
  odd = [name for _, name in entries if not isinstance(name, str)]
  if odd:
    raise InputError(f"{where}: an entry is {shown(odd[0])}, but must be a string; fetch it again")
  return dict(sorted(dict(entries).items()))


def ids_by_name(names: Mapping[int, str]) -> dict[str, int]:
  """The ids of entries by name, from their names by id."""
  return {name: i for i, name in names.items()}


def component_types(component: Any) -> set[str]:
  """The types in a normalizer, pre-tokenizer or decoder, including those inside sequences."""
  if isinstance(component, list):
    return set().union(*map(component_types, component))
  if not isinstance(component, dict):
    return set()
  kind = component.get("type")
  return {kind if isinstance(kind, str) else ""}.union(*map(component_types, component.values()))


def build(content: Mapping[str, Any], where: str):
  """The library's tokenizer of a tokenizer.json; it does not recognize special entries in a text.

  Raises:
    InputError: the package tokenizers is not installed, or cannot read the content.
  """
  try:
    import tokenizers
  except ImportError as error:
    raise InputError(
      f"{where}: reading it needs the package tokenizers; run pip install 'cyb_jax[pretrained]'"
    ) from error
  with _library(f"{where}: the package tokenizers can't read it", "give a complete tokenizer.json"):
    built = tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
  built.encode_special_tokens = True
  for entry in content["added_tokens"]:
    if built.token_to_id(entry["content"]) != entry["id"]:
      raise InputError(
        f"{where}: added_tokens assign the id {entry['id']} to {shown(entry['content'])}, but the package tokenizers"
        f" assigns {built.token_to_id(entry['content'])}; give a complete tokenizer.json"
      )
  return built


@contextlib.contextmanager
def _library(what: str, remedy: str) -> Iterator[None]:
  """Converts errors of the package tokenizers inside the `with` block to an InputError."""
  try:
    yield
  except BaseException as error:
    # The library raises plain Exceptions, and for a panic of its Rust code an exception that is no Exception.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    reason = " ".join(str(error).split())[:200]
    raise InputError(f"{what} ({reason}); {remedy}") from error


def first_added(content: Mapping[str, Any], where: str) -> int | None:
  """The id that the library itself puts before a text; None if it adds none."""
  if component_types(content.get("post_processor")) <= {"", "ByteLevel"}:
    return None
  built = build(dict(content) | {"added_tokens": content.get("added_tokens") or [], "truncation": None}, where)
  with _encoding(where):
    plain, whole = (built.encode("a", add_special_tokens=added).ids for added in (False, True))
  return whole[0] if len(whole) > len(plain) and whole[:1] != plain[:1] else None


def _encoding(where: str) -> contextlib.AbstractContextManager[None]:
  return _library(f"{where}: the package tokenizers can't encode or decode with it", "give the file of a whole model")


def _without_special(
  content: Mapping[str, Any], names: Mapping[int, str], special: set[int], where: str
) -> dict[str, Any]:
  """The content of a tokenizer.json for which no text encodes to the special ids, without padding and truncation.

  The library can be configured not to recognize special entries in a text, but its model may still produce them: in a
  unigram model, '</s>' is a piece like any other. The special entries are therefore renamed to names that contain a
  space, which no part of a text contains when it reaches the model.
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
    # Two entries may have the same id, which `build` refuses.
    entry | {"content": renamed.get(entry["content"], entry["content"]), "special": True}
    if entry["id"] in special
    else entry
    for entry in content.get("added_tokens") or ()
  ]
  disabled = dict.fromkeys(("post_processor", "truncation", "padding"))
  return dict(content) | {"model": model, "added_tokens": added} | disabled


def _list(value: Any, field: str, where: str) -> list:
  if not isinstance(value, list):
    raise InputError(f"{where}: {field} is {shown(value)}, but must be a list; fetch it again")
  return value


def _pair(merge: Any, where: str) -> Sequence[str]:
  """The two pieces of a merge, in the older format (one string) or the newer one (two strings)."""
  pair = merge.split(" ", 1) if isinstance(merge, str) else merge
  if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(piece, str) for piece in pair)):
    raise InputError(f"{where}: model.merges contains {shown(merge)}, which is not a pair of pieces; fetch it again")
  return pair
