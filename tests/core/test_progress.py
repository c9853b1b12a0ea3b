"""The progress of long work: a bar on a terminal, lines elsewhere, nothing on standard output."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import termios
import textwrap

import pytest
import tqdm
from absl import logging

from cyb_jax import progress


@pytest.fixture
def clock(monkeypatch):
  """Seconds that only the test advances."""
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


@pytest.fixture
def lines(monkeypatch):
  """The lines that are logged, as by a program."""
  found = []
  monkeypatch.setattr(progress.logging, "info", lambda text, *values: found.append(text % values))
  before = logging.get_verbosity()
  logging.set_verbosity(logging.INFO)
  yield found
  logging.set_verbosity(before)


def test_numbers_of_the_text(clock):
  meter = progress.Meter("counting", total=2000, unit="windows", done=1000)
  assert meter.text() == "1,000 of 2,000 windows"
  clock[0] += 10
  meter.advance(250)
  assert meter.text() == "1,250 of 2,000 windows, 25.0 windows/s, 30s left"
  clock[0] += 990
  meter.advance(250, note="loss 2.5")
  assert meter.text() == "1,500 of 2,000 windows, loss 2.5, 0.5 windows/s, 16m40s left"
  meter.reach(2000)
  assert meter.text() == "2,000 of 2,000 windows, 1.0 windows/s"
  # Units of different sizes have no rate; the share decides.
  meter = progress.Meter("counting", total=4, unit="pieces")
  clock[0] += 60
  meter.reach(1, share=0.75)
  assert meter.text() == "1 of 4 pieces, 20s left"
  # What came before, compilation for example, is not measured.
  meter = progress.Meter("counting", total=20, unit="steps")
  clock[0] += 500
  meter.restart(2)
  clock[0] += 4
  meter.advance(2)
  assert meter.text() == "4 of 20 steps, 0.5 steps/s, 32s left"
  assert [progress.format_seconds(x) for x in (41.6, 190, 7500)] == ["42s", "3m10s", "2h05m"]


def test_a_line_every_half_minute_where_there_is_no_terminal(clock, lines, capsys):
  with progress.Meter("evaluating", total=100, unit="windows") as meter:
    for _ in range(10):
      clock[0] += 7
      meter.advance(10)
  assert lines == [
    "evaluating: 50 of 100 windows, 1.4 windows/s, 35s left",
    "evaluating: 100 of 100 windows, 1.4 windows/s",
  ]
  assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("silent", ["short", "disabled", "own_lines", "other_host"])
def test_no_line(clock, lines, silent):
  if silent == "other_host":
    logging.set_verbosity(logging.WARNING)
  options = {"lines": silent != "own_lines", "enabled": silent != "disabled"}
  with progress.Meter("evaluating", total=4, unit="windows", **options) as meter:
    for _ in range(4):
      clock[0] += 7 if silent == "short" else 40
      meter.advance()
  assert lines == []


def test_items_pass_unchanged(clock, lines):
  found = []
  for item in progress.track("abc", "reading", total=5, unit="letters", size=2):
    found.append(item)
    clock[0] += 31
  assert found == ["a", "b", "c"]
  assert [line.partition(",")[0] for line in lines] == [
    f"reading: {done} of 5 letters" for done in (2, 4, 5)
  ]  # the last item is smaller


def open_terminal(columns=100):
  """(what a user sees, a program's standard error), as file descriptors."""
  master, slave = pty.openpty()
  termios.tcsetwinsize(slave, (24, columns))
  return master, slave


def on_terminal(code, columns=100, **environment):
  """(what a terminal receives as standard error, standard output) of a program."""
  master, slave = open_terminal(columns)
  begin = "import time\nfrom absl import logging\nfrom cyb_jax import progress\n"
  program = begin + textwrap.dedent(code)
  with subprocess.Popen(
    [sys.executable, "-c", program],
    stderr=slave,
    stdout=subprocess.PIPE,
    env={**os.environ, "TERM": "xterm", **environment},
  ) as child:
    os.close(slave)
    received = b""
    with contextlib.suppress(OSError), os.fdopen(master, "rb", buffering=0) as terminal:  # the child has closed it
      while more := terminal.read(4096):
        received += more
    out = child.stdout.read()
    assert child.wait() == 0, received.decode()
  return received.decode(), out


def screen(received):
  """The lines that stay on a terminal: '\\r' goes back to the beginning of the line, '\\x1b[A' a line up."""
  rows, row, column = [""], 0, 0
  for part in re.findall(r"\x1b\[A|\r|\n|[^\r\n\x1b]+", received):
    if part == "\n":
      row += 1
      rows += [""] * (row == len(rows))
    elif part == "\r":
      column = 0
    elif part == "\x1b[A":
      row -= 1
    else:
      rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
      column += len(part)
  return [line.rstrip() for line in rows if line.strip()]


WORK = """
  logging.set_verbosity(logging.INFO)
  logging.use_absl_handler()
  progress.SECONDS_BEFORE_BAR = {delay}
  try:
    with progress.Meter("training", total=8, unit="steps", lines=False) as meter:
      for step in range(8):
        time.sleep(0.11)
        meter.advance(note="loss 1.5")
        if step % 4 == 3:
          logging.info("line of step %d", step)
          for _ in progress.track(range(2), "evaluating", total=2, unit="windows"):
            time.sleep(0.11)
      {end}
  except KeyError:
    pass
  logging.info("after the work")
"""


@pytest.mark.parametrize("end", ["pass", "raise KeyError"])
def test_a_bar_on_a_terminal_stays_below_the_log_lines_and_leaves_nothing(end):
  received, out = on_terminal(WORK.format(delay=0, end=end))
  assert out == b""
  assert re.search(r"training: +50%\|.*\| 4 of 8 steps, loss 1\.5, [\d.]+ steps/s, \ds left", received)
  assert re.search(r"evaluating: 100%\|.*\| 2 of 2 windows", received)
  # Every log line is whole and alone on its line; the bars have been removed.
  assert [line.rpartition("] ")[2] for line in screen(received)[1:]] == [
    "line of step 3", "line of step 7", "after the work",
  ]  # fmt: skip
  assert screen(received)[0].startswith("WARNING: Logging before flag parsing")


@pytest.mark.parametrize("plain", [{"delay": 60}, {"TERM": "dumb"}, {"columns": 0}])
def test_short_work_and_plain_terminals_have_no_bar(plain):
  received, _ = on_terminal(WORK.format(delay=plain.pop("delay", 0), end="pass"), **plain)
  assert "training" not in received
  assert "after the work" in received


# tqdm itself takes errno 5, which a terminal gives that has been closed, for the end of the bar.
@pytest.mark.parametrize(("errno", "logged"), [(5, 0), (9, 2)])
def test_a_terminal_that_goes_away_does_not_end_the_work(lines, monkeypatch, errno, logged):
  master, slave = open_terminal()

  class Terminal(io.StringIO):
    writes = 0

    def isatty(self):
      return True

    def fileno(self):
      return slave

    def write(self, text):
      self.writes += 1
      raise OSError(errno, "gone")

  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setattr(progress, "SECONDS_BEFORE_BAR", 0)
  monkeypatch.setattr(progress, "_SECONDS_BETWEEN_DRAWS", 0)
  monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
  handlers = list(logging.get_absl_logger().root.handlers)
  with progress.Meter("evaluating", total=3, unit="windows") as meter:
    for _ in range(3):
      meter.advance()
      logging.get_absl_logger().warning("of the work itself")
  os.close(master)
  os.close(slave)
  assert terminal.writes > 0
  assert len(lines) == logged  # lines take the bar's place
  assert sorted(map(id, logging.get_absl_logger().root.handlers)) == sorted(map(id, handlers))


def test_bars_of_other_packages_can_be_left_out():
  file = io.StringIO()
  with progress.without_other_bars():
    assert list(tqdm.tqdm(range(3), file=file)) == [0, 1, 2]
  assert file.getvalue() == ""
  list(tqdm.tqdm(range(3), file=file))
  assert "3/3" in file.getvalue()
