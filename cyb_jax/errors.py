"""Errors that end a program with one line and no traceback, and the translation of the errors of disks and buckets."""

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

  The message is one line that names the field or file, its value, and the accepted values. Programs print it without a
  traceback and exit with code 2.
  """


class StorageError(OSError):
  """A disk or a bucket has failed: it is full, read-only, missing or unreachable.

  The message is one line that names the file, the cause, and the state of the run that is saved. Programs print it
  without a traceback and exit with code 1; the same command continues the run after the cause is removed.

  Args:
    message: the line.
    cause: for a bucket, the result of `bucket_cause` for the original error.
  """

  def __init__(self, message: str, *, cause: str | None = None):
    super().__init__(message)
    self.cause = cause


class DivergedError(FloatingPointError):
  """Several steps in a row have a loss or a gradient that is not finite; none of these steps was applied.

  The message is one line that names the step and the last good state. Programs print it without a traceback and exit
  with code 1.
  """


class Interrupted(Exception):
  """A signal has stopped the run after everything was saved, or before there was anything to save; the same command
  continues it.

  The message is one line. Programs log it and exit with code 75.
  """


class HostLostError(RuntimeError):
  """Another host has ended or is unreachable.

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


def is_seed(value: int) -> bool:
  """Whether a number is a seed of its own: `jax.random.key` takes seeds modulo 2^32."""
  return 0 <= value < 2**32


def check_seed(field: str, seed: int) -> None:
  """Checks a seed that a user gives.

  Args:
    field: the flag or field that holds the seed, for the error.
    seed: its value.

  Raises:
    InputError: the seed isn't in [0, 2^32).
  """
  if not is_seed(seed):
    raise InputError(f"{field}: {seed} must lie in [0, 2^32)")


# The errors of a disk on writing, and their descriptions.
REFUSALS = {
  errno.ENOSPC: "the disk is full",
  errno.EDQUOT: "the disk quota is used up",
  errno.EFBIG: "files may not grow so large here",
  errno.EROFS: "the file system is read-only",
}


# The permanent HTTP errors of a bucket, and their descriptions; temporary errors have been retried before.
_ANSWERS = {
  401: "the bucket wants to know who asks (HTTP 401); sign in, gcloud auth application-default login",
  403: "the bucket refuses this account (HTTP 403)",
  404: "what is asked for isn't in the bucket (HTTP 404)",
}

# The start of TensorStore's messages where the bucket has not answered.
_NO_ANSWER = re.compile(r"(?:UNAVAILABLE|DEADLINE_EXCEEDED|UNAUTHENTICATED|UNKNOWN|ABORTED|INTERNAL): ")


def storage_cause(error: BaseException) -> str | None:
  """Returns the fault of the disk or bucket that an error describes, such as 'the disk is full'; None: it has another
  cause.

  Example:
    >>> storage_cause(OSError(errno.ENOSPC, "no space"))
    'the disk is full'
    >>> storage_cause(ValueError("a typo")) is None
    True
  """
  cause = bucket_cause(error)
  if cause is not None:
    return cause
  number = error.errno if isinstance(error, OSError) else None
  if number is None:
    # TensorStore raises ValueErrors that contain the error code of the system in their text.
    found = re.search(r"os_error_code='(\d+)'|\[OS error (\d+)", str(error))
    number = int(found[1] or found[2]) if found else None
  if number is None:
    return None
  return REFUSALS.get(number) or os.strerror(number)


def bucket_cause(error: BaseException) -> str | None:
  """Returns the fault of the bucket that an error of gcsfs or TensorStore, or one caused by it, describes.

  The result is None where neither the error nor its causes come from a bucket.
  """
  inner = error.exceptions if isinstance(error, BaseExceptionGroup) else (error.__cause__,)
  cause = _bucket_cause(error)
  return cause or next(filter(None, (bucket_cause(e) for e in inner if e is not None)), None)


def bucket_passes(error: BaseException) -> bool:
  """Returns whether an error of a bucket is temporary, so that the same request may succeed later."""
  inner = error.exceptions if isinstance(error, BaseExceptionGroup) else (error.__cause__,)
  if isinstance(error, StorageError) or _bucket_cause(error) is None:
    return any(bucket_passes(e) for e in inner if e is not None)
  status = _http_status(error)
  if status is not None:
    return status == 429 or status >= 500
  return type(error).__module__.partition(".")[0] != "google"  # an error of google-auth is a failed sign-in


def _bucket_cause(error: BaseException) -> str | None:
  """Returns `bucket_cause` of the error alone, without its causes."""
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
  # The errors of asyncio have no error number.
  if package in ("aiohttp", "fsspec", "requests") or isinstance(error, ConnectionError | TimeoutError):
    number = getattr(error, "errno", None)
    why = os.strerror(number) if number and number > 0 else text or type(error).__name__
    return f"the bucket can't be reached ({why})"
  if "gs://" in text and isinstance(error, ValueError) and _NO_ANSWER.match(text):
    curl = re.search(r"CURL error ([^:\[]+)", text)
    return f"the bucket can't be reached ({curl[1] if curl else text.splitlines()[0].partition(' [')[0]})"
  return None


def _http_status(error: BaseException) -> int | None:
  """Returns the HTTP status that an error of gcsfs or TensorStore reports; None: it reports none."""
  if type(error).__module__.startswith("gcsfs"):
    code = getattr(error, "code", None)
    return int(code) if code is not None and str(code).isdecimal() else None
  if isinstance(error, OSError) and error.errno is None:
    text = str(error)
    if text.startswith("Forbidden: "):
      return 403
    # The message of gcsfs contains the path of the request.
    if isinstance(error, FileNotFoundError) and re.search(r"\bb/[^/]+/o\b", text):
      return 404
  found = re.search(r"http_response_code='(\d+)'", str(error))
  return int(found[1]) if found else None


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
  """Converts errors of the disk or the bucket inside the block to a StorageError about `what`."""
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
  """Converts errors of the system inside the block, such as a missing permission, to an InputError.

  The InputError is about the file that the error names, or about `what` where it names none.
  """
  try:
    yield
  except OSError as error:
    raise InputError(f"{error.filename or what}: can't be read ({error.strerror or error})") from error
