"""`c4_en`: the English part of C4, prepared by TFDS."""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from cyb_jax import jsonl
from cyb_jax.data.tasks import seqio_tasks
from cyb_jax.data.tasks.interface import Piece, Source, TaskKind
from cyb_jax.errors import InputError
from cyb_jax.storage import absolute


def _open(options: Mapping[str, Any]):
  folder = _newest_version(options)
  version, data_dir = folder.name, os.fspath(folder.parent.parent.parent)
  try:
    description = jsonl.read_object(folder / "dataset_info.json")
    lengths = {split["name"]: [*map(int, split["shardLengths"])] for split in description.get("splits", ())}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(
      f"data.options.data_dir: dataset_info.json of {folder} is damaged ({error}); prepare c4/en again"
    ) from error
  documents = {split: sum(found) for split, found in lengths.items()}

  def task(splits):
    return seqio_tasks.tfds_task("c4_en", f"c4/en:{version}", data_dir, splits, read_only=True)

  def read(group, part):
    split = group if part is None else f"{group}[{part[0]}shard:{part[0] + 1}shard]"
    return seqio_tasks.documents_of("c4_en", task({group: split}), group)

  def parts(group):
    return interleaved_pieces(group, lengths[group])

  def source():
    if "validation" in documents:
      return Source(tuple(documents), read, parts, provider=lambda: task({split: split for split in documents}))
    return Source(("train",), read, parts, hash_splits=True)

  # A sample of C4 and the complete C4 may have the same version; the counts distinguish them.
  return {"tfds": f"c4/en:{version}", "documents": documents}, source


def _newest_version(options: Mapping[str, Any]) -> epath.Path:
  """The folder of the newest prepared version of c4/en."""
  place = options["data_dir"] or os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
  folder = epath.Path(absolute(place)) / "c4" / "en"
  versions = []
  if folder.exists():
    names = [path.name for path in folder.iterdir() if (path / "dataset_info.json").exists()]
    versions = [name for name in names if re.fullmatch(r"\d+\.\d+\.\d+", name)]
  if not versions:
    raise InputError(
      f"data.options.data_dir={place!r}: no prepared c4/en in it; set data_dir or TFDS_DATA_DIR to a TFDS folder "
      "that contains one (tfds build c4/en)"
    )
  return folder / max(versions, key=lambda name: [int(part) for part in name.split(".")])


def interleaved_pieces(group: str, lengths: Sequence[int], cycle: int = 16, block: int = 16) -> list[Piece]:
  """The files of a group, in the order in which TFDS reads their documents (tf.data's interleave).

  `cycle` files are read at once, `block` documents per turn. The turn in which a file turns out to be exhausted ends,
  even if it has yielded no document, and the next file takes the place of that file one round later.

  Args:
    group: a split of TFDS.
    lengths: the number of documents in each file.
    cycle, block: arguments of tf.data's interleave; the defaults are the values of TFDS.
  """
  free = [(0, place) for place in range(cycle)]
  result = []
  for number, length in enumerate(lengths):
    turn, place = heapq.heappop(free)
    result.append(Piece(group, [number], length, (turn * cycle + place) * block, block, cycle * block))
    heapq.heappush(free, (turn + length // block + 1, place))
  return result


KIND = TaskKind({"data_dir": ""}, _open)
