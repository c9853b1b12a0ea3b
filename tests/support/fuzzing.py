"""Checks that readers of foreign files raise nothing but the project's errors, in bounded time and memory.

    python tests/support/fuzzing.py --reader=gguf --seconds=300

damages valid files until the time is over, and prints one line of JSON for each kind of failure. The table of readers
is in `foreign_readers`.
"""

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import json
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

import mutations

from cyb_jax.errors import InputError

# The limits of one case, and of the process that runs many cases.
SECONDS = 20
MEMORY_CONSTANT = 256 << 20
MEMORY_PER_BYTE = 4
ADDRESS_SPACE = 6 << 30
_LONGEST_MESSAGE = 2000


@dataclasses.dataclass(frozen=True)
class Reader:
  """A reader of foreign files.

  Attributes:
    name: its name.
    write: writes valid files into an empty folder.
    read: reads what a file, of those that are damaged, belongs to.
    files: patterns of the files that are damaged; one file in each case.
    errors: the errors that a damaged file may raise.
    mutate: (content, random) -> damaged content; None means the mutation of the file's format.
    seal: (folder, changed file) -> updates checksums after a change, so that the change is not detected by them.
  """

  name: str
  write: Callable[[pathlib.Path], None]
  read: Callable[[pathlib.Path], object]
  files: tuple[str, ...]
  errors: tuple[type[Exception], ...] = (InputError,)
  mutate: Callable[[bytes, random.Random], bytes] | None = None
  seal: Callable[[pathlib.Path, pathlib.Path], None] | None = None


class Hang(BaseException):
  """The reader has not returned in time."""


class Violation(Exception):
  """A property other than the type of the exception is violated."""


class Seeds:
  """The valid files of a reader, and a scratch folder in which they are damaged and read.

  Args:
    reader: the reader.
    folder: an empty folder.

  Attributes:
    reader: the reader.
    valid: the folder of the valid files.
    names: the paths in it of the files that are damaged.
  """

  def __init__(self, reader, folder):
    self.reader, self.valid, self._scratch = reader, folder / "valid", folder / "scratch"
    self.valid.mkdir()
    reader.write(self.valid)
    found = {path for pattern in reader.files for path in self.valid.glob(pattern) if path.is_file()}
    self.names = sorted(str(path.relative_to(self.valid)) for path in found)
    assert self.names, reader.name
    shutil.copytree(self.valid, self._scratch)
    # Also compiles and imports what the cases need. All files of a folder belong together.
    for name in {name.partition("/")[0]: name for name in self.names}.values():
      reader.read(self._scratch / name)

  def check(self, source):
    """Damages one file and reads it.

    Args:
      source: a `random.Random`.

    Returns:
      'read', or the type of the declared error.

    Raises:
      Exception: whatever else the reader raises; Hang, Violation.
    """
    reader = self.reader
    # Few readers write to their folder, so only the damaged file is restored.
    name = source.choice(self.names)
    path = self._scratch / name
    content = (self.valid / name).read_bytes()
    damaged = (reader.mutate or mutations.mutation_of(path.name))(content, source)
    path.write_bytes(damaged)
    try:
      if reader.seal is not None:
        reader.seal(self._scratch, path)
      return self._read(path, len(damaged) + sum(x.stat().st_size for x in self._scratch.rglob("*") if x.is_file()))
    finally:
      path.write_bytes(content)
      if reader.seal is not None:
        shutil.rmtree(self._scratch)
        shutil.copytree(self.valid, self._scratch)

  def _read(self, path, size):
    before = _reset_peak()
    try:
      with limits():
        self.reader.read(path)
      found = "read"
    except self.reader.errors as error:
      found, message = type(error).__name__, str(error)
      message.encode()  # a lone surrogate can't be printed
      if "\n" in message or len(message) > _LONGEST_MESSAGE:
        raise Violation(f"a message of {len(message)} characters, or of several lines: {message[:300]!r}") from error
    peak = _peak()
    if peak - before > MEMORY_CONSTANT + MEMORY_PER_BYTE * size:
      raise Violation(f"{(peak - before) >> 20} MiB of memory for {size} bytes")
    return found


@contextlib.contextmanager
def limits():
  """Raises Hang if the `with` block takes longer than SECONDS."""
  seconds = SECONDS

  def stop(*_):
    raise Hang(f"no result after {seconds} s")

  before = signal.signal(signal.SIGALRM, stop)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _reset_peak():
  """Resets the peak of the resident size, and returns the resident size, in bytes."""
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  return _peak()


def _peak():
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def generator(reader, number):
  """The generator of a case."""
  return random.Random(f"{reader.name} {number}")


def fuzz(reader, seconds, first=0, log=sys.stderr):
  """Runs cases until the time is over.

  Returns:
    The counts of results; and for each kind of failure its first case and its text.
  """
  results, failures = collections.Counter(), {}
  with tempfile.TemporaryDirectory(prefix=f"fuzz-{reader.name}-") as scratch:
    seeds = Seeds(reader, pathlib.Path(scratch))
    end, number = time.monotonic() + seconds, first
    while time.monotonic() < end:
      # The last line of the log is the case that ended the process.
      log.write(f"\r{reader.name} {number} ")
      log.flush()
      faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
      try:
        results[seeds.check(generator(reader, number))] += 1
      except KeyboardInterrupt:
        raise
      except BaseException as error:
        kind = _kind(error)
        results[kind] += 1
        if kind not in failures:
          failures[kind] = {"reader": reader.name, "case": number, "failure": kind, "error": str(error)[:300]}
          failures[kind]["traceback"] = "".join(traceback.format_exception(error)[-6:])[-3000:]
      number += 1
  faulthandler.cancel_dump_traceback_later()
  return results, list(failures.values())


def _kind(error):
  """The type of an error and the innermost line of the project, which identify a fault."""
  frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/cyb_jax/" in frame.filename]
  where = f"{pathlib.Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
  return f"{type(error).__name__} in {where}"


def limit_memory():
  """Limits the address space of this process, so that a huge allocation is a MemoryError."""
  resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))


def main():
  from foreign_readers import READERS

  parser = argparse.ArgumentParser()
  parser.add_argument("--reader", choices=list(READERS), action="append")
  parser.add_argument("--seconds", type=float, default=60)
  parser.add_argument("--first", type=int, default=0)
  args = parser.parse_args()
  limit_memory()
  failed = 0
  for name in args.reader or READERS:
    results, failures = fuzz(READERS[name], args.seconds, args.first)
    for failure in failures:
      print(json.dumps(failure), flush=True)
    print(json.dumps({"reader": name, "cases": sum(results.values()), "results": dict(results)}), flush=True)
    failed += len(failures)
  return int(failed > 0)


if __name__ == "__main__":
  sys.exit(main())
