"""Tokenizers: plain objects that need neither TensorFlow nor SeqIO.

A tokenizer encodes text to ids in [0, vocab_size) and decodes ids to text. One id, `separator_id`, ends a document; no
text ever encodes to it.

`interface` defines the protocol; `byte`, `sentencepiece` and `huggingface` implement it; `huggingface_folder`, `gguf`
and `llama2c` read tokenizers of pretrained models; `registry` opens a tokenizer by its spec; `spans` determines which
tokens belong to a part of a text; `chat` renders chats with a tokenizer's chat template.
"""

from cyb_jax.data.tokenizers.byte import ByteTokenizer
from cyb_jax.data.tokenizers.chat import encode_chat, render_chat, turn_end_ids
from cyb_jax.data.tokenizers.description import EXPORTED, files
from cyb_jax.data.tokenizers.huggingface import HuggingFaceTokenizer
from cyb_jax.data.tokenizers.interface import Tokenizer, check_encodable, encode_whole, num_threads, surrogate
from cyb_jax.data.tokenizers.registry import load, open_tokenizer, trained_pieces, vocabulary_size
from cyb_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from cyb_jax.data.tokenizers.spans import continuation_start, encode_pairs, tokens_with
from cyb_jax.data.tokenizers.special_tokens import SpecialTokens, TextBoundaries, text_boundaries
from cyb_jax.data.tokenizers.vocabulary import seqio_vocabulary

__all__ = [
  "EXPORTED",
  "ByteTokenizer",
  "HuggingFaceTokenizer",
  "SentencePieceTokenizer",
  "SpecialTokens",
  "TextBoundaries",
  "Tokenizer",
  "check_encodable",
  "continuation_start",
  "encode_chat",
  "encode_pairs",
  "encode_whole",
  "files",
  "load",
  "num_threads",
  "open_tokenizer",
  "render_chat",
  "seqio_vocabulary",
  "surrogate",
  "text_boundaries",
  "tokens_with",
  "train_sentencepiece",
  "trained_pieces",
  "turn_end_ids",
  "vocabulary_size",
]
