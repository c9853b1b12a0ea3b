"""The memory of a chip that a program needs, as XLA reports it for compiled and for refused programs."""

from __future__ import annotations

import re

import jax

# 'Ran out of memory on HBM, the total memory required for HLO temporaries (20.00G) exceeds available HBM (15.75G).',
# which includes arguments and results; 'Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.'
_REFUSALS = (
  re.compile(r"memory required[^(]*\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
  re.compile(r"Used ([\d.]+)([KMGT]?)B? of ([\d.]+)([KMGT]?)B? hbm"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
CLASSES = ("arguments", "output", "temporaries", "aliased", "generated_code", "peak")


def memory_by_class(program: jax.stages.Compiled) -> dict[str, int]:
  """Bytes on each device, by CLASSES.

  `aliased` is the part of `output` that reuses `arguments`; `peak` is the total, in which the aliased part counts once.
  """
  found = program.memory_analysis()
  values = {
    "arguments": found.argument_size_in_bytes,
    "output": found.output_size_in_bytes,
    "temporaries": found.temp_size_in_bytes,
    "aliased": found.alias_size_in_bytes,
    "generated_code": found.generated_code_size_in_bytes,
  }
  return values | {"peak": sum(values.values()) - 2 * values["aliased"]}


def refused_bytes(message: str) -> tuple[int | None, int | None]:
  """(bytes that a program needs, bytes that programs may use), from the compiler's out-of-memory message.

  None if the message does not have the number. The message rounds to hundredths of its units.
  """
  for pattern in _REFUSALS:
    found = pattern.search(message)
    if found:
      needed, limit = ((float(found[i]) * _UNITS[found[i + 1]]) for i in (1, 3))
      return round(needed), round(limit)
  return None, None
