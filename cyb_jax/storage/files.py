"""Functions for files and folders that are on a disk or in a bucket."""

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
  """The files in a folder, by their paths relative to the folder."""

  def __iter__(self) -> Iterator[str]:
    """The relative paths, sorted."""
    ...

  def size(self, name: str) -> int:
    """The size of a file in bytes; raises FileNotFoundError if it does not exist."""
    ...

  def digest(self, name: str, kind: Digest, *, flush: bool = False) -> str:
    """The hexadecimal digest of a file.

    A bucket reports the MD5 digest of an object; to compute any other digest, the file is read.

    Args:
      name: the relative path of the file.
      kind: the kind of the digest.
      flush: whether a file on a disk is also flushed to the disk.
    """
    ...


def place(path: str | os.PathLike) -> Place:
  """The absolute path of a file or folder.

  Raises:
    InputError: the URL scheme is unknown, the URL has no bucket, or the client for buckets is not installed.
  """
  name = os.fspath(path)
  if not in_bucket(name):
    if "://" in name:
      raise InputError(f"{name}: unsupported URL; give a path on a disk or gs://bucket/folder")
    return pathlib.Path(absolute(path)).absolute()
  if not name.removeprefix(SCHEME).strip("/"):
    raise InputError(f"{name}: the bucket is missing; give gs://bucket/folder")
  bucket.file_system()
  from etils import epath

  return epath.Path(name)


def _store(path: str | os.PathLike) -> Any:
  """The module that implements these functions for a path."""
  return bucket if in_bucket(path) else disk


def files(folder: Place) -> Files:
  """The files in a folder. In a bucket, the list is determined at the time of this call."""
  return _store(folder).files(folder)


def names(folder: Place) -> list[str]:
  """The names of the files and folders in a folder, sorted; empty if the folder does not exist."""
  return _store(folder).names(folder)


def exists(path: Place) -> bool:
  """Whether a file exists."""
  return _store(path).exists(path)


def read_bytes(path: Place) -> bytes:
  """The content of a file; raises FileNotFoundError if it does not exist."""
  return _store(path).read_bytes(path)


def atomic_write(path: Place, content: str | bytes) -> None:
  """Replaces a file atomically, even if the process dies or another process writes the file at the same time."""
  _store(path).atomic_write(path, content.encode() if isinstance(content, str) else content)


def make_new(folder: Place) -> None:
  """Creates a folder; raises FileExistsError if it exists. In a bucket, a folder appears with its first file."""
  _store(folder).make_new(folder)


def local_folder(folder: Place) -> contextlib.AbstractContextManager[pathlib.Path]:
  """A folder on a disk with the files of `folder`, for a `with` block.

  It is `folder` itself, or a temporary copy if `folder` is in a bucket.
  """
  return _store(folder).local_folder(folder)


def new_folder(folder: Place) -> contextlib.AbstractContextManager[pathlib.Path]:
  """A temporary folder on a disk to which the `with` block can write small files, but no folders.

  At the end of the block, every file is written to `folder` as by `atomic_write`; `folder` is created if it does not
  exist.
  """
  return _store(folder).new_folder(folder)


def remove_tree(folder: Place, *, missing_ok: bool = True) -> None:
  """Deletes a folder and everything in it."""
  _store(folder).remove_tree(folder, missing_ok=missing_ok)


def move_tree(source: Place, target: Place, last: str) -> None:
  """Renames a folder.

  In a bucket, the objects are moved one by one, and the object `last` is moved at the end, so an interrupted move can
  be detected and no object is lost.
  """
  _store(source).move_tree(source, target, last)
