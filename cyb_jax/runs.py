"""A trained run, and what is read from its work directory; `interop.pretrained.load_run` loads it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PyTree

from cyb_jax import configs, storage
from cyb_jax.checkpointing.workdir import ConfigRecord, check_fingerprint, newest_meta, read_config
from cyb_jax.configs import Config
from cyb_jax.data import Tokenizer, TokenStore, is_store, open_token_store, tasks, tokenizers
from cyb_jax.errors import InputError
from cyb_jax.methods import Method
from cyb_jax.partitioning.mesh import shardings


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained run, ready to use: `run.method.evaluate(run.params, batch)`.

  Attributes:
    config: the frozen config.
    method: the method, built for the tokenizer's vocabulary.
    params: the parameters, f32, on the default device or on the given mesh.
    tokenizer: the tokenizer.
    step: the step of the checkpoint.
    meta: the JSON object of the checkpoint: `train_tokens`, `train_slots`, `train_flops`, and the fingerprint of the
      token store, `store`.
    imported: whether the parameters were imported and have not been trained by this project.
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
    """The ids that precede a text, and the ids that end a generated text."""
    return tokenizers.text_boundaries(self.tokenizer, imported=self.imported)


def load_config(workdir: str | os.PathLike) -> Config:
  """The config of a run that has saved a checkpoint.

  Raises:
    InputError: there is no run, or it has no checkpoint.
  """
  config = configs.freeze(configs.migrated(read_config(workdir)))
  with storage.starting(workdir):
    if not storage.names(storage.place(workdir) / "checkpoints"):
      raise InputError(
        f"checkpoints: {workdir} contains no finished checkpoint; give the work directory of a run that has saved one"
      )
  return config


def load_tokenizer(workdir: str | os.PathLike) -> Tokenizer:
  """The tokenizer of a run.

  Raises:
    InputError: the run has no readable tokenizer.
  """
  with storage.starting(workdir), storage.local_folder(storage.place(workdir) / "tokenizer") as folder:
    return tokenizers.load(folder)


def abstract_params(method: Method, mesh: jax.sharding.Mesh | None) -> PyTree:
  """Shapes, dtypes and shardings of a method's parameters; without a mesh, they are on the default device."""
  boxed = jax.eval_shape(method.init, jax.random.key(0))
  shapes = nn.unbox(boxed)
  if mesh is None:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda _: here, shapes)
  else:
    placed = shardings(boxed, mesh)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)


def with_absolute_paths(source: Mapping[str, Any]) -> dict[str, Any]:
  """A nested config with absolute paths, because a run may be read from any working directory."""
  return configs.with_paths(source, storage.absolute, tasks.with_absolute_paths)


def config_record(config: Config, workdir: str | os.PathLike | None = None) -> ConfigRecord:
  """A config in the form in which a work directory records and compares it.

  Fields that `config` does not set are not compared with a run of an earlier version; see `as_started`.

  Args:
    config: the config.
    workdir: the folder of the run. If its checkpoints refer to a base (`cyb_jax.interop.base`), `init_from` may differ,
      because the base may have been moved, and its checksum is compared instead.
  """
  source = with_absolute_paths(config.source)

  def differences(recorded: Mapping[str, Any]) -> list[str]:
    # Version 0.1 did not make paths absolute.
    recorded = with_absolute_paths(recorded)
    if recorded.get("init_from") != source.get("init_from") and workdir is not None:
      meta = newest_meta(workdir)
      if meta is not None and "base" in meta:
        recorded["init_from"] = source.get("init_from")
    return configs.differences(configs.migrated(recorded), configs.continued(source, recorded))

  return ConfigRecord(configs.to_json(dataclasses.replace(config, source=source)), differences)


def as_started(config: Config, workdir: str | os.PathLike) -> Config:
  """The config with which the run in a folder is continued; `config` itself if the folder contains no run.

  If `config` does not set a field whose default has changed since the run was started, the field has the run's value;
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
  """Opens the token store on which a run was trained; the fingerprint identifies it, and its source is not needed.

  Args:
    meta: the JSON object of the run's newest checkpoint; None if there is no checkpoint.
    given: a folder that is searched first; if it is a token store, it must be the run's store. '' means none.

  Returns:
    The store; None if no store is recorded, or if it no longer exists and must be prepared again.

  Raises:
    InputError: the given folder is another store.
  """
  # The token store of a pretrained model from which a run starts is unknown.
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
