"""Trains a run from a config: data, method, state, steps, checkpoints, metrics, and the last evaluation.

A run is a function of its config and its token store. It may be killed at any time: the same call continues it, and the
final parameters, optimizer state, data order and metrics.jsonl (except `timing`) are bitwise equal.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from cyb_jax import runs, storage
from cyb_jax.checkpointing.manager import Checkpoints
from cyb_jax.checkpointing.workdir import Lock, checkpoints_in, start_workdir, write_evaluation
from cyb_jax.configs import Config
from cyb_jax.data import Prefetch
from cyb_jax.distributed.cluster import ALONE, Cluster
from cyb_jax.errors import Interrupted, writing
from cyb_jax.evaluation import AUTOREGRESSIVE_WINDOWS, Evaluator, evaluate_split
from cyb_jax.methods import Adaptive
from cyb_jax.progress import Meter
from cyb_jax.signals import StopSignals, end_process
from cyb_jax.training import hooks
from cyb_jax.training.layout import strategy_of_run
from cyb_jax.training.metrics import MetricsLog, NoLog, read_metrics
from cyb_jax.training.optimizer import schedule
from cyb_jax.training.preflight import RunPlan, preflight
from cyb_jax.training.progress import Progress
from cyb_jax.training.run_data import batch_reader, open_batches
from cyb_jax.training.start import log_size, restore_or_start
from cyb_jax.training.throughput import Throughput

Hook = Callable[[Progress], None]

# What a signal means before the first step is done.
_ENDING = "ended before the first step was done, so nothing is lost; the same command continues"


def train(
  config: Config,
  workdir: str | os.PathLike,
  *,
  profile: int = 0,
  cluster: Cluster = ALONE,
  owns_process: bool = False,
) -> dict[str, Any]:
  """Starts or continues a run, and evaluates it at the end.

  Args:
    config: the validated config.
    workdir: the run's folder; it is created after all checks have passed.
    profile: the number of steps, after the first ten, that are traced into WORKDIR/profile.
    cluster: the hosts of the run; all of them must call this function.
    owns_process: whether this function may end the process, with exit code 75, if a signal arrives while the first step
      is being compiled. Otherwise such a signal takes effect after the compilation.

  Returns:
    The last evaluation, which is the content of evaluation.json.

  Raises:
    InputError: the input is invalid; nothing was written.
    Interrupted: a signal has stopped the run; everything is saved, or no step was done yet.
    StorageError: the disk or the bucket failed, for instance because it is full; earlier checkpoints are intact.
    DivergedError: `train.max_skipped` consecutive steps were not finite; earlier checkpoints are intact.
  """
  end = functools.partial(end_process, announce=cluster.abandon) if owns_process else None
  with StopSignals(_ENDING, "finishing the step, then saving", end) as signals:
    signals.at_once = True
    try:
      return _train(runs.as_started(config, workdir), workdir, profile, cluster, signals)
    except Interrupted as error:
      if signals.at_once and end is not None:
        end(str(error))
      raise


def _train(
  config: Config, workdir: str | os.PathLike, profile: int, cluster: Cluster, signals: StopSignals
) -> dict[str, Any]:
  with Lock(workdir) if cluster.index == 0 else contextlib.nullcontext() as lock:
    plan = preflight(config, workdir, profile=profile, cluster=cluster)
    folder = _start_workdir(plan, workdir, lock)
    with jax.default_matmul_precision(config.precision.matmul):
      return Trainer(plan, folder, signals).run()


def _start_workdir(plan: RunPlan, workdir: str | os.PathLike, lock: Lock | None) -> storage.Place:
  """Writes the run's config and tokenizer to the work directory, on host 0; returns the work directory."""
  folder = storage.place(workdir)
  if lock is not None:
    folder = start_workdir(workdir, runs.config_record(plan.config, workdir), plan.store.tokenizer, lock, plan.meta)
  plan.cluster.barrier()
  if not storage.in_bucket(folder):
    plan.cluster.same_folder(folder)
  return folder


class Trainer:
  """Runs the steps of a plan.

  Args:
    plan: the result of `preflight`.
    folder: the work directory.
    signals: the signals that stop the run; `at_once` is cleared when the first step is dispatched.
  """

  def __init__(self, plan: RunPlan, folder: storage.Place, signals: StopSignals):
    self.plan, self.folder, self._signals = plan, folder, signals
    self._strategy = strategy_of_run(plan.config, plan.method, plan.mesh, plan.steps)
    batch_size = plan.config.data.batch_size
    self._read = batch_reader(plan.config, plan.store, self._strategy.rows(batch_size))
    self._owned_rows = self._strategy.owned_rows(batch_size)
    self._evaluator = Evaluator(plan.evaluated, plan.mesh)

  def run(self) -> dict[str, Any]:
    """Runs all remaining steps; returns the record of the last evaluation."""
    plan, cluster = self.plan, self.plan.cluster
    checkpoints = checkpoints_in(self.folder, keep=plan.config.train.keep, cluster=cluster)
    with contextlib.closing(checkpoints):
      log_size(plan, self._strategy)
      run = Progress(plan, restore_or_start(plan, self._strategy, self._evaluator, checkpoints, self._read))
      with (
        self._open_log(run.step) as log,
        Prefetch(self._read, run.step, plan.steps) as ahead,
        hooks.Profiler(self.folder, plan.profile) as profiler,
        # Off a terminal the lines of metrics say the same.
        Meter("training", total=plan.steps, unit="steps", done=run.step, lines=False) as meter,
      ):
        self._take_steps(run, ahead, profiler, self._hooks(run, ahead, log, checkpoints, meter))
        if not plan.steps:
          self._save_untrained(run, log, checkpoints)
        checkpoints.wait()
      record = cluster.broadcast(cluster.index == 0 and self._last_evaluation())
      if not record:  # the run was finished before, and its metrics.jsonl was removed
        record = self.evaluate(run, plan.config.train.last_eval_limit)
      if cluster.index == 0:
        with writing(f"{self.folder / 'evaluation.json'}"):
          write_evaluation(self.folder, record)
      return record

  def _take_steps(self, run: Progress, ahead: Prefetch, profiler: hooks.Profiler, after_step: Sequence[Hook]) -> None:
    for _ in range(run.step, self.plan.steps):
      batch = next(ahead)
      run.begin_step(tokens=int(np.count_nonzero(batch["weights"][self._owned_rows])))
      if run.is_first:
        logging.info("compiling the step")
      profiler.before_step(run)
      run.state = self._strategy.step(run.state, self._strategy.shard_batch(batch))
      self._signals.at_once = False
      profiler.after_step(run)
      for hook in after_step:
        hook(run)

  def _hooks(
    self, run: Progress, ahead: Prefetch, log: MetricsLog | NoLog, checkpoints: Checkpoints, meter: Meter
  ) -> tuple[Hook, ...]:
    """The hooks after each step, in order; hooks that wait for other hosts are in the same order on all hosts."""
    plan, strategy, config = self.plan, self._strategy, self.plan.config
    rate = schedule(config.optimizer, plan.steps, plan.method.decoder.config.d_model)
    throughput = Throughput(plan, ahead, run.step)
    divergence = hooks.DivergenceCheck(strategy, config.train.max_skipped, self.folder)
    collapse = hooks.CollapseWarning(config.train.collapse_warning, is_adaptive=isinstance(plan.method, Adaptive))
    sources = hooks.SourceCounts(open_batches(config, plan.store), config.data.sequence_length, run.step)
    metrics = hooks.Metrics(strategy, rate, log, throughput, divergence, collapse, sources, meter)
    interruption = hooks.Interruption(plan.cluster, self._signals, checkpoints)
    validation = hooks.Validation(self.evaluate, log, interruption)
    saver = hooks.Saver(checkpoints, strategy, log, divergence)
    blocking = hooks.BlockingHooks(metrics, throughput, validation, saver, interruption)
    return metrics.write_previous, interruption.check, saver.check_previous, metrics.collect, blocking

  def evaluate(self, run: Progress, limit: int, *, autoregressive: bool = True) -> dict[str, Any]:
    """Evaluates the validation split at the current step; returns the record.

    Args:
      run: the progress of the run.
      limit: the number of windows; 0 means all windows.
      autoregressive: whether the evaluation at the last step of a non-causal method also evaluates some windows token
        by token.
    """
    meta = run.meta()
    return evaluate_split(
      self._evaluator,
      self._strategy.params(run.state),
      self.plan.store,
      self.plan.config,
      split="validation",
      step=run.step,
      meta=meta,
      limit=limit or None,
      autoregressive_windows=AUTOREGRESSIVE_WINDOWS if run.is_last and autoregressive else 0,
    )

  def _save_untrained(self, run: Progress, log: MetricsLog | NoLog, checkpoints: Checkpoints) -> None:
    """Evaluates and saves the state of a run of 0 steps, unless it is already saved."""
    cluster = self.plan.cluster
    if cluster.broadcast(cluster.index == 0 and checkpoints.steps()):
      return
    record = self.evaluate(run, self.plan.config.train.last_eval_limit)
    log.write(record)
    checkpoints.save(0, self.plan.saved_part(self._strategy.global_state(run.state)), run.meta(), loss=record["loss"])

  def _open_log(self, step: int) -> MetricsLog | NoLog:
    """The log, which continues after a step, on host 0; a log that writes nothing on the other hosts."""
    if self.plan.cluster.index:
      return NoLog()
    config = self.plan.config
    return MetricsLog(self.folder, step, trackers=config.train.trackers, config=config.source)

  def _last_evaluation(self) -> dict[str, Any] | None:
    """The evaluation at the last step in metrics.jsonl, or None; a finished run does not repeat its evaluation."""
    for row in reversed(read_metrics(self.folder)):
      if row["split"] == "validation" and row["step"] == self.plan.steps:
        return row
    return None
