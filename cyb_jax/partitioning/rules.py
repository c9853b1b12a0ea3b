"""How arrays are split over a mesh of devices: one table from logical axes to mesh axes.

Every package may import this module, which needs jax alone.

Mesh axes: `data` splits the batch; `fsdp` splits the batch and the parameters; `tensor` splits heads, mlp and
vocabulary.

The results are the same under every mesh. Code that is traced under a mesh (`jax.set_mesh`) gets the mesh from
`current_mesh` and constrains its activations with `constrain`; XLA then places the collectives. Only the readout places
its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# The rows of activations are split over all axes that split the batch. The width of a parameter is split over fsdp; the
# width of activations is whole. Parallel parts of a layer are split over tensor, in parameters and activations alike.
# Layers, norms and logical axes without an entry are replicated.
RULES: dict[str, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
  "batch_of_data": ("data",),  # for activations that are sent to the devices of the parameters
  "embed": ("fsdp",),
  "vocab": ("tensor",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "mlp": ("tensor",),
}


def current_mesh() -> AbstractMesh | None:
  """The mesh of the trace; None where there is no mesh, or only one device.

  Inside pmap and shard_map there is no mesh: arrays there belong to one device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return None
  return mesh


def mesh_axes(name: str | None, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  """The axes of a mesh that split a logical axis, without axes of one device."""
  return tuple(axis for axis in RULES.get(name, ()) if mesh.shape.get(axis, 1) > 1)


def parts(name: str | None, mesh: Mesh | AbstractMesh) -> int:
  """The number of parts that a mesh splits a logical axis into, where it divides."""
  return math.prod(mesh.shape[axis] for axis in mesh_axes(name, mesh))


def spec(shape: Sequence[int], names: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """The PartitionSpec of an array.

  Args:
    shape: the shape of the array.
    names: the logical axes of its first axes. None: the axis is whole, as all further axes are. An axis that its mesh
      axes don't divide (one kv head over two devices, for instance) is whole too.
    mesh: the mesh.
  """
  placed = []
  for size, name in zip(shape, names):
    axes = mesh_axes(name, mesh)
    whole = not axes or size % parts(name, mesh)
    placed.append(None if whole else axes if len(axes) > 1 else axes[0])
  return PartitionSpec(*placed)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """An activation, constrained to the sharding of `spec` on the current mesh; unchanged where there is no mesh."""
  mesh = current_mesh()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, spec(x.shape, names, mesh))
