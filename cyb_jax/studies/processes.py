"""Runs programs in processes, several at a time, each on its share of the CPU's cores."""

from __future__ import annotations

import concurrent.futures
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from cyb_jax.errors import EXIT_INTERRUPTED, Failed, Interrupted
from cyb_jax.progress import track

# The first program of a run's process: it binds the process to its cores, and makes the process end when the study is
# killed, because the run would otherwise keep its folder locked. It then executes the run's program. This can't be done
# between fork and exec, because the study itself has threads of jax.
_BEGIN = """
import ctypes, os, signal, sys
if sys.argv[1]:
  os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
if sys.platform == "linux":
  ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


# Variables with which the user decides how much memory of a GPU a process takes.
_MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")


def environment(jobs: int) -> dict[str, str] | None:
  """The variables of processes of which `jobs` run at a time; None: those of this process.

  Several processes share a GPU in equal parts. Without this, the first would take three quarters of its memory. The
  other tenth is for the programs and libraries, which are outside the part that jax manages.
  """
  if jobs == 1 or any(name in os.environ for name in _MEMORY):
    return None
  return os.environ | {"XLA_CLIENT_MEM_FRACTION": f"{0.9 / jobs:.3f}"}


class Processes:
  """A pool of processes.

  Args:
    jobs: the number of processes at a time.
  """

  def __init__(self, jobs: int):
    self.failures: list[str] = []
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    self._cores: queue.Queue[list[int]] = queue.Queue()
    for job in range(jobs):
      self._cores.put(cores[job::jobs])
    self._environment = environment(jobs)
    self._lock = threading.Lock()
    self._running: set[subprocess.Popen[str]] = set()
    self._is_interrupted = False
    self._pool = concurrent.futures.ThreadPoolExecutor(jobs)

  def map(self, function: Callable[..., Any], items: Sequence[tuple], *, description: str, unit: str) -> list[Any]:
    """The function's result for each item; None if it raised Failed, whose message is appended to `failures`.

    Args:
      function: runs in threads, `jobs` at a time.
      items: the arguments of each call.
      description, unit: what the calls do, and the name of the items in the plural; see `cyb_jax.progress.Meter`.
    """
    futures = [self._pool.submit(function, *item) for item in items]
    results = []
    try:
      for future in track(futures, description, total=len(futures), unit=unit):
        try:
          results.append(future.result())
        except Failed as error:
          logging.warning("%s", error)
          self.failures.append(str(error))
          results.append(None)
    except BaseException as error:
      self.shut_down(error)
      raise
    return results

  def submit(self, function: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future[Any]:
    """Starts a function in a thread of the pool."""
    return self._pool.submit(function, *arguments)

  def shut_down(self, error: BaseException | None = None) -> None:
    """Starts no more functions, and waits for the running functions.

    Args:
      error: what has ended the study; after a signal (Interrupted), the running programs are interrupted too, so that
        trainings save.
    """
    if isinstance(error, Interrupted):
      with self._lock:
        self._is_interrupted = True
        for process in self._running:
          process.terminate()
    self._pool.shutdown(cancel_futures=True)

  def program(self, module: str, *options: str) -> dict[str, Any]:
    """The JSON object that a program prints.

    Args:
      module: the module of the program, such as 'cyb_jax.cli.train'.
      options: its arguments.

    Returns:
      The object; {"perplexity": None} for a training that diverges.

    Raises:
      Failed: the program ends with an error.
      Interrupted: a signal has stopped the program.
    """
    logging.info("%s %s", module.rpartition(".")[2], " ".join(options))
    arguments = ["-m", module, *options]
    done = self.run(arguments)
    last = done.stderr.strip().splitlines()[-1:]
    if module == "cyb_jax.cli.train" and done.returncode == 1 and "train.max_skipped" in "".join(last):
      logging.warning("%s", last[0])
      return {"perplexity": None}
    # The signal was for the study too, which may have been started in a way that ignores it.
    if done.returncode == EXIT_INTERRUPTED:
      raise Interrupted("a run was interrupted and has saved; the same command continues")
    if done.returncode:
      raise Failed(f"python {' '.join(arguments)} ended with {done.returncode}: {''.join(last)}", {})
    return json.loads(done.stdout.strip().splitlines()[-1])

  def run(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments on free cores; waits for cores, then for the process.

    Raises:
      Interrupted: the study was interrupted before the process started.
    """
    cores = self._cores.get()
    try:
      return self._run([sys.executable, "-c", _BEGIN, ",".join(map(str, cores)), *arguments])
    finally:
      self._cores.put(cores)

  def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
    with self._lock:
      if self._is_interrupted:
        raise Interrupted("the study was interrupted before a run started; the same command continues")
      pipe = subprocess.PIPE
      process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=self._environment)
      self._running.add(process)
    try:
      out, err = process.communicate()
      return subprocess.CompletedProcess(command, process.returncode, out, err)
    finally:
      with self._lock:
        self._running.discard(process)
