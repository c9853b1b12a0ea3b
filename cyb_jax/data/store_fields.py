"""Checks the fields of a store.json that has the right fingerprint, before any of its values is used."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from cyb_jax.errors import InputError, shown

# The names of a shard's annotations, see `store.ANNOTATIONS`, and of its file of document positions.
_PARTS = ("documents", "difficulty", "weights")
_COUNTS = ("tokens", "documents", "bytes")


def check_fields(description: Mapping[str, Any], where: str) -> None:
  """Checks the types of the fields that are read, and that files are files of the store's own folder.

  Args:
    description: the content of a store.json.
    where: its path, for the error.

  Raises:
    InputError: a field is missing or has a wrong value.
  """
  fields = _Fields(where, description)
  fields.text("task")
  fields.text("tokenizer_from")
  tokenizer = fields.group("tokenizer")
  tokenizer.text("kind")
  tokenizer.integer("vocab_size", least=1)
  tokenizer.integer("end_id")
  splits = fields.group("splits")
  for name in splits.names:
    split = splits.group(name)
    for count in (*_COUNTS, *(count for count in ("weighted_tokens", "weighted_bytes") if count in split.names)):
      split.integer(count)
    shards = split.groups("shards")
    for shard in shards:
      _check_shard(shard)
    # A mixture has no shards of its own.
    tokens = sum(shard.integer("tokens") for shard in shards)
    if tokens != split.integer("tokens") and not ("mixture" in fields.names and not shards):
      raise fields.wrong(f"splits.{name}.tokens", split.integer("tokens"), f"{tokens}, the sum of its shards")
  for entry in fields.groups("mixture") if "mixture" in fields.names else ():
    entry.text("name")
    entry.text("fingerprint")
    entry.weight()


def _check_shard(shard: _Fields) -> None:
  shard.integer("tokens", least=1)
  shard.file()
  for part in (part for part in _PARTS if part == "documents" or part in shard.names):
    shard.group(part).file()
  shard.group("documents").integer("count")


class _Fields:
  """An object in a store.json."""

  def __init__(self, where: str, values: Any, prefix: str = ""):
    self._where, self._prefix = where, prefix
    if not isinstance(values, Mapping):
      raise self.wrong(prefix.removesuffix("."), values, "an object")
    self._values = values
    self.names = tuple(values)

  def wrong(self, name: str, value: Any, accepted: str) -> InputError:
    return InputError(f"data.store: {self._where}: {name} = {shown(value)} must be {accepted}; prepare the store again")

  def _get(self, name: str, kind: Any, accepted: str) -> Any:
    value = self._values.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
      raise self.wrong(self._prefix + name, value, accepted)
    return value

  def text(self, name: str) -> str:
    return self._get(name, str, "a string")

  def integer(self, name: str, least: int = 0) -> int:
    value = self._get(name, int, f"an integer of at least {least}")
    if value < least:
      raise self.wrong(self._prefix + name, value, f"an integer of at least {least}")
    return value

  def weight(self) -> None:
    value = self._get("weight", int | float, "a number above 0")
    if not 0 < value < math.inf:
      raise self.wrong(f"{self._prefix}weight", value, "a number above 0")

  def file(self) -> None:
    """Checks the name and the digest of a file."""
    name = self.text("file")
    if pathlib.PurePath(name).name != name:
      raise self.wrong(f"{self._prefix}file", name, "the name of a file in the store's folder")
    self.text("sha256")

  def group(self, name: str) -> _Fields:
    return _Fields(self._where, self._values.get(name), f"{self._prefix}{name}.")

  def groups(self, name: str) -> list[_Fields]:
    values = self._get(name, list, "a list")
    return [_Fields(self._where, value, f"{self._prefix}{name}[{number}].") for number, value in enumerate(values)]
