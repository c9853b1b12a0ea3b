"""Benchmark of the token store: the speed of reading batches."""

from __future__ import annotations

from typing import Any

from absl import flags

from cyb_jax import command_line
from cyb_jax.benchmarks import timing


def define_flags() -> None:
  command_line.define_path("store", "", "A token store; '': generated tokens.")
  flags.DEFINE_integer("sequence_length", 1024, "Tokens in a window.")
  flags.DEFINE_integer("batch_size", 64, "Windows in a batch.")
  timing.define_flags()


def data() -> dict[str, Any]:
  """Measures the tokens per second of `TrainBatches` in one thread."""
  import pathlib
  import tempfile

  from cyb_jax.data import TokenStore, TrainBatches, prepare

  repeats = timing.repeats()
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

    seconds = timing.side_by_side({"read": read}, repeats)["read"]
    tokens = count * flags.FLAGS.batch_size * flags.FLAGS.sequence_length
    return {
      "benchmark": "data",
      "sequence_length": flags.FLAGS.sequence_length,
      "batch_size": flags.FLAGS.batch_size,
      "store_tokens": store.num_tokens("train"),
      "timing": {"tokens_per_second": tokens / seconds, "seconds": seconds},
    }
