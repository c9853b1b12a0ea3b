"""The two ways to run the step: jit over a mesh, and pmap. Both hold the state in their own layout; outside it is one
logical state.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from cyb_jax.configs import Config
from cyb_jax.decoder import DecoderConfig
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


def _axis_sizes(config: DecoderConfig) -> dict[str, tuple[str, int]]:
  """By logical axis, the field that sets its size, and the size; see `warn_of_replicated_axes`."""
  fields = {
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "mlp": "mlp_size",
    "vocab": "vocab_size",
    "embed": "d_model",
  }
  return {axis: (f"decoder.{field}", getattr(config, field)) for axis, field in fields.items()}


class Strategy(Protocol):
  """How a run holds its state and takes its steps."""

  def init(self, params: PyTree | None = None) -> TrainState:
    """A fresh state, placed; the same numbers under every strategy and mesh.

    Args:
      params: to be taken in place of fresh ones, placed as `abstract` says; donated.
    """

  def abstract(self) -> TrainState:
    """Shapes, dtypes and shardings of the logical state, to restore a checkpoint into."""

  def place(self, state: TrainState) -> TrainState:
    """A logical state (as `abstract`), in this strategy's layout."""

  def logical(self, state: TrainState) -> TrainState:
    """The logical state: what is saved and evaluated."""

  def params(self, state: TrainState) -> PyTree:
    """The parameters, on the mesh, to be read and not donated."""

  def rows(self, batch_size: int) -> np.ndarray:
    """int64[R]: which rows of a batch this host reads."""

  def own(self, batch_size: int) -> np.ndarray:
    """bool[R]: which of them are this host's own to count."""

  def put(self, batch: dict[str, Any]) -> Batch:
    """This host's rows of a batch, on the devices."""

  def step(self, state: TrainState, batch: Batch) -> TrainState:
    """One training step; the old state is donated."""

  def compile(self, state: TrainState, batch: Batch) -> jax.stages.Compiled:
    """Compiles the step ahead of its first call; `step` runs this program from then on, on shapes like these alone."""

  def compile_abstract(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> jax.stages.Compiled:
    """Compiles the step for a batch of these shapes, from shapes alone: neither a state nor a batch need be there."""

  def new_totals(self) -> Totals:
    """Zeros, placed."""


class JitStrategy:
  """jit over a mesh with axes data, fsdp, tensor; XLA places the collectives."""

  def __init__(self, config: Config, method: Method, optimizer: optax.GradientTransformation, mesh: Mesh):
    warn_of_replicated_axes(_axis_sizes(method.decoder.config), mesh)
    self._mesh = mesh
    self._init = functools.partial(init_state, method, optimizer, config.train.seed)
    boxed = jax.eval_shape(self._init)
    self._shardings = shardings(boxed, mesh)
    self._shapes = unbox(boxed)
    self._batch_sharding = batch_sharding(mesh)
    step = functools.partial(
      train_step,
      method=method,
      optimizer=optimizer,
      seed=config.train.seed,
      accumulate=config.optimizer.accumulate,
      max_skipped=config.train.max_skipped,
    )
    self._step = jax.jit(
      step, in_shardings=(self._shardings, self._batch_sharding), out_shardings=self._shardings, donate_argnums=0
    )
    self._totals = jax.jit(functools.partial(Totals.zeros, method.num_slots), out_shardings=self._shardings.totals)

  def init(self, params: PyTree | None = None) -> TrainState:
    if params is None:
      return jax.jit(lambda: unbox(self._init()), out_shardings=self._shardings)()
    start = jax.jit(lambda params: self._init(params=params), out_shardings=self._shardings, donate_argnums=0)
    return start(params)

  def abstract(self) -> TrainState:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self._shapes, self._shardings)

  def place(self, state: TrainState) -> TrainState:
    return state

  def logical(self, state: TrainState) -> TrainState:
    return state

  def params(self, state: TrainState) -> PyTree:
    return state.params

  def rows(self, batch_size: int) -> np.ndarray:
    return host_rows(self._batch_sharding, batch_size)

  def own(self, batch_size: int) -> np.ndarray:
    return owned_rows(self._batch_sharding, batch_size, jax.process_index())

  def put(self, batch: dict[str, Any]) -> Batch:
    return shard_batch(batch, self._batch_sharding)

  def step(self, state: TrainState, batch: Batch) -> TrainState:
    with jax.set_mesh(self._mesh):
      return self._step(state, batch)

  def compile(self, state: TrainState, batch: Batch) -> jax.stages.Compiled:
    with jax.set_mesh(self._mesh):
      self._step = self._step.lower(state, batch).compile()
    return self._step

  def compile_abstract(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> jax.stages.Compiled:
    placed = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._batch_sharding) for k, x in batch.items()}
    with jax.set_mesh(self._mesh):
      return self._step.lower(self.abstract(), placed).compile()

  def new_totals(self) -> Totals:
    return self._totals()


class PmapStrategy:
  """pmap: the state on every device, the batch split between them, sums reduced by psum."""

  def __init__(self, config: Config, method: Method, optimizer: optax.GradientTransformation, mesh: Mesh):
    self._devices = list(mesh.devices.flat)
    # Of this host: what pmap is given, and gives, has an axis of these.
    self._local = [device for device in self._devices if device.process_index == jax.process_index()]
    self._everywhere = replicated(mesh)
    self._batch_sharding = batch_sharding(mesh)
    self._init = functools.partial(init_state, method, optimizer, config.train.seed)
    self._num_slots = method.num_slots
    self._step = jax.pmap(
      functools.partial(
        train_step,
        method=method,
        optimizer=optimizer,
        seed=config.train.seed,
        accumulate=config.optimizer.accumulate,
        max_skipped=config.train.max_skipped,
        axis_name="data",
      ),
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
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._everywhere), shapes)

  def place(self, state: TrainState) -> TrainState:
    return self._replicate(jax.tree.map(lambda x: x.addressable_data(0), state))

  def _replicate(self, tree: PyTree) -> PyTree:
    spread = jax.pmap(lambda _, tree: tree, in_axes=(0, None), devices=self._devices)
    return spread(jnp.arange(len(self._local)), tree)

  def logical(self, state: TrainState) -> TrainState:
    # Every device's own copy; they are equal, bit for bit, since all apply the same reduced gradient.
    def joined(x: jax.Array) -> jax.Array:
      copies = [shard.data.reshape(x.shape[1:]) for shard in x.addressable_shards]
      return jax.make_array_from_single_device_arrays(x.shape[1:], self._everywhere, copies)

    return jax.tree.map(joined, state)

  def params(self, state: TrainState) -> PyTree:
    return self.logical(state).params

  def rows(self, batch_size: int) -> np.ndarray:
    return host_rows(self._batch_sharding, batch_size)

  def own(self, batch_size: int) -> np.ndarray:
    return owned_rows(self._batch_sharding, batch_size, jax.process_index())

  def put(self, batch: dict[str, Any]) -> Batch:
    return {k: v.reshape(len(self._local), -1, *v.shape[1:]) for k, v in batch.items()}

  def step(self, state: TrainState, batch: Batch) -> TrainState:
    return self._step(state, batch)

  def compile(self, state: TrainState, batch: Batch) -> jax.stages.Compiled:
    self._step = self._step.lower(state, batch).compile()
    return self._step

  def compile_abstract(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> jax.stages.Compiled:
    count = len(self._devices)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), self.abstract())
    split = {k: jax.ShapeDtypeStruct((count, x.shape[0] // count, *x.shape[1:]), x.dtype) for k, x in batch.items()}
    return self._step.lower(state, split).compile()

  def new_totals(self) -> Totals:
    return self._replicate(Totals.zeros(self._num_slots))


STRATEGIES = {"jit": JitStrategy, "pmap": PmapStrategy}


def build_strategy(config: Config, method: Method, optimizer: optax.GradientTransformation, mesh: Mesh) -> Strategy:
  """The configured strategy over the devices of a mesh."""
  return STRATEGIES[config.parallelism.strategy](config, method, optimizer, mesh)


def with_new_totals(strategy: Strategy, state: TrainState) -> TrainState:
  """The state with its totals set to zero."""
  return dataclasses.replace(state, totals=strategy.new_totals())
