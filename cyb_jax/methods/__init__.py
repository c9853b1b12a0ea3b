"""Methods by name. To add one: a file that subclasses `Method`, and its class in the list below."""

from __future__ import annotations

import difflib

from cyb_jax.decoder import DecoderConfig
from cyb_jax.errors import InputError
from cyb_jax.methods.baseline import Baseline
from cyb_jax.methods.constant_stop import ConstantStop
from cyb_jax.methods.copy_k import CopyK
from cyb_jax.methods.cyb import Cyb
from cyb_jax.methods.interface import WEIGHTS, Batch, EvalOutput, Method, MethodConfig, Params, TokenLosses
from cyb_jax.methods.looped import Looped
from cyb_jax.methods.mean_slots import MeanSlots
from cyb_jax.methods.pause_training import PauseTraining
from cyb_jax.methods.ponderlm2 import PonderLM2
from cyb_jax.methods.ponderlm3 import PonderLM3
from cyb_jax.methods.tbys import Tbys
from cyb_jax.methods.thoughtbubbles import Thoughtbubbles

METHODS: dict[str, type[Method]] = {
  method.name: method
  for method in (
    Baseline,
    Tbys,
    Cyb,
    ConstantStop,
    MeanSlots,
    Looped,
    PonderLM2,
    PonderLM3,
    Thoughtbubbles,
    CopyK,
    PauseTraining,
  )
}

__all__ = ["METHODS", "WEIGHTS", "Batch", "EvalOutput", "Method", "MethodConfig", "Params", "TokenLosses", "build"]


def build(config: MethodConfig, decoder_config: DecoderConfig, **options) -> Method:
  """The configured method; `options`: see `Method`.

  Raises:
    InputError: an unknown name, or options that the method refuses.
  """
  if config.name not in METHODS:
    close = difflib.get_close_matches(str(config.name), METHODS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(f"method.name: {config.name!r} is none of {', '.join(map(repr, METHODS))}{hint}")
  return METHODS[config.name](config, decoder_config, **options)
