"""Opens models of other projects, and folders of adapters of such models."""

from __future__ import annotations

import os
import pathlib

from cyb_jax import hub, storage
from cyb_jax.errors import reading
from cyb_jax.interop import peft
from cyb_jax.interop.sources import Source, open_model


def open_source(path: str | os.PathLike) -> Source:
  """Opens a Hugging Face folder, a folder of adapters of peft, a GGUF file or a llama2.c binary.

  The format is detected from the contents.

  Args:
    path: a local path, or a repository of the hub, see `cyb_jax.hub`.

  Raises:
    InputError: the source is invalid; the message names the file and, if applicable, the tensor or field.
  """
  with reading(str(path)):
    if hub.in_hub(path):
      path = hub.fetch(str(path))
    folder = pathlib.Path(storage.absolute(path))
    if (folder / peft.CONFIG).is_file() and not (folder / "config.json").is_file():
      return peft.open_adapters(folder, open_model)
  return open_model(path)
