"""The configuration of a run: an ml_collections ConfigDict outside, frozen dataclasses inside."""

from cyb_jax.configs.schema import (
  DECODER_FIELDS,
  LISTS,
  Config,
  DataConfig,
  OptimizerConfig,
  ParallelismConfig,
  PrecisionConfig,
  TrainConfig,
  TuningConfig,
  default,
  differences,
  freeze,
  to_dict,
  to_json,
  written_method,
)

__all__ = [
  "DECODER_FIELDS",
  "LISTS",
  "Config",
  "DataConfig",
  "OptimizerConfig",
  "ParallelismConfig",
  "PrecisionConfig",
  "TrainConfig",
  "TuningConfig",
  "default",
  "differences",
  "freeze",
  "to_dict",
  "to_json",
  "written_method",
]
