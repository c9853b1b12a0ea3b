"""The folder of a report, which is replaced whole or stays as it was."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping

from cyb_jax import storage
from cyb_jax.errors import InputError, writing

MAX_BYTES = 10_000_000
_PAGE = "index.html"


def check_output(folder: str | os.PathLike) -> storage.Place:
  """Whether a report may be written there: a folder that isn't there yet, is empty, or holds a report alone.

  Raises:
    InputError: it holds something else, which would be lost, or can't be written to.
  """
  path = storage.place(folder)
  if storage.in_bucket(path):
    storage.check_bucket(path)
  elif path.exists() and not path.is_dir():
    raise InputError(f"--output: {folder} is a file; give a folder")
  with storage.starting(path):
    others = sorted(set(found) - _ours(path)) if (found := storage.names(path)) else []
  if others:
    raise InputError(f"--output: {folder} holds {others[0]!r}, which is no report's; give a folder of the report's own")
  if storage.in_bucket(path):
    return path
  existing = path.parent
  while not existing.exists():
    existing = existing.parent
  try:
    tempfile.TemporaryFile(dir=existing).close()
  except OSError as error:
    raise InputError(f"--output: can't write in {existing} ({error.strerror}); take another folder") from None
  return path


def _ours(path: storage.Place) -> set[str]:
  """Names that a report may have in a folder: its page says which pictures are its own."""
  try:
    page = storage.read_bytes(path / _PAGE).decode(errors="replace")
  except OSError:
    return {"statistics.json"}  # which a comparison keeps
  found = re.search(r'<meta name="generator" content="cyb-report: ([^"]*)">', page)
  return {_PAGE, "statistics.json", "comparison.json", *found[1].split()} if found else set()


def generator(pictures: Iterable[str]) -> str:
  """The element by which a page says that it is a report, and which files next to it are its pictures."""
  return f'<meta name="generator" content="cyb-report: {" ".join(pictures)}">'


def check_size(page: str) -> None:
  """Raises InputError where a page is larger than 10 MB."""
  size = len(page.encode())
  if size > MAX_BYTES:
    raise InputError(
      f"--text_windows: the page would have {size / 1e6:.1f} MB, and 10 MB is the most; show fewer windows of text"
    )


def write_folder(path: storage.Place, files: Mapping[str, str | bytes]) -> None:
  """Replaces a report's folder by one with these files.

  Args:
    path: that `check_output` has passed.
    files: contents by name; text is written as UTF-8.

  Raises:
    StorageError: the disk refuses; the folder is then as it was before. In a bucket it may hold files of both: the page
      comes last.
  """
  if storage.in_bucket(path):
    for name in sorted(files, key=lambda name: name == _PAGE):
      storage.atomic_write(path / name, files[name])
    storage.remove_objects([path / name for name in storage.names(path) if name not in files])
    return
  with writing(f"the report in {path}"):
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    new, old = scratch / "new", scratch / "old"
    try:
      new.mkdir()
      for name, content in files.items():
        with open(new / name, "wb") as file:
          file.write(content.encode() if isinstance(content, str) else content)
          file.flush()
          os.fsync(file.fileno())
      if path.exists():
        path.rename(old)
      try:
        new.rename(path)
      except BaseException:  # an interruption too
        if old.exists():
          old.rename(path)
        raise
    finally:
      shutil.rmtree(scratch, ignore_errors=True)
