"""Benchmark of decoding: the speed of generation, by mode and batch size.

A step is one iteration of the sampler's loop: in mode self_paced one slot of every row, in mode constant all W slots of
a token. For each mode and batch size the time from the prompts to N new tokens is measured, and the time to the first
token. The modes alternate (A B C A B C and so on), so that drift of the machine affects all equally. They are compared
with a decoder without a cache, which runs the training forward over all tokens of the row for each new token.

A step is bound by memory bandwidth, not by arithmetic: every parameter and the full cache are read once, for a few
slots. `bytes_per_step` counts these bytes, and `bandwidth_share` is their rate relative to a large matrix-vector
product on the same device; it exceeds 1 if a small model stays in the processor's cache.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

from absl import flags, logging

from cyb_jax.benchmarks import models, timing
from cyb_jax.errors import InputError

_READ_BYTES = 1 << 28
_READ_COLUMNS = 1024


def define_flags() -> None:
  models.define_flags()
  flags.DEFINE_list("batch_sizes", "1,8,32", "The numbers of rows that are decoded together.")
  flags.DEFINE_integer("prompt_tokens", 32, "The number of tokens of each prompt, drawn uniformly.")
  flags.DEFINE_integer("new_tokens", 32, "The number of tokens that each row generates.")
  flags.DEFINE_string("read", "sample", "The rule of reading a token: sample or threshold.")
  timing.define_flags()


def decode() -> dict[str, Any]:
  """A row for each batch size and mode, and their ratios.

  Raises:
    InputError: the input is invalid; nothing was compiled.
  """
  args = flags.FLAGS
  repeats = timing.repeats()
  batch_sizes = _batch_sizes()

  import jax

  from cyb_jax.generation.abilities import check_decodes

  method, params, matmul = models.chosen()
  check_decodes(method)
  bandwidth = _read_bandwidth(repeats)
  rows, ratios = [], []
  with jax.default_matmul_precision(matmul):
    for size in batch_sizes:
      mine, ratio = _measure(method, params, size, repeats, bandwidth)
      rows += mine
      ratios.append(ratio)
  return {
    "benchmark": "decode",
    "source": models.source(),
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "parameter_bytes": _bytes(params),
    "peak_memory_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    "num_slots": method.num_slots,
    "prompt_tokens": args.prompt_tokens,
    "new_tokens": args.new_tokens,
    "read": args.read,
    "repeats": repeats,
    "timing": {"read_bytes_per_second": bandwidth, "rows": rows, "ratios": ratios},
  }


def _batch_sizes() -> list[int]:
  """The flag `--batch_sizes`, after the other flags were checked.

  Raises:
    InputError: a flag's value is invalid.
  """
  args = flags.FLAGS
  for name in ("prompt_tokens", "new_tokens"):
    if args[name].value < 1:
      raise InputError(f"--{name}: {args[name].value} must be at least 1")
  try:
    batch_sizes = [int(size) for size in args.batch_sizes]
  except ValueError:
    batch_sizes = []
  if not batch_sizes or min(batch_sizes) < 1:
    raise InputError(f"--batch_sizes: {','.join(args.batch_sizes)!r} must be whole numbers of at least 1")
  if args.read not in ("sample", "threshold"):
    raise InputError(f"--read: {args.read!r} is not one of 'sample', 'threshold'")
  models.check_flags()
  return batch_sizes


def _modes(method: Any) -> tuple[str, ...]:
  """The distinct modes. Methods without pauses, or with latent thoughts, have only one."""
  from cyb_jax.generation import default_mode
  from cyb_jax.generation.abilities import is_recurrent

  one = method.num_slots == 1 or is_recurrent(method)
  return (default_mode(method),) if one else ("self_paced", "constant", "none")


def _measure(
  method: Any, params: Any, size: int, repeats: int, bandwidth: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """A row for each mode at a batch size, and the ratios between them."""
  import numpy as np

  args = flags.FLAGS
  drawn = np.random.default_rng(0).integers(0, method.vocab_size, (size, args.prompt_tokens))
  prompts = [row.tolist() for row in drawn]
  generators = {mode: _Generator(method, params, prompts, mode, args.read, args.new_tokens) for mode in _modes(method)}
  logging.info("batch size %d: compiled", size)
  uncached = _uncached_forward(method, params, size, args.prompt_tokens + args.new_tokens)
  functions: list[Callable[[], float]] = [uncached]
  for generator in generators.values():
    functions += [generator.first_token, generator.all_tokens]
  rerun, *times = timing.in_turn(functions, repeats)
  rows = [
    {"batch_size": size, "mode": mode, **generator.describe(first, total, bandwidth)}
    for (mode, generator), first, total in zip(generators.items(), times[::2], times[1::2])
  ]
  return rows, _ratios(size, {row["mode"]: row for row in rows}, statistics.median(rerun))


def _ratios(size: int, by_mode: dict[str, dict[str, Any]], rerun_seconds: float) -> dict[str, Any]:
  """The ratios between the modes, and between a decoder without a cache and a cached token."""
  last = by_mode.get("constant") or by_mode["none"]
  ratio = {"batch_size": size, "rerun_over_cached_token": rerun_seconds / last["seconds_per_token"]}
  if len(by_mode) > 1:
    paced, constant = by_mode["self_paced"], by_mode["constant"]
    ratio["all_slots_step_over_one_slot_step"] = constant["seconds_per_step"] / paced["seconds_per_step"]
    ratio["self_paced_over_constant_tokens_per_second"] = paced["tokens_per_second"] / constant["tokens_per_second"]
  return ratio


class _Generator:
  """One mode at one batch size; compiled on construction."""

  def __init__(self, method: Any, params: Any, prompts: list[list[int]], mode: str, read: str, new: int):
    import jax

    from cyb_jax.generation import Sampler, SamplingOptions

    self._sampler = Sampler(method, SamplingOptions(mode=mode, read=read))
    self._params, self._prompts, self._new = params, prompts, new
    self._steps = new * method.num_slots
    self.all_tokens()
    self._done = jax.block_until_ready(self._state)

  def first_token(self) -> float:
    """Seconds from the prompts to the first token of all rows."""
    return self._timed(context=len(self._prompts[0]) + 1)

  def all_tokens(self) -> float:
    """Seconds from the prompts to the last token of all rows."""
    return self._timed(context=None)

  def _timed(self, context: int | None) -> float:
    import jax

    start = time.perf_counter()
    state = self._sampler.start(self._params, self._prompts, max_new_tokens=self._new, context=context)
    self._state = self._sampler.advance(self._params, state, self._steps)
    jax.block_until_ready(self._state.num_generated)
    return time.perf_counter() - start

  def describe(self, first: list[float], total: list[float], bandwidth: float) -> dict[str, Any]:
    """A row of the result, from the seconds of each round."""
    from cyb_jax.generation.pacing import Constant

    state, rows = self._done, len(self._prompts)
    tokens, pauses = rows * self._new, int(state.pauses.sum())
    pacing = self._sampler.pacing
    constant = isinstance(pacing, Constant)
    slots = tokens * pacing.layout.num_slots if constant else tokens + pauses
    seconds, iterations = statistics.median(total), int(state.iterations)
    # Both times include the prefill and the first step, so their difference is the time of the other steps.
    between = [(b - a) for a, b in zip(first, total)]
    steps = iterations - (1 if constant else 1 + int(state.pauses[:, 0].max()))
    per_step = statistics.median(between) / steps if steps else seconds
    moved = _bytes(self._params) + state.cache.nbytes
    return {
      "tokens_per_second": tokens / seconds,
      "slots_per_second": slots / seconds,
      "seconds_to_first_token": statistics.median(first),
      "seconds_per_token": statistics.median(between) / (self._new - 1) if self._new > 1 else seconds,
      "mean_pauses": pauses / tokens,
      "steps": iterations,
      "seconds_per_step": per_step,
      "cache_bytes": state.cache.nbytes,
      "bytes_per_step": moved,
      "bandwidth_share": moved / per_step / bandwidth,
    }


def _uncached_forward(method: Any, params: Any, rows: int, tokens: int) -> Callable[[], float]:
  """A function that measures the seconds of a decoder without a cache for one token: all slots of all tokens run, and
  one token is read.
  """
  import jax
  import jax.numpy as jnp

  @jax.jit
  def forward(params, tokens):
    hidden = method.hidden(params, {"tokens": tokens})[:, -1]
    return method.token_scores(params, hidden, jnp.arange(method.num_slots))

  batch = jnp.zeros((rows, tokens), jnp.int32)
  jax.block_until_ready(forward(params, batch))

  def timed() -> float:
    start = time.perf_counter()
    jax.block_until_ready(forward(params, batch))
    return time.perf_counter() - start

  return timed


def _read_bandwidth(repeats: int) -> float:
  """The bytes per second that a large matrix-vector product reads."""
  import jax
  import jax.numpy as jnp

  matrix = jnp.ones((_READ_BYTES // 4 // _READ_COLUMNS, _READ_COLUMNS))
  product = jax.jit(lambda matrix: matrix @ jnp.ones(_READ_COLUMNS))
  seconds = timing.side_by_side({"read": lambda: jax.block_until_ready(product(matrix))}, repeats)
  return _READ_BYTES / seconds["read"]


def _bytes(params: Any) -> int:
  import jax

  return functools.reduce(lambda total, x: total + x.nbytes, jax.tree.leaves(params), 0)
