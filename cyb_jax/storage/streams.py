"""Reads and writes large files in parts, and small files at once, on a disk or in a bucket.

Every error names its file and states that the same command continues; see `cyb_jax.storage.failures.access`. Writes are
atomic: an object in a bucket appears when it is closed, and a file on a disk is written under a temporary name and then
renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cyb_jax.storage.failures import access
from cyb_jax.storage.paths import in_bucket

if TYPE_CHECKING:
  from etils import epath


class Output:
  """A file that is being written; errors name the file."""

  def __init__(self, file: IO[bytes], path: epath.Path):
    self._file, self.path = file, path

  def write(self, content: bytes | memoryview) -> None:
    with access(self.path, "written"):
      # Files in a bucket accept only bytes.
      self._file.write(bytes(content) if in_bucket(self.path) else content)


@contextlib.contextmanager
def new_file(path: epath.Path) -> Iterator[Output]:
  """A new file that the `with` block writes; it appears when it is complete.

  Raises:
    StorageError: the disk or the bucket failed.
  """
  with contextlib.ExitStack() as stack:
    if in_bucket(path):
      with access(path, "written"):
        file = stack.enter_context(path.open("wb"))
      yield Output(file, path)
      with access(path, "written"):
        stack.close()
      return
    # Processes that write the same file concurrently have different temporary files.
    scratch = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
      with access(path, "written"):
        file = stack.enter_context(open(scratch, "wb"))
      yield Output(file, path)
      with access(path, "written"):
        stack.close()
        os.replace(scratch, path)
    except BaseException:
      with contextlib.suppress(OSError):
        stack.close()
      scratch.unlink(missing_ok=True)
      raise


def write(path: epath.Path, content: bytes) -> None:
  """Writes a file atomically."""
  with new_file(path) as file:
    file.write(content)


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a JSON file atomically."""
  write(path, (json.dumps(value, indent=2) + "\n").encode())


def read(path: epath.Path, begin: int = 0, end: int | None = None) -> bytes:
  """The bytes [begin, end) of a file, or fewer if the file is shorter.

  Raises:
    FileNotFoundError: the file does not exist.
    StorageError: the disk or the bucket failed.
  """
  with access(path, "read"), path.open("rb") as file:
    if begin:
      file.seek(begin)
    return file.read() if end is None else file.read(end - begin)


def read_json(path: epath.Path) -> Any:
  """The value in a JSON file; None if the file does not exist or is not JSON."""
  try:
    return json.loads(read(path))
  except (FileNotFoundError, ValueError, RecursionError):
    return None


def read_parts(path: epath.Path, part_bytes: int) -> Iterator[bytes]:
  """The content of a file in parts of `part_bytes`; the last part may be shorter."""
  with contextlib.ExitStack() as stack:
    with access(path, "read"):
      file = stack.enter_context(path.open("rb"))
    while True:
      with access(path, "read"):
        content = file.read(part_bytes)
      if not content:
        return
      yield content


def size_of(path: epath.Path) -> int | None:
  """The size of a file in bytes; None if it does not exist."""
  try:
    with access(path, "read"), contextlib.suppress(NotADirectoryError):  # the path of the folder is a file
      return int(path.stat().length if in_bucket(path) else os.stat(path).st_size)
  except FileNotFoundError:
    pass
  return None


def names(path: epath.Path) -> list[str]:
  """The names of the files and folders in a folder, sorted; empty if the folder does not exist."""
  try:
    with access(path, "read"):
      return sorted(found.name for found in path.iterdir()) if in_bucket(path) else sorted(os.listdir(path))
  except FileNotFoundError:
    return []


def make_folder(path: epath.Path) -> None:
  """Creates a folder and its parents if they do not exist."""
  with access(path, "written"):
    path.mkdir(parents=True, exist_ok=True)


def remove(path: epath.Path) -> None:
  """Deletes a file, or a folder and everything in it, if it exists."""
  with contextlib.suppress(FileNotFoundError), access(path, "written"):
    path.rmtree() if path.is_dir() else path.unlink()


@contextlib.contextmanager
def scratch_folder(near: epath.Path) -> Iterator[Path]:
  """A temporary folder on a disk, for a `with` block; it is inside `near` if `near` is on a disk."""
  with tempfile.TemporaryDirectory(prefix="scratch.", dir=None if in_bucket(near) else near) as folder:
    yield Path(folder)
