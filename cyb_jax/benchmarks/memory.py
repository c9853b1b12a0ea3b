"""Resident memory over time: training steps, evaluation, pause statistics, preparation of text, and serving.

Every activity repeats the same piece of work. Its resident size is compared after a warm-up, in which programs are
compiled and caches are filled, and at the end: if it grows, something is kept that is not needed any more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags, logging

from cyb_jax import command_line
from cyb_jax.benchmarks import serve
from cyb_jax.errors import Failed, InputError, did_you_mean

# The share of an activity's time that is the warm-up, and the share of the other samples that each end averages.
_WARM_UP = 0.4
_AVERAGED = 0.25
_LEAST_SAMPLES = 8
_STEPS = 20
_WINDOWS = 16
_NEW_TOKENS = 16
_TINY = {
  "method": {"pauses": 2, "pause_input": "token+pause", "pause_visibility": "hidden"},
  "data": {
    "task": "synthetic_lookups",
    "tokenizer": "bytes",
    "options": "documents=2000",
    "sequence_length": 64,
    "batch_size": 8,
  },
  "decoder": {"num_layers": 2, "d_model": 64, "num_heads": 4, "num_kv_heads": 4, "head_size": 16, "mlp_size": 128},
  "train": {"steps": 10, "log_every": 10, "eval_every": 0, "checkpoint_every": 10, "trackers": ""},
}


def define_flags() -> None:
  command_line.define_path("workdir", None, "A trained run; without it, a tiny model on generated text.")
  command_line.define_base()
  flags.DEFINE_float("seconds", 8.0, "The time of each activity, with its warm-up; longer runs find slower growth.")
  flags.DEFINE_float("most_growth", 1.0, "The benchmark fails if an activity's resident size grows by more percent.")
  flags.DEFINE_list("activities", list(_ACTIVITIES), "The activities, separated by commas.")


@dataclasses.dataclass(frozen=True)
class _Subject:
  """The measured run.

  Attributes:
    workdir: its folder.
    base: the place of its base, if this has been moved; otherwise ''.
    scratch: a folder for the files of the activities.
  """

  workdir: str
  base: str
  scratch: pathlib.Path

  def opened(self) -> tuple[Any, Any]:
    """The run, and its token store."""
    from cyb_jax import runs
    from cyb_jax.interop import pretrained

    run = pretrained.load_run(self.workdir, base=self.base, base_option="--base")
    store = runs.open_recorded_store(run.meta)
    if store is None:
      raise InputError(f"--workdir: the token store of {self.workdir} does not exist; prepare it again")
    return run, store


def memory() -> dict[str, Any]:
  """The resident size of each activity after its warm-up and at its end.

  Returns:
    `benchmark`, `source`, `seconds`; `timing.rows`, for each activity: `repeats`, `bytes_after_warm_up`, `bytes_at_end`
    (means over several samples) and `growth_percent`.

  Raises:
    Failed: an activity has grown by more than `--most_growth`.
    InputError: a flag is invalid, or the system does not report the memory of processes.
  """
  args = flags.FLAGS
  if not args.seconds > 0:
    raise InputError(f"--seconds: {args.seconds} must be positive")
  for name in args.activities:
    if name not in _ACTIVITIES:
      raise InputError(f"--activities: {name!r} is unknown; {did_you_mean(name, _ACTIVITIES)}")
  if args.base and not args.workdir:
    raise InputError(f"--base: {args.base!r} requires --workdir; omit it for the tiny model")
  if serve.resident(os.getpid()) is None:
    raise InputError("benchmark: this system has no /proc/PID/status, so the resident size is unknown; run it on Linux")
  rows = []
  with tempfile.TemporaryDirectory(prefix="cyb-memory-") as folder:
    scratch = pathlib.Path(folder)
    subject = _Subject(args.workdir or _trained(scratch), args.base, scratch)
    for name in args.activities:
      with _ACTIVITIES[name](subject) as (work, pid):
        rows.append({"activity": name} | _measure(work, pid, args.seconds))
      logging.info("%s: %s", name, rows[-1])
  result = {
    "benchmark": "memory",
    "source": args.workdir or "",
    "seconds": args.seconds,
    "timing": {"rows": rows},
  }
  grown = [row["activity"] for row in rows if row["growth_percent"] > args.most_growth]
  if grown:
    raise Failed(f"memory: the resident size grows by more than {args.most_growth:g}% in {', '.join(grown)}", result)
  return result


def _measure(work: Callable[[], Any], pid: int, seconds: float) -> dict[str, Any]:
  """Repeats an activity and samples the resident size of a process after each repetition."""
  start = time.monotonic()
  samples: list[int] = []
  passed, repeats = 0.0, 0
  while passed < seconds or len(samples) < _LEAST_SAMPLES:
    work()
    gc.collect()
    repeats += 1
    passed = time.monotonic() - start
    if passed > _WARM_UP * seconds:
      samples.append(serve.resident(pid) or 0)
  averaged = max(1, int(_AVERAGED * len(samples)))
  before, after = (round(statistics.mean(part)) for part in (samples[:averaged], samples[-averaged:]))
  return {
    "repeats": repeats,
    "bytes_after_warm_up": before,
    "bytes_at_end": after,
    "growth_percent": round(100 * (after / before - 1), 3),
  }


def _trained(scratch: pathlib.Path) -> str:
  """Trains a tiny model for a few steps; returns its folder."""
  from cyb_jax import configs
  from cyb_jax.training import train

  source = configs.default()
  source.update(_TINY)
  source.data.store = str(scratch / "store")
  workdir = scratch / "run"
  train(configs.freeze(source), workdir)
  return str(workdir)


_Activity = Iterator[tuple[Callable[[], Any], int]]


@contextlib.contextmanager
def _training(subject: _Subject) -> _Activity:
  """Training steps with batches that are read ahead."""
  from cyb_jax.benchmarks.train import Contender

  run, store = subject.opened()
  with Contender(run.config, str(store.path), 0) as contender:
    yield lambda: contender.block(_STEPS), os.getpid()


@contextlib.contextmanager
def _evaluation(subject: _Subject) -> _Activity:
  """Evaluations of windows of the validation split."""
  from cyb_jax.evaluation import Evaluator, evaluate_split
  from cyb_jax.partitioning.mesh import make_mesh

  run, store = subject.opened()
  evaluator = Evaluator(run.method, make_mesh(run.config.parallelism))
  options = {"split": "validation", "step": run.step, "meta": run.meta, "limit": _WINDOWS}
  yield lambda: evaluate_split(evaluator, run.params, store, run.config, **options), os.getpid()


@contextlib.contextmanager
def _statistics(subject: _Subject) -> _Activity:
  """Pause statistics of windows of the validation split."""
  from cyb_jax.evaluation.statistics import PauseStatistics, statistics_of_split
  from cyb_jax.partitioning.mesh import make_mesh

  run, store = subject.opened()
  found = PauseStatistics(run.method, make_mesh(run.config.parallelism), run.tokenizer)
  options = {"split": "validation", "step": run.step, "limit": _WINDOWS}
  yield lambda: statistics_of_split(found, run.params, store, run.config, **options), os.getpid()


@contextlib.contextmanager
def _preparation(subject: _Subject) -> _Activity:
  """Preparations of a small text."""
  from cyb_jax.data import prepare

  folder = subject.scratch / "prepared"

  def work() -> None:
    prepare("synthetic_lookups", "bytes", folder, options={"documents": 200}, progress=False)
    shutil.rmtree(folder)

  yield work, os.getpid()


@contextlib.contextmanager
def _serving(subject: _Subject) -> _Activity:
  """Streamed answers of a server, which is a process of its own."""
  numbers = itertools.count()
  with serve.server(subject.workdir, subject.base, rows=4, chunk=4, queue=64) as (port, process):
    yield lambda: [serve.ask(port, next(numbers), _NEW_TOKENS) for _ in range(4)], process.pid


_ACTIVITIES = {
  "training": _training,
  "evaluation": _evaluation,
  "statistics": _statistics,
  "preparation": _preparation,
  "serving": _serving,
}
