"""Runs a benchmark and prints the measurements as JSON.

cyb-benchmark readout [--slots=131072 --width=768 --vocabulary=50304]   memory against a dense readout, and time
cyb-benchmark attention [--tokens=1024 --num_slots=4]                   attention alone, visible and hidden pauses
cyb-benchmark data [--store=DIR]                                        tokens/s of reading batches
cyb-benchmark train --config=experiments/NAME.py [--variant=baseline]   tokens/s, MFU, memory of the training step
cyb-benchmark decode --workdir=DIR [--batch_sizes=1,8,32]               tokens/s and slots/s of generation, by mode
cyb-benchmark scoring --workdir=DIR [--requests=64]                     requests/s of downstream scoring, batched or not
cyb-benchmark serve --workdir=DIR [--clients=64]                        cyb-serve with many clients, and with one
cyb-benchmark memory [--workdir=DIR] [--seconds=8]                      growth of the resident memory, by activity
cyb-benchmark faults [--kills=100]                                      a run that is killed, against an undisturbed run
cyb-benchmark faults --plan=soak [--minutes=60]                         the same with signals, disks, clocks, damage
cyb-benchmark growth [--config=experiments/NAME.py]                     time against size: T, W, context, corpus, split
cyb-benchmark sharding [--devices=8]                                    a step on every mesh, against one device

`cyb-benchmark NAME --help` shows the flags of a benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cyb_jax.benchmarks import attention, data, decode, faults, growth, memory, readout, scoring, serve, sharding, train
from cyb_jax.cli import launching
from cyb_jax.errors import InputError, did_you_mean

# By name: the function that defines the benchmark's own flags, and the function that runs it.
BENCHMARKS = {
  "readout": (readout.define_flags, readout.readout),
  "attention": (attention.define_flags, attention.attention),
  "data": (data.define_flags, data.data),
  "decode": (decode.define_flags, decode.decode),
  "scoring": (scoring.define_flags, scoring.scoring),
  "serve": (serve.define_flags, serve.serve),
  "train": (train.define_flags, train.train),
  "memory": (memory.define_flags, memory.memory),
  "faults": (faults.define_flags, faults.faults),
  "growth": (growth.define_flags, growth.growth),
  "sharding": (sharding.define_flags, sharding.sharding),
}


def main(argv: Sequence[str]) -> dict[str, Any]:
  if len(argv) != 2 or argv[1] not in BENCHMARKS:
    given = " ".join(argv[1:])
    raise InputError(f"benchmark: {given!r} is unknown; {did_you_mean(given, BENCHMARKS)}")
  _, measure = BENCHMARKS[argv[1]]
  return measure()


def run() -> None:
  """Console script."""
  launching.launch(main, parts={name: define_flags for name, (define_flags, _) in BENCHMARKS.items()})


if __name__ == "__main__":
  run()
