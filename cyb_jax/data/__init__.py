"""Text to tokens to batches. Preparing a store reads through SeqIO; everything after it needs no TensorFlow."""

from cyb_jax.data.batches import Batch, Permutation, Prefetch, TrainBatches, evaluation_batches, with_documents
from cyb_jax.data.pretrained_tokenizers import HuggingFaceTokenizer
from cyb_jax.data.store import TokenStore, prepare
from cyb_jax.data.tasks import TASKS, Document, Task, default_tokenizer, open_task, register
from cyb_jax.data.tokenizers import (
  ByteTokenizer,
  SentencePieceTokenizer,
  Tokenizer,
  load,
  open_tokenizer,
  seqio_vocabulary,
  train_sentencepiece,
)

__all__ = [
  "TASKS",
  "Batch",
  "ByteTokenizer",
  "Document",
  "HuggingFaceTokenizer",
  "Permutation",
  "Prefetch",
  "SentencePieceTokenizer",
  "Task",
  "TokenStore",
  "Tokenizer",
  "TrainBatches",
  "default_tokenizer",
  "evaluation_batches",
  "load",
  "open_task",
  "open_tokenizer",
  "prepare",
  "register",
  "seqio_vocabulary",
  "train_sentencepiece",
  "with_documents",
]
