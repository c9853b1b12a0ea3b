"""The hooks of the training loop: metrics, validation, checkpoints, a profiler trace, interruption.

The trainer calls the hooks after each step in a fixed order (`Trainer._hooks`). Each hook has its own period.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from absl import logging

from cyb_jax import storage
from cyb_jax.checkpointing.manager import Checkpoints
from cyb_jax.data import MixtureBatches, TrainBatches
from cyb_jax.distributed.cluster import Cluster
from cyb_jax.errors import DivergedError, Interrupted
from cyb_jax.progress import Meter, format_seconds
from cyb_jax.signals import StopSignals
from cyb_jax.training.metrics import MetricsLog, NoLog, summarize
from cyb_jax.training.progress import Progress
from cyb_jax.training.step import Totals
from cyb_jax.training.strategies import Strategy, with_new_totals
from cyb_jax.training.throughput import Lap, Throughput

# The number of steps before the trace, after which everything is compiled and batches are prefetched.
_PROFILE_AFTER = 10


class Profiler:
  """Traces `steps` steps into WORKDIR/profile, after the first ten; at the end of its context, it ends the trace.

  Args:
    folder: the work directory.
    steps: the number of steps; 0 means no trace.
  """

  def __init__(self, folder: storage.Place, steps: int):
    self._folder, self._steps, self._running = folder / "profile", steps, False

  def __enter__(self) -> Profiler:
    return self

  def __exit__(self, *_: object) -> None:
    self._stop()

  def before_step(self, run: Progress) -> None:
    if self._steps and run.step == run.first + _PROFILE_AFTER:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after_step(self, run: Progress) -> None:
    before = run.first - 1 + _PROFILE_AFTER
    if self._steps and run.step == min(before + self._steps, run.plan.steps) > before:
      jax.block_until_ready(run.state.step)
      self._stop()

  def _stop(self) -> None:
    if self._running:
      jax.profiler.stop_trace()
    self._running = False


class DivergenceCheck:
  """Ends a run in which too many consecutive steps were not applied.

  Args:
    strategy: the strategy of the run.
    max_skipped: the number of consecutive steps that ends the run.
    folder: the work directory, for the message.
  """

  def __init__(self, strategy: Strategy, max_skipped: int, folder: storage.Place):
    self._strategy, self._max_skipped, self._folder = strategy, max_skipped, folder

  def __call__(self, step: int, skipped_in_a_row: jax.Array) -> int:
    """The number of consecutive steps until now that were not applied.

    Args:
      step: the number of the step.
      skipped_in_a_row: the counter in the state after the step.

    Raises:
      DivergedError: `max_skipped` consecutive steps were not applied; the checkpoints are older than these steps.
    """
    in_a_row = int(self._strategy.global_state(skipped_in_a_row))
    if in_a_row >= self._max_skipped:
      raise DivergedError(
        f"step {step}: the loss or the gradient of the last {in_a_row} steps isn't finite (train.max_skipped ="
        f" {self._max_skipped}); none of these steps was applied, and the checkpoints in {self._folder} are older. A"
        " lower optimizer.learning_rate may help"
      )
    return in_a_row


class CollapseWarning:
  """Warns once when almost all of the stopping distribution's mass is on one slot.

  Args:
    threshold: the share of the mass above which the warning is logged.
    is_adaptive: whether the method learns when to stop; other methods cause no warning.
  """

  def __init__(self, threshold: float, *, is_adaptive: bool):
    self._threshold, self._is_adaptive = threshold, is_adaptive
    self._warned = False

  def __call__(self, step: int, latency: list[float]) -> None:
    """Checks the mean stopping distribution; after a value below the threshold, the warning can be logged again."""
    share, slot = max((share, slot) for slot, share in enumerate(latency))
    # If no step was applied, the shares are nan, which is never above the threshold.
    if not self._is_adaptive or len(latency) == 1 or not share > self._threshold:
      self._warned = False
    elif not self._warned:
      logging.warning(
        "step %d: the stopping distribution has collapsed: %.1f%% of the answers are read after %d pauses. Token+pause"
        " inputs (method.pause_input), a lower learning rate or the DP loss may prevent this",
        step,
        100 * share,
        slot,
      )
      self._warned = True


@dataclasses.dataclass
class _Pending:
  """A line of metrics whose numbers the device may still be computing."""

  step: int
  totals: Totals
  skipped_in_a_row: jax.Array


class SourceCounts:
  """Counts the windows that a run has read from each source of a mixture.

  Args:
    batches: the batches of the run; nothing is reported for a run over a single store.
    sequence_length: T.
    step: the step at which this process starts.
  """

  def __init__(self, batches: TrainBatches | MixtureBatches, sequence_length: int, step: int):
    self._batches = batches if isinstance(batches, MixtureBatches) else None
    self._sequence_length = sequence_length
    self._epochs = self._batches.epochs(step) if self._batches else {}

  def __call__(self, step: int) -> dict[str, Any]:
    """The fields of a line of metrics; logs the sources that have started a new epoch since the previous line.

    Returns:
      `sources`: by name, `tokens` (in the windows that all hosts have read since step 0) and `epochs`.
    """
    if self._batches is None:
      return {}
    windows, epochs = self._batches.read_windows(step), self._batches.epochs(step)
    for name, times in epochs.items():
      if int(times) > int(self._epochs[name]):
        logging.info("source %s: epoch %d is complete; the next epoch begins, in a new order", name, times)
    self._epochs = epochs
    return {
      "sources": {name: {"tokens": windows[name] * self._sequence_length, "epochs": epochs[name]} for name in windows}
    }


class Metrics:
  """Writes a line of metrics every `train.log_every` steps, and at the last step.

  The numbers of step n are fetched after step n + 1 is dispatched, so the device never waits for the host.

  Args:
    strategy: the strategy of the run.
    schedule: the learning rate by step.
    log: the log to which lines are written.
    throughput: measures the time between lines.
    divergence, collapse: checks that are called after each line.
    sources: counts the windows that are read from each source.
    meter: shows how many steps of the run are finished.
  """

  def __init__(
    self,
    strategy: Strategy,
    schedule: optax.Schedule,
    log: MetricsLog | NoLog,
    throughput: Throughput,
    divergence: DivergenceCheck,
    collapse: CollapseWarning,
    sources: SourceCounts,
    meter: Meter,
  ):
    self._sources, self._meter = sources, meter
    self._strategy, self._schedule, self._log = strategy, schedule, log
    self._throughput, self._divergence, self._collapse = throughput, divergence, collapse
    self._pending: _Pending | None = None

  def write_previous(self, run: Progress) -> None:
    """Writes the pending line of the previous step; called after the next step was dispatched."""
    if run.is_first and not run.is_last:
      # The first step includes compilation, so the throughput of the first line is measured after it.
      jax.block_until_ready(run.state.step)
      self._throughput.restart(run.step)
      self._meter.restart(run.step)
    self.flush(run)

  def collect(self, run: Progress) -> None:
    """Collects the totals of the steps since the last line, if a line is due."""
    if run.is_last or run.is_due(run.plan.config.train.log_every):
      # The counter is copied, because the next step donates its state.
      self._pending = _Pending(run.step, run.state.totals, run.state.skipped_in_a_row + 0)
      run.state = with_new_totals(self._strategy, run.state)

  def flush(self, run: Progress) -> None:
    """Writes the pending line, if there is one; waits for its numbers.

    Raises:
      DivergedError: see `DivergenceCheck`.
      StorageError: see `MetricsLog.write`.
    """
    pending, self._pending = self._pending, None
    if pending is None:
      return
    row = summarize(jax.device_get(self._strategy.global_state(pending.totals)))
    lap = self._throughput.lap(pending.step)
    rate = float(self._schedule(pending.step - 1))
    line = {"split": "train", "step": pending.step, **row, **self._sources(pending.step), "learning_rate": rate}
    self._log.write({**line, "timing": lap.timing()})
    logging.info("%s", _progress_line(pending.step, run.plan.steps, row, lap))
    self._meter.reach(pending.step, note=f"loss {row['loss']:.4f}")
    if row["skipped"]:
      numbers = ", ".join(map(str, row["skipped_steps"])) + ", ..." * (row["skipped"] > len(row["skipped_steps"]))
      logging.warning(
        "%d steps were not applied, because their loss or gradient isn't finite: %s", row["skipped"], numbers
      )
    self._divergence(pending.step, pending.skipped_in_a_row)
    self._collapse(pending.step, row["latency"])


def _progress_line(step: int, steps: int, row: dict[str, Any], lap: Lap) -> str:
  line = (
    f"step {step}/{steps}  loss {row['loss']:.4f}  perplexity {row['perplexity']:.2f}  pauses {row['mean_pauses']:.2f}"
  )
  if lap.tokens_per_second:
    mfu = f", MFU {lap.mfu:.1%}" if lap.mfu else ""
    left = format_seconds((steps - step) * lap.seconds / lap.steps)
    line += (
      f"  {lap.tokens_per_second:.0f} tokens/s, {lap.slots_per_second:.0f} slots/s{mfu}, data wait {lap.data_wait:.0%},"
      f" {left} left"
    )
  if row["dropped_tokens"]:
    line += f"  ({row['dropped_tokens']} tokens dropped)"
  return line


class Interruption:
  """Ends a run on all hosts after the same step if any host has received a signal.

  Args:
    cluster: the hosts of the run.
    signals: the signals of this host.
    checkpoints: the checkpoints of the run.
  """

  def __init__(self, cluster: Cluster, signals: StopSignals, checkpoints: Checkpoints):
    self._cluster, self._signals, self._checkpoints = cluster, signals, checkpoints

  def check(self, run: Progress) -> None:
    """Sets `run.stopping` if any host has received a signal; the result is the same on all hosts."""
    run.stopping = run.stopping or self._cluster.stops(bool(self._signals.received))

  def end(self, run: Progress) -> None:
    """If the run stops before its last step, waits for the checkpoint and raises Interrupted."""
    if run.stopping and not run.is_last:
      self._checkpoints.wait()
      received = self._signals.received
      cause = f"signal {received[0]}" if received else "a stop was requested on another host"
      raise Interrupted(
        f"{cause}: saved at step {run.step} of {run.plan.steps}; the same command continues", on_all_hosts=True
      )


class Validation:
  """Evaluates on the validation split every `train.eval_every` steps, and at the last step.

  Args:
    evaluate: `Trainer.evaluate`.
    log: the log to which records are written.
    interruption: checked again after an evaluation, which may take a long time.
  """

  def __init__(self, evaluate: Callable[..., dict[str, Any]], log: MetricsLog | NoLog, interruption: Interruption):
    self._evaluate, self._log, self._interruption = evaluate, log, interruption

  def is_due(self, run: Progress) -> bool:
    return run.is_last or run.is_due(run.plan.config.train.eval_every)

  def __call__(self, run: Progress) -> None:
    train = run.plan.config.train
    record = self._evaluate(run, train.last_eval_limit if run.is_last else train.eval_limit)
    run.loss = record["loss"]
    if run.is_last and 0 < train.eval_every < run.step and train.eval_limit != train.last_eval_limit:
      # Checkpoints are compared by their losses on the same windows.
      run.loss = self._evaluate(run, train.eval_limit, autoregressive=False)["loss"]
    self._log.write(record)
    logging.info("step %d: validation perplexity %.3f", run.step, record["perplexity"])
    self._interruption.check(run)


class Saver:
  """Saves a checkpoint every `train.checkpoint_every` steps, at the last step, and before the run is interrupted.

  Args:
    checkpoints: the checkpoints of the run.
    strategy: the strategy of the run.
    log: flushed before each save.
    divergence: checked before each save.
  """

  def __init__(
    self, checkpoints: Checkpoints, strategy: Strategy, log: MetricsLog | NoLog, divergence: DivergenceCheck
  ):
    self._checkpoints, self._strategy, self._log, self._divergence = checkpoints, strategy, log, divergence

  def check_previous(self, run: Progress) -> None:
    """Raises the error of the save in the background if it has failed; checked every `train.log_every` steps."""
    if run.is_last or run.is_due(run.plan.config.train.log_every):
      self._checkpoints.check()

  def is_due(self, run: Progress) -> bool:
    return run.is_last or run.stopping or run.is_due(run.plan.config.train.checkpoint_every)

  def __call__(self, run: Progress) -> None:
    meta = run.meta()
    in_a_row = self._divergence(run.step, run.state.skipped_in_a_row)
    if in_a_row and not (run.stopping or run.is_last):
      # The current parameters may be the reason for the failed steps, so they must not replace earlier checkpoints.
      logging.warning("step %d: not saved, because the last %d steps were not applied", run.step, in_a_row)
    else:
      self._log.flush()
      state = run.plan.saved_part(self._strategy.global_state(run.state))
      self._checkpoints.save(run.step, state, meta, loss=run.loss)


class BlockingHooks:
  """Runs the hooks that block the training loop: validation, and then the checkpoint.

  The pending line of metrics is written first, so its timing does not include these hooks.

  Args:
    metrics, throughput, validation, saver, interruption: the hooks of the run.
  """

  def __init__(
    self, metrics: Metrics, throughput: Throughput, validation: Validation, saver: Saver, interruption: Interruption
  ):
    self._metrics, self._throughput = metrics, throughput
    self._validation, self._saver, self._interruption = validation, saver, interruption

  def __call__(self, run: Progress) -> None:
    if not (self._validation.is_due(run) or self._saver.is_due(run)):
      return
    self._metrics.flush(run)
    if self._validation.is_due(run):
      self._validation(run)
    if self._saver.is_due(run):  # a signal may have arrived during validation
      self._saver(run)
    self._interruption.end(run)
    self._throughput.restart(run.step)
