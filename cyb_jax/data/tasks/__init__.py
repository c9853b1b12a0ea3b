"""Tasks: where text comes from; each is a SeqIO task too.

A task yields whole documents, untrimmed: SeqIO trims a feature to the sequence length and drops the rest, so the token
store joins and splits documents. TensorFlow is imported only when documents of TFDS or of a SeqIO task of the user are
read; naming a task, checking its options and identifying its source never need it.

A source is read whole, or in pieces that workers read independently: files of TFDS, spans of text files, ranges of
generated documents. Pieces depend on the source alone, and a document's position in its split follows from the piece
and the document's number in it.

A task without a validation split gets one: the hash of its text assigns a document to validation (1%), to test (1%,
unless the task has a test split) or to train, so equal documents are in the same split.

Some tasks are learnt from their answers alone (`answers`, and `synthetic_questions`). Their SeqIO tasks have a second
feature, `weights`: a string of one byte, 0 or 1, for each byte of `targets`.

`interface` defines documents, pieces, sources and tasks; each kind of task is a module; `registry` lists them by name.
"""

from cyb_jax.data.tasks.interface import Document, Piece, Source, Task, TaskKind, split_of, text_digest
from cyb_jax.data.tasks.options import PLACES, with_absolute_paths
from cyb_jax.data.tasks.registry import TASKS, default_tokenizer, has_targets, open_task, register, settle_options

__all__ = [
  "PLACES",
  "TASKS",
  "Document",
  "Piece",
  "Source",
  "Task",
  "TaskKind",
  "default_tokenizer",
  "has_targets",
  "open_task",
  "register",
  "settle_options",
  "split_of",
  "text_digest",
  "with_absolute_paths",
]
