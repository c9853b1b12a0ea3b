"""Evaluates a run's checkpoint on a split of its token store.

python -m cyb_jax.evaluate --workdir=DIR [--split=test] [--checkpoint=best] [--limit=100] [--omega=1:1:1:1]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import flags

from cyb_jax import programs
from cyb_jax.errors import InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_SPLIT = flags.DEFINE_string("split", "validation", "validation, test or train.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "last, best, or a step.")
_LIMIT = flags.DEFINE_integer("limit", 0, "At most so many windows; 0: the split whole.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Windows at a time; 0: as in training.")
_OMEGA = flags.DEFINE_string("omega", "", "What the world grants, W weights such as 1:1:1:1; '': all slots, always.")
_STORE = flags.DEFINE_string("store", "", "The token store, where it has moved since the training.")


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  if not _WORKDIR.value:
    raise InputError("--workdir: not given; name the run's folder")
  for flag in (_LIMIT, _BATCH_SIZE):
    if flag.value < 0:
      raise InputError(f"--{flag.name}: {flag.value} is negative")
  import dataclasses

  import jax

  from cyb_jax import runs, sharding, training
  from cyb_jax.evaluation import Evaluator, evaluate_split
  from cyb_jax.stopping import normalize

  checkpoint = _CHECKPOINT.value
  if checkpoint not in ("last", "best"):
    if not checkpoint.isdecimal():
      raise InputError(f"--checkpoint: {checkpoint!r} is none of 'last', 'best' and a step's number")
    checkpoint = int(checkpoint)
  mesh = sharding.make_mesh(_mesh_of_evaluation())
  run = runs.load(_WORKDIR.value, checkpoint, mesh)
  omega = None
  if _OMEGA.value:
    try:
      omega = [float(x) for x in _OMEGA.value.split(":")]
      normalize(omega, run.method.num_slots, name="omega")
    except ValueError as error:
      raise InputError(f"--omega: {_OMEGA.value!r} won't do for {run.method.num_slots} slots ({error})") from None
  config = run.config
  if _STORE.value:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, store=_STORE.value))
  store = training.open_store(config)
  if store.fingerprint != run.meta["store"]:
    raise InputError(f"--store: {store.path} is another token store than the one that {_WORKDIR.value} was trained on")
  batch_size = _BATCH_SIZE.value or config.data.batch_size
  sharding.check_batch(batch_size, sharding.data_shards(mesh))
  with jax.default_matmul_precision(config.precision.matmul):
    record = evaluate_split(
      Evaluator(run.method, mesh, omega),
      run.params,
      store,
      config,
      split=_SPLIT.value,
      step=run.step,
      meta=run.meta,
      limit=_LIMIT.value or None,
      batch_size=batch_size,
    )
  runs.write_evaluation(_WORKDIR.value, record)
  return record


def _mesh_of_evaluation():
  from cyb_jax.config import ParallelismConfig

  # All devices share the batch: parameters that trained sharded need not be so to be read.
  return ParallelismConfig()


def run() -> None:
  """Console script."""
  programs.launch(main)


if __name__ == "__main__":
  run()
