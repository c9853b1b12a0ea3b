"""Bytes on each device: of arrays by their shardings, of compiled programs by XLA's own analysis."""

from __future__ import annotations

import dataclasses
import math

import jax
from jaxtyping import PyTree


def bytes_per_device(tree: PyTree) -> int:
  """Bytes that a tree takes on each device.

  Args:
    tree: arrays, or ShapeDtypeStruct with shardings.
  """
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
  """Bytes that a compiled program needs on each device.

  Attributes:
    kept: of its arguments and results; a donated argument and the result in its place are counted once.
    temporaries: of its intermediate values.
  """

  kept: int
  temporaries: int

  @property
  def peak(self) -> int:
    """The sum of both."""
    return self.kept + self.temporaries


def program_memory(program: jax.stages.Compiled) -> ProgramMemory | None:
  """The memory of a program by XLA's analysis; None where the backend has no such analysis."""
  memory = program.memory_analysis()
  if memory is None:
    return None
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return ProgramMemory(kept, memory.temp_size_in_bytes)
