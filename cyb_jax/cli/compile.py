"""Compiles a config's training step, evaluation and decoding for a TPU slice, without a TPU, and reports their costs.

cyb-compile --config=experiments/NAME.py --topology=v5e:4x4 [--steps=train,evaluate,decode] [--config.a.b=...]

The exit code is 1 if a step needs more memory than a chip has. The JSON then has the excess and the changes that would
help; with --verify, each change is compiled to check that it helps.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from cyb_jax import command_line
from cyb_jax.cli import compilation_cache, flag_values, launching
from cyb_jax.compilation import STEPS, topologies
from cyb_jax.errors import Failed, InputError


def define_flags() -> None:
  config_flags.DEFINE_config_file(
    "config", None, "The config file: experiments/NAME.py, or experiments/NAME.py:ARGUMENTS."
  )
  flags.DEFINE_string("topology", None, "The slice: v5e:4x4, v6e:8x8, v4:2x2x2, v5p:2x2x2, ...")
  flags.DEFINE_list(
    "steps", list(STEPS), "The steps that are compiled: some of train, evaluate, decode; by default all of the method."
  )
  flags.DEFINE_integer(
    "decode_batch", 0, "The batch size of decoding; 0: 8, or the number of data shards if it is larger."
  )
  flags.DEFINE_bool("verify", False, "If memory is short, also compile each change that is advised.")
  command_line.define_path("hlo", "", "A folder for the optimised HLO of each step; '': it isn't written.")


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  args = flags.FLAGS
  topology = flag_values.required_flag("topology", "give the slice, such as v5e:4x4")
  unknown = [step for step in args.steps if step not in STEPS]
  if unknown or not args.steps:
    raise InputError(f"--steps: {','.join(args.steps)!r} must be some of {','.join(STEPS)}")
  flag_values.check_not_negative("decode_batch")
  source = command_line.config_flag()
  topologies.check_topology(topology)
  topologies.check_libtpu()
  compilation_cache.enable("")  # jax can't read a program back for a chip that is not here, and would warn of that
  from cyb_jax.methods import Decoding
  from cyb_jax.studies.resolution import resolve

  method = resolve(source).build_method()
  if args.hlo:
    try:
      os.makedirs(args.hlo, exist_ok=True)
    except OSError as error:
      raise InputError(f"--hlo: {args.hlo} can't be written to ({error.strerror}); give another folder") from None
  from cyb_jax.compilation import steps

  chosen = list(args.steps)
  if not args["steps"].present and not isinstance(method, Decoding):
    chosen.remove("decode")
  result = steps.compile_steps(
    source, topology, chosen, decode_batch=args.decode_batch, hlo=args.hlo, verify=args.verify
  )
  if not result["fits"]:
    raise Failed(_excess_message(result), result)
  return result


def _excess_message(result: dict[str, Any]) -> str:
  parts = []
  for step in STEPS:
    if step in result and not result[step]["fits"]:
      over = result[step]["over_bytes"]
      parts.append(f"{step} needs {over / 2**30:.2f} GiB more" if over is not None else f"{step} doesn't fit")
  return (
    f"{result['topology']} has {result['hbm_bytes'] / 2**30:.2f} GiB per chip: {', '.join(parts)}; changes that help,"
    f" most effective first: {', '.join(change['change'] for change in result['advice'])}"
  )


def run() -> None:
  """Console script."""
  # The environment must be set before the flags are parsed, because config files import jax.
  topologies.set_environment()
  define_flags()
  launching.launch(main)


if __name__ == "__main__":
  run()
