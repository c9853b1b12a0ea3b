"""Evaluates a run's checkpoint on a split of its token store; or what a run would start from, on that of a config.

python -m cyb_jax.evaluate --workdir=DIR [--split=test] [--checkpoint=best] [--limit=100] [--omega=1:1:1:1]
    [--context=self_paced]
python -m cyb_jax.evaluate --init_from=WEIGHTS --config=experiments/smollm2_reviews.py:pretrained [--limit=100]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from cyb_jax import programs
from cyb_jax.errors import InputError


def define_flags() -> None:
  programs.define_model_flags()
  programs.define_reading_flags()
  config_flags.DEFINE_config_file(
    "config", None, "With --init_from: whose method, data and window; experiments/NAME.py:ARGUMENTS"
  )
  flags.DEFINE_string("omega", "", "What the world grants, W weights such as 1:1:1:1; '': all slots, always.")
  flags.DEFINE_string(
    "context", "constant", "constant: every token is followed by all its pauses; self_paced: by those alone that the"
    " model asks for."
  )  # fmt: skip


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  args = flags.FLAGS
  programs.check_not_negative("limit", "batch_size")
  if args.config is not None and not args.init_from:
    raise InputError("--config: goes with --init_from; a run has its own")
  if args.init_from and args.config is None:
    raise InputError(
      "--config: not given; it says what is read with --init_from, as experiments/smollm2_reviews.py does"
    )
  import jax

  from cyb_jax import pretrained, runs
  from cyb_jax.evaluation import Evaluator, evaluate_split
  from cyb_jax.stopping import normalize

  omega = programs.weights_flag("omega")
  mesh = programs.reading_mesh()
  config = None
  if args.init_from:
    source = programs.config_flag().to_dict()
    config = pretrained.settle(source | {"init_from": args.init_from})
  run = programs.load_model(mesh, config)
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
  if args.workdir:
    try:
      runs.write_evaluation(args.workdir, record)
    except OSError as error:
      logging.warning("evaluation.json can't be written to %s: %s", args.workdir, error.strerror)
  return record


def run() -> None:
  """Console script."""
  define_flags()
  programs.launch(main)


if __name__ == "__main__":
  run()
