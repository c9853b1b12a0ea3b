"""The positions of tokens in words, the words that the paper names, and the classes of words.

A word is a run of letters and digits. A piece of a space and letters starts a word. A piece of letters only continues a
word, or starts a word if no word precedes it. All other pieces (punctuation, white space, the end of a document) are
not part of a word. A byte outside of ASCII counts as a letter.

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
"""Classes of words, and the Penn Treebank tags in each class."""

_OTHER, _START, _LETTERS = range(3)


class Words:
  """The words that a tokenizer's pieces spell.

  Args:
    tokenizer: the tokenizer; its pieces are read once.

  Attributes:
    words: (word, group of `PAPER`), in the order of their numbers.
    spellings: the ids of each word's pieces.
    texts: the texts of the pieces, without a leading space.
    classes: the names of the classes, in the order of their numbers; None without a lexicon.
    class_of_token: int[V], the class of each piece that begins with a space; -1: none.
    context: C, the number of tokens before a window that `mark` needs.
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
    # A piece without a space, for example after an apostrophe or a hyphen, is only a part of a word.
    tags = [lexicon.get(text, lexicon.get(text.lower())) if spaced else None for spaced, text in pieces]
    self.class_of_token = np.array([numbers.get(tag, -1) for tag in tags])

  def mark(
    self, before: np.ndarray, tokens: np.ndarray, targets: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The categories of each token.

    Args:
      before: int[B, C], the tokens before each window.
      tokens, targets: int[B, T].

    Returns:
      Three arrays int[B, T], -1 for none: the number of the paper's word that ends with the token; the number of the
      token's position in its word; and the number of the class of its word, if the word is one token. A word of the
      paper or of a class follows a space and ends with the token.
    """
    ids = np.concatenate([before, tokens, targets[:, -1:]], 1)
    first, length = before.shape[1], tokens.shape[1]

    def shifted(values: np.ndarray, by: int) -> np.ndarray:
      return values[:, first + by : first + by + length]

    kinds = self._kinds[ids]
    here, continues = shifted(kinds, 0), shifted(kinds, 1) == _LETTERS
    starts = (here == _START) | ((here == _LETTERS) & (shifted(kinds, -1) == _OTHER))
    positions = np.where(starts, np.where(continues, 1, 0), np.where(continues, 2, 3))
    positions = np.where(here == _OTHER, 4, positions)
    words = np.full(tokens.shape, -1)
    for number, spelling in enumerate(self.spellings):
      if spelling:
        backwards = enumerate(reversed(spelling))
        found = functools.reduce(np.logical_and, (shifted(ids, -back) == token for back, token in backwards))
        words[found & ~continues] = number
    return words, positions, np.where(positions == 0, self.class_of_token[tokens], -1)


def _parted(tokenizer: Tokenizer, token: int) -> tuple[bool, str]:
  """Whether a piece begins with a space, and its text without the space."""
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
  # Some tokenizers add a space before every text, so the word is encoded after another word.
  before, both = tokenizer.encode("a"), tokenizer.encode(f"a {word}")
  return both[len(before) :] if both[: len(before)] == before else []


@functools.cache
def _lexicon() -> dict[str, str]:
  """The most frequent tag of words, from the package textblob; {} if it is not installed."""
  spec = importlib.util.find_spec("textblob")
  folders = list(spec.submodule_search_locations or ()) if spec else []
  # The lexicon is read without importing the package, because only its file is needed.
  path = next((p for folder in folders if (p := Path(folder) / "en" / "en-lexicon.txt").exists()), None)
  if path is None:
    return {}
  with path.open(encoding="utf-8") as file:
    pairs = (line.split() for line in file if not line.startswith(";;;"))
    return {pair[0]: pair[1].split("|")[0] for pair in pairs if len(pair) == 2}
