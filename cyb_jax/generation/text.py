"""The text of generated tokens, also while they arrive: it may end inside a character or inside a stop string."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from cyb_jax.data import Tokenizer

# Represents a pause in displayed text.
PAUSE_MARK = "\N{MIDDLE DOT}"
# Decoding returns this for bytes that are not a character, or not yet a whole one.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def printable(text: str) -> str:
  """The text with visible codes in place of control characters, except tabs and line ends."""
  return "".join(
    f"<U+{ord(c):04X}>" if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t" else c for c in text
  )


class Continuation:
  """The text of a row after its prompt.

  Args:
    tokenizer: of the run.
    prompt: the last ids of the prompt. New tokens are decoded together with them, because some tokenizers drop the
      first space of a text.
    stops: strings that end the text; they are not part of it.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()):
    self._tokenizer, self._prompt, self._stops = tokenizer, list(prompt), tuple(stops)
    self._before = len(tokenizer.decode(self._prompt))
    self._tokens: list[int] = []
    self._shown = 0

  def text(self, tokens: Sequence[int]) -> str:
    """The text of these tokens, up to the first stop string."""
    return self._cut(self._decode(tokens))

  def kept(self, tokens: Sequence[int]) -> int | None:
    """The fewest of the first tokens whose text has a stop string; None: the text of all of them has none."""
    if not self._stops or not self._has_stop(tokens):
      return None
    few, enough = 0, len(tokens)
    while enough - few > 1:
      middle = (few + enough) // 2
      few, enough = (few, middle) if self._has_stop(tokens[:middle]) else (middle, enough)
    return enough

  def pieces(self, tokens: Sequence[int], pauses: Sequence[int]) -> Iterator[tuple[int, str]]:
    """(pauses, text) of each of these tokens, which follow those of earlier calls.

    The last token of a character that several tokens encode yields the character. Text that may become a stop string is
    withheld.
    """
    for token, count in zip(tokens, pauses, strict=True):
      self._tokens.append(token)
      text = self._cut(self._decode(self._tokens))
      end = len(text.rstrip(_UNFINISHED))
      begun = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
      end = min(end, len(text) - max(begun, default=0))
      yield count, text[self._shown : end]
      self._shown = max(self._shown, end)

  def rest(self) -> str:
    """The withheld text, after the last token."""
    text = self._cut(self._decode(self._tokens))
    rest, self._shown = text[self._shown :], len(text)
    return rest

  def _decode(self, tokens: Sequence[int]) -> str:
    return self._tokenizer.decode([*self._prompt, *tokens])[self._before :]

  def _has_stop(self, tokens: Sequence[int]) -> bool:
    text = self._decode(tokens)
    return any(stop in text for stop in self._stops)

  def _cut(self, text: str) -> str:
    ends = [text.index(stop) for stop in self._stops if stop in text]
    return text[: min(ends)] if ends else text
