"""Trains a run, or continues it, and evaluates it.

python -m cyb_jax.train --config=experiments/quickstart.py --workdir=DIR [--config.train.steps=100]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from cyb_jax import programs
from cyb_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "experiments/NAME.py, or experiments/NAME.py:ARGUMENTS")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; an interrupted run in it is continued.")
_PROFILE = flags.DEFINE_integer(
  "profile", 0, "Trace so many steps, after ten, into WORKDIR/profile (TensorBoard, Perfetto)."
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  source = programs.config_of(_CONFIG)
  if not _WORKDIR.value:
    raise InputError("--workdir: not given; name the run's folder")
  if _PROFILE.value < 0:
    raise InputError(f"--profile: {_PROFILE.value} is negative")
  from cyb_jax import config, training

  return training.train(config.freeze(source), _WORKDIR.value, profile=_PROFILE.value)


def run() -> None:
  """Console script."""
  programs.launch(main)


if __name__ == "__main__":
  run()
