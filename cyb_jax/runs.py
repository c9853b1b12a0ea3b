"""A trained run, loaded from its folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PyTree

from cyb_jax import configs, storage
from cyb_jax.checkpointing.workdir import ConfigRecord, check_fingerprint, checkpoints_in, read_config
from cyb_jax.configs import Config
from cyb_jax.data import Tokenizer, TokenStore, is_store, open_token_store, tasks, tokenizers
from cyb_jax.errors import InputError
from cyb_jax.methods import Method
from cyb_jax.partitioning.mesh import data_shards, shardings


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
    imported: whether the parameters are those of another project's model, as it was trained there.
  """

  config: Config
  method: Method
  params: PyTree
  tokenizer: Tokenizer
  step: int
  meta: dict[str, Any]
  imported: bool = False

  @property
  def boundaries(self) -> tokenizers.TextBoundaries:
    """The ids that precede a text, and those that end a generated text."""
    return tokenizers.text_boundaries(self.tokenizer, imported=self.imported)


def load(workdir: str | os.PathLike, checkpoint: int | str = "last", mesh: jax.sharding.Mesh | None = None) -> Run:
  """Loads a run's parameters, without its optimizer state.

  Args:
    workdir: the run's folder.
    checkpoint: a step, 'last', or 'best' (the lowest validation loss).
    mesh: of the devices that hold the parameters; None: the default device.

  Raises:
    InputError: no run, no such checkpoint, or a damaged one. A damaged newest one is passed over with a warning.
  """
  config = configs.freeze(configs.migrated(read_config(workdir)))
  with storage.starting(workdir):
    if not storage.names(storage.place(workdir) / "checkpoints"):
      raise InputError(f"checkpoints: {workdir} holds no finished checkpoint")
    tokenizer = load_tokenizer(workdir)
  method = config.build_method(tokenizer.vocab_size, data_shards=1 if mesh is None else data_shards(mesh))
  checkpoints = checkpoints_in(workdir, read_only=True)
  abstract = abstract_params(method, mesh)
  while True:
    step = checkpoints.find(checkpoint)
    try:
      return Run(config, method, checkpoints.restore_params(step, abstract), tokenizer, step, checkpoints.meta(step))
    except Exception:
      # A training that writes to this folder may have deleted the checkpoint meanwhile; then there is a newer one.
      if step in checkpoints.steps():
        raise


def load_tokenizer(workdir: str | os.PathLike) -> Tokenizer:
  """The tokenizer of a run.

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


def with_absolute_paths(source: Mapping[str, Any]) -> dict[str, Any]:
  """A nested config in which all paths are absolute: a run's folder may be read from any working directory."""
  return configs.with_paths(source, storage.absolute, tasks.with_absolute_paths)


def config_record(config: Config) -> ConfigRecord:
  """A config as a run's folder records and compares it.

  A run of an earlier version has no difference in fields that `config` leaves open, see `as_started`.
  """
  source = with_absolute_paths(config.source)

  def differences(recorded: Mapping[str, Any]) -> list[str]:
    # Version 0.1 recorded paths as they were given.
    recorded = with_absolute_paths(recorded)
    return configs.differences(configs.migrated(recorded), configs.continued(source, recorded))

  return ConfigRecord(configs.to_json(dataclasses.replace(config, source=source)), differences)


def as_started(config: Config, workdir: str | os.PathLike) -> Config:
  """The config with which the run in a folder is continued; the config itself where the folder holds no run.

  Fields that the config leaves open, and whose defaults have changed since the run was started, are those of the run;
  see `configs.continued`.

  Raises:
    InputError: the folder's config.json can't be read.
  """
  with storage.starting(workdir):
    held = storage.exists(storage.place(workdir) / "config.json")
  if not held:
    return config
  source = configs.continued(config.source, read_config(workdir))
  return config if source == dict(config.source) else configs.freeze(source)


def open_recorded_store(meta: dict[str, Any] | None, given: str = "") -> TokenStore | None:
  """The token store that a run was trained on, without its source; the fingerprint decides which one it is.

  Args:
    meta: of the run's newest checkpoint; None: the run has none yet.
    given: a folder that must hold the store if it holds one; '': the folder that is recorded.

  Returns:
    The store; None where none is recorded, or it does not exist any more and must be prepared again.

  Raises:
    InputError: the given folder holds another store.
  """
  # A pretrained model that a run starts from was trained on an unknown store.
  if meta is None or "store" not in meta:
    return None
  for path in dict.fromkeys(filter(None, (given, meta["store_path"]))):
    if not is_store(path):
      continue
    store = open_token_store(path)
    if store.fingerprint == meta["store"]:
      return store
    if path == given:
      check_fingerprint(store, meta)
  return None
