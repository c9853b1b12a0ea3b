"""Runs commands as child processes, with a time limit, output by line, and own handling of Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

from absl import logging

# The time between two checks of a process, in seconds.
TICK = 0.02
TIMED_OUT = 124


class Interrupted(Exception):
  """The program was interrupted by Ctrl-C or a signal of the same meaning."""


class Interrupts:
  """A context that counts the signals that interrupt the program; code that waits calls `check`.

  A signal itself raises nothing, so a command that creates or deletes a machine is never interrupted in the middle.
  """

  def __init__(self) -> None:
    self._count = 0
    self._raised = 0

  def __enter__(self) -> Interrupts:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      # Under nohup, SIGHUP is ignored, and remains ignored.
      if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    pass  # The handlers remain until the process exits, so that a late Ctrl-C does not suppress the final output.

  def _note(self, number: int, _: object) -> None:
    self._count += 1

  def pending(self) -> bool:
    return self._count > self._raised

  def check(self) -> None:
    """Raises Interrupted if a signal has arrived since this method last raised it."""
    if self.pending():
      self._raised = self._count
      raise Interrupted

  def pause(self, seconds: float) -> None:
    """Sleeps; raises Interrupted when a signal arrives."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
      self.check()
      time.sleep(min(TICK, left))
    self.check()


@dataclasses.dataclass(frozen=True)
class Done:
  """The result of a command: its exit code (124 after a timeout), its standard output, and its standard error."""

  code: int
  out: str
  err: str

  def message(self) -> str:
    """The most informative line of the output: the last line with an error, or else the last line."""
    lines = [line.strip() for line in (self.err + "\n" + self.out).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR") or "error" in line.lower()]
    return (errors or lines or [f"exit code {self.code}"])[-1]


class Process:
  """A command that runs in its own process group, so that Ctrl-C does not interrupt it.

  Args:
    words: the command.
    on_line: called in another thread with every line that the command writes; None means that the output is stored.
  """

  def __init__(self, words: Sequence[str], on_line: Callable[[str], None] | None = None):
    self.words = words
    self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (`done` closes them)
    kept = None if on_line else self._out
    self._process = subprocess.Popen(
      words,
      stdin=subprocess.DEVNULL,
      stdout=kept or subprocess.PIPE,
      stderr=self._err,
      start_new_session=True,
    )
    self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True) if on_line else None
    if self._reader:
      self._reader.start()

  def _read(self, on_line: Callable[[str], None]) -> None:
    # Lines are read as bytes, in which a carriage return does not end a line, so they are counted like on the worker.
    for line in self._process.stdout:
      # An incomplete line is read again after the next connection.
      if line.endswith(b"\n"):
        on_line(line[:-1].decode(errors="replace"))

  def running(self) -> bool:
    return self._process.poll() is None

  def done(self) -> Done:
    """Waits until the command has ended and its output was read; returns the result."""
    code = self._process.wait()
    if self._reader:
      self._reader.join(timeout=5)
    texts = []
    for file in (self._out, self._err):
      file.seek(0)
      texts.append(file.read().decode(errors="replace"))
      file.close()
    return Done(code, *texts)

  def kill(self) -> None:
    """Ends the command and its child processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
      if not self.running():
        return
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._process.pid, number)
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._process.wait(timeout=2)


def run(
  words: Sequence[str],
  interrupts: Interrupts,
  *,
  seconds: float,
  watch: Callable[[], None] | None = None,
  to_the_end: bool = False,
) -> Done:
  """Runs a command.

  Args:
    words: the command.
    interrupts: the signals that end the command and raise Interrupted.
    seconds: the time limit.
    watch: called repeatedly while the command runs; an exception that it raises ends the command, and is propagated.
    to_the_end: whether the first signal raises Interrupted only after the command has ended; a second signal ends it.
  """
  process = Process(words)
  until = time.monotonic() + seconds
  interrupted = False
  try:
    while process.running():
      if interrupts.pending():
        if interrupted or not to_the_end:
          interrupts.check()
        interrupted = True
        with contextlib.suppress(Interrupted):
          interrupts.check()
        logging.warning("interrupted; waiting until `%s` has ended, so that no resources are left", " ".join(words[:6]))
      if time.monotonic() > until:
        process.kill()
        return Done(TIMED_OUT, "", f"no answer in {seconds:g} seconds")
      if watch:
        watch()
      time.sleep(TICK)
  except BaseException:
    process.kill()
    raise
  done = process.done()
  if interrupted:
    raise Interrupted
  return done
