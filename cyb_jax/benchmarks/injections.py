"""Faults that a training injects into its own process: a disk that refuses writes, a clock that is set again and again.

Only the processes that `lives` starts call this module. Nothing is restored, because such a process runs one training.
"""

from __future__ import annotations

import builtins
import io
import os
import random
import sys
import time
from collections.abc import Mapping
from typing import Any

# The seconds between two steps of the clock, and the largest step in seconds: a day.
_SECONDS_PER_STEP = 0.25
_LARGEST_STEP = 86400.0
# The events of Python's audit hooks that change a folder, and the number of their arguments that are paths.
_CHANGES = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.truncate": 1}


def inject(request: Mapping[str, Any]) -> None:
  """Injects faults into this process.

  Args:
    request: for each kind of fault its arguments: 'disk', those of `fail_disk`; 'clock', the argument of `step_clock`.
  """
  if "disk" in request:
    fail_disk(**request["disk"])
  if "clock" in request:
    step_clock(request["clock"])


def step_clock(seed: int) -> None:
  """Makes `time.time` and `time.time_ns` step back and forth, by up to a day, four times a second.

  `time.monotonic` is unchanged, as on a machine whose clock is set.

  Args:
    seed: the seed of the steps; hosts of one seed have the same clock.
  """
  clock, clock_ns = time.time, time.time_ns

  def offset() -> float:
    number = int(time.monotonic() / _SECONDS_PER_STEP)
    return random.Random(seed * 2**32 + number).uniform(-_LARGEST_STEP, _LARGEST_STEP)

  time.time = lambda: clock() + offset()
  time.time_ns = lambda: clock_ns() + int(offset() * 1e9)


def fail_disk(folder: str, marker: str, error: int, allows_removal: bool) -> None:
  """Makes Python's writes in a folder fail while a marker file exists, as on a disk that is full or read-only.

  New files and folders are refused, and files that are already open take only a half of what is written to them. Writes
  of C++ code aren't refused, because only root can mount a disk that is full.

  Args:
    folder: the folder; its parent folder is not affected.
    marker: the path of the marker file, outside of the folder.
    error: the number of the error, for example errno.ENOSPC.
    allows_removal: whether existing files may be removed, renamed and opened, as on a full disk.
  """

  def fails(path: Any) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):  # the number of an open file
      return False
    name = os.fsdecode(path)
    return (name == folder or name.startswith(folder + os.sep)) and os.path.exists(marker)

  def in_folder(path: Any, number: Any) -> Any:
    """A path, which is relative to the folder of an open number when shutil.rmtree removes a file."""
    if not isinstance(path, str) or os.path.isabs(path) or not isinstance(number, int) or number < 0:
      return path
    try:
      return os.path.join(os.readlink(f"/proc/self/fd/{number}"), path)
    except OSError:
      return path

  def hook(event: str, args: tuple[Any, ...]) -> None:
    if event == "open":
      path, _, flags = args
      refused = bool(flags & (os.O_WRONLY | os.O_RDWR)) and fails(path)
      if refused and allows_removal:
        refused = bool(flags & os.O_CREAT) and not os.path.exists(path)
      paths = [path] if refused else []
    elif event in _CHANGES and (not allows_removal or event == "os.mkdir"):
      paths = [path for path in map(in_folder, args[: _CHANGES[event]], [args[-1]] * 2) if fails(path)]
    else:
      return
    if paths:
      raise OSError(error, os.strerror(error), os.fspath(paths[0]))

  class OpenFile(io.FileIO):
    """An unbuffered file; the disk fills up in the middle of a write."""

    is_full = False

    def write(self, content: Any) -> int:
      if not fails(self.name):
        return super().write(content)
      if self.is_full:
        raise OSError(error, os.strerror(error), self.name)
      self.is_full = True
      return super().write(bytes(content)[: len(content) // 2])

  opened = io.open

  def open_file(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
    if buffering == 0 and isinstance(file, str | os.PathLike):
      return OpenFile(os.fspath(file), mode.replace("b", ""))
    return opened(file, mode, buffering, *args, **options)

  sys.addaudithook(hook)
  io.open = builtins.open = open_file
