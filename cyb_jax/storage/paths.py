"""Paths on a disk and in a bucket."""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
  from etils import epath

# epath and gcsfs read these variables at their first use. Without the first, epath would import TensorFlow wherever it
# is installed. Without the second, gcsfs would first query each bucket's layout, over another protocol and with another
# permission.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

Place: TypeAlias = "pathlib.Path | epath.Path"

SCHEME = "gs://"


def in_bucket(path: str | os.PathLike) -> bool:
  """Whether a path names something in a bucket."""
  return os.fspath(path).startswith(SCHEME)


def unchecked_place(path: str | os.PathLike) -> epath.Path:
  """The path of a file or folder; a local path is made absolute, and `~` is expanded.

  Nothing is checked. Where the client for buckets is missing, the first access fails.
  """
  from etils import epath

  return epath.Path(path) if in_bucket(path) else epath.Path(pathlib.Path(path).expanduser().absolute())
