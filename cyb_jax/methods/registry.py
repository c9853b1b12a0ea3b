"""Methods by name. To add one: a file with its config dataclass and `build`, and a line in the list below."""

from __future__ import annotations

import dataclasses
from typing import Any

from cyb_jax.decoder import DecoderConfig
from cyb_jax.errors import InputError, did_you_mean, shown
from cyb_jax.methods.backbone import Backbone
from cyb_jax.methods.baseline import BaselineConfig
from cyb_jax.methods.constant_stop import ConstantStopConfig
from cyb_jax.methods.copy_k import CopyKConfig
from cyb_jax.methods.cyb import CybConfig
from cyb_jax.methods.cyb_looped import CybLoopedConfig
from cyb_jax.methods.interface import Method
from cyb_jax.methods.looped import LoopedConfig
from cyb_jax.methods.mean_slots import MeanSlotsConfig
from cyb_jax.methods.mos import MosConfig
from cyb_jax.methods.options import MethodConfig
from cyb_jax.methods.pause_training import PauseTrainingConfig
from cyb_jax.methods.ponderlm2 import PonderLM2Config
from cyb_jax.methods.ponderlm3 import PonderLM3Config
from cyb_jax.methods.tbys import TbysConfig
from cyb_jax.methods.thoughtbubbles import ThoughtbubblesConfig

METHODS: dict[str, type[MethodConfig]] = {
  config.name: config
  for config in (
    BaselineConfig,
    TbysConfig,
    CybConfig,
    ConstantStopConfig,
    MeanSlotsConfig,
    LoopedConfig,
    CybLoopedConfig,
    MosConfig,
    PonderLM2Config,
    PonderLM3Config,
    ThoughtbubblesConfig,
    CopyKConfig,
    PauseTrainingConfig,
  )
}


def config_class(name: str) -> type[MethodConfig]:
  """The config dataclass of a method.

  Raises:
    InputError: there is no method of this name.
  """
  if not isinstance(name, str) or name not in METHODS:
    raise InputError(f"method.name: {shown(name)} is unknown; {did_you_mean(str(name), METHODS)}")
  return METHODS[name]


def configure(name: str = "cyb", **options: Any) -> MethodConfig:
  """The options of a method; unset options have the method's defaults.

  Raises:
    InputError: the name is unknown, the method does not have an option, or a value is invalid.
  """
  found = config_class(name)
  accepted = option_names(name)
  for option in options:
    if option not in accepted:
      raise InputError(
        f"method.{option}: unknown field; method {name!r} has no such option. It has: {', '.join(accepted) or 'none'}"
      )
  return found(**options)


def option_names(name: str) -> list[str]:
  """The names of a method's options, sorted."""
  return sorted(field.name for field in dataclasses.fields(config_class(name)))


def build(
  config: MethodConfig,
  decoder_config: DecoderConfig,
  *,
  vocab_size: int | None = None,
  chunk_size: int | None = None,
  shards: int = 1,
  weights: str = "all",
) -> Method:
  """The configured method.

  Args:
    config: the options, as `configure` returns them.
    decoder_config: the decoder; its vocab_size is the number of rows of the tables, including padding.
    vocab_size: the number of rows that are real vocabulary entries; None: all rows.
    chunk_size: the chunk size of the readout, see `readout.slot_scores`.
    shards: the number of devices over which jit splits a batch, see `readout.slot_scores`.
    weights: which parameters are trained, one of `WEIGHTS`.

  Raises:
    InputError: an option is incompatible with the decoder.
  """
  rows = decoder_config.vocab_size if vocab_size is None else vocab_size
  return config.build(Backbone(decoder_config, rows, chunk_size=chunk_size, shards=shards, weights=weights))
