"""Self-paced language models in JAX and Flax: a decoder that may abstain with "I don't know yet" and then gets another
step of compute.

The core can be used without the rest: `cyb_jax.stopping`, `cyb_jax.losses`, `cyb_jax.pauses` and `cyb_jax.readout`
import only jax, each other and `cyb_jax.partitioning.rules`.
"""

from __future__ import annotations

import importlib
import typing

if typing.TYPE_CHECKING:
  from cyb_jax import losses
  from cyb_jax.runs import Run
  from cyb_jax.stopping import SlotScores

__version__ = "0.2.0"

__all__ = ["SlotScores", "__version__", "load", "losses"]


def __getattr__(name: str) -> typing.Any:
  """Imports `losses` and `SlotScores` when they are first used, so that `import cyb_jax` does not import jax."""
  if name == "losses":
    return importlib.import_module("cyb_jax.losses")
  if name == "SlotScores":
    return importlib.import_module("cyb_jax.stopping").SlotScores
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(workdir: str, checkpoint: int | str = "last", *, base: str = "") -> Run:
  """Returns a trained run, or pretrained weights: config, method, parameters and tokenizer.

  Args:
    workdir: the work directory of a run, or anything that `cyb_jax.interop.pretrained.load` accepts.
    checkpoint: the step of the checkpoint, or 'last' or 'best'; see
      `cyb_jax.interop.pretrained.load_run`.
    base: the model from which a run with a frozen decoder started, if it has been moved.

  Raises:
    InputError: there is no such run or checkpoint, or its base can't be read.

  Example:
    >>> run = load("runs/ap")
    >>> run.config.method.name, run.method.num_slots
    ('cyb', 2)
  """
  # Imported here, so that importing only the losses is fast.
  from cyb_jax.interop import pretrained

  return pretrained.load(workdir, checkpoint=checkpoint, base=base)
