"""The log-probability of every token of a text, and the most likely tokens in its place.

The distribution of a token is the one by which `scoring` scores a continuation: log sum_i s_i p_i, where every token of
the text is followed by all its pauses.

Letters: S slots of a padded row, C tokens read at once, A alternatives of a token, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from cyb_jax.errors import InputError
from cyb_jax.generation.abilities import check_decodes
from cyb_jax.generation.packing import ladder
from cyb_jax.generation.scoring import hidden_states
from cyb_jax.generation.trees import Tree
from cyb_jax.methods import Decoding

_SHORTEST_ROW = 32
# The largest number of f32 token scores of a chunk: tokens x slots x vocabulary.
_CHUNK_SCORES = 2**24


@dataclasses.dataclass(frozen=True)
class TextScores:
  """The scores of the tokens of a text after its first token.

  Attributes:
    log_probs: the log-probability of each token, in nats.
    alternatives: for each token the most likely tokens in its place: (id, log-probability), the most likely first.
  """

  log_probs: list[float]
  alternatives: list[list[tuple[int, float]]]


class TextScorer:
  """Scores texts token by token; a program is compiled for each of a few padded lengths.

  Args:
    method: a method that decodes slot by slot.
    params: bare arrays.
    context: the maximum number of tokens of a text.
    alternatives: A, the largest number of alternatives that a text can be scored with.

  Raises:
    InputError: the method does not decode.
  """

  def __init__(self, method: Decoding, params: PyTree, *, context: int, alternatives: int):
    check_decodes(method)
    self.method, self.params, self.context = method, params, context
    self._score = jax.jit(functools.partial(_score, method, min(alternatives, method.vocab_size)))

  def score(self, text: Sequence[int], alternatives: int = 0) -> TextScores:
    """The scores of the tokens of a text after the first, each with up to `alternatives` alternatives.

    Raises:
      InputError: the text is empty or longer than the context, or an id is outside the vocabulary.
    """
    if not 0 < len(text) <= self.context:
      raise InputError(f"text: {len(text)} tokens; give 1 to {self.context}, the length of the model's context")
    wrong = [token for token in text if not 0 <= token < self.method.vocab_size]
    if wrong:
      raise InputError(f"text: it has the id {wrong[0]}; ids must be in 0..{self.method.vocab_size - 1}")
    if len(text) == 1:
      return TextScores([], [])
    tree = Tree(self.method, tuple(text[:1]), [(0, tuple(text[1:]))], 0)
    size = ladder(tree.size, _SHORTEST_ROW)
    layout = {name: np.pad(values, (0, size - tree.size))[None] for name, values in tree.layout.items()}
    layout["tree"] = np.where(np.arange(size) < tree.size, 0, -1)[None]
    # The targets are padded to a number that depends on the padded row alone, so that it adds no programs.
    count, padded = len(tree.targets), size
    reads = np.pad(tree.reads, ((0, padded - count), (0, 0)))
    targets = np.pad(tree.targets, (0, padded - count))
    log_probs, ids, values = jax.device_get(self._score(self.params, layout, reads, targets))
    pairs = zip(ids[:count, :alternatives].tolist(), values[:count, :alternatives].tolist())
    return TextScores(log_probs[:count].tolist(), [list(zip(*each)) for each in pairs])


def _score(
  method: Decoding,
  alternatives: int,
  params: PyTree,
  layout: dict[str, Int[Array, "1 S"]],
  reads: Int[Array, "S W"],
  targets: Int[Array, "S"],
) -> tuple[Float[Array, "S"], Int[Array, "S A"], Float[Array, "S A"]]:
  """(the log-probability of each target, the most likely tokens, their log-probabilities); see `Tree`."""
  hidden = hidden_states(method, params, layout)[0]

  def read(slots: Int[Array, "W"], target: Int[Array, ""]) -> tuple[Array, Array, Array]:
    log_probs, _ = method.mixture_log_probs(params, hidden[slots])
    values, ids = jax.lax.top_k(log_probs, alternatives)
    return log_probs[target], ids, values

  chunk = max(1, _CHUNK_SCORES // (method.num_slots * method.vocab_size))
  return jax.lax.map(lambda each: read(*each), (reads, targets), batch_size=min(chunk, len(targets)))
