"""Trainings in separate processes that are watched and disturbed from outside, for benchmarks of faults and hosts.

They are forked from a server that has imported all modules but started no backend, so that a life starts in one second
instead of ten. A life is a training by one process, or by several processes that train together over the loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np

from cyb_jax.benchmarks import injections
from cyb_jax.errors import EXIT_BAD_INPUT, InputError

# The phases in which a life is disturbed, and the share of each phase.
PHASES = {"start_up": 0.2, "step": 0.25, "save": 0.35, "evaluation": 0.2}
# The maximum number of steps of a life before it is killed at a step.
_MOST_STEPS_BEFORE_A_KILL = 80
_LONGEST_LIFE = 1200.0
# The seconds beyond the heartbeat within which the remaining hosts must exit.
_MARGIN = 90.0
HEARTBEAT = 10
# If another host is killed before they have connected, a host exits after this time.
_JOIN_TIMEOUT = 60


class Durations:
  """The durations of the phases in seconds; kills are spread over them."""

  def __init__(self) -> None:
    self._seen: dict[str, list[float]] = {"start_up": [], "save": [], "evaluation": [], "outlived": []}

  def add(self, phase: str, seconds: float) -> None:
    self._seen[phase].append(seconds)

  def median(self, phase: str) -> float | None:
    return float(np.median(self._seen[phase])) if self._seen[phase] else None

  def most(self, phase: str) -> float | None:
    return max(self._seen[phase], default=None)


@contextlib.contextmanager
def server(folder: pathlib.Path) -> Iterator[Server]:
  """The server; logs and compiled programs are written to the folder."""
  # Compiled programs are cached between lives, but not in the user's cache, because a kill may damage a file.
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  command = [sys.executable, "-c", "from cyb_jax.benchmarks import lives; lives.serve()"]
  environment = os.environ | cache | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
    try:
      yield Server(process, folder)
    finally:
      process.stdin.close()  # the server then exits


def serve() -> None:
  """Starts, watches and signals training programs on requests from standard input, one JSON object per line."""
  import jax  # noqa: F401

  # Imported before the forks, so that a life does not spend its time on imports.
  import cyb_jax.studies.resolution
  import cyb_jax.training.trainer  # noqa: F401
  from cyb_jax.cli import train

  pids: dict[int, list[int]] = {}
  for line in sys.stdin:
    request = json.loads(line)
    answer: Any = None
    if "start" in request:
      answer = pids[request["life"]] = [_fork(host, train.run) for host in request["start"]]
    else:
      # No one has waited for the process yet, so its id can't belong to another process.
      pid = pids[request["life"]][request["host"]]
      if request["do"] == "signal":
        os.kill(pid, request["number"])
      elif request["do"] == "kill":
        os.kill(pid, signal.SIGKILL)
        answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
      else:
        answer = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _fork(host: dict[str, Any], run: Callable[[], None]) -> int:
  """Starts a training program in a fork; returns its process id."""
  pid = os.fork()
  if pid:
    return pid
  log = os.open(host["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  nothing = os.open(os.devnull, os.O_RDONLY)
  for source, target in ((nothing, 0), (log, 1), (log, 2)):
    os.dup2(source, target)
  os.environ.update(host["environment"])
  injections.inject(host["injected"])
  sys.argv = ["cyb-train", *host["flags"]]
  run()  # exits
  raise AssertionError


class Server:
  """The client of the server."""

  def __init__(self, process: subprocess.Popen[str], folder: pathlib.Path):
    self._process, self._folder, self._count = process, folder, 0

  @contextlib.contextmanager
  def life(
    self,
    config: pathlib.Path,
    workdir: pathlib.Path,
    *flags: str,
    hosts: int = 1,
    devices: int = 0,
    injected: Mapping[str, Any] = types.MappingProxyType({}),
  ) -> Iterator[Life]:
    """A training of the config in the folder, new or continued; it is killed at the end of the `with` block.

    Args:
      config, workdir, flags: the arguments of the program.
      hosts: the number of processes that train together.
      devices: the number of CPU devices of each process; 0: the devices of the machine.
      injected: the faults that each process injects into itself, see `injections.inject`.
    """
    given = [f"--config={config}", f"--workdir={workdir}", *flags]
    environment = {}
    if devices:
      # JAX 0.9.2 to 0.10.2 deadlocks on such devices with fewer threads.
      count = f"--xla_force_host_platform_device_count={devices}"
      environment = {"NPROC": "32", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}"}
    if hosts > 1:
      with socket.socket() as free:
        free.bind(("localhost", 0))
        given += [f"--coordinator=localhost:{free.getsockname()[1]}", f"--num_processes={hosts}"]
      given += [f"--heartbeat={HEARTBEAT}", f"--join_timeout={_JOIN_TIMEOUT}"]
    logs = [self._folder / f"{self._count}.{host}.log" for host in range(hosts)]
    number, self._count = self._count, self._count + 1
    own = [[f"--process_id={host}"] if hosts > 1 else [] for host in range(hosts)]
    shared = {"environment": environment, "injected": dict(injected)}
    started = [{"flags": given + own[i], "log": str(logs[i]), **shared} for i in range(hosts)]
    self.send({"life": number, "start": started})
    life = Life(self, number, workdir, logs)
    try:
      yield life
    finally:
      life.kill_now()

  def send(self, request: dict[str, Any]) -> Any:
    self._process.stdin.write(json.dumps(request) + "\n")
    self._process.stdin.flush()
    answer = self._process.stdout.readline()
    if not answer:
      raise RuntimeError("the server that starts trainings has died")
    return json.loads(answer)


class Life:
  """One training, which is watched from outside through its files.

  Attributes:
    victim: the host that `kill` has killed.
    outlived: the seconds that the other hosts needed to exit after it.
    first_step, last_step: the first and the last step that host 0 has logged; 0 before.
  """

  def __init__(self, server: Server, number: int, workdir: pathlib.Path, logs: list[pathlib.Path]):
    self._server, self._number, self._logs = server, number, logs
    self.victim: int | None = None
    self.outlived: float | None = None
    self.first_step = self.last_step = 0
    self._unfinished = workdir / "checkpoints" / "unfinished"
    self._born = time.perf_counter()
    self._codes: list[int | None] = [None] * len(logs)
    self._lines: IO[str] | None = None
    self._begun = ""  # a line that is not complete yet
    self._steps = 0
    self._evaluating = False

  @property
  def hosts(self) -> int:
    """The number of processes."""
    return len(self._logs)

  @property
  def has_logged(self) -> bool:
    """Whether host 0 has logged anything; before, the program has not set its handlers of signals."""
    return self._logs[0].exists() and self._logs[0].stat().st_size > 0

  def end(self, durations: Durations | None = None) -> None:
    """Waits until the training ends; raises RuntimeError if it fails."""
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

  def kill(self, wanted: str, rng: np.random.Generator, durations: Durations) -> str | None:
    """Kills the training at a random moment of a phase.

    With several hosts one host, `victim`, is killed; the others must exit, and the last of them takes `outlived`
    seconds.

    Returns:
      The phase in which it was killed, which may be the phase after `wanted`; None if the run was already finished.
    """
    self.reach(wanted, rng, durations)
    self.victim = int(rng.integers(len(self._logs))) if len(self._logs) > 1 else 0
    if self.kill_host(self.victim) != -signal.SIGKILL:
      self._wait_for_all()
      self._check()
      return None
    self._wait_for_all()
    self._read()
    if not self._steps:
      return "start_up"
    if self._evaluating:  # the previous save may still be running
      return "evaluation"
    return "save" if self._saving() else "step"

  def reach(self, wanted: str, rng: np.random.Generator, durations: Durations) -> bool:
    """Waits for a random moment of a phase; returns False if the training has ended before.

    Args:
      wanted: one of `PHASES`; the moment may be in the phase after it.
      rng: the source of the random moment.
      durations: the durations of the phases, to which that of the start is added.
    """
    steps = self._steps + int(rng.integers(1, _MOST_STEPS_BEFORE_A_KILL + 1))
    # Slightly longer than the phase, so that kills at its end occur too.
    delay = rng.random() * (0.3 if wanted == "step" else 1.1 * (durations.median(wanted) or 1.0))
    conditions = {
      "start_up": lambda: True,
      "step": lambda: self._steps >= steps,
      "save": lambda: self._steps >= steps and self._saving(),
      "evaluation": lambda: self._steps >= steps and self._evaluating,
    }
    started = self._steps > 0
    while self._alive():
      if self._steps and not started:
        started = True
        durations.add("start_up", time.perf_counter() - self._born)
      if conditions[wanted]():
        time.sleep(delay)
        return True
      time.sleep(0.001)
    return False

  def signal(self, number: int, host: int) -> None:
    """Sends a signal to a process."""
    if self._codes[host] is None:
      self._ask(host, "signal", number=number)

  def has_ended(self, host: int) -> bool:
    """Whether a process has ended."""
    return self._codes[host] is not None or self._ask(host, "poll")

  def wait(self, hosts: Sequence[int], seconds: float) -> bool:
    """Waits until processes have ended; returns False if one still runs after so many seconds."""
    until = time.monotonic() + seconds
    while not all(self.has_ended(host) for host in hosts):
      self._read()
      if time.monotonic() > until:
        return False
      time.sleep(0.01)
    self._read()
    return True

  def kill_host(self, host: int) -> int:
    """Kills a process if it is alive; returns its exit code."""
    if self._codes[host] is None:
      self._codes[host] = self._ask(host, "kill")
    code = self._codes[host]
    assert code is not None
    return code

  def kill_now(self) -> None:
    """Kills all processes that are alive."""
    for host in range(len(self._logs)):
      self.kill_host(host)

  def text(self, host: int) -> str:
    """All that a process has printed."""
    return self._logs[host].read_text(errors="replace") if self._logs[host].exists() else ""

  def _ask(self, host: int, what: str, **request: Any) -> Any:
    return self._server.send({"life": self._number, "host": host, "do": what, **request})

  def _wait_for_all(self) -> None:
    """Waits until the remaining hosts have exited."""
    died = time.perf_counter()
    for host in range(len(self._logs)):
      if not self.wait([host], died + HEARTBEAT + _MARGIN - time.perf_counter()):
        raise RuntimeError(f"host {host} still runs {HEARTBEAT + _MARGIN:.0f} s after host {self.victim} was killed")
    self.outlived = time.perf_counter() - died
    self.kill_now()

  def _alive(self) -> bool:
    if time.perf_counter() - self._born > _LONGEST_LIFE:
      raise RuntimeError(f"a training has run for {_LONGEST_LIFE:.0f} s\n{self._tail()}")
    self._read()
    return not all(self.has_ended(host) for host in range(len(self._logs)))

  def _check(self) -> None:
    self.kill_now()
    for host, code in enumerate(self._codes):
      if code == EXIT_BAD_INPUT:
        raise InputError(self._tail(host).rpartition("error: ")[2].strip())
      if code != 0:
        raise RuntimeError(f"a training exited with code {code}\n{self._tail(host)}")

  def _read(self) -> None:
    """Reads new lines of the log of host 0."""
    if self._lines is None and self._logs[0].exists():
      self._lines = self._logs[0].open(errors="replace")
    for part in self._lines or ():
      line, self._begun = self._begun + part, ""
      if not line.endswith("\n"):
        self._begun = line
        continue
      logged = re.search(r"\] step (\d+)/", line)
      if logged:
        self._steps += 1
        self.last_step = int(logged[1])
        self.first_step = self.first_step or self.last_step
      self._evaluating = "] evaluating " in line or (self._evaluating and "validation perplexity" not in line)

  def _saving(self) -> bool:
    try:
      return any(self._unfinished.iterdir())
    except FileNotFoundError:
      return False

  def _tail(self, host: int = 0) -> str:
    return self.text(host)[-3000:]
