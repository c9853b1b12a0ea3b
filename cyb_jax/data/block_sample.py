"""Digests of a sample of a large store's blocks, so that damage is noticed when the store is opened.

Hashing every byte of hundreds of gigabytes takes an hour, and a few dozen megabytes are read in a second. The blocks of
a file are evenly spaced and include its first and last bytes, so they find a file that was overwritten, cut and
extended, or partly never written. `cyb-prepare --verify` checks every byte.

The digests are in sample.json of the store, which its fingerprint does not cover: a store of an earlier version has no
such file, and equals the store that this version prepares.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

from etils import epath

from cyb_jax.errors import InputError
from cyb_jax.storage import streams
from cyb_jax.storage.paths import unchecked_place

NAME = "sample.json"
_BLOCK_BYTES = 1 << 16
_BLOCKS = 1024  # of a whole store, 64 MiB


def record(folder: epath.Path, sizes: Mapping[str, int], fingerprint: str) -> None:
  """Writes the sample of a complete store.

  Args:
    folder: the store's folder, on a disk or in a bucket.
    sizes: the size in bytes of each file, by name.
    fingerprint: the fingerprint of the store.

  Raises:
    StorageError: the disk or the bucket failed.
  """
  total = sum(sizes.values())
  files = {}
  for name, size in sizes.items():
    blocks = max(2, _BLOCKS * size // total)
    files[name] = {"blocks": blocks, "sha256": _digest(folder / name, size, blocks, _BLOCK_BYTES)}
  streams.write_json(folder / NAME, {"fingerprint": fingerprint, "block_bytes": _BLOCK_BYTES, "files": files})


def check(folder: os.PathLike, sizes: Mapping[str, int], fingerprint: str) -> bool:
  """Checks the sample of a store; the arguments are those of `record`.

  Returns:
    Whether the store has a sample.

  Raises:
    InputError: a block or the sample was altered.
    StorageError: the disk failed.
  """
  path = unchecked_place(folder) / NAME
  if streams.size_of(path) is None:
    return False
  sample = streams.read_json(path)
  try:
    block_bytes, found = int(sample["block_bytes"]), sample["fingerprint"]
    expected = {name: (int(sample["files"][name]["blocks"]), sample["files"][name]["sha256"]) for name in sizes}
  except (TypeError, KeyError, ValueError):
    found = None
  if found != fingerprint:
    raise InputError(f"data.store: {path} was altered; delete it, and run cyb-prepare --verify={os.fspath(folder)}")
  for name, size in sizes.items():
    blocks, sha256 = expected[name]
    if _digest(path.parent / name, size, blocks, block_bytes) != sha256:
      raise InputError(f"data.store: {path.parent / name} was altered; prepare the store again")
  return True


def _digest(path: epath.Path, size: int, blocks: int, block_bytes: int) -> str:
  """The hexadecimal sha256 of a file's sampled blocks, in order."""
  digest = hashlib.sha256()
  for begin in offsets(size, blocks, block_bytes):
    digest.update(streams.read(path, begin, begin + block_bytes))
  return digest.hexdigest()


def offsets(size: int, blocks: int, block_bytes: int) -> list[int]:
  """The offsets in bytes of a file's sampled blocks: evenly spaced, the last one at the end; of a small file, all."""
  if size <= blocks * block_bytes:
    return list(range(0, size, block_bytes))
  last = size - block_bytes
  return [last * number // (blocks - 1) for number in range(blocks)]
