"""Methods by name. To add one: a file with its config dataclass and `build`, and a line in the list below."""

from __future__ import annotations

import dataclasses
from typing import Any

from cyb_jax.decoder import DecoderConfig
from cyb_jax.errors import InputError, did_you_mean
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
  if name not in METHODS:
    raise InputError(f"method.name: {name!r} is unknown; {did_you_mean(str(name), METHODS)}")
  return METHODS[name]


def configure(name: str = "cyb", **options: Any) -> MethodConfig:
  """The options of a method; those that are not given have the method's defaults.

  Raises:
    InputError: an unknown name, an option that the method does not have, or a value that it refuses.
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
    config: of `configure`.
    decoder_config: its vocab_size counts the rows of the tables.
    vocab_size: how many of these rows are real entries; None: all.
    chunk_size: of the readout, see `readout.slot_scores`.
    shards: devices that a batch is split over under jit, see there.
    weights: one of `WEIGHTS`, which parameters are trained.

  Raises:
    InputError: an option does not go with the decoder.
  """
  rows = decoder_config.vocab_size if vocab_size is None else vocab_size
  return config.build(Backbone(decoder_config, rows, chunk_size=chunk_size, shards=shards, weights=weights))
