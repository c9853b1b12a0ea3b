"""Evaluates a run's checkpoint on a split of its token store.

python -m cyb_jax.evaluate --workdir=DIR [--split=test] [--checkpoint=best] [--limit=100] [--omega=1:1:1:1]
    [--context=self_paced]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import flags, logging

from cyb_jax import programs
from cyb_jax.errors import InputError


def define_flags() -> None:
  programs.define_reading_flags()
  flags.DEFINE_string("omega", "", "What the world grants, W weights such as 1:1:1:1; '': all slots, always.")
  flags.DEFINE_string(
    "context", "constant", "constant: every token is followed by all its pauses; self_paced: by those alone that the"
    " model asks for."
  )  # fmt: skip


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  args = flags.FLAGS
  workdir = programs.required_flag("workdir", "name the run's folder")
  programs.check_not_negative("limit", "batch_size")
  import jax

  from cyb_jax import runs
  from cyb_jax.evaluation import Evaluator, evaluate_split
  from cyb_jax.stopping import normalize

  checkpoint, omega = programs.checkpoint_flag(), programs.weights_flag("omega")
  mesh = programs.reading_mesh()
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
  store = programs.open_store(config, run.meta)
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
      batch_size=programs.rows_at_once(config, mesh),
    )
  try:
    runs.write_evaluation(workdir, record)
  except OSError as error:
    logging.warning("evaluation.json can't be written to %s: %s", workdir, error.strerror)
  return record


def run() -> None:
  """Console script."""
  define_flags()
  programs.launch(main)


if __name__ == "__main__":
  run()
