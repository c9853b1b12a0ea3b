"""Signals that ask a run to stop: at once while nothing would be lost, else after the step that is under way."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from absl import logging

from cyb_jax.errors import Interrupted

# How long the main thread has for ending by itself before the process is ended.
_GRACE_SECONDS = 2.0


class StopSignals:
  """A context in which SIGTERM and SIGINT are recorded; a second signal of the same kind ends the process as usual.

  While `at_once` is set, a signal raises Interrupted in the main thread. Python runs no signal handler while the main
  thread compiles a program, which may take minutes. Where the caller owns the process, a thread therefore ends it.

  Args:
    end: ends the process; takes the reason, one line. It is called in a thread, where the main thread has not left the
      context within two seconds of a signal. None: the process is not the caller's, in a notebook for example.

  Attributes:
    at_once: whether the run may end at once, because it has done nothing yet that would be lost.
    received: the numbers of the signals that have arrived, in their order.
  """

  def __init__(self, end: Callable[[str], None] | None = None) -> None:
    self.at_once = False
    self.received: list[int] = []
    self._end = end
    self._previous: dict[int, Any] = {}
    self._left = threading.Event()
    self._wakeup: tuple[int, int] | None = None

  def __enter__(self) -> StopSignals:
    # Only the main thread may set handlers; in other threads, such as a notebook's, other code handles signals.
    with contextlib.suppress(ValueError):
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._record)
      if self._end is not None:
        self._start_thread(self._end)
    return self

  def __exit__(self, *_: object) -> None:
    self._left.set()
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    if self._wakeup is not None:
      previous, written = self._wakeup
      signal.set_wakeup_fd(previous)
      os.close(written)

  def _start_thread(self, end: Callable[[str], None]) -> None:
    """Starts the thread that ends the process; the interpreter notifies it of signals whatever the main thread does."""
    read, written = os.pipe()
    os.set_blocking(written, False)
    self._wakeup = signal.set_wakeup_fd(written, warn_on_full_buffer=False), written
    threading.Thread(target=self._watch, args=(read, end), name="cyb-signals", daemon=True).start()

  def _watch(self, read: int, end: Callable[[str], None]) -> None:
    while numbers := os.read(read, 16):
      for number in numbers:
        # A step may begin during the wait; then the run ends after this step.
        if number in self._previous and self.at_once and not self._left.wait(_GRACE_SECONDS) and self.at_once:
          end(_nothing_lost(number))
    os.close(read)

  def _record(self, number: int, _frame: object) -> None:
    self.received.append(number)
    signal.signal(number, self._previous[number])
    if self.at_once:
      raise Interrupted(_nothing_lost(number))
    logging.warning("signal %d: finishing the step, then saving", number)


def _nothing_lost(number: int) -> str:
  return f"signal {number}: ended before the first step was done, so that nothing is lost; the same command continues"
