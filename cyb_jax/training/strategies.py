"""The two strategies for running the training step: jit over a mesh, and pmap.

Each strategy has its own layout of the state. The global state, which does not depend on the strategy, is saved,
restored and evaluated.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from cyb_jax.configs import Config
from cyb_jax.methods import Batch, Method
from cyb_jax.partitioning.mesh import (
  batch_sharding,
  host_rows,
  owned_rows,
  replicated,
  shard_batch,
  shardings,
  warn_of_replicated_axes,
)
from cyb_jax.training.step import Totals, TrainState, init_state, train_step, unbox

Tree = TypeVar("Tree")


class Strategy(abc.ABC):
  """The layout of a run's state, and the execution of its steps.

  Args:
    config: the config of the run.
    method: computes losses from parameters and a batch.
    optimizer: see `optimizer.make_optimizer`.
    mesh: the mesh of the devices.
  """

  _step: Any  # the compiled or the jitted step, (state, batch) -> state

  def __init__(self, config: Config, method: Method, optimizer: optax.GradientTransformation, mesh: Mesh):
    self._batch_sharding = batch_sharding(mesh)
    self._init = functools.partial(init_state, method, optimizer, config.train.seed)
    self._train_step = functools.partial(
      train_step,
      method=method,
      optimizer=optimizer,
      seed=config.train.seed,
      accumulate=config.optimizer.accumulate,
      max_skipped=config.train.max_skipped,
    )
    self._zero_totals = functools.partial(Totals.zeros, method.num_slots)

  @abc.abstractmethod
  def init(self, params: PyTree | None = None) -> TrainState:
    """A new state in this strategy's layout; its values do not depend on the strategy and the mesh.

    Args:
      params: parameters that replace the newly initialised ones, with the shardings of `abstract`; they are donated.
    """

  @abc.abstractmethod
  def abstract(self) -> TrainState:
    """Shapes, dtypes and shardings of the global state, with which a checkpoint is restored."""

  @abc.abstractmethod
  def place(self, state: TrainState) -> TrainState:
    """A global state (see `abstract`) in this strategy's layout."""

  @abc.abstractmethod
  def global_state(self, state: Tree) -> Tree:
    """The global state, which is saved and evaluated; the argument may be any part of the state."""

  @abc.abstractmethod
  def params(self, state: TrainState) -> PyTree:
    """The global parameters on the mesh; the caller must not donate them."""

  def rows(self, batch_size: int) -> np.ndarray:
    """int64[R]: the rows of a batch that this host reads."""
    return host_rows(self._batch_sharding, batch_size)

  def owned_rows(self, batch_size: int) -> np.ndarray:
    """bool[R]: whether this host counts each of its `rows`; of all hosts that read a row, exactly one counts it."""
    return owned_rows(self._batch_sharding, batch_size, jax.process_index())

  @abc.abstractmethod
  def shard_batch(self, batch: dict[str, Any]) -> Batch:
    """A batch for `step` from this host's rows."""

  def step(self, state: TrainState, batch: Batch) -> TrainState:
    """One training step; the old state is donated."""
    with self._mesh_context():
      return self._step(state, batch)

  def compile(self, state: TrainState, batch: Batch) -> jax.stages.Compiled:
    """Compiles the step before its first call; `step` then runs this program and accepts only these shapes."""
    with self._mesh_context():
      self._step = self._step.lower(state, batch).compile()
    return self._step

  def compile_abstract(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> jax.stages.Compiled:
    """Compiles the step for a global batch of these shapes; no arrays are needed."""
    state, batch = self._abstract_arguments(batch)
    with self._mesh_context():
      return self._step.lower(state, batch).compile()

  @abc.abstractmethod
  def new_totals(self) -> Totals:
    """Totals of zero, in this strategy's layout."""

  @abc.abstractmethod
  def _mesh_context(self) -> contextlib.AbstractContextManager[Any]:
    """The context under which the step is traced and run."""

  @abc.abstractmethod
  def _abstract_arguments(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[TrainState, Batch]:
    """Shapes of the step's arguments, for a global batch of the given shapes."""


class JitStrategy(Strategy):
  """jit over a mesh with axes data, fsdp and tensor; XLA inserts the collectives."""

  def __init__(self, config: Config, method: Method, optimizer: optax.GradientTransformation, mesh: Mesh):
    super().__init__(config, method, optimizer, mesh)
    warn_of_replicated_axes(method.decoder.config, mesh)
    self._mesh = mesh
    boxed = jax.eval_shape(self._init)
    self._shardings = shardings(boxed, mesh)
    self._shapes = unbox(boxed)
    self._step = jax.jit(
      self._train_step,
      in_shardings=(self._shardings, self._batch_sharding),
      out_shardings=self._shardings,
      donate_argnums=0,
    )
    self._totals = jax.jit(self._zero_totals, out_shardings=self._shardings.totals)

  def init(self, params: PyTree | None = None) -> TrainState:
    if params is None:
      return jax.jit(lambda: unbox(self._init()), out_shardings=self._shardings)()
    start = jax.jit(lambda params: self._init(params=params), out_shardings=self._shardings, donate_argnums=0)
    return start(params)

  def abstract(self) -> TrainState:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self._shapes, self._shardings)

  def place(self, state: TrainState) -> TrainState:
    return state

  def global_state(self, state: Tree) -> Tree:
    return state

  def params(self, state: TrainState) -> PyTree:
    return state.params

  def shard_batch(self, batch: dict[str, Any]) -> Batch:
    return shard_batch(batch, self._batch_sharding)

  def new_totals(self) -> Totals:
    return self._totals()

  def _mesh_context(self) -> contextlib.AbstractContextManager[Any]:
    return jax.set_mesh(self._mesh)

  def _abstract_arguments(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[TrainState, Batch]:
    placed = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._batch_sharding) for k, x in batch.items()}
    return self.abstract(), placed


def devices_by_host(mesh: Mesh) -> list[jax.Device]:
  """The devices of a mesh, those of a host together as pmap requires; a mesh follows the links between the chips."""
  return sorted(mesh.devices.flat, key=lambda device: device.process_index)


class PmapStrategy(Strategy):
  """pmap: every device has a copy of the state and a part of the batch; psum reduces the sums.

  Arrays in this layout have a leading axis over this host's devices.
  """

  def __init__(self, config: Config, method: Method, optimizer: optax.GradientTransformation, mesh: Mesh):
    super().__init__(config, method, optimizer, mesh)
    self._devices = devices_by_host(mesh)
    self._local = [device for device in self._devices if device.process_index == jax.process_index()]
    self._replicated = replicated(mesh)
    self._step = jax.pmap(
      functools.partial(self._train_step, axis_name="data"),
      axis_name="data",
      devices=self._devices,
      donate_argnums=0,
    )

  def init(self, params: PyTree | None = None) -> TrainState:
    if params is None:
      return self.place(jax.jit(lambda: unbox(self._init()))())
    return self.place(jax.jit(lambda params: self._init(params=params), donate_argnums=0)(params))

  def abstract(self) -> TrainState:
    shapes = unbox(jax.eval_shape(self._init))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._replicated), shapes)

  def place(self, state: TrainState) -> TrainState:
    return self._replicate(jax.tree.map(lambda x: x.addressable_data(0), state))

  def _replicate(self, tree: PyTree) -> PyTree:
    spread = jax.pmap(lambda _, tree: tree, in_axes=(0, None), devices=self._devices)
    return spread(jnp.arange(len(self._local)), tree)

  def global_state(self, state: Tree) -> Tree:
    # The devices' copies are bitwise equal, because all devices apply the same reduced gradient.
    def joined(x: jax.Array) -> jax.Array:
      copies = [shard.data.reshape(x.shape[1:]) for shard in x.addressable_shards]
      return jax.make_array_from_single_device_arrays(x.shape[1:], self._replicated, copies)

    return jax.tree.map(joined, state)

  def params(self, state: TrainState) -> PyTree:
    return self.global_state(state).params

  def shard_batch(self, batch: dict[str, Any]) -> Batch:
    return {k: v.reshape(len(self._local), -1, *v.shape[1:]) for k, v in batch.items()}

  def new_totals(self) -> Totals:
    return self._replicate(self._zero_totals())

  def _mesh_context(self) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()

  def _abstract_arguments(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[TrainState, Batch]:
    count = len(self._devices)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), self.abstract())
    split = {k: jax.ShapeDtypeStruct((count, x.shape[0] // count, *x.shape[1:]), x.dtype) for k, x in batch.items()}
    return state, split


STRATEGIES = {"jit": JitStrategy, "pmap": PmapStrategy}


def build_strategy(config: Config, method: Method, optimizer: optax.GradientTransformation, mesh: Mesh) -> Strategy:
  """The configured strategy over the devices of a mesh."""
  return STRATEGIES[config.parallelism.strategy](config, method, optimizer, mesh)


def with_new_totals(strategy: Strategy, state: TrainState) -> TrainState:
  """The state with its totals set to zero."""
  return dataclasses.replace(state, totals=strategy.new_totals())
