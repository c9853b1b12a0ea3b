"""SIGTERM and SIGINT at every program: exit code 75, one line that says what the same command does, no partial files.

The program waits for an input that is a named pipe when the signal arrives.
"""

import os
import pathlib
import signal
import time

import cli
import pytest

CONTINUES = "the same command continues"
AGAIN = "the same command starts again"


def opened_pipe(path, program):
  """The writing end of a named pipe, when the program has opened it for reading."""
  until = time.monotonic() + 120
  while True:
    try:
      return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
      assert time.monotonic() < until, program.texts()
      time.sleep(0.01)


def end_waiting(path, number, program, *flags, cwd):
  """The last line of a program that received a signal while it was reading a named pipe."""
  program = cli.Forked(program, *flags, cwd=cwd)
  writing = opened_pipe(path, program)
  try:
    time.sleep(0.1)  # the program leaves the call that has opened the pipe
    program.kill(number)
    code, out, err = program.wait(60)
  finally:
    os.close(writing)
  assert (code, out) == (75, ""), err
  assert "Traceback" not in err
  assert err.count(f"signal {number}: ") == 1
  return err.splitlines()[-1]


def files(folder):
  return sorted(str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*"))


@pytest.mark.parametrize(
  ("program", "flags", "number", "says"),
  [
    ("train", ["--config=pipe", "--workdir=new"], signal.SIGTERM, CONTINUES),
    ("train", ["--config=pipe", "--workdir=new"], signal.SIGINT, CONTINUES),
    ("train", ["--config=config.py", "--workdir=new", "--config.init_from=run"], signal.SIGINT, CONTINUES),
    ("compile", ["--config=pipe", "--topology=v5e:4x4"], signal.SIGTERM, AGAIN),
    ("benchmark", ["train", "--config=pipe"], signal.SIGINT, AGAIN),
    ("evaluate", ["--workdir=run"], signal.SIGTERM, AGAIN),
    ("report", ["--workdir=run", "--output=new"], signal.SIGINT, AGAIN),
    ("generate", ["--workdir=run", "--prompt=a"], signal.SIGINT, AGAIN),
    ("convert", ["--to=hf", "--workdir=run", "--output=new"], signal.SIGTERM, AGAIN),
    ("serve", ["--workdir=run", "--port=0"], signal.SIGINT, "the same command starts it again"),
    (
      "prepare",
      ["--task=text_files", "--option=pattern=pipe", "--tokenizer=bytes", "--output=new"],
      signal.SIGTERM,
      CONTINUES,
    ),
  ],
)
def test_a_signal_ends_a_program_with_one_line(program, flags, number, says, tmp_path):
  if program == "serve":
    pytest.importorskip("uvicorn", reason="the extra serve isn't installed")
  cli.write_config(tmp_path).rename(tmp_path / "config.py")
  (tmp_path / "run").mkdir()
  os.mkfifo(tmp_path / "run" / "config.json")
  os.mkfifo(tmp_path / "pipe")
  before = files(tmp_path)
  pipe = tmp_path / ("pipe" if any("pipe" in flag for flag in flags) else "run/config.json")
  assert says in end_waiting(pipe, number, program, *flags, cwd=tmp_path)
  assert [name for name in files(tmp_path) if not name.endswith(".lock")] == before


WAITS_IN_RUNS = """
import os, pathlib, sys

if "--workdir" in " ".join(sys.argv) and "cyb_jax.cli.train" in sys.orig_argv:
  pathlib.Path("pid").write_text(str(os.getpid()))
  open("pipe").read()
"""


@pytest.mark.slow
def test_a_signal_for_a_study_ends_its_runs(tmp_path):
  config = cli.write_config(tmp_path)
  config.write_text(config.read_text() + WAITS_IN_RUNS)
  os.mkfifo(tmp_path / "pipe")
  flags = f"--config={config}", "--workdir=study", "--settings=ap", "--rates=1e-3", "--seeds=1"
  line = end_waiting(tmp_path / "pipe", signal.SIGTERM, "study", *flags, cwd=tmp_path)
  assert "the finished runs are kept, and the same command continues" in line
  with pytest.raises(ProcessLookupError):
    os.kill(int((tmp_path / "pid").read_text()), 0)
