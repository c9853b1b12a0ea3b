"""The folder of a report, which is replaced atomically."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping

from cyb_jax import storage
from cyb_jax.errors import InputError, writing
from cyb_jax.storage.leftovers import leftovers, scratch_name

MAX_BYTES = 10_000_000
_PAGE = "index.html"
# The earlier report, in the temporary folder, while it is replaced.
_OLD = "old"


def check_output(folder: str | os.PathLike) -> storage.Place:
  """Checks that a report may be written to a folder: it does not exist, is empty, or holds only a report.

  Raises:
    InputError: the folder holds other files, which would be lost, or is not writable.
  """
  path = storage.place(folder)
  if not storage.in_bucket(path):
    _recover(path)
  if storage.in_bucket(path):
    storage.check_bucket(path)
  elif path.exists() and not path.is_dir():
    raise InputError(f"--output: {folder} is a file; give a folder")
  with storage.starting(path):
    others = sorted(set(found) - _ours(path)) if (found := storage.names(path)) else []
  if others:
    raise InputError(
      f"--output: {folder} holds {others[0]!r}, which is not part of a report; give an empty or a new folder"
    )
  if storage.in_bucket(path):
    return path
  existing = path.parent
  while not existing.exists():
    existing = existing.parent
  try:
    tempfile.TemporaryFile(dir=existing).close()
  except OSError as error:
    raise InputError(f"--output: can't write in {existing} ({error.strerror}); give another folder") from None
  return path


def _recover(path: pathlib.Path) -> None:
  """Brings back the report that a killed process has moved away, and removes what killed processes have left."""
  with contextlib.suppress(OSError):  # a folder of another user
    for left in leftovers(path):
      if (left / _OLD).is_dir() and not path.exists():
        (left / _OLD).rename(path)
      shutil.rmtree(left, ignore_errors=True)


def _ours(path: storage.Place) -> set[str]:
  """The names of a report's files in a folder; the page lists the report's pictures."""
  try:
    page = storage.read_bytes(path / _PAGE).decode(errors="replace")
  except OSError:
    return {"statistics.json"}  # a comparison keeps this file without a page
  found = re.search(r'<meta name="generator" content="cyb-report: ([^"]*)">', page)
  return {_PAGE, "statistics.json", "comparison.json", "text.svg", *found[1].split()} if found else set()


def generator(pictures: Iterable[str]) -> str:
  """The HTML element that identifies a page as a report and lists the files of its pictures."""
  return f'<meta name="generator" content="cyb-report: {" ".join(pictures)}">'


def check_size(page: str) -> None:
  """Raises InputError if a page is larger than 10 MB."""
  size = len(page.encode())
  if size > MAX_BYTES:
    raise InputError(
      f"--text_windows: the page would have {size / 1e6:.1f} MB, but the limit is 10 MB; show fewer windows of text"
    )


def write_folder(path: storage.Place, files: Mapping[str, str | bytes]) -> None:
  """Replaces a report's folder with a folder of these files.

  Args:
    path: a path that `check_output` has accepted.
    files: contents by name; text is written as UTF-8.

  Raises:
    StorageError: writing fails. The folder on disk is then unchanged; in a bucket it may hold files of both reports,
      because the page is written last. If the process is killed between the two renames of a folder on disk,
      `check_output` brings the earlier report back.
  """
  if storage.in_bucket(path):
    for name in sorted(files, key=lambda name: name == _PAGE):
      storage.atomic_write(path / name, files[name])
    storage.remove_objects([path / name for name in storage.names(path) if name not in files])
    return
  with writing(f"the report in {path}"):
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(scratch_name(path.name))
    new, old = scratch / "new", scratch / _OLD
    try:
      new.mkdir(parents=True)
      for name, content in files.items():
        with open(new / name, "wb") as file:
          file.write(content.encode() if isinstance(content, str) else content)
          file.flush()
          os.fsync(file.fileno())
      if path.exists():
        path.rename(old)
      try:
        new.rename(path)
      except BaseException:  # including interruptions
        if old.exists():
          old.rename(path)
        raise
    finally:
      shutil.rmtree(scratch, ignore_errors=True)
