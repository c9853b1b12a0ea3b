"""Checkpoints in a bucket, where folders can't be renamed and nothing can be locked.

    DIRECTORY/12/               a checkpoint: orbax's folders, and checksums.json
    DIRECTORY/owner.json        the run that has started last, and alone may write here
    DIRECTORY/damaged/          the quarantine of checkpoints that a run has found damaged when it was continued

A checkpoint is saved under its own name, and is one from the moment that checksums.json appears. That file is written
last and deleted first; any other folder with a step's name is what a killed run has left of a save or a deletion. The
checksums are those that the bucket reports of the objects that it has received, so that nothing is read to find damage.

A run that was started before the last one finds another owner at its next save, and ends.
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
# By default TensorStore would try for a quarter of an hour, where gcsfs gives up after half a minute.
RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "32s"}


class BucketBackend:
  """Implements `Backend` in a bucket.

  Args:
    directory: of the checkpoints.
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
    # An earlier run that has lost its claim may have left checksums.json and nothing else.
    return step in self.steps() and not integrity.damage(self._directory / str(step), quick=True)

  def prepare(self, step: int) -> None:
    # An earlier run that has lost its claim, and has not noticed yet, may have written there.
    storage.remove_tree(self.written_to(step))

  def written_to(self, step: int) -> epath.Path:
    return self._directory / str(step)

  def commit(self, step: int) -> None:
    folder = self.written_to(step)
    files = storage.files(folder)
    listed = {name: (files.size(name), f"md5:{files.digest(name, 'md5')}") for name in files}
    # Not earlier: a run that claims the folder deletes unfinished saves, and the list is of the files before that.
    self._check_claim()
    storage.atomic_write(folder / CHECKSUMS, json.dumps(listed, indent=1))

  def delete(self, step: int) -> None:
    folder = self._directory / str(step)
    storage.remove_objects([folder / CHECKSUMS])
    storage.remove_tree(folder)

  def discard(self) -> None:
    """Nothing: a bucket isn't full, and one that has just failed isn't asked again."""

  def surviving(self, known: Iterable[int]) -> list[int]:
    return sorted(known)

  def close(self, *, failed: bool) -> None:
    """Nothing: the next start deletes what is unfinished."""

  def _check_claim(self) -> None:
    try:
      owner = json.loads(storage.read_bytes(self._directory / _OWNER))["owner"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
      owner = "nobody"
    if owner != self._owner:
      raise StorageError(
        f"{self._directory}: another run has taken over here ({owner}), and goes on from the newest checkpoint; this"
        " one ends"
      )
