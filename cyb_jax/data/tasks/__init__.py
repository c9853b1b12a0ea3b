"""Tasks: the sources of text. Every task is also available as a SeqIO task.

A task yields complete documents: SeqIO truncates a feature to the sequence length and drops the rest, so the token
store concatenates and splits documents instead. TensorFlow is imported only to read documents of TFDS or of a user's
SeqIO task; naming a task, checking its options and identifying its source do not need it.

A source is read from beginning to end, or in pieces that workers read independently: files of TFDS, spans of text
files, ranges of generated documents. Pieces depend on the source alone, and the piece and the document's number in it
determine a document's position in its split.

A task without a validation split gets one: the hash of its text assigns a document to validation (1%), to test (1%,
unless the task has a test split) or to train, so equal documents are in the same split.

In some tasks, only the answers are targets of the loss (`answers`, and `synthetic_questions`). Their SeqIO tasks have
a second feature, `weights`: a string with one byte, 0 or 1, for each byte of `targets`.

`interface` defines documents, pieces, sources and tasks; each kind of task has a module; `registry` lists the tasks by
name.
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
