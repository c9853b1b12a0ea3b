"""The checkpoints of a run: saving in the background, selection, and restoring.

A checkpoint contains the train state, a small JSON object (`meta`), the validation loss at its step if there was a
validation, and the checksums of its files. It has its step's name only while it is complete, so the remains of an
interrupted save or deletion are never taken for a checkpoint; see `disk` and `bucket`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax
from absl import logging
from jaxtyping import PyTree

from cyb_jax import jsonl, storage
from cyb_jax.checkpointing import integrity
from cyb_jax.checkpointing.backend import Backend
from cyb_jax.checkpointing.bucket import BucketBackend
from cyb_jax.checkpointing.disk import DiskBackend
from cyb_jax.checkpointing.selection import Inspection, lowest
from cyb_jax.checkpointing.serialization import Reader, Writer
from cyb_jax.distributed.cluster import ALONE, Cluster
from cyb_jax.errors import InputError, StorageError, shown, storage_cause


@dataclasses.dataclass(frozen=True)
class Restored:
  """The contents of a checkpoint."""

  step: int
  state: PyTree
  meta: dict[str, Any]


class Checkpoints:
  """The checkpoints in a folder; saves run in the background, one at a time.

  Only one object that isn't `read_only` may use a folder at a time (a run locks its folder). It first checks the
  existing checkpoints: damaged ones are moved to the quarantine with a warning, so the run continues from the newest
  undamaged one.

  Args:
    directory: a folder on a disk, which the first save creates; or gs://bucket/folder.
    keep: number of newest checkpoints that are kept, in addition to the checkpoint with the lowest validation loss.
    read_only: nothing is written or deleted; for evaluation, possibly while a training run writes to the folder.
    cluster: the hosts that write together to this folder; only host 0 commits saves and deletes remains.

  Raises:
    InputError: there are checkpoints, and all of them are damaged; nothing was changed.
    StorageError: the bucket failed, or another run has claimed it.
  """

  def __init__(self, directory: str | os.PathLike, *, keep: int = 1, read_only: bool = False, cluster: Cluster = ALONE):
    self.directory = storage.place(directory)
    in_bucket = storage.in_bucket(self.directory)
    self._backend: Backend = BucketBackend(self.directory) if in_bucket else DiskBackend(self.directory)
    self._reader = Reader(self._backend.retries)
    self._keep, self._read_only = keep, read_only
    self._saving: tuple[int, Future[None]] | None = None
    self._failed = False  # whether the caller has received an error, which orbax may raise again
    if read_only:
      return
    # The main thread and the background thread need separate channels.
    self._hosts, self._commit_hosts = cluster.channel("checkpoints"), cluster.channel("checkpoints/commit")
    if self._hosts.index == 0:
      self._backend.claim()
      self._quarantine_damaged()
      self._backend.tidy()
    self._hosts.barrier()
    self._losses = {step: self._loss(step) for step in self.steps()}
    self._writer = Writer(self._backend.retries)
    self._background = ThreadPoolExecutor(1, thread_name_prefix="cyb-checkpoint")

  def steps(self) -> list[int]:
    """The steps of the finished checkpoints, including damaged ones, ascending."""
    return self._backend.steps()

  def damage(self, step: int, *, quick: bool = False) -> str | None:
    """The damage of the checkpoint of one of `steps()`, or None; see `integrity.damage`."""
    return integrity.damage(self._folder(step), quick=quick)

  def fingerprint(self, step: int) -> str:
    """The identity of a checkpoint, a hexadecimal sha256."""
    return integrity.fingerprint(self._folder(step))

  def find(self, which: int | Literal["last", "best"], *, quick: bool = False) -> int:
    """The step of an undamaged checkpoint.

    Args:
      which: a step; or 'last', the newest undamaged checkpoint, with a warning if a newer one is damaged; or 'best',
        the checkpoint with the lowest validation loss.
      quick: see `integrity.damage`; damaged checkpoints cause no warning.

    Raises:
      InputError: there is no checkpoint, or the requested checkpoint does not exist or is damaged.
    """
    while True:
      steps = self.steps()
      if not steps:
        raise InputError(
          f"checkpoints: {self.directory} contains no finished checkpoint; give the work directory of a run that has"
          " saved one"
        )
      inspection = self._inspect(steps)
      # A training run may delete a checkpoint of this folder during the inspection; then there are newer checkpoints.
      try:
        chosen = inspection.choose(which, quick=quick)
      except FileNotFoundError:
        if set(steps) <= set(self.steps()):
          raise
        continue
      damaged = inspection.damaged
      if damaged.keys() <= set(self.steps()):
        break
    if chosen is None:
      raise inspection.all_damaged()
    if chosen in damaged:
      raise InputError(f"checkpoint: {chosen} in {self.directory} is damaged: {damaged[chosen]}; give another step")
    if not quick:
      for step in sorted(damaged, reverse=True):
        logging.warning(
          "checkpoint %d in %s is damaged: %s; %d is used instead", step, self.directory, damaged[step], chosen
        )
    return chosen

  def save(self, step: int, state: PyTree, meta: dict[str, Any], *, loss: float | None = None) -> None:
    """Starts a save; returns when the state has been copied and may be donated.

    Raises:
      StorageError: the disk or the bucket failed during this save or the previous save.
      Exception: any other error of the previous save.
    """
    self.wait()
    if self._hosts.broadcast(self._hosts.index == 0 and self._backend.is_saved(step)):
      return
    # A loss that isn't finite is ignored, because comparisons with nan would select it as the lowest.
    loss = loss if loss is not None and math.isfinite(loss) else None
    with self._errors_of_save(step):
      if self._hosts.index == 0:
        self._backend.prepare(step)
      self._hosts.barrier()
      self._writer.start(self._backend.written_to(step), state, meta, loss)
    self._saving = step, self._background.submit(self._finish, step, loss)

  def wait(self) -> None:
    """Returns when the last save is complete; raises its error if it failed, as `save` does."""
    if self._saving is None:
      return
    (step, done), self._saving = self._saving, None
    with self._errors_of_save(step):
      done.result()

  def check(self) -> None:
    """Raises the error of the last save if it has already failed; doesn't wait."""
    if self._saving is not None and self._saving[1].done():
      self.wait()

  def restore(self, step: int, abstract: PyTree) -> Restored:
    """Restores the checkpoint of a step with the shardings of `abstract`.

    Args:
      step: one of `steps()` whose checkpoint is known to be undamaged; it isn't checked again.
      abstract: a tree of ShapeDtypeStruct with shardings.

    Raises:
      InputError: the checkpoint and `abstract` have different arrays, shapes or dtypes.
    """
    # The check is needed, because orbax would silently cast to another dtype and read a part of a larger array.
    saved, wanted = _arrays(self._shapes(step)), _arrays(abstract)
    if saved != wanted:
      name = min(k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k))
      raise InputError(
        f"checkpoint {step} in {self.directory}: {name} is {saved.get(name, 'missing')}, but this config has"
        f" {wanted.get(name, 'no such array')}"
      )
    with self._reading_arrays(step):
      state, meta = self._reader.read(self._folder(step), abstract)
    logging.info("restored step %d from %s", step, self.directory)
    return Restored(step, state, meta)

  def read(self, step: int) -> Restored:
    """The checkpoint of a step with all of its arrays, as numpy arrays in nested dicts."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), self._shapes(step))
    restored = self.restore(step, abstract)
    return dataclasses.replace(restored, state=jax.device_get(restored.state))

  def restore_params(self, step: int, abstract: PyTree) -> PyTree:
    """Restores the parameters without reading the optimizer state.

    Args:
      step: one of `steps()` whose checkpoint is known to be undamaged; it isn't checked again.
      abstract: the parameters, as a tree of ShapeDtypeStruct with shardings.
    """
    with self._reading_arrays(step):
      return self._reader.read_params(self._folder(step), abstract)

  def meta(self, step: int) -> dict[str, Any]:
    """The JSON object of a checkpoint."""
    return self._json(step, "meta")

  def close(self) -> None:
    """Ends the background thread; raises the error of the last save if it has not been raised yet."""
    if self._read_only:
      return
    try:
      self.wait()
    finally:
      self._background.shutdown()
      with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
        self._writer.close()
      if self._hosts.index == 0:
        self._backend.close(failed=self._failed)

  def _folder(self, step: int) -> storage.Place:
    return self.directory / str(step)

  def _inspect(self, steps: list[int]) -> Inspection:
    return Inspection(self.directory, steps, self.damage, self._loss)

  def _quarantine_damaged(self) -> None:
    """Moves damaged checkpoints to the quarantine, so their steps can be saved again and none can become the best."""
    steps = self.steps()
    if not steps:
      return
    inspection = self._inspect(steps)
    newest = inspection.newest(quick=False)
    if newest is None:
      raise inspection.all_damaged()
    inspection.check_all(newest)
    integrity.quarantine(self.directory, inspection.damaged, newest)

  def _finish(self, step: int, loss: float | None) -> None:
    """Runs in the background: when all hosts have written their parts, host 0 commits and deletes old checkpoints."""
    self._writer.wait()
    if self._commit_hosts.index == 0:
      self._backend.commit(step)
      self._losses[step] = loss
      self._delete_old()
    self._commit_hosts.barrier()
    self._losses[step] = loss  # on the other hosts

  def _delete_old(self) -> None:
    steps = self.steps()
    kept = {*steps[-self._keep :], lowest({s: self._losses[s] for s in steps})}
    for old in set(steps) - kept:
      self._backend.delete(old)

  @contextlib.contextmanager
  def _errors_of_save(self, step: int) -> Iterator[None]:
    """Converts errors of the disk or the bucket inside the `with` block to a StorageError about the save of a step."""
    try:
      yield
    except Exception as error:
      self._failed = True
      cause = storage_cause(error)
      if cause is None:
        raise
      if self._hosts.index == 0:
        self._backend.discard()
      steps = self._backend.surviving(self._losses)
      before = (
        f"the same command continues from the checkpoint of step {steps[-1]}"
        if steps
        else "there is no earlier checkpoint, so the same command starts again"
      )
      raise StorageError(f"checkpoint {step} can't be saved in {self.directory}: {cause}; {before}") from error

  def _loss(self, step: int) -> float | None:
    """The validation loss of a checkpoint, or None."""
    if not storage.names(self._folder(step) / "validation"):
      return None
    loss = self._json(step, "validation").get("loss")
    if not isinstance(loss, int | float) or not math.isfinite(loss):
      raise InputError(
        f"checkpoint {step} in {self.directory}: validation/metadata has the loss {shown(loss)}, not a finite number;"
        " restore the checkpoint from a copy"
      )
    return loss

  def _json(self, step: int, item: str) -> dict[str, Any]:
    # Orbax is not used here, because it synchronizes the hosts at every read, and host 0 inspects checkpoints alone.
    with self._reading(step):
      content = storage.read_bytes(self._folder(step) / item / "metadata")
    try:
      value = jsonl.loads(content)
    except ValueError as error:
      raise self._unreadable(step, f"{item}/metadata: {error}") from error
    if not isinstance(value, dict):
      raise self._unreadable(step, f"{item}/metadata: {shown(value)} instead of a JSON object")
    return value

  def _shapes(self, step: int) -> PyTree:
    with self._reading_arrays(step):
      return self._reader.shapes(self._folder(step))

  @contextlib.contextmanager
  def _reading_arrays(self, step: int) -> Iterator[None]:
    """Converts orbax's errors of any type inside the `with` block to an InputError about the files of a checkpoint."""
    try:
      with self._reading(step):
        yield
    except (InputError, StorageError, MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:
      raise self._unreadable(step, f"{type(error).__name__}: {error}") from error

  def _unreadable(self, step: int, reason: str) -> InputError:
    return InputError(
      f"checkpoint {step} in {self.directory} can't be read ({' '.join(reason.split())[:300]}); give another step, or"
      " restore the checkpoint from a copy"
    )

  def _reading(self, step: int) -> contextlib.AbstractContextManager[None]:
    return storage.bucket_errors(f"checkpoint {step} in {self.directory} can't be read")


def _arrays(tree: PyTree) -> dict[str, str]:
  """Descriptions such as 'float32[2, 3]' by path; they are equal for a state and for the shapes of a saved state."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
