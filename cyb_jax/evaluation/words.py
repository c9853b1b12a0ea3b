"""The positions of tokens in words, the words that the paper names, and the classes of words.

A word is a run of letters and digits. A piece that begins with a space and goes on with letters starts one; one of
letters alone continues one, or starts one after anything else; all other pieces (punctuation, white space, the end of a
document) are neither. A byte outside ASCII is a letter.

Dimensions: B batch, T tokens, C tokens before a window.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np

from cyb_jax.data import Tokenizer

POSITIONS = ("whole", "first", "middle", "last", "other")

PAPER = {
  "low_low": ("isn", "wasn", "didn", "doesn", "don", "according", "able", "However", "etc"),
  "high_low": ("devices", "players", "students", "projects", "patients", "challenges", "families"),
  "low_high": ("won", "g", "e", "New", "co"),
  "high_high": ("images", "pictures", "sites", "wood"),
}
"""The words that arXiv 2510.13879 lists, by the median and the variance of their pauses."""

CLASSES = {
  "noun": ("NN", "NNS"),
  "proper noun": ("NNP", "NNPS"),
  "verb": ("VB", "VBD", "VBG", "VBN", "VBP", "VBZ"),
  "modal": ("MD",),
  "adjective": ("JJ", "JJR", "JJS"),
  "adverb": ("RB", "RBR", "RBS"),
  "pronoun": ("PRP", "PRP$"),
  "determiner": ("DT", "PDT"),
  "preposition": ("IN", "TO"),
  "conjunction": ("CC",),
  "question word": ("WDT", "WP", "WP$", "WRB"),
  "number": ("CD",),
  "particle": ("RP",),
  "interjection": ("UH",),
}
"""Classes of words, and the tags of the Penn Treebank that they gather."""

_OTHER, _START, _LETTERS = range(3)


class Words:
  """Words as a tokenizer's pieces spell them.

  Args:
    tokenizer: its pieces are looked at once.

  Attributes:
    words: (word, group of `PAPER`), in the order of their numbers.
    spellings: the ids of each word's pieces.
    texts: of the pieces, without a space before.
    classes: names, in the order of their numbers; None where there is no lexicon.
    class_of_token: int[V], of pieces that begin with a space; -1: none.
    context: C, how many tokens before a window `mark` has to see.
  """

  def __init__(self, tokenizer: Tokenizer):
    pieces = [_parted(tokenizer, token) for token in range(tokenizer.vocab_size)]
    self._kinds = np.array([_kind(*piece) for piece in pieces])
    self.texts = [text for _, text in pieces]
    self.words = [(word, group) for group, words in PAPER.items() for word in words]
    self.spellings = [_spelling(tokenizer, word) for word, _ in self.words]
    self.context = max(1, *map(len, self.spellings))
    lexicon = _lexicon()
    self.classes = list(CLASSES) if lexicon else None
    numbers = {tag: number for number, tags in enumerate(CLASSES.values()) for tag in tags}
    # What follows an apostrophe or a hyphen is a part of a word.
    tags = [lexicon.get(text, lexicon.get(text.lower())) if spaced else None for spaced, text in pieces]
    self.class_of_token = np.array([numbers.get(tag, -1) for tag in tags])

  def mark(
    self, before: np.ndarray, tokens: np.ndarray, targets: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each token is.

    Args:
      before: int[B, C], the tokens before each window.
      tokens, targets: int[B, T].

    Returns:
      The number of the paper's word that ends with the token, that of its position in the word, and that of the class
      of the word that it is alone; int[B, T] each, -1: none. A word of the paper or of a class follows a space, and
      isn't continued.
    """
    ids = np.concatenate([before, tokens, targets[:, -1:]], 1)
    first, length = before.shape[1], tokens.shape[1]

    def shifted(values: np.ndarray, by: int) -> np.ndarray:
      return values[:, first + by : first + by + length]

    kinds = self._kinds[ids]
    here, goes_on = shifted(kinds, 0), shifted(kinds, 1) == _LETTERS
    starts = (here == _START) | ((here == _LETTERS) & (shifted(kinds, -1) == _OTHER))
    positions = np.where(starts, np.where(goes_on, 1, 0), np.where(goes_on, 2, 3))
    positions = np.where(here == _OTHER, 4, positions)
    words = np.full(tokens.shape, -1)
    for number, spelling in enumerate(self.spellings):
      if spelling:
        backwards = enumerate(reversed(spelling))
        found = functools.reduce(np.logical_and, (shifted(ids, -back) == token for back, token in backwards))
        words[found & ~goes_on] = number
    return words, positions, np.where(positions == 0, self.class_of_token[tokens], -1)


def _parted(tokenizer: Tokenizer, token: int) -> tuple[bool, str]:
  """Whether a piece begins with a space, and its text without that."""
  if token == tokenizer.separator_id:
    return False, ""
  text = tokenizer.piece(token)
  # A part of a character may follow a space.
  if not text.startswith("▁") or "<0x" in text:
    text = tokenizer.decode([token])
  return text[:1] in ("▁", " "), text[text[:1] in ("▁", " ") :]


def _kind(spaced: bool, text: str) -> int:
  # A part of a character decodes to U+FFFD.
  if not text or not all(letter.isalnum() or letter == "\ufffd" for letter in text):
    return _OTHER
  return _START if spaced else _LETTERS


def _spelling(tokenizer: Tokenizer, word: str) -> list[int]:
  """The pieces of a word after a space; [] if the text before it changes them."""
  # A model may put a space before every text, so that the word's own one is asked for behind another word.
  before, both = tokenizer.encode("a"), tokenizer.encode(f"a {word}")
  return both[len(before) :] if both[: len(before)] == before else []


@functools.cache
def _lexicon() -> dict[str, str]:
  """The most frequent tag of words, from the package textblob; {} where it isn't installed."""
  spec = importlib.util.find_spec("textblob")
  folders = list(spec.submodule_search_locations or ()) if spec else []
  # Found, not imported: the package's code is of no use here.
  path = next((p for folder in folders if (p := Path(folder) / "en" / "en-lexicon.txt").exists()), None)
  if path is None:
    return {}
  with path.open(encoding="utf-8") as file:
    pairs = (line.split() for line in file if not line.startswith(";;;"))
    return {pair[0]: pair[1].split("|")[0] for pair in pairs if len(pair) == 2}
