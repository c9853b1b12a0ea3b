"""Writes tokenizers in the form that transformers loads: tokenizer.json and tokenizer_config.json."""

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
) -> None:
  """Writes tokenizer.json and tokenizer_config.json.

  Args:
    content: of tokenizer.json.
    names: the names of its entries by id.
    tokenizer: the tokenizer that the content represents.
    directory: an existing folder.
    added: (id, name) of special entries to append; the ids ascend, and none is in the vocabulary. The library numbers
      its entries without gaps, so a gap is filled with entries named `<row_N>`.

  Raises:
    InputError: an id or a name is taken.
  """
  content = dict(content)
  entries, taken = list(content.get("added_tokens") or ()), set(names.values())
  free = max(names) + 1
  for number, name in added:
    if number < free or name in taken:
      raise InputError(f"{name}: the entry {number} of the vocabulary, or the name, is taken; free is {free} and above")
    filled = ((i, f"<row_{i}>") for i in range(free, number))
    entries += [added_token(i, text, special=True) for i, text in (*filled, (number, name))]
    taken.add(name)
    free = number + 1
  content["added_tokens"] = entries
  special = tokenizer.special_tokens
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": names[next(iter(special.end_ids), tokenizer.end_id)],
    "clean_up_tokenization_spaces": False,
    "add_bos_token": tokenizer.adds_start,
    "cyb_jax": tokenizer.describe(),
    **special.names,
  }
  if tokenizer.adds_start:
    settings["bos_token"] = names[tokenizer.start_id]
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
