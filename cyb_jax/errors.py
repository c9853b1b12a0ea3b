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


class Interrupted(BaseException):
  """A signal has ended the work, after everything was saved or before there was anything to save.

  The message is one line. Programs log it and exit with code 75; the same command continues or starts again, as the
  message says. It is no Exception, so that code that tolerates errors does not swallow it.

  Args:
    message: the line.
    on_all_hosts: whether all hosts of the program end at the same point, as the hosts of a run do after a step.
  """

  def __init__(self, message: str, *, on_all_hosts: bool = False):
    super().__init__(message)
    self.on_all_hosts = on_all_hosts


class HostLostError(RuntimeError):
  """Another host has ended or is unreachable.

  The message is one line. Programs print it without a traceback and exit with code 1; the same command on all hosts
  continues the run.
  """


class Failed(Exception):
  """A check or a part of the program has failed. The result is still printed, and the exit code is 1.

  Args:
    message: one line.
    result: the object to print.
  """

  def __init__(self, message: str, result: dict[str, Any]):
    super().__init__(message)
    self.result = result


def shown(value: Any, most: int = 60) -> str:
  """The `repr` of a value in a message, cut to `most` characters; values of foreign files may be of any size.

  Example:
    >>> shown("a" * 100, most=10)
    "'aaaaaa..."
  """
  text = repr(value)
  return text if len(text) <= most else f"{text[: most - 3]}..."


# The smallest similarity of a suggested name; the smallest similarity of its group that counts, and its weight.
_SIMILAR = 0.6
_SIMILAR_GROUP = 0.75
_GROUP_WEIGHT = 0.15


def did_you_mean(
  name: str, accepted: Iterable[str], *, written: Callable[[str], str] = repr, listed: Iterable[str] | None = None
) -> str:
  """A hint for an unknown name: the most similar accepted names, or all accepted names.

  Args:
    name: the unknown name.
    accepted: the accepted names.
    written: formats a similar name in the hint.
    listed: the names that are listed if no name is similar; None means all of `accepted`.

  Returns:
    "did you mean 'x'?", "did you mean 'x' or 'y'?" or "there are a, b, c".

  Example:
    >>> did_you_mean("optimizer.lr", ["optimizer.learning_rate", "tuning.lora_rank"])
    "did you mean 'optimizer.learning_rate'?"
  """
  accepted = list(accepted)
  close = nearest(name, accepted)
  if close:
    return f"did you mean {' or '.join(map(written, close))}?"
  return f"there are {', '.join(accepted if listed is None else listed)}"


def nearest(name: str, accepted: Iterable[str]) -> list[str]:
  """The accepted names that are most similar to an unknown name: one, at most three equally similar ones, or none.

  A name may have a group, as in 'optimizer.lr'. Names in other groups are also compared, by the part after the last
  dot; among equally similar names, the one with the more similar group is preferred. An abbreviation of the words of a
  name is similar to the name.
  """
  group, _, last = name.rpartition(".")
  scores: dict[str, float] = {}
  for candidate in accepted:
    its_group, _, its_last = candidate.rpartition(".")
    score = _similarity(last, its_last)
    if score >= _SIMILAR:
      similarity = _ratio(group, its_group)
      scores[candidate] = round(score + _GROUP_WEIGHT * similarity * (similarity >= _SIMILAR_GROUP), 6)
  best = [candidate for candidate, score in scores.items() if score == max(scores.values())]
  return best[:3]


def _similarity(name: str, accepted: str) -> float:
  """1 for equal names; less for an abbreviation, a prefix or a word of the accepted name, or a similar spelling."""
  name, accepted = name.lower().replace("-", "_"), accepted.lower()
  score = _ratio(name, accepted)
  if "_" in accepted and len(name) > 1 and _abbreviates(name.replace("_", ""), accepted.split("_")):
    score = max(score, 0.9)
  if len(name) > 2 and (accepted.startswith(name) or name in accepted.split("_")):
    score = max(score, 0.7 + 0.2 * score)
  return score


def _abbreviates(name: str, words: list[str]) -> bool:
  """Whether a name concatenates prefixes of all the words: 'lr' abbreviates 'learning', 'rate'."""
  if len(words) == 1:
    return bool(name) and words[0].startswith(name)
  sizes = range(1, len(name))
  return any(words[0].startswith(name[:size]) and _abbreviates(name[size:], words[1:]) for size in sizes)


def _ratio(one: str, other: str) -> float:
  return difflib.SequenceMatcher(None, one, other).ratio()


def is_seed(value: int) -> bool:
  """Whether a number is a valid seed; `jax.random.key` takes seeds modulo 2^32, so others would not be distinct."""
  return 0 <= value < 2**32


def check_seed(field: str, seed: int) -> None:
  """Checks a seed that a user gives.

  Args:
    field: the flag or field whose value is the seed, for the error.
    seed: the seed.

  Raises:
    InputError: the seed isn't in [0, 2^32).
  """
  if not is_seed(seed):
    raise InputError(f"{field}: {seed} must be in [0, 2^32)")


# The errors of writing to a disk, and their descriptions.
REFUSALS = {
  errno.ENOSPC: "the disk is full",
  errno.EDQUOT: "the disk quota is used up",
  errno.EFBIG: "the file exceeds the size limit of the file system or the process",
  errno.EROFS: "the file system is read-only",
}


# The permanent HTTP errors of a bucket, and their descriptions; requests with temporary errors have been repeated.
_ANSWERS = {
  401: "the bucket requires authentication (HTTP 401); run gcloud auth application-default login",
  403: "the bucket denies access to this account (HTTP 403)",
  404: "the requested object isn't in the bucket (HTTP 404)",
}

# The beginning of TensorStore's messages for requests that the bucket has not answered.
_NO_ANSWER = re.compile(r"(?:UNAVAILABLE|DEADLINE_EXCEEDED|UNAUTHENTICATED|UNKNOWN|ABORTED|INTERNAL): ")


def storage_cause(error: BaseException) -> str | None:
  """Returns the fault of the disk or bucket that caused an error, such as 'the disk is full'; None for other causes.

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
    # TensorStore raises ValueErrors whose text contains the error number of the system.
    found = re.search(r"os_error_code='(\d+)'|\[OS error (\d+)", str(error))
    number = int(found[1] or found[2]) if found else None
  if number is None:
    return None
  return REFUSALS.get(number) or os.strerror(number)


def bucket_cause(error: BaseException) -> str | None:
  """Returns the fault of the bucket that caused an error of gcsfs or TensorStore, or an error with such a cause.

  The result is None if neither the error nor its causes come from a bucket.
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
  """Returns `bucket_cause` of the error itself, without its causes."""
  if isinstance(error, StorageError):
    return error.cause
  if isinstance(error, InputError):
    return None
  status = _http_status(error)
  if status is not None:
    return _ANSWERS.get(status) or f"the bucket rejected the request (HTTP {status})"
  package, text = type(error).__module__.partition(".")[0], str(error)
  if package == "google":
    return f"signing in to the bucket failed ({text.splitlines()[0] if text else type(error).__name__})"
  # The errors of asyncio have no error number. Those of a disk have a file name, and orbax raises a TimeoutError if it
  # waits in vain for another host.
  lost = isinstance(error, ConnectionError | TimeoutError) and error.filename is None
  if package in ("aiohttp", "fsspec", "requests") or (lost and not _is_of_jax(error.__cause__)):
    number = getattr(error, "errno", None)
    why = os.strerror(number) if number and number > 0 else text or type(error).__name__
    return f"the bucket can't be reached ({why})"
  if "gs://" in text and isinstance(error, ValueError) and _NO_ANSWER.match(text):
    curl = re.search(r"CURL error ([^:\[]+)", text)
    return f"the bucket can't be reached ({curl[1] if curl else text.splitlines()[0].partition(' [')[0]})"
  return None


def _is_of_jax(error: BaseException | None) -> bool:
  return type(error).__module__.partition(".")[0] in ("jax", "jaxlib")


def _http_status(error: BaseException) -> int | None:
  """Returns the HTTP status that an error of gcsfs or TensorStore reports, or None."""
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
  """Converts errors of the disk or the bucket inside the `with` block to a StorageError about `what`."""
  try:
    yield
  except StorageError:
    raise
  except Exception as error:
    cause = storage_cause(error)
    if cause is None and not isinstance(error, OSError):
      raise
    raise StorageError(
      f"{what} can't be written: {cause or error}; when there is space and access, give the same command again"
    ) from error


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
  """Converts errors of the operating system inside the `with` block, such as missing permissions, to an InputError.

  The InputError names the file of the error, or `what` if the error has no file.
  """
  try:
    yield
  except OSError as error:
    raise InputError(f"{error.filename or what}: can't be read ({error.strerror or error})") from error
