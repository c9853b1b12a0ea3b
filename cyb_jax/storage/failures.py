"""Errors of disks and buckets become this package's errors, each a single line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from cyb_jax.errors import InputError, StorageError, bucket_cause, bucket_passes, storage_cause
from cyb_jax.storage.paths import in_bucket


@contextlib.contextmanager
def starting(path: str | os.PathLike) -> Iterator[None]:
  """For the start of a program: a bucket's refusal inside becomes an error about `path`.

  FileNotFoundError passes through.

  Raises:
    InputError: the bucket refuses, for a reason that lasts.
    StorageError: the bucket fails, for a reason that may be over by the next start.
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
  """Errors of a bucket inside become a StorageError about `what`; FileNotFoundError passes through."""
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
  """Errors of a disk or a bucket inside become a StorageError in one line; FileNotFoundError passes through.

  Only the access itself may be inside, because clients of buckets raise errors of many kinds.

  Args:
    path: of the file.
    verb: what is done with it: 'read' or 'written'.

  Raises:
    InputError: the client for buckets is not installed.
    StorageError: the disk or the bucket fails.
  """
  try:
    yield
  except FileNotFoundError:
    raise
  except ImportError as error:
    raise InputError(
      f"{os.fspath(path)}: the package gcsfs is not installed ({error}); pip install 'cyb_jax[gcs]'"
    ) from error
  except Exception as error:
    if not isinstance(error, OSError) and not in_bucket(path):
      raise
    reason = storage_cause(error) if isinstance(error, OSError) and error.errno else bucket_cause(error)
    reason = reason or " ".join(str(error).split())[:200] or type(error).__name__
    raise StorageError(
      f"{os.fspath(path)} can't be {verb}: {reason}; what is whole is kept, and the same command continues"
    ) from error
