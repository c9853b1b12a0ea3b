"""A piece of a task's source, tokenized into separate files.

piece-000012.json               counts, and the digests of the other files; written last: it marks the piece as complete
piece-000012.index              a ROW for each nonempty document, in order
piece-000012.train.tokens       the tokens of the split's documents in order, each with its start and end tokens
piece-000012.train.difficulty   the annotations of these tokens
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from cyb_jax.data import chats, chunks, tasks, tokenizers
from cyb_jax.data.store import ANNOTATIONS, token_dtype
from cyb_jax.data.tokenizers import Tokenizer
from cyb_jax.errors import InputError
from cyb_jax.storage import streams

_BATCH_BYTES = 4 << 20  # of text that is tokenized in one call

# A document: `digest` of its text, `offset` of its tokens among the tokens of its piece and split, its `number` in the
# piece (empty documents are counted too), and its numbers of tokens and bytes.
ROW = np.dtype(
  [
    ("digest", "<u8", (2,)),
    ("offset", "<u8"),
    ("number", "<u4"),
    ("tokens", "<u4"),
    ("bytes", "<u4"),
    ("weighted_tokens", "<u4"),
    ("weighted_bytes", "<u4"),
    ("split", "u1"),
  ]
)


@dataclasses.dataclass(frozen=True)
class Encoded:
  """The tokens of N documents, S tokens in total.

  Attributes:
    tokens: uint16 or uint32[S]; for each document, the start token if there is one, its tokens, and the end token.
    lengths: int64[N], each document's number of tokens.
    bytes: int64[N], each document's number of UTF-8 bytes; for a chat, the bytes of its rendered text.
    annotations: uint8[S] by name.
    weighted_tokens, weighted_bytes: int64[N], each document's numbers of tokens and bytes of weight 1; 0 if the
      documents have no weights.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  bytes: np.ndarray
  annotations: dict[str, np.ndarray]
  weighted_tokens: np.ndarray
  weighted_bytes: np.ndarray


class Encoder:
  """Encodes documents as tokens with annotations.

  Args:
    tokenizer: any tokenizer.
    annotations: the annotations of the task's documents.

  Attributes:
    tokenizer: the tokenizer.
    start: the tokens before each document: one, or none.
    annotations: the annotations of the tokens; they include weights if there is a start token or documents are chats.
    dtype: the dtype of the tokens.
  """

  def __init__(self, tokenizer: Tokenizer, annotations: Sequence[str]):
    self.tokenizer = tokenizer
    self.start = [tokenizer.start_id] * (tokenizer.adds_start and tokenizer.start_id != tokenizer.separator_id)
    weighted = bool(self.start) or not {"weights", "messages"}.isdisjoint(annotations)
    self.annotations = tuple(kind for kind in ANNOTATIONS if (weighted if kind == "weights" else kind in annotations))
    self.dtype = token_dtype(tokenizer.vocab_size)

  def encode(self, documents: Sequence[tasks.Document]) -> Encoded:
    """Encodes at least one document."""
    chat = any(document.messages for document in documents)
    if chat:
      documents = [chats.rendered(self.tokenizer, document) for document in documents]
    texts = [document.text for document in documents]
    if chat:
      encoded, spans = map(list, zip(*map(self._encode_chat, texts)))
    # Locating tokens in the text takes longer, and only documents with a prompt need it.
    elif "weights" in self.annotations and any(document.weights is not None for document in documents):
      encoded, spans = map(list, zip(*self.tokenizer.encode_spans(texts)))
    else:
      encoded, spans = self.tokenizer.encode_batch(texts), [None] * len(texts)
    lengths = np.array([len(self.start) + len(ids) + 1 for ids in encoded])
    end = (self.tokenizer.separator_id,)
    flat = itertools.chain.from_iterable(itertools.chain(self.start, ids, end) for ids in encoded)
    tokens = np.fromiter(flat, self.dtype, int(lengths.sum()))
    weighted_tokens = np.zeros(len(documents), np.int64)
    weighted_bytes = np.zeros(len(documents), np.int64)
    annotations = {}
    if "difficulty" in self.annotations:
      parts = [self._difficulties(*row) for row in zip(documents, encoded, strict=True)]
      annotations["difficulty"] = np.concatenate(parts)
    if "weights" in self.annotations:
      parts = [self._weights(*row) for row in zip(documents, encoded, spans)]
      annotations["weights"] = np.concatenate(parts)
      weighted_tokens[:] = [int(part.sum()) for part in parts]
      weighted_bytes[:] = [
        len(d.text.encode()) if d.weights is None else int(d.weights.sum(dtype=np.int64)) for d in documents
      ]
    sizes = np.array([len(text.encode()) for text in texts])
    return Encoded(tokens, lengths, sizes, annotations, weighted_tokens, weighted_bytes)

  def _encode_chat(self, text: str) -> tuple[list[int], np.ndarray]:
    """(ids, spans) of a chat, without the start token and the separator that the template may write at its ends:
    `encode` adds them to every document.
    """
    ids, spans = self.tokenizer.encode_spans_with_special(text)
    first = len(self.start) if self.start and ids[:1] == self.start else 0
    last = len(ids) - (ids[-1:] == [self.tokenizer.separator_id])
    return ids[first:last], spans[first:last]

  def _difficulties(self, document: tasks.Document, ids: list[int]) -> np.ndarray:
    """uint8[start + tokens + 1]: the largest difficulty among a token's bytes; 0 for the start and end tokens."""
    sizes = np.array([len(self.tokenizer.decode([token]).encode()) for token in ids])
    if sizes.sum() != len(document.difficulty):
      raise InputError(
        "data.tokenizer: decoding does not reproduce the text exactly, so the tokens' difficulties are unknown; "
        "give 'bytes' or 'sentencepiece:N'"
      )
    starts = np.cumsum(sizes) - sizes
    hardest = np.maximum.reduceat(document.difficulty, starts)
    return np.concatenate([np.zeros(len(self.start)), hardest, [0]]).astype(np.uint8)

  def _weights(self, document: tasks.Document, ids: list[int], spans: np.ndarray | None) -> np.ndarray:
    """uint8[start + tokens + 1]; the start token has weight 0, the end token has the weight of the last byte.

    A token has weight 1 if any of its bytes has weight 1. A token across the border between a prompt and an answer is
    therefore a target, as it is in scoring (`tokenizers.tokens_with`).
    """
    if document.weights is None:
      weights, last = np.ones(len(ids), np.uint8), 1
    else:
      weights, last = tokenizers.tokens_with(spans, document.weights > 0), document.weights[-1]
      if document.messages and ids and not self.tokenizer.decode(ids[-1:]):
        last = 0  # the special entry at the end of the turn already ends the generated text
    return np.concatenate([np.zeros(len(self.start)), weights, [last]]).astype(np.uint8)


def record_path(folder: epath.Path, number: int) -> epath.Path:
  """The file whose existence means that a piece is complete."""
  return folder / f"piece-{number:06d}.json"


def file_path(folder: epath.Path, number: int, name: str) -> epath.Path:
  """A file of a piece: 'index', 'train.tokens' and the like."""
  return folder / f"piece-{number:06d}.{name}"


def read_record(folder: epath.Path, number: int, made_of: str) -> dict[str, Any] | None:
  """The record of a complete piece; None if it is missing, has another `made_of`, or a file has the wrong size.

  Args:
    folder: the folder of the pieces.
    number: the number of the piece.
    made_of: the value that was passed to `write`.
  """
  record = streams.read_json(record_path(folder, number))
  if not isinstance(record, dict) or record.get("made_of") != made_of:
    return None
  for name, described in record["files"].items():
    if streams.size_of(file_path(folder, number, name)) != described["bytes"]:
      return None
  return record


def write(
  folder: epath.Path,
  number: int,
  task: tasks.Task,
  piece: tasks.Piece,
  encoder: Encoder,
  made_of: str,
  *,
  limit: int | None = None,
  report: Callable[[int, int], None] = lambda documents, tokens: None,
) -> dict[str, Any]:
  """Tokenizes a piece.

  Args:
    folder: the folder of the pieces' files.
    number: the number of the piece.
    task: the task.
    piece: the piece.
    encoder: the encoder of the store.
    made_of: a digest of everything that determines the piece's content, for `read_record`.
    limit: the largest number of documents of each split, including empty ones; None means all.
    report: called with the numbers of documents and tokens that are done.

  Returns:
    the piece's record, as `read_record` returns it: `documents`, `tokens`, `files`, and `cpu_seconds` and `seconds`
    since the first document was read.
  """
  with contextlib.ExitStack() as stack:
    splits = task.splits
    writer = _Writer(folder, number, splits, encoder, stack)
    batch: list[tuple[int, int, tasks.Document]] = []
    size, began = 0, None
    for place, split, document in _limited(task.read(piece), task.splits_of(piece.group), limit):
      # The seconds that opening the source takes are not a cost of the documents.
      began = began or (time.process_time(), time.perf_counter())
      if not document.text:
        continue
      batch.append((place, splits.index(split), document))
      size += len(document.text)
      if size >= _BATCH_BYTES:
        writer.write(batch)
        batch, size = [], 0
        report(writer.documents, writer.tokens)
    writer.write(batch)
    files = writer.close()
  report(writer.documents, writer.tokens)
  cpu, wall = began or (time.process_time(), time.perf_counter())
  record = {
    "made_of": made_of,
    "documents": writer.documents,
    "tokens": writer.tokens,
    "cpu_seconds": round(time.process_time() - cpu, 4),
    "seconds": round(time.perf_counter() - wall, 4),
    "files": files,
  }
  streams.write_json(record_path(folder, number), record)
  return record


def _limited(
  documents: Iterable[tuple[str, tasks.Document]], splits: Sequence[str], limit: int | None
) -> Iterator[tuple[int, str, tasks.Document]]:
  """(number in the piece, split, document) of the first `limit` documents of each split.

  Args:
    documents: (split, document) of a piece, in order.
    splits: the splits that the piece's documents belong to.
    limit: at least 1; None means all documents.
  """
  read = dict.fromkeys(splits, 0)
  for number, (split, document) in enumerate(documents):
    if read[split] != limit:
      read[split] += 1
      yield number, split, document
    elif all(count == limit for count in read.values()):
      return


class _Writer:
  """Writes the files of a piece; each file is opened when its first content is written."""

  def __init__(self, folder, number, splits, encoder: Encoder, stack: contextlib.ExitStack):
    self.documents = self.tokens = 0
    self._folder, self._number, self._splits = folder, number, splits
    self._encoder, self._stack = encoder, stack
    self._sinks: dict[str, chunks.Sink] = {}
    self._offsets = [0] * len(splits)
    self._sink("index")

  def write(self, batch: list[tuple[int, int, tasks.Document]]) -> None:
    if not batch:
      return
    documents = [document for _, _, document in batch]
    encoded = self._encoder.encode(documents)
    rows = np.zeros(len(batch), ROW)
    digests = (tasks.text_digest(document.text) for document in documents)
    rows["digest"] = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    rows["tokens"], rows["bytes"] = encoded.lengths, encoded.bytes
    rows["weighted_tokens"], rows["weighted_bytes"] = encoded.weighted_tokens, encoded.weighted_bytes
    rows["number"], rows["split"] = [number for number, _, _ in batch], [split for _, split, _ in batch]
    token_splits = np.repeat(rows["split"], encoded.lengths)
    for split in np.unique(rows["split"]).tolist():
      mask = rows["split"] == split
      ends = self._offsets[split] + np.cumsum(encoded.lengths[mask])
      rows["offset"][mask] = ends - encoded.lengths[mask]
      self._offsets[split] = int(ends[-1])
      for kind, values in (("tokens", encoded.tokens), *encoded.annotations.items()):
        self._sink(f"{self._splits[split]}.{kind}").write(values[token_splits == split])
    self._sink("index").write(rows)
    self.documents += len(batch)
    self.tokens += len(encoded.tokens)

  def close(self) -> dict[str, Any]:
    return {name: sink.close() for name, sink in self._sinks.items()}

  def _sink(self, name: str) -> chunks.Sink:
    if name not in self._sinks:
      path = file_path(self._folder, self._number, name)
      self._sinks[name] = chunks.Sink(self._stack.enter_context(streams.new_file(path)), chunked=True)
    return self._sinks[name]
