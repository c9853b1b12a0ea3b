"""Training: preflight checks, the trainer and its hooks, the step, the strategies that run it, and estimates of costs.

Names are imported on first use, so a program that needs one module does not import all others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from cyb_jax.training.estimate import costs_per_token, dry_run, knobs, outline
  from cyb_jax.training.optimizer import make_optimizer
  from cyb_jax.training.run_data import abstract_batch, find_store, open_store, vocabulary
  from cyb_jax.training.step import init_state, train_step, unbox
  from cyb_jax.training.strategies import build_strategy
  from cyb_jax.training.trainer import train

__all__ = [
  "abstract_batch",
  "build_strategy",
  "costs_per_token",
  "dry_run",
  "find_store",
  "init_state",
  "knobs",
  "make_optimizer",
  "open_store",
  "outline",
  "train",
  "train_step",
  "unbox",
  "vocabulary",
]

_NAMES = {
  "estimate": ("costs_per_token", "dry_run", "knobs", "outline"),
  "optimizer": ("make_optimizer",),
  "run_data": ("abstract_batch", "find_store", "open_store", "vocabulary"),
  "step": ("init_state", "train_step", "unbox"),
  "strategies": ("build_strategy",),
  "trainer": ("train",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
