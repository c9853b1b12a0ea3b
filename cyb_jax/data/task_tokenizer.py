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

# SentencePiece is trained on at most `_SAMPLE_BYTES` of text: the documents with the smallest hash among the first
# `_SAMPLED_BYTES`.
_SAMPLE_BYTES = 4 << 20
_SAMPLED_BYTES = 256 << 20


def shared_tokenizer(
  task: tasks.Task, pieces: int, limit: int | None, folder: epath.Path, local: Path, say: Callable[[str], None]
) -> Tokenizer:
  """The tokenizer of a task's text: the one in a folder that all shards see, or else a trained one, written there.

  Every process that finds none trains one: equal text gives an equal model, and waiting would take as long. If two
  models differ in spite of that, all processes use the one that is written first from their next start on, and pieces
  made with the other are prepared again.

  Args:
    task: its split train is read.
    pieces: of the SentencePiece model.
    limit: number of documents that are used at most, or None.
    folder: the folder of the tokenizer; it need not exist.
    local: an existing folder on a local disk for copies.
    say: logs a line.

  Raises:
    InputError: train has no text, or too little for so many pieces.
  """
  with contextlib.suppress(InputError):
    return _read(folder, _made(local, "found"))
  say(f"training a SentencePiece model of {pieces} pieces")
  trained = train_on_tasks([(task, 1.0)], pieces, limit)
  own = _made(local, "trained")
  trained.save(own)
  streams.make_folder(folder)
  for name in tokenizers.files(trained.describe()):
    streams.write(folder / name, (own / name).read_bytes())
  return trained


def train_on_tasks(sources: Sequence[tuple[tasks.Task, float]], pieces: int, limit: int | None) -> Tokenizer:
  """A SentencePiece model of the text of one or several tasks.

  Args:
    sources: tasks and their weights: shares of the text that it is trained on.
    pieces: of the model.
    limit: number of documents of each task that are used at most, or None.

  Raises:
    InputError: a task has no text in train, or all have too little for so many pieces.
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


def _made(parent: Path, name: str) -> Path:
  folder = parent / name
  folder.mkdir()
  return folder


def sample(documents: Iterable[tasks.Document], size_limit: int) -> list[str]:
  """About `size_limit` bytes of text to train a tokenizer on: the first documents' texts with the smallest hashes.

  The first documents alone could be of one kind, if a corpus is sorted; a draw from all would have to read all.
  """
  heap: list[tuple[int, str]] = []
  kept = seen = 0
  for document in documents:
    # The first 8 bytes of the digest decide the split, so the others are used here.
    digest = int.from_bytes(tasks.text_digest(document.text)[8:], "little")
    heapq.heappush(heap, (-digest, document.text))
    size = len(document.text.encode())
    kept, seen = kept + size, seen + size
    while kept > size_limit and len(heap) > 1:
      kept -= len(heapq.heappop(heap)[1].encode())
    if seen >= _SAMPLED_BYTES:
      break
  return [text for _, text in sorted(heap, reverse=True) if text]
