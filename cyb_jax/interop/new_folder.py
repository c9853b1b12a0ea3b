"""Atomic creation of a folder on a disk."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

from absl import logging

from cyb_jax.errors import writing


@contextlib.contextmanager
def new_folder(output: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to write files into, which is renamed to `output` at the end of the block.

  If the block fails, the folder and the parent folders that were created for it are removed. Folders that killed
  processes have left next to `output` are removed first.

  Args:
    output: an absolute path that does not exist or is an empty folder.

  Raises:
    StorageError: writing fails.
  """
  # A sibling, so that it can be renamed.
  new = output.with_name(f"{output.name}.{os.getpid()}.tmp")
  with writing(str(output)):
    made = [folder for folder in new.parents if not folder.exists()]
    try:
      _clear_leftovers(output)
      new.mkdir(parents=True)
      yield new
      for path in new.rglob("*"):
        if path.is_file():
          _sync(path)
      new.replace(output)
    except BaseException:
      shutil.rmtree(new, ignore_errors=True)
      with contextlib.suppress(OSError):  # another process may have written into one of them
        for folder in made:
          folder.rmdir()
      raise


def _clear_leftovers(output: pathlib.Path) -> None:
  """Removes the partial folders of killed processes that wrote the same output."""
  if not output.parent.exists():
    return
  for path in output.parent.iterdir():
    found = re.fullmatch(rf"{re.escape(output.name)}\.(\d+)\.tmp", path.name)
    if found and path.is_dir() and not _is_alive(int(found[1])):
      logging.warning("%s: removed, because a killed process left it incomplete", path)
      shutil.rmtree(path)


def _is_alive(process: int) -> bool:
  if process == os.getpid():  # an older process with the same id: in containers every process may have id 1
    return False
  try:
    os.kill(process, 0)
  except (ProcessLookupError, OverflowError):
    return False
  except PermissionError:  # the process of another user
    pass
  return True


def _sync(path: pathlib.Path) -> None:
  with path.open("rb") as file:
    os.fsync(file.fileno())
