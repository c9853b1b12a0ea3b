"""Tokenizers whose merges are written by hand."""

import itertools

from cyb_jax.data import HuggingFaceTokenizer


def bpe(merges, *, bytes_=False, fallback=False, special=("<end>",), decoder=None, **settings):
  """A BPE model over the characters of its merges, or over bytes.

  Args:
    merges: pairs of pieces, the first merged first.
    bytes_: whether the tokenizer is byte-level.
    fallback: whether unknown characters are encoded as byte tokens.
    special: names of special tokens; the first one is the end token.
    decoder, **settings: fields of tokenizer.json.
  """
  vocab = {name: i for i, name in enumerate(special)}
  if bytes_:
    from tokenizers import pre_tokenizers

    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    decoder, settings = level, settings | {"pre_tokenizer": level}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  else:
    alphabet = sorted(set("".join(itertools.chain(*merges))))
  alphabet += [f"<0x{byte:02X}>" for byte in range(256)] if fallback else []
  for piece in [*alphabet, *("".join(merge) for merge in merges)]:
    vocab.setdefault(piece, len(vocab))
  model = {"type": "BPE", "vocab": vocab, "merges": [list(merge) for merge in merges], "unk_token": None}
  model |= {
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": fallback,
  }
  plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  added = [{"id": i, "content": name, "special": True} | plain for i, name in enumerate(special)]
  content = {"version": "1.0", "added_tokens": added, "normalizer": None, "decoder": decoder}
  content |= {"pre_tokenizer": None, "post_processor": None, "truncation": None, "padding": None, "model": model}
  return HuggingFaceTokenizer(content | settings, separator_id=0)
