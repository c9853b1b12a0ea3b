"""How large a run is: parameters by component; bytes on each device, of arrays by their shardings, of compiled programs
by what XLA says.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
from jaxtyping import PyTree

from cyb_jax.decoder.lora import LEAVES
from cyb_jax.methods import Method
from cyb_jax.training.step import trained_part


def count_parameters(method: Method) -> dict[str, int]:
  """Numbers of parameters, from shapes: `total`; `trained`; and by component `embedding` (an untied output table too),
  `layers` (the final norm too), `lora`, `pauses`, `dont_know`; what else a method has under its own name.
  """
  params = nn.unbox(jax.eval_shape(method.init, jax.random.key(0)))
  counts = {"total": 0, "trained": _size(trained_part(params, method.is_trained))}
  counts |= dict.fromkeys(("embedding", "layers", "lora", "pauses", "dont_know"), 0)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    component = _component([key.key for key in path])
    counts[component] = counts.get(component, 0) + math.prod(leaf.shape)
    counts["total"] += math.prod(leaf.shape)
  return counts


def _component(names: list[str]) -> str:
  if names[0] == "decoder":
    if names[-1] in LEAVES:
      return "lora"
    return "embedding" if names[1] in ("embedding", "unembedding") else "layers"
  for component, start in (("pauses", "pause_"), ("dont_know", "dont_know")):
    if names[0].startswith(start):
      return component
  return names[0]


def _size(tree: PyTree) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


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
    kept: what it is given and gives, what is donated once.
    temporaries: what it works with.
  """

  kept: int
  temporaries: int

  @property
  def peak(self) -> int:
    return self.kept + self.temporaries


def program_memory(program: jax.stages.Compiled) -> ProgramMemory | None:
  """What XLA says of a program; None where the backend doesn't tell."""
  memory = program.memory_analysis()
  if memory is None:
    return None
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return ProgramMemory(kept, memory.temp_size_in_bytes)
