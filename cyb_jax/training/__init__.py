"""Training: the step, the two ways to run it, the loop."""

from cyb_jax.training.estimate import dry_run
from cyb_jax.training.loop import find_store, open_store, train
from cyb_jax.training.optimizer import make_optimizer, schedule
from cyb_jax.training.step import Totals, TrainState, init_state, train_step, trained_part, unbox, with_trained
from cyb_jax.training.strategies import JitStrategy, PmapStrategy, build_strategy

__all__ = [
  "JitStrategy",
  "PmapStrategy",
  "Totals",
  "TrainState",
  "build_strategy",
  "dry_run",
  "find_store",
  "init_state",
  "make_optimizer",
  "open_store",
  "schedule",
  "train",
  "train_step",
  "trained_part",
  "unbox",
  "with_trained",
]
