"""The tokenizer that is trained on the text of a task: `sentencepiece:N`."""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from etils import epath

from cyb_jax.data import tasks, tokenizers
from cyb_jax.data.tokenizers import Tokenizer
from cyb_jax.errors import InputError
from cyb_jax.storage import streams

# SentencePiece is trained on at most `_SAMPLE_BYTES` of text: the documents with the smallest hashes within the first
# `_SAMPLED_BYTES` of text.
_SAMPLE_BYTES = 4 << 20
_SAMPLED_BYTES = 256 << 20


def shared_tokenizer(
  task: tasks.Task, pieces: int, limit: int | None, folder: epath.Path, local: Path, log: Callable[[str], None]
) -> Tokenizer:
  """Reads the tokenizer of a task's text from a folder that all shards share, or trains one and writes it there.

  Every process that finds no tokenizer trains one: equal text gives an equal model, and waiting would take as long. If
  two models nevertheless differ, all processes use the first one that was written when they start again, and pieces
  that were encoded with the other one are prepared again.

  Args:
    task: the task, whose train split is read.
    pieces: number of pieces of the SentencePiece model.
    limit: the largest number of documents that are used; None means all.
    folder: the folder of the tokenizer; it need not exist.
    local: an existing folder on a local disk for copies.
    log: logs a line.

  Raises:
    InputError: train has no text, or too little text for this number of pieces.
  """
  with contextlib.suppress(InputError):
    return _read(folder, _new_folder(local, "found"))
  log(f"training a SentencePiece model of {pieces} pieces")
  trained = train_on_tasks([(task, 1.0)], pieces, limit)
  own = _new_folder(local, "trained")
  trained.save(own)
  streams.make_folder(folder)
  for name in tokenizers.files(trained.describe()):
    streams.write(folder / name, (own / name).read_bytes())
  return trained


def train_on_tasks(sources: Sequence[tuple[tasks.Task, float]], pieces: int, limit: int | None) -> Tokenizer:
  """Trains a SentencePiece model on the text of one or more tasks.

  Args:
    sources: tasks and their weights; the amount of a task's text is proportional to its weight.
    pieces: number of pieces of the model.
    limit: the largest number of documents of each task that are used; None means all.

  Raises:
    InputError: a task has no text in train, or there is too little text for this number of pieces.
  """
  total = sum(weight for _, weight in sources)
  texts: list[str] = []
  for task, weight in sources:
    found = sample(itertools.islice(task.documents("train"), limit), int(_SAMPLE_BYTES * weight / total))
    if not found:
      raise InputError(f"data.task={task.name!r}: no text in train; options {task.options}")
    texts += found
  return tokenizers.train_sentencepiece(texts, pieces)


def _read(folder: epath.Path, copy: Path) -> Tokenizer:
  for name in streams.names(folder):
    (copy / name).write_bytes(streams.read(folder / name))
  return tokenizers.load(copy)


def _new_folder(parent: Path, name: str) -> Path:
  folder = parent / name
  folder.mkdir()
  return folder


def sample(documents: Iterable[tasks.Document], size_limit: int) -> list[str]:
  """About `size_limit` bytes of text for training a tokenizer: the texts with the smallest hashes near the beginning.

  The very first documents could be of a single kind if a corpus is sorted, and a sample of all documents would require
  reading the entire corpus.
  """
  heap: list[tuple[int, str]] = []
  kept = seen = 0
  for document in documents:
    # The first 8 bytes of the digest determine the split, so the other bytes are used here.
    digest = int.from_bytes(tasks.text_digest(document.text)[8:], "little")
    heapq.heappush(heap, (-digest, document.text))
    size = len(document.text.encode())
    kept, seen = kept + size, seen + size
    while kept > size_limit and len(heap) > 1:
      kept -= len(heapq.heappop(heap)[1].encode())
    if seen >= _SAMPLED_BYTES:
      break
  return [text for _, text in sorted(heap, reverse=True) if text]
