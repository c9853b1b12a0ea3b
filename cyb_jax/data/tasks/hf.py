"""`hf`: a dataset on the Hugging Face Hub, or a local folder of a dataset; see `records` for the content of a row.

The path of a folder begins with /, . or ~, which distinguishes it from a name on the Hub.

The package datasets reads the dataset (https://huggingface.co/docs/datasets), from its cache on the local disk, or row
by row from the network (`streaming=yes`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cyb_jax.data.tasks.files import Files
from cyb_jax.data.tasks.interface import Document, Piece, Source, TaskKind, consecutive_pieces
from cyb_jax.data.tasks.options import is_folder, one_of
from cyb_jax.data.tasks.records import DEFAULTS, RecordForm
from cyb_jax.errors import InputError
from cyb_jax.storage import absolute

_PIECE_ROWS = 1 << 16
# By option: the split for which the option names a split of the dataset.
_SPLITS = {"train_split": "train", "validation_split": "validation", "test_split": "test"}


def _open(options: Mapping[str, Any]):
  form = RecordForm.of(options)
  streaming = one_of(options, "streaming", ("no", "yes")) == "yes"
  name = options["dataset"]
  if not name:
    raise InputError("data.options.dataset='': give the name of a dataset on the Hub, or the path of a local folder")
  if importlib.util.find_spec("datasets") is None:
    raise InputError("data.task='hf': it needs the package datasets; run pip install 'cyb_jax[hf]'")
  dataset = _located(name, options["subset"], options["revision"], streaming)
  splits = _chosen_splits(options, dataset.split_names())
  rows = _Rows(dataset, form, splits)
  identity = {"dataset": dataset.identity, "subset": options["subset"], "splits": splits}
  return identity, lambda: Source(tuple(splits), rows.read, rows.pieces, hash_splits="validation" not in splits)


@dataclasses.dataclass(frozen=True)
class _Dataset:
  """A dataset that the package datasets has found.

  Attributes:
    path: its name on the Hub, or its folder.
    subset: its configuration; '' means the default configuration.
    revision: its revision on the Hub; None for a folder.
    streaming: whether its rows are read from the network.
    identity: identifies its content, as JSON: name and commit, or a digest of a folder's files.
  """

  path: str
  subset: str
  revision: str | None
  streaming: bool
  identity: dict[str, Any]

  def load(self, split: str) -> Any:
    """A split: a `datasets.Dataset`, or an `IterableDataset` if it is streamed."""
    import datasets

    with _FromHub(self.path):
      return datasets.load_dataset(
        self.path, self.subset or None, split=split, revision=self.revision, streaming=self.streaming
      )

  def split_names(self) -> list[str]:
    """The names of its splits."""
    import datasets

    with _FromHub(self.path):
      return list(datasets.get_dataset_split_names(self.path, self.subset or None, revision=self.revision))


class _FromHub:
  """Converts the errors of the package datasets inside the `with` block to InputErrors that name the dataset."""

  def __init__(self, path: str):
    self._path = path

  def __enter__(self) -> None:
    pass

  def __exit__(self, kind, error, trace) -> None:
    if isinstance(error, Exception) and not isinstance(error, InputError):
      reason = " ".join(str(error).split())[:200] or type(error).__name__
      raise InputError(
        f"data.options.dataset={self._path!r}: the package datasets cannot load it ({reason}); give the name of a"
        " dataset on the Hub that this account may read, or a folder, and check subset and revision"
      ) from error


def _located(name: str, subset: str, revision: str, streaming: bool) -> _Dataset:
  """Finds a dataset without reading its rows."""
  if is_folder(name):
    folder = Path(absolute(name))
    if revision:
      raise InputError(f"data.options.revision={revision!r}: {name} is a folder on this disk, which has no revisions")
    if folder.is_file():
      raise InputError(
        f"data.options.dataset={name!r}: it is a file; give its folder, or data.task='jsonl' or 'parquet' with"
        " pattern=FILE"
      )
    if any((folder / file).exists() for file in ("state.json", "dataset_dict.json")):
      raise InputError(
        f"data.options.dataset={name!r}: it was written by save_to_disk, which is unsupported; write it with"
        " to_parquet, and give data.task='parquet'"
      )
    pattern = f"{folder}/**/*"
    return _Dataset(str(folder), subset, None, streaming, Files.find("dataset", pattern).identity())
  import datasets

  with _FromHub(name):
    builder = datasets.load_dataset_builder(name, subset or None, revision=revision or None)
  # The hash of a dataset on the Hub is its commit, so later calls and other processes read the same revision.
  commit = builder.hash if re.fullmatch(r"[0-9a-f]{40}", builder.hash or "") else revision or None
  return _Dataset(name, subset, commit, streaming, {"hub": name, "revision": commit or builder.hash})


def _chosen_splits(options: Mapping[str, Any], found: list[str]) -> dict[str, str]:
  """Maps train, validation and test to the names of the dataset's splits.

  Raises:
    InputError: the dataset lacks a split that an option names, or it lacks train and no option names another split.
  """
  chosen = {}
  for option, split in _SPLITS.items():
    wanted = options[option] or split
    if wanted in found:
      chosen[split] = wanted
    elif options[option] or split == "train":
      raise InputError(
        f"data.options.{option}={options[option]!r}: the dataset has no split {wanted!r}; it has {', '.join(found)}"
      )
  return chosen


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Documents of a dataset.

  Attributes:
    dataset: the dataset.
    form: the keys of a row.
    splits: maps train, validation and test to the names of the dataset's splits.
  """

  dataset: _Dataset
  form: RecordForm
  splits: dict[str, str]

  def pieces(self, group: str) -> list[Piece]:
    """See `Source.parts`; a part is a range of rows, or a file of a streamed dataset."""
    rows = self.dataset.load(self.splits[group])
    if self.dataset.streaming:
      return consecutive_pieces(group, (([i, rows.num_shards], 0) for i in range(rows.num_shards)))
    begins = range(0, len(rows), _PIECE_ROWS)
    ranges = [[begin, min(begin + _PIECE_ROWS, len(rows))] for begin in begins]
    return consecutive_pieces(group, ((part, part[1] - part[0]) for part in ranges))

  def read(self, group: str, part: list[int] | None) -> Iterator[Document]:
    """See `Source.read`."""
    split = self.splits[group]
    rows, where, first = self.dataset.load(split), f"{self.dataset.path}, split {split}", 0
    # Other columns may contain images, which would be decoded.
    known = rows.column_names
    if known is not None and set(self.form.keys) <= set(known):
      rows = rows.select_columns(self.form.keys)
    if part and self.dataset.streaming:
      rows, where = rows.shard(num_shards=part[1], index=part[0]), f"{where}, file {part[0] + 1} of {part[1]}"
    elif part:
      rows, first = rows.select(range(*part)), part[0]
    with _FromHub(self.dataset.path):
      for number, row in enumerate(rows, first + 1):
        yield self.form.document(row, f"{where}, row {number}")


KIND = TaskKind(
  {"dataset": "", "subset": "", "revision": "", "streaming": "no", **dict.fromkeys(_SPLITS, ""), **DEFAULTS},
  _open,
  annotations=lambda options: RecordForm.of(options).annotations,
)
