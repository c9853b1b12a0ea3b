"""The files of a saved tokenizer: a description in JSON, and the model in the format of its kind."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

DESCRIPTION_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
HUGGINGFACE_FILE = "huggingface.json"
# The folder with the saved tokenizer in an export, next to the files that transformers reads.
EXPORTED = "cyb_jax_tokenizer"
# The model's file by kind; 'bytes' has no model.
MODEL_FILES = {"sentencepiece": MODEL_FILE, "huggingface": HUGGINGFACE_FILE}


def save_description(directory: str | os.PathLike, description: dict[str, Any]) -> None:
  """Writes the description into an existing folder."""
  with open(os.path.join(directory, DESCRIPTION_FILE), "w", encoding="utf-8") as file:
    json.dump(description, file, indent=2)
    file.write("\n")


def files(description: Mapping[str, Any]) -> tuple[str, ...]:
  """Names of the files that `Tokenizer.save` writes for a tokenizer with this description."""
  model = MODEL_FILES.get(description["kind"])
  return (DESCRIPTION_FILE,) if model is None else (model, DESCRIPTION_FILE)
