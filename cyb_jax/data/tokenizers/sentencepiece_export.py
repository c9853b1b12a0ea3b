"""Converts SentencePiece models to the format of the package tokenizers (tokenizer.json)."""

from __future__ import annotations

import base64
from typing import Any

from cyb_jax.data.tokenizers.huggingface_export import added_token, start_template
from cyb_jax.data.tokenizers.sentencepiece_model import PieceType
from cyb_jax.errors import InputError

# A score so low that no text is encoded with the piece.
_NEVER = -1000.0


def huggingface_content(
  model: bytes, separator_id: int, start_id: int, adds_start: bool
) -> tuple[dict[str, Any], dict[int, str]]:
  """The content of a tokenizer.json for a SentencePiece model, and the names of its entries by id.

  The result encodes like the model, with two exceptions: a U+2581 in the text becomes a space; and if the model puts a
  space before every text, the result also puts one after each user-defined piece.

  Args:
    model: the serialised model.
    separator_id, start_id, adds_start: see `Tokenizer`.

  Raises:
    InputError: the model is a word or character model, puts spaces after words, or does not allow `_byte_splitter`.
  """
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  if proto.trainer_spec.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
    raise InputError(
      "data.tokenizer: SentencePiece models with spaces after words can't be written for transformers; export a run"
      " with another tokenizer"
    )
  names = {i: piece.piece for i, piece in enumerate(proto.pieces)}
  types = [piece.type for piece in proto.pieces]
  special = {i for i, kind in enumerate(types) if kind in (PieceType.UNKNOWN, PieceType.CONTROL)} | {
    separator_id,
    start_id,
  }
  own = {i for i, kind in enumerate(types) if kind == PieceType.USER_DEFINED}
  content = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [added_token(i, names[i], special=i in special) for i in sorted(special | own)],
    "normalizer": _normalizer(proto.normalizer_spec),
    "pre_tokenizer": _byte_splitter(proto, sentencepiece_model_pb2.TrainerSpec),
    "post_processor": start_template(names[start_id], start_id) if adds_start else None,
    "decoder": _decoder(proto.normalizer_spec),
    "model": _model(proto, sentencepiece_model_pb2.TrainerSpec),
  }
  return content, names


def _model(proto, kinds) -> dict[str, Any]:
  """The component `model`; `kinds` has the numbers of the model types."""
  unknown = next((i for i, piece in enumerate(proto.pieces) if piece.type == PieceType.UNKNOWN), None)
  fallback = proto.trainer_spec.byte_fallback
  if proto.trainer_spec.model_type == kinds.UNIGRAM:
    # No text may encode to a byte piece by its name, or to a special piece.
    textual = (PieceType.NORMAL, PieceType.USER_DEFINED)
    vocabulary = [[piece.piece, piece.score if piece.type in textual else _NEVER] for piece in proto.pieces]
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": fallback}
  if proto.trainer_spec.model_type == kinds.BPE:
    return {
      "type": "BPE",
      "dropout": None,
      "unk_token": None if unknown is None else proto.pieces[unknown].piece,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": True,
      "byte_fallback": fallback,
      "ignore_merges": False,
      "vocab": {piece.piece: i for i, piece in enumerate(proto.pieces)},
      "merges": _merges(proto),
    }
  raise InputError(
    "data.tokenizer: only SentencePiece models of type unigram and bpe can be written for transformers; export a run"
    " with another tokenizer"
  )


def _byte_splitter(proto, kinds) -> dict[str, Any] | None:
  """The component `pre_tokenizer`, which prevents the text `<0x41>` from being encoded as the byte piece of that name.

  The library's unigram models match byte pieces in a text like any other piece, regardless of their scores: an unknown
  character costs more than the piece with the lowest score. The text is therefore split inside such a name, at a
  position that no piece of text can span.
  """
  if proto.trainer_spec.model_type != kinds.UNIGRAM or not proto.trainer_spec.byte_fallback:
    return None
  textual = [p.piece for p in proto.pieces if p.type in (PieceType.NORMAL, PieceType.USER_DEFINED)]
  for split, pattern in (("<0", "<(?=0x[0-9A-F]{2}>)"), ("0x", "<0(?=x[0-9A-F]{2}>)")):
    if not any(split in piece for piece in textual):
      return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "MergedWithPrevious", "invert": False}
  raise InputError(
    "data.tokenizer: SentencePiece models with pieces '<0' and '0x' can't be written for transformers; export a run"
    " with another tokenizer"
  )


def _merges(proto) -> list[list[str]]:
  """The pairs that a BPE model of SentencePiece merges, in the order of its merges.

  The model merges the pair whose piece has the highest score, for any split of the piece into two.
  """
  textual = (PieceType.NORMAL, PieceType.USER_DEFINED)
  scores = {piece.piece: piece.score for piece in proto.pieces if piece.type in textual}
  ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
  found = []
  for piece, score in scores.items():
    parts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
    parts = sorted((ids[a], ids[b], a, b) for a, b in parts if a in scores and b in scores)
    found += [(-score, ids[piece], *part) for part in parts]
  return [[left, right] for *_, left, right in sorted(found)]


def _normalizer(spec) -> dict[str, Any]:
  steps: list[dict[str, Any]] = []
  if spec.precompiled_charsmap:
    charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
    steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
  if spec.remove_extra_whitespaces:
    steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
    steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
  if spec.add_dummy_prefix:
    steps.append({"type": "Prepend", "prepend": "▁"})
  steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
  return {"type": "Sequence", "normalizers": steps}


def _decoder(spec) -> dict[str, Any]:
  steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
  steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
  if spec.add_dummy_prefix:
    steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
  return {"type": "Sequence", "decoders": steps}
