"""Signals that stop a run: immediately before the first step is done, and otherwise after the current step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from absl import logging

from cyb_jax.errors import Interrupted

# The number of seconds that the main thread has to exit before the process is ended.
_GRACE_SECONDS = 2.0


class StopSignals:
  """A context in which SIGTERM and SIGINT are recorded; a second signal of the same kind has its usual effect.

  While `at_once` is set, a signal raises Interrupted in the main thread. However, Python runs no signal handlers while
  the main thread compiles a program, which may take minutes. A thread therefore ends the process if the caller owns it.

  Args:
    end: a function that ends the process, given the reason, one line. It is called in a thread if the main thread has
      not left the context within two seconds after a signal. None if the caller does not own the process, for example
      in a notebook.

  Attributes:
    at_once: whether the run may end immediately, because no work would be lost.
    received: the numbers of the signals that have arrived, in order.
  """

  def __init__(self, end: Callable[[str], None] | None = None) -> None:
    self.at_once = False
    self.received: list[int] = []
    self._end = end
    self._previous: dict[int, Any] = {}
    self._left = threading.Event()
    self._wakeup: tuple[int, int] | None = None

  def __enter__(self) -> StopSignals:
    # Only the main thread may set handlers; in other threads, for example of a notebook, other code handles signals.
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
    """Starts the thread that ends the process; the interpreter notifies it of signals even if no handler can run."""
    read, written = os.pipe()
    os.set_blocking(written, False)
    self._wakeup = signal.set_wakeup_fd(written, warn_on_full_buffer=False), written
    threading.Thread(target=self._watch, args=(read, end), name="cyb-signals", daemon=True).start()

  def _watch(self, read: int, end: Callable[[str], None]) -> None:
    while numbers := os.read(read, 16):
      for number in numbers:
        # If a step begins during the wait, the run ends after this step.
        if number in self._previous and self.at_once and not self._left.wait(_GRACE_SECONDS) and self.at_once:
          end(_early_end_message(number))
    os.close(read)

  def _record(self, number: int, _frame: object) -> None:
    self.received.append(number)
    signal.signal(number, self._previous[number])
    if self.at_once:
      raise Interrupted(_early_end_message(number))
    logging.warning("signal %d: finishing the step, then saving", number)


def _early_end_message(number: int) -> str:
  return f"signal {number}: ended before the first step was done, so nothing is lost; the same command continues"
