"""Huge pages for the memory of programs on Linux.

XLA's CPU backend takes the memory of a step from malloc and gives it back after the step. The kernel then clears every
page of 4 KiB again in the next step, which takes a considerable part of the time of a small model's step. With huge
pages of 2 MiB it takes almost none. glibc requests them if a variable is set when a process starts
(https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html), and where the kernel gives huge
pages to processes that request them, which is the default of most distributions.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence

_VARIABLE, _TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_KERNEL = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Programs that only print a text start faster without.
_PRINTS = ("--help", "-help", "-?", "--version", "--completion")


def restart_with_huge_pages(argv: Sequence[str]) -> None:
  """Starts the program of this process again with the variable set; does not return then.

  It returns if the variable has the tunable (whatever its value, so a user can decide), if the kernel gives huge pages
  to all processes or to none, or if the program only prints a text. The process keeps its number.

  Args:
    argv: the arguments of the program.
  """
  tunables = os.environ.get(_VARIABLE, "")
  if _TUNABLE in tunables or any(word.startswith(_PRINTS) for word in argv) or not _kernel_gives_on_request():
    return
  os.environ[_VARIABLE] = ":".join(filter(None, (tunables, f"{_TUNABLE}=1")))
  sys.stdout.flush()
  sys.stderr.flush()
  os.execv(sys.executable, sys.orig_argv)


def _kernel_gives_on_request() -> bool:
  try:
    return "[madvise]" in _KERNEL.read_text()
  except OSError:
    return False
