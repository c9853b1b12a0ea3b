"""The table of token categories: one row for each type, each of the paper's words, each position in a word, and each
class of words.

Dimensions: B batch, T tokens, C tokens before a window, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cyb_jax.data import Tokenizer
from cyb_jax.evaluation.accumulation import Sums
from cyb_jax.evaluation.pause_sums import pauses_bound
from cyb_jax.evaluation.token_types import TokenTypes, bins_per_pause, summarize
from cyb_jax.evaluation.words import POSITIONS, Words

_EXAMPLES = 5


class TypeTable:
  """The rows of the table, and the records from the sums in these rows.

  Args:
    tokenizer: the tokenizer of the method's vocabulary.
    min_count: the minimum number of tokens of a type in the corners and rankings of types.

  Attributes:
    context: C, the number of tokens before a window that `rows` needs.
    num_rows: the number of rows of the table.
  """

  def __init__(self, tokenizer: Tokenizer, min_count: int):
    self._tokenizer, self._min_count = tokenizer, min_count
    self._words = Words(tokenizer)
    self.context = self._words.context
    sizes = [tokenizer.vocab_size, len(self._words.words), len(POSITIONS), len(self._words.classes or ())]
    self._borders = np.cumsum([0, *sizes])
    self.num_rows = int(self._borders[-1])

  def rows(self, before: np.ndarray, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """i32[B, T, 4], the rows that count each token; `num_rows` if a token belongs to no row of a kind.

    Args:
      before: int[B, C], the tokens before each window.
      tokens, targets: int[B, T].
    """
    marks = self._words.mark(before, tokens, targets)
    rows = [np.where(mark < 0, self.num_rows, mark + border) for mark, border in zip(marks, self._borders[1:])]
    return np.stack([tokens, *rows], -1).astype(np.int32)

  def records(self, sums: Sums, pauses: int) -> dict[str, Any]:
    """`types`, `word_position`, `word_class` and `frequency` of statistics.json.

    Args:
      sums: `table`, `moments` and `alone` of `pause_sums.first_pass`.
      pauses: K.
    """
    types = TokenTypes(
      sums["table"], sums["moments"], pauses_bound(pauses + 1), 1 / bins_per_pause(self.num_rows, pauses)
    )
    vocabulary, first_position = int(self._borders[1]), int(self._borders[2])
    return {
      "types": summarize(types, self._tokenizer, min_count=self._min_count) | {"paper": self._paper(types)},
      "word_position": [{"position": name} | types.row(first_position + n) for n, name in enumerate(POSITIONS)],
      "word_class": self._classes(types, sums["alone"][:vocabulary]) or None,
      "frequency": types.frequencies(vocabulary),
    }

  def _paper(self, types: TokenTypes) -> list[dict[str, Any]]:
    """One row for each word that the paper lists."""
    rows = []
    for number, ((word, group), spelling) in enumerate(zip(self._words.words, self._words.spellings)):
      piece = "".join(map(self._tokenizer.piece, spelling))
      token = spelling[0] if len(spelling) == 1 else None
      row = {"word": word, "group": group, "piece": piece, "token": token}
      rows.append(row | types.row(int(self._borders[1]) + number))
    return rows

  def _classes(self, types: TokenTypes, alone: np.ndarray) -> list[dict[str, Any]]:
    """One row for each class of words that occurs, with its most frequent words; empty without a lexicon."""
    words, rows = self._words, []
    for number, name in enumerate(words.classes or ()):
      row = types.row(int(self._borders[3]) + number)
      often = np.where(words.class_of_token == number, alone, 0)
      members = [token for token in np.argsort(-often, kind="stable")[:_EXAMPLES] if often[token]]
      if row["count"]:
        rows.append({"class": name} | row | {"examples": [words.texts[token] for token in members]})
    return rows
