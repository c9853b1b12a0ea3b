"""Meshes of devices, and where parameters, optimizer state and batches are placed on them.

`partitioning.rules` has the table from logical axes to mesh axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from cyb_jax.errors import InputError
from cyb_jax.partitioning.rules import AXES, RULES, mesh_axes, parts, spec


class MeshSizes(Protocol):
  """Numbers of devices on the axes of a mesh, such as `configs.ParallelismConfig`.

  Attributes:
    data: -1: all devices that the other axes leave.
    fsdp, tensor: at least 1.
  """

  @property
  def data(self) -> int: ...

  @property
  def fsdp(self) -> int: ...

  @property
  def tensor(self) -> int: ...


def make_mesh(sizes: MeshSizes, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of these sizes over the devices (all of them by default).

  Raises:
    InputError: the product of the sizes is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = [sizes.data, sizes.fsdp, sizes.tensor]
  if sizes.data == -1:
    shape[0] = len(devices) // (sizes.fsdp * sizes.tensor)
  if math.prod(shape) != len(devices):
    raise InputError(
      f"parallelism: data = {sizes.data}, fsdp = {sizes.fsdp}, tensor = {sizes.tensor} don't make up"
      f" {len(devices)} devices; data x fsdp x tensor must (data = -1 takes what the others leave)"
    )
  # Explicit axes, the default of jax.make_mesh, fail at Linen's embedding gather.
  return jax.make_mesh(tuple(shape), AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def data_shards(mesh: Mesh) -> int:
  """The number of parts that a mesh splits the batch into."""
  return parts("batch", mesh)


def check_batch(batch_size: int, shards: int) -> None:
  """Raises InputError if a batch can't be split evenly."""
  if batch_size % shards:
    below = batch_size // shards * shards
    near = f"{below} or {below + shards}" if below else f"{shards}"
    raise InputError(f"data.batch_size: {batch_size} windows don't divide over {shards} devices; try {near}")


def warn_of_replicated_axes(sizes: Mapping[str, tuple[str, int]], mesh: Mesh) -> None:
  """Logs a warning for each mesh axis that does not divide a size that it is meant to split.

  Args:
    sizes: by logical axis, the name of the config field that sets its size, and the size.
    mesh: from `make_mesh`.
  """
  for axis in AXES[1:]:
    split = [name for name in sizes if axis in mesh_axes(name, mesh)]
    whole = [name for name in split if sizes[name][1] % parts(name, mesh)]
    if whole:
      fields = ", ".join(f"{field} = {size}" for field, size in (sizes[name] for name in whole))
      rest = "; they all do the same work" if axis == "tensor" and len(whole) == len(split) else ""
      logging.warning(
        "parallelism.%s = %d doesn't divide %s: on each of these devices that is whole%s",
        axis, mesh.shape[axis], fields, rest,
      )  # fmt: skip


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of batches: rows are split over the axes data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def host_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
  """int64[R]: the rows of a batch that this host's devices hold, ascending.

  Under tensor parallelism several hosts may hold the same row.
  """
  places = sharding.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in places]))


def owned_rows(sharding: NamedSharding, batch_size: int, host: int) -> np.ndarray:
  """bool[R]: whether the host owns each of its `host_rows`.

  The host of the lowest number that holds a row owns the row, so that every row of a batch is counted once.
  """
  first: dict[int, int] = {}
  for device, (rows,) in sharding.devices_indices_map((batch_size,)).items():
    for row in range(*rows.indices(batch_size)):
      first[row] = min(first.get(row, device.process_index), device.process_index)
  return np.array([first[row] == host for row in host_rows(sharding, batch_size).tolist()], bool)


def shard_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """A batch on the devices.

  Args:
    batch: this host's rows of the batch, see `host_rows`.
    sharding: see `batch_sharding`.

  Returns:
    Global arrays of the whole batch, of which this host's devices hold this host's rows.
  """
  shards = data_shards(sharding.mesh)
  here = len(next(iter(batch.values())))
  batch_size = here * shards // len(host_rows(sharding, shards))
  rows = host_rows(sharding, batch_size)

  def sharded(values: np.ndarray) -> jax.Array:
    shape = (batch_size, *values.shape[1:])

    def read(index: tuple[slice, ...]) -> np.ndarray:
      start, stop, _ = index[0].indices(batch_size)
      here = np.searchsorted(rows, [start, stop])
      return values[here[0] : here[1]]

    return jax.make_array_from_callback(shape, sharding, read)

  return {name: sharded(values) for name, values in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def shardings(boxed: PyTree, mesh: Mesh) -> PyTree:
  """A sharding for every leaf of a tree whose leaves are boxed with logical axes.

  An axis that its mesh axis doesn't divide (one kv head over two devices, for instance) is left whole.

  Args:
    boxed: arrays or shapes, boxed as `nn.LogicallyPartitioned`; bare leaves are replicated.
    mesh: from `make_mesh`.

  Returns:
    The unboxed tree, of NamedShardings.
  """
  return jax.tree.map(
    lambda leaf, names: NamedSharding(mesh, spec(np.shape(leaf), names, mesh)),
    nn.unbox(boxed),
    nn.get_partition_spec(boxed),
  )
