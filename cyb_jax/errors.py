"""The errors that a program ends with in one line: bad input, a disk or a host that fails a run, a run that has
diverged.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator


class InputError(ValueError):
  """Bad input: a flag, a config field, a file.

  The message is one line that names the field or file, the value that was met, and what would be accepted.
  Programs print it without a traceback and exit with code 2.
  """


class StorageError(OSError):
  """A disk fails a run that is well otherwise: it is full, read-only, gone.

  The message is one line that names the file, what is wrong with the disk, and what of the run is whole. Programs print
  it without a traceback and exit with code 1; once the disk is well, the same command continues.
  """


class DivergedError(FloatingPointError):
  """One step after the other has a loss or a gradient that isn't finite.

  None of them was applied. The message is one line that names the step, and where the last good state lies. Programs
  print it without a traceback and exit with code 1.
  """


class HostLostError(RuntimeError):
  """Another host has gone, or can't be reached.

  The message is one line. Programs print it without a traceback and exit with code 1; the same command on all hosts
  continues.
  """


# What a disk says to whoever writes, and the words for it.
REFUSALS = {
  errno.ENOSPC: "the disk is full",
  errno.EDQUOT: "the disk quota is used up",
  errno.EFBIG: "files may not grow so large here",
  errno.EROFS: "the file system is read-only",
}


def storage_cause(error: BaseException) -> str | None:
  """What an error says of the disk, 'the disk is full' and the like; None: it is about something else."""
  number = error.errno if isinstance(error, OSError) else None
  if number is None:
    # TensorStore's errors are ValueErrors that carry the system's code in their text.
    found = re.search(r"os_error_code='(\d+)'|\[OS error (\d+)", str(error))
    number = int(found[1] or found[2]) if found else None
  if number is None:
    return None
  return REFUSALS.get(number) or os.strerror(number)


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
  """Errors of the disk inside become a StorageError about `what`."""
  try:
    yield
  except StorageError:
    raise
  except OSError as error:
    raise StorageError(f"{what} can't be written: {storage_cause(error) or error}") from error


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
  """Errors of the system inside, such as a missing permission, become an InputError about the file that they name, or
  about `what`.
  """
  try:
    yield
  except OSError as error:
    raise InputError(f"{error.filename or what}: can't be read ({error.strerror or error})") from error
