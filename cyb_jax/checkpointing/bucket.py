"""Checkpoints in a bucket, which supports neither renames of folders nor locks.

    DIRECTORY/12/               a checkpoint: orbax's folders, and checksums.json
    DIRECTORY/owner.json        the run that was started last; only this run may write
    DIRECTORY/damaged/          the quarantine: checkpoints that were found damaged when a run was continued

A checkpoint is saved under its final name and is finished when checksums.json appears. That file is written last and
deleted first; a folder with a step's name but without checksums.json is the remains of a save or a deletion of a killed
run. The bucket reports the checksums of the objects that it has received, so files need not be read to find damage.

If another run was started later, a run finds another owner at its next save, and ends.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterable

from etils import epath

from cyb_jax import storage
from cyb_jax.checkpointing import integrity
from cyb_jax.checkpointing.integrity import CHECKSUMS
from cyb_jax.errors import StorageError

_OWNER = "owner.json"
# By default TensorStore would retry for a quarter of an hour, whereas gcsfs gives up after half a minute.
RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "32s"}


class BucketBackend:
  """Implements `Backend` in a bucket.

  Args:
    directory: the folder of the checkpoints.
  """

  def __init__(self, directory: epath.Path):
    self._directory = directory
    self._owner: str | None = None
    self.retries = RETRIES

  def steps(self) -> list[int]:
    steps = sorted(int(name) for name in storage.names(self._directory) if name.isdecimal())
    return [step for step in steps if storage.exists(self._directory / str(step) / CHECKSUMS)]

  def claim(self) -> None:
    self._owner = f"{socket.gethostname()}, process {os.getpid()}, {uuid.uuid4().hex[:8]}"
    record = {"owner": self._owner, "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    storage.atomic_write(self._directory / _OWNER, json.dumps(record) + "\n")

  def tidy(self) -> None:
    finished = self.steps()
    for name in storage.names(self._directory):
      if name.isdecimal() and int(name) not in finished:
        storage.remove_tree(self._directory / name)

  def is_saved(self, step: int) -> bool:
    # An earlier run that has lost its claim may have left only checksums.json.
    return step in self.steps() and not integrity.damage(self._directory / str(step), quick=True)

  def prepare(self, step: int) -> None:
    # An earlier run that has lost its claim without having noticed it yet may have written there.
    storage.remove_tree(self.written_to(step))

  def written_to(self, step: int) -> epath.Path:
    return self._directory / str(step)

  def commit(self, step: int) -> None:
    folder = self.written_to(step)
    files = storage.files(folder)
    listed = {name: (files.size(name), f"md5:{files.digest(name, 'md5')}") for name in files}
    # The claim is checked after the files are listed: a run that claims the folder deletes unfinished saves, so the
    # list of a run that still has the claim is complete.
    self._check_claim()
    storage.atomic_write(folder / CHECKSUMS, json.dumps(listed, indent=1))

  def delete(self, step: int) -> None:
    folder = self._directory / str(step)
    storage.remove_objects([folder / CHECKSUMS])
    storage.remove_tree(folder)

  def discard(self) -> None:
    """Does nothing: a bucket doesn't become full, and a bucket that has just failed isn't queried again."""

  def surviving(self, known: Iterable[int]) -> list[int]:
    return sorted(known)

  def close(self, *, failed: bool) -> None:
    """Does nothing: the next start deletes unfinished saves."""

  def _check_claim(self) -> None:
    try:
      owner = json.loads(storage.read_bytes(self._directory / _OWNER))["owner"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
      owner = "nobody"
    if owner != self._owner:
      raise StorageError(
        f"{self._directory}: another run has taken over this folder ({owner}) and continues from the newest checkpoint;"
        " this run ends"
      )
