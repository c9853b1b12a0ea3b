"""The work directory of a run: its files, its lock, and the checks before a run starts or continues there.

config.json      the config with which the run was started
tokenizer/       a copy of the token store's tokenizer
metrics.jsonl    one JSON object per line
checkpoints/     one folder for each checkpoint
evaluation.json  the last evaluation
.lock            the lock of the training process

The folder is on a disk, or in a bucket (gs://bucket/folder), which has no locks: see `cyb_jax.checkpointing.bucket`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from absl import logging

from cyb_jax import jsonl, storage
from cyb_jax.checkpointing.manager import Checkpoints
from cyb_jax.errors import InputError, reading, shown, storage_cause


@dataclasses.dataclass(frozen=True)
class ConfigRecord:
  """A run's config, in the form that this module needs.

  Attributes:
    text: the text of config.json.
    differences: the nested dict of another config.json -> one line for each field whose difference changes results.
  """

  text: str
  differences: Callable[[Mapping[str, Any]], Sequence[str]]


class Saveable(Protocol):
  """A tokenizer."""

  def save(self, folder: pathlib.Path) -> None: ...


class Fingerprinted(Protocol):
  """A token store."""

  @property
  def path(self) -> Any: ...

  @property
  def fingerprint(self) -> str: ...


def checkpoints_in(workdir: str | os.PathLike, **options: Any) -> Checkpoints:
  """The checkpoints of a run; `options` are arguments of `Checkpoints`."""
  return Checkpoints(storage.place(workdir) / "checkpoints", **options)


def check_workdir(workdir: str | os.PathLike, config: ConfigRecord) -> None:
  """Checks that a config may run in a folder; files that are written for this check are deleted.

  Raises:
    InputError: the folder contains a run of another config, or can't be written to.
  """
  path = storage.place(workdir)
  if storage.in_bucket(path):
    storage.check_bucket(path)
  with storage.starting(path):
    held = storage.exists(path / "config.json")
  if held:
    changed = config.differences(read_config(path))
    if changed:
      raise InputError(
        f"workdir: {workdir} contains a run of another config"
        f" ({'; '.join(changed[:4])}{'; ...' if changed[4:] else ''}); give another folder, or the run's own config"
      )
  if not storage.in_bucket(path):
    _check_writable(path)


def _check_writable(path: storage.Place) -> None:
  """Checks that a folder on a disk exists or can be created, and can be written to."""
  existing = path
  while not existing.exists():
    existing = existing.parent
  if not existing.is_dir():
    raise InputError(f"workdir: {existing} is a file; give a folder")
  try:
    # The check is an attempt, because some file systems reject writes regardless of the permissions.
    tempfile.TemporaryFile(dir=existing).close()
  except OSError as error:
    raise InputError(f"workdir: can't write in {existing} ({error.strerror}); give another folder") from None


class Lock:
  """The exclusive right to train in a folder, for a `with` block. The operating system releases it if the process dies.

  In a bucket there are no locks: the run that was started last continues, and an earlier run ends at its next
  checkpoint.

  A folder that no run has used yet is locked by `hold` when its first file is written, so a start that fails before
  leaves no files.

  Args:
    workdir: the run's folder; it may not exist yet.

  Raises:
    InputError: another run holds the lock.
  """

  def __init__(self, workdir: str | os.PathLike):
    self._workdir = storage.place(workdir)
    self._file: int | None = None
    self._in_bucket = storage.in_bucket(workdir)

  def __enter__(self) -> Lock:
    if self._in_bucket:
      return self
    # If the file can't be opened, `check_workdir` raises an error with the reason.
    with contextlib.suppress(OSError):
      self._lock(os.open(self._workdir / ".lock", os.O_RDWR))
    return self

  def __exit__(self, *_) -> None:
    if self._file is not None:
      os.close(self._file)
    self._file = None

  def hold(self) -> bool:
    """Locks the folder, which must exist; returns False if this object has already locked it."""
    if self._file is not None or self._in_bucket:
      return False
    self._lock(os.open(self._workdir / ".lock", os.O_RDWR | os.O_CREAT, 0o666))
    return True

  def _lock(self, file: int) -> None:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(file)
      raise InputError(
        f"workdir: another run is training in {self._workdir}; wait for its end, or give another folder"
      ) from None
    except OSError as error:  # some network file systems have no locks
      logging.warning(
        "%s can't be locked (%s): make sure that only one run trains there", self._workdir, error.strerror
      )
    self._file = file


def start_workdir(
  workdir: str | os.PathLike, config: ConfigRecord, tokenizer: Saveable, lock: Lock, meta: dict[str, Any] | None
) -> storage.Place:
  """Creates the folder and writes the files that don't change; call `check_workdir` first.

  Args:
    workdir: the run's folder.
    config, tokenizer: config and tokenizer of the run.
    lock: the lock of the folder; it is held when this function returns.
    meta: the value that `newest_meta` returned.

  Returns:
    The folder's path.

  Raises:
    InputError: the folder can't be written to, or another run trains there or has trained there since `newest_meta`.
  """
  path = storage.place(workdir)
  try:
    if not storage.in_bucket(path):
      path.mkdir(parents=True, exist_ok=True)
    if lock.hold():
      check_workdir(workdir, config)
      if newest_meta(path) != meta:
        raise InputError(f"workdir: another run has just trained in {workdir}; start again to continue it")
    for name in ("config.json", "metrics.jsonl"):  # files that only a run writes
      for leftover in () if storage.in_bucket(path) else path.glob(f"{name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    storage.atomic_write(path / "config.json", config.text)
    if meta is None:  # the tokenizer that a checkpoint was trained with is not written again
      with storage.new_folder(path / "tokenizer") as folder:
        tokenizer.save(folder)
  except OSError as error:
    raise InputError(
      f"workdir: {workdir} can't be written to: {storage_cause(error) or error}; give another folder, or make space and"
      " access, and give the same command again"
    ) from None
  return path


def newest_meta(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """The JSON object of a run's newest undamaged checkpoint; None if the run has no checkpoint.

  Raises:
    InputError: all checkpoints are damaged.
  """
  with storage.starting(workdir):
    checkpoints = checkpoints_in(workdir, read_only=True)
    # With quick=True, the state, which may be large, isn't read.
    return checkpoints.meta(checkpoints.find("last", quick=True)) if checkpoints.steps() else None


def check_fingerprint(store: Fingerprinted, meta: dict[str, Any] | None) -> None:
  """Raises InputError if a run was trained on another token store.

  Args:
    store: the token store.
    meta: the JSON object of a checkpoint of the run; None if there is no checkpoint.
  """
  if meta is not None and meta.get("store", store.fingerprint) != store.fingerprint:
    raise InputError(
      f"data.store: {store.path} has fingerprint {store.fingerprint[:12]}, but the run was trained on"
      f" {meta['store'][:12]}; give the store on which the run was started"
    )


def write_evaluation(workdir: str | os.PathLike, record: dict[str, Any]) -> None:
  """Writes evaluation.json."""
  storage.atomic_write(storage.place(workdir) / "evaluation.json", jsonl.dumps(record, indent=2) + "\n")


def is_run(path: str | os.PathLike) -> bool:
  """Whether a folder is the work directory of a run. A Hugging Face folder also has a config.json, but is not one.

  Raises:
    InputError: the folder can't be read.
  """
  folder = storage.place(path)
  try:
    with storage.starting(path):
      text = storage.read_bytes(folder / "config.json")
  except InputError:
    raise
  except OSError:
    text = b""
  try:
    found = jsonl.loads(text)
  except ValueError:
    with reading(str(path)), storage.starting(path):
      return bool(storage.names(folder / "checkpoints"))
  return isinstance(found, dict) and {"method", "decoder", "train"} <= found.keys()


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
  """The nested dict in config.json.

  Raises:
    InputError: the folder contains no run.
  """
  path = storage.place(workdir) / "config.json"
  with storage.starting(workdir):
    text = storage.read_bytes(path) if storage.exists(path) else None
  if text is None:
    raise InputError(f"workdir: {workdir} contains no run (no config.json); give the work directory of a run")
  try:
    found = jsonl.loads(text)
  except ValueError as error:
    raise InputError(f"workdir: {path} is not JSON ({error}); restore the file") from None
  if not isinstance(found, dict):
    raise InputError(f"workdir: {path} contains {shown(found)} instead of a JSON object; restore the file")
  if "architectures" in found:
    raise InputError(
      f"workdir: {workdir} contains a Hugging Face model, not a run; give it as --init_from, or give a run"
    )
  return found
