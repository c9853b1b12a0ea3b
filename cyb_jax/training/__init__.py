"""Training: the step, the two ways to run it, the loop."""

from cyb_jax.costs.memory import bytes_per_device
from cyb_jax.methods.parameters import count_parameters, trained_part, with_trained
from cyb_jax.training.estimate import Outline, costs_per_token, dry_run, knobs, outline
from cyb_jax.training.loop import train
from cyb_jax.training.optimizer import make_optimizer, schedule
from cyb_jax.training.run_data import abstract_batch, find_store, open_store, vocabulary
from cyb_jax.training.step import Totals, TrainState, init_state, train_step, unbox
from cyb_jax.training.strategies import JitStrategy, PmapStrategy, build_strategy

__all__ = [
  "JitStrategy",
  "Outline",
  "PmapStrategy",
  "Totals",
  "TrainState",
  "abstract_batch",
  "build_strategy",
  "bytes_per_device",
  "costs_per_token",
  "count_parameters",
  "dry_run",
  "find_store",
  "init_state",
  "knobs",
  "make_optimizer",
  "open_store",
  "outline",
  "schedule",
  "train",
  "train_step",
  "trained_part",
  "unbox",
  "vocabulary",
  "with_trained",
]
