"""Files and folders on a disk. `cyb_jax.storage.files` documents the functions."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Literal


def names(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def exists(path: pathlib.Path) -> bool:
  return path.exists()


def read_bytes(path: pathlib.Path) -> bytes:
  return path.read_bytes()


def atomic_write(path: pathlib.Path, content: bytes) -> None:
  new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  try:
    with new.open("wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    new.replace(path)
  except BaseException:
    new.unlink(missing_ok=True)
    raise


def make_new(folder: pathlib.Path) -> None:
  folder.mkdir()


@contextlib.contextmanager
def local_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  yield folder


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  with tempfile.TemporaryDirectory(prefix="cyb_jax.") as scratch:
    yield pathlib.Path(scratch)
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob("*.tmp"):  # of a process that was killed
      leftover.unlink(missing_ok=True)
    for path in sorted(pathlib.Path(scratch).iterdir()):
      atomic_write(folder / path.name, path.read_bytes())
    flush_folder(folder)


def remove_tree(folder: pathlib.Path, *, missing_ok: bool) -> None:
  shutil.rmtree(folder, ignore_errors=missing_ok)


def move_tree(source: pathlib.Path, target: pathlib.Path, last: str) -> None:
  del last  # a rename is atomic
  target.parent.mkdir(exist_ok=True)
  source.rename(target)


def flush_folder(folder: pathlib.Path) -> None:
  """Flushes a folder's directory entries to the disk; the system would do this at an unknown later time."""
  number = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(number)
  finally:
    os.close(number)


class DiskFiles:
  """The files in a folder on a disk at the time of each call."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder

  def __iter__(self) -> Iterator[str]:
    return iter(str(path.relative_to(self._folder)) for path in sorted(self._folder.rglob("*")) if path.is_file())

  def size(self, name: str) -> int:
    return (self._folder / name).stat().st_size

  def digest(self, name: str, kind: Literal["sha256", "md5"], *, flush: bool = False) -> str:
    with (self._folder / name).open("rb") as file:
      if flush:
        os.fsync(file.fileno())
      return hashlib.file_digest(file, kind).hexdigest()


def files(folder: pathlib.Path) -> DiskFiles:
  return DiskFiles(folder)
