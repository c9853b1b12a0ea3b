"""The sharding of arrays over a mesh of devices: a single table from logical axes to mesh axes.

The core imports this module, so it needs only jax.

Mesh axes: `data` splits the batch; `fsdp` splits the batch and the parameters; `tensor` splits heads, mlp and
vocabulary.

The computed values do not depend on the mesh. Code that is traced under a mesh (`jax.set_mesh`) constrains the sharding
of its activations with `constrain`, and XLA inserts the communication. Only the readout communicates explicitly,
because it needs less communication than XLA would insert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# The batch axis of activations is split over data and fsdp. The model width is split over fsdp in parameters, but not
# in activations. The parallel axes of a layer are split over tensor, in parameters and in activations. Logical axes
# that are not in the table (layers, norms) are replicated.
RULES: dict[str, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
  "batch_of_data": ("data",),  # activations that are gathered over fsdp, where the parameters are split
  "embed": ("fsdp",),
  "vocab": ("tensor",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "mlp": ("tensor",),
}


def current_mesh() -> AbstractMesh | None:
  """Returns the mesh of the current trace, or None if there is no mesh or only one device.

  Inside pmap and shard_map the result is None, because their arrays are local to one device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return None
  return mesh


def target_platform() -> str:
  """Returns the platform that the traced program will run on, such as 'tpu', which may differ from this machine's.

  It is that of the mesh in whose context the program is traced, else that of JAX's default backend.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def target_kind() -> str:
  """Returns the kind of device that the traced program will run on, such as 'TPU v5 lite'; see `target_platform`."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return str(jax.devices()[0].device_kind if device is None else device.device_kind)


def mesh_axes(name: str | None, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  """Returns the mesh axes of size above 1 that split a logical axis; no mesh axis splits an axis named None."""
  return tuple(axis for axis in RULES.get(name or "", ()) if mesh.shape.get(axis, 1) > 1)


def parts(name: str | None, mesh: Mesh | AbstractMesh) -> int:
  """Returns the number of parts into which a mesh splits a logical axis whose size is a multiple of this number."""
  return math.prod(mesh.shape[axis] for axis in mesh_axes(name, mesh))


def spec(shape: Sequence[int], names: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """Returns the partition spec of an array.

  Args:
    shape: the shape of the array.
    names: the logical axes of its first axes. An axis named None, an axis after the last name, and an axis whose size
      is not a multiple of its mesh axes (for instance one kv head over two devices) are not split.
    mesh: the mesh.

  Example:
    >>> mesh = AbstractMesh((2, 2, 2), AXES)
    >>> tuple(spec((8, 16, 3), ("batch", None, "heads"), mesh))
    (('data', 'fsdp'), None, None)
  """
  placed: list[str | tuple[str, ...] | None] = []
  for size, name in zip(shape, names):
    axes = mesh_axes(name, mesh)
    unsplit = not axes or size % parts(name, mesh)
    placed.append(None if unsplit else axes if len(axes) > 1 else axes[0])
  return PartitionSpec(*placed)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Constrains an activation to the sharding of `spec` under the mesh of the current trace.

  Args:
    x: the activation; it is returned unchanged if there is no mesh.
    *names: the logical axes of its first axes, see `spec`.
  """
  mesh = current_mesh()
  if mesh is None:
    return x
  constrained: jax.Array = jax.lax.with_sharding_constraint(x, spec(x.shape, names, mesh))
  return constrained
