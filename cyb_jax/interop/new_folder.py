"""Atomic creation of a folder on a disk."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

from absl import logging

from cyb_jax.errors import InputError, writing
from cyb_jax.storage.leftovers import leftovers, scratch_name


@contextlib.contextmanager
def new_folder(output: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to write files into, which is renamed to `output` at the end of the block.

  If the block fails, the folder and the parent folders that were created for it are removed. Folders that killed
  processes have left next to `output` are removed first.

  Args:
    output: an absolute path that does not exist or is an empty folder.

  Raises:
    InputError: another process has written `output` in the meantime.
    StorageError: writing fails.
  """
  # A sibling, so that it can be renamed.
  new = output.with_name(scratch_name(output.name))
  with writing(str(output)):
    made = [folder for folder in new.parents if not folder.exists()]
    try:
      for left in leftovers(output):
        logging.warning("%s: removed, because a killed process left it incomplete", left)
        shutil.rmtree(left)
      new.mkdir(parents=True)
      yield new
      for path in new.rglob("*"):
        if path.is_file():
          _sync(path)
      _publish(new, output)
    except BaseException:
      shutil.rmtree(new, ignore_errors=True)
      with contextlib.suppress(OSError):  # another process may have written into one of them
        for folder in made:
          folder.rmdir()
      raise


def _publish(new: pathlib.Path, output: pathlib.Path) -> None:
  try:
    new.replace(output)
  except OSError as error:
    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
      raise
    raise InputError(
      f"--output: {output} was written by another process in the meantime, and is unchanged; give another folder"
    ) from None


def _sync(path: pathlib.Path) -> None:
  with path.open("rb") as file:
    os.fsync(file.fileno())
