"""Kills a training again and again, and compares what comes out with an undisturbed one, bit for bit.

Every life is the training program in a process of its own, which dies of SIGKILL. It is forked from a server that has
imported everything but started no backend, so that a life costs a second instead of the ten that imports take.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from cyb_jax.errors import InputError
from cyb_jax.programs import EXIT_BAD_INPUT, Failed

# What a life is doing when it dies, and how often it is to be killed there.
PHASES = {"start_up": 0.2, "step": 0.25, "save": 0.35, "evaluation": 0.2}

# Lives get forward some thirty steps each; the rest is for the last one, which is left alone.
_STEPS_PER_KILL = 70
_MOST_STEPS_BEFORE_A_KILL = 80
_SCHEDULE = {
  "log_every": 1,
  "eval_every": 30,
  "eval_limit": 64,
  "checkpoint_every": 40,
  "keep": 2,
  "tensorboard": False,
}
_TINY = {
  "method": {"pauses": 2, "pause_input": "token+pause"},
  "data": {
    "task": "synthetic_lookups",
    "tokenizer": "bytes",
    "options": "documents=256",
    "sequence_length": 16,
    "batch_size": 8,
  },
  "decoder": {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "head_size": 8, "mlp_size": 32},
}
_LONGEST_LIFE = 1200.0


def define_flags() -> None:
  flags.DEFINE_integer("kills", 100, "How often the run is killed.")
  flags.DEFINE_integer("kills_seed", 0, "Where the moments are drawn from.")
  config_flags.DEFINE_config_file("config", None, "What is trained, if not a tiny model on generated text.")


def faults() -> dict[str, Any]:
  """Trains undisturbed; trains again with `--kills` SIGKILLs at random moments; compares the two folders.

  Compared are config.json, the tokenizer, metrics.jsonl but for `timing` (a line for every step, so that another batch
  would show), evaluation.json, and all arrays and the meta object of every checkpoint that was kept.

  Raises:
    Failed: they differ, or the run ended before all kills; the result names the first difference.
    InputError: bad flags, or a config that the program refuses.
  """
  kills = flags.FLAGS.kills
  if kills < 1:
    raise InputError(f"--kills: {kills} must be at least 1")
  rng = np.random.default_rng(flags.FLAGS.kills_seed)
  start = time.perf_counter()
  with tempfile.TemporaryDirectory(prefix="cyb-faults-") as scratch:
    folder = pathlib.Path(scratch)
    config = _write_config(folder, steps=_STEPS_PER_KILL * kills)
    with _server(folder) as server:
      logging.info("training undisturbed")
      whole, broken = folder / "undisturbed", folder / "killed"
      durations = _Durations()
      with server.life(config, whole) as life:
        life.end(durations)
      undisturbed_seconds = time.perf_counter() - start
      logging.info("undisturbed: %d steps in %.0f s", _STEPS_PER_KILL * kills, undisturbed_seconds)
      phases = dict.fromkeys(PHASES, 0)
      for number in range(kills):
        # The first life dies before there is anything to continue.
        wanted = str(rng.choice(list(PHASES), p=list(PHASES.values()))) if number else "start_up"
        with server.life(config, broken) as life:
          died_in = life.kill(wanted, rng, durations)
        if died_in is None:
          break
        phases[died_in] += 1
        logging.info("kill %d of %d: in mid-%s", number + 1, kills, died_in.replace("_", "-"))
      restarts = sum(phases.values())
      with server.life(config, broken) as life:
        life.end()
    difference = first_difference(whole, broken)
    result = {
      "benchmark": "faults",
      "kills": restarts,
      "phases": phases,
      "restarts": restarts,
      "steps": _STEPS_PER_KILL * kills,
      "identical": difference is None,
      "difference": difference,
      "timing": {
        "seconds": time.perf_counter() - start,
        "undisturbed_seconds": undisturbed_seconds,
        "start_up_seconds": durations.median("start_up"),
        "save_seconds": durations.median("save"),
        "evaluation_seconds": durations.median("evaluation"),
      },
    }
  if difference is not None:
    raise Failed(f"faults: after {restarts} kills the run differs: {difference}", result)
  if restarts < kills:
    raise Failed(f"faults: the run ended after {restarts} kills of {kills}", result)
  return result


def first_difference(whole: pathlib.Path, other: pathlib.Path) -> str | None:
  """Where two runs' folders differ first, but for what depends on the clock; None where they don't."""
  from cyb_jax import runs
  from cyb_jax.training.metrics import read_metrics

  files = ["config.json", "evaluation.json"]
  files += sorted(str(path.relative_to(whole)) for path in (whole / "tokenizer").iterdir())
  for name in files:
    if not (other / name).exists() or (whole / name).read_bytes() != (other / name).read_bytes():
      return name
  ours, theirs = ([{k: v for k, v in row.items() if k != "timing"} for row in read_metrics(x)] for x in (whole, other))
  for number, (a, b) in enumerate(zip(ours, theirs), start=1):
    if a != b:
      return f"metrics.jsonl, line {number}, {next(k for k in a | b if a.get(k) != b.get(k))}"
  if len(ours) != len(theirs):
    return f"metrics.jsonl: {len(theirs)} lines, not {len(ours)}"
  ours, theirs = (runs.checkpoints_in(x, read_only=True) for x in (whole, other))
  if ours.steps() != theirs.steps():
    return f"checkpoints: {theirs.steps()}, not {ours.steps()}"
  for step in ours.steps():
    for checkpoints in (ours, theirs):
      checkpoints.find(step)  # it isn't damaged
    a, b = ours.read(step), theirs.read(step)
    if a.meta != b.meta:
      return f"checkpoint {step}: meta"
    a, b = dict(_leaves(a.state)), dict(_leaves(b.state))
    for name in sorted(a.keys() | b.keys()):
      if name not in a or name not in b or a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes():
        return f"checkpoint {step}: {name}"
  return None


def _leaves(tree: Any) -> Iterator[tuple[str, np.ndarray]]:
  import jax

  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf)


def _write_config(folder: pathlib.Path, steps: int) -> pathlib.Path:
  """A config file for the program: what `--config` gives, or the tiny one, on this benchmark's schedule."""
  from cyb_jax import config as configs

  source = flags.FLAGS.config
  if source is None:
    source = configs.default()
    source.update(_TINY)
  source.train.update(_SCHEDULE | {"steps": steps})
  if not source.data.store:
    source.data.store = str(folder / "store")
  (folder / "config.json").write_text(json.dumps(source.to_dict()))
  path = folder / "config.py"
  path.write_text(
    "import json, pathlib\n"
    "from ml_collections import ConfigDict\n"
    "def get_config():\n"
    "  return ConfigDict(json.loads(pathlib.Path(__file__).with_name('config.json').read_text()))\n"
  )
  return path


class _Durations:
  """How long the phases last, in seconds: kills are spread over that."""

  def __init__(self) -> None:
    self._seen: dict[str, list[float]] = {"start_up": [], "save": [], "evaluation": []}

  def add(self, phase: str, seconds: float) -> None:
    self._seen[phase].append(seconds)

  def median(self, phase: str) -> float | None:
    return float(np.median(self._seen[phase])) if self._seen[phase] else None


@contextlib.contextmanager
def _server(folder: pathlib.Path) -> Iterator[_Server]:
  # Compiled programs are kept between lives, and apart from the user's: a kill may tear what is being written there.
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  command = [sys.executable, "-c", "from cyb_jax.benchmarks import faults; faults.serve()"]
  environment = os.environ | cache | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
    try:
      yield _Server(process, folder)
    finally:
      process.stdin.close()  # which ends it


def serve() -> None:
  """The server: starts, watches and kills training programs as its standard input says, a JSON object a line."""
  import jax  # noqa: F401

  from cyb_jax import train, training  # noqa: F401

  for line in sys.stdin:
    request = json.loads(line)
    if "flags" in request:
      pid = answer = os.fork()
      if not pid:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
          os.dup2(source, target)
        sys.argv = ["cyb-train", *request["flags"]]
        train.run()  # exits
    elif request["kill"]:
      # Nobody has waited for it yet, so that the number can't be another process's.
      os.kill(pid, signal.SIGKILL)
      answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    else:
      answer = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


class _Server:
  """The server as seen from here; one life at a time."""

  def __init__(self, process: subprocess.Popen[str], folder: pathlib.Path):
    self._process, self._folder, self._count = process, folder, 0

  @contextlib.contextmanager
  def life(self, config: pathlib.Path, workdir: pathlib.Path) -> Iterator[_Life]:
    """A training of the config in the folder, begun or continued; it doesn't outlive the `with` block."""
    log = self._folder / f"{self._count}.log"
    self._count += 1
    self.ask({"flags": [f"--config={config}", f"--workdir={workdir}"], "log": str(log)})
    life = _Life(self, workdir, log)
    try:
      yield life
    finally:
      life.kill_now()

  def ask(self, request: dict[str, Any]) -> Any:
    self._process.stdin.write(json.dumps(request) + "\n")
    self._process.stdin.flush()
    answer = self._process.stdout.readline()
    if not answer:
      raise RuntimeError("the server that starts trainings has died")
    return json.loads(answer)


class _Life:
  """One process of the training program, watched from outside through its files."""

  def __init__(self, server: _Server, workdir: pathlib.Path, log: pathlib.Path):
    self._server, self._log = server, log
    self._unfinished = workdir / "checkpoints" / "unfinished"
    self._born = time.perf_counter()
    self._code: int | None = None
    self._lines = None
    self._steps = 0
    self._evaluating = False

  def end(self, durations: _Durations | None = None) -> None:
    """Lets it live; raises RuntimeError if it fails."""
    since: dict[str, float] = {}
    while self._alive():
      now = time.perf_counter()
      active = {"save": self._saving(), "evaluation": self._evaluating}
      for phase, is_active in active.items():
        if is_active:
          since.setdefault(phase, now)
        elif phase in since:
          begun = since.pop(phase)
          if durations is not None:
            durations.add(phase, now - begun)
      time.sleep(0.001)
    self._check()

  def kill(self, wanted: str, rng: np.random.Generator, durations: _Durations) -> str | None:
    """Kills it at a random moment of a phase.

    Returns:
      The phase that it died in, which may be the next one already; None if the run was finished before.
    """
    steps = int(rng.integers(1, _MOST_STEPS_BEFORE_A_KILL + 1))
    # A bit longer than the phase lasts, so that its end is met too.
    delay = rng.random() * (0.3 if wanted == "step" else 1.1 * (durations.median(wanted) or 1.0))
    conditions = {
      "start_up": lambda: True,
      "step": lambda: self._steps >= steps,
      "save": lambda: self._steps >= steps and self._saving(),
      "evaluation": lambda: self._steps >= steps and self._evaluating,
    }
    started = False
    while self._alive():
      if self._steps and not started:
        started = True
        durations.add("start_up", time.perf_counter() - self._born)
      if conditions[wanted]():
        time.sleep(delay)
        break
      time.sleep(0.001)
    self.kill_now()
    if self._code != -signal.SIGKILL:
      self._check()
      return None
    self._read()
    if not self._steps:
      return "start_up"
    if self._evaluating:  # behind which the save before may still be running
      return "evaluation"
    return "save" if self._saving() else "step"

  def kill_now(self) -> None:
    """Kills it, if it isn't dead."""
    if self._code is None:
      self._code = self._server.ask({"kill": True})

  def _alive(self) -> bool:
    if time.perf_counter() - self._born > _LONGEST_LIFE:
      raise RuntimeError(f"a training has run for {_LONGEST_LIFE:.0f} s\n{self._tail()}")
    self._read()
    return not self._server.ask({"kill": False})

  def _check(self) -> None:
    self.kill_now()
    if self._code == EXIT_BAD_INPUT:
      raise InputError(self._tail().rpartition("error: ")[2].strip())
    if self._code != 0:
      raise RuntimeError(f"a training has ended by itself with exit code {self._code}\n{self._tail()}")

  def _read(self) -> None:
    """Reads on in its log."""
    if self._lines is None and self._log.exists():
      self._lines = self._log.open()
    for line in self._lines or ():
      self._steps += re.search(r"\] step \d+/", line) is not None
      self._evaluating = "] evaluating " in line or (self._evaluating and "validation perplexity" not in line)

  def _saving(self) -> bool:
    try:
      return any(self._unfinished.iterdir())
    except FileNotFoundError:
      return False

  def _tail(self) -> str:
    return self._log.read_text()[-3000:] if self._log.exists() else ""
