"""From a config to a trained run: data, method, state, steps, checkpoints, metrics, the last evaluation.

A run is a function of its config and its token store. It may be killed at any time: the same call continues it, and
in the end parameters, optimizer state, data order and metrics.jsonl (but for `timing`) are the same, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from cyb_jax import __version__, configs, runs, storage
from cyb_jax.configs import Config
from cyb_jax.costs.flops import peak_flops
from cyb_jax.costs.memory import bytes_per_device, count_parameters
from cyb_jax.data import Prefetch, TokenStore, TrainBatches, is_store, open_tokenizer, prepare, with_segment_ids
from cyb_jax.data.tasks import PLACES, has_targets, settle_options
from cyb_jax.data.tokenizers import trained_pieces
from cyb_jax.distributed.hosts import ALONE, Cluster, own_facts
from cyb_jax.errors import DivergedError, InputError, Interrupted, writing
from cyb_jax.evaluation import AUTOREGRESSIVE_WINDOWS, Evaluator, evaluate_split
from cyb_jax.interop import pretrained
from cyb_jax.methods import Method
from cyb_jax.partitioning.mesh import check_batch, data_shards, make_mesh
from cyb_jax.training.metrics import MetricsLog, NoLog, format_seconds, read_metrics, summarize
from cyb_jax.training.optimizer import make_optimizer, schedule
from cyb_jax.training.step import Totals, TrainState
from cyb_jax.training.strategies import Strategy, build_strategy, with_new_totals

# Steps before the trace: by then everything is compiled and the batches are read ahead.
_PROFILE_AFTER = 10


def open_store(config: Config) -> TokenStore:
  """The token store of a config, for a run that has none yet: opened, or prepared first where it is missing.

  Raises:
    InputError: it is another one than the config asks for, or too small for one window.
  """
  data = config.data
  if data.store and (pathlib.Path(data.store).exists() or is_store(data.store)):
    store = TokenStore.open(data.store)
    _check_store(store, config)
  else:
    store = prepare(data.task, config.tokenizer, data.store or None, options=config.task_options())
  store.require("train", data.sequence_length)
  if "validation" not in store.splits:
    raise InputError(
      f"data.task: {data.task!r} gave no validation split: too few documents for 1% of them by hash (train has"
      f" {store.description['splits']['train']['documents']}); give more text, or smaller documents (text_files:"
      " data.options=unit=line)"
    )
  return store


def find_store(config: Config) -> TokenStore | None:
  """The token store of a config where it is prepared already, else None; nothing is written.

  Raises:
    InputError: data.store is another one than the config asks for.
  """
  data = config.data
  if data.store:
    return open_store(config) if pathlib.Path(data.store).exists() or is_store(data.store) else None
  try:
    return prepare(data.task, config.tokenizer, options=config.task_options(), write=False)
  except InputError:  # neither the store nor what it would be made from
    return None


def open_batches(config: Config, store: TokenStore, rows: np.ndarray | None = None) -> TrainBatches:
  """The batches of a run; of each `rows`, None: all of them."""
  return TrainBatches(
    store,
    sequence_length=config.data.sequence_length,
    batch_size=config.data.batch_size,
    seed=config.data.seed,
    fraction=config.data.fraction,
    rows=rows,
  )


def abstract_batch(config: Config, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of a batch of so many windows."""
  names = {"tokens": "int32", "targets": "int32", "weights": "float32"}
  if config.data.document_mask:
    names["segment_ids"] = "int32"
  shape = rows, config.data.sequence_length
  return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in names.items()}


def num_steps(config: Config, batches: TrainBatches) -> int:
  """Steps of a run: those of the config, or as many as make its epochs."""
  # Rounded first: 3 passes over a third must not become one step more than one pass over the whole.
  return config.train.steps or math.ceil(round(config.train.epochs * batches.steps_per_epoch, 6))


def _check_store(store: TokenStore, config: Config) -> None:
  data, found = config.data, store.description
  if data.task != found["task"]:
    raise InputError(f"data.task: {data.task!r}, but the token store in {store.path} holds {found['task']!r}")
  settled = settle_options(data.task, config.task_options())
  for name in config.task_options():  # those that aren't given are the store's own
    if name not in PLACES and settled[name] != found["options"][name]:
      raise InputError(
        f"data.options: {name}={settled[name]}, but the token store in {store.path} was prepared with"
        f" {name}={found['options'][name]}"
      )
  spec = config.tokenizer
  wanted = spec if trained_pieces(spec) else open_tokenizer(spec).describe()["sha256"]
  if wanted != found["tokenizer_from"]:
    raise InputError(
      f"data.tokenizer: {spec!r} ({wanted[:24]}), but the token store in {store.path} was made with"
      f" {found['tokenizer_from'][:24]}; give that tokenizer, or another data.store"
    )


def train(config: Config, workdir: str | os.PathLike, *, profile: int = 0, cluster: Cluster = ALONE) -> dict[str, Any]:
  """Trains, or continues to train, and evaluates.

  Args:
    config: validated.
    workdir: the run's folder; made here, after everything that can be checked was.
    profile: how many steps to trace into WORKDIR/profile, after the first ten.
    cluster: the hosts that train together; all call this.

  Returns:
    The last evaluation, as evaluation.json holds it.

  Raises:
    InputError: bad input; nothing was written.
    Interrupted: a signal came; everything is saved.
    StorageError: the disk failed, by being full for instance; what was saved before is whole.
    DivergedError: `train.max_skipped` steps in a row weren't finite; what was saved before is good.
  """
  with runs.Lock(workdir) if cluster.index == 0 else contextlib.nullcontext() as lock:
    return _train(config, workdir, lock, profile, cluster)


def _train(
  config: Config, workdir: str | os.PathLike, lock: runs.Lock | None, profile: int, cluster: Cluster
) -> dict[str, Any]:
  cluster.agree(_facts(config, workdir))
  if profile and storage.in_bucket(workdir):
    raise InputError(f"--profile: {profile}, but no trace can be written to {workdir}; take a folder on a disk")
  if cluster.index == 0:  # of the others it would be the same, and some file systems bear one writer at a time
    runs.check_workdir(workdir, config)
  cluster.barrier()
  mesh = make_mesh(config.parallelism)
  shards = data_shards(mesh)
  check_batch(config.data.batch_size, shards * config.optimizer.accumulate)
  meta = runs.newest_meta(workdir)
  found = None
  if meta is None:
    if config.init_from:
      found = pretrained.open_pretrained(config.init_from)
    pieces = trained_pieces(config.tokenizer)
    config.decoder_config(pieces)
    if not config.data.store:  # told before it is prepared
      _check_targets(config, config.build_method(), has_targets(config.data.task))
  # A store that all share is prepared by one.
  if config.data.store and cluster.index:
    cluster.barrier()
  store = runs.open_recorded_store(meta, config.data.store) or open_store(config)
  if config.data.store and not cluster.index:
    cluster.barrier()
  runs.check_fingerprint(store, meta)
  # Hosts may have prepared their own, and take their time.
  trained = None if meta is None else meta["train_tokens"]
  cluster.agree({"token store": store.fingerprint, "tokens trained on": trained}, seconds=None)
  local = config.parallelism.strategy == "pmap"
  method = config.build_method(store.vocab_size, data_shards=1 if local else shards)
  steps = num_steps(config, open_batches(config, store))
  if found is not None:
    found.check(method, store.tokenizer)
  _check_targets(config, method, store.has_prefixes("train"))
  _tell_prefixes(config, method, store)
  _check_attention(config, method, mesh)
  folder = storage.place(workdir)
  if lock is not None:
    folder = runs.start_workdir(workdir, config, store.tokenizer, lock, meta)
  cluster.barrier()
  if not storage.in_bucket(folder):
    cluster.same_folder(folder)
  with jax.default_matmul_precision(config.precision.matmul):
    return _Loop(config, folder, mesh, store, method, steps, profile, found, cluster).run()


def _check_targets(config: Config, method: Method, there: bool) -> None:
  """Raises InputError where a method learns targets behind prefixes, and the task has none."""
  if method.learns_targets and not there:
    raise InputError(
      f"data.task: {config.data.task!r} has no targets behind prefixes: all of its tokens have weight 1; take a task of"
      f" questions and answers, such as 'commonsense_qa' or 'synthetic_questions', or another method.pause_places than"
      f" {method.config.pause_places!r}"
    )


def _tell_prefixes(config: Config, method: Method, store: TokenStore) -> None:
  """Warns where windows have more prefixes than the method has room for."""
  length = config.data.sequence_length
  most = method.prefixes_at_most(length)
  if not method.learns_targets or most is None:
    return
  for split in store.splits:
    counts = store.prefixes(split, length)
    beyond = int(np.maximum(counts - most, 0).sum())
    if beyond:
      logging.warning(
        "%s: %d of its %d prefixes get no pauses: a window of %d tokens has room for those of %d",
        split, beyond, int(counts.sum()), length, most,
      )  # fmt: skip


def _check_attention(config: Config, method: Method, mesh: Mesh) -> None:
  """Raises InputError where a kernel that is asked for by name can't run here: told while tracing, and so before
  anything is written.
  """
  if method.decoder.config.attention in ("auto", "xla"):
    return

  def loss(params, batch):
    return method.loss(params, batch, jax.random.key(0), 0).loss

  with jax.set_mesh(mesh):
    jax.eval_shape(loss, runs.abstract_params(method, mesh), abstract_batch(config, config.data.batch_size))


def _facts(config: Config, workdir: str | os.PathLike) -> dict[str, Any]:
  """What all hosts of a run must have alike."""
  source = json.loads(configs.to_json(config))
  # Where the tokens lie may differ; what they are is compared when they are there. But all hosts wait for a store that
  # is given.
  source["data"] |= {"store": "a folder" if config.data.store else ""}
  return {
    "config": source,
    "workdir": str(workdir),
    **own_facts(),
  }


@dataclasses.dataclass
class _Pending:
  """A line of metrics whose numbers may still be on their way from the device."""

  step: int
  totals: Totals
  skipped_in_a_row: jax.Array


class _Clock:
  """Measures between the times at which numbers were ready, since steps are dispatched long before they run."""

  def __init__(self, ahead: Prefetch, step: int):
    self._ahead, self._step = ahead, step
    self._ready, self._waited = time.perf_counter(), ahead.waited

  def lap(self, step: int) -> tuple[int, float, float]:
    """(steps, seconds, share of them spent waiting for data) since the lap before; call it when `step` is done."""
    now, waited = time.perf_counter(), self._ahead.waited
    seconds = max(now - self._ready, 1e-9)
    lap = step - self._step, seconds, min(1.0, (waited - self._waited) / seconds)
    self._step, self._ready, self._waited = step, now, waited
    return lap


class _Trace:
  """A profiler trace that is ended whatever ends the run."""

  def __init__(self, folder: pathlib.Path):
    self._folder, self._running = folder / "profile", False

  def start(self) -> None:
    jax.profiler.start_trace(str(self._folder))
    self._running = True

  def stop(self) -> None:
    if self._running:
      jax.profiler.stop_trace()
    self._running = False

  def __enter__(self) -> _Trace:
    return self

  def __exit__(self, *_) -> None:
    self.stop()


class _Loop:
  def __init__(
    self,
    config: Config,
    folder: pathlib.Path,
    mesh: Mesh,
    store: TokenStore,
    method: Method,
    steps: int,
    profile: int,
    found: pretrained.Pretrained | None,
    cluster: Cluster,
  ):
    self.config, self.folder, self.store, self.method = config, folder, store, method
    self.steps, self.devices, self.cluster = steps, mesh.size, cluster
    width = method.decoder.config.d_model
    self.schedule = schedule(config.optimizer, steps, width)
    optimizer = make_optimizer(config.optimizer, steps, width, new_rate=config.tuning.new_rate)
    self.strategy: Strategy = build_strategy(config, method, optimizer, mesh)
    self.batches = open_batches(config, store, self.strategy.rows(config.data.batch_size))
    self.own = self.strategy.own(config.data.batch_size)
    # Evaluation runs under jit whatever the strategy.
    shards = data_shards(mesh)
    self.evaluator = Evaluator(config.build_method(store.vocab_size, data_shards=shards), mesh)
    self.peak = peak_flops(mesh.devices.flat[0])
    self.warned = False
    self.profile = profile
    self.found = found  # what a run that has no checkpoint yet starts from

  def run(self) -> dict[str, Any]:
    checkpoints = runs.checkpoints_in(self.folder, keep=self.config.train.keep, cluster=self.cluster)
    with contextlib.closing(checkpoints), _signals() as stopped:
      state, start, seen = self._start(checkpoints)
      log = NoLog()
      if self.cluster.index == 0:
        log = MetricsLog(self.folder, start, tensorboard=self.config.train.tensorboard)
      with contextlib.closing(log), Prefetch(self._read, start, self.steps) as ahead, _Trace(self.folder) as trace:
        state, seen = self._steps(state, start, seen, ahead, log, checkpoints, stopped, trace)
      record = self.cluster.broadcast(self.cluster.index == 0 and self._last_evaluation())
      if not record:  # somebody has removed the metrics of a finished run
        meta, limit = self._meta(self.steps, seen), self.config.train.last_eval_limit
        record = self._evaluate(state, self.steps, meta, limit=limit or None, last=True)
      if self.cluster.index == 0:
        with writing(f"{self.folder / 'evaluation.json'}"):
          runs.write_evaluation(self.folder, record)
      return record

  def _start(self, checkpoints) -> tuple[TrainState, int, int]:
    """The state to go on from; the order in which parameters are looked for is told in `cyb_jax.interop.pretrained`."""
    self._log_size()
    steps = self.cluster.broadcast(self.cluster.index == 0 and checkpoints.steps())
    if not steps:
      params = None
      if self.found is not None:
        wanted = self.strategy.abstract().params
        params = pretrained.parameters(self.found, self.method, wanted, self.config.train.seed)
      state = self.strategy.init(params)
      state = self._calibrated(state)
      return state, 0, 0
    meta = checkpoints.meta(steps[-1])
    restored = checkpoints.restore(steps[-1], self.strategy.abstract())
    # Each host counts what it reads; host 0 what was read before.
    seen = meta["train_tokens"] if self.cluster.index == 0 else 0
    return self.strategy.place(restored.state), restored.step, seen

  def _log_size(self) -> None:
    data, method, abstract = self.config.data, self.method, self.strategy.abstract()
    counts = count_parameters(method)
    trained = f" ({counts['trained']:,} trained)" if counts["trained"] < counts["total"] else ""
    logging.info(
      "%s: %s parameters%s, %s MiB of parameters and optimizer state a device; %d steps of %d x %d tokens, %d slots"
      " each, %s MFLOPs a token (%s as executed), on %d %s",
      method.name,
      f"{counts['total']:,}",
      trained,
      f"{(bytes_per_device(abstract.params) + bytes_per_device(abstract.opt_state)) / 2**20:,.1f}",
      self.steps,
      data.batch_size,
      data.sequence_length,
      method.num_slots,
      f"{method.train_flops(data.sequence_length) / 1e6:,.1f}",
      f"{method.train_flops(data.sequence_length, executed=True) / 1e6:,.1f}",
      self.devices,
      jax.devices()[0].device_kind,
    )

  def _calibrated(self, state: TrainState) -> TrainState:
    """A fresh state, its parameters adjusted to the first batches where the method wants that."""
    method = self.evaluator.method
    if not method.calibration_batches:
      if self.found is not None and method.decides:
        method.tell_start(self.strategy.params(state), [self.evaluator.put(self._read(0))])
      return state
    logical = self.strategy.logical(state)
    batches = (self.evaluator.put(self._read(step)) for step in range(method.calibration_batches))
    params = method.calibrate(self.strategy.params(state), batches)
    params = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, logical.params)
    return self.strategy.place(dataclasses.replace(logical, params=params))

  def _steps(
    self,
    state: TrainState,
    start: int,
    seen: int,
    ahead: Prefetch,
    log: MetricsLog | NoLog,
    checkpoints,
    stopped: list[int],
    trace: _Trace,
  ) -> tuple[TrainState, int]:
    train = self.config.train
    pending: _Pending | None = None
    clock = _Clock(ahead, start)
    for step in range(start + 1, self.steps + 1):
      batch = next(ahead)
      if step == start + 1:
        logging.info("compiling the step")
      seen += int(np.count_nonzero(batch["weights"][self.own]))
      if self.profile and step == start + _PROFILE_AFTER + 1:
        trace.start()
      state = self.strategy.step(state, self.strategy.put(batch))
      if self.profile and step == min(start + _PROFILE_AFTER + self.profile, self.steps) > start + _PROFILE_AFTER:
        jax.block_until_ready(state.step)
        trace.stop()
      if step == start + 1 < self.steps:
        # The first call compiles: the clock of the first line starts behind it.
        jax.block_until_ready(state.step)
        clock = _Clock(ahead, step)
      if pending is not None:
        # Only now, with the next step under way, are the numbers waited for.
        self._log(log, pending, clock)
        pending = None
      last = step == self.steps
      validates = train.eval_every > 0 and step % train.eval_every == 0 and not last
      stopping = self.cluster.stops(bool(stopped))
      saves = last or stopping or (train.checkpoint_every > 0 and step % train.checkpoint_every == 0)
      if last or step % train.log_every == 0:
        checkpoints.check()
        # A copy: the next step donates what it is given.
        pending = _Pending(step, state.totals, state.skipped_in_a_row + 0)
        state = with_new_totals(self.strategy, state)
      if not (validates or saves):
        continue
      if pending is not None:
        self._log(log, pending, clock)
        pending = None
      meta, loss = self._meta(step, seen), None
      if validates or last:
        limit = train.last_eval_limit if last else train.eval_limit
        record = self._evaluate(state, step, meta, limit=limit or None, last=last)
        loss = record["loss"]
        if last and 0 < train.eval_every < step and train.eval_limit != train.last_eval_limit:
          # The best checkpoint is the best on the same windows.
          loss = self._evaluate(state, step, meta, limit=train.eval_limit or None)["loss"]
        log.write(record)
        logging.info("step %d: validation perplexity %.3f", step, record["perplexity"])
        # During which a signal may have come.
        stopping = stopping or self.cluster.stops(bool(stopped))
      if saves or stopping:
        in_a_row = self._check_skipped(step, state.skipped_in_a_row)
        if in_a_row and not (stopping or last):
          # These parameters may be what the steps fail on: they must not push out the ones from before.
          logging.warning("step %d: not saved, since the last %d steps were not applied", step, in_a_row)
        else:
          log.flush()
          checkpoints.save(step, self.strategy.logical(state), meta, loss=loss)
      if stopping and not last:
        checkpoints.wait()
        cause = f"signal {stopped[0]}" if stopped else "another host was asked to stop"
        raise Interrupted(f"{cause}: saved at step {step} of {self.steps}; the same command continues")
      clock = _Clock(ahead, step)
    if not self.steps and not self.cluster.broadcast(self.cluster.index == 0 and checkpoints.steps()):
      meta = self._meta(0, 0)
      record = self._evaluate(state, 0, meta, limit=train.last_eval_limit or None, last=True)
      log.write(record)
      checkpoints.save(0, self.strategy.logical(state), meta, loss=record["loss"])
    checkpoints.wait()
    return state, seen

  def _read(self, step: int) -> dict[str, np.ndarray]:
    batch = self.batches(step)
    return with_segment_ids(batch, self.store.end_id) if self.config.data.document_mask else batch

  def _meta(self, step: int, seen: int) -> dict[str, Any]:
    """Of a checkpoint; `seen`: the tokens that this host has read. All hosts must call it."""
    run = step * self.config.data.batch_size * self.config.data.sequence_length
    return {
      "train_tokens": sum(self.cluster.gather(seen)),
      "train_slots": step * self.config.data.batch_size * self.method.train_slots(self.config.data.sequence_length),
      "train_flops": float(run * self.method.train_flops(self.config.data.sequence_length)),
      "store": self.store.fingerprint,
      "store_path": str(self.store.path),
      "version": __version__,
    }

  def _evaluate(
    self, state: TrainState, step: int, meta: dict[str, Any], limit: int | None = None, *, last: bool = False
  ) -> dict[str, Any]:
    return evaluate_split(
      self.evaluator,
      self.strategy.params(state),
      self.store,
      self.config,
      split="validation",
      step=step,
      meta=meta,
      limit=limit,
      autoregressive_windows=AUTOREGRESSIVE_WINDOWS if last else 0,
    )

  def _last_evaluation(self) -> dict[str, Any] | None:
    """The evaluation at the last step, where metrics.jsonl has it; a finished run repeats nothing."""
    for row in reversed(read_metrics(self.folder)):
      if row["split"] == "validation" and row["step"] == self.steps:
        return row
    return None

  def _log(self, log: MetricsLog | NoLog, pending: _Pending, clock: _Clock) -> None:
    config = self.config
    row = summarize(jax.device_get(self.strategy.logical(pending.totals)))
    steps, seconds, data_wait = clock.lap(pending.step)
    tokens = steps * config.data.batch_size * config.data.sequence_length
    # None where no step ran since the clock was started, behind the first one.
    rate = tokens / seconds if steps else None
    slots = self.method.train_slots(config.data.sequence_length) / config.data.sequence_length
    flops = self.method.train_flops(config.data.sequence_length) * (rate or 0.0)
    timing = {
      "tokens_per_second": rate,
      "slots_per_second": rate * slots if rate else None,
      "mfu": flops / (self.peak * self.devices) if self.peak else None,
      "data_wait": data_wait,
      "seconds": seconds,
    }
    rate_now = float(self.schedule(pending.step - 1))
    log.write({"split": "train", "step": pending.step, **row, "learning_rate": rate_now, "timing": timing})
    line = (
      f"step {pending.step}/{self.steps}  loss {row['loss']:.4f}  perplexity {row['perplexity']:.2f}"
      f"  pauses {row['mean_pauses']:.2f}"
    )
    if rate:
      mfu = f", MFU {timing['mfu']:.1%}" if timing["mfu"] else ""
      left = format_seconds((self.steps - pending.step) * seconds / steps)
      line += (
        f"  {rate:.0f} tokens/s, {timing['slots_per_second']:.0f} slots/s{mfu}, data wait {data_wait:.0%}, {left} left"
      )
    if row["dropped_tokens"]:
      line += f"  ({row['dropped_tokens']} tokens didn't fit)"
    logging.info("%s", line)
    if row["skipped"]:
      numbers = ", ".join(map(str, row["skipped_steps"])) + ", ..." * (row["skipped"] > len(row["skipped_steps"]))
      logging.warning("%d steps were not applied, their loss or gradient isn't finite: %s", row["skipped"], numbers)
    self._check_skipped(pending.step, pending.skipped_in_a_row)
    self._warn_of_collapse(pending.step, row["latency"])

  def _check_skipped(self, step: int, skipped_in_a_row: jax.Array) -> int:
    """How many of the last steps weren't applied; too many of them stop the run, whose checkpoints are good ones."""
    in_a_row = int(self.strategy.logical(skipped_in_a_row))
    if in_a_row >= self.config.train.max_skipped:
      raise DivergedError(
        f"step {step}: the loss or the gradient of the last {in_a_row} steps isn't finite (train.max_skipped ="
        f" {self.config.train.max_skipped}); none of them was applied, and the checkpoints in {self.folder} are from"
        " before. A lower optimizer.learning_rate may do"
      )
    return in_a_row

  def _warn_of_collapse(self, step: int, latency: list[float]) -> None:
    share, slot = max((share, slot) for slot, share in enumerate(latency))
    # Without a step that was applied the shares are nan, and compare as not above.
    if not self.method.decides or len(latency) == 1 or not share > self.config.train.collapse_warning:
      self.warned = False
    elif not self.warned:
      logging.warning(
        "step %d: the stopping distribution has collapsed: %.1f%% of the answers are read after %d pauses. Token+pause"
        " inputs (method.pause_input), a lower rate or the DP loss may keep it open",
        step,
        100 * share,
        slot,
      )
      self.warned = True


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """SIGTERM and SIGINT are noted in the list, and the loop stops after its step; a second one kills as usual."""
  stopped: list[int] = []
  previous = {}

  def note(number, _frame):
    stopped.append(number)
    signal.signal(number, previous[number])
    logging.warning("signal %d: finishing the step, then saving", number)

  # Only the main thread may set handlers; elsewhere (a notebook's worker) signals are somebody else's.
  with contextlib.suppress(ValueError):
    for number in (signal.SIGTERM, signal.SIGINT):
      previous[number] = signal.signal(number, note)
  try:
    yield stopped
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
