"""Benchmark of decoding: the speed of generation, by mode and batch size.

A step is one iteration of the sampler's loop: in mode self_paced one slot of every row, in mode constant all W slots of
a token. For each mode and batch size the time from the prompts to N new tokens is measured, and the time to the first
token. The modes alternate (A B C A B C and so on), so that drift of the machine affects all equally. They are compared
with a decoder without a cache, which runs the training forward over all tokens of the row for each new token. Variants
of a config (`--variant`) are measured in the same turns.

A step is bound by memory bandwidth, not by arithmetic: every parameter and the filled part of the cache (see
`cache.parts`) are read once, for a few slots. `bytes_per_step` counts these bytes, averaged over steps, and
`bandwidth_share` is their rate relative to a large matrix-vector product on the same device; it exceeds 1 if a small
model stays in the processor's cache.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags, logging

from cyb_jax.benchmarks import models, timing, variants
from cyb_jax.errors import InputError

_READ_BYTES = 1 << 28
_READ_COLUMNS = 1024


def define_flags() -> None:
  models.define_flags()
  variants.define_flag()
  flags.DEFINE_list("batch_sizes", "1,8,32", "The numbers of rows that are decoded together.")
  flags.DEFINE_integer("prompt_tokens", 32, "The number of tokens of each prompt, drawn uniformly.")
  flags.DEFINE_integer("new_tokens", 32, "The number of tokens that each row generates.")
  flags.DEFINE_string("read", "sample", "The rule of reading a token: sample or threshold.")
  timing.define_flags()


def decode() -> dict[str, Any]:
  """A row for each batch size, variant and mode, and their ratios.

  Raises:
    InputError: the input is invalid; nothing was compiled.
  """
  args = flags.FLAGS
  repeats = timing.repeats()
  batch_sizes = _batch_sizes()

  import jax

  from cyb_jax.generation.abilities import check_decodes

  chosen = models.chosen_variants()
  for model in chosen:
    with variants.named(model.variant):
      check_decodes(model.method)
  bandwidth = _read_bandwidth(repeats)
  rows, ratios, of_variants = [], [], []
  for size in batch_sizes:
    mine, ratio, of_variant = _measure(chosen, size, repeats, bandwidth)
    rows += mine
    ratios.append(ratio)
    of_variants += of_variant
  return {
    "benchmark": "decode",
    "source": models.source(),
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "parameter_bytes": _bytes(chosen[0].params),
    "variants": [{"variant": x.variant, "parameter_bytes": _bytes(x.params)} for x in chosen[1:]],
    "peak_memory_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    "num_slots": chosen[0].method.num_slots,
    "prompt_tokens": args.prompt_tokens,
    "new_tokens": args.new_tokens,
    "read": args.read,
    "repeats": repeats,
    "timing": {"read_bytes_per_second": bandwidth, "rows": rows, "ratios": ratios, "variants": of_variants},
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
  chosen: Sequence[models.Model], size: int, repeats: int, bandwidth: float
) -> tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, Any]]]:
  """A row for each variant and mode at a batch size, the ratios between modes, and those between variants."""
  import numpy as np

  args, itself = flags.FLAGS, chosen[0]
  smallest = min(model.method.vocab_size for model in chosen)
  drawn = np.random.default_rng(0).integers(0, smallest, (size, args.prompt_tokens))
  prompts = [row.tolist() for row in drawn]
  generators = {
    (model.variant, mode): _Generator(model, prompts, mode, args.read, args.new_tokens)
    for model in chosen
    for mode in _modes(model.method)
  }
  logging.info("batch size %d: compiled", size)
  functions: list[Callable[[], float]] = [_uncached_forward(itself, size, args.prompt_tokens + args.new_tokens)]
  for generator in generators.values():
    functions += [generator.first_token, generator.all_tokens]
  rerun, *times = timing.in_turn(functions, repeats)
  totals = dict(zip(generators, times[1::2]))
  rows = [
    {"batch_size": size, "variant": key[0], "mode": key[1], **generator.describe(first, totals[key], bandwidth)}
    for (key, generator), first in zip(generators.items(), times[::2])
  ]
  ratios = _ratios(size, {row["mode"]: row for row in rows if not row["variant"]}, statistics.median(rerun))
  return rows, ratios, _between_variants(size, totals)


def _between_variants(size: int, seconds: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
  """The tokens per second of variants relative to the config itself, for the modes that both have.

  Args:
    size: the batch size.
    seconds: the time of each round, from the prompts to the last token, by variant and mode.
  """
  ratios = []
  for (variant, mode), mine in seconds.items():
    if variant and ("", mode) in seconds:
      median, lowest, highest = timing.ratio(seconds["", mode], mine)
      numbers = {"tokens_per_second": median, "lowest": lowest, "highest": highest}
      ratios.append({"batch_size": size, "variant": variant, "mode": mode, **numbers})
  return ratios


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

  def __init__(self, model: models.Model, prompts: list[list[int]], mode: str, read: str, new: int):
    import jax

    from cyb_jax.generation import Sampler, SamplingOptions

    self._sampler = Sampler(model.method, SamplingOptions(mode=mode, read=read))
    self._params, self._matmul, self._prompts, self._new = model.params, model.matmul, prompts, new
    self._steps = new * model.method.num_slots
    started = self._sampler.start(self._params, self._prompts, max_new_tokens=self._new)
    self._first = int(started.cache_index.max()) + 1
    del started
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

    with jax.default_matmul_precision(self._matmul):
      start = time.perf_counter()
      state = self._sampler.start(self._params, self._prompts, max_new_tokens=self._new, context=context)
      self._state = self._sampler.advance(self._params, state, self._steps)
      jax.block_until_ready(self._state.num_generated)
      return time.perf_counter() - start

  def describe(self, first: list[float], total: list[float], bandwidth: float) -> dict[str, Any]:
    """A row of the result, from the seconds of each round."""
    import jax

    from cyb_jax.decoder.cache import mean_part, parts
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
    capacity = state.cache.capacity
    sizes = parts(jax.tree.leaves(state.cache.keys)[0])
    read = mean_part(sizes, min(self._first, capacity), min(int(state.cache_index.max()), capacity))
    moved = _bytes(self._params) + state.cache.nbytes * read / capacity
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


def _uncached_forward(model: models.Model, rows: int, tokens: int) -> Callable[[], float]:
  """A function that measures the seconds of a decoder without a cache for one token: all slots of all tokens run, and
  one token is read.
  """
  import jax
  import jax.numpy as jnp

  method, params = model.method, model.params

  @jax.jit
  def forward(params, tokens):
    hidden = method.hidden(params, {"tokens": tokens})[:, -1]
    return method.token_scores(params, hidden, jnp.arange(method.num_slots))

  batch = jnp.zeros((rows, tokens), jnp.int32)
  with jax.default_matmul_precision(model.matmul):
    jax.block_until_ready(forward(params, batch))

  def timed() -> float:
    with jax.default_matmul_precision(model.matmul):
      return timing.timed(lambda: jax.block_until_ready(forward(params, batch)))

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
