"""Writes tokenizers in the format that transformers loads: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from cyb_jax.data.tokenizers.interface import Tokenizer
from cyb_jax.errors import InputError


def write_folder(
  content: Mapping[str, Any],
  names: Mapping[int, str],
  tokenizer: Tokenizer,
  directory: str | os.PathLike,
  added: Sequence[tuple[int, str]],
  *,
  starts: bool,
  changed: Mapping[str, Any] | None = None,
) -> None:
  """Writes tokenizer.json and tokenizer_config.json.

  Args:
    content: the content of tokenizer.json.
    names: the names of its entries by id.
    tokenizer: the tokenizer that the content represents.
    directory: an existing folder.
    added: (id, name) of special entries to append; the ids ascend, and none is in the vocabulary. The library numbers
      its entries without gaps, so a gap is filled with entries named `<row_N>`.
    starts: whether the content puts the tokenizer's start token before a text.
    changed: the tokenizer's original components that `content` replaces.

  Raises:
    InputError: an id or a name is already in use.
  """
  content = dict(content)
  entries, taken = list(content.get("added_tokens") or ()), set(names.values())
  free = max(names) + 1
  for number, name in added:
    if number < free or name in taken:
      raise InputError(f"{name}: the id {number} or the name is already in use; give a new name and at least {free}")
    filled = ((i, f"<row_{i}>") for i in range(free, number))
    entries += [added_token(i, text, special=True) for i, text in (*filled, (number, name))]
    taken.add(name)
    free = number + 1
  content["added_tokens"] = entries
  special = tokenizer.special_tokens
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": names[next(iter(special.end_ids), tokenizer.separator_id)],
    "clean_up_tokenization_spaces": False,
    "cyb_jax": tokenizer.describe() | dict(changed or {}),
    **special.names,
  }
  start = names[tokenizer.start_id]
  if starts:
    settings.setdefault("bos_token", start)
  # If add_bos_token is set, transformers puts bos_token before a text. If the start token differs from the chat
  # template's bos_token, the content adds it instead.
  if not starts or settings["bos_token"] == start:
    settings["add_bos_token"] = starts
  if special.chat_template is not None:
    settings["chat_template"] = special.chat_template
  for file, value in (("tokenizer.json", content), ("tokenizer_config.json", settings)):
    with open(os.path.join(directory, file), "w", encoding="utf-8") as opened:
      json.dump(value, opened, ensure_ascii=False, indent=2)
      opened.write("\n")


def added_token(number: int, name: str, *, special: bool) -> dict[str, Any]:
  """An entry of `added_tokens` in a tokenizer.json."""
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  return {"id": number, "content": name} | flags | {"special": special}


def start_template(name: str, start_id: int) -> dict[str, Any]:
  """The component `post_processor` that puts the start token before a text."""
  start = {"SpecialToken": {"id": name, "type_id": 0}}
  first, second = ({"Sequence": {"id": letter, "type_id": number}} for number, letter in enumerate("AB"))
  return {
    "type": "TemplateProcessing",
    "single": [start, first],
    "pair": [start, first, second],
    "special_tokens": {name: {"id": name, "ids": [start_id], "tokens": [name]}},
  }
