"""How likely a model finds given continuations, of any method, many at once.

A continuation's log-likelihood is the sum over its tokens of log sum_i s_i t_i: every token, of the context too, is
followed by all its pauses, as in training with the recipe *constant*, and the time at which the answer is read is
summed over (method.md 3 and 7). The world grants all W slots, whatever recipe or omega a run was trained with: draws
belong to training. Methods that read by a rule are read by their rule. A method with pauses behind a prompt
(`Method.prompt_pauses`) has them behind each request's context, and none in a text that is scored whole.

Requests are laid out without padding between them. Those with the same context share it, as branches of a tree, and
trees lie one behind the other in rows of a few fixed lengths. Two requests "a b | c d" and "a b | e f", and a third
"g | h i", of a model without pauses:

    row      a b c e g h .        d, f and i are targets alone
    tree     0 0 0 0 1 1 -        a slot sees earlier ones of its own tree ...
    branch   0 0 1 2 0 1 -        ... that are of branch 0, the context, or of its own branch

So c and e are read from b, d from c, f from e, h from g and i from h. Only what is read is multiplied with the
vocabulary, in chunks.

Letters: B rows, S slots of a row, W slots of a token, C tokens read at once, D model, V words.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from cyb_jax.costs import flops
from cyb_jax.errors import InputError
from cyb_jax.generation.options import check_decodes
from cyb_jax.methods.paused import PausedMethod
from cyb_jax.partitioning.mesh import batch_sharding, data_shards
from cyb_jax.stopping import expected_pauses

Request = tuple[Sequence[int], Sequence[int]]
"""(ids of the context, ids of the continuation)."""

_Part = tuple[int, tuple[int, ...], tuple[int, ...], int]
"""(number of its request, ids of the context, ids of the continuation, pauses between them)."""

# Of f32 word scores; a chunk's logits, their log-probabilities and the mixture's live at the same time.
_READ_BYTES = 256 * 2**20
_READ_COPIES = 3
_SHORTEST_ROW = 32
# Rows that several requests share are of one of these lengths, or of none: whichever costs least.
_ROW_SLOTS = (1, 256, 512, 1024)
# Weights and softmax of attention take about so many times as long as their operations would in a matrix product, and a
# program takes as long to compile as so many slots take to run (SmolLM2-135M's shape on a CPU).
_ATTENTION_COST = 3
_PROGRAM_SLOTS = 2048
# A context with more branches than fit into so many slots is run again for the others.
_TREE_SLOTS = 1024
# Attention holds S^2 weights a row and head; of one forward at most so many.
_SQUARES = 2**26
# A word that ties with the likeliest one is greedy too, so that no rounding decides.
_TIE = 1e-5


@dataclasses.dataclass(frozen=True)
class Score:
  """Of one request.

  Attributes:
    log_likelihood: of the continuation, nats.
    greedy: whether each of its tokens is the likeliest word where it stands, or ties with that to within 1e-5 nats.
    tokens: scored.
    pauses: sum over these of the expected number of pauses, sum_i (i - 1) s_i, and those behind the context.
    slots: decoder slots that were run, each as often as it was; those of a context that several requests share are
      divided among them.
    flops: operations of the model, divided in the same way.
  """

  log_likelihood: float = 0.0
  greedy: bool = True
  tokens: int = 0
  pauses: float = 0.0
  slots: float = 0.0
  flops: float = 0.0

  def __add__(self, other: Score) -> Score:
    return Score(
      log_likelihood=self.log_likelihood + other.log_likelihood,
      greedy=self.greedy and other.greedy,
      tokens=self.tokens + other.tokens,
      pauses=self.pauses + other.pauses,
      slots=self.slots + other.slots,
      flops=self.flops + other.flops,
    )


class Scorer:
  """Scores continuations with a method's parameters.

  Args:
    method: one that `decodes`.
    params: bare arrays.
    context: tokens that the model can take, at least 1; a longer context is cut on the left.
    start_id: the token that stands in front where there is no context.
    mesh: rows are spread over it; None: the default device.
    slots: decoder slots of one forward, about; None: 2,048 on a CPU, 32,768 elsewhere. It changes no result beyond
      rounding.
    row_slots: S, of rows that several requests share; None: what costs least.

  Raises:
    InputError: a number that won't do, or a method that doesn't decode.

  Example:
    >>> run = cyb_jax.load("runs/ap")
    >>> scorer = Scorer(run.method, run.params, context=64, start_id=run.tokenizer.end_id)
    >>> encode = run.tokenizer.encode
    >>> scorer.score([(encode("The film was"), encode(word)) for word in (" good", " bad")])
  """

  def __init__(
    self,
    method: PausedMethod,
    params: PyTree,
    *,
    context: int,
    start_id: int,
    mesh: Mesh | None = None,
    slots: int | None = None,
    row_slots: int | None = None,
  ):
    check_decodes(method)
    for name, value in (("context", context), ("slots", slots), ("row_slots", row_slots)):
      if value is not None and value < 1:
        raise InputError(f"{name}: {value} must be at least 1")
    self.method, self.params, self.context, self.start_id = method, params, context, start_id
    self._slots = slots or (2048 if jax.default_backend() == "cpu" else 32768)
    self._row_slots = row_slots
    self._sharding = None if mesh is None else batch_sharding(mesh)
    self._shards = 1 if mesh is None else data_shards(mesh)
    self._hidden = jax.jit(functools.partial(_hidden, method))
    self._read = jax.jit(functools.partial(_read, method))
    largest = _READ_BYTES // (_READ_COPIES * 4 * method.num_slots * method.vocab_size)
    self._chunk = _up_to(2 ** max(0, largest.bit_length() - 1), self._shards)

  def score(self, requests: Sequence[Request]) -> list[Score]:
    """Scores of the requests, in their order.

    An empty context stands for the start token, and an empty continuation has likelihood 1. Where both together are
    longer than the model's context the context is cut on the left; a continuation that is too long by itself is scored
    as `score_rolling` does, behind its context.

    Raises:
      InputError: an id that is no word.
    """
    parts, cut, paused = [], 0, self.method.prompt_pauses
    for number, (before, continuation) in enumerate(requests):
      before, continuation = tuple(before) or (self.start_id,), tuple(continuation)
      self._check(number, before + continuation)
      if len(continuation) > self.context:
        for window in _windows(before, continuation, self.context, 1):
          # Of the others the context is of the continuation itself.
          parts.append((number, *window, 0 if parts and parts[-1][0] == number else paused))
      elif continuation:
        kept = self.context + 1 - len(continuation)
        cut += len(before) > kept
        parts.append((number, before[-kept:], continuation, paused))
    if cut:
      logging.warning("%d of %d contexts were cut on the left: the model takes %d tokens",
        cut, len(requests), self.context)  # fmt: skip
    return self._sums(len(requests), parts)

  def score_rolling(self, texts: Sequence[Sequence[int]], overlap: int = 1) -> list[Score]:
    """Scores of whole texts behind a start token, each token once.

    A text that is longer than the model's context L is read in windows of L tokens: the first window scores L of them,
    every later one what fits behind `overlap` tokens that were scored before (or more of them, in the last window, so
    that it is full too).

    Args:
      texts: ids; an empty one has likelihood 1.
      overlap: in 1..L.

    Raises:
      InputError: an id that is no word, or an overlap out of its range.
    """
    if not 1 <= overlap <= self.context:
      raise InputError(f"overlap: {overlap} must lie in 1..{self.context}, the model's context")
    parts = []
    for number, text in enumerate(texts):
      self._check(number, tuple(text))
      parts += [(number, *window, 0) for window in _windows((self.start_id,), tuple(text), self.context, overlap)]
    return self._sums(len(texts), parts)

  def _check(self, number: int, ids: tuple[int, ...]) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < self.method.vocab_size:
      wrong = next(i for i in ids if not 0 <= i < self.method.vocab_size)
      raise InputError(
        f"request: number {number + 1} has the id {wrong}, but words are 0..{self.method.vocab_size - 1}"
      )

  def _sums(self, count: int, parts: list[_Part]) -> list[Score]:
    """A score for each of `count` requests, from their parts."""
    scores = [Score()] * count
    rows = self._rows(self._trees(parts))
    pending: list[tuple[list[tuple[int, Score]], list[tuple[Array, ...]]]] = []
    done, last = 0, time.monotonic()
    for length, batch in _batches(rows, self._slots, self._shards):
      pending.append(self._run(length, batch))
      # One batch behind the device, so that it never waits for this loop.
      while len(pending) > 1:
        done += _collect(scores, *pending.pop(0))
      if time.monotonic() - last > 10:
        last = time.monotonic()
        logging.info("scored %d of %d continuations", done, len(parts))
    for batch in pending:
      _collect(scores, *batch)
    return scores

  def _trees(self, parts: list[_Part]) -> list[_Tree]:
    """One tree for each context, or more where it has more branches than a row takes."""
    by_context: dict[tuple[tuple[int, ...], int], list[tuple[int, tuple[int, ...]]]] = {}
    for number, before, continuation, paused in parts:
      by_context.setdefault((before, paused), []).append((number, continuation))
    trees = []
    for (before, paused), branches in by_context.items():
      # In a tree of its own a branch costs its context again, in a longer row attention.
      base, width = _context_slots(self.method, len(before), paused), self.method.num_slots
      limit = max(_TREE_SLOTS, base + width * (max(len(tokens) for _, tokens in branches) - 1))
      taken: list[tuple[int, tuple[int, ...]]] = []
      size = base
      for branch in branches:
        more = width * (len(branch[1]) - 1)
        if taken and size + more > limit:
          trees.append(_Tree(self.method, before, taken, paused))
          taken, size = [], base
        taken.append(branch)
        size += more
      trees.append(_Tree(self.method, before, taken, paused))
    return trees

  def _rows(self, trees: list[_Tree]) -> dict[int, list[list[_Tree]]]:
    """The trees in rows, by the rows' length."""

    def cost(rows: dict[int, list[list[_Tree]]]) -> float:
      config = self.method.decoder.config
      plain = flops.slot_flops(config, slots=1, keys=0, slots_read=0)
      attention = (flops.slot_flops(config, slots=1, keys=1, slots_read=0) - plain) / plain * _ATTENTION_COST
      return sum(_PROGRAM_SLOTS + len(mine) * length * (1 + attention * length) for length, mine in rows.items())

    lengths = _ROW_SLOTS if self._row_slots is None else (self._row_slots,)
    return min((_pack(trees, length) for length in lengths), key=cost)

  def _run(
    self, length: int, rows: list[list[_Tree]]
  ) -> tuple[list[tuple[int, Score]], list[tuple[Array, Array, Array]]]:
    """What the tokens of a batch stand for, and where their numbers will be."""
    layout = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "slots", "positions", "owner")}
    layout["tree"] = np.full((len(rows), length), -1, np.int32)
    layout["branch"] = np.zeros((len(rows), length), np.int32)
    places, targets, spent = [], [], []
    for row, trees in enumerate(rows):
      start = 0
      for number, tree in enumerate(trees):
        stop = start + tree.size
        for name, values in tree.layout.items():
          layout[name][row, start:stop] = values
        layout["tree"][row, start:stop] = number
        places.append(row * length + start + tree.places)
        targets.append(tree.targets)
        spent += tree.spent
        start = stop
    hidden = self._hidden(self.params, self._put(layout))
    places, targets = np.concatenate(places), np.concatenate(targets)
    read, outputs = 0, []
    while read < len(targets):
      size = min(self._chunk, _up_to(_ladder(len(targets) - read, 8), self._shards))
      chunk = slice(read, read + size)
      padding = max(0, read + size - len(targets))
      reads = {
        "places": np.pad(places[chunk], ((0, padding), (0, 0))),
        "targets": np.pad(targets[chunk], (0, padding)),
      }
      outputs.append(self._read(self.params, hidden, self._put(reads)))
      read += size
    return spent, outputs

  def _put(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray | Array]:
    return arrays if self._sharding is None else jax.device_put(arrays, self._sharding)


class _Tree:
  """A context, so many pauses behind it where they are `paused`, and the continuations behind these, laid out; all
  numbers are of this tree alone.

  Attributes:
    size: slots.
    layout: i32[size] each, see `_hidden`; `owner` numbers tokens.
    places: i32[R, W], the slots of each token that is read.
    targets: i32[R].
    spent: for each continuation its request, and what it has spent; `tokens` of the R come from it, in order.
  """

  def __init__(
    self, method: PausedMethod, before: tuple[int, ...], branches: list[tuple[int, tuple[int, ...]]], paused: int
  ):
    width = method.num_slots
    tokens, position, branch = list(before), list(range(len(before))), [0] * len(before)
    reader: list[int] = []  # of each target the token that it is read from
    targets: list[int] = []
    for number, (_, continuation) in enumerate(branches, 1):
      reader.append(len(before) - 1)
      reader += range(len(tokens), len(tokens) + len(continuation) - 1)
      targets += continuation
      tokens += continuation[:-1]
      position += range(len(before) + paused, len(before) + paused + len(continuation) - 1)
      branch += [number] * (len(continuation) - 1)
    # Hidden pauses of a token that isn't read are seen by nobody: they needn't be run.
    counts = np.full(len(tokens), width)
    if method.hides_pauses:
      counts[: len(before) - 1] = 1
    # Of one slot otherwise, and at positions of their own.
    counts[len(before) - 1] += paused
    first = np.cumsum(counts) - counts
    owner = np.repeat(np.arange(len(tokens)), counts)
    slot = np.arange(len(owner)) - first[owner]
    position, branch = np.asarray(position)[owner], np.asarray(branch)[owner]
    self.size = len(owner)
    self.layout = {
      "tokens": np.asarray(tokens)[owner],
      "slots": slot,
      # Where pauses stand at positions of their own, they do so whether they are run or not.
      "positions": position * width + slot if method.shifts_positions else position,
      "owner": owner,
      "branch": branch,
    }
    self.places = (first + counts - width)[np.asarray(reader)][:, None] + np.arange(width)
    self.targets = np.asarray(targets)
    keys = position + 1 + slot if method.hides_pauses else position * width + slot + 1
    config = method.decoder.config
    shared = branch == 0
    share, times = 1 / len(branches), method.times_run
    self.spent = []
    for number, (request, continuation) in enumerate(branches, 1):
      own = branch == number
      slots = times * (share * shared.sum() + own.sum())
      cost = flops.slot_flops(
        config,
        slots=float(slots),
        keys=float(times * (share * keys[shared].sum() + keys[own].sum())),
        slots_read=width * len(continuation),
      )
      score = Score(tokens=len(continuation), pauses=paused, slots=float(slots), flops=float(cost))
      self.spent.append((request, score))


def _context_slots(method: PausedMethod, tokens: int, paused: int) -> int:
  """Slots of a context, the last token of which is read, with the pauses behind it."""
  return paused + (tokens - 1 + method.num_slots if method.hides_pauses else tokens * method.num_slots)


def _windows(
  before: tuple[int, ...], tokens: tuple[int, ...], context: int, overlap: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
  """(context, continuation) pairs that score each of the tokens once; before = x, tokens = 0 .. 9, context = 4:

  overlap 1    x | 0 1 2 3    3 | 4 5 6 7      5 6 7 | 8 9
  overlap 2    x | 0 1 2 3    2 3 | 4 5 6      5 6 | 7 8 9
  """
  text = before + tokens
  scored = len(before)
  first = True
  while scored < len(text):
    end = min(len(text), scored + (context if first else context + 1 - overlap))
    yield text[max(0, end - context - 1) : scored], text[scored:end]
    scored, first = end, False


def _ladder(size: int, smallest: int) -> int:
  """The next of 4, 5, 6, 7, 8, 10, 12, 14, 16, ... times `smallest` / 4: few lengths mean few programs."""
  octave = max(smallest, 2 ** (max(1, size) - 1).bit_length() // 2)
  step = max(1, octave // 4)
  return max(smallest, -(-size // step) * step)


def _up_to(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _pack(trees: list[_Tree], row_slots: int) -> dict[int, list[list[_Tree]]]:
  """Rows by their length, full as can be: the longest tree first, each into the fullest row that has room."""
  left = sum(tree.size for tree in trees)
  rows: dict[int, list[list[_Tree]]] = {}
  room: list[tuple[int, int]] = []  # (slots, row), ascending
  opened: list[list[_Tree]] = []
  for tree in sorted(trees, key=lambda tree: -tree.size):
    found = bisect.bisect_left(room, (tree.size, -1))
    if found < len(room):
      free, row = room.pop(found)
    else:
      # No longer than what is left to be put into it.
      free, row = _ladder(max(tree.size, min(row_slots, left)), _SHORTEST_ROW), len(opened)
      opened.append([])
      rows.setdefault(free, []).append(opened[-1])
    opened[row].append(tree)
    bisect.insort(room, (free - tree.size, row))
    left -= tree.size
  return rows


def _batches(rows: dict[int, list[list[_Tree]]], slots: int, shards: int) -> Iterator[tuple[int, list[list[_Tree]]]]:
  """(S, B rows) of about so many slots; the last of a length is filled up with empty rows, to few numbers B."""
  for length, mine in sorted(rows.items(), reverse=True):
    count = _up_to(max(1, min(slots // length, _SQUARES // length**2)), shards)
    for start in range(0, len(mine), count):
      batch = mine[start : start + count]
      size = min(count, _up_to(_ladder(len(batch), 1), shards))
      yield length, batch + [[] for _ in range(size - len(batch))]


def _collect(scores: list[Score], spent: list[tuple[int, Score]], outputs: list[tuple[Array, Array, Array]]) -> int:
  """Adds a batch's numbers to the scores of its requests; how many continuations it had."""
  log_likelihood, greedy, pauses = (np.concatenate(x) for x in zip(*jax.device_get(outputs)))
  start = 0
  for request, cost in spent:
    stop = start + cost.tokens
    scores[request] += dataclasses.replace(
      cost,
      log_likelihood=float(log_likelihood[start:stop].sum(dtype=np.float64)),
      greedy=bool(greedy[start:stop].all()),
      pauses=cost.pauses + float(pauses[start:stop].sum(dtype=np.float64)),
    )
    start = stop
  return len(spent)


def _hidden(method: PausedMethod, params: PyTree, layout: dict[str, Int[Array, "B S"]]) -> Float[Array, "B S D"]:
  return method.hidden_slots(params, layout["tokens"], layout["slots"], layout["positions"], _mask(method, layout))


def _mask(method: PausedMethod, layout: dict[str, Int[Array, "B S"]]) -> Bool[Array, "B 1 S S"]:
  """Which slot (query, third axis) may see which (key); places that are empty see each other."""

  def query(name: str) -> Int[Array, "B S 1"]:
    return layout[name][:, :, None]

  def key(name: str) -> Int[Array, "B 1 S"]:
    return layout[name][:, None, :]

  order = jnp.arange(layout["tree"].shape[1])
  mask = (order[:, None] >= order) & (query("tree") == key("tree"))
  mask &= (key("branch") == 0) | (query("branch") == key("branch"))
  if method.hides_pauses:
    mask &= (key("slots") == 0) | (query("owner") == key("owner"))
  return mask[:, None]


def _read(
  method: PausedMethod, params: PyTree, hidden: Float[Array, "B S D"], reads: dict[str, Array]
) -> tuple[Float[Array, "C"], Bool[Array, "C"], Float[Array, "C"]]:
  """Of each token that is read: its target's log-probability, whether that is the likeliest word's, mean pauses."""
  places, targets = reads["places"], reads["targets"]
  log_probs, log_stopping = method.mixture_log_probs(params, hidden.reshape(-1, hidden.shape[-1])[places])
  log_target = jnp.take_along_axis(log_probs, targets[:, None], 1)[:, 0]
  return log_target, log_target >= log_probs.max(-1) - _TIE, expected_pauses(log_stopping)
