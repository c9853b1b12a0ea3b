"""Benchmark of the training step: speed, share of the device's peak, and memory, of several configs side by side.

The step is that of cyb-train, under its strategy (jit or pmap), with its optimizer and donation, on batches that a
thread reads ahead. There is no additional synchronisation for the measurement:

    dispatch   s1 s2 s3 s4 s5 s6        the host is up to two steps ahead of the device
    wait for         s1 s2 s3 s4        after the dispatch of step k + 2, for step k

The time of a step is the difference between the moments at which the previous step and this step are observed to be
ready. The host waits for one number that a small program copies from the new state, because the state itself is donated
to the next step. So a step's time includes everything that delays the device: slow dispatch and late batches.

The rows alternate, with one block of steps each (A B C A B C and so on), so that drift of the machine affects all
equally; all their states are on the devices at the same time. The first step of a block starts the clock, and two more
steps follow the timed ones, so that later steps are in flight when the host waits for a timed step. Before all timed
blocks there is one block of each row, because first executions allocate memory.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from cyb_jax import command_line
from cyb_jax.benchmarks import timing, variants
from cyb_jax.errors import InputError

if TYPE_CHECKING:  # otherwise imported where it is used, so that --help is fast
  import ml_collections

  from cyb_jax.configs import Config

_AHEAD = 2
_PROFILED_STEPS = 3


def define_flags() -> None:
  config_flags.DEFINE_config_file(
    "config", None, "The config file: experiments/NAME.py, or experiments/NAME.py:ARGUMENTS."
  )
  variants.define_flag()
  command_line.define_path("store", "", "A token store; '': the store of data.store, or random tokens.")
  flags.DEFINE_integer(
    "vocabulary",
    0,
    "The vocabulary size of random tokens; 0: decoder.vocab_size, or the size of data.tokenizer or of the preset.",
  )
  flags.DEFINE_integer("steps", 20, "The number of timed steps in a block.")
  flags.DEFINE_integer("blocks", 5, "The number of blocks of steps, alternating with those of the variants.")
  flags.DEFINE_float(
    "peak_tflops", 0.0, "The peak rate of a device, in 1e12 operations per second; 0: the known rate of the device."
  )
  command_line.define_path("profile", "", "Profile folder: additional steps of row N (from 0) are traced to FOLDER/N.")


def train() -> dict[str, Any]:
  """A row for the config and for each variant.

  Raises:
    InputError: the input is invalid; nothing was compiled or written.
  """
  args = flags.FLAGS
  for name, least in (("steps", 2), ("blocks", 1), ("vocabulary", 0), ("peak_tflops", 0)):
    if not args[name].value >= least:
      raise InputError(f"--{name}: {args[name].value} must be at least {least}")
  source = command_line.config_flag()

  import jax

  # Times compilation, not a look-up in a cache that an earlier run has filled. JAX reads this option only once, at its
  # first compilation.
  jax.config.update("jax_enable_compilation_cache", False)
  names, contenders = ["", *args.variant], _contenders(source)
  if args.profile:
    try:
      pathlib.Path(args.profile).mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise InputError(f"--profile: {args.profile} can't be written to: {error.strerror}") from None
  with contextlib.ExitStack() as stack:
    for name, contender in zip(names, contenders):
      stack.enter_context(contender)
      logging.info("%s: compiled in %.1f s", name or "the config", contender.compile_seconds)
    blocks = _in_turn(contenders)
    peak, alone = args.peak_tflops * 1e12 or None, len(contenders) == 1
    rows = [
      {"variant": name, **contender.describe(mine, peak, alone=alone)}
      for name, contender, mine in zip(names, contenders, blocks)
    ]
    for number, contender in enumerate(contenders if args.profile else ()):
      with jax.profiler.trace(str(pathlib.Path(args.profile) / str(number))):
        contender.block(_PROFILED_STEPS)
  return {
    "benchmark": "train",
    "config": config_flags.get_config_filename(args["config"]),
    "overrides": config_flags.get_override_values(args["config"]),
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "blocks": args.blocks,
    "steps": args.steps,
    "rows": rows,
    "timing": {"ratios": _ratios(names, contenders, blocks)},
  }


def _contenders(source: ml_collections.ConfigDict) -> list[Contender]:
  """The config itself, and its variants from the flag `--variant`."""
  from cyb_jax.studies.resolution import resolve

  args = flags.FLAGS
  contenders = []
  for variant in ("", *args.variant):
    with variants.named(variant):
      contenders.append(Contender(resolve(variants.applied(source, variant)), args.store, args.vocabulary))
  return contenders


def _in_turn(contenders: Sequence[Contender]) -> list[list[Block]]:
  """The timed blocks of each contender, in turn, after one untimed block of each."""
  args = flags.FLAGS
  for contender in contenders:
    contender.block(args.steps)
  return timing.in_turn([functools.partial(x.block, args.steps) for x in contenders], args.blocks)


def _ratios(
  names: Sequence[str], contenders: Sequence[Contender], blocks: Sequence[Sequence[Block]]
) -> list[dict[str, Any]]:
  """The tokens per second of each contender relative to the config itself, over the blocks."""
  per_token = [[x.median / contender.tokens for x in mine] for contender, mine in zip(contenders, blocks)]
  ratios = []
  for name, mine in zip(names, per_token):
    median, lowest, highest = timing.ratio(per_token[0], mine)
    ratios.append({"variant": name, "tokens_per_second": median, "lowest": lowest, "highest": highest})
  return ratios


class RandomTokens:
  """Batches of uniformly drawn tokens, by step number, with the interface of `data.TrainBatches`.

  Args:
    vocab_size: the vocabulary size; token 0 ends documents.
    sequence_length: T.
    rows: the number of rows of this host.
  """

  end_id = 0

  def __init__(self, vocab_size: int, sequence_length: int, rows: int):
    self._vocab_size, self._shape = vocab_size, (rows, sequence_length + 1)

  def __call__(self, step: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(step).integers(0, self._vocab_size, self._shape, np.int32)
    weights = np.ones((self._shape[0], self._shape[1] - 1), np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


@dataclasses.dataclass(frozen=True)
class Block:
  """The times of a block of steps.

  Attributes:
    seconds: the time of each step.
    waited: the seconds that the host waited for batches during the block.
  """

  seconds: tuple[float, ...]
  waited: float

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)


def run_block(step: Callable[[], Any], steps: int, waited: Callable[[], float]) -> Block:
  """Times steps that are dispatched ahead; see the docstring of the module.

  Args:
    step: dispatches a step and returns an array that is ready when the step is done.
    steps: the number of timed steps; three more steps are run.
    waited: returns the total seconds waited for batches.
  """
  under_way: collections.deque[Any] = collections.deque()
  ready: list[float] = []
  waits: list[float] = []
  for _ in range(1 + steps + _AHEAD):
    under_way.append(step())
    if len(under_way) > _AHEAD:
      under_way.popleft().block_until_ready()
      ready.append(time.perf_counter())
      waits.append(waited())
  under_way.pop().block_until_ready()  # the next row then uses the device
  return Block(tuple(np.diff(ready).tolist()), waits[-1] - waits[0])


class Contender:
  """A measured config. Entering the context compiles its step and creates its state on the devices.

  Raises:
    InputError: sizes are incompatible with each other, the devices or the store.
  """

  def __init__(self, config: Config, store: str, vocabulary: int):
    import jax

    from cyb_jax.partitioning.mesh import check_batch, data_shards, make_mesh
    from cyb_jax.training.optimizer import optimizer_of
    from cyb_jax.training.strategies import build_strategy

    self.config = config
    self._mesh = make_mesh(config.parallelism)
    shards = data_shards(self._mesh)
    check_batch(config.data.batch_size, shards * config.optimizer.accumulate)
    self._read, vocab_size = _open_batches(config, store, vocabulary)
    local = config.parallelism.strategy == "pmap"
    self.method = config.build_method(vocab_size, data_shards=1 if local else shards)
    # The length of the schedule does not affect the cost.
    optimizer = optimizer_of(config, self.method, config.train.steps or 1000)
    self._strategy = build_strategy(config, self.method, optimizer, self._mesh)
    self._mark = jax.jit(lambda step: step + 1)
    self._resources = contextlib.ExitStack()

  @property
  def tokens(self) -> int:
    """The number of tokens in a batch."""
    return self.config.data.batch_size * self.config.data.sequence_length

  def __enter__(self) -> Contender:
    import jax

    from cyb_jax.data import Prefetch

    with jax.default_matmul_precision(self.config.precision.matmul):
      self._state = self._strategy.init()
      batch = self._strategy.shard_batch(self._read(0))
      jax.block_until_ready(self._state)
      start = time.perf_counter()
      self._program = self._strategy.compile(self._state, batch)
      self.compile_seconds = time.perf_counter() - start
    self._ahead = self._resources.enter_context(Prefetch(self._read))
    return self

  def __exit__(self, *_) -> None:
    self._resources.close()
    del self._state

  def block(self, steps: int) -> Block:
    """Runs the next steps; see `run_block`."""
    return run_block(self._step, steps, lambda: self._ahead.waited)

  def _step(self) -> Any:
    self._state = self._strategy.step(self._state, self._strategy.shard_batch(next(self._ahead)))
    return self._mark(self._state.step)

  def describe(self, blocks: Sequence[Block], peak: float | None, *, alone: bool) -> dict[str, Any]:
    """The row; `peak`: the peak rate of a device, None: the known rate; `alone`: whether this is the only row."""
    import jax

    from cyb_jax.costs.flops import peak_flops
    from cyb_jax.costs.memory import bytes_per_device, program_memory

    state = self._strategy.global_state(self._state)
    memory = program_memory(self._program)
    config, method, device = self.config, self.method, self._mesh.devices.flat[0]
    peak = peak or peak_flops(device)
    length = config.data.sequence_length
    costs = method.costs(length)
    slots_per_token, flops = costs.train_slots / length, costs.train.total
    lower, median, upper = timing.quartiles([x for block in blocks for x in block.seconds])
    rate = self.tokens / median
    return {
      "method": method.name,
      "strategy": config.parallelism.strategy,
      "devices": self._mesh.size,
      "device": device.device_kind,
      "dtype": config.activation_dtype,
      "vocabulary": method.vocab_size,
      "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
      "sequence_length": length,
      "batch_size": config.data.batch_size,
      "slots_per_token": slots_per_token,
      "model_flops_per_token": flops,
      "executed_flops_per_token": costs.train_executed.total,
      "peak_tflops": peak / 1e12 if peak else None,
      "state_bytes": bytes_per_device((state.params, state.opt_state)),
      "program_memory_bytes": memory.peak if memory else None,
      "peak_memory_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use") if alone else None,
      "timing": {
        "tokens_per_second": rate,
        "slots_per_second": rate * slots_per_token,
        "mfu": rate * flops / (peak * self._mesh.size) if peak else None,
        "step_seconds": median,
        "step_seconds_quartiles": [lower, upper],
        "data_wait": sum(x.waited for x in blocks) / sum(sum(x.seconds) for x in blocks),
        "compile_seconds": self.compile_seconds,
      },
    }


def _open_batches(config: Config, store: str, vocabulary: int) -> tuple[Callable[[int], dict[str, np.ndarray]], int]:
  """The function that reads a step's batch, and the vocabulary size."""
  from cyb_jax.data import TokenStore, TrainBatches, with_segment_ids

  data = config.data
  if store and not pathlib.Path(store).exists():
    raise InputError(f"--store: {store} does not exist; give the folder of a token store")
  store = store or data.store
  if store:
    opened = TokenStore.open(store)
    if vocabulary:
      raise InputError(
        f"--vocabulary: {vocabulary} is set, but the token store has {opened.vocab_size} entries; leave it out"
      )
    vocab_size, end_id = opened.vocab_size, opened.end_id
    batches = TrainBatches(
      opened,
      sequence_length=data.sequence_length,
      batch_size=data.batch_size,
      seed=data.seed,
      fraction=data.fraction,
    )
  else:
    vocab_size, end_id = vocabulary or own_vocabulary(config), RandomTokens.end_id
    batches = RandomTokens(vocab_size, data.sequence_length, data.batch_size)
  if not data.document_mask:
    return batches, vocab_size
  return lambda step: with_segment_ids(batches(step), end_id), vocab_size


def own_vocabulary(config: Config) -> int:
  """The vocabulary size of a run of this config, as far as it is known without its data."""
  from cyb_jax.data.tokenizers import ByteTokenizer, trained_pieces

  spec = config.data.tokenizer
  named = ByteTokenizer.vocab_size if spec == "bytes" else trained_pieces(spec)
  return config.decoder.get("vocab_size") or named or config.decoder_config().vocab_size
