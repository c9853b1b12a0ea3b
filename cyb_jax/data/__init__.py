"""From text to tokens to batches. TensorFlow is needed only to read TFDS datasets and the user's own SeqIO tasks."""

from cyb_jax.data.batches import Batch, Permutation, Prefetch, TrainBatches, evaluation_batches, with_segment_ids
from cyb_jax.data.mixture_batches import MixtureBatches
from cyb_jax.data.mixtures import MixtureStore, open_token_store, prepare_mixture
from cyb_jax.data.preparation import Prepared, prepare, prepare_shard
from cyb_jax.data.store import TokenStore, is_store
from cyb_jax.data.tasks import TASKS, Document, Task, default_tokenizer, open_task, register
from cyb_jax.data.tokenizers import (
  ByteTokenizer,
  HuggingFaceTokenizer,
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
  "MixtureBatches",
  "MixtureStore",
  "Permutation",
  "Prefetch",
  "Prepared",
  "SentencePieceTokenizer",
  "Task",
  "TokenStore",
  "Tokenizer",
  "TrainBatches",
  "default_tokenizer",
  "evaluation_batches",
  "is_store",
  "load",
  "open_task",
  "open_token_store",
  "open_tokenizer",
  "prepare",
  "prepare_mixture",
  "prepare_shard",
  "register",
  "seqio_vocabulary",
  "train_sentencepiece",
  "with_segment_ids",
]
