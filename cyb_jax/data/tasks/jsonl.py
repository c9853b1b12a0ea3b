"""`jsonl`: files with one JSON object per line, compressed or uncompressed; see `records` for the content of a line."""

from __future__ import annotations

import codecs
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from cyb_jax import jsonl
from cyb_jax.data.tasks.files import Files, compression, format_of, line_number, lines, opened, undamaged
from cyb_jax.data.tasks.interface import Document, Piece, Source, TaskKind, consecutive_pieces
from cyb_jax.data.tasks.records import DEFAULTS, RecordForm
from cyb_jax.errors import InputError

# The options that name the files of each split. A split without files is taken from train.
PATTERNS = {"pattern": "train", "validation_pattern": "validation", "test_pattern": "test"}


def patterned_files(options: Mapping[str, Any]) -> dict[str, Files]:
  """The files by split.

  Raises:
    InputError: `pattern` is not given, or a pattern matches nothing.
  """
  return {
    split: Files.find(name, options[name]) for name, split in PATTERNS.items() if options[name] or split == "train"
  }


def _open(options: Mapping[str, Any]):
  form = RecordForm.of(options)
  files = patterned_files(options)
  for found in files.values():
    found.inspect(_refusal)
  rows = _JsonLines(files, form)
  identity = {split: found.identity() for split, found in files.items()}
  return identity, lambda: Source(tuple(files), rows.read, rows.pieces, hash_splits="validation" not in files)


def _refusal(path: epath.Path, head: bytes) -> str | None:
  """Why a file cannot be read as JSON lines, with a remedy; None if it can be read."""
  if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
    return "contains a single JSON array; write one object per line (jq -c '.[]' FILE)"
  found = format_of(path, head)
  if found == "Parquet":
    return "is a Parquet file; give data.task='parquet'"
  if found in (None, "JSON"):
    return None  # a line that is not JSON is reported with its number when it is read
  return f"has the format {found}, but not its suffix; give it the suffix .gz, .bz2, .xz or .zst, or extract it"


@dataclasses.dataclass(frozen=True)
class _JsonLines:
  """Documents of JSON lines.

  Attributes:
    files: by split.
    form: the keys of an object.
  """

  files: dict[str, Files]
  form: RecordForm

  def pieces(self, group: str) -> list[Piece]:
    """See `Source.parts`."""
    return consecutive_pieces(group, self.files[group].spans(whole_files=False))

  def read(self, group: str, part: list[int] | None) -> Iterator[Document]:
    """See `Source.read`; a part is a span of `Files.spans`."""
    files = self.files[group]
    for path, start, stop in files.parts(part):
      yield from self._documents(files.option, path, start, stop)

  def _documents(self, option: str, path: epath.Path, start: int, stop: int | None) -> Iterator[Document]:
    """The documents of the lines that begin in the bytes [start, stop) of a file."""
    place = _Line(path, start, 1)
    with opened(option, path) as file, undamaged(option, path, lambda: f", line {place.number}"):
      for count, (position, line) in enumerate(lines(file, start, stop), 1):
        place = _Line(path, position, count)
        if position == 0:
          line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
          yield self.form.document(_parsed(option, line, place), place)


@dataclasses.dataclass(frozen=True)
class _Line:
  """The position of a line. It is converted to text only for an error, because the line number may have to be counted.

  Attributes:
    path: the path of the file.
    position: the position of the line's first byte in the decompressed file.
    count: the line's number among the lines that were read.
  """

  path: epath.Path
  position: int
  count: int

  @property
  def number(self) -> int:
    """The number of the line in its file, counted from 1."""
    # A compressed file is always read from its beginning.
    return self.count if compression(self.path) else line_number(self.path, self.position)

  def __str__(self) -> str:
    return f"{os.fspath(self.path)}, line {self.number}"


def _parsed(option: str, line: bytes, place: _Line) -> Any:
  """The value of a line.

  Raises:
    InputError: the line is not JSON, is not UTF-8, or contains an unpaired surrogate.
  """
  try:
    return jsonl.loads(line)
  except ValueError as error:
    raise InputError(f"data.options.{option}: {place} is not a JSON object ({error}); give one per line") from error


KIND = TaskKind(
  dict.fromkeys(PATTERNS, "") | DEFAULTS, _open, annotations=lambda options: RecordForm.of(options).annotations
)
