"""The layout of a run on devices: its mesh, its methods, its strategy."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from cyb_jax.configs import Config
from cyb_jax.methods import Method
from cyb_jax.partitioning.mesh import check_batch, data_shards, make_mesh
from cyb_jax.training.optimizer import optimizer_of
from cyb_jax.training.strategies import Strategy, build_strategy


def mesh_of_run(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of a run over devices, by default all devices.

  Raises:
    InputError: the sizes of the mesh don't match the number of devices, or the batch can't be split evenly.
  """
  mesh = make_mesh(config.parallelism, devices)
  check_batch(config.data.batch_size, data_shards(mesh) * config.optimizer.accumulate)
  return mesh


def methods_of_run(config: Config, vocab_size: int | None, mesh: Mesh) -> tuple[Method, Method]:
  """(method of a training step, method of an evaluation); they have the same parameters.

  They differ under pmap: a training step then gets one device's part of the batch, but an evaluation runs under jit.

  Args:
    config: the config of the run.
    vocab_size: the size of the vocabulary; None means the number of rows of the decoder's tables.
    mesh: see `mesh_of_run`.
  """
  evaluated = config.build_method(vocab_size, data_shards=data_shards(mesh))
  if config.parallelism.strategy != "pmap":
    return evaluated, evaluated
  return config.build_method(vocab_size, data_shards=1), evaluated


def strategy_of_run(config: Config, method: Method, mesh: Mesh, steps: int) -> Strategy:
  """The strategy of a run.

  Args:
    config: the config of the run.
    method: the method of a training step, see `methods_of_run`.
    mesh: see `mesh_of_run`.
    steps: the length of the schedule; it does not affect shapes.
  """
  return build_strategy(config, method, optimizer_of(config, method, steps), mesh)
