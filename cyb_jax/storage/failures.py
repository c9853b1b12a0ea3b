"""Converts errors of disks and buckets to errors of this package, whose messages are single lines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from cyb_jax.errors import InputError, StorageError, bucket_cause, bucket_passes, storage_cause
from cyb_jax.storage.paths import in_bucket


@contextlib.contextmanager
def starting(path: str | os.PathLike) -> Iterator[None]:
  """Converts errors of a bucket inside the `with` block, at the start of a program, to an error about `path`.

  FileNotFoundError is not converted.

  Raises:
    InputError: the bucket denies access, or has another permanent error.
    StorageError: the bucket has an error that may be temporary.
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
def bucket_errors(what: str) -> Iterator[None]:
  """Converts a bucket's errors inside the `with` block to a StorageError about `what`, except FileNotFoundError."""
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
def access(path: str | os.PathLike, verb: str) -> Iterator[None]:
  """Converts errors of a disk or a bucket inside the `with` block to a StorageError, except FileNotFoundError.

  The block should contain only the access itself, because clients of buckets raise errors of many types.

  Args:
    path: the path of the file.
    verb: 'read' or 'written', for the error message.

  Raises:
    InputError: the client for buckets is not installed.
    StorageError: the disk or the bucket failed.
  """
  try:
    yield
  except FileNotFoundError:
    raise
  except ImportError as error:
    raise InputError(
      f"{os.fspath(path)}: the package gcsfs is not installed ({error}); run pip install 'cyb_jax[gcs]'"
    ) from error
  except Exception as error:
    if not isinstance(error, OSError) and not in_bucket(path):
      raise
    reason = storage_cause(error) if isinstance(error, OSError) and error.errno else bucket_cause(error)
    reason = reason or " ".join(str(error).split())[:200] or type(error).__name__
    raise StorageError(
      f"{os.fspath(path)} can't be {verb}: {reason}; finished files are kept, and the same command continues"
    ) from error
