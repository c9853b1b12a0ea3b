"""The config of a run: users edit an ml_collections ConfigDict, which is converted to frozen dataclasses."""

from cyb_jax.configs.differences import differences, filled
from cyb_jax.configs.methods_group import all_options, written_method
from cyb_jax.configs.migration import continued, migrated
from cyb_jax.configs.parsing import default, field_paths, freeze, to_dict, to_json
from cyb_jax.configs.paths import with_paths
from cyb_jax.configs.schema import (
  DECODER_FIELDS,
  Config,
  DataConfig,
  OptimizerConfig,
  ParallelismConfig,
  PrecisionConfig,
  TrainConfig,
  TuningConfig,
)

__all__ = [
  "DECODER_FIELDS",
  "Config",
  "DataConfig",
  "OptimizerConfig",
  "ParallelismConfig",
  "PrecisionConfig",
  "TrainConfig",
  "TuningConfig",
  "all_options",
  "continued",
  "default",
  "differences",
  "field_paths",
  "filled",
  "freeze",
  "migrated",
  "to_dict",
  "to_json",
  "with_paths",
  "written_method",
]
