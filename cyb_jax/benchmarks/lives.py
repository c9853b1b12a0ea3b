"""Trainings in separate processes that are watched and killed from outside, for benchmarks of faults and hosts.

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
from collections.abc import Iterator
from typing import Any

import numpy as np

from cyb_jax.errors import EXIT_BAD_INPUT, InputError

# The maximum number of steps of a life before it is killed at a step.
_MOST_STEPS_BEFORE_A_KILL = 80
_LONGEST_LIFE = 1200.0
# The seconds beyond the heartbeat within which the remaining hosts must exit.
_MARGIN = 30.0
HEARTBEAT = 10


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
  """Starts, watches and kills training programs on requests from standard input, one JSON object per line."""
  import jax  # noqa: F401

  # Imported before the forks, so that a life does not spend its time on imports.
  import cyb_jax.studies.resolution
  import cyb_jax.training.trainer  # noqa: F401
  from cyb_jax.cli import train

  pids: list[int] = []
  for line in sys.stdin:
    request = json.loads(line)
    if "start" in request:
      pids = []
      for host in request["start"]:
        pid = os.fork()
        if not pid:
          log = os.open(host["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
          nothing = os.open(os.devnull, os.O_RDONLY)
          for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
          os.environ.update(host["environment"])
          sys.argv = ["cyb-train", *host["flags"]]
          train.run()  # exits
        pids.append(pid)
      answer = pids
    elif request["kill"]:
      # No one has waited for the process yet, so its id can't belong to another process.
      pid = pids[request["host"]]
      os.kill(pid, signal.SIGKILL)
      answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    else:
      pid = pids[request["host"]]
      answer = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


class Server:
  """The client of the server; one life at a time."""

  def __init__(self, process: subprocess.Popen[str], folder: pathlib.Path):
    self._process, self._folder, self._count = process, folder, 0

  @contextlib.contextmanager
  def life(
    self, config: pathlib.Path, workdir: pathlib.Path, *flags: str, hosts: int = 1, devices: int = 0
  ) -> Iterator[Life]:
    """A training of the config in the folder, new or continued; it is killed at the end of the `with` block.

    Args:
      config, workdir, flags: the arguments of the program.
      hosts: the number of processes that train together.
      devices: the number of CPU devices of each process; 0: the devices of the machine.
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
      given += [f"--heartbeat={HEARTBEAT}"]
    logs = [self._folder / f"{self._count}.{host}.log" for host in range(hosts)]
    self._count += 1
    own = [[f"--process_id={host}"] if hosts > 1 else [] for host in range(hosts)]
    self.send(
      {"start": [{"flags": given + own[i], "log": str(logs[i]), "environment": environment} for i in range(hosts)]}
    )
    life = Life(self, workdir, logs)
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
  """One training, which is watched from outside through its files."""

  def __init__(self, server: Server, workdir: pathlib.Path, logs: list[pathlib.Path]):
    self._server, self._logs = server, logs
    self.victim: int | None = None
    self.outlived: float | None = None
    self._unfinished = workdir / "checkpoints" / "unfinished"
    self._born = time.perf_counter()
    self._codes: list[int | None] = [None] * len(logs)
    self._lines = None
    self._steps = 0
    self._evaluating = False

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
    steps = int(rng.integers(1, _MOST_STEPS_BEFORE_A_KILL + 1))
    # Slightly longer than the phase, so that kills at its end occur too.
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
    self.victim = int(rng.integers(len(self._logs))) if len(self._logs) > 1 else 0
    if self._kill(self.victim) != -signal.SIGKILL:
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

  def kill_now(self) -> None:
    """Kills all processes that are alive."""
    for host in range(len(self._logs)):
      self._kill(host)

  def _kill(self, host: int) -> int:
    if self._codes[host] is None:
      self._codes[host] = self._server.send({"kill": True, "host": host})
    return self._codes[host]

  def _wait_for_all(self) -> None:
    """Waits until the remaining hosts have exited."""
    died = time.perf_counter()
    for host in range(len(self._logs)):
      while self._codes[host] is None and not self._server.send({"kill": False, "host": host}):
        if time.perf_counter() - died > HEARTBEAT + _MARGIN:
          raise RuntimeError(f"host {host} still runs {HEARTBEAT + _MARGIN:.0f} s after host {self.victim} was killed")
        time.sleep(0.01)
    self.outlived = time.perf_counter() - died
    self.kill_now()

  def _alive(self) -> bool:
    if time.perf_counter() - self._born > _LONGEST_LIFE:
      raise RuntimeError(f"a training has run for {_LONGEST_LIFE:.0f} s\n{self._tail()}")
    self._read()
    return not all(self._server.send({"kill": False, "host": host}) for host in range(len(self._logs)))

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
      self._lines = self._logs[0].open()
    for line in self._lines or ():
      self._steps += re.search(r"\] step \d+/", line) is not None
      self._evaluating = "] evaluating " in line or (self._evaluating and "validation perplexity" not in line)

  def _saving(self) -> bool:
    try:
      return any(self._unfinished.iterdir())
    except FileNotFoundError:
      return False

  def _tail(self, host: int = 0) -> str:
    return self._logs[host].read_text()[-3000:] if self._logs[host].exists() else ""
