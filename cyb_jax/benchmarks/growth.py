"""Benchmark of growth: how the time of each part grows with a size, next to the work that a formula counts.

| part | size | time | work |
|---|---|---|---|
| length | T, at a constant number of tokens in a batch | a training step | executed FLOPs |
| slots | W | a training step | executed FLOPs |
| decode | tokens of the prompt | a new token, after the prompt was read | entries of the cache |
| prepare | documents | preparing a token store | tokens |
| evaluate | windows | evaluating a split | tokens |
| statistics | windows | the pause statistics of a split | tokens |

`exponent` is the slope of the least-squares line through (log size, log seconds), and `work_exponent` that of the work:
time that grows faster than its work has a larger exponent. Fixed costs make the exponent of the time smaller. The sizes
of a part are timed in turn (A B C A B C and so on) after a warm-up of each, and the median of a size is used.
"""

from __future__ import annotations

import functools
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from cyb_jax import command_line
from cyb_jax.benchmarks import models, timing, variants
from cyb_jax.errors import InputError, did_you_mean

if TYPE_CHECKING:  # otherwise imported where it is used, so that --help is fast
  import ml_collections

  from cyb_jax.configs import Config

# The default sizes.
_SIZES = {
  "length": (64, 128, 256, 512, 1024),
  "slots": (1, 2, 4, 8),
  "decode": (64, 128, 256, 512, 1024),
  "prepare": (1_000, 4_000, 16_000),
  "evaluate": (256, 512, 1_024),
  "statistics": (256, 512, 1_024),
}
_TOKENS = 4_096  # in a batch of the part "length"
_NEW_TOKENS = 32


class Point(NamedTuple):
  """A size of a part.

  Attributes:
    size: the size.
    work: what the formula counts, in any unit.
    seconds: a function that does the work once and returns its time.
  """

  size: int
  work: float
  seconds: Callable[[], float]


def define_flags() -> None:
  config_flags.DEFINE_config_file("config", "experiments/quickstart.py", "A config file whose method has pauses.")
  flags.DEFINE_list("parts", list(_SIZES), f"The parts to measure, of {', '.join(_SIZES)}.")
  flags.DEFINE_list("sizes", [], "Sizes in place of the default sizes, for a single part.")
  timing.define_flags()


def growth() -> dict[str, Any]:
  """A row for each part.

  Raises:
    InputError: the input is invalid; nothing was compiled or written.
  """
  args = flags.FLAGS
  repeats, parts = timing.repeats(), _sizes()
  source = command_line.config_flag()
  rows = []
  for part, sizes in parts.items():
    logging.info("%s: sizes %s", part, ", ".join(map(str, sizes)))
    with _PARTS[part](source, sizes) as points:
      rows.append({"part": part, **measure(points, repeats)})

  import jax

  return {
    "benchmark": "growth",
    "config": config_flags.get_config_filename(args["config"]),
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "repeats": repeats,
    "timing": {"rows": rows},
  }


def _sizes() -> dict[str, tuple[int, ...]]:
  """The sizes of the requested parts."""
  args = flags.FLAGS
  for part in args.parts:
    if part not in _SIZES:
      raise InputError(f"--parts: {part!r} is unknown; {did_you_mean(part, _SIZES)}")
  if not args.parts:
    raise InputError(f"--parts: empty; give some of {', '.join(_SIZES)}")
  if not args.sizes:
    return {part: _SIZES[part] for part in args.parts}
  if len(args.parts) != 1:
    raise InputError(f"--sizes: needs a single part in --parts, not {','.join(args.parts)}")
  sizes = tuple(int(size) if size.isdecimal() else 0 for size in args.sizes)
  if len(set(sizes)) < 2 or min(sizes) < 1:
    raise InputError(f"--sizes: {','.join(args.sizes)!r} must be at least two different whole numbers of at least 1")
  return {args.parts[0]: sizes}


def measure(points: Sequence[Point], repeats: int) -> dict[str, Any]:
  """The median seconds of each point, and the exponents of time and work.

  Args:
    points: at least two points with different sizes.
    repeats: how often each point is timed.
  """
  for point in points:
    point.seconds()
  times = timing.in_turn([point.seconds for point in points], repeats)
  seconds = [statistics.median(mine) for mine in times]
  sizes, work = [point.size for point in points], [point.work for point in points]
  return {
    "sizes": sizes,
    "seconds": seconds,
    "work": work,
    "exponent": exponent(sizes, seconds),
    "work_exponent": exponent(sizes, work),
  }


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
  """The slope of the least-squares line through (log size, log value)."""
  return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


@contextmanager
def _steps(
  source: ml_collections.ConfigDict, sizes: Sequence[int], fields: Callable[[int], list[str]]
) -> Iterator[list[Point]]:
  """Training steps of the config with the fields of each size."""
  from cyb_jax.benchmarks.train import Contender
  from cyb_jax.studies.resolution import resolve

  with ExitStack() as stack:
    points = []
    for size in sizes:
      config = resolve(command_line.override(source, fields(size)))
      contender = stack.enter_context(Contender(config, "", 0))
      costs = contender.method.costs(config.data.sequence_length)
      points.append(
        Point(size, costs.train_executed.total * contender.tokens, lambda one=contender: one.block(4).median)
      )
    yield points


def _length(source: ml_collections.ConfigDict, sizes: Sequence[int]) -> Any:
  def fields(length: int) -> list[str]:
    return [f"data.sequence_length={length}", f"data.batch_size={max(1, _TOKENS // length)}"]

  return _steps(source, sizes, fields)


def _slots(source: ml_collections.ConfigDict, sizes: Sequence[int]) -> Any:
  # A method with pauses is a plain model if it has none.
  plain = variants.with_setting(source, "baseline")

  @contextmanager
  def points() -> Iterator[list[Point]]:
    with ExitStack() as stack:
      found = []
      for size in sizes:
        base, fields = (plain, []) if size == 1 else (source, [f"method.pauses={size - 1}"])
        found += stack.enter_context(_steps(base, [size], lambda _, fields=fields: fields))
      yield found

  return points()


@contextmanager
def _decode(source: ml_collections.ConfigDict, sizes: Sequence[int]) -> Iterator[list[Point]]:
  """Seconds per token after prompts of each size."""
  import jax

  from cyb_jax.benchmarks.train import own_vocabulary
  from cyb_jax.generation import Sampler, SamplingOptions, default_mode
  from cyb_jax.studies.resolution import resolve

  config, method, params = models.fresh(source, own_vocabulary(resolve(source)))
  sampler = Sampler(method, SamplingOptions(mode=default_mode(method)))

  def seconds(size: int) -> float:
    prompt = np.random.default_rng(0).integers(0, method.vocab_size, size).tolist()
    state = sampler.start(params, [prompt], max_new_tokens=_NEW_TOKENS)
    state = jax.block_until_ready(sampler.advance(params, state, 1))
    spent = timing.timed(lambda: jax.block_until_ready(sampler.advance(params, state, _NEW_TOKENS * method.num_slots)))
    return spent / (_NEW_TOKENS - 1)

  with jax.default_matmul_precision(config.precision.matmul):
    yield [Point(size, size + _NEW_TOKENS / 2, functools.partial(seconds, size)) for size in sizes]


@contextmanager
def _prepare(source: ml_collections.ConfigDict, sizes: Sequence[int]) -> Iterator[list[Point]]:
  """Preparing stores of generated documents."""
  del source
  from cyb_jax.data import prepare

  with tempfile.TemporaryDirectory() as scratch:

    def store(size: int) -> Any:
      with tempfile.TemporaryDirectory(dir=scratch) as folder:
        options = {"documents": size}
        return prepare("synthetic_sums", "bytes", pathlib.Path(folder) / "store", options=options, progress=False)

    tokens = {size: sum(map(store(size).num_tokens, ("train", "validation", "test"))) for size in sizes}
    yield [Point(size, tokens[size], functools.partial(timing.timed, functools.partial(store, size))) for size in sizes]


@contextmanager
def _evaluate(source: ml_collections.ConfigDict, sizes: Sequence[int]) -> Iterator[list[Point]]:
  """Evaluating windows with fresh parameters."""
  from cyb_jax.evaluation import Evaluator, evaluate_split

  with _split_of(source, max(sizes)) as (config, method, params, mesh, store):
    evaluator = Evaluator(method, mesh)
    meta = dict.fromkeys(("train_tokens", "train_slots", "train_flops"), 0)

    def evaluate(size: int) -> Any:
      return evaluate_split(evaluator, params, store, config, split="train", step=0, meta=meta, limit=size)

    yield _windows(sizes, config, evaluate)


@contextmanager
def _statistics(source: ml_collections.ConfigDict, sizes: Sequence[int]) -> Iterator[list[Point]]:
  """The pause statistics of windows with fresh parameters."""
  from cyb_jax.evaluation import PauseStatistics, statistics_of_split

  with _split_of(source, max(sizes)) as (config, method, params, mesh, store):
    found = PauseStatistics(method, mesh, store.tokenizer)

    def evaluate(size: int) -> Any:
      return statistics_of_split(found, params, store, config, split="train", step=0, limit=size)

    yield _windows(sizes, config, evaluate)


def _windows(sizes: Sequence[int], config: Config, evaluate: Callable[[int], Any]) -> list[Point]:
  length = config.data.sequence_length
  return [
    Point(size, size * length, functools.partial(timing.timed, functools.partial(evaluate, size))) for size in sizes
  ]


@contextmanager
def _split_of(source: ml_collections.ConfigDict, windows: int) -> Iterator[tuple[Config, Any, Any, Any, Any]]:
  """(config, method, parameters, mesh, store), with a store of generated documents that has enough windows."""
  import jax

  from cyb_jax.data import prepare
  from cyb_jax.partitioning.mesh import make_mesh

  with tempfile.TemporaryDirectory() as scratch:
    # A document has more than 100 tokens.
    documents = 64 + windows * source.data.sequence_length // 100
    path = pathlib.Path(scratch) / "store"
    store = prepare("synthetic_sums", "bytes", path, options={"documents": documents}, progress=False)
    config, method, params = models.fresh(source, store.vocab_size)
    mesh = make_mesh(config.parallelism)
    with jax.default_matmul_precision(config.precision.matmul):
      yield config, method, params, mesh, store


_PARTS: dict[str, Callable[[ml_collections.ConfigDict, Sequence[int]], Any]] = {
  "length": _length,
  "slots": _slots,
  "decode": _decode,
  "prepare": _prepare,
  "evaluate": _evaluate,
  "statistics": _statistics,
}
