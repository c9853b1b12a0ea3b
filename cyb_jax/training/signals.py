"""Signals that ask a run to stop after the step that is under way."""

from __future__ import annotations

import contextlib
import signal
from typing import Any

from absl import logging


class StopSignals:
  """A context in which SIGTERM and SIGINT are recorded; a second signal of the same kind ends the process as usual.

  Attributes:
    received: the numbers of the signals that have arrived, in their order.
  """

  def __init__(self) -> None:
    self.received: list[int] = []
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> StopSignals:
    # Only the main thread may set handlers; in other threads, such as a notebook's, other code handles signals.
    with contextlib.suppress(ValueError):
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._record)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _record(self, number: int, _frame: object) -> None:
    self.received.append(number)
    signal.signal(number, self._previous[number])
    logging.warning("signal %d: finishing the step, then saving", number)
