"""Runs the jobs of a preparation, in this process or in worker processes that exchange JSON lines with it.

A worker process reads the settings that all its jobs share, and then one job after the other. It answers a job with
progress, a result or an error. It exits at the end of its input, so it also exits if the parent process is killed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cyb_jax.data import chunks, merging, pieces, tasks, tokenizers
from cyb_jax.errors import InputError, StorageError
from cyb_jax.storage.paths import unchecked_place

_SECONDS_BETWEEN_REPORTS = 1.0
# The variables that limit the threads of tokenizers, OpenMP and TensorFlow.
_THREADS = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
# Errors that a worker sends to its parent; for any other error it writes the traceback and exits.
_ERRORS = {"InputError": InputError, "StorageError": StorageError, "Damaged": chunks.Damaged}

Report = Callable[[int, int], None]


class Work:
  """Runs jobs of a preparation in this process.

  Args:
    shared: the settings that all jobs share, as JSON: `task`, `options` and `limit`; `tokenizer`, a local folder;
      `folder`, the folder of the pieces; `output`, the folder of the shards.
    task: the opened task; None means that it is opened here.
  """

  def __init__(self, shared: dict[str, Any], task: tasks.Task | None = None):
    self._shared = shared
    self._task = task or tasks.open_task(shared["task"], shared["options"])
    self._folder, self._output = unchecked_place(shared["folder"]), unchecked_place(shared["output"])

  @functools.cached_property
  def _encoder(self) -> pieces.Encoder:
    return pieces.Encoder(tokenizers.load(self._shared["tokenizer"]), self._task.annotations)

  def do(self, job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Writes a piece or a shard.

    Args:
      job: a JSON object with `made_of`, and either `number` and `piece`, or `split`, `number` and `runs`.
      report: called with the numbers of documents and tokens of a piece that are done.

    Returns:
      a JSON object: the record of the piece without its files, or the digests of `merging.write_shard`.
    """
    folder, made_of = self._folder, job["made_of"]
    if "piece" in job:
      piece = tasks.Piece(**job["piece"])
      record = pieces.write(
        folder, job["number"], self._task, piece, self._encoder, made_of, limit=self._shared["limit"], report=report
      )
      return {name: value for name, value in record.items() if name != "files"}
    split, kinds = job["split"], ("tokens", *self._encoder.annotations)
    files = merging.Pieces(folder, (), (), (), {})
    encoder = self._encoder
    return merging.write_shard(
      files, self._output, split, job["number"], Path(job["runs"]), kinds,
      dtype=encoder.dtype, end_id=encoder.tokenizer.separator_id, made_of=made_of,
    )  # fmt: skip


def run(
  work: Work, shared: dict[str, Any], jobs: Sequence[dict[str, Any]], workers: int, report: Callable[..., None]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
  """(job, result) of each job when it is done.

  Args:
    work: runs the jobs in this process if there is only one worker.
    shared: the argument of `Work` in worker processes.
    jobs: the jobs, as JSON objects.
    workers: the largest number of processes; there are at most as many as jobs.
    report: called with the number of the worker, and the numbers of documents and tokens of its job that are done.

  Raises:
    InputError, StorageError, Damaged: a job raised it.
    ChildProcessError: a worker died.
  """
  workers = min(workers, len(jobs))
  if workers <= 1:
    for job in jobs:
      yield job, work.do(job, functools.partial(report, 0))
    return
  events: queue.Queue = queue.Queue()
  waiting = iter(jobs)
  lock = threading.Lock()
  with contextlib.ExitStack() as stack:
    processes = [_start(workers) for _ in range(workers)]
    for process in processes:
      stack.callback(_end, process)
    for number, process in enumerate(processes):
      threading.Thread(target=_serve, args=(number, process, shared, waiting, lock, events), daemon=True).start()
    left = len(jobs)
    while left:
      kind, number, job, value = events.get()
      if kind == "progress":
        report(number, *value)
      elif kind == "done":
        left -= 1
        yield job, value
      elif kind in _ERRORS:
        raise _ERRORS[kind](value)
      else:
        raise ChildProcessError(value)


def _start(workers: int) -> subprocess.Popen:
  threads = str(max(1, tokenizers.num_threads() // workers))
  env = os.environ | dict.fromkeys(_THREADS, threads)
  # The worker must find the modules of the user's tasks in the same places as this process.
  env |= {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "TF_CPP_MIN_LOG_LEVEL": "3"}
  command = [sys.executable, "-c", "from cyb_jax.data import workers; workers.main()"]
  return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)


def _end(process: subprocess.Popen) -> None:
  process.kill()
  process.wait()
  for pipe in (process.stdin, process.stdout):
    with contextlib.suppress(OSError):
      pipe.close()


def _serve(number, process, shared, waiting, lock, events) -> None:
  """Sends jobs to a worker process and puts its answers into the queue."""
  job = None
  with contextlib.suppress(OSError, ValueError):
    _send(process.stdin, shared)
    while True:
      with lock:
        job = next(waiting, None)
      if job is None:
        return
      _send(process.stdin, job)
      for line in process.stdout:
        kind, value = json.loads(line)
        events.put((kind, number, job, value))
        if kind == "done":
          break
        if kind != "progress":
          return
      else:
        break
  code = process.wait()
  name = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
  hint = " (possibly out of memory: give fewer --workers)" if code == -signal.SIGKILL else ""
  text = f"a worker died with {name}{hint}; complete pieces are kept, and the same command continues the preparation"
  events.put(("died", number, job, text))


def _send(file, value: Any) -> None:
  file.write(json.dumps(value) + "\n")
  file.flush()


def main() -> None:
  """The program of a worker process."""
  # Standard output carries answers only; the output of libraries goes to standard error.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  for number in (signal.SIGINT, signal.SIGTERM):  # may be sent to all processes of a group; the parent ends this one
    signal.signal(number, signal.SIG_IGN)
  lines: queue.Queue[str] = queue.Queue()

  def read():
    for line in sys.stdin:
      lines.put(line)
    os._exit(0)

  threading.Thread(target=read, daemon=True).start()
  shared, work = json.loads(lines.get()), None
  while True:
    job = json.loads(lines.get())
    try:
      work = work or Work(shared)
      answer = "done", work.do(job, _reporter(answers))
    except (InputError, StorageError, chunks.Damaged) as error:
      answer = type(error).__name__, str(error)
    except Exception:
      traceback.print_exc()
      sys.stderr.flush()
      os._exit(1)
    _send(answers, answer)


def _reporter(answers) -> Report:
  last = time.monotonic()

  def report(documents, tokens):
    nonlocal last
    if time.monotonic() - last >= _SECONDS_BETWEEN_REPORTS:
      last = time.monotonic()
      _send(answers, ("progress", (documents, tokens)))

  return report
