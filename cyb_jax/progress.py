"""The progress of long work, on standard error: a bar on a terminal, elsewhere a log line every half minute.

Progress is shown where information is logged (absl's verbosity), so of several hosts only the first shows it, and a
program that only imports the package shows none. Log lines appear above the bars.

This module imports no other module of the package.
"""

from __future__ import annotations

import contextlib
import functools
import logging as python_logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import tqdm
from absl import logging

# Work that ends earlier is not logged.
SECONDS_BETWEEN_LINES = 30.0
# Work that ends earlier has no bar.
SECONDS_BEFORE_BAR = 1.0
_SECONDS_BETWEEN_DRAWS = 0.1

Item = TypeVar("Item")


class Meter:
  """Shows how much of some work is done; a context that removes the bar however the work ends.

  An error of the terminal removes the bar and does not reach the work.

  Args:
    description: what is done, such as 'evaluating validation'.
    total: how many units the work has.
    unit: the name of the units, in the plural.
    done: how many units were done before; the rate does not count them.
    lines: whether lines are logged where there is no terminal; False: the caller logs its own.
    enabled: False: nothing is shown.

  Attributes:
    total: may be changed while the work is being done.

  Example:
    >>> with Meter("counting", total=3, unit="numbers") as meter:
    ...   for number in range(3):
    ...     meter.advance()
    >>> meter.done
    3
  """

  def __init__(
    self, description: str, *, total: int, unit: str, done: int = 0, lines: bool = True, enabled: bool = True
  ):
    self.total, self.done = total, done
    self._description, self._unit = description, unit
    self._lines, self._enabled = lines, enabled
    self._note = ""
    self._share: float | None = None
    self._terminal = False
    self._bar: _Bar | None = None
    self._stack = contextlib.ExitStack()
    self.restart()

  def __enter__(self) -> Meter:
    # absl's own verbosity, by which its log lines are written or not.
    self._enabled = self._enabled and logging.get_absl_logger().isEnabledFor(python_logging.INFO)
    self._terminal = self._enabled and _is_terminal()
    self.restart()
    return self

  def __exit__(self, *_: object) -> None:
    self._enabled = False
    self._close()

  def restart(self, done: int | None = None) -> None:
    """The rate is measured from now on, when `done` units are done; None: as many as before."""
    self.done = self.done if done is None else done
    self._first, self._start = self.done, time.monotonic()
    self._drawn = self._logged = self._start

  def advance(self, count: int = 1, *, note: str = "") -> None:
    """So many more units are done; see `reach`."""
    self.reach(self.done + count, note=note)

  def reach(self, done: int, *, note: str = "", share: float | None = None) -> None:
    """So many units are done in all.

    Args:
      done: the number of units.
      note: numbers to show in addition.
      share: how much of the work that is, in 0..1, where units differ in size; None: done / total.
    """
    self.done, self._note, self._share = done, note, share
    if not self._enabled:
      return
    now = time.monotonic()
    if self._terminal:
      if now - self._drawn >= _SECONDS_BETWEEN_DRAWS and now - self._start >= SECONDS_BEFORE_BAR:
        self._drawn = now
        self._draw()
    elif self._lines and now - self._logged >= SECONDS_BETWEEN_LINES:
      self._logged = now
      logging.info("%s: %s", self._description, self.text())

  def text(self) -> str:
    """Such as '120 of 1,000 windows, 35.1 windows/s, 25s left'."""
    parts = [f"{self.done:,} of {self.total:,} {self._unit}"]
    if self._note:
      parts.append(self._note)
    seconds, done = time.monotonic() - self._start, self.done - self._first
    if seconds <= 0 or done < 0:
      return ", ".join(parts)
    if done and self._share is None:
      rate = done / seconds
      parts.append(f"{rate:{',.1f' if rate >= 1 else '.2g'}} {self._unit}/s")
    # Of what is left when the measurement starts.
    share = done / max(self.total - self._first, 1) if self._share is None else self._share
    if 0 < share < 1:
      parts.append(f"{format_seconds(seconds * (1 - share) / share)} left")
    return ", ".join(parts)

  def _draw(self) -> None:
    try:
      if self._bar is None:
        self._stack.enter_context(_logs_above_bars())
        self._bar = _Bar(desc=self._description)
      share = self.done / max(self.total, 1) if self._share is None else self._share
      self._bar.show(min(share, 1.0), self.text())
    except (OSError, ValueError):  # the terminal has gone
      self._terminal = False
      self._close()

  def _close(self) -> None:
    with contextlib.suppress(OSError, ValueError), self._stack:
      if self._bar is not None:
        self._bar.close()


def track(items: Iterable[Item], description: str, *, total: int, unit: str, size: int = 1) -> Iterator[Item]:
  """The items, unchanged, with the progress of the work on them.

  Args:
    items: of `size` units each, the last of which may have fewer.
    description, total, unit: see `Meter`.
    size: units of an item.
  """
  with Meter(description, total=total, unit=unit) as meter:
    for item in items:
      yield item
      meter.reach(min(meter.done + size, total))


@contextlib.contextmanager
def without_other_bars() -> Iterator[None]:
  """While this context lasts, other packages draw no bars of tqdm."""
  draw = tqdm.tqdm.__init__
  tqdm.tqdm.__init__ = functools.partialmethod(draw, disable=True)
  try:
    yield
  finally:
    tqdm.tqdm.__init__ = draw


def format_seconds(seconds: float) -> str:
  """'42s', '3m10s', '2h05m'."""
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds}s"
  if seconds < 3600:
    return f"{seconds // 60}m{seconds % 60:02}s"
  return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"


class _Bar(tqdm.tqdm):  # type: ignore[misc]  # tqdm has no types
  """A bar from 0 to 1, with a text after it."""

  monitor_interval = 0  # no thread
  _begin = tqdm.tqdm.__init__  # that of `without_other_bars` draws nothing

  def __init__(self, desc: str):
    self._text = ""
    form = "{desc}: {percentage:3.0f}%|{bar}| {text}"
    self._begin(desc=desc, total=1.0, leave=False, file=sys.stderr, dynamic_ncols=True, bar_format=form, delay=1.0)
    self.delay = 0.0  # it has kept the empty bar from being drawn; a bar with a delay may not be cleared

  @property
  def format_dict(self) -> dict[str, Any]:
    """What the form of the bar is filled with."""
    return {**super().format_dict, "text": self._text}

  def show(self, share: float, text: str) -> None:
    """Draws the bar."""
    self.n, self._text = share, text
    self.refresh()


class _AboveBars(python_logging.Handler):
  """Passes records on to a handler; meanwhile no bar is on the terminal.

  Args:
    handler: the handler.
  """

  def __init__(self, handler: python_logging.Handler):
    super().__init__(handler.level)
    self._handler = handler

  def handle(self, record: python_logging.LogRecord) -> Any:
    """See the base class."""
    with contextlib.suppress(OSError, ValueError), _Bar.external_write_mode(file=sys.stderr):  # the terminal has gone
      return self._handler.handle(record)


@contextlib.contextmanager
def _logs_above_bars() -> Iterator[None]:
  """While this context lasts, the lines of the root logger's handlers appear above the bars."""
  root = python_logging.getLogger()
  replaced = [(each, _AboveBars(each)) for each in root.handlers if not isinstance(each, _AboveBars)]
  for old, new in replaced:
    root.addHandler(new)
    root.removeHandler(old)
  try:
    yield
  finally:
    for old, new in replaced:
      root.addHandler(old)
      root.removeHandler(new)


def _is_terminal() -> bool:
  """Whether standard error is a terminal that can draw over its last line; one without a width can't."""
  try:
    plain = not sys.stderr.isatty() or os.environ.get("TERM") == "dumb"
    return not plain and os.get_terminal_size(sys.stderr.fileno()).columns > 0
  except (AttributeError, OSError, ValueError):  # there is no standard error, or it is closed
    return False
