"""Packing trees into rows and batches of a few fixed shapes, so that a few compiled programs suffice for all requests.

Letters: B rows, S slots of a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

from cyb_jax.costs import flops
from cyb_jax.decoder import DecoderConfig
from cyb_jax.generation.trees import Tree

Rows = dict[int, list[list[Tree]]]
"""The trees of each row, by the row's length S."""

_SHORTEST_ROW = 32
# Candidate lengths of rows that several requests share; 1: every tree has its own row. The cheapest length is used.
_ROW_SLOTS = (1, 256, 512, 1024)
# The weights and the softmax of attention take about this many times as long as the same operations in a matrix
# product, and compiling a program takes as long as running this many slots (measured with SmolLM2-135M's shape on a
# CPU).
_ATTENTION_COST = 3
_PROGRAM_SLOTS = 2048
# Attention holds S^2 weights for each row and head; this is the maximum of one head in one forward pass.
_SQUARES = 2**26


def pack_cheapest(trees: Sequence[Tree], config: DecoderConfig, row_slots: int | None = None) -> Rows:
  """The trees in rows of the candidate length with the lowest estimated time.

  Args:
    trees: the trees, in any order.
    config: the decoder that runs them.
    row_slots: the only candidate length; None: `_ROW_SLOTS`.
  """

  def cost(rows: Rows) -> float:
    plain = flops.slot_flops(config, slots=1, keys=0, slots_read=0)
    attention = (flops.slot_flops(config, slots=1, keys=1, slots_read=0) - plain) / plain * _ATTENTION_COST
    return sum(_PROGRAM_SLOTS + len(mine) * length * (1 + attention * length) for length, mine in rows.items())

  lengths = _ROW_SLOTS if row_slots is None else (row_slots,)
  return min((_pack(trees, length) for length in lengths), key=cost)


def batches(rows: Rows, slots: int, shards: int) -> Iterator[tuple[int, list[list[Tree]]]]:
  """(S, B rows) of about `slots` slots; empty rows pad the last batch of a length to one of a few sizes B."""
  for length, mine in sorted(rows.items(), reverse=True):
    count = round_up(max(1, min(slots // length, _SQUARES // length**2)), shards)
    for start in range(0, len(mine), count):
      batch = mine[start : start + count]
      size = min(count, round_up(ladder(len(batch), 1), shards))
      yield length, batch + [[] for _ in range(size - len(batch))]


def ladder(size: int, smallest: int) -> int:
  """The size, rounded up to one of 4, 5, 6, 7, 8, 10, 12, 14, 16, ... times `smallest` / 4."""
  octave = max(smallest, 2 ** (max(1, size) - 1).bit_length() // 2)
  step = max(1, octave // 4)
  return max(smallest, -(-size // step) * step)


def round_up(size: int, multiple: int) -> int:
  """The size, rounded up to a multiple."""
  return -(-size // multiple) * multiple


def _pack(trees: Sequence[Tree], row_slots: int) -> Rows:
  """Packs the longest tree first, each tree into the fullest row that has space for it."""
  left = sum(tree.size for tree in trees)
  rows: Rows = {}
  space: list[tuple[int, int]] = []  # (free slots, row), ascending
  opened: list[list[Tree]] = []
  for tree in sorted(trees, key=lambda tree: -tree.size):
    found = bisect.bisect_left(space, (tree.size, -1))
    if found < len(space):
      free, row = space.pop(found)
    else:
      # A new row is no longer than all remaining trees together.
      free, row = ladder(max(tree.size, min(row_slots, left)), _SHORTEST_ROW), len(opened)
      opened.append([])
      rows.setdefault(free, []).append(opened[-1])
    opened[row].append(tree)
    bisect.insort(space, (free - tree.size, row))
    left -= tree.size
  return rows
