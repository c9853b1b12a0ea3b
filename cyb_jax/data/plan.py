"""The plan of a preparation: task, tokenizer, the recipe that the store's description records, and the store's path."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath

from cyb_jax.data import chats, tasks, tokenizers
from cyb_jax.data import store as stores
from cyb_jax.data.tokenizers import Tokenizer
from cyb_jax.errors import InputError
from cyb_jax.storage import in_bucket, streams, user_cache
from cyb_jax.storage.paths import unchecked_place

# The version of the rule that derives token weights from byte weights. It is only part of a store's name in the cache,
# so a store that an earlier version has prepared there is neither changed nor reused.
_WEIGHTS_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is prepared, and where.

  Attributes:
    task: the opened task.
    tokenizer: the tokenizer's spec.
    given: the tokenizer; None means that it has to be trained.
    recipe: the part of the store's description that is known before the preparation.
    limit: the largest number of documents of each split; None means all.
    path: the store's folder.
  """

  task: tasks.Task
  tokenizer: str
  given: Tokenizer | None
  recipe: dict[str, Any]
  limit: int | None
  path: epath.Path

  @classmethod
  def make(
    cls,
    name: str,
    tokenizer: str,
    output: str | os.PathLike | None,
    options: Mapping[str, Any] | None,
    limit: int | None,
    shard_tokens: int,
  ) -> Plan:
    """Makes the plan from the arguments of `prepare`.

    Raises:
      InputError: a task or option is unknown, a source is missing, the tokenizer is unusable, or `limit` is below 1.
    """
    if limit is not None and limit < 1:
      raise InputError(f"limit={limit}: give at least 1 document, or none for all")
    task = tasks.open_task(name, options)
    given = None if tokenizers.trained_pieces(tokenizer) else tokenizers.open_tokenizer(tokenizer)
    recipe = {
      "format": stores.FORMAT,
      "task": name,
      "options": {name: value for name, value in task.options.items() if name not in tasks.PLACES},
      "source": task.identity,
      # A model file is identified by its content, not by its path.
      "tokenizer_from": given.describe()["sha256"] if given else tokenizer,
      "limit": limit,
      "shard_tokens": shard_tokens,
    }
    if "messages" in task.annotations:
      recipe["chat_template"] = chats.template_digest(given)
    named = recipe | ({"weights": _WEIGHTS_VERSION} if "weights" in task.annotations else {})
    path = unchecked_place(output) if output else unchecked_place(_default_path(named, tokenizer))
    return cls(task, tokenizer, given, recipe, limit, path)

  @property
  def folder(self) -> epath.Path:
    """The folder of the pieces."""
    return self.path.parent / f".{self.path.name}.pieces.partial"

  def require_recipe(self, found: Mapping[str, Any], what: str, remedy: str) -> None:
    """Checks that the store or the pieces at the store's path have this plan's recipe.

    Args:
      found: the recipe that was found at the path.
      what: the noun for the error message: 'a store' or 'pieces of a store'.
      remedy: the remedy for the error message.

    Raises:
      InputError: the recipes differ.
    """
    # Earlier versions did not make paths absolute.
    options = tasks.with_absolute_paths(found.get("options") or {})
    for name, value in self.recipe.items():
      if (options if name == "options" else found.get(name)) != value:
        raise InputError(
          f"output={os.fspath(self.path)!r}: it contains {what} with {name}={found.get(name)!r}, not {value!r};"
          f" {remedy}"
        )

  def existing_store(self) -> dict[str, Any] | None:
    """The description of the store at the path; None if the path does not exist yet.

    Raises:
      InputError: the path contains a different store, or is not a store.
    """
    path = self.path
    if stores.is_store(path):
      found = stores.read_description(path)
      self.require_recipe(found, "a store", "give another folder, or remove it")
      if not in_bucket(path):
        stores.TokenStore.open(path)
      logging.info("%s is prepared already", path)
      return found
    # In a bucket, the shards of an unfinished store are already at the store's path.
    started = in_bucket(path) and streams.size_of(self.folder / "plan.json") is not None
    if not started and (streams.names(path) if in_bucket(path) or path.is_dir() else path.exists()):
      raise InputError(f"output={os.fspath(path)!r}: it exists and is not a token store; give another folder")
    return None

  def record(self, pieces: int) -> None:
    """Writes plan.json into the folder of the pieces, or compares this plan with an existing plan.json.

    Args:
      pieces: number of pieces of the task.

    Raises:
      InputError: the existing pieces have a different recipe or a different number.
    """
    file = self.folder / "plan.json"
    if streams.read_json(file) is None:
      streams.write_json(file, self.recipe | {"pieces": pieces})
    found = streams.read_json(file) or {}
    remedy = f"give the same value or another output, or remove {os.fspath(self.folder)}"
    self.require_recipe(found, "pieces of a store", remedy)
    if found.get("pieces") != pieces:
      raise InputError(
        f"output={os.fspath(self.path)!r}: it is being prepared in {found.get('pieces')} pieces, but this version"
        f" divides the task into {pieces}; {remedy}"
      )


def _default_path(recipe: dict[str, Any], tokenizer: str) -> Path:
  """A folder in the user's cache, named by the store's recipe."""
  name = re.sub(r"[^\w.-]+", "_", f"{recipe['task']}-{os.path.basename(tokenizer)}")
  return user_cache() / "stores" / f"{name}-{stores.digest(recipe)[:16]}"
