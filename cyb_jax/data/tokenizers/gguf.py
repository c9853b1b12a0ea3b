"""Tokenizers inside GGUF files, built from their metadata `tokenizer.ggml.*`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from absl import logging

from cyb_jax.data.tokenizers import gguf_metadata
from cyb_jax.data.tokenizers.huggingface import DOCUMENT_JOINERS, HuggingFaceTokenizer
from cyb_jax.data.tokenizers.huggingface_export import added_token
from cyb_jax.data.tokenizers.interface import Tokenizer, document_tokens
from cyb_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from cyb_jax.data.tokenizers.sentencepiece_model import PieceType, bpe_model
from cyb_jax.data.tokenizers.special_tokens import SpecialTokens
from cyb_jax.errors import InputError, shown

_PREFIX = "tokenizer.ggml."
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2_SPLIT = _BYTE_LEVEL | {"use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
# The tokens after which llama.cpp ends a text: end of sequence, end of turn, end of message.
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
_TEMPLATE_TOKENS = {
  "bos_token": "bos_token_id",
  "eos_token": "eos_token_id",
  "pad_token": "padding_token_id",
  "unk_token": "unknown_token_id",
}
# llama.cpp's defaults for SentencePiece models whose file lacks these keys.
_SENTENCEPIECE_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
_ADDED = (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED)


def _llama3_split(digits: str) -> dict[str, Any]:
  """The pre-tokenizer of Llama 3; `digits` is the quantifier of digits in one part."""
  words = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
  others = " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
  pattern = f"{words}|\\p{{N}}{digits}|{others}"
  return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@dataclasses.dataclass(frozen=True)
class _PreTokenizer:
  """How text is split before its bytes are merged.

  Attributes:
    steps: the pre-tokenizers of a tokenizer.json.
    normalizer: the type of the normalizer, or None.
    ignore_merges: whether a part that equals an entry becomes this entry without merges.
    adds_start: whether the start token is added if the file does not specify it.
  """

  steps: tuple[dict[str, Any], ...]
  normalizer: str | None = None
  ignore_merges: bool = False
  adds_start: bool = False


_GPT2 = _PreTokenizer((_GPT2_SPLIT,))
_SINGLE_DIGITS = _PreTokenizer((_DIGITS, _GPT2_SPLIT))
_LLAMA3 = _PreTokenizer((_llama3_split("{1,3}"), _BYTE_LEVEL), ignore_merges=True, adds_start=True)
_QWEN2 = _PreTokenizer((_llama3_split(""), _BYTE_LEVEL), normalizer="NFC")
# By tokenizer.ggml.pre.
_PRE_TOKENIZERS = (
  dict.fromkeys(("default", "gpt-2", "gpt2", "olmo", "mpt", "phi-2", "jais", "roberta-bpe"), _GPT2)
  | dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _SINGLE_DIGITS)
  | dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3)
  | dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), _QWEN2)
)


def open_gguf(path: Path, rows: int | None) -> Tokenizer:
  """The tokenizer inside a GGUF file.

  Args:
    path: the file.
    rows: number of rows of the embedding; None means the vocab_size in the file, if there is one.

  Raises:
    InputError: the file is not a GGUF file, its tokenizer is missing, of an unknown kind or without an end token, or
      `rows` does not match.
  """
  metadata = gguf_metadata.read_metadata(path)
  found = {key[len(_PREFIX) :]: value for key, value in metadata.items() if key.startswith(_PREFIX)}
  if "model" not in found or not isinstance(found.get("tokens"), list) or not found["tokens"]:
    raise InputError(
      f"{path}: it contains no tokenizer (tokenizer.ggml.model, .tokens); give a GGUF file with a tokenizer"
    )
  _check_types(path, found)
  if rows is None:
    size = metadata.get(f"{metadata.get('general.architecture')}.vocab_size")
    rows = size if isinstance(size, int) else None
  types = found.setdefault("token_type", [int(PieceType.NORMAL)] * len(found["tokens"]))
  if len(types) != len(found["tokens"]):
    raise InputError(f"{path}: tokenizer.ggml.token_type has {len(types)} values for {len(found['tokens'])} tokens")
  if found["model"] == "llama":
    found = _SENTENCEPIECE_DEFAULTS | found
  ids = {name: i for i, name in enumerate(found["tokens"])}
  end = next((ids[name] for name in DOCUMENT_JOINERS if name in ids), found.get("eos_token_id"))
  if end is None or not 0 <= end < len(ids):
    raise InputError(
      f"{path}: no end token: tokenizer.ggml.eos_token_id is {end}; give a GGUF file with a valid eos_token_id"
    )
  template = metadata.get("tokenizer.chat_template")
  special_tokens = _special_tokens(path, found, template if isinstance(template, str) else None)
  if found["model"] == "gpt2":
    return _byte_level(path, found, end, special_tokens, rows)
  if found["model"] == "llama":
    return _sentencepiece(path, found, end, special_tokens, rows)
  raise InputError(f"{path}: tokenizer.ggml.model {shown(found['model'])} is unknown; known are gpt2 and llama")


def _check_types(path: Path, found: dict[str, Any]) -> None:
  """Checks the types of the values that are read; a file may have a value of any type for any key."""
  lists = {"tokens": (str, "strings"), "merges": (str, "strings"), "token_type": (int, "integers")}
  for name, (kind, wanted) in (lists | {"scores": (float, "floats")}).items():
    values = found.get(name)
    if values is not None and not (isinstance(values, list) and all(isinstance(value, kind) for value in values)):
      raise InputError(f"{path}: tokenizer.ggml.{name} must be a list of {wanted}; fetch it again")
  for name in {*_END_TOKENS, *_TEMPLATE_TOKENS.values()}:
    value = found.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
      raise InputError(f"{path}: tokenizer.ggml.{name} = {shown(value)} must be an integer; fetch it again")


def _special_tokens(path: Path, found: dict[str, Any], template: str | None) -> SpecialTokens:
  """The special tokens that the metadata specifies."""
  tokens = found["tokens"]
  numbers = {name: found[name] for name in (*_END_TOKENS, *_TEMPLATE_TOKENS.values()) if found.get(name) is not None}
  for name, number in numbers.items():
    if not 0 <= number < len(tokens):
      raise InputError(f"{path}: tokenizer.ggml.{name} = {number}, but there are {len(tokens)} tokens; fetch it again")
  return SpecialTokens(
    bos_id=numbers.get("bos_token_id"),
    end_ids=tuple(dict.fromkeys(numbers[name] for name in _END_TOKENS if name in numbers)),
    pad_id=numbers.get("padding_token_id"),
    chat_template=template,
    names={key: tokens[numbers[name]] for key, name in _TEMPLATE_TOKENS.items() if name in numbers},
  )


def _byte_level(
  path: Path, found: dict[str, Any], end: int, special_tokens: SpecialTokens, rows: int | None
) -> Tokenizer:
  """Byte-level BPE."""
  pre = found.get("pre")
  if pre is None:
    pre = "default"
    logging.warning(
      "%s: tokenizer.ggml.pre is missing, so text is split by the pre-tokenizer of GPT-2; if this model uses another"
      " pre-tokenizer, give its tokenizer.json",
      path,
    )
  if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
    raise InputError(f"{path}: tokenizer.ggml.pre {shown(pre)} is unknown; known are {', '.join(_PRE_TOKENIZERS)}")
  pre_tokenizer = _PRE_TOKENIZERS[pre]
  if not isinstance(found.get("merges"), list):
    raise InputError(f"{path}: tokenizer.ggml.merges are missing; fetch it again")
  start = found.get("bos_token_id")
  adds = bool(found.get("add_bos_token", pre_tokenizer.adds_start)) and start is not None
  return HuggingFaceTokenizer(
    _byte_level_content(found, pre_tokenizer),
    special_tokens=special_tokens,
    rows=rows,
    name=str(path),
    **document_tokens(end, start, adds),
  )


def _byte_level_content(found: dict[str, Any], pre_tokenizer: _PreTokenizer) -> dict[str, Any]:
  """The content of a tokenizer.json."""
  types = enumerate(zip(found["tokens"], found["token_type"]))
  added = [added_token(i, name, special=kind != PieceType.USER_DEFINED) for i, (name, kind) in types if kind in _ADDED]
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": added,
    "normalizer": {"type": pre_tokenizer.normalizer} if pre_tokenizer.normalizer else None,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(pre_tokenizer.steps)},
    "post_processor": None,
    "decoder": _BYTE_LEVEL | {"add_prefix_space": True, "use_regex": True},
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": False,
      "ignore_merges": pre_tokenizer.ignore_merges,
      "vocab": {name: i for i, name in enumerate(found["tokens"])},
      "merges": found["merges"],
    },
  }


def _sentencepiece(
  path: Path, found: dict[str, Any], end: int, special_tokens: SpecialTokens, rows: int | None
) -> Tokenizer:
  """SentencePiece BPE with the settings of Llama 2."""
  scores = found.get("scores")
  if not isinstance(scores, list) or len(scores) != len(found["token_type"]):
    raise InputError(f"{path}: tokenizer.ggml.scores must have one value for each token; fetch it again")
  start = found["bos_token_id"]
  pieces = list(zip(found["tokens"], scores, found["token_type"]))
  dummy_prefix = bool(found.get("add_space_prefix", True))
  model = bpe_model(pieces, start, found["eos_token_id"], str(path), dummy_prefix=dummy_prefix)
  adds = bool(found.get("add_bos_token", True))
  return SentencePieceTokenizer(
    model, special_tokens=special_tokens, rows=rows, name=str(path), **document_tokens(end, start, adds)
  )
