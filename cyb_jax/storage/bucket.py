"""Files and folders in a bucket, through gcsfs. `cyb_jax.storage.files` documents the functions that `disk` also has.

Methods of epath such as `is_dir` are not used, because epath treats a bucket without access permission as empty.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from cyb_jax.errors import InputError
from cyb_jax.storage.failures import bucket_errors, starting
from cyb_jax.storage.paths import SCHEME

if TYPE_CHECKING:
  from etils import epath

_CONCURRENT_REQUESTS = 16


@functools.cache
def file_system() -> Any:
  """The file system of gcsfs.

  Raises:
    InputError: gcsfs is not installed.
  """
  try:
    import fsspec
    import gcsfs  # noqa: F401
  except ImportError:
    raise InputError("gs://: the package gcsfs is not installed; run pip install 'cyb_jax[gcs]'") from None
  # gcsfs logs a traceback of each failed request in addition to raising the error.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  # With a cache of listings, writes of other machines would never become visible.
  fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
  return fsspec.filesystem("gcs")


@contextlib.contextmanager
def _requests(path: str | os.PathLike) -> Iterator[Any]:
  """The file system for requests about a path; errors inside the `with` block name the path."""
  with bucket_errors(os.fspath(path)):
    yield file_system()


def check_bucket(path: str | os.PathLike) -> None:
  """Checks that objects can be written to a folder in a bucket and deleted from it.

  The function writes and deletes an object, because an account can have its permissions in many ways.

  Raises:
    InputError: the bucket does not exist or denies access.
    StorageError: the bucket can't be reached.
  """
  name = f"{os.fspath(path).rstrip('/')}/.probe"
  bucket = name.removeprefix(SCHEME).partition("/")[0]
  with starting(path):
    try:
      file_system().pipe_file(name, b"")
    except FileNotFoundError:
      raise InputError(f"{path}: there is no bucket {SCHEME}{bucket}; create it first, or give another one") from None
    with contextlib.suppress(FileNotFoundError):  # another program that is starting may have deleted the object
      file_system().rm_file(name)


def names(folder: epath.Path) -> list[str]:
  try:
    with _requests(folder) as bucket:
      found = bucket.ls(os.fspath(folder), detail=False)
  except FileNotFoundError:
    return []
  own = os.fspath(folder).removeprefix(SCHEME).rstrip("/")
  return sorted({name.rstrip("/").rpartition("/")[2] for name in found if name.rstrip("/") != own})


def exists(path: epath.Path) -> bool:
  with _requests(path) as bucket:
    return bucket.exists(os.fspath(path))


def read_bytes(path: epath.Path) -> bytes:
  with _requests(path) as bucket:
    return bucket.cat_file(os.fspath(path))


def atomic_write(path: epath.Path, content: bytes) -> None:
  with _requests(path) as bucket:
    bucket.pipe_file(os.fspath(path), content)


def make_new(folder: epath.Path) -> None:
  if names(folder):
    raise FileExistsError(folder)


def upload_folder(source: str | os.PathLike, target: epath.Path) -> None:
  """Writes the files of a folder on a disk to a folder in a bucket."""
  for path in sorted(path for path in pathlib.Path(source).rglob("*") if path.is_file()):
    name = target / path.relative_to(source).as_posix()
    with _requests(name) as bucket:
      bucket.put_file(os.fspath(path), os.fspath(name))


@contextlib.contextmanager
def local_folder(folder: epath.Path) -> Iterator[pathlib.Path]:
  with tempfile.TemporaryDirectory(prefix="cyb_jax.") as scratch:
    for name in _objects(folder):
      copy = pathlib.Path(scratch) / name
      copy.parent.mkdir(parents=True, exist_ok=True)
      copy.write_bytes(read_bytes(folder / name))
    yield pathlib.Path(scratch)


@contextlib.contextmanager
def new_folder(folder: epath.Path) -> Iterator[pathlib.Path]:
  with tempfile.TemporaryDirectory(prefix="cyb_jax.") as scratch:
    yield pathlib.Path(scratch)
    upload_folder(scratch, folder)


def remove_tree(folder: epath.Path, *, missing_ok: bool) -> None:
  del missing_ok  # a folder without objects does not exist
  remove_objects([folder / name for name in _objects(folder)])


def remove_objects(objects: list[epath.Path]) -> None:
  """Deletes objects; objects that do not exist are ignored."""

  def remove(path: epath.Path) -> None:
    with contextlib.suppress(FileNotFoundError), _requests(path) as bucket:
      bucket.rm_file(os.fspath(path))

  with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
    list(pool.map(remove, objects))


def move_tree(source: epath.Path, target: epath.Path, last: str) -> None:
  def move(name: str) -> None:
    with _requests(source) as bucket:
      bucket.cp_file(f"{source}/{name}", f"{target}/{name}")
      bucket.rm_file(f"{source}/{name}")

  found = list(_objects(source))
  with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
    list(pool.map(move, (name for name in found if name != last)))
  if last in found:
    move(last)


class BucketFiles:
  """The files in a folder of a bucket at the time when this object was created."""

  def __init__(self, folder: epath.Path):
    self._folder = folder
    self._objects = _objects(folder)

  def __iter__(self) -> Iterator[str]:
    return iter(sorted(self._objects))

  def size(self, name: str) -> int:
    if name not in self._objects:
      raise FileNotFoundError(name)
    return int(self._objects[name]["size"])

  def digest(self, name: str, kind: Literal["sha256", "md5"], *, flush: bool = False) -> str:
    del flush
    reported = self._objects[name].get("md5Hash")
    if kind == "md5" and reported:
      return base64.b64decode(reported).hex()
    with _requests(self._folder / name) as bucket, bucket.open(f"{self._folder}/{name}", "rb") as file:
      return hashlib.file_digest(file, kind).hexdigest()


def files(folder: epath.Path) -> BucketFiles:
  return BucketFiles(folder)


def _objects(folder: epath.Path) -> dict[str, dict[str, Any]]:
  """The bucket's description of each object in a folder, by the object's path in the folder."""
  prefix = os.fspath(folder).removeprefix(SCHEME).rstrip("/") + "/"
  with _requests(folder) as bucket:
    found = bucket.find(os.fspath(folder), detail=True)
  # The web console of Google Cloud creates an empty object for each folder.
  return {
    name.removeprefix(prefix): described
    for name, described in found.items()
    if name.startswith(prefix) and not name.endswith("/")
  }
