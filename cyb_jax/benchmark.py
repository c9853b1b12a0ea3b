"""Measures, and prints JSON.

cyb-benchmark readout [--slots=131072 --width=768 --vocabulary=50304]   memory against a dense readout, and time
cyb-benchmark data [--store=DIR]                                        tokens/s that batches are read at
cyb-benchmark faults [--kills=100]                                      one run killed so often, against one left alone
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from cyb_jax import programs
from cyb_jax.benchmarks import faults
from cyb_jax.errors import InputError


def define_flags() -> None:
  flags.DEFINE_integer("slots", 131072, "readout: slots.")
  flags.DEFINE_integer("width", 768, "readout: d_model.")
  flags.DEFINE_integer("vocabulary", 50304, "readout: rows of the unembedding.")
  flags.DEFINE_integer("timed_slots", 1024, "readout: slots of the timed runs, which a dense one must fit too.")
  flags.DEFINE_string("store", "", "data: a token store; '': generated tokens.")
  flags.DEFINE_integer("sequence_length", 1024, "data: tokens in a window.")
  flags.DEFINE_integer("batch_size", 64, "data: windows in a batch.")
  flags.DEFINE_integer("repeats", 5, "How often each time is taken; medians are printed.")
  faults.define_flags()


def readout() -> dict[str, Any]:
  """XLA's temporary memory for value and gradient at full size; the time of both at a size that a dense one fits."""
  import jax
  import jax.numpy as jnp

  from cyb_jax.readout import slot_scores
  from cyb_jax.stopping import SlotScores

  def chunked(hidden, unembedding, row, targets):
    scores = slot_scores(hidden, unembedding, targets, row, prior=0.9)
    return sum(x.sum() for x in jax.tree.leaves(scores))

  def dense(hidden, unembedding, row, targets):
    rows = jnp.concatenate([unembedding, row[None]])
    scores = SlotScores.from_logits(hidden @ rows.T, targets, -1, prior=0.9)
    return sum(x.sum() for x in jax.tree.leaves(scores))

  def arguments(slots):
    return (
      jax.ShapeDtypeStruct((slots // 4, 4, flags.FLAGS.width), jnp.float32),
      jax.ShapeDtypeStruct((flags.FLAGS.vocabulary, flags.FLAGS.width), jnp.float32),
      jax.ShapeDtypeStruct((flags.FLAGS.width,), jnp.float32),
      jax.ShapeDtypeStruct((slots // 4,), jnp.int32),
    )

  def compiled(function, slots):
    return jax.jit(jax.value_and_grad(function, (0, 1, 2))).lower(*arguments(slots)).compile()

  for name in ("slots", "timed_slots", "width", "vocabulary"):
    value, unit = flags.FLAGS[name].value, 4 if name.endswith("slots") else 1
    if value < unit or value % unit:
      raise InputError(f"--{name}: {value} must be a positive multiple of {unit}")
  memory = {
    name: compiled(function, flags.FLAGS.slots).memory_analysis().temp_size_in_bytes
    for name, function in (("chunked", chunked), ("dense", dense))
  }
  keys = jax.random.split(jax.random.key(0), 4)
  values = [
    0.02 * jax.random.normal(key, x.shape, x.dtype) if x.dtype == jnp.float32 else jnp.zeros(x.shape, x.dtype)
    for key, x in zip(keys, arguments(flags.FLAGS.timed_slots))
  ]
  timed = {name: compiled(f, flags.FLAGS.timed_slots) for name, f in (("chunked", chunked), ("dense", dense))}
  seconds = side_by_side({name: lambda p=program: jax.block_until_ready(p(*values)) for name, program in timed.items()})
  return {
    "benchmark": "readout",
    "slots": flags.FLAGS.slots,
    "width": flags.FLAGS.width,
    "vocabulary": flags.FLAGS.vocabulary,
    "temporary_bytes": memory["chunked"],
    "temporary_gib": memory["chunked"] / 2**30,
    "dense_temporary_gib": memory["dense"] / 2**30,
    "device": jax.devices()[0].device_kind,
    "timing": {
      "slots": flags.FLAGS.timed_slots,
      "chunked_seconds": seconds["chunked"],
      "dense_seconds": seconds["dense"],
      "chunked_over_dense": seconds["chunked"] / seconds["dense"],
    },
  }


def data() -> dict[str, Any]:
  """Tokens per second of `TrainBatches` in one thread."""
  import pathlib
  import tempfile

  from cyb_jax.data import TokenStore, TrainBatches, prepare

  with tempfile.TemporaryDirectory() as scratch:
    if flags.FLAGS.store:
      store = TokenStore.open(flags.FLAGS.store)
    else:
      store = prepare("synthetic_sums", "bytes", pathlib.Path(scratch) / "store", options={"documents": 20000})
    batches = TrainBatches(
      store, sequence_length=flags.FLAGS.sequence_length, batch_size=flags.FLAGS.batch_size, seed=0
    )
    count = 50

    def read():
      for step in range(count):
        batches(step)

    seconds = side_by_side({"read": read})["read"]
    tokens = count * flags.FLAGS.batch_size * flags.FLAGS.sequence_length
    return {
      "benchmark": "data",
      "sequence_length": flags.FLAGS.sequence_length,
      "batch_size": flags.FLAGS.batch_size,
      "store_tokens": store.num_tokens("train"),
      "timing": {"tokens_per_second": tokens / seconds, "seconds": seconds},
    }


def side_by_side(functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
  """Median seconds of each, taken in turn (A B A B ...) so that a drifting machine is fair to all; one run before."""
  times: dict[str, list[float]] = {name: [] for name in functions}
  for function in functions.values():
    function()
  for _ in range(flags.FLAGS.repeats):
    for name, function in functions.items():
      start = time.perf_counter()
      function()
      times[name].append(time.perf_counter() - start)
  return {name: statistics.median(values) for name, values in times.items()}


BENCHMARKS = {"readout": readout, "data": data, "faults": faults.faults}


def main(argv: Sequence[str]) -> dict[str, Any]:
  if len(argv) != 2 or argv[1] not in BENCHMARKS:
    raise InputError(f"benchmark: {' '.join(argv[1:])!r} is none of {', '.join(BENCHMARKS)}")
  if flags.FLAGS.repeats < 1:
    raise InputError(f"--repeats: {flags.FLAGS.repeats} must be at least 1")
  return BENCHMARKS[argv[1]]()


def run() -> None:
  """Console script."""
  define_flags()
  programs.launch(main, words=1)


if __name__ == "__main__":
  run()
