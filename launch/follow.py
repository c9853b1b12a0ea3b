"""Follows the logs of workers over connections that may break."""

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

# The prefix of the last line of a worker's log, before the exit code.
EXIT_MARK = "cyb-launch: exit "


class Follower:
  """Reads a worker's log line by line over connections that may break; each line is emitted exactly once.

  Args:
    machine: the machine of the worker.
    worker: the worker.
    emit: called with each line.
  """

  def __init__(self, machine: Machine, worker: Worker, emit: Callable[[str], None]):
    self._machine, self.worker, self._emit = machine, worker, emit
    self._next = 1
    self.last = ""
    self.forget()

  def forget(self) -> None:
    """Resets the state before training is started again."""
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
    """Connects if there is no connection; returns whether a connection has just broken."""
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
    logging.warning("%s: the connection broke (%s); connecting again", self.worker.label, done.message())
    return True

  def close(self) -> None:
    if self._process is not None:
      self._process.kill()
      self._process = None


def show(label: str, line: str) -> None:
  """Writes a line of a worker to standard error."""
  # An error of a closed terminal must not end the supervision of a machine.
  with contextlib.suppress(OSError):
    sys.stderr.write(f"{label} | {line}\n")
    sys.stderr.flush()
