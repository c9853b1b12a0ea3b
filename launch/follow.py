"""The logs of workers, followed over connections that may break."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable

from absl import logging
from cloud import Worker
from commands import Machine
from jobs import follow_words
from processes import Process

# Of the last line of a worker's log; the exit code follows.
EXIT_MARK = "cyb-launch: exit "


class Follower:
  """A worker's log, read line by line over connections that may break; nothing is shown twice, nothing is left out.

  Args:
    emit: is given each line.
  """

  def __init__(self, machine: Machine, worker: Worker, emit: Callable[[str], None]):
    self._machine, self.worker, self._emit = machine, worker, emit
    self._next = 1
    self.last = ""
    self.forget()

  def forget(self) -> None:
    """Before it trains again: how it ended is to be told anew."""
    self.exit: str | None = None
    self._process: Process | None = None
    self._begun = self._retry = 0.0
    self.silent_since: float | None = None

  def _line(self, line: str) -> None:
    self.silent_since = None
    if line.startswith(EXIT_MARK):
      self.exit = line.removeprefix(EXIT_MARK)
      return
    self._next += 1
    self.last = line
    self._emit(line)

  def tend(self, reconnect_seconds: float) -> bool:
    """Connects where it isn't connected; whether a connection has just broken."""
    now = time.monotonic()
    if self._process is None:
      if now >= self._retry and self.exit is None:
        self._begun = now
        words = follow_words(self._machine, self.worker.node, self.worker.index, self._next)
        self._process = Process(words, self._line)
      return False
    if self._process.running():
      if now - self._begun > 6 * reconnect_seconds:
        self.silent_since = None
      return False
    done = self._process.done()
    self._process = None
    if self.exit is not None:
      return False
    self._retry = now + reconnect_seconds
    if self.silent_since is None:
      self.silent_since = now
    logging.warning("%s: its log broke off (%s); connecting again", self.worker.label, done.said())
    return True

  def close(self) -> None:
    if self._process is not None:
      self._process.kill()
      self._process = None


def show(label: str, line: str) -> None:
  """A worker's line, at once and whole."""
  # A terminal that has been closed must not end what looks after a machine.
  with contextlib.suppress(OSError):
    sys.stderr.write(f"{label} | {line}\n")
    sys.stderr.flush()
