"""Paths on a disk and in a bucket."""

from __future__ import annotations

import os
import pathlib
import re
from typing import TYPE_CHECKING, TypeAlias

from cyb_jax.errors import InputError

if TYPE_CHECKING:
  from etils import epath

# epath and gcsfs read these variables at their first use. Without the first variable, epath would import TensorFlow if
# it is installed. Without the second, gcsfs would first query each bucket's layout, which needs another protocol and
# another permission.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

Place: TypeAlias = "pathlib.Path | epath.Path"

SCHEME = "gs://"


def in_bucket(path: str | os.PathLike) -> bool:
  """Whether a path is in a bucket."""
  return os.fspath(path).startswith(SCHEME)


def absolute(path: str | os.PathLike) -> str:
  """Converts a path that a user gives, in a flag, a config field or an argument, to an absolute path.

  Every such path is passed to this function, so all programs expand `~` in the same way, and different spellings of a
  path become equal. The path may be a glob pattern, and need not exist.

  Args:
    path: the path of a file or folder; '' and URLs such as gs://bucket/folder are returned unchanged.

  Raises:
    InputError: the path begins with `~NAME`, and there is no such user.

  Example:
    >>> absolute("/data/./text//*.txt"), absolute("gs://bucket/text"), absolute("")
    ('/data/text/*.txt', 'gs://bucket/text', '')
  """
  name = os.fspath(path)
  if not name or "://" in name:
    return name
  expanded = pathlib.Path(os.path.expanduser(name))
  if name.startswith("~") and not expanded.is_absolute():
    user = expanded.parts[0]
    raise InputError(f"{name}: no user has the home folder {user}; give ./{name} if this is the name of a file")
  parts = expanded.absolute().parts
  # After a symbolic link, `..` is not the folder that precedes the link in the path, so such parts are resolved.
  upward = max((i + 1 for i, part in enumerate(parts) if part == ".."), default=0)
  if any(re.search(r"[*?\[]", part) for part in parts[:upward]):
    upward = 0
  return str(pathlib.Path(*parts[:upward]).resolve().joinpath(*parts[upward:]) if upward else pathlib.Path(*parts))


def user_cache() -> pathlib.Path:
  """The user's cache folder of this package."""
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
  return pathlib.Path(absolute(cache)) / "cyb_jax"


def unchecked_place(path: str | os.PathLike) -> epath.Path:
  """The absolute path of a file or folder, without checks.

  If the client for buckets is missing, the first access to a bucket fails.
  """
  from etils import epath

  return epath.Path(path) if in_bucket(path) else epath.Path(pathlib.Path(absolute(path)).absolute())
