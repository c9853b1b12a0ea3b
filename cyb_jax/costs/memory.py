"""Memory of a run: parameters by component, the bytes of sharded arrays on each device, and the memory of compiled
programs as reported by XLA.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import flax.linen as nn
import jax
from jaxtyping import PyTree

from cyb_jax.decoder import quantization
from cyb_jax.decoder.lora import LEAVES


class Parametrized(Protocol):
  """The part of `methods.Method` that determines the parameters."""

  def init(self, rng: jax.Array, /) -> PyTree: ...
  def is_trained(self, path: tuple[str, ...], /) -> bool: ...


def count_parameters(method: Parametrized) -> dict[str, int]:
  """Returns the number of parameters by component, computed from shapes without allocating them.

  The keys are `total`; `trained`; the components `embedding` (with an untied output table and learned positions),
  `layers` (with the final norm), `lora`, `pauses` and `dont_know`; and every other top-level parameter of the method
  under its own name.
  """
  params = nn.unbox(jax.eval_shape(method.init, jax.random.key(0)))
  counts = dict.fromkeys(("total", "trained", "embedding", "layers", "lora", "pauses", "dont_know"), 0)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    names = tuple(key.key for key in path)
    size, component = _weights(names[-1], leaf), _component(names)
    counts["total"] += size
    counts["trained"] += size if method.is_trained(names) else 0
    counts[component] = counts.get(component, 0) + size
  return counts


def _weights(name: str, leaf: jax.ShapeDtypeStruct) -> int:
  """The number of weights that a leaf holds: of a quantised matrix two in a byte or one, and none in its scales."""
  if name == quantization.SCALE:
    return 0
  packed: bool = name == "kernel" and leaf.dtype == quantization.storage_dtype("nf4")
  return int(math.prod(leaf.shape)) * (2 if packed else 1)


def _component(names: Sequence[str]) -> str:
  if names[0] == "decoder":
    if names[-1] in LEAVES:
      return "lora"
    return "embedding" if names[1].endswith("embedding") else "layers"
  for component, start in (("pauses", "pause_"), ("dont_know", "dont_know")):
    if names[0].startswith(start):
      return component
  return names[0]


def bytes_per_device(tree: PyTree) -> int:
  """Returns the bytes that a tree occupies on each device.

  Args:
    tree: arrays, or `jax.ShapeDtypeStruct`s with shardings.
  """
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
  """Bytes that a compiled program needs on each device.

  Attributes:
    kept: arguments and results; a donated argument and the result that reuses its buffer count once.
    temporaries: buffers that are live only while the program runs.
  """

  kept: int
  temporaries: int

  @property
  def peak(self) -> int:
    """The sum of `kept` and `temporaries`."""
    return self.kept + self.temporaries


def program_memory(program: jax.stages.Compiled) -> ProgramMemory | None:
  """Returns the memory that XLA reports for a program; None if the backend does not report it."""
  memory = program.memory_analysis()
  if memory is None:
    return None
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return ProgramMemory(kept, memory.temp_size_in_bytes)
