"""Detects damaged checkpoints by the checksums of their files, and moves them to a quarantine folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from absl import logging

from cyb_jax import jsonl, storage
from cyb_jax.errors import StorageError

# The list of a checkpoint's files: {name: [size in bytes, hexadecimal sha256, or 'md5:' and a hexadecimal MD5 digest]}.
CHECKSUMS = "checksums.json"
HASHING_THREADS = 8
# The name of the quarantine folder.
_DAMAGED = "damaged"


class _Damage(Exception):
  """A file is missing, truncated or altered; the message names it."""


class _Entry(NamedTuple):
  """A file's entry in CHECKSUMS."""

  size: int
  kind: storage.Digest
  digest: str


def damage(folder: storage.Place, *, quick: bool = False) -> str | None:
  """Compares a checkpoint with the checksums that were written with it.

  Args:
    folder: the folder of the checkpoint.
    quick: compare the sizes of all files, but not the checksums of the files of the state, which is large.

  Returns:
    None if no damage is found; otherwise a description of the first file that is missing, truncated or altered, such as
    'state/manifest.ocdbt is 12 bytes, not 282'.

  Raises:
    StorageError: the bucket failed, so the files could not be compared.
  """
  try:
    _check(folder, quick)
  except _Damage as found:
    return str(found)
  return None


def fingerprint(folder: storage.Place) -> str:
  """The identity of a checkpoint: the hexadecimal sha256 of the checksums of all its files."""
  return hashlib.sha256(storage.read_bytes(folder / CHECKSUMS)).hexdigest()


def quarantine(directory: storage.Place, damaged: Mapping[int, str], newest: int) -> None:
  """Moves damaged checkpoints to the folder `damaged`, and logs a warning for each.

  Args:
    directory: the folder of all checkpoints.
    damaged: descriptions of the damage, by step.
    newest: the step of the newest undamaged checkpoint.
  """
  for step, found in sorted(damaged.items(), reverse=True):
    place, count = directory / _DAMAGED / str(step), 1
    while storage.exists(place):
      place, count = place.with_name(f"{step}.{count}"), count + 1
    storage.move_tree(directory / str(step), place, last=CHECKSUMS)
    instead = f"; {newest} is used instead" if step > newest else ""
    logging.warning("checkpoint %d is damaged: %s; it was moved to %s%s", step, found, place, instead)


def _check(folder: storage.Place, quick: bool) -> None:
  listed = _read_checksums(folder)
  files = storage.files(folder)
  for name, entry in listed.items():
    _check_size(files, name, entry)
  chosen = [name for name in listed if not (quick and name.startswith("state/"))]
  with ThreadPoolExecutor(HASHING_THREADS) as pool:
    for _ in pool.map(lambda name: _check_digest(files, name, listed[name]), chosen):
      pass


def _read_checksums(folder: storage.Place) -> dict[str, _Entry]:
  try:
    listed = jsonl.loads(storage.read_bytes(folder / CHECKSUMS)).items()
    return {str(name): _Entry(int(size), *_kind(str(digest))) for name, (size, digest) in listed}
  except FileNotFoundError:
    raise _Damage(f"{CHECKSUMS} is missing") from None
  except StorageError:
    raise
  except OSError as error:
    raise _Damage(f"{CHECKSUMS} can't be read ({error.strerror})") from None
  except (ValueError, TypeError, AttributeError):
    raise _Damage(f"{CHECKSUMS} was altered") from None


def _check_size(files: storage.Files, name: str, entry: _Entry) -> None:
  try:
    size = files.size(name)
  except FileNotFoundError:
    raise _Damage(f"{name} is missing") from None
  except OSError as error:
    raise _Damage(f"{name}: {error.strerror}") from None
  if size != entry.size:
    raise _Damage(f"{name} is {size} bytes, not {entry.size}")


def _check_digest(files: storage.Files, name: str, entry: _Entry) -> None:
  try:
    digest = files.digest(name, entry.kind)
  except StorageError:
    raise
  except OSError as error:
    raise _Damage(f"{name} can't be read ({error.strerror})") from None
  if digest != entry.digest:
    raise _Damage(f"{name} was altered")


def _kind(digest: str) -> tuple[storage.Digest, str]:
  """The kind and the digits of a digest in CHECKSUMS: 'md5:...' if a bucket has reported it, otherwise a sha256."""
  return ("md5", digest.removeprefix("md5:")) if digest.startswith("md5:") else ("sha256", digest)
