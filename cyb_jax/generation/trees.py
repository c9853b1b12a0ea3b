"""Scoring requests as trees: a shared context and the continuations that branch off after it.

Letters: S slots of a tree, W slots of a token, R tokens that are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from cyb_jax.costs import flops
from cyb_jax.generation.score import Score
from cyb_jax.methods import Decoding

# The maximum number of slots of a tree; if the branches of a context do not fit, the context runs again for the rest.
_TREE_SLOTS = 1024

Branch = tuple[int, tuple[int, ...]]
"""(number of the request, ids of the continuation)."""


@dataclasses.dataclass(frozen=True)
class Part:
  """A context and a continuation that fit into the model's context together.

  Attributes:
    request: the number of the request that the part belongs to.
    context: ids, at least one.
    continuation: ids, at least one.
    pauses: pauses between the context and the continuation.
  """

  request: int
  context: tuple[int, ...]
  continuation: tuple[int, ...]
  pauses: int


class Tree:
  """A context, `pauses` pauses after it, and its continuations, laid out as slots; indices are relative to the tree.

  Attributes:
    size: S, the number of slots.
    layout: i32[S] each: `tokens`, `slots` and `positions` as in `CachedDecoding.extend`; `owner`, the index of the
      slot's token; `branch`, 0 in the context and the continuation's number, from 1, elsewhere.
    reads: i32[R, W], the slots of each token that is read.
    targets: i32[R], the target of each of these tokens, in the order of the continuations.
    costs: for each continuation its request, and its tokens, pauses, slots and FLOPs.
  """

  def __init__(self, method: Decoding, context: tuple[int, ...], branches: Sequence[Branch], pauses: int):
    width = method.num_slots
    last = len(context) - 1
    tokens, position, branch = list(context), list(range(len(context))), [0] * len(context)
    reader: list[int] = []  # the token from which each target is predicted
    targets: list[int] = []
    for number, (_, continuation) in enumerate(branches, 1):
      reader.append(last)
      reader += range(len(tokens), len(tokens) + len(continuation) - 1)
      targets += continuation
      tokens += continuation[:-1]
      position += range(len(context) + pauses, len(context) + pauses + len(continuation) - 1)
      branch += [number] * (len(continuation) - 1)
    counts = np.full(len(tokens), width)
    if method.hides_pauses:
      # No token sees the hidden pauses of another token, so tokens that are not read run no pauses.
      counts[:last] = 1
    # A method with pauses after its prompt otherwise has one slot per token, and its pauses have their own positions.
    counts[last] += pauses
    first = np.cumsum(counts) - counts
    owner = np.repeat(np.arange(len(tokens)), counts)
    slot = np.arange(len(owner)) - first[owner]
    position, branch = np.asarray(position)[owner], np.asarray(branch)[owner]
    self.size = len(owner)
    self.layout = {
      "tokens": np.asarray(tokens)[owner],
      "slots": slot,
      # Pauses with positions of their own occupy these positions whether or not they run.
      "positions": position * width + slot if method.shifts_positions else position,
      "owner": owner,
      "branch": branch,
    }
    self.reads = (first + counts - width)[np.asarray(reader)][:, None] + np.arange(width)
    self.targets = np.asarray(targets)
    keys, local = (_keys(method, position, slot, window) for window in (None, method.decoder.config.window))
    self.costs = _costs(method, branches, pauses, branch, keys, local)


def _keys(method: Decoding, position: np.ndarray, slot: np.ndarray, window: int | None) -> np.ndarray:
  """i64[S], the number of keys that each slot sees in a layer.

  Args:
    method: the method.
    position: the number of tokens before the slot's token.
    slot: the number of slots of its token before it.
    window: the number of positions that it sees, its own included; None: all.
  """
  width = method.num_slots
  tokens, of_own = position, slot + 1
  if window is not None and method.shifts_positions:
    # The first slot of the token that is n tokens before has a position that is n * width + slot lower.
    tokens, of_own = np.minimum(tokens, np.maximum(0, -(-(window - slot) // width) - 1)), np.minimum(of_own, window)
    if not method.hides_pauses:
      return np.minimum(position * width + slot + 1, window)
  elif window is not None:
    tokens = np.minimum(tokens, window - 1)
  return tokens * (1 if method.hides_pauses else width) + of_own


def _costs(
  method: Decoding, branches: Sequence[Branch], pauses: int, branch: np.ndarray, keys: np.ndarray, local: np.ndarray
) -> list[tuple[int, Score]]:
  """The cost of each continuation, with its share of the context.

  Args:
    method, branches, pauses: see `Tree`.
    branch: i32[S], the branch of each slot.
    keys: i64[S], the number of keys that each slot sees in a layer without a window.
    local: i64[S], the same in a layer with the decoder's window.
  """
  shared = branch == 0
  share, times = 1 / len(branches), method.layer_passes
  costs = []
  for number, (request, continuation) in enumerate(branches, 1):
    own = branch == number
    slots = times * (share * shared.sum() + own.sum())
    seen, seen_locally = (float(times * (share * x[shared].sum() + x[own].sum())) for x in (keys, local))
    operations = flops.slot_flops(
      method.decoder.config,
      slots=float(slots),
      keys=seen,
      local_keys=seen_locally,
      slots_read=method.num_slots * len(continuation),
    )
    costs.append((request, Score(tokens=len(continuation), pauses=pauses, slots=float(slots), flops=float(operations))))
  return costs


def build_trees(method: Decoding, parts: Sequence[Part]) -> list[Tree]:
  """One tree for each context; several trees for a context whose branches do not fit into one tree."""
  by_context: dict[tuple[tuple[int, ...], int], list[Branch]] = {}
  for part in parts:
    by_context.setdefault((part.context, part.pauses), []).append((part.request, part.continuation))
  trees = []
  for (context, pauses), branches in by_context.items():
    # A branch in a separate tree runs its context again; a branch in a longer row needs more attention.
    base, width = _context_slots(method, len(context), pauses), method.num_slots
    limit = max(_TREE_SLOTS, base + width * (max(len(tokens) for _, tokens in branches) - 1))
    taken: list[Branch] = []
    size = base
    for branch in branches:
      more = width * (len(branch[1]) - 1)
      if taken and size + more > limit:
        trees.append(Tree(method, context, taken, pauses))
        taken, size = [], base
      taken.append(branch)
      size += more
    trees.append(Tree(method, context, taken, pauses))
  return trees


def windows(
  context: tuple[int, ...], tokens: tuple[int, ...], length: int, overlap: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
  """(context, continuation) pairs that score each of the tokens once; context = x, tokens = 0 .. 9, length = 4:

  overlap 1    x | 0 1 2 3    3 | 4 5 6 7      5 6 7 | 8 9
  overlap 2    x | 0 1 2 3    2 3 | 4 5 6      5 6 | 7 8 9
  """
  text = context + tokens
  scored = len(context)
  first = True
  while scored < len(text):
    end = min(len(text), scored + (length if first else length + 1 - overlap))
    yield text[max(0, end - length - 1) : scored], text[scored:end]
    scored, first = end, False


def _context_slots(method: Decoding, tokens: int, pauses: int) -> int:
  """The number of slots of a context of `tokens` tokens, the last of which is read, including the pauses after it."""
  return pauses + (tokens - 1 + method.num_slots if method.hides_pauses else tokens * method.num_slots)
