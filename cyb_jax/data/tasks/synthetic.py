"""Generated tasks whose answers need a known number of steps.

The tasks are `synthetic_lookups`, `synthetic_sums`, `synthetic_questions`, `synthetic_parity` and `synthetic_hops`.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from cyb_jax.data.tasks.interface import Document, Piece, Source, TaskKind, consecutive_pieces
from cyb_jax.errors import InputError, check_seed

_PIECE_DOCUMENTS = 4096

# (random number generator, lowest and highest difficulty) -> a text, and the (position, difficulty) of its answers.
Write = Callable[[np.random.Generator, int, int], tuple[str, list[tuple[int, int]]]]


@dataclasses.dataclass(frozen=True)
class _Generator:
  """A generated source.

  Attributes:
    write: generates one document.
    lowest, highest: bounds of the difficulty of its answers.
    seed: seed of the task.
    counts: number of documents by split.
    answers_only: whether only the answers have weight 1.
  """

  write: Write
  lowest: int
  highest: int
  seed: int
  counts: Mapping[str, int]
  answers_only: bool

  def read(self, group: str, part: list[int] | None) -> Iterator[Document]:
    """See `Source.read`; a part is a range of documents."""
    for number in range(*(part or (0, self.counts[group]))):
      # The split is part of the seed, so documents of different splits come from different random streams.
      rng = np.random.default_rng((self.seed, tuple(self.counts).index(group), number))
      text, answers = self.write(rng, self.lowest, self.highest)
      difficulty = np.zeros(len(text), np.uint8)
      for position, steps in answers:
        difficulty[position] = steps
      yield Document(text, difficulty, (difficulty > 0).astype(np.uint8) if self.answers_only else None)

  def pieces(self, group: str) -> list[Piece]:
    """See `Source.parts`."""
    begins = range(0, self.counts[group], _PIECE_DOCUMENTS)
    ranges = [[begin, min(begin + _PIECE_DOCUMENTS, self.counts[group])] for begin in begins]
    return consecutive_pieces(group, ((part, part[1] - part[0]) for part in ranges))


def _kind(name: str, write: Write, *, answers_only: bool = False) -> TaskKind:
  def open_generator(options):
    lowest, highest = options["min_difficulty"], options["max_difficulty"]
    if not 1 <= lowest <= highest <= 8:
      raise InputError(f"data.options.min_difficulty={lowest}, max_difficulty={highest}: give 1 <= min <= max <= 8")
    check_seed("data.options.seed", options["seed"])
    if options["documents"] < 1:
      raise InputError(f"data.options.documents={options['documents']}: give at least 1")
    counts = {"train": options["documents"]}
    counts |= dict.fromkeys(("validation", "test"), max(64, options["documents"] // 20))
    generator = _Generator(write, lowest, highest, options["seed"], counts, answers_only)
    return {"generator": name, "version": 1}, lambda: Source(tuple(counts), generator.read, generator.pieces)

  defaults: dict[str, Any] = {"documents": 20000, "min_difficulty": 1, "max_difficulty": 8, "seed": 0}
  annotations = ("difficulty", "weights") if answers_only else ("difficulty",)
  return TaskKind(defaults, open_generator, annotations, tokenizer="bytes")


def write_lookups(rng: np.random.Generator, lowest: int, highest: int) -> tuple[str, list[tuple[int, int]]]:
  """One document of `synthetic_lookups`, and the (position, difficulty m) of its answers.

  A context assigns a digit to each of 24 letters; three questions follow. The answer to a question is the sum, modulo
  10, of the digits of its m letters. The questions have no letters in common, so no answer helps with another.

      b=3 q=7 a=1 ... ?qa=8 ?b=3 ?..=5
  """
  letters = rng.permutation(list(string.ascii_lowercase))[:24]
  digits = rng.integers(0, 10, 24)
  text = " ".join(f"{letter}={digit}" for letter, digit in zip(letters, digits, strict=True))
  remaining, answers = iter(rng.permutation(24)), []
  for steps in rng.integers(lowest, highest + 1, 3):
    chosen = [next(remaining) for _ in range(steps)]
    text += f" ?{''.join(letters[i] for i in chosen)}={sum(digits[i] for i in chosen) % 10}"
    answers.append((len(text) - 1, int(steps)))
  return text, answers


def write_question(rng: np.random.Generator, lowest: int, highest: int) -> tuple[str, list[tuple[int, int]]]:
  """One document of `synthetic_questions`, and the (position, difficulty m) of its answer.

  A context assigns a digit to each of eight letters; one question follows. Only its answer has weight 1: the sum,
  modulo 10, of the digits of the question's m letters.

      b=3 q=7 a=1 ... ?qa=8
  """
  letters = rng.permutation(list(string.ascii_lowercase))[:8]
  digits = rng.integers(0, 10, 8)
  steps = int(rng.integers(lowest, highest + 1))
  chosen = rng.permutation(8)[:steps]
  text = " ".join(f"{letter}={digit}" for letter, digit in zip(letters, digits, strict=True))
  text += f" ?{''.join(letters[i] for i in chosen)}={sum(digits[i] for i in chosen) % 10}"
  return text, [(len(text) - 1, steps)]


def write_sums(rng: np.random.Generator, lowest: int, highest: int) -> tuple[str, list[tuple[int, int]]]:
  """One document of `synthetic_sums`, and the (position, difficulty m) of its answers.

  The definitions of two chains, modulo 10, are shuffled together. The first definition of a chain is a digit; every
  further definition is a sum that needs the previous one. One question about each chain follows, m sums away from its
  digit; a second question about a chain would be easier, given the answer to the first.

      c=b+9 x=4 a=3 b=a+4 ... ?c=6 ?x=4
  """
  letters = iter(rng.permutation(list(string.ascii_lowercase)))
  definitions, questions = [], []
  for steps in rng.integers(lowest, highest + 1, 2):
    name, value = next(letters), int(rng.integers(10))
    definitions.append(f"{name}={value}")
    for step in range(1, highest + 1):
      previous, name, add = name, next(letters), int(rng.integers(10))
      value = (value + add) % 10
      definitions.append(f"{name}={previous}+{add}")
      if step == steps:
        questions.append((f" ?{name}={value}", int(steps)))
  text = " ".join(rng.permutation(definitions))
  answers = []
  for question, steps in questions:
    text += question
    answers.append((len(text) - 1, steps))
  return text, answers


def write_parity(rng: np.random.Generator, lowest: int, highest: int) -> tuple[str, list[tuple[int, int]]]:
  """One document of `synthetic_parity`, and the (position, difficulty m) of its answer.

  The letters a to h in random order, each small or capital; then m, and the answer: whether the number of capitals
  among the first m letters of the alphabet is odd. Only the answer has weight 1.

      cAhBgDfe30     of a, b and c two are capitals

  One head of attention counts the capitals at any width of the layers, but the parity of a count in 0 .. m is a zigzag
  with m + 1 pieces, and an MLP of a token has only as many pieces as hidden units. Every pause applies the MLP again
  with other inputs.
  """
  letters, capital = string.ascii_lowercase[:8], rng.integers(0, 2, 8)
  steps = int(rng.integers(lowest, highest + 1))
  text = "".join(letters[i].upper() if capital[i] else letters[i] for i in rng.permutation(8))
  text += f"{steps}{capital[:steps].sum() % 2}"
  return text, [(len(text) - 1, steps)]


def write_hops(rng: np.random.Generator, lowest: int, highest: int) -> tuple[str, list[tuple[int, int]]]:
  """One document of `synthetic_hops`, and the (position, difficulty m) of its answer.

  A permutation p of n = 2 * `highest` letters, written as p(a) p(b) p(c) ..; then a start, m, and the answer: p applied
  m times to the start. p is a single cycle, so that no answer is its start, and no way backwards is shorter. Only the
  answer has weight 1.

      dcabb2a     n = 4, start b, m = 2: p(b) = c, p(c) = a

  Every application is a lookup at a place that the previous one determines, so the work is sequential: the layers limit
  m, and further slots at the same depth do not help.
  """
  order = rng.permutation(2 * highest)
  following = np.empty_like(order)
  following[order] = np.roll(order, -1)
  steps, start = int(rng.integers(lowest, highest + 1)), int(rng.integers(2 * highest))
  place = int(np.flatnonzero(order == start)[0])
  answer = order[(place + steps) % len(order)]
  letters = string.ascii_lowercase
  text = "".join(letters[i] for i in following) + f"{letters[start]}{steps}{letters[answer]}"
  return text, [(len(text) - 1, steps)]


KINDS = {
  "synthetic_lookups": _kind("synthetic_lookups", write_lookups),
  "synthetic_sums": _kind("synthetic_sums", write_sums),
  "synthetic_questions": _kind("synthetic_questions", write_question, answers_only=True),
  "synthetic_parity": _kind("synthetic_parity", write_parity, answers_only=True),
  "synthetic_hops": _kind("synthetic_hops", write_hops, answers_only=True),
}
