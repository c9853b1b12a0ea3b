"""The progress of a preparation, logged every few seconds."""

from __future__ import annotations

import time

from absl import logging

_SECONDS_BETWEEN_LINES = 5.0
_UNITS_OF_TIME = (("h", 3600), ("min", 60), ("s", 1))


class Progress:
  """Logs the progress of a preparation.

  Args:
    task: name of the task, with which each line begins.
    enabled: whether anything is logged.
  """

  def __init__(self, task: str, enabled: bool):
    self._task, self._enabled = task, enabled
    self._last = time.monotonic()
    self.start(0, 0)

  def log(self, line: str) -> None:
    """Logs a line."""
    if self._enabled:
      logging.info("%s: %s", self._task, line)

  def start(self, count: int, size: int, unit: str = "pieces") -> None:
    """Begins a phase of `count` parts, which are named `unit` and have the total size `size`."""
    self._count, self._size, self._unit = count, size, unit
    self._start = time.monotonic()
    self._done = self._done_size = self._documents = self._tokens = 0
    self._running: dict[int, tuple[int, int]] = {}

  def report(self, worker: int, documents: int, tokens: int) -> None:
    """Records the numbers of documents and tokens of its current part that a worker has done."""
    self._running[worker] = documents, tokens
    self._log_progress()

  def finish_part(self, documents: int, tokens: int, size: int) -> None:
    """Records the numbers of documents and tokens, and the size, of a completed part.

    The reports of all workers are dropped, because it is unknown which worker completed the part; the other workers
    report again within seconds.
    """
    self._done, self._done_size = self._done + 1, self._done_size + size
    self._documents, self._tokens = self._documents + documents, self._tokens + tokens
    self._running.clear()
    self._log_progress(last=self._done == self._count)

  def _log_progress(self, *, last: bool = False) -> None:
    now = time.monotonic()
    if not last and now - self._last < _SECONDS_BETWEEN_LINES:
      return
    self._last = now
    documents = self._documents + sum(documents for documents, _ in self._running.values())
    tokens = self._tokens + sum(tokens for _, tokens in self._running.values())
    seconds = max(now - self._start, 1e-9)
    read = f"{documents:,} documents, " if documents else ""
    line = f"{self._done} of {self._count} {self._unit}, {read}{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s"
    share = self._done_size / self._size if self._size else self._done / max(self._count, 1)
    if share and not last:
      line += f", about {_duration(seconds * (1 - share) / share)} left"
    self.log(line)


def _duration(seconds: float) -> str:
  unit, length = next(unit for unit in _UNITS_OF_TIME if seconds >= unit[1] or unit[1] == 1)
  return f"{seconds / length:.{int(unit == 'h')}f} {unit}"
