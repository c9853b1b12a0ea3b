"""The files of a saved tokenizer: a JSON description, and the model in the format of its kind."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from cyb_jax.data.tokenizers.special_tokens import SpecialTokens

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


def files(description: Mapping[str, Any]) -> tuple[str, ...]:
  """Names of the files that `Tokenizer.save` writes for a tokenizer with this description."""
  model = MODEL_FILES.get(description["kind"])
  return (DESCRIPTION_FILE,) if model is None else (model, DESCRIPTION_FILE)
