"""Determines which tokens of a text belong to a part of it; a token may span the border of the part.

A text consists of a context and a continuation, or of a prompt and an answer. The two parts are always encoded
together, because encoding them separately may give different tokens. A single rule, `tokens_with`, then determines
which tokens belong to the continuation: the tokens that contain any byte of it. A token that spans the border therefore
belongs to the continuation.

Letters: N tokens of a text, S bytes of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from cyb_jax.data.tokenizers.interface import Tokenizer


def tokens_with(spans: Int[np.ndarray, "N 2"], marked: Bool[np.ndarray, "S"]) -> Bool[np.ndarray, "N"]:
  """bool[N]: whether each token contains a marked byte.

  Args:
    spans: the result of `Tokenizer.encode_spans`; a span after the text is taken for the text's last byte.
    marked: whether each byte of the text is marked.
  """
  if not len(marked):
    return np.zeros(len(spans), bool)
  before = np.concatenate([[0], np.cumsum(marked)])
  first = np.minimum(spans[:, 0], len(marked) - 1)
  return before[np.clip(spans[:, 1], first + 1, len(marked))] > before[first]


def continuation_start(spans: Int[np.ndarray, "N 2"], border: int, size: int) -> int:
  """The index of the first token that contains a byte of the continuation; N if there is none.

  Args:
    spans: the result of `Tokenizer.encode_spans` for the context and the continuation.
    border: the number of bytes of the context.
    size: S.
  """
  found = tokens_with(spans, np.arange(size) >= border)
  return int(found.argmax()) if found.any() else len(found)


def encode_pairs(
  tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, special: bool = False
) -> list[tuple[list[int], list[int]]]:
  """(ids of the context, ids of the continuation) of each pair of texts, which are encoded together.

  No start token is added. If the first token spans the border, the context has no ids.

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
