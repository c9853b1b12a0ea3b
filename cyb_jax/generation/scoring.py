"""The log-likelihood of given continuations, for any method that decodes, with many requests in each batch.

A continuation's log-likelihood is the sum over its tokens of log sum_i s_i t_i: every token, including those of the
context, is followed by all its pauses, as in training with the recipe *constant*, and the inner sum is over the slot at
which the token is read (the stopping time of arXiv 2510.13879). The step budget allows all W slots, regardless of the
recipe and omega of training. A method with its own reading rule uses that rule. A method with pauses after its prompt
has these pauses after each request's context, and no pauses in a text that is scored completely.

Requests are laid out without padding between them. Requests with the same context share it, as branches of a tree, and
several trees follow one another in rows of a few fixed lengths. For example, two requests "a b | c d" and "a b | e f"
and a third request "g | h i", for a model without pauses:

    row      a b c e g h .        d, f and i are targets only
    tree     0 0 0 0 1 1 -        a slot sees earlier slots of its own tree
    branch   0 0 1 2 0 1 -        if they belong to branch 0, the context, or to its own branch

So c and e are read from b, d from c, f from e, h from g and i from h. Only states that are read are multiplied with the
unembedding, in chunks.

Letters: B rows, S slots of a row, W slots of a token, C tokens read at once, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from cyb_jax.errors import InputError
from cyb_jax.generation.abilities import check_decodes, num_prompt_pauses
from cyb_jax.generation.packing import batches, ladder, pack_cheapest, round_up
from cyb_jax.generation.score import Score
from cyb_jax.generation.trees import Part, Tree, build_trees, windows
from cyb_jax.methods import Decoding, SlotInputs
from cyb_jax.partitioning.mesh import batch_sharding, data_shards
from cyb_jax.progress import Meter
from cyb_jax.stopping import expected_pauses

Request = tuple[Sequence[int], Sequence[int]]
"""(ids of the context, ids of the continuation); `cyb_jax.data.tokenizers.encode_pairs` encodes two texts, with
`special=run.imported` as in the harness adapter."""

_Output = tuple[Array, Array, Array]
"""f32[C], bool[C], f32[C]; see `_read`."""

# The bytes of f32 token scores of a chunk; logits, log-probabilities and the mixture's log-probabilities are alive at
# the same time.
_READ_BYTES = 256 * 2**20
_READ_COPIES = 3
# A token within this distance of the most likely token, in nats, counts as greedy, so that rounding does not matter.
_TIE = 1e-5


class Scorer:
  """Scores continuations with a method's parameters.

  Args:
    method: a method that decodes slot by slot.
    params: bare arrays.
    context: the maximum number of tokens of the model's context, at least 1; a longer context is cut on the left.
    start_id: the token that replaces an empty context.
    mesh: the mesh over which the rows are sharded; None: the default device.
    slots: the approximate number of decoder slots of one forward pass; None: 2,048 on a CPU, 32,768 elsewhere. It
      affects results only by rounding.
    row_slots: S, the length of rows that several requests share; None: the cheapest of a few lengths.

  Raises:
    InputError: a number is invalid, or the method does not decode.

  Example:
    >>> from cyb_jax.data.tokenizers import encode_pairs
    >>> run = cyb_jax.load("runs/ap")
    >>> scorer = Scorer(run.method, run.params, context=64, start_id=run.tokenizer.separator_id)
    >>> texts = [("The film was", word) for word in (" good", " bad")]
    >>> scorer.score(encode_pairs(run.tokenizer, texts, special=run.imported))
  """

  def __init__(
    self,
    method: Decoding,
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
    self._hidden = jax.jit(functools.partial(hidden_states, method))
    self._read = jax.jit(functools.partial(_read, method))
    largest = _READ_BYTES // (_READ_COPIES * 4 * method.num_slots * method.vocab_size)
    self._chunk = round_up(2 ** max(0, largest.bit_length() - 1), self._shards)

  def score(self, requests: Sequence[Request]) -> list[Score]:
    """Scores of the requests, in their order.

    The start token replaces an empty context, and an empty continuation has likelihood 1. If both together exceed the
    model's context, the request's context is cut on the left. A continuation that is longer than the model's context is
    scored as in `score_rolling`, after its context.

    Raises:
      InputError: an id is outside the vocabulary.
    """
    parts, cut, pauses = [], 0, num_prompt_pauses(self.method)
    for number, (context, continuation) in enumerate(requests):
      context, continuation = tuple(context) or (self.start_id,), tuple(continuation)
      self._check(number, context + continuation)
      if len(continuation) > self.context:
        for index, window in enumerate(windows(context, continuation, self.context, 1)):
          # The context of every window except the first is part of the continuation.
          parts.append(Part(number, *window, 0 if index else pauses))
      elif continuation:
        kept = self.context + 1 - len(continuation)
        cut += len(context) > kept
        parts.append(Part(number, context[-kept:], continuation, pauses))
    if cut:
      logging.warning("cut %d of %d contexts on the left: the model's context has %d tokens",
        cut, len(requests), self.context)  # fmt: skip
    return self._sums(len(requests), parts)

  def score_rolling(self, texts: Sequence[Sequence[int]], overlap: int = 1) -> list[Score]:
    """Scores of complete texts after a start token; each token is scored once.

    A text that is longer than the model's context L is scored in windows of L tokens. The first window scores all L
    tokens. Every later window begins with `overlap` tokens that are already scored, and scores the tokens after them;
    the last window begins with more of these tokens, so that it is full too.

    Args:
      texts: ids; an empty text has likelihood 1.
      overlap: the overlap of windows in tokens, in 1..L.

    Raises:
      InputError: an id is outside the vocabulary, or the overlap is out of its range.
    """
    if not 1 <= overlap <= self.context:
      raise InputError(f"overlap: {overlap} must be in 1..{self.context}, the length of the model's context")
    parts = []
    for number, text in enumerate(texts):
      self._check(number, tuple(text))
      for window in windows((self.start_id,), tuple(text), self.context, overlap):
        parts.append(Part(number, *window, 0))
    return self._sums(len(texts), parts)

  def _check(self, number: int, ids: tuple[int, ...]) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < self.method.vocab_size:
      wrong = next(i for i in ids if not 0 <= i < self.method.vocab_size)
      raise InputError(
        f"request: number {number + 1} has the id {wrong}; ids must be in 0..{self.method.vocab_size - 1}"
      )

  def _sums(self, count: int, parts: list[Part]) -> list[Score]:
    """A score for each of `count` requests, from their parts."""
    scores = [Score()] * count
    rows = pack_cheapest(build_trees(self.method, parts), self.method.decoder.config, self._row_slots)
    pending: list[tuple[list[tuple[int, Score]], list[_Output]]] = []
    with Meter("scoring", total=len(parts), unit="continuations") as meter:
      for length, batch in batches(rows, self._slots, self._shards):
        pending.append(self._run(length, batch))
        # Results are fetched one batch later, so that the device does not wait for this loop.
        while len(pending) > 1:
          meter.advance(_collect(scores, *pending.pop(0)))
      for costs, outputs in pending:
        meter.advance(_collect(scores, costs, outputs))
    return scores

  def _run(self, length: int, rows: list[list[Tree]]) -> tuple[list[tuple[int, Score]], list[_Output]]:
    """Dispatches a batch; returns the costs of its continuations and the arrays that will hold their results."""
    layout = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "slots", "positions", "owner")}
    layout["tree"] = np.full((len(rows), length), -1, np.int32)
    layout["branch"] = np.zeros((len(rows), length), np.int32)
    slots, targets, costs = [], [], []
    for row, trees in enumerate(rows):
      start = 0
      for number, tree in enumerate(trees):
        stop = start + tree.size
        for name, values in tree.layout.items():
          layout[name][row, start:stop] = values
        layout["tree"][row, start:stop] = number
        slots.append(row * length + start + tree.reads)
        targets.append(tree.targets)
        costs += tree.costs
        start = stop
    hidden = self._hidden(self.params, self._put(layout))
    chunks = self._chunks(np.concatenate(slots), np.concatenate(targets))
    return costs, [self._read(self.params, hidden, self._put(chunk)) for chunk in chunks]

  def _chunks(self, slots: np.ndarray, targets: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """The slots i32[R, W] and targets i32[R] in chunks of a few fixed sizes C; the last chunk is padded with zeros."""
    read = 0
    while read < len(targets):
      size = min(self._chunk, round_up(ladder(len(targets) - read, 8), self._shards))
      chunk = slice(read, read + size)
      padding = max(0, read + size - len(targets))
      yield {
        "slots": np.pad(slots[chunk], ((0, padding), (0, 0))),
        "targets": np.pad(targets[chunk], (0, padding)),
      }
      read += size

  def _put(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray | Array]:
    return arrays if self._sharding is None else jax.device_put(arrays, self._sharding)


def _collect(scores: list[Score], costs: list[tuple[int, Score]], outputs: list[_Output]) -> int:
  """Adds a batch's results to the scores of its requests; returns the number of its continuations."""
  log_likelihood, greedy, pauses = (np.concatenate(x) for x in zip(*jax.device_get(outputs)))
  start = 0
  for request, cost in costs:
    stop = start + cost.tokens
    scores[request] += dataclasses.replace(
      cost,
      log_likelihood=float(log_likelihood[start:stop].sum(dtype=np.float64)),
      greedy=bool(greedy[start:stop].all()),
      pauses=cost.pauses + float(pauses[start:stop].sum(dtype=np.float64)),
    )
    start = stop
  return len(costs)


def hidden_states(method: Decoding, params: PyTree, layout: dict[str, Int[Array, "B S"]]) -> Float[Array, "B S D"]:
  """The hidden states of all slots; `layout`: see `Tree.layout`, with `tree`, the index of each slot's tree or -1."""
  inputs = SlotInputs(*(layout[name] for name in ("tokens", "slots", "positions")))
  return method.hidden_slots(params, inputs, _mask(method, layout))


def _mask(method: Decoding, layout: dict[str, Int[Array, "B S"]]) -> Bool[Array, "B 1 S S"]:
  """Which slots (queries, third axis) may see which slots (keys, fourth axis); padding sees padding."""

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
  method: Decoding, params: PyTree, hidden: Float[Array, "B S D"], reads: dict[str, Array]
) -> tuple[Float[Array, "C"], Bool[Array, "C"], Float[Array, "C"]]:
  """The results of C tokens: the target's log-probability, whether the target is greedy, and the expected pauses.

  Args:
    method, params: the scorer's method and its parameters.
    hidden: [B, S, D], the states of all slots.
    reads: `slots` i32[C, W], indices into the B*S slots; `targets` i32[C].
  """
  slots, targets = reads["slots"], reads["targets"]
  log_probs, log_stopping = method.mixture_log_probs(params, hidden.reshape(-1, hidden.shape[-1])[slots])
  log_target = jnp.take_along_axis(log_probs, targets[:, None], 1)[:, 0]
  return log_target, log_target >= log_probs.max(-1) - _TIE, expected_pauses(log_stopping)
