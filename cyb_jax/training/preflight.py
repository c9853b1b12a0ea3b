"""The checks of a run, including the agreement of its hosts, before anything is written in its work directory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cyb_jax import configs, runs, storage
from cyb_jax.checkpointing.workdir import check_fingerprint, check_workdir, newest_meta
from cyb_jax.configs import Config
from cyb_jax.data import TokenStore
from cyb_jax.data.tasks import has_targets
from cyb_jax.data.tokenizers import trained_pieces
from cyb_jax.distributed.agreement import own_facts
from cyb_jax.distributed.cluster import Cluster
from cyb_jax.errors import InputError
from cyb_jax.interop import pretrained
from cyb_jax.interop.base import Base
from cyb_jax.interop.pretrained import Pretrained
from cyb_jax.methods import Method, Scheduled
from cyb_jax.training.layout import mesh_of_run, methods_of_run
from cyb_jax.training.run_data import abstract_batch, check_names, num_steps, open_batches, open_recorded_or_new_store
from cyb_jax.training.step import TrainState
from cyb_jax.training.trackers import check_installed


@dataclasses.dataclass(frozen=True)
class RunPlan:
  """A run that has passed its checks.

  Attributes:
    config: the validated config.
    cluster: the hosts of the run.
    mesh: the mesh of all devices.
    method: the method of a training step.
    evaluated: the method of an evaluation, see `layout.methods_of_run`.
    store: the token store.
    steps: the total number of steps of the run.
    meta: the JSON object of the newest checkpoint; None if there is no checkpoint.
    start: the opened `init_from`; None if the run has a checkpoint or starts from newly initialised parameters.
    base: the base to which the run's checkpoints refer; None if they contain all parameters.
    profile: the number of steps to trace.
  """

  config: Config
  cluster: Cluster
  mesh: Mesh
  method: Method
  evaluated: Method
  store: TokenStore
  steps: int
  meta: dict[str, Any] | None
  start: Pretrained | None
  base: Base | None
  profile: int

  def saved_part(self, state: TrainState) -> TrainState:
    """The part of a global state that checkpoints contain; its leaves are of any kind."""
    return state if self.base is None else dataclasses.replace(state, params=self.base.saved_part(state.params))


def preflight(config: Config, workdir: str | os.PathLike, *, profile: int, cluster: Cluster) -> RunPlan:
  """Checks a run; all hosts must call this function.

  A token store that does not exist yet is prepared. Nothing is written in the work directory.

  Args:
    config, workdir, profile, cluster: see `trainer.train`.

  Raises:
    InputError: the input is invalid, or the hosts differ.
  """
  check_names(config)
  if cluster.index == 0:  # other hosts need none
    check_installed(config.train.trackers)
  _agree(config, workdir, profile, cluster)
  mesh = mesh_of_run(config)
  meta = newest_meta(workdir)
  start = _check_start(config) if meta is None else None
  store = _open_store(config, meta, cluster)
  method, evaluated = methods_of_run(config, store.vocab_size, mesh)
  steps = num_steps(config, open_batches(config, store))
  if start is not None:
    start.check(method, store.tokenizer, config)
  method.validate_data(store, config.data.sequence_length)
  _check_attention(config, method, mesh)
  base = _base(config, workdir, method, meta, start)
  # Hosts may have their bases in different folders.
  cluster.agree({"checksum of init_from": None if base is None else base.source.reference.checksum}, seconds=None)
  if isinstance(method, Scheduled):
    method = method.with_steps(steps)
  return RunPlan(config, cluster, mesh, method, evaluated, store, steps, meta, start, base, profile)


def _agree(config: Config, workdir: str | os.PathLike, profile: int, cluster: Cluster) -> None:
  """Checks that all hosts have the same config, and that it may run in the work directory."""
  source = json.loads(configs.to_json(config))
  # Hosts may have their stores in different folders; the contents are compared when the stores are open. However, they
  # must agree on whether data.store is set, because all hosts then wait until host 0 has opened it.
  source["data"] |= {"store": "a folder" if config.data.store else ""}
  cluster.agree({"config": source, "workdir": str(workdir), **own_facts()})
  if profile and storage.in_bucket(workdir):
    raise InputError(f"--profile: {profile}, but no trace can be written to {workdir}; give a --workdir on a disk")
  if cluster.index == 0:  # the result is the same on all hosts, and some file systems allow only one writer at a time
    check_workdir(workdir, runs.config_record(config, workdir))
  cluster.barrier()


def _check_start(config: Config) -> Pretrained | None:
  """Checks a run without a checkpoint before its token store is prepared; returns the opened `init_from`."""
  start = pretrained.open_pretrained(config.init_from) if config.init_from else None
  config.decoder_config(trained_pieces(config.tokenizer))
  if not config.data.store:
    config.build_method().validate_data(_DeclaredData.of(config), config.data.sequence_length)
  return start


def _base(
  config: Config, workdir: str | os.PathLike, method: Method, meta: dict[str, Any] | None, start: Pretrained | None
) -> Base | None:
  """The base of the run, see `cyb_jax.interop.base`; a continued run saves the same parts as before."""
  if meta is not None:
    return pretrained.open_base(workdir, config.init_from, method, meta, "--config.init_from")
  return None if start is None or config.tuning.weights == "all" else Base(start, method)


def _open_store(config: Config, meta: dict[str, Any] | None, cluster: Cluster) -> TokenStore:
  """Opens the run's token store, which must be the same on all hosts; a missing store is prepared."""
  with _host_0_first(cluster) if config.data.store else contextlib.nullcontext():
    store = open_recorded_or_new_store(config, meta)
  check_fingerprint(store, meta)
  # Hosts may prepare separate stores, for which they need different times, so there is no time limit.
  trained = None if meta is None else meta["train_tokens"]
  cluster.agree({"token store": store.fingerprint, "tokens trained on": trained}, seconds=None)
  return store


@contextlib.contextmanager
def _host_0_first(cluster: Cluster) -> Iterator[None]:
  """The other hosts run the `with` block after host 0, which prepares a store that all hosts share."""
  if cluster.index:
    cluster.barrier()
  yield
  if not cluster.index:
    cluster.barrier()


@dataclasses.dataclass(frozen=True)
class _DeclaredData:
  """The properties of an unprepared task's data, as the task declares them; see `methods.DataFacts`."""

  task: str
  partly_weighted: bool
  splits: tuple[str, ...] = ()

  @classmethod
  def of(cls, config: Config) -> _DeclaredData:
    """The data of a config.

    Raises:
      InputError: an option is unknown, or a value has the wrong type.
    """
    sources = [(item.name, item.options) for item in config.mixture()] or [(config.data.task, config.task_options())]
    # A source that is a token store is checked when it is opened.
    partly = any("/" in name or has_targets(name, options) for name, options in sources)
    return cls(config.data.mixture or config.data.task, partly)

  def has_prefixes(self, split: str) -> bool:
    del split
    return self.partly_weighted

  def prefixes(self, split: str, sequence_length: int) -> np.ndarray:
    raise LookupError(f"{self.task} has no split {split} of {sequence_length} tokens yet")


def _check_attention(config: Config, method: Method, mesh: Mesh) -> None:
  """Raises InputError if the configured attention kernel does not support this run.

  A kernel checks its arguments when it is traced, so the loss is traced here, before anything is written; so does a
  table of learned positions, which has no fractions.
  """
  if method.decoder.config.attention in ("auto", "xla") and method.decoder.config.learned_positions is None:
    return

  def loss(params, batch):
    return method.loss(params, batch, jax.random.key(0), 0).loss

  with jax.set_mesh(mesh):
    jax.eval_shape(loss, runs.abstract_params(method, mesh), abstract_batch(config, config.data.batch_size))
