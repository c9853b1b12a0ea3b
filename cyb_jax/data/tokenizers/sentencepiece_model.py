"""SentencePiece models as protocol buffers: their piece types, and functions that build or modify them."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence

from cyb_jax.errors import InputError, shown


class PieceType(enum.IntEnum):
  """`ModelProto.SentencePiece.Type` of SentencePiece; `tokenizer.ggml.token_type` of GGUF has the same numbers."""

  NORMAL = 1
  UNKNOWN = 2
  CONTROL = 3
  USER_DEFINED = 4
  UNUSED = 5
  BYTE = 6


def with_control(model: bytes, ids: Iterable[int]) -> bytes:
  """The model in which these pieces are control pieces, to which no text encodes."""
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  for number in ids:
    proto.pieces[number].type = sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
  return proto.SerializeToString()


def bpe_model(pieces: Sequence[tuple[str, float, int]], bos: int, eos: int, where: str, *, dummy_prefix: bool) -> bytes:
  """A serialised BPE model with the settings of Llama 2.

  Args:
    pieces: (piece, score, PieceType) by id.
    bos, eos: ids of the begin and end tokens.
    where: the file, for errors.
    dummy_prefix: whether a space is put before every text.

  Raises:
    InputError: there is not exactly one unknown piece, or bos or eos is out of range.
  """
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto()
  for number, (piece, score, kind) in enumerate(pieces):
    try:
      proto.pieces.add(piece=piece, score=score, type=kind)
    except (TypeError, ValueError) as error:
      raise InputError(
        f"{where}: entry {number} has the name {shown(piece)}, the score {shown(score)} and the type {shown(kind)},"
        " which is no SentencePiece; fetch it again"
      ) from error
  spec, names = proto.trainer_spec, [piece for piece, _, _ in pieces]
  unknown = [i for i, (_, _, kind) in enumerate(pieces) if kind == PieceType.UNKNOWN]
  if len(unknown) != 1 or not (0 <= bos < len(pieces) and 0 <= eos < len(pieces)):
    raise InputError(
      f"{where}: it has {len(unknown)} unknown tokens, bos {bos}, eos {eos} and {len(pieces)} entries; a SentencePiece"
      " model needs one unknown token, and bos and eos among the entries"
    )
  spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
  spec.vocab_size = len(pieces)
  spec.byte_fallback = any(kind == PieceType.BYTE for _, _, kind in pieces)
  spec.unk_id, spec.unk_piece = unknown[0], names[unknown[0]]
  spec.bos_id, spec.bos_piece, spec.eos_id, spec.eos_piece = bos, names[bos], eos, names[eos]
  spec.pad_id = -1
  proto.normalizer_spec.name = "identity"
  proto.normalizer_spec.add_dummy_prefix = dummy_prefix
  proto.normalizer_spec.remove_extra_whitespaces = False
  return proto.SerializeToString()
