"""Meshes of devices, and the shardings of parameters, optimizer state and batches on them.

The rules from logical axes to mesh axes are in `cyb_jax.partitioning.rules`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from cyb_jax.errors import InputError
from cyb_jax.partitioning.rules import AXES, RULES, mesh_axes, parts, spec


class MeshSizes(Protocol):
  """The number of devices along each mesh axis, for instance `configs.ParallelismConfig`; `data` may be -1."""

  @property
  def data(self) -> int: ...
  @property
  def fsdp(self) -> int: ...
  @property
  def tensor(self) -> int: ...


class DecoderSizes(Protocol):
  """The sizes of a decoder that a mesh may split, for instance `decoder.DecoderConfig`."""

  @property
  def num_heads(self) -> int: ...
  @property
  def num_kv_heads(self) -> int: ...
  @property
  def mlp_size(self) -> int: ...
  @property
  def vocab_size(self) -> int: ...
  @property
  def d_model(self) -> int: ...


def make_mesh(config: MeshSizes, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh with the axes `data`, `fsdp` and `tensor`.

  Args:
    config: the sizes of the axes; data = -1 means the number of devices divided by fsdp x tensor.
    devices: the devices of the mesh; None means all devices.

  Raises:
    InputError: the product of the sizes is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [config.data, config.fsdp, config.tensor]
  rest = config.fsdp * config.tensor
  if config.data == -1:
    sizes[0] = len(devices) // rest
  if math.prod(sizes) != len(devices):
    raise InputError(
      f"parallelism: data = {config.data}, fsdp = {config.fsdp}, tensor = {config.tensor}; give sizes with data x fsdp"
      f" x tensor = {len(devices)}, the number of devices (data = -1 uses all devices)"
    )
  # Explicit axes, the default of jax.make_mesh, fail at Linen's embedding gather.
  return jax.make_mesh(tuple(sizes), AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def data_shards(mesh: Mesh) -> int:
  """Returns the number of parts into which the mesh splits a batch."""
  return parts("batch", mesh)


def check_batch(batch_size: int, shards: int) -> None:
  """Raises InputError if `batch_size` is not a multiple of `shards`."""
  if batch_size % shards:
    below = batch_size // shards * shards
    near = f"{below} or {below + shards}" if below else f"{shards}"
    raise InputError(f"data.batch_size: {batch_size} is not divisible by {shards} devices; give {near}")


def warn_of_replicated_axes(config: DecoderSizes, mesh: Mesh) -> None:
  """Logs a warning for each mesh axis that does not divide a size, so that the corresponding arrays are not split."""
  names = {
    "num_heads": "heads",
    "num_kv_heads": "kv_heads",
    "mlp_size": "mlp",
    "vocab_size": "vocab",
    "d_model": "embed",
  }
  for axis in AXES[1:]:
    over = {field: name for field, name in names.items() if axis in mesh_axes(name, mesh)}
    unsplit = [field for field, name in over.items() if getattr(config, field) % parts(name, mesh)]
    if unsplit:
      sizes = ", ".join(f"decoder.{field} = {getattr(config, field)}" for field in unsplit)
      rest = ", and they repeat the same computation" if axis == "tensor" and len(unsplit) == len(over) else ""
      logging.warning(
        "parallelism.%s = %d doesn't divide %s: these axes are replicated on the devices%s",
        axis, mesh.shape[axis], sizes, rest,
      )  # fmt: skip


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: its rows are split over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def host_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
  """Returns int64[R]: the rows of a batch on the devices of this host, ascending.

  With tensor parallelism, several hosts may have the same row.
  """
  places = sharding.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in places]))


def owned_rows(sharding: NamedSharding, batch_size: int, host: int) -> np.ndarray:
  """Returns bool[R]: for each of the `host_rows` of this host, whether no host with a lower number has the row.

  Every row is therefore owned by exactly one host.
  """
  first: dict[int, int] = {}
  # jax's devices have no static type, so a type checker knows none of their attributes.
  places: Mapping[Any, Any] = sharding.devices_indices_map((batch_size,))
  for device, (rows,) in places.items():
    for row in range(*rows.indices(batch_size)):
      first[row] = min(first.get(row, device.process_index), device.process_index)
  return np.array([first[row] == host for row in host_rows(sharding, batch_size).tolist()], bool)


def shard_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """Returns a batch as global arrays on the devices.

  Args:
    batch: the rows of this host (see `host_rows`); the first axis of every array has size R.
    sharding: see `batch_sharding`.
  """
  shards = parts("batch", sharding.mesh)
  here = len(next(iter(batch.values())))
  batch_size = here * shards // len(host_rows(sharding, shards))
  rows = host_rows(sharding, batch_size)

  def sharded(values: np.ndarray) -> jax.Array:
    shape = (batch_size, *values.shape[1:])

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
      start, stop, _ = (slice(None) if index is None else index[0]).indices(batch_size)
      here = np.searchsorted(rows, [start, stop])
      return values[here[0] : here[1]]

    return jax.make_array_from_callback(shape, sharding, read)

  return {name: sharded(values) for name, values in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that is replicated on all devices."""
  return NamedSharding(mesh, PartitionSpec())


def shardings(boxed: PyTree, mesh: Mesh) -> PyTree:
  """Returns a sharding for every leaf of a tree whose leaves are boxed with their logical axes.

  An axis whose size is not a multiple of its mesh axis (for instance one kv head over two devices) is not split.

  Args:
    boxed: arrays or shapes, boxed as `nn.LogicallyPartitioned`; leaves without a box are replicated.
    mesh: the mesh.

  Returns:
    The unboxed tree, with a NamedSharding at every leaf.
  """
  return jax.tree.map(
    lambda leaf, names: NamedSharding(mesh, spec(np.shape(leaf), names, mesh)),
    nn.unbox(boxed),
    nn.get_partition_spec(boxed),
  )
