"""Meshes of devices, and where parameters, optimizer state and batches lie on them; the rules are in `placement`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from cyb_jax.configs import ParallelismConfig
from cyb_jax.decoder import DecoderConfig
from cyb_jax.errors import InputError
from cyb_jax.partitioning.rules import AXES, RULES, mesh_axes, parts, spec


def make_mesh(config: ParallelismConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of a config over the devices (all of them by default).

  Raises:
    InputError: the axes don't make up the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [config.data, config.fsdp, config.tensor]
  rest = config.fsdp * config.tensor
  if config.data == -1:
    sizes[0] = len(devices) // rest
  if math.prod(sizes) != len(devices):
    raise InputError(
      f"parallelism: data = {config.data}, fsdp = {config.fsdp}, tensor = {config.tensor} don't make up"
      f" {len(devices)} devices; data x fsdp x tensor must (data = -1 takes what the others leave)"
    )
  # Explicit axes, the default of jax.make_mesh, fail at Linen's embedding gather.
  return jax.make_mesh(tuple(sizes), AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def data_shards(mesh: Mesh) -> int:
  """Into how many parts the batch is split."""
  return parts("batch", mesh)


def check_batch(batch_size: int, shards: int) -> None:
  """Raises InputError if a batch can't be split evenly."""
  if batch_size % shards:
    below = batch_size // shards * shards
    near = f"{below} or {below + shards}" if below else f"{shards}"
    raise InputError(f"data.batch_size: {batch_size} windows don't divide over {shards} devices; try {near}")


def tell_whole(config: DecoderConfig, mesh: Mesh) -> None:
  """Warns of what a mesh is to split and can't."""
  names = {
    "num_heads": "heads",
    "num_kv_heads": "kv_heads",
    "mlp_size": "mlp",
    "vocab_size": "vocab",
    "d_model": "embed",
  }
  for axis in AXES[1:]:
    over = {field: name for field, name in names.items() if axis in mesh_axes(name, mesh)}
    whole = [field for field, name in over.items() if getattr(config, field) % parts(name, mesh)]
    if whole:
      sizes = ", ".join(f"decoder.{field} = {getattr(config, field)}" for field in whole)
      rest = "; they all do the same work" if axis == "tensor" and len(whole) == len(over) else ""
      logging.warning(
        "parallelism.%s = %d doesn't divide %s: on each of these devices that is whole%s",
        axis, mesh.shape[axis], sizes, rest,
      )  # fmt: skip


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def host_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
  """int64[R]: which rows of a batch this host's devices hold, ascending; hosts may share rows (tensor parallelism)."""
  places = sharding.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in places]))


def own_rows(sharding: NamedSharding, batch_size: int, host: int) -> np.ndarray:
  """bool[R]: which of the `host_rows` of this host no host of a lower number holds; every row is one host's own."""
  first: dict[int, int] = {}
  for device, (rows,) in sharding.devices_indices_map((batch_size,)).items():
    for row in range(*rows.indices(batch_size)):
      first[row] = min(first.get(row, device.process_index), device.process_index)
  return np.array([first[row] == host for row in host_rows(sharding, batch_size).tolist()], bool)


def put_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """A batch on the devices.

  Args:
    batch: this host's rows of it, `host_rows`.
    sharding: see `batch_sharding`.
  """
  shards = data_shards(sharding.mesh)
  here = len(next(iter(batch.values())))
  batch_size = here * shards // len(host_rows(sharding, shards))
  rows = host_rows(sharding, batch_size)

  def put(values: np.ndarray) -> jax.Array:
    shape = (batch_size, *values.shape[1:])

    def read(index: tuple[slice, ...]) -> np.ndarray:
      start, stop, _ = index[0].indices(batch_size)
      here = np.searchsorted(rows, [start, stop])
      return values[here[0] : here[1]]

    return jax.make_array_from_callback(shape, sharding, read)

  return {name: put(values) for name, values in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def shardings(boxed: PyTree, mesh: Mesh) -> PyTree:
  """A sharding for every leaf of a tree whose leaves are boxed with logical axes.

  An axis that doesn't divide over its mesh axis (one kv head over two devices, say) is left whole.

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
