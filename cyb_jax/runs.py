"""A run's folder: what lies where, who may continue it, and how it is loaded.

config.json      the config it was started with
tokenizer/       a copy of the token store's
metrics.jsonl    one object a line
checkpoints/     one folder a step
evaluation.json  the last evaluation
.lock            held by the training that runs here

It lies on a disk, or in a bucket (gs://bucket/folder), where nothing can be locked: see
`cyb_jax.checkpointing.manager`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import tempfile
from typing import Any

import flax.linen as nn
import jax
from absl import logging
from jaxtyping import PyTree

from cyb_jax import configs, jsonl, storage
from cyb_jax.checkpointing.manager import Checkpoints
from cyb_jax.configs import Config
from cyb_jax.data import Tokenizer, TokenStore, is_store, tokenizers
from cyb_jax.errors import InputError, reading, storage_cause
from cyb_jax.methods import Method
from cyb_jax.partitioning.mesh import data_shards, shardings


def checkpoints_in(workdir: str | os.PathLike, **options: Any) -> Checkpoints:
  """The checkpoints of a run."""
  return Checkpoints(storage.place(workdir) / "checkpoints", **options)


def check_workdir(workdir: str | os.PathLike, config: Config) -> None:
  """Whether this config may run in this folder; nothing of it stays.

  Raises:
    InputError: it holds a run of another config, or can't be written to.
  """
  path = storage.place(workdir)
  if storage.in_bucket(path):
    storage.check_bucket(path)
  with storage.starting(path):
    held = storage.exists(path / "config.json")
  if held:
    changed = configs.differences(read_config(path), config.source)
    if changed:
      raise InputError(
        f"workdir: {workdir} holds a run of another config ({'; '.join(changed[:4])}{'; ...' if changed[4:] else ''});"
        " take another folder, or the run's own config"
      )
  if storage.in_bucket(path):
    return
  existing = path
  while not existing.exists():
    existing = existing.parent
  if not existing.is_dir():
    raise InputError(f"workdir: {existing} is a file, a folder is needed")
  try:
    # Tried rather than asked: some file systems refuse whatever the permissions say. Nothing of it stays.
    tempfile.TemporaryFile(dir=existing).close()
  except OSError as error:
    raise InputError(f"workdir: can't write in {existing} ({error.strerror}); take another folder") from None


class Lock:
  """The one right to train in a folder, for as long as the `with` block; the system takes it back from a process that
  dies, however it does.

  In a bucket nothing is held: there the run that starts last goes on, and one from before ends at its next checkpoint.

  A folder that no run has been in yet is locked when its first file is to be written, by `hold`: a start that is
  refused leaves nothing behind.

  Args:
    workdir: the run's folder; it needn't be there.

  Raises:
    InputError: another run holds it.
  """

  def __init__(self, workdir: str | os.PathLike):
    self._workdir = workdir
    self._file: int | None = None
    self._in_bucket = storage.in_bucket(workdir)

  def __enter__(self) -> Lock:
    if self._in_bucket:
      return self
    # Where it can't be opened, `check_workdir` has the words for it.
    with contextlib.suppress(OSError):
      self._lock(os.open(pathlib.Path(self._workdir) / ".lock", os.O_RDWR))
    return self

  def __exit__(self, *_) -> None:
    if self._file is not None:
      os.close(self._file)
    self._file = None

  def hold(self) -> bool:
    """Locks the folder, which must be there; whether it was not held before."""
    if self._file is not None or self._in_bucket:
      return False
    self._lock(os.open(pathlib.Path(self._workdir) / ".lock", os.O_RDWR | os.O_CREAT, 0o666))
    return True

  def _lock(self, file: int) -> None:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(file)
      raise InputError(
        f"workdir: another run is training in {self._workdir}; wait for it to end, or take another folder"
      ) from None
    except OSError as error:  # some network file systems have no locks
      logging.warning("%s can't be locked (%s): see that only one run trains there", self._workdir, error.strerror)
    self._file = file


def start_workdir(
  workdir: str | os.PathLike, config: Config, tokenizer: Tokenizer, lock: Lock, meta: dict[str, Any] | None
) -> storage.Place:
  """Makes the folder and writes what doesn't change; see `check_workdir` for what is checked before.

  Args:
    workdir: the run's folder.
    config, tokenizer: the run's.
    lock: of the folder; held from here on.
    meta: what `newest_meta` has said.

  Raises:
    InputError: the folder can't be written to, or another run trains there, or has since it was looked at.
  """
  path = storage.place(workdir)
  try:
    if not storage.in_bucket(path):
      path.mkdir(parents=True, exist_ok=True)
    if lock.hold():
      check_workdir(workdir, config)
      if newest_meta(path) != meta:
        raise InputError(f"workdir: another run has trained in {workdir} just now; start again to continue it")
    for name in ("config.json", "metrics.jsonl"):  # which a run alone writes
      for leftover in () if storage.in_bucket(path) else path.glob(f"{name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    storage.atomic_write(path / "config.json", configs.to_json(config))
    if meta is None:  # what a checkpoint was trained with is not written again
      with storage.new_folder(path / "tokenizer") as folder:
        tokenizer.save(folder)
  except OSError as error:
    raise InputError(f"workdir: {workdir} can't be written to: {storage_cause(error) or error}") from None
  return path


def newest_meta(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """The JSON object of a run's newest checkpoint that isn't damaged; None where it has no checkpoint.

  Raises:
    InputError: all are damaged.
  """
  with storage.starting(workdir):
    checkpoints = checkpoints_in(workdir, read_only=True)
    # The state, which may be large, isn't read for this.
    return checkpoints.meta(checkpoints.find("last", quick=True)) if checkpoints.steps() else None


def open_recorded_store(meta: dict[str, Any] | None, given: str = "") -> TokenStore | None:
  """The token store that a run was trained on, without its source.

  Args:
    meta: of the run's newest checkpoint; None: it has none yet.
    given: a folder that is to hold it; '': where it lay.

  Returns:
    The store; None where nothing is recorded, or it has gone and must be prepared again.

  Raises:
    InputError: the given folder holds another store.
  """
  # What a run would start from wasn't trained on any that is known.
  if meta is None or "store" not in meta or not is_store(given or meta["store_path"]):
    return None
  store = TokenStore.open(given or meta["store_path"])
  if store.fingerprint == meta["store"]:
    return store
  if given:
    check_fingerprint(store, meta)
  return None  # another one lies there now


def check_fingerprint(store: TokenStore, meta: dict[str, Any] | None) -> None:
  """Raises InputError if a run was trained on another store."""
  if meta is not None and meta.get("store", store.fingerprint) != store.fingerprint:
    raise InputError(
      f"data.store: {store.path} has fingerprint {store.fingerprint[:12]}, but the run was trained on"
      f" {meta['store'][:12]}; give it the store that it started with"
    )


def write_evaluation(workdir: str | os.PathLike, record: dict[str, Any]) -> None:
  """evaluation.json."""
  storage.atomic_write(storage.place(workdir) / "evaluation.json", jsonl.dumps(record, indent=2) + "\n")


def is_run(path: str | os.PathLike) -> bool:
  """Whether a folder is that of a run, and no Hugging Face folder, which has a config.json too.

  Raises:
    InputError: nothing in it may be read.
  """
  folder = storage.place(path)
  try:
    with storage.starting(path):
      text = storage.read_bytes(folder / "config.json").decode()
  except InputError:
    raise
  except (OSError, UnicodeDecodeError):
    text = ""
  try:
    found = json.loads(text)
  except json.JSONDecodeError:
    with reading(str(path)), storage.starting(path):
      return bool(storage.names(folder / "checkpoints"))
  return isinstance(found, dict) and {"method", "decoder", "train"} <= found.keys()


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
  """The nested dict in config.json.

  Raises:
    InputError: there is none.
  """
  path = storage.place(workdir) / "config.json"
  with storage.starting(workdir):
    text = storage.read_bytes(path).decode() if storage.exists(path) else None
  if text is None:
    raise InputError(f"workdir: {workdir} holds no run (there is no config.json)")
  try:
    found = json.loads(text)
  except json.JSONDecodeError as error:
    raise InputError(f"workdir: {path} is not JSON ({error})") from None
  if isinstance(found, dict) and "architectures" in found:
    raise InputError(f"workdir: {workdir} holds no run, but a Hugging Face folder's model; name it as --init_from")
  return found


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained run, ready to use: `run.method.evaluate(run.params, batch)`.

  Attributes:
    config: frozen.
    method: built over the tokenizer's vocabulary.
    params: f32, on the default device or the mesh that was asked for.
    tokenizer: encode and decode.
    step: of the checkpoint.
    meta: of the checkpoint: `train_tokens`, `train_slots`, `train_flops`, the token store's `store` fingerprint.
  """

  config: Config
  method: Method
  params: PyTree
  tokenizer: Tokenizer
  step: int
  meta: dict[str, Any]


def load(workdir: str | os.PathLike, checkpoint: int | str = "last", mesh: jax.sharding.Mesh | None = None) -> Run:
  """Loads a run's parameters, without its optimizer state.

  Args:
    workdir: the run's folder.
    checkpoint: a step, 'last', or 'best' (the lowest validation loss).
    mesh: where the parameters go; None: the default device.

  Raises:
    InputError: no run, no such checkpoint, or a damaged one. A damaged newest one is passed over with a warning.
  """
  config = configs.freeze(read_config(workdir))
  folder = storage.place(workdir)
  with storage.starting(workdir):
    if not storage.names(folder / "checkpoints"):
      raise InputError(f"checkpoints: {workdir} holds no finished checkpoint")
    tokenizer = load_tokenizer(workdir)
  method = config.build_method(tokenizer.vocab_size, data_shards=1 if mesh is None else data_shards(mesh))
  checkpoints = checkpoints_in(folder, read_only=True)
  abstract = abstract_params(method, mesh)
  while True:
    step = checkpoints.find(checkpoint)
    try:
      return Run(config, method, checkpoints.restore_params(step, abstract), tokenizer, step, checkpoints.meta(step))
    except Exception:
      # A training that goes on in this folder may have deleted it meanwhile; then it has a newer one.
      if step in checkpoints.steps():
        raise


def load_tokenizer(workdir: str | os.PathLike) -> Tokenizer:
  """A run's own.

  Raises:
    InputError: there is none that can be read.
  """
  with storage.starting(workdir), storage.local_folder(storage.place(workdir) / "tokenizer") as folder:
    return tokenizers.load(folder)


def abstract_params(method: Method, mesh: jax.sharding.Mesh | None) -> PyTree:
  """Shapes, dtypes and shardings of a method's parameters; `mesh` None: on the default device."""
  boxed = jax.eval_shape(method.init, jax.random.key(0))
  shapes = nn.unbox(boxed)
  if mesh is None:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda _: here, shapes)
  else:
    placed = shardings(boxed, mesh)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)
