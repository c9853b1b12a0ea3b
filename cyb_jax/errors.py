"""The errors that a program ends with in one line: bad input; a disk, a bucket or a host that fails a run; a run that
has diverged or was interrupted.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# Exit codes of the programs; success is 0.
EXIT_CRASH = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75


class InputError(ValueError):
  """Bad input: a flag, a config field, a file.

  The message is one line that names the field or file, the value that was met, and what would be accepted.
  Programs print it without a traceback and exit with code 2.
  """


class StorageError(OSError):
  """A disk or a bucket fails a run that is well otherwise: it is full, read-only, gone, can't be reached.

  The message is one line that names the file, what is wrong with the disk, and what of the run is whole. Programs print
  it without a traceback and exit with code 1; once the disk is well, the same command continues.

  Args:
    message: the line.
    cause: of a bucket, what `bucket_cause` has said of the error behind it.
  """

  def __init__(self, message: str, *, cause: str | None = None):
    super().__init__(message)
    self.cause = cause


class DivergedError(FloatingPointError):
  """One step after the other has a loss or a gradient that isn't finite.

  None of them was applied. The message is one line that names the step, and where the last good state lies. Programs
  print it without a traceback and exit with code 1.
  """


class Interrupted(Exception):
  """A signal has stopped the run after everything was saved; the same command continues it.

  The message is one line. Programs log it and exit with code 75.
  """


class HostLostError(RuntimeError):
  """Another host has gone, or can't be reached.

  The message is one line. Programs print it without a traceback and exit with code 1; the same command on all hosts
  continues.
  """


class Failed(Exception):
  """A check or a part of the program has failed. The result is printed all the same, and the exit code is 1.

  Args:
    message: one line.
    result: the object to print.
  """

  def __init__(self, message: str, result: dict[str, Any]):
    super().__init__(message)
    self.result = result


def did_you_mean(name: str, accepted: Iterable[str], *, written: Callable[[str], str] = repr) -> str:
  """A hint for an unknown name: the accepted name that resembles it, or all accepted names.

  Args:
    name: the unknown name.
    accepted: the names that would be accepted.
    written: how the resembling name is written in the hint.

  Returns:
    "did you mean 'x'?" or "there are a, b, c".
  """
  accepted = list(accepted)
  close = difflib.get_close_matches(name, accepted, n=1)
  return f"did you mean {written(close[0])}?" if close else f"there are {', '.join(accepted)}"


# What a disk says to whoever writes, and the words for it.
REFUSALS = {
  errno.ENOSPC: "the disk is full",
  errno.EDQUOT: "the disk quota is used up",
  errno.EFBIG: "files may not grow so large here",
  errno.EROFS: "the file system is read-only",
}


# What a bucket answers with, after what may pass has been tried again and again.
_ANSWERS = {
  401: "the bucket wants to know who asks (HTTP 401); sign in, gcloud auth application-default login",
  403: "the bucket refuses this account (HTTP 403)",
  404: "what is asked for isn't in the bucket (HTTP 404)",
}

# Of TensorStore, where there was no answer.
_NO_ANSWER = re.compile(r"(?:UNAVAILABLE|DEADLINE_EXCEEDED|UNAUTHENTICATED|UNKNOWN|ABORTED|INTERNAL): ")


def storage_cause(error: BaseException) -> str | None:
  """What an error says of the disk or the bucket, 'the disk is full' and the like; None: it is about something else."""
  cause = bucket_cause(error)
  if cause is not None:
    return cause
  number = error.errno if isinstance(error, OSError) else None
  if number is None:
    # TensorStore's errors are ValueErrors that carry the system's code in their text.
    found = re.search(r"os_error_code='(\d+)'|\[OS error (\d+)", str(error))
    number = int(found[1] or found[2]) if found else None
  if number is None:
    return None
  return REFUSALS.get(number) or os.strerror(number)


def bucket_cause(error: BaseException) -> str | None:
  """What an error of gcsfs or TensorStore, or one that came of it, says of a bucket; None: it says nothing of one."""
  inner = error.exceptions if isinstance(error, BaseExceptionGroup) else (error.__cause__,)
  said = _bucket_cause(error)
  return said or next(filter(None, (bucket_cause(e) for e in inner if e is not None)), None)


def bucket_passes(error: BaseException) -> bool:
  """Whether what a bucket says may be over by the next time it is asked."""
  inner = error.exceptions if isinstance(error, BaseExceptionGroup) else (error.__cause__,)
  if isinstance(error, StorageError) or _bucket_cause(error) is None:
    return any(bucket_passes(e) for e in inner if e is not None)
  status = _http_status(error)
  if status is not None:
    return status == 429 or status >= 500
  return type(error).__module__.partition(".")[0] != "google"  # signing in


def _bucket_cause(error: BaseException) -> str | None:
  if isinstance(error, StorageError):
    return error.cause
  if isinstance(error, InputError):
    return None
  status = _http_status(error)
  if status is not None:
    return _ANSWERS.get(status) or f"the bucket doesn't do what it is asked (HTTP {status})"
  package, text = type(error).__module__.partition(".")[0], str(error)
  if package == "google":
    return f"nobody could be signed in to the bucket ({text.splitlines()[0] if text else type(error).__name__})"
  # What asyncio says has no number.
  if package in ("aiohttp", "fsspec", "requests") or isinstance(error, ConnectionError | TimeoutError):
    number = getattr(error, "errno", None)
    why = os.strerror(number) if number and number > 0 else text or type(error).__name__
    return f"the bucket can't be reached ({why})"
  if "gs://" in text and isinstance(error, ValueError) and _NO_ANSWER.match(text):
    curl = re.search(r"CURL error ([^:\[]+)", text)
    return f"the bucket can't be reached ({curl[1] if curl else text.splitlines()[0].partition(' [')[0]})"
  return None


def _http_status(error: BaseException) -> int | None:
  if type(error).__module__.startswith("gcsfs"):
    code = getattr(error, "code", None)
    return int(code) if str(code).isdecimal() else None
  if isinstance(error, OSError) and error.errno is None:
    text = str(error)
    if text.startswith("Forbidden: "):
      return 403
    # gcsfs names what it has asked for.
    if isinstance(error, FileNotFoundError) and re.search(r"\bb/[^/]+/o\b", text):
      return 404
  found = re.search(r"http_response_code='(\d+)'", str(error))
  return int(found[1]) if found else None


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
  """Errors of the disk or the bucket inside become a StorageError about `what`."""
  try:
    yield
  except StorageError:
    raise
  except Exception as error:
    cause = storage_cause(error)
    if cause is None and not isinstance(error, OSError):
      raise
    raise StorageError(f"{what} can't be written: {cause or error}") from error


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
  """Errors of the system inside, such as a missing permission, become an InputError about the file that they name, or
  about `what`.
  """
  try:
    yield
  except OSError as error:
    raise InputError(f"{error.filename or what}: can't be read ({error.strerror or error})") from error
