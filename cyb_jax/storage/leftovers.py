"""Temporary folders on a disk that killed processes have left."""

from __future__ import annotations

import os
import pathlib
import re
import socket
from collections.abc import Iterator


def scratch_name(name: str) -> str:
  """The name of this process's temporary folder next to a file or folder of a name.

  It has the host's name, because several hosts may write in a shared folder.
  """
  return f"{name}.{socket.gethostname()}.{os.getpid()}.tmp"


def leftovers(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """The folders next to `path` with a `scratch_name` of its name and this host that belong to no running process."""
  if not path.parent.exists():
    return
  for found in sorted(path.parent.iterdir()):
    match = re.fullmatch(rf"{re.escape(path.name)}\.{re.escape(socket.gethostname())}\.(\d+)\.tmp", found.name)
    if match and found.is_dir() and not _is_alive(int(match[1])):
      yield found


def _is_alive(process: int) -> bool:
  if process == os.getpid():  # an older process with the same id: in containers every process may have id 1
    return False
  try:
    os.kill(process, 0)
  except (ProcessLookupError, OverflowError):
    return False
  except PermissionError:  # the process of another user
    pass
  return True
