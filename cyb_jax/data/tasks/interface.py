"""The interface of tasks: documents, pieces and sources, and the definition of a kind of task."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from cyb_jax.data.tasks import seqio_tasks
from cyb_jax.errors import InputError

# An upper bound of the documents of a piece. With 2^20 pieces, 8 of 64 bits remain for the number of the split.
_PIECE_POSITIONS = 1 << 36


@dataclasses.dataclass(frozen=True)
class Document:
  """One document.

  Attributes:
    text: the text.
    difficulty: uint8[bytes of UTF-8], the difficulty of predicting each byte, or None if it is unknown.
    weights: uint8[bytes of UTF-8], 1 for bytes that are targets of the loss and 0 for bytes that are context only, or
      None if all bytes have weight 1. The end token of the document has the weight of its last byte.
    messages: the messages of a chat, which are rendered when they are tokenized; `text` is their JSON. None if the
      document is not a chat.
    where: for a chat, a value whose `str` names its file and row, for errors.
  """

  text: str
  difficulty: np.ndarray | None = None
  weights: np.ndarray | None = None
  messages: tuple[Mapping[str, Any], ...] | None = None
  where: object = ""


@dataclasses.dataclass(frozen=True)
class Piece:
  """A fixed part of a task's source.

  Document k of the piece has the position `start + k // block * stride + k % block` in its group. Positions define the
  order of the documents of a group; they are distinct and below 2^56.

  Attributes:
    group: the source's own split that contains the piece.
    part: the part of the group, in the source's own numbering; None means the entire group.
    size: the amount to read, in documents or bytes; 0 means unknown. It is only used for time estimates.
    start, block, stride: see above.
  """

  group: str
  part: list[int] | None = None
  size: int = 0
  start: int = 0
  block: int = _PIECE_POSITIONS
  stride: int = 0

  def positions(self, numbers: np.ndarray) -> np.ndarray:
    """uint64[N]: the positions in the group of the documents with these numbers in the piece."""
    numbers = np.asarray(numbers, np.uint64)
    block = np.uint64(self.block)
    return np.uint64(self.start) + numbers // block * np.uint64(self.stride) + numbers % block


def consecutive_pieces(group: str, parts: Iterable[tuple[list[int], int]]) -> list[Piece]:
  """The pieces of a group, given the (part, size) of each, in the order of their documents."""
  return [Piece(group, part, size, start=number * _PIECE_POSITIONS) for number, (part, size) in enumerate(parts)]


@dataclasses.dataclass(frozen=True)
class Source:
  """How the documents of a task are read.

  Attributes:
    groups: the source's own splits.
    read: (group, part) -> the documents of a part of a group in order; part None means the entire group.
    parts: group -> its pieces.
    hash_splits: whether the documents of train are divided by hash into train, validation and, unless there is a group
      test, test.
    provider: () -> the SeqIO task or mixture that has the same documents; None means that it is created from `read`.
  """

  groups: tuple[str, ...]
  read: Callable[[str, list[int] | None], Iterable[Document | str]]
  parts: Callable[[str], list[Piece]] = lambda group: [Piece(group)]
  hash_splits: bool = False
  provider: Callable[[], Any] | None = None

  @property
  def splits(self) -> tuple[str, ...]:
    """Names of the splits, train first."""
    names = {*self.groups, *(("validation", "test") if self.hash_splits else ())}
    return tuple(sorted(names, key=lambda name: (name != "train", name)))

  def documents(self, piece: Piece) -> Iterator[tuple[str, Document]]:
    """(split, document) of a piece, in order.

    Raises:
      InputError: a document has a character that UTF-8 cannot represent, or `read` raises it.
    """
    for number, document in enumerate(self.read(piece.group, piece.part), 1):
      if isinstance(document, str):
        document = Document(document)
      try:
        document.text.encode()
      except UnicodeEncodeError as error:
        part = "" if piece.part is None else f", part {piece.part},"
        raise InputError(
          f"data.task: document {number} of {piece.group}{part} has a lone surrogate"
          f" ({document.text[max(0, error.start - 20) : error.start + 1]!r}), which is not a character; remove it"
        ) from error
      split = piece.group
      if self.hash_splits and split == "train":
        split = split_of(text_digest(document.text), own_test="test" in self.groups)
      yield split, document


@dataclasses.dataclass(frozen=True)
class TaskKind:
  """The definition of a task, independent of the values of its options.

  Attributes:
    defaults: the options with their default values, integers or strings.
    open: all options by name -> (identity, () -> source); see `Task`. It finds the source without reading it, and
      raises InputError for an invalid value or a missing source.
    annotations: see `Task`; or a function of the options that returns them.
    tokenizer: the tokenizer spec that is used if the user gives none.
  """

  defaults: Mapping[str, Any]
  open: Callable[[Mapping[str, Any]], tuple[dict[str, Any], Callable[[], Source]]]
  annotations: tuple[str, ...] | Callable[[Mapping[str, Any]], tuple[str, ...]] = ()
  tokenizer: str = "sentencepiece:8192"

  def annotations_of(self, options: Mapping[str, Any]) -> tuple[str, ...]:
    """See `Task.annotations`; raises InputError for options that exclude each other."""
    return self.annotations(options) if callable(self.annotations) else self.annotations


@dataclasses.dataclass(frozen=True)
class Task:
  """A task with the values of all its options.

  Attributes:
    name: the name that the user gives.
    options: every option with its value.
    identity: identifies the text, as JSON: versions and digests without paths. Equal identities mean equal documents.
    annotations: the attributes of `Document` that the task sets in addition to the text: a subset of 'difficulty',
      'weights' and 'messages'.
  """

  name: str
  options: dict[str, Any]
  identity: dict[str, Any]
  annotations: tuple[str, ...]
  _source: Callable[[], Source]

  @functools.cached_property
  def provider(self):
    """The task as a SeqIO task or mixture (imports seqio)."""
    if self.source.provider:
      return self.source.provider()
    arrays = [name for name in self.annotations if name != "messages"]  # the text of a chat is its messages as JSON
    return seqio_tasks.task_of_documents(self.name, self.splits, self.documents, arrays)

  @functools.cached_property
  def source(self) -> Source:
    """How the documents are read (imports seqio if SeqIO reads them)."""
    return self._source()

  @property
  def splits(self) -> tuple[str, ...]:
    """Names of the splits, train first."""
    return self.source.splits

  def documents(self, split: str) -> Iterator[Document]:
    """The documents of a split in the source's order.

    Raises:
      InputError: the source cannot be read, has no text feature, or contains text that is not UTF-8.
    """
    (group,) = (group for group in self.source.groups if split in self.splits_of(group))
    return (document for found, document in self.read(Piece(group)) if found == split)

  def pieces(self, limit: int | None = None) -> list[Piece]:
    """The pieces of the source; they depend on the source alone.

    Args:
      limit: the largest number of documents of each split; if it is given, each of the source's own splits is one
        piece.
    """
    if limit is not None:
      return [Piece(group) for group in self.source.groups]
    return [piece for group in self.source.groups for piece in self.source.parts(group)]

  def read(self, piece: Piece) -> Iterator[tuple[str, Document]]:
    """(split, document) of a piece, in order; raises as `documents`."""
    return self.source.documents(piece)

  def splits_of(self, group: str) -> tuple[str, ...]:
    """The splits that the documents of one of the source's own splits belong to."""
    return tuple(split for split in self.splits if (split if split in self.source.groups else "train") == group)


def text_digest(text: str) -> bytes:
  """A digest of 16 bytes that depends on the text alone, in every process and version."""
  return hashlib.blake2b(text.encode(), digest_size=16).digest()


def split_of(digest: bytes, *, own_test: bool = False) -> str:
  """The split of a document by its text's digest: 1% 'validation', 1% 'test' (if not `own_test`), else 'train'."""
  hundredth = int.from_bytes(digest[:8], "little") % 100
  if hundredth == 0:
    return "validation"
  return "test" if hundredth == 1 and not own_test else "train"
