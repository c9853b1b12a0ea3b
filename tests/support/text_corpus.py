"""A small text corpus for tests of tokenizers."""

import numpy as np

STEMS = ("the", "not", "was", "see", "dog", "12", "3")
WORDS = [stem + ending for stem in STEMS for ending in ("", "s", "ing", "n", ",", "er", "!", "ly", "t;")]
TRICKY = ["</s>", "<unk>", "▁", "a▁b▁▁ c", "<0x0A>", "<end>", "", " ", "  x \n\n\t y  ", "\0", "日本 €", "\r\n", "▁▁"]


def corpus():
  rng = np.random.default_rng(0)
  return [" ".join(rng.choice(WORDS, 40)) + "\n" + " ".join(rng.choice(WORDS, 9)) for _ in range(60)]
