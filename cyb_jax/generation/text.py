"""The text of generated tokens, also while streaming: the tokens may end inside a character or inside a stop string."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from cyb_jax.data import Tokenizer
from cyb_jax.data.tokenizers import surrogate
from cyb_jax.errors import InputError

# Represents a pause in displayed text.
PAUSE_MARK = "\N{MIDDLE DOT}"
# Decoding returns this for bytes that are not a character, or not yet a complete character.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# Surrogates mark special entries, because no decoded text contains surrogates.
_FIRST_MARK, _LAST_MARK = 0xD800, 0xDFFF


def printable(text: str) -> str:
  """The text with visible codes instead of control characters, except tabs and line ends."""
  return "".join(
    f"<U+{ord(c):04X}>" if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t" else c for c in text
  )


class Continuation:
  """The text of a row after its prompt.

  Args:
    tokenizer: the run's tokenizer.
    prompt: the last ids of the prompt. New tokens are decoded together with them, because some tokenizers drop the
      first space of a text.
    stops: strings that end the text and are not part of it. If a stop string contains the name of a special entry, such
      as '<|im_end|>', alone or with other text, it also matches the special entry, which has no text of its own.

  Raises:
    InputError: a stop string has a surrogate, which no text contains.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()):
    for stop in stops:
      if surrogate(stop) is not None:
        raise InputError(f"stop: {stop!r} has {surrogate(stop)!r}, which is not a character; leave it out")
    self._tokenizer, self._prompt = tokenizer, list(prompt)
    self._before = len(tokenizer.decode(self._prompt))
    self._marks, self._stops = _marked(tokenizer.special_names(), stops)
    self._tokens: list[int] = []
    self._shown = 0

  def text(self, tokens: Sequence[int]) -> str:
    """The text of these tokens, up to the first stop string."""
    return _unmarked(self._cut(self._decode(tokens)))

  def kept(self, tokens: Sequence[int]) -> int | None:
    """The smallest number of first tokens whose text has a stop string; None: the text has no stop string."""
    if not self._stops or not self._has_stop(tokens):
      return None
    few, enough = 0, len(tokens)
    while enough - few > 1:
      middle = (few + enough) // 2
      few, enough = (few, middle) if self._has_stop(tokens[:middle]) else (middle, enough)
    return enough

  def pieces(self, tokens: Sequence[int], pauses: Sequence[int]) -> Iterator[tuple[int, str]]:
    """(pauses, text) of each of these tokens, which follow the tokens of earlier calls.

    If several tokens encode a character, the last of them yields the character. Text that may become a stop string is
    withheld, and so is text that a later token may change.
    """
    for token, count in zip(tokens, pauses, strict=True):
      self._tokens.append(token)
      text = self._settled()
      begun = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
      end = len(text) - max(begun, default=0)
      yield count, _unmarked(text[self._shown : end])
      self._shown = max(self._shown, end)

  def rest(self) -> str:
    """The withheld text, after the last token."""
    text = self._cut(self._decode(self._tokens))
    rest, self._shown = text[self._shown :], len(text)
    return _unmarked(rest)

  def _settled(self) -> str:
    """The part of the text that later tokens do not change, up to the first stop string."""
    text = self._decode(self._tokens)
    # With one more byte, some decoders replace all characters of the preceding bytes. If the last token is a byte,
    # repeating it adds such a byte.
    further = self._decode([*self._tokens, self._tokens[-1]])
    changed = (i for i, (one, other) in enumerate(zip(text, further)) if one != other)
    text = text[: next(changed, min(len(text), len(further)))]
    # Unfinished bytes may become a character, so the beginning of a stop string is looked for before them.
    return self._cut(text.rstrip(_UNFINISHED))

  def _decode(self, tokens: Sequence[int]) -> str:
    """The text of the tokens, with the mark of each special entry that a stop string names."""
    text = self._decoded(tokens)
    for index in reversed([i for i, token in enumerate(tokens) if token in self._marks]):
      before = len(self._decoded(tokens[:index]))
      text = text[:before] + self._marks[tokens[index]] + text[before:]
    return text

  def _decoded(self, tokens: Sequence[int]) -> str:
    return self._tokenizer.decode([*self._prompt, *tokens])[self._before :]

  def _has_stop(self, tokens: Sequence[int]) -> bool:
    text = self._decode(tokens)
    return any(stop in text for stop in self._stops)

  def _cut(self, text: str) -> str:
    ends = [text.index(stop) for stop in self._stops if stop in text]
    return text[: min(ends)] if ends else text


def _marked(names: Mapping[int, str], stops: Sequence[str]) -> tuple[dict[int, str], tuple[str, ...]]:
  """({special id: its mark}, the stop strings), for the special entries that stop strings name.

  A mark is a character that no text contains. A stop string with a name occurs twice in the result: unchanged, because
  text may also spell the name, and with marks instead of the names.

  Args:
    names: the names of the special entries, by id.
    stops: the stop strings.
  """
  named = sorted({name for name in names.values() if name and any(name in stop for stop in stops)}, key=len)
  marks = {name: chr(_FIRST_MARK + number) for number, name in enumerate(named[: _LAST_MARK - _FIRST_MARK + 1])}
  if not marks:
    return {}, tuple(stops)
  longest_first = re.compile("|".join(map(re.escape, reversed(marks))))
  spelled = [longest_first.sub(lambda found: marks[found[0]], stop) for stop in stops]
  return {i: marks[name] for i, name in names.items() if name in marks}, tuple(dict.fromkeys([*stops, *spelled]))


def _unmarked(text: str) -> str:
  return "".join(character for character in text if not _FIRST_MARK <= ord(character) <= _LAST_MARK)
