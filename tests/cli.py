"""Programs as a user starts them: in a process of their own, on one device."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent

CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import models

def get_config(argument=""):
  config = models.tiny_config(pauses=2)
  config.train.update(steps=40, log_every=2, eval_every=10, eval_limit=4, checkpoint_every=6)
  return config
"""


def environment():
  env = {k: v for k, v in os.environ.items() if k != "NPROC"}
  flags = "--xla_backend_optimization_level=0"  # without conftest's eight devices
  return env | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


def write_config(folder):
  path = pathlib.Path(folder) / "tiny.py"
  path.write_text(CONFIG.format(tests=str(ROOT / "tests")))
  return path


def command(program, *flags):
  return [sys.executable, "-m", f"cyb_jax.{program}", *map(str, flags)]


def start(program, *flags, cwd=ROOT):
  pipe = subprocess.PIPE
  return subprocess.Popen(command(program, *flags), stdout=pipe, stderr=pipe, text=True, env=environment(), cwd=cwd)


def run(program, *flags, expect=0, cwd=ROOT):
  """(the JSON object of the last line, standard error) of a program that ends with `expect`."""
  process = start(program, *flags, cwd=cwd)
  out, err = process.communicate(timeout=300)
  assert process.returncode == expect, f"exit code {process.returncode}\n{err[-4000:]}"
  lines = out.strip().splitlines()
  return (json.loads(lines[-1]) if lines else None), err


def complaint(program, *flags, cwd=ROOT):
  """The one line that a program ends with on bad input."""
  result, err = run(program, *flags, expect=2, cwd=cwd)
  assert result is None
  assert "Traceback" not in err
  (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
  return line.removeprefix("error: ")
