"""Checkpoints on a disk, which supports atomic renames of folders.

    DIRECTORY/12/               a checkpoint: orbax's folders, and checksums.json
    DIRECTORY/unfinished/       saves and deletions in progress; the next start deletes the remains of a killed run
    DIRECTORY/damaged/          the quarantine: checkpoints that were found damaged when a run was continued

A checkpoint is renamed to its step only when it is complete, and renamed again before it is deleted. All of its files
are flushed to the disk before the first rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from cyb_jax import storage
from cyb_jax.checkpointing.integrity import CHECKSUMS, HASHING_THREADS
from cyb_jax.storage.disk import flush_folder


class DiskBackend:
  """Implements `Backend` on a disk.

  Args:
    directory: the folder of the checkpoints; the first save creates it.
  """

  retries = None

  def __init__(self, directory: pathlib.Path):
    self._directory = directory
    self._unfinished = directory / "unfinished"

  def steps(self) -> list[int]:
    return sorted(int(name) for name in storage.names(self._directory) if name.isdecimal())

  def claim(self) -> None:
    """Does nothing: a run locks its work directory."""

  def tidy(self) -> None:
    shutil.rmtree(self._unfinished, ignore_errors=True)

  def is_saved(self, step: int) -> bool:
    return step in self.steps()

  def prepare(self, step: int) -> None:
    del step
    self._unfinished.mkdir(parents=True, exist_ok=True)

  def written_to(self, step: int) -> pathlib.Path:
    return self._unfinished / str(step)

  def commit(self, step: int) -> None:
    folder = self.written_to(step)
    files = storage.files(folder)
    names = list(files)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
      hashes = pool.map(lambda name: files.digest(name, "sha256", flush=True), names)
      listed = {name: (files.size(name), sha256) for name, sha256 in zip(names, hashes)}
    with (folder / CHECKSUMS).open("w") as file:
      json.dump(listed, file, indent=1)
      file.flush()
      os.fsync(file.fileno())
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
      flush_folder(path)
    folder.rename(self._directory / str(step))
    flush_folder(self._directory)

  def delete(self, step: int) -> None:
    doomed = self._unfinished / f"{step}.deleted"
    (self._directory / str(step)).rename(doomed)
    shutil.rmtree(doomed)

  def discard(self) -> None:
    shutil.rmtree(self._unfinished, ignore_errors=True)

  def surviving(self, known: Iterable[int]) -> list[int]:
    del known
    return self.steps()

  def close(self, *, failed: bool) -> None:
    if failed:  # orbax may have continued to write its files after the failure
      self.discard()
    with contextlib.suppress(OSError):
      self._unfinished.rmdir()
