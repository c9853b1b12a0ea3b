"""The files of a saved tokenizer: a JSON description, and the model in the format of its kind."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from cyb_jax.data.tokenizers.special_tokens import SpecialTokens
from cyb_jax.errors import InputError, shown

DESCRIPTION_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
# The key of the description under which `SpecialTokens` are stored.
SPECIAL_TOKENS = "special_tokens"
HUGGINGFACE_FILE = "huggingface.json"
# The folder of the saved tokenizer in an export, next to the files that transformers reads.
EXPORTED = "cyb_jax_tokenizer"
# The model's file by kind; 'bytes' has no model.
MODEL_FILES = {"sentencepiece": MODEL_FILE, "huggingface": HUGGINGFACE_FILE}


def save_description(
  directory: str | os.PathLike, description: Mapping[str, Any], special_tokens: SpecialTokens
) -> None:
  """Writes the description, and the special tokens if there are any, into an existing folder."""
  special = special_tokens.to_json()
  content = dict(description) | ({SPECIAL_TOKENS: special} if special else {})
  with open(os.path.join(directory, DESCRIPTION_FILE), "w", encoding="utf-8") as file:
    json.dump(content, file, indent=2)
    file.write("\n")


def check_settings(description: Mapping[str, Any], where: str) -> None:
  """Checks the numbers of a description: `vocab_size`, `end_id`, `start_id` and `adds_start`.

  Args:
    description: the description of a tokenizer, in a file that anyone may have changed.
    where: the file, for the error.

  Raises:
    InputError: a number is missing, or has another type or a negative value.
  """
  for name, needed in (("vocab_size", True), ("end_id", True), ("start_id", False)):
    value = description.get(name)
    if (needed or value is not None) and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
      raise InputError(f"{where}: {name} = {shown(value)} must be an integer of at least 0; restore the file")
  if not isinstance(description.get("adds_start", False), bool):
    raise InputError(
      f"{where}: adds_start = {shown(description['adds_start'])} must be true or false; restore the file"
    )


def files(description: Mapping[str, Any]) -> tuple[str, ...]:
  """Names of the files that `Tokenizer.save` writes for a tokenizer with this description."""
  model = MODEL_FILES.get(description["kind"])
  return (DESCRIPTION_FILE,) if model is None else (model, DESCRIPTION_FILE)
