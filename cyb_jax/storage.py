"""Where a run may lie: a folder on a disk, or `gs://bucket/folder`; and what differs between the two.

A bucket of Google Cloud Storage has neither folders nor renames nor locks. What it has: an object appears whole or not
at all, what was written is seen by all at once, and it says the size and the MD5 of what it has received. It is reached
through gcsfs (`pip install 'cyb_jax[gcs]'`), never through TensorFlow; requests that fail for a moment are tried again
for about half a minute. What fails after that is a StorageError that says what the bucket did.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeAlias

from etils import epath

from cyb_jax.errors import InputError, StorageError, bucket_cause, bucket_passes

# Read when epath and gcsfs are used first. Else epath would import TensorFlow wherever it is installed, and gcsfs would
# ask for each bucket's layout first, over another protocol and with another permission.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

Place: TypeAlias = pathlib.Path | epath.Path
Digest: TypeAlias = Literal["sha256", "md5"]

_SCHEME = "gs://"
_REQUESTS_AT_ONCE = 16


def in_bucket(path: str | os.PathLike) -> bool:
  """Whether a path names something in a bucket."""
  return os.fspath(path).startswith(_SCHEME)


def place(path: str | os.PathLike) -> Place:
  """The path of a file or folder, absolute.

  Raises:
    InputError: it is in a store that isn't known, or in a bucket that nothing is installed for.
  """
  name = os.fspath(path)
  if not in_bucket(name):
    if "://" in name:
      raise InputError(f"{name}: neither a folder on a disk nor gs://bucket/folder")
    return pathlib.Path(path).absolute()
  if not name.removeprefix(_SCHEME).strip("/"):
    raise InputError(f"{name}: no bucket is named; write gs://bucket/folder")
  _bucket()
  return epath.Path(name)


@functools.cache
def _bucket() -> Any:
  """gcsfs's file system."""
  try:
    import fsspec
    import gcsfs  # noqa: F401
  except ImportError:
    raise InputError("gs://: the package gcsfs is not installed; pip install 'cyb_jax[gcs]'") from None
  # What it logs of a request that fails, a traceback, is raised too.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  # Else what other machines write would never be seen.
  fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
  return fsspec.filesystem("gcs")


@contextlib.contextmanager
def starting(path: str | os.PathLike) -> Iterator[None]:
  """Before a run is under way, what a bucket refuses inside becomes an InputError about `path`; not what isn't there.

  What may be over by the next start becomes a StorageError.
  """
  try:
    yield
  except FileNotFoundError:
    raise
  except Exception as error:
    cause = bucket_cause(error) if in_bucket(path) else None
    if cause is None:
      raise
    if bucket_passes(error):
      raise StorageError(f"{path}: {cause}", cause=cause) from error
    raise InputError(f"{path}: {cause}") from error


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
  """Errors of a bucket inside become a StorageError about `what`; that something isn't there goes through."""
  try:
    yield
  except FileNotFoundError:
    raise
  except Exception as error:
    cause = bucket_cause(error)
    if cause is None:
      raise
    raise StorageError(f"{what}: {cause}", cause=cause) from error


@contextlib.contextmanager
def _asking(path: str | os.PathLike) -> Iterator[Any]:
  """The file system, for something about a path in a bucket."""
  with told(os.fspath(path)):
    yield _bucket()


def check_bucket(path: str | os.PathLike) -> None:
  """Whether objects can be written to a folder in a bucket, and deleted there; tried rather than asked, since rights
  come in many ways. Nothing of it stays.

  Raises:
    InputError: the bucket isn't there, or refuses, or can't be reached.
  """
  name = f"{os.fspath(path).rstrip('/')}/.probe"
  bucket = name.removeprefix(_SCHEME).partition("/")[0]
  with starting(path):
    try:
      _bucket().pipe_file(name, b"")
    except FileNotFoundError:
      raise InputError(f"{path}: there is no bucket {_SCHEME}{bucket}; make it first, or name another one") from None
    with contextlib.suppress(FileNotFoundError):  # of another start
      _bucket().rm_file(name)


def names(folder: Place) -> list[str]:
  """What lies in a folder, files and folders; nothing where it isn't there.

  Not `is_dir` and the like of epath: to them a bucket that refuses is an empty one.
  """
  if not in_bucket(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
  try:
    with _asking(folder) as bucket:
      found = bucket.ls(os.fspath(folder), detail=False)
  except FileNotFoundError:
    return []
  own = os.fspath(folder).removeprefix(_SCHEME).rstrip("/")
  return sorted({name.rstrip("/").rpartition("/")[2] for name in found if name.rstrip("/") != own})


def exists(path: Place) -> bool:
  """Whether a file is there."""
  if not in_bucket(path):
    return path.exists()
  with _asking(path) as bucket:
    return bucket.exists(os.fspath(path))


def read_bytes(path: Place) -> bytes:
  """All of a file; FileNotFoundError where there is none."""
  if not in_bucket(path):
    return path.read_bytes()
  with _asking(path) as bucket:
    return bucket.cat_file(os.fspath(path))


def atomic_write(path: Place, content: str | bytes) -> None:
  """Replaces a file, whole or not at all, whatever dies and whoever else does the same."""
  content = content.encode() if isinstance(content, str) else content
  if in_bucket(path):
    with _asking(path) as bucket:
      bucket.pipe_file(os.fspath(path), content)
    return
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


def make_new(folder: Place) -> None:
  """Makes a folder; FileExistsError where there is one. In a bucket it appears with its first file."""
  if not in_bucket(folder):
    folder.mkdir()
  elif names(folder):
    raise FileExistsError(folder)


def upload_folder(source: str | os.PathLike, target: Place) -> None:
  """Writes the files of a folder on a disk into one in a bucket."""
  for path in sorted(path for path in pathlib.Path(source).rglob("*") if path.is_file()):
    name = target / path.relative_to(source).as_posix()
    with _asking(name) as bucket:
      bucket.put_file(os.fspath(path), os.fspath(name))


@contextlib.contextmanager
def local_folder(folder: Place) -> Iterator[pathlib.Path]:
  """A folder on a disk with the files of one: itself, or a copy of what lies in the bucket, for the block."""
  if not in_bucket(folder):
    yield folder
    return
  with tempfile.TemporaryDirectory(prefix="cyb_jax.") as scratch:
    for name in _objects(folder):
      copy = pathlib.Path(scratch) / name
      copy.parent.mkdir(parents=True, exist_ok=True)
      copy.write_bytes(read_bytes(folder / name))
    yield pathlib.Path(scratch)


@contextlib.contextmanager
def new_folder(folder: Place) -> Iterator[pathlib.Path]:
  """A folder on a disk to write files into: itself, made where it isn't there; or one whose files go to the bucket at
  the end of the block.
  """
  if not in_bucket(folder):
    folder.mkdir(exist_ok=True)
    yield folder
    return
  with tempfile.TemporaryDirectory(prefix="cyb_jax.") as scratch:
    yield pathlib.Path(scratch)
    upload_folder(scratch, folder)


def remove_tree(folder: Place, *, missing_ok: bool = True) -> None:
  """Deletes a folder and all in it."""
  if not in_bucket(folder):
    shutil.rmtree(folder, ignore_errors=missing_ok)
    return
  remove([folder / name for name in _objects(folder)])


def remove(objects: list[Place]) -> None:
  """Deletes objects of a bucket; those that have gone are none's loss."""

  def one(path: Place) -> None:
    with contextlib.suppress(FileNotFoundError), _asking(path) as bucket:
      bucket.rm_file(os.fspath(path))

  with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
    list(pool.map(one, objects))


def move_tree(source: Place, target: Place, last: str) -> None:
  """Renames a folder. In a bucket object by object, the one called `last` at the end: what is killed half-way can be
  told, and nothing is lost.
  """
  if not in_bucket(source):
    target.parent.mkdir(exist_ok=True)
    source.rename(target)
    return

  def one(name: str) -> None:
    with _asking(source) as bucket:
      bucket.cp_file(f"{source}/{name}", f"{target}/{name}")
      bucket.rm_file(f"{source}/{name}")

  found = list(_objects(source))
  with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
    list(pool.map(one, (name for name in found if name != last)))
  if last in found:
    one(last)


class Files:
  """The files in a folder, by their path in it: sizes and checksums. In a bucket they are those of the moment at which
  this was made.
  """

  def __init__(self, folder: Place):
    self._folder = folder
    self._objects = _objects(folder) if in_bucket(folder) else None

  def __iter__(self) -> Iterator[str]:
    if self._objects is not None:
      return iter(sorted(self._objects))
    return iter(str(path.relative_to(self._folder)) for path in sorted(self._folder.rglob("*")) if path.is_file())

  def size(self, name: str) -> int:
    """In bytes; FileNotFoundError where there is none."""
    if self._objects is None:
      return (self._folder / name).stat().st_size
    if name not in self._objects:
      raise FileNotFoundError(name)
    return int(self._objects[name]["size"])

  def digest(self, name: str, kind: Digest, *, flush: bool = False) -> str:
    """Hexadecimal. Objects say their MD5 themselves; whatever else is asked for, all of the file is read.

    Args:
      name: of the file.
      kind: of the digest.
      flush: whether the file, on a disk, is to reach it.
    """
    if self._objects is None:
      with (self._folder / name).open("rb") as file:
        if flush:
          os.fsync(file.fileno())
        return hashlib.file_digest(file, kind).hexdigest()
    said = self._objects[name].get("md5Hash")
    if kind == "md5" and said:
      return base64.b64decode(said).hex()
    with _asking(self._folder / name) as bucket, bucket.open(f"{self._folder}/{name}", "rb") as file:
      return hashlib.file_digest(file, kind).hexdigest()


def _objects(folder: Place) -> dict[str, dict[str, Any]]:
  """What the bucket says of each object in a folder, by its path in it."""
  prefix = os.fspath(folder).removeprefix(_SCHEME).rstrip("/") + "/"
  with _asking(folder) as bucket:
    found = bucket.find(os.fspath(folder), detail=True)
  # A console makes an empty object for a folder.
  return {
    name.removeprefix(prefix): said
    for name, said in found.items()
    if name.startswith(prefix) and not name.endswith("/")
  }
