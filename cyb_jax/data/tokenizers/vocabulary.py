"""Tokenizers as SeqIO vocabularies."""

from __future__ import annotations

import functools

from cyb_jax.data.tokenizers.interface import Tokenizer


def seqio_vocabulary(tokenizer: Tokenizer):
  """`tokenizer` as a `seqio.Vocabulary`, for SeqIO preprocessors; its EOS is `separator_id`.

  SeqIO pads with id 0, which is a byte or <unk> in the tokenizers of this package, so mask by length and not by id. The
  call imports seqio and thereby TensorFlow.
  """
  return _vocabulary_class()(tokenizer)


@functools.cache
def _vocabulary_class():
  import seqio
  import tensorflow as tf

  class TokenizerVocabulary(seqio.Vocabulary):
    """A cyb_jax tokenizer as a SeqIO vocabulary."""

    def __init__(self, tokenizer: Tokenizer):
      super().__init__(extra_ids=0)
      self.tokenizer = tokenizer

    bos_id = None
    unk_id = None

    @property
    def eos_id(self):
      return self.tokenizer.separator_id

    @property
    def _base_vocab_size(self):
      return self.tokenizer.vocab_size

    def _encode(self, s):
      return self.tokenizer.encode(s)

    def _decode(self, ids):
      return self.tokenizer.decode(ids)

    def _encode_tf(self, s):
      def encode(text):
        return tf.constant(self.tokenizer.encode(text.numpy().decode()), tf.int32)

      return tf.ensure_shape(tf.py_function(encode, [s], tf.int32), [None])

    def _decode_tf(self, ids):
      def decode(row):
        return tf.constant(self.tokenizer.decode(row.numpy().tolist()))

      if ids.shape.rank == 1:
        return tf.ensure_shape(tf.py_function(decode, [ids], tf.string), [])
      return tf.map_fn(self._decode_tf, ids, fn_output_signature=tf.string)

    def __eq__(self, other):
      return isinstance(other, TokenizerVocabulary) and other.tokenizer.describe() == self.tokenizer.describe()

    def __hash__(self):
      return hash(self.tokenizer.describe()["sha256"])

  return TokenizerVocabulary
