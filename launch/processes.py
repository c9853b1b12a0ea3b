"""Commands of others as processes of ours: with a limit, line by line, and with Ctrl-C in our hands."""

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

# How often a process is looked at; seconds.
TICK = 0.02
TIMED_OUT = 124


class Interrupted(Exception):
  """Ctrl-C, or a signal that asks for the same."""


class Interrupts:
  """Counts the signals that ask us to end, from where it is entered on; who waits asks `check`.

  A signal raises nothing by itself, so that no command is left half way that would leave a machine behind.
  """

  def __init__(self) -> None:
    self._count = 0
    self._told = 0

  def __enter__(self) -> Interrupts:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      # Under nohup a hangup is ignored, and stays so.
      if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    pass  # The handlers stay until we exit: a late Ctrl-C must not cut short what is said last.

  def _note(self, number: int, _: object) -> None:
    self._count += 1

  def pending(self) -> bool:
    return self._count > self._told

  def check(self) -> None:
    """Raises Interrupted where a signal has come since this last did."""
    if self.pending():
      self._told = self._count
      raise Interrupted

  def pause(self, seconds: float) -> None:
    """Sleeps, and wakes up for a signal."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
      self.check()
      time.sleep(min(TICK, left))
    self.check()


@dataclasses.dataclass(frozen=True)
class Done:
  """How a command has ended: its exit code (124: it took too long), its standard output, its standard error."""

  code: int
  out: str
  err: str

  def said(self) -> str:
    """The line of an error that says most: the last that names one, else the last."""
    lines = [line.strip() for line in (self.err + "\n" + self.out).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR") or "error" in line.lower()]
    return (errors or lines or [f"exit code {self.code}"])[-1]


class Process:
  """A command that runs in a group of its own, so that Ctrl-C doesn't reach it.

  Args:
    words: the command.
    on_line: is given every line that it writes, as it comes, from another thread; None: they are kept.
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
    # As bytes: a carriage return within a line makes no new one, or lines would be counted differently here and there.
    for line in self._process.stdout:
      # A line that was cut off comes whole when it is asked for again.
      if line.endswith(b"\n"):
        on_line(line[:-1].decode(errors="replace"))

  def running(self) -> bool:
    return self._process.poll() is None

  def done(self) -> Done:
    """How it has ended; waits for what it wrote to be read."""
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
    """Ends it and whatever it has started."""
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
    interrupts: end it, and raise Interrupted.
    seconds: how long it may take.
    watch: is called again and again meanwhile; what it raises ends the command, and is raised.
    to_the_end: a first signal waits for the command, and raises Interrupted then; a second one ends it.
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
        logging.warning(
          "interrupted; waiting for an answer to `%s`, so that nothing is left behind", " ".join(words[:6])
        )
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
