"""The config fields whose values are paths."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from cyb_jax.errors import InputError
from cyb_jax.option_syntax import Item, parse_mixture, parse_options, written_mixture, written_options

# Values of data.tokenizer that are not paths.
_NO_FILE = re.compile(r"|bytes|sentencepiece:.*")


def with_paths(
  source: Mapping[str, Any], spelling: Callable[[str], str], options: Callable[[Mapping[str, str]], dict[str, str]]
) -> dict[str, Any]:
  """A nested config in which each path is replaced by the result of a function; other values are unchanged.

  The paths are `init_from`, `data.store`, `data.tokenizer` if it is a file or folder, some of `data.options`, and the
  stores and options in `data.mixture`.

  Args:
    source: see `configs.freeze`; it need not be valid.
    spelling: path -> the path that replaces it, such as the absolute path; it must map '' to ''.
    options: a task's options -> the options with replaced paths.
  """
  changed = dict(source)
  if isinstance(changed.get("init_from"), str):
    changed["init_from"] = spelling(changed["init_from"])
  data = changed.get("data")
  if isinstance(data, Mapping):
    changed["data"] = data = dict(data)
    if isinstance(data.get("store"), str):
      data["store"] = spelling(data["store"])
    if isinstance(data.get("tokenizer"), str) and not _NO_FILE.fullmatch(data["tokenizer"]):
      data["tokenizer"] = spelling(data["tokenizer"])
    if isinstance(data.get("options"), str):
      data["options"] = _options(data["options"], options)
    if isinstance(data.get("mixture"), str):
      data["mixture"] = _mixture(data["mixture"], spelling, options)
  return changed


def _options(text: str, spelled: Callable[[Mapping[str, str]], dict[str, str]]) -> str:
  try:
    given = parse_options("data.options", text)
  except InputError:  # the error is reported when the config is frozen
    return text
  changed = spelled(given)
  return text if changed == given else written_options(changed)


def _mixture(text: str, spelling: Callable[[str], str], options: Callable[[Mapping[str, str]], dict[str, str]]) -> str:
  try:
    given = parse_mixture("data.mixture", text) if text else ()
  except InputError:
    return text

  def spelled(item: Item) -> Item:
    # The name of a task has no slash.
    name = spelling(item.name) if "/" in item.name else item.name
    return dataclasses.replace(item, name=name, options=options(item.options))

  changed = tuple(map(spelled, given))
  return text if changed == given else written_mixture(changed)
