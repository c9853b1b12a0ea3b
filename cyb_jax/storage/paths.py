"""Paths on a disk and in a bucket."""

from __future__ import annotations

import os
import pathlib
import re
from typing import TYPE_CHECKING, TypeAlias

from cyb_jax.errors import InputError

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


def absolute(path: str | os.PathLike) -> str:
  """The absolute spelling of a path that a user gives, in a flag, a field of a config or an argument.

  Every such path passes through this function, so that all programs expand `~` alike, and so that two spellings of a
  path are one. The path may be a glob pattern, and need not exist.

  Args:
    path: of a file or folder; '' and addresses such as gs://bucket/folder are returned as they are.

  Raises:
    InputError: the path begins with `~NAME`, and there is no such user.

  Example:
    >>> absolute("/data/./text//*.txt"), absolute("gs://bucket/text"), absolute("")
    ('/data/text/*.txt', 'gs://bucket/text', '')
  """
  name = os.fspath(path)
  if not name or "://" in name:
    return name
  whole = pathlib.Path(os.path.expanduser(name))
  if name.startswith("~") and not whole.is_absolute():
    user = whole.parts[0]
    raise InputError(f"{name}: no user has the home folder {user}; write ./{name} where a file has this name")
  parts = whole.absolute().parts
  # Where a folder is a symbolic link, `..` is not the folder that is written before it.
  upward = max((i + 1 for i, part in enumerate(parts) if part == ".."), default=0)
  if any(re.search(r"[*?\[]", part) for part in parts[:upward]):
    upward = 0
  return str(pathlib.Path(*parts[:upward]).resolve().joinpath(*parts[upward:]) if upward else pathlib.Path(*parts))


def unchecked_place(path: str | os.PathLike) -> epath.Path:
  """The path of a file or folder, absolute.

  Nothing is checked. Where the client for buckets is missing, the first access fails.
  """
  from etils import epath

  return epath.Path(path) if in_bucket(path) else epath.Path(pathlib.Path(absolute(path)).absolute())
