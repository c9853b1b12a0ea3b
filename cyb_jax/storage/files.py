"""One set of functions for files and folders on a disk and in a bucket."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Literal, Protocol, TypeAlias

from cyb_jax.errors import InputError
from cyb_jax.storage import bucket, disk
from cyb_jax.storage.paths import SCHEME, Place, absolute, in_bucket

Digest: TypeAlias = Literal["sha256", "md5"]


class Files(Protocol):
  """The files in a folder, by their paths in it: sizes and checksums."""

  def __iter__(self) -> Iterator[str]:
    """The paths, sorted."""
    ...

  def size(self, name: str) -> int:
    """In bytes; FileNotFoundError where the file does not exist."""
    ...

  def digest(self, name: str, kind: Digest, *, flush: bool = False) -> str:
    """Hexadecimal. A bucket reports the MD5 digest of an object; for all other digests the whole file is read.

    Args:
      name: of the file.
      kind: of the digest.
      flush: whether a file on a disk is also flushed to the disk.
    """
    ...


def place(path: str | os.PathLike) -> Place:
  """The path of a file or folder, absolute.

  Raises:
    InputError: the path is in an unknown store, it names no bucket, or the client for buckets is not installed.
  """
  name = os.fspath(path)
  if not in_bucket(name):
    if "://" in name:
      raise InputError(f"{name}: neither a folder on a disk nor gs://bucket/folder")
    return pathlib.Path(absolute(path)).absolute()
  if not name.removeprefix(SCHEME).strip("/"):
    raise InputError(f"{name}: no bucket is named; write gs://bucket/folder")
  bucket.file_system()
  from etils import epath

  return epath.Path(name)


def _store(path: str | os.PathLike) -> Any:
  """The module that implements these functions for a path."""
  return bucket if in_bucket(path) else disk


def files(folder: Place) -> Files:
  """The files in a folder. Of a bucket, the list is that of the time of this call."""
  return _store(folder).files(folder)


def names(folder: Place) -> list[str]:
  """The names of the files and folders in a folder, sorted; empty where the folder does not exist."""
  return _store(folder).names(folder)


def exists(path: Place) -> bool:
  """Whether a file exists."""
  return _store(path).exists(path)


def read_bytes(path: Place) -> bytes:
  """The content of a file; FileNotFoundError where it does not exist."""
  return _store(path).read_bytes(path)


def atomic_write(path: Place, content: str | bytes) -> None:
  """Replaces a file, whole or not at all, whatever process dies and whoever else writes it at the same time."""
  _store(path).atomic_write(path, content.encode() if isinstance(content, str) else content)


def make_new(folder: Place) -> None:
  """Makes a folder; FileExistsError where it exists. In a bucket, a folder appears with its first file."""
  _store(folder).make_new(folder)


def local_folder(folder: Place) -> contextlib.AbstractContextManager[pathlib.Path]:
  """A folder on a disk with the files of `folder`, for a `with` block.

  It is `folder` itself, or a copy of a folder in a bucket.
  """
  return _store(folder).local_folder(folder)


def new_folder(folder: Place) -> contextlib.AbstractContextManager[pathlib.Path]:
  """A folder on a disk to write files to, for a `with` block.

  It is `folder` itself, made if it does not exist, or a temporary one whose files are uploaded at the end of the block.
  """
  return _store(folder).new_folder(folder)


def remove_tree(folder: Place, *, missing_ok: bool = True) -> None:
  """Deletes a folder and everything in it."""
  _store(folder).remove_tree(folder, missing_ok=missing_ok)


def move_tree(source: Place, target: Place, last: str) -> None:
  """Renames a folder.

  In a bucket the objects are moved one by one, and the one named `last` at the end, so that an interrupted move can be
  recognised and nothing is lost.
  """
  _store(source).move_tree(source, target, last)
