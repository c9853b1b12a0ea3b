"""Runs programs like a user, in separate processes with one device; most processes are forked from one that has already
imported the modules.
"""

import atexit
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

from absl import flags

ROOT = pathlib.Path(__file__).parents[2]

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
  flags = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"  # one device
  path = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
  return env | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "XLA_FLAGS": flags}


def write_config(folder):
  path = pathlib.Path(folder) / "tiny.py"
  path.write_text(CONFIG.format(tests=str(ROOT / "tests" / "support")))
  return path


def command(program, *flags):
  return [sys.executable, "-m", f"cyb_jax.cli.{program}", *map(str, flags)]


def start(program, *flags, cwd=ROOT):
  pipe = subprocess.PIPE
  return subprocess.Popen(command(program, *flags), stdout=pipe, stderr=pipe, text=True, env=environment(), cwd=cwd)


# Most of a program's time is its imports: this process has made them, and forks for each command line.
_SERVER = """
import importlib, json, os, sys, time, traceback, warnings
import jax, orbax.checkpoint
from cyb_jax import evaluation, runs
from cyb_jax.studies import resolution
from cyb_jax.training import estimate, trainer
warnings.filterwarnings("ignore")

def start(request):
  child = os.fork()
  if child:
    return child
  for number, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
  os.chdir(request["cwd"])
  os.environ.update(request["env"])
  sys.argv = [request["program"], *request["flags"]]
  code = 1
  try:
    importlib.import_module("cyb_jax.cli." + request["program"]).run()
  except SystemExit as error:
    code = error.code or 0
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

def wait(request):
  until = time.monotonic() + request["seconds"]
  while time.monotonic() < until:
    pid, status = os.waitpid(request["pid"], os.WNOHANG)
    if pid:
      return os.waitstatus_to_exitcode(status)
    time.sleep(0.01)
  return None

for line in sys.stdin:
  request = json.loads(line)
  print(json.dumps(wait(request) if "pid" in request else start(request)), flush=True)
"""


@functools.cache
def _server():
  pipe = subprocess.PIPE
  server = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=pipe, stdout=pipe, text=True, env=environment())
  atexit.register(server.kill)
  return server


def _request(**request):
  server = _server()
  server.stdin.write(json.dumps(request) + "\n")
  server.stdin.flush()
  return json.loads(server.stdout.readline())


class Forked:
  """Runs a program in a forked process that has already imported the modules."""

  def __init__(self, program, *flags, cwd=ROOT, env=None):
    self._folder = tempfile.TemporaryDirectory()
    self._files = [os.path.join(self._folder.name, name) for name in ("out", "err")]
    out, err = self._files
    flags = [str(flag) for flag in flags]
    self.pid = _request(program=program, flags=flags, cwd=str(cwd), env=env or {}, out=out, err=err)

  def kill(self, number=signal.SIGKILL):
    os.kill(self.pid, number)

  def wait(self, seconds=600):
    """(exit code, standard output, standard error)."""
    code = _request(pid=self.pid, seconds=seconds)
    if code is None:
      self.kill()
      _request(pid=self.pid, seconds=60)
      raise AssertionError(f"still running after {seconds} s:\n{self.texts()[1][-4000:]}")
    return code, *self.texts()

  def texts(self):
    return [pathlib.Path(path).read_text(errors="replace") for path in self._files]


def forked(program, *flags, cwd=ROOT, env=None):
  """(exit code, standard output, standard error) of a program, in a process that has already imported the modules."""
  return Forked(program, *flags, cwd=cwd, env=env).wait()


def run(program, *flags, expect=0, cwd=ROOT, env=None):
  """(the JSON object of the last line, standard error) of a program that must exit with the code `expect`."""
  code, out, err = forked(program, *flags, cwd=cwd, env=env)
  assert code == expect, f"exit code {code}\n{err[-4000:]}"
  lines = out.strip().splitlines()
  return (json.loads(lines[-1]) if lines else None), err


def complaint(program, *flags, expect=2, cwd=ROOT, env=None):
  """The only error line of a program that ends with bad input, or with another exit code `expect`."""
  result, err = run(program, *flags, expect=expect, cwd=cwd, env=env)
  assert result is None
  assert "Traceback" not in err
  (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
  return line.removeprefix("error: ")


def flags_of(define):
  """The flags that a function defines; they are removed afterwards."""
  before = set(flags.FLAGS)
  define()
  new = {name: flags.FLAGS[name] for name in set(flags.FLAGS) - before}
  for name in new:
    delattr(flags.FLAGS, name)
  return {name: flag for name, flag in new.items() if not name.startswith("config.")}
