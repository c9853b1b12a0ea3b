"""Where arrays lie on a mesh of devices: logical axes to mesh axes, in one table. All rooms may stand on this one; it
needs jax alone.

Mesh axes: `data` splits the batch; `fsdp` splits the batch and the parameters; `tensor` splits heads, mlp and
vocabulary.

What is computed is the same under every mesh. Code that is traced under one (`jax.set_mesh`) asks for it here, says
where its activations are to lie, and leaves what has to be sent to XLA; but for the readout, which knows better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Rows of activations lie over all that splits the batch, and a parameter's width over fsdp (activations have theirs
# whole); what runs in parallel inside a layer, of both, over tensor. Layers, norms and what isn't here are everywhere.
RULES: dict[str, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
  "batch_of_data": ("data",),  # sent to where parameters lie
  "embed": ("fsdp",),
  "vocab": ("tensor",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "mlp": ("tensor",),
}


def current_mesh() -> AbstractMesh | None:
  """The mesh that is traced under; None where there is none, or nothing to be split.

  Inside pmap and shard_map there is none: what is there is one device's own.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return None
  return mesh


def mesh_axes(name: str | None, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  """The axes of a mesh that a logical axis lies over, without those of one device."""
  return tuple(axis for axis in RULES.get(name, ()) if mesh.shape.get(axis, 1) > 1)


def parts(name: str | None, mesh: Mesh | AbstractMesh) -> int:
  """Into how many parts a mesh splits a logical axis that divides."""
  return math.prod(mesh.shape[axis] for axis in mesh_axes(name, mesh))


def spec(shape: Sequence[int], names: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """Where an array lies.

  Args:
    shape: its shape.
    names: the logical axes of its first axes; None: whole, as all that follow. So is one that doesn't divide over its
      mesh axes, one kv head over two devices for instance.
    mesh: the mesh.
  """
  placed = []
  for size, name in zip(shape, names):
    axes = mesh_axes(name, mesh)
    whole = not axes or size % parts(name, mesh)
    placed.append(None if whole else axes if len(axes) > 1 else axes[0])
  return PartitionSpec(*placed)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """An activation, laid over the mesh that is traced under as `spec` says; without one, as it is."""
  mesh = current_mesh()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, spec(x.shape, names, mesh))
