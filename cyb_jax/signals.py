"""Signals that end a program: at once while no work would be lost, and otherwise when the caller's work is saved."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

from cyb_jax.errors import EXIT_INTERRUPTED, Interrupted

# The signals that end a program.
STOPPING = (signal.SIGTERM, signal.SIGINT)

# The number of seconds that the main thread has to run the handler of a signal before the process is ended.
_GRACE_SECONDS = 2.0
# The number of seconds after which a signal is sent again whose exception was lost.
_AGAIN_SECONDS = 0.01


class StopSignals:
  """A context in which SIGTERM and SIGINT are recorded; a second signal of the same kind has its usual effect.

  While `at_once` is set, the first signal raises Interrupted in the main thread. However, Python runs no handlers of
  signals while the main thread compiles a program, which may take minutes. A thread therefore ends the process if the
  caller owns it. Contexts may be nested: the innermost one receives the signals.

  Args:
    ending: what a signal at once means for the program, a part of the message of Interrupted.
    finishing: what the program does after a signal that only is recorded, for the log.
    end: a function that ends the process, given the reason, one line. It is called in a thread if the main thread has
      not run the handler within two seconds after a signal. None if the caller does not own the process, for example
      in a notebook.

  Attributes:
    at_once: whether the program may end immediately, because no work would be lost.
    received: the numbers of the signals that have arrived, in order.
  """

  def __init__(self, ending: str, finishing: str, end: Callable[[str], None] | None = None) -> None:
    self.at_once = False
    self.received: list[int] = []
    self._ending, self._finishing, self._end = ending, finishing, end
    self._previous: dict[int, Any] = {}
    self._left = threading.Event()
    self._handled = threading.Event()
    self._wakeup: tuple[int, int | None] | None = None
    self._report_unraisable = sys.unraisablehook

  def __enter__(self) -> StopSignals:
    # Only the main thread may set handlers; in other threads, for example of a notebook, other code handles signals.
    with contextlib.suppress(ValueError):
      for number in STOPPING:
        self._previous[number] = signal.signal(number, self._record)
      self._report_unraisable, sys.unraisablehook = sys.unraisablehook, self._send_again
      self._start_thread()
    return self

  def __exit__(self, *_: object) -> None:
    self._left.set()
    if self._previous:
      sys.unraisablehook = self._report_unraisable
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    if self._wakeup is not None:
      previous, written = self._wakeup
      signal.set_wakeup_fd(previous)
      if written is not None:
        os.close(written)

  def _start_thread(self) -> None:
    """Starts the thread that ends the process; the interpreter notifies it of signals even if no handler can run.

    Without a function that ends the process, it only makes sure that no outer context is notified.
    """
    if self._end is None:
      self._wakeup = signal.set_wakeup_fd(-1), None
      return
    read, written = os.pipe()
    os.set_blocking(written, False)
    self._wakeup = signal.set_wakeup_fd(written, warn_on_full_buffer=False), written
    threading.Thread(target=self._watch, args=(read, self._end), name="cyb-signals", daemon=True).start()

  def _watch(self, read: int, end: Callable[[str], None]) -> None:
    while numbers := os.read(read, 16):
      for number in numbers:
        # If work begins during the wait, the program ends after this work.
        if number in self._previous and self.at_once and not self._handled.wait(_GRACE_SECONDS) and self.at_once:
          end(self._message(number))
    os.close(read)

  def _record(self, number: int, _frame: object) -> None:
    is_first = not self.received
    self.received.append(number)
    self._handled.set()
    signal.signal(number, self._previous[number])
    if not self.at_once:
      logging.warning("signal %d: %s", number, self._finishing)
    elif is_first:  # a second signal must not interrupt the cleaning up
      raise Interrupted(self._message(number))

  def _send_again(self, lost: Any) -> None:
    """Sends a signal again whose exception was raised where nothing can catch it, as in a callback of the garbage
    collector or while an object is deleted. Python would write a traceback and go on.
    """
    if not isinstance(lost.exc_value, Interrupted):
      self._report_unraisable(lost)
      return
    number = self.received.pop()
    signal.signal(number, self._record)
    # Not at once, because the handler would run in this function.
    threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number)).start()

  def _message(self, number: int) -> str:
    return f"signal {number}: {self._ending}"


def end_process(message: str, announce: Callable[[str, int], None] | None = None) -> None:
  """Logs a message and ends the process at once, with the exit code of an interrupted program.

  A normal exit is impossible: the main thread may be in the compiler, other threads may still work, other hosts may
  wait for this host, and the interpreter crashes at exit if lowering was interrupted.

  Args:
    message: the reason, one line.
    announce: a function that tells other hosts the reason and the exit code.
  """
  logging.warning("%s", message)  # hosts other than 0 log only warnings
  logging.flush()
  sys.stdout.flush()
  if announce is not None:
    announce(message, EXIT_INTERRUPTED)
  os._exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def restored() -> Iterator[None]:
  """Restores the handlers of signals at the end of the block, which sets others, as asyncio's loops do."""
  handlers = {number: signal.getsignal(number) for number in STOPPING}
  try:
    yield
  finally:
    with contextlib.suppress(ValueError):  # not the main thread, so the block has set none
      for number, handler in handlers.items():
        signal.signal(number, handler)
