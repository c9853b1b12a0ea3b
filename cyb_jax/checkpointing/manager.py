"""Checkpoints of a run: the one file that imports orbax.

A checkpoint holds the train state and a small JSON object (`meta`), and the checksums of its files. It appears under
its step's name only when it is whole, and is taken away from there before it is deleted, so that nothing that an
interruption leaves could be taken for one:

    DIRECTORY/12/               a checkpoint: orbax's folders, and checksums.json
    DIRECTORY/unfinished/       saves and deletions under way; what a killed run has left of them goes at the next start
    DIRECTORY/damaged/          checkpoints that a run has found damaged when it was continued

Every file is flushed to the disk before the checkpoint appears.

A bucket (gs://) can't rename a folder. There a checkpoint is saved under its own name and is one from the moment that
checksums.json appears, which comes last and goes first; whatever else has a step's name is what a killed run has left
of a save or a deletion. The checksums are those that the bucket has made of what it received, so that nothing is read
to find damage. And nothing can be locked there:

    DIRECTORY/owner.json        who writes here: the run that has started last; one from before ends at its next save
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import socket
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import PyTree

from cyb_jax import storage
from cyb_jax.distributed.cluster import ALONE, Cluster
from cyb_jax.errors import InputError, StorageError, storage_cause

_CHECKSUMS = "checksums.json"
_OWNER = "owner.json"
# By itself TensorStore would try for a quarter of an hour, where gcsfs gives up after half a minute.
_PATIENCE = {"max_retries": 6, "initial_delay": "1s", "max_delay": "32s"}
_HASHING_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint held."""

  step: int
  state: PyTree
  meta: dict[str, Any]


class Checkpoints:
  """The checkpoints in a folder; saves run in the background, one at a time.

  Only one object that isn't `read_only` may use a folder at a time (a run locks its folder). It looks at what is there
  first: damaged checkpoints are moved to `damaged/` with a warning, so that the run goes on from the newest whole one.

  Args:
    directory: on a disk, made when the first checkpoint is saved; or gs://bucket/folder.
    keep: how many of the newest are kept, beside the one with the lowest validation loss.
    read_only: for evaluation, also while a training writes here: nothing is written or tidied.
    cluster: the hosts that write together, all of them to this folder; host 0 alone tidies and commits.

  Raises:
    InputError: there are checkpoints, and all of them are damaged; nothing was touched.
    StorageError: the bucket fails, or another run has taken it over.
  """

  def __init__(self, directory: str | os.PathLike, *, keep: int = 1, read_only: bool = False, cluster: Cluster = ALONE):
    self.directory = storage.place(directory)
    self._in_bucket = storage.in_bucket(self.directory)
    self._unfinished = self.directory / "unfinished"
    self._keep, self._read_only = keep, read_only
    self._saving: tuple[int, Future[None]] | None = None
    self._failed = False  # which whoever saved or waited was told of; orbax may raise it once more
    if read_only:
      return
    self._hosts, self._hosts_behind = cluster.channel("checkpoints"), cluster.channel("checkpoints/commit")
    if self._in_bucket:
      _set_patience()
    if self._hosts.index == 0:
      if self._in_bucket:
        self._claim()
      self._set_damaged_aside()
      self._tidy()
    self._hosts.barrier()
    self._losses = {step: self._loss(step) for step in self.steps()}
    # Where folders that are made in the background can't be made, orbax waits for them for minutes.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    handler = ocp.CompositeCheckpointHandler(
      "state", "meta", "validation", composite_options=ocp.CompositeOptions(async_options=options)
    )
    self._saver = ocp.AsyncCheckpointer(handler, async_options=options)
    self._background = ThreadPoolExecutor(1, thread_name_prefix="cyb-checkpoint")

  def steps(self) -> list[int]:
    """The steps of the finished checkpoints, damaged ones among them, ascending."""
    steps = sorted(int(name) for name in storage.names(self.directory) if name.isdecimal())
    if self._in_bucket:
      steps = [step for step in steps if self._is_committed(step)]
    return steps

  def _is_committed(self, step: int) -> bool:
    return storage.exists(self.directory / str(step) / _CHECKSUMS)

  def damage(self, step: int, *, quick: bool = False) -> str | None:
    """What is wrong with a checkpoint, by the checksums that were written with it.

    Args:
      step: one of `steps()`.
      quick: the sizes of all files, and the checksums of all but the state's.

    Returns:
      None where nothing is; else the first file that is missing, truncated or altered, such as 'state/manifest.ocdbt is
      12 bytes, not 282'.
    """
    folder = self.directory / str(step)
    try:
      listed = {
        str(name): (int(size), *_kind(str(digest)))
        for name, (size, digest) in json.loads(storage.read_bytes(folder / _CHECKSUMS)).items()
      }
    except FileNotFoundError:
      return f"{_CHECKSUMS} is missing"
    except StorageError:  # of a bucket that refuses nothing is known
      raise
    except OSError as error:
      return f"{_CHECKSUMS} can't be read ({error.strerror})"
    except (ValueError, TypeError, AttributeError):
      return f"{_CHECKSUMS} was altered"
    files = storage.files(folder)
    for name, (size, _, _) in listed.items():
      try:
        found = files.size(name)
      except OSError as error:
        return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}"
      if found != size:
        return f"{name} is {found} bytes, not {size}"

    def altered(name: str) -> str | None:
      _, kind, digest = listed[name]
      try:
        return None if files.digest(name, kind) == digest else f"{name} was altered"
      except StorageError:
        raise
      except OSError as error:
        return f"{name} can't be read ({error.strerror})"

    chosen = [name for name in listed if not (quick and name.startswith("state/"))]
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
      return next(filter(None, pool.map(altered, chosen)), None)

  def fingerprint(self, step: int) -> str:
    """What a checkpoint is, by the checksums of all its files: sha256, hexadecimal."""
    return hashlib.sha256(storage.read_bytes(self.directory / str(step) / _CHECKSUMS)).hexdigest()

  def find(self, which: int | Literal["last", "best"], *, quick: bool = False) -> int:
    """The step of a checkpoint that isn't damaged.

    Args:
      which: a step; 'last', the newest whole one, with a warning where a newer one is damaged; or 'best', the one with
        the lowest validation loss.
      quick: see `damage`; and nothing is warned of.

    Raises:
      InputError: there is none, or none such, or it is damaged.
    """
    while True:
      steps = self.steps()
      if not steps:
        raise InputError(f"checkpoints: {self.directory} holds no finished checkpoint")
      damage: dict[int, str] = {}
      # A training that goes on in this folder may delete what is being looked at; then it has newer ones.
      try:
        chosen = self._pick(which, steps, damage, quick)
      except FileNotFoundError:
        if set(steps) <= set(self.steps()):
          raise
        continue
      if damage.keys() <= set(self.steps()):
        break
    if chosen is None:
      raise self._all_damaged(damage)
    if chosen in damage:
      raise InputError(f"checkpoint: {chosen} in {self.directory} is damaged: {damage[chosen]}; take another one")
    if not quick:
      for step in sorted(damage, reverse=True):
        logging.warning(
          "checkpoint %d in %s is damaged: %s; %d is used instead", step, self.directory, damage[step], chosen
        )
    return chosen

  def _pick(self, which: int | str, steps: list[int], damage: dict[int, str], quick: bool) -> int | None:
    """The step that is asked for; what is found damaged on the way is added to `damage`."""
    if which == "last":
      for step in reversed(steps):
        found = self.damage(step, quick=quick)
        if found is None:
          return step
        damage[step] = found
      return None
    listed = ", ".join(map(str, steps))
    if which == "best":
      losses = {}
      for step in steps:
        found = self.damage(step, quick=True)
        if found is None:
          losses[step] = self._loss(step)
        else:  # it may have been the best, and that is to be said
          damage[step] = found
          with contextlib.suppress(Exception):
            losses[step] = self._loss(step)
      which = _lowest(losses)
      if which is None:
        raise InputError(
          f"checkpoint: 'best' needs a validation at the step of a checkpoint (train.eval_every), and {self.directory}"
          f" has none; there are {listed}"
        )
    elif which not in steps:
      raise InputError(f"checkpoint: {which} is not there; there are {listed}")
    found = self.damage(which, quick=quick)
    if found is not None:
      damage[which] = found
    return which

  def save(self, step: int, state: PyTree, meta: dict[str, Any], *, loss: float | None = None) -> None:
    """Starts to save; returns when the state was copied, and may be donated.

    Raises:
      StorageError: the disk fails this save, or has failed the one before.
      Whatever else the save before this one failed with.
    """
    self.wait()
    if self._hosts.broadcast(self._hosts.index == 0 and self._is_saved(step)):
      return
    # A loss that isn't finite must not compete: nan would win.
    loss = loss if loss is not None and math.isfinite(loss) else None
    items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
    if loss is not None:
      items["validation"] = ocp.args.JsonSave({"loss": loss})
    try:
      if self._hosts.index == 0:
        if self._in_bucket:  # a run from before may not have noticed yet that it has been taken over
          storage.remove_tree(self._saved_in(step))
        else:
          self._unfinished.mkdir(parents=True, exist_ok=True)
      self._hosts.barrier()
      self._saver.save(self._saved_in(step), args=ocp.args.Composite(**items))
    except Exception as error:
      self._failed = True
      failed = self._storage_error(step, error)
      if failed is None:
        raise
      raise failed from error
    self._saving = step, self._background.submit(self._finish, step, loss)

  def wait(self) -> None:
    """Until the last save is whole; raises what it failed with, as `save` does."""
    if self._saving is None:
      return
    (step, done), self._saving = self._saving, None
    try:
      done.result()
    except Exception as error:
      self._failed = True
      failed = self._storage_error(step, error)
      if failed is None:
        raise
      raise failed from error

  def check(self) -> None:
    """Raises what the last save failed with, if it has by now; doesn't wait."""
    if self._saving is not None and self._saving[1].done():
      self.wait()

  def _is_saved(self, step: int) -> bool:
    # In a bucket a run from before, which has been taken over, may have left a list of checksums and nothing else.
    return step in self.steps() and not (self._in_bucket and self.damage(step, quick=True))

  def _saved_in(self, step: int) -> storage.Place:
    """Where a save is written."""
    return (self.directory if self._in_bucket else self._unfinished) / str(step)

  def _finish(self, step: int, loss: float | None) -> None:
    """In the background: when all hosts' parts are written, host 0 commits them."""
    self._saver.wait_until_finished()
    if self._hosts_behind.index == 0:
      self._commit(step, loss)
    self._hosts_behind.barrier()
    self._losses[step] = loss  # what the others know of it

  def _commit(self, step: int, loss: float | None) -> None:
    """The checksums, the step's name, and the end of those not kept."""
    if self._in_bucket:
      self._commit_in_bucket(step)
    else:
      self._commit_on_disk(step)
    self._losses[step] = loss
    steps = self.steps()
    kept = {*steps[-self._keep :], _lowest({s: self._losses[s] for s in steps})}
    for old in set(steps) - kept:
      self._delete(old)

  def _commit_on_disk(self, step: int) -> None:
    folder = self._saved_in(step)
    files = storage.files(folder)
    names = list(files)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
      hashes = pool.map(lambda name: files.digest(name, "sha256", flush=True), names)
      listed = {name: (files.size(name), sha256) for name, sha256 in zip(names, hashes)}
    with (folder / _CHECKSUMS).open("w") as file:
      json.dump(listed, file, indent=1)
      file.flush()
      os.fsync(file.fileno())
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
      _flush(path)
    folder.rename(self.directory / str(step))
    _flush(self.directory)

  def _commit_in_bucket(self, step: int) -> None:
    folder = self._saved_in(step)
    files = storage.files(folder)
    listed = {name: (files.size(name), f"md5:{files.digest(name, 'md5')}") for name in files}
    # Only now: whoever takes over deletes what isn't finished, and then the list is of what was there before.
    self._check_owner()
    storage.atomic_write(folder / _CHECKSUMS, json.dumps(listed, indent=1))

  def _delete(self, step: int) -> None:
    """Takes a checkpoint away, so that a deletion that is killed half-way leaves nothing that seems to be one."""
    folder = self.directory / str(step)
    if self._in_bucket:
      storage.remove_objects([folder / _CHECKSUMS])
      storage.remove_tree(folder)
      return
    doomed = self._unfinished / f"{step}.deleted"
    folder.rename(doomed)
    shutil.rmtree(doomed)

  def _tidy(self) -> None:
    """Deletes what killed runs have left of saves and deletions."""
    if not self._in_bucket:
      shutil.rmtree(self._unfinished, ignore_errors=True)
      return
    finished = self.steps()
    for name in storage.names(self.directory):
      if name.isdecimal() and int(name) not in finished:
        storage.remove_tree(self.directory / name)

  def _claim(self) -> None:
    """Says in the bucket that this is the run that writes here."""
    self._owner = f"{socket.gethostname()}, process {os.getpid()}, {uuid.uuid4().hex[:8]}"
    told = {"owner": self._owner, "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    storage.atomic_write(self.directory / _OWNER, json.dumps(told) + "\n")

  def _check_owner(self) -> None:
    try:
      owner = json.loads(storage.read_bytes(self.directory / _OWNER))["owner"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
      owner = "nobody"
    if owner != self._owner:
      raise StorageError(
        f"{self.directory}: another run has taken over here ({owner}), and goes on from the newest checkpoint; this one"
        " ends"
      )

  def _storage_error(self, step: int, error: Exception) -> StorageError | None:
    """What to raise for a save that the disk has failed; None: it is something else that has."""
    cause = storage_cause(error)
    if cause is None:
      return None
    # It may be what fills the disk. A bucket that has just failed isn't asked again.
    if self._hosts.index == 0 and not self._in_bucket:
      shutil.rmtree(self._unfinished, ignore_errors=True)
    steps = sorted(self._losses) if self._in_bucket else self.steps()
    before = (
      f"that of step {steps[-1]} is there, and the same command goes on from it" if steps else "there is none before"
    )
    return StorageError(f"checkpoint {step} can't be saved in {self.directory}: {cause}; {before}")

  def restore(self, step: int, abstract: PyTree) -> Restored:
    """The checkpoint of a step, on the devices and in the layout that `abstract` asks for.

    Args:
      step: one of `steps()` that isn't damaged, which isn't looked at again.
      abstract: a tree of ShapeDtypeStruct with shardings.

    Raises:
      InputError: the checkpoint holds other arrays than are asked for.
    """
    # Compared here, because orbax would cast another dtype silently and read a part of another shape.
    saved, wanted = _arrays(self._metadata(step)), _arrays(abstract)
    if saved != wanted:
      name = min(k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k))
      raise InputError(
        f"checkpoint {step} in {self.directory}: {name} is {saved.get(name, 'missing')}, but this config has"
        f" {wanted.get(name, 'no such array')}"
      )
    restored = self._read(step, state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
    logging.info("restored step %d from %s", step, self.directory)
    return Restored(step, restored["state"], restored["meta"])

  def read(self, step: int) -> Restored:
    """The checkpoint of a step as it lies there: numpy arrays in nested dicts, whatever they are."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), self._metadata(step))
    restored = self.restore(step, abstract)
    return dataclasses.replace(restored, state=jax.device_get(restored.state))

  def restore_params(self, step: int, abstract: PyTree) -> PyTree:
    """The parameters alone, without reading the optimizer's state.

    Args:
      step: one of `steps()` that isn't damaged, which isn't looked at again.
      abstract: a tree of ShapeDtypeStruct with shardings, of the parameters.
    """
    wanted = ocp.args.PyTreeRestore(
      item={"params": abstract},
      restore_args={"params": ocp.checkpoint_utils.construct_restore_args(abstract)},
      partial_restore=True,
    )
    return self._read(step, state=wanted)["state"]["params"]

  def meta(self, step: int) -> dict[str, Any]:
    """The JSON object of a checkpoint."""
    return self._json(step, "meta")

  def _loss(self, step: int) -> float | None:
    """The validation loss of a checkpoint, where it has one."""
    if not storage.names(self.directory / str(step) / "validation"):
      return None
    return self._json(step, "validation")["loss"]

  def _json(self, step: int, item: str) -> dict[str, Any]:
    # Not by orbax, whose hosts wait for each other wherever they read: host 0 looks at checkpoints by itself.
    with self._reading(step):
      return json.loads(storage.read_bytes(self.directory / str(step) / item / "metadata"))

  def _metadata(self, step: int) -> PyTree:
    # All items are named, or orbax warns of those that it doesn't know.
    items = {name: ocp.JsonCheckpointHandler() for name in ("meta", "validation")}
    handler = ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler(), **items)
    with ocp.Checkpointer(handler) as checkpointer, self._reading(step):
      return checkpointer.metadata(self.directory / str(step)).item_metadata["state"].tree

  def _read(self, step: int, **items: Any) -> Any:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer, self._reading(step):
      return checkpointer.restore(self.directory / str(step), args=ocp.args.Composite(**items))

  def _reading(self, step: int) -> contextlib.AbstractContextManager[None]:
    return storage.bucket_errors(f"checkpoint {step} in {self.directory} can't be read")

  def _set_damaged_aside(self) -> None:
    """Moves away what is damaged, so that its step can be saved again and it can't become the best."""
    steps, damage = self.steps(), {}
    if not steps:
      return
    newest = self._pick("last", steps, damage, quick=False)
    if newest is None:
      raise self._all_damaged(damage)
    # Of the others the state is read only where it may come to be used.
    losses = {newest: self._loss(newest)}
    for step in set(steps) - damage.keys() - {newest}:
      found = self.damage(step, quick=True)
      if found is None:
        losses[step] = self._loss(step)
      else:
        damage[step] = found
    while (best := _lowest(losses)) not in (None, newest) and (found := self.damage(best)) is not None:
      damage[best] = found
      del losses[best]
    for step, found in sorted(damage.items(), reverse=True):
      place, count = self.directory / "damaged" / str(step), 1
      while storage.exists(place):
        place, count = place.with_name(f"{step}.{count}"), count + 1
      storage.move_tree(self.directory / str(step), place, last=_CHECKSUMS)
      instead = f"; {newest} is used instead" if step > newest else ""
      logging.warning("checkpoint %d is damaged: %s; it was moved to %s%s", step, found, place, instead)

  def _all_damaged(self, damage: dict[int, str]) -> InputError:
    found = "; ".join(f"{step}: {damage[step]}" for step in sorted(damage, reverse=True))
    return InputError(
      f"checkpoints: all in {self.directory} are damaged ({found}); put a whole copy in place of one, or start anew in"
      " another folder"
    )

  def close(self) -> None:
    """Ends what runs in the background; raises what the last save failed with, if nobody has seen it yet."""
    if self._read_only:
      return
    try:
      self.wait()
    finally:
      self._background.shutdown()
      with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
        self._saver.close()
      if self._hosts.index == 0 and not self._in_bucket:
        if self._failed:  # orbax may have gone on for a while with what it had begun
          shutil.rmtree(self._unfinished, ignore_errors=True)
        with contextlib.suppress(OSError):
          self._unfinished.rmdir()


def _lowest(losses: dict[int, float | None]) -> int | None:
  """The step of the lowest loss, the newest of equals."""
  known = {step: loss for step, loss in losses.items() if loss is not None}
  return min(known, key=lambda step: (known[step], -step), default=None)


def _set_patience() -> None:
  # Orbax makes TensorStore's contexts from these, and passes nothing on.
  with contextlib.suppress(ImportError, AttributeError):
    from orbax.checkpoint._src.serialization import tensorstore_utils

    for defaults in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
      defaults["gcs_request_retries"] = _PATIENCE


def _kind(digest: str) -> tuple[storage.Digest, str]:
  """Of an entry of checksums.json: 'md5:...' where a bucket has made it, else a sha256."""
  return ("md5", digest.removeprefix("md5:")) if digest.startswith("md5:") else ("sha256", digest)


def _flush(folder: storage.Place) -> None:
  """A folder's own entries reach the disk by themselves only sometime."""
  number = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(number)
  finally:
    os.close(number)


def _arrays(tree: PyTree) -> dict[str, str]:
  """'f32[2, 3]' and the like, by path; the same for a state and for what orbax says of a saved one."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
