"""Which tokens of a text belong to a part of it, where tokens may lie across the part's border.

A text is a context and a continuation, or a prompt and an answer. It is always encoded as a whole: the tokens of its
parts, encoded separately, may be others and more. One rule, `tokens_with`, then decides which tokens belong to the
continuation: those that have any byte of it. A token across the border so belongs to the continuation.

Letters: N tokens of a text, S bytes of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from cyb_jax.data.tokenizers.interface import Tokenizer


def tokens_with(spans: Int[np.ndarray, "N 2"], marked: Bool[np.ndarray, "S"]) -> Bool[np.ndarray, "N"]:
  """bool[N], which tokens have a marked byte.

  Args:
    spans: of `Tokenizer.encode_spans`; a token that is placed after the text has the text's last byte.
    marked: of each byte of the text.
  """
  if not len(marked):
    return np.zeros(len(spans), bool)
  before = np.concatenate([[0], np.cumsum(marked)])
  first = np.minimum(spans[:, 0], len(marked) - 1)
  return before[np.clip(spans[:, 1], first + 1, len(marked))] > before[first]


def continuation_start(spans: Int[np.ndarray, "N 2"], border: int, size: int) -> int:
  """The index of the first token that has a byte of the continuation; N if there is none.

  Args:
    spans: of `Tokenizer.encode_spans`, of the whole text.
    border: the number of bytes of the context.
    size: S.
  """
  found = tokens_with(spans, np.arange(size) >= border)
  return int(found.argmax()) if found.any() else len(found)


def encode_pairs(
  tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, special: bool = False
) -> list[tuple[list[int], list[int]]]:
  """(ids of the context, ids of the continuation) of each pair of texts, which are encoded together.

  No start token is added. Where a token across the border begins the text, the context has no ids.

  Args:
    tokenizer: any tokenizer.
    pairs: (context, continuation), either of which may be empty.
    special: whether the name of a special entry becomes its id (`Tokenizer.encode_with_special`).

  Example:
    >>> from cyb_jax.data.tokenizers import ByteTokenizer
    >>> encode_pairs(ByteTokenizer(), [("ab", "c"), ("", "d")])
    [([97, 98], [99]), ([], [100])]
  """
  result = []
  texts = [context + continuation for context, continuation in pairs]
  encoded = list(map(tokenizer.encode_spans_with_special, texts)) if special else tokenizer.encode_spans(texts)
  for (context, continuation), (ids, spans) in zip(pairs, encoded, strict=True):
    border = len(context.encode())
    start = continuation_start(spans, border, border + len(continuation.encode()))
    result.append((ids[:start], ids[start:]))
  return result
