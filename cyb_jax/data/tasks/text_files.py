"""`text_files`: the user's text files; each file, or each line, is a document."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from cyb_jax.data.tasks.files import Files, format_of, lines, opened, undamaged
from cyb_jax.data.tasks.interface import Piece, Source, TaskKind, consecutive_pieces
from cyb_jax.data.tasks.options import one_of
from cyb_jax.errors import InputError

# The tasks that read formats other than plain text.
_TASKS = {"JSON": "jsonl", "Parquet": "parquet", "Arrow": "hf"}


def _open(options: Mapping[str, Any]):
  by_line = one_of(options, "unit", ("file", "line")) == "line"
  files = Files.find("pattern", options["pattern"])
  files.inspect(_refusal)
  texts = _TextFiles(files, by_line)
  return files.identity(), lambda: Source(("train",), texts.read, texts.pieces, hash_splits=True)


def _refusal(path: epath.Path, head: bytes) -> str | None:
  """Why a file cannot be read as plain text, with a remedy; None if it can be read."""
  found = format_of(path, head)
  if found is None:
    return None
  if found in _TASKS:
    return f"contains {found}, which text_files would read as plain text; give data.task={_TASKS[found]!r}"
  if found == "zip":
    return "is a zip archive; extract its files"
  return f"is compressed ({found}), but lacks the suffix; give it the suffix .gz, .bz2, .xz or .zst"


@dataclasses.dataclass(frozen=True)
class _TextFiles:
  """Documents of text files.

  Attributes:
    files: in the order in which they are read.
    by_line: whether each line is a document; otherwise each file is one.
  """

  files: Files
  by_line: bool

  def pieces(self, group: str) -> list[Piece]:
    """See `Source.parts`."""
    return consecutive_pieces(group, self.files.spans(whole_files=not self.by_line))

  def read(self, group: str, part: list[int] | None) -> Iterator[str]:
    """See `Source.read`; a part is a span of `Files.spans`."""
    del group
    for path, start, stop in self.files.parts(part):
      yield from self._documents(path, start, stop)

  def _documents(self, path: epath.Path, start: int, stop: int | None) -> Iterator[str]:
    """The documents that begin in the bytes [start, stop) of a file."""
    try:
      # Reading in binary mode preserves the line ends.
      with opened("pattern", path) as file, undamaged("pattern", path):
        if self.by_line:
          yield from (line.rstrip(b"\r\n").decode() for _, line in lines(file, start, stop))
        else:
          yield file.read().decode()
    except UnicodeDecodeError as error:
      raise InputError(f"data.options.pattern: {os.fspath(path)} is not UTF-8 ({error.reason}); convert it") from error


KIND = TaskKind({"pattern": "", "unit": "file"}, _open)
