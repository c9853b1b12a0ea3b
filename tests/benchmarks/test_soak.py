"""The soak: its faults, what it takes for a wrong answer, and one fault of each kind."""

import errno
import json
import subprocess
import sys

import cli
import numpy as np
import pytest

from cyb_jax.benchmarks import fault_answers, soak
from cyb_jax.benchmarks.soak import FAULTS

LOG = "I1130 13:00:00.000000 1 trainer.py:1] step 1/2\n"
LINE = "error: workdir: another run is training in run; wait for its end, or give another folder\n"


@pytest.mark.parametrize(
  ("code", "text", "expected", "problem"),
  [
    (-9, LOG, fault_answers.KILLED, None),
    (2, LOG + LINE, fault_answers.REFUSED, None),
    (0, LOG + "{}\n", fault_answers.COMPLETE, None),
    (75, LOG + "I1130 13:00:00.000000 1 a.py:1] saved; the same command continues\n", fault_answers.INTERRUPTED, None),
    (75, LOG, fault_answers.INTERRUPTED, "no message of the form"),
    (1, LOG + LINE, fault_answers.REFUSED, "exit code 1 instead of 2"),
    (
      2,
      LOG + "error: workdir: another run is training in run\n",
      fault_answers.REFUSED,
      "names no remedy: error: workdir",
    ),
    (2, LOG + LINE + LINE, fault_answers.REFUSED, "2 error lines instead of 1"),
    (-9, LOG + LINE, fault_answers.KILLED, "1 error lines instead of 0"),
    (1, LOG + "Traceback (most recent call last):\n", fault_answers.DISK_FAILED, "a traceback"),
    (2, LOG + LINE + "and more\n", fault_answers.REFUSED, "a message of several lines: and more"),
    (-9, LOG, fault_answers.NOT_KILLED, "has not ended in time"),
  ],
)
def test_wrong_answers_are_found(code, text, expected, problem):
  found = fault_answers.Answer(code, text, expected).problem()
  assert (found is None) if problem is None else (problem in found)


def test_every_kind_of_the_table_is_injected_in_turn():
  class NoCheckpoints:
    rng = np.random.default_rng(0)
    workdir = None

    def checkpoints(self):
      return []

  watch = soak.Watch(NoCheckpoints())
  early = [name for name, fault in FAULTS.items() if not fault.checkpoints]
  seen = [watch._next() for _ in early]
  assert sorted(seen) == sorted(early)
  NoCheckpoints.checkpoints = lambda self: [40, 80]
  assert {watch._next() for _ in range(len(FAULTS) - len(early))} == FAULTS.keys() - set(early)


def test_a_truncated_line_is_later_than_the_newest_checkpoint(tmp_path):
  path, rng = tmp_path / "metrics.jsonl", np.random.default_rng(0)
  lines = [json.dumps({"split": "train", "step": step}) + "\n" for step in (1, 2, 3)]
  for newest, whole in ((2, 2), (3, 3)):
    for _ in range(20):
      path.write_text("".join(lines))
      soak.truncate(path, newest, rng)
      kept = path.read_text()
      assert kept.startswith("".join(lines[:whole]))
      rest = kept[len("".join(lines[:whole])) :]
      assert 0 < len(rest) < len(lines[2]) - 1
      assert lines[2].startswith(rest)


def test_a_flipped_bit(tmp_path):
  path = tmp_path / "file"
  path.write_bytes(bytes(100))
  soak.flip(path, np.random.default_rng(0))
  assert sum(byte.bit_count() for byte in path.read_bytes()) == 1


def in_a_process(code):
  """The last line of a program that injects faults into itself."""
  start = "import io, os, pathlib, shutil, sys, time\nfrom cyb_jax.benchmarks import injections\n"
  done = subprocess.run(
    [sys.executable, "-c", start + code], env=cli.environment(), text=True, capture_output=True, check=True
  )
  return json.loads(done.stdout.splitlines()[-1])


FAILS = """
import json
folder, marker, number, allows = {folder!r}, {marker!r}, {number}, {allows}
injections.inject({{"disk": {{"folder": folder, "marker": marker, "error": number, "allows_removal": allows}}}})
path = pathlib.Path(folder)
log = (path / "log").open("ab", buffering=0)
(path / "old").write_text("old")
(path / "tree").mkdir()
(path / "tree" / "leaf").write_text("leaf")
pathlib.Path(marker).touch()

def error(call):
  try:
    call()
  except OSError as found:
    return found.errno

def fill():
  log.write(b"first line")
  log.write(b"second")

shutil.rmtree(path / "tree", ignore_errors=True)
found = [error(call) for call in (
  lambda: (path / "new").write_text("new"), lambda: (path / "new").mkdir(), lambda: (path / "old").unlink(), fill,
  lambda: (path.parent / "outside").write_text("text"),
)]
pathlib.Path(marker).unlink()
print(json.dumps([*found, (path / "tree").exists(), (path / "log").read_text(), error(lambda: (path / "n").mkdir())]))
"""


@pytest.mark.parametrize(("number", "allows"), [(errno.ENOSPC, True), (errno.EROFS, False)])
def test_a_disk_that_fails(tmp_path, number, allows):
  folder = tmp_path / "run"
  folder.mkdir()
  code = FAILS.format(folder=str(folder), marker=str(tmp_path / "marker"), number=number, allows=allows)
  new, folder_made, removed, line, outside, tree, log, after = in_a_process(code)
  assert new == folder_made == line == number
  assert removed == (None if allows else number)
  assert outside is after is None
  assert tree == (not allows)
  assert log == "first"


def test_a_clock_that_is_set():
  code = """
import json
injections.inject({"clock": 3})
times = []
for number in range(400):
  time.monotonic = lambda number=number: 0.25 * number
  times.append(time.time() - 0.25 * number)
print(json.dumps([b - a for a, b in zip(times, times[1:])]))
"""
  steps = in_a_process(code)
  assert min(steps) < -3600
  assert max(steps) > 3600
  assert max(map(abs, steps)) < 2 * 86401


def test_flags():
  assert "--plan: 'soap' is unknown; did you mean 'soak'?" in cli.complaint("benchmark", "faults", "--plan=soap")
  assert "--minutes: -1.0 must not be negative" in cli.complaint("benchmark", "faults", "--plan=soak", "--minutes=-1")


@pytest.mark.slow
def test_soak():
  """The short form of `cyb-benchmark faults --plan=soak`."""
  result, _ = cli.run("benchmark", "faults", "--plan=soak", "--minutes=0")
  assert result["problems"] == []
  assert result["faults"].keys() == FAULTS.keys()
  for name, tally in result["faults"].items():
    assert tally["injected"] >= 1, name
    assert tally["wrong"] == 0
  assert result["identical"] == result["runs"] >= 1
  assert result["faults"]["sigterm"]["exit_codes"]["75"] >= 1
  assert result["faults"]["two_starters"]["exit_codes"]["2"] >= 1
