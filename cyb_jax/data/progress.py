"""The progress of a preparation: documents and tokens of all workers together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from absl import logging

from cyb_jax.progress import Meter


class Progress:
  """Shows the progress of a preparation.

  Args:
    task: name of the task, with which each line begins.
    enabled: whether anything is shown.
  """

  def __init__(self, task: str, enabled: bool):
    self._task, self._enabled = task, enabled

  def log(self, line: str) -> None:
    """Logs a line."""
    if self._enabled:
      logging.info("%s: %s", self._task, line)

  @contextlib.contextmanager
  def phase(self, count: int, size: int, unit: str = "pieces") -> Iterator[None]:
    """A phase of `count` parts, `size` in all, named `unit`; a line is logged when all are done."""
    self._size, self._start = size, time.monotonic()
    self._done = self._documents = self._tokens = 0
    self._running: dict[int, tuple[int, int]] = {}
    with Meter(self._task, total=count, unit=unit, enabled=self._enabled) as meter:
      self._meter = meter
      yield
    if count:
      self.log(f"{count} {unit}, {self._numbers()}")

  def report(self, worker: int, documents: int, tokens: int) -> None:
    """Records the numbers of documents and tokens of its current part that a worker has done."""
    self._running[worker] = documents, tokens
    self._show()

  def finish_part(self, documents: int, tokens: int, size: int) -> None:
    """Records the numbers of documents and tokens, and the size, of a completed part.

    The reports of all workers are dropped, because it is unknown which worker completed the part; the other workers
    report again within seconds.
    """
    self._meter.done += 1
    self._done, self._documents, self._tokens = self._done + size, self._documents + documents, self._tokens + tokens
    self._running.clear()
    self._show()

  def _show(self) -> None:
    share = self._done / self._size if self._size else self._meter.done / self._meter.total
    self._meter.reach(self._meter.done, note=self._numbers(), share=share)

  def _numbers(self) -> str:
    documents = self._documents + sum(documents for documents, _ in self._running.values())
    tokens = self._tokens + sum(tokens for _, tokens in self._running.values())
    seconds = max(time.monotonic() - self._start, 1e-9)
    read = f"{documents:,} documents, " if documents else ""
    return f"{read}{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s"
