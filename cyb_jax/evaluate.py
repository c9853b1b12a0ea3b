"""Evaluates a run's checkpoint on a split of its token store.

python -m cyb_jax.evaluate --workdir=DIR [--split=test] [--checkpoint=best] [--limit=100] [--omega=1:1:1:1]
    [--context=self_paced]
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from cyb_jax import programs
from cyb_jax.errors import InputError

if TYPE_CHECKING:
  from jax.sharding import Mesh

  from cyb_jax.config import Config
  from cyb_jax.data import TokenStore


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "The run's folder.")
  flags.DEFINE_string("split", "validation", "validation, test or train.")
  flags.DEFINE_string("checkpoint", "last", "last, best, or a step.")
  flags.DEFINE_integer("limit", 0, "At most so many windows; 0: the split whole.")
  flags.DEFINE_integer("batch_size", 0, "Windows at a time; 0: as in training.")
  flags.DEFINE_string("omega", "", "What the world grants, W weights such as 1:1:1:1; '': all slots, always.")
  flags.DEFINE_string(
    "context", "constant", "constant: every token is followed by all its pauses; self_paced: by those alone that the"
    " model asks for."
  )  # fmt: skip
  flags.DEFINE_string("store", "", "The token store, where it has moved since the training.")


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  args = flags.FLAGS
  workdir = programs.required_flag("workdir", "name the run's folder")
  for name in ("limit", "batch_size"):
    if args[name].value < 0:
      raise InputError(f"--{name}: {args[name].value} is negative")
  import jax

  from cyb_jax import runs
  from cyb_jax.evaluation import Evaluator, evaluate_split
  from cyb_jax.stopping import normalize

  checkpoint, omega = programs.checkpoint_flag(), programs.weights_flag("omega")
  mesh = reading_mesh()
  run = runs.load(workdir, checkpoint, mesh)
  if omega is not None:
    if not run.method.decides:
      raise InputError(f"--omega: {args.omega!r} is set, but method {run.method.name!r} doesn't decide when it stops")
    try:
      normalize(omega, run.method.num_slots, name="omega")
    except ValueError as error:
      raise InputError(f"--omega: {args.omega!r} won't do for {run.method.num_slots} slots ({error})") from None
  if args.context not in ("constant", "self_paced"):
    raise InputError(f"--context: {args.context!r} is none of 'constant', 'self_paced'")
  if args.context == "self_paced" and run.method.num_slots == 1:
    raise InputError(f"--context: 'self_paced', but method {run.method.name!r} has no pauses; leave it at 'constant'")
  config = run.config
  store = open_store(config, run.meta)
  with jax.default_matmul_precision(config.precision.matmul):
    record = evaluate_split(
      Evaluator(run.method, mesh, omega, args.context),
      run.params,
      store,
      config,
      split=args.split,
      step=run.step,
      meta=run.meta,
      limit=args.limit or None,
      batch_size=rows_at_once(config, mesh),
    )
  try:
    runs.write_evaluation(workdir, record)
  except OSError as error:
    logging.warning("evaluation.json can't be written to %s: %s", workdir, error.strerror)
  return record


def reading_mesh() -> Mesh:
  """All devices share the batch: parameters that trained sharded need not be so to be read."""
  from cyb_jax import sharding
  from cyb_jax.config import ParallelismConfig

  return sharding.make_mesh(ParallelismConfig())


def open_store(config: Config, meta: dict[str, Any]) -> TokenStore:
  """The token store that a run was trained on, from where it lay or from the flag `--store`.

  Args:
    config: of the run.
    meta: of its checkpoint.
  """
  import dataclasses

  from cyb_jax import runs, training

  given = flags.FLAGS.store
  if given:
    if not os.path.exists(given):
      raise InputError(f"--store: {given} is not there")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, store=given))
  store = runs.open_recorded_store(meta, config.data.store) or training.open_store(config)
  runs.check_fingerprint(store, meta)
  return store


def rows_at_once(config: Config, mesh: Mesh) -> int:
  """The batch's size by the flag `--batch_size`, rounded up to what the devices share evenly."""
  from cyb_jax import sharding

  shards = sharding.data_shards(mesh)
  # Rows that fill a batch up have weight 0, so that any size will do.
  return -(-(flags.FLAGS.batch_size or config.data.batch_size) // shards) * shards


def run() -> None:
  """Console script."""
  define_flags()
  programs.launch(main)


if __name__ == "__main__":
  run()
