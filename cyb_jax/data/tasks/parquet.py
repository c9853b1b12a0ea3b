"""`parquet`: Parquet files; see `records` for the content of a row. Only the needed columns are read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

from cyb_jax.data.tasks.files import Files
from cyb_jax.data.tasks.interface import Document, Piece, Source, TaskKind, consecutive_pieces
from cyb_jax.data.tasks.jsonl import PATTERNS, patterned_files
from cyb_jax.data.tasks.records import DEFAULTS, RecordForm
from cyb_jax.errors import InputError, did_you_mean

# Row groups are read together up to this many bytes before compression, according to Parquet's metadata.
_PIECE_BYTES = 64 << 20
_READ_ROWS = 1024


def _open(options: Mapping[str, Any]):
  form = RecordForm.of(options)
  files = patterned_files(options)
  tables = {split: _Tables(found, form) for split, found in files.items()}
  tables["train"].check()
  identity = {split: found.identity() for split, found in files.items()}

  def read(group, part):
    return tables[group].read(part)

  def parts(group):
    return tables[group].pieces(group)

  return identity, lambda: Source(tuple(files), read, parts, hash_splits="validation" not in files)


@dataclasses.dataclass(frozen=True)
class _Tables:
  """Documents of Parquet files.

  Attributes:
    files: in the order in which they are read.
    form: the keys of a row.
  """

  files: Files
  form: RecordForm

  def check(self) -> None:
    """Checks the columns of the first file, and that some file has rows.

    Raises:
      InputError: the first file lacks a column, or no file has a row.
    """
    with self._opened(0) as table:
      self._check_columns(0, table)
    if not any(sum(self._row_counts(number)) for number in range(len(self.files.paths))):
      names = ", ".join(os.fspath(path) for path in self.files.paths[:3])
      raise InputError(
        f"data.options.{self.files.option}: {names}: these Parquet files have no rows; give files with text"
      )

  @functools.cached_property
  def _groups(self) -> list[tuple[int, int, int]]:
    """(file, row group, bytes) of all row groups, in order."""
    found = []
    for number in range(len(self.files.paths)):
      with self._opened(number) as table:
        metadata = table.metadata
        found += [(number, i, metadata.row_group(i).total_byte_size) for i in range(metadata.num_row_groups)]
    return found

  def pieces(self, group: str) -> list[Piece]:
    """See `Source.parts`; a part is [first row group, last row group + 1], numbered over all files."""
    parts: list[tuple[list[int], int]] = []
    first, size = 0, 0
    for number, (_, _, length) in enumerate(self._groups, 1):
      size += length
      if size >= _PIECE_BYTES or number == len(self._groups):
        parts.append(([first, number], size))
        first, size = number, 0
    return consecutive_pieces(group, parts)

  def read(self, part: list[int] | None) -> Iterator[Document]:
    """See `Source.read`."""
    chosen: dict[int, list[int]] = {}
    for file, row_group, _ in self._groups[slice(*part) if part else slice(None)]:
      chosen.setdefault(file, []).append(row_group)
    for file, row_groups in chosen.items():
      yield from self._documents(file, row_groups)

  def _documents(self, number: int, row_groups: list[int]) -> Iterator[Document]:
    """The documents of consecutive row groups of a file."""
    path = os.fspath(self.files.paths[number])
    row = sum(self._row_counts(number)[: row_groups[0]])
    with self._opened(number) as table:
      self._check_columns(number, table)
      for batch in table.iter_batches(_READ_ROWS, row_groups=row_groups, columns=self.form.keys):
        for values in self._rows(batch, path, row):
          row += 1
          yield self.form.document(values, f"{path}, row {row}")

  def _rows(self, batch: Any, path: str, before: int) -> list[dict[str, Any]]:
    """The rows of a batch, which follow `before` rows of the file.

    Raises:
      InputError: a string is not UTF-8.
    """
    try:
      return batch.to_pylist()
    except UnicodeDecodeError:
      for number in range(batch.num_rows):  # to find the row
        try:
          batch.slice(number, 1).to_pylist()
        except UnicodeDecodeError as error:
          raise InputError(
            f"data.options.{self.files.option}: {path}, row {before + number + 1}: a string is not UTF-8"
            f" ({error.reason}); convert it"
          ) from error
      raise

  def _row_counts(self, number: int) -> list[int]:
    """The number of rows of each row group of a file."""
    with self._opened(number) as table:
      return [table.metadata.row_group(i).num_rows for i in range(table.metadata.num_row_groups)]

  @contextlib.contextmanager
  def _opened(self, number: int) -> Iterator[Any]:
    """A file, open for reading.

    Raises:
      InputError: the file is damaged, or is not a Parquet file.
    """
    import pyarrow
    from pyarrow import parquet

    path = self.files.paths[number]
    try:
      with path.open("rb") as file, parquet.ParquetFile(file) as table:
        yield table
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
      reason = " ".join(str(error).split())[:200]
      raise InputError(
        f"data.options.{self.files.option}: {os.fspath(path)} is damaged or not a Parquet file ({reason}); fetch it"
        " again, or give data.task='jsonl' or 'text_files' for other formats"
      ) from error

  def _check_columns(self, number: int, table: Any) -> None:
    columns = list(table.schema_arrow.names)
    for key in self.form.keys:
      if columns.count(key) > 1:
        raise InputError(
          f"data.options.{self.files.option}: {os.fspath(self.files.paths[number])} has {columns.count(key)} columns"
          f" named {key!r}; rename all but one"
        )
    for name in ("text_key", "prompt_key", "answer_key", "messages_key"):
      key = getattr(self.form, name)
      if key and key not in columns:
        raise InputError(
          f"data.options.{name}={key!r}: {os.fspath(self.files.paths[number])} has no such column;"
          f" {did_you_mean(key, columns)}"
        )


KIND = TaskKind(
  dict.fromkeys(PATTERNS, "") | DEFAULTS, _open, annotations=lambda options: RecordForm.of(options).annotations
)
