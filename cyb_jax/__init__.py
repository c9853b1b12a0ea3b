"""Self-paced language models in JAX and Flax: a decoder that may say "I don't know yet" and is given another step of
compute.

The losses stand alone: `cyb_jax.stopping`, `cyb_jax.losses`, `cyb_jax.pauses` and `cyb_jax.readout` need jax and
nothing else of this package but `cyb_jax.partitioning.rules`, on which the readout stands.
"""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
  from cyb_jax.runs import Run

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def load(workdir: str, checkpoint: int | str = "last") -> Run:
  """A trained run, or weights that one could start from: config, method, parameters and tokenizer.

  See `cyb_jax.runs.load` and `cyb_jax.interop.pretrained.load`.
  """
  # Imported here, so that those who take the losses alone don't pay for the rest.
  from cyb_jax.interop import pretrained

  return pretrained.load(workdir, checkpoint=checkpoint)
