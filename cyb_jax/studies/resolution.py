"""From a config as a user writes it to a `Config`: names and fields that other files decide are resolved first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ml_collections

from cyb_jax import configs, runs
from cyb_jax.configs import Config
from cyb_jax.interop import pretrained
from cyb_jax.studies import matching
from cyb_jax.training.run_data import check_names


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any], workdir: str | os.PathLike | None = None) -> Config:
  """A frozen config; every program that takes `--config` calls this, and config.json holds the result.

  `decoder.preset` = '' is the decoder of `init_from`; a `method.name` such as 'deeper@ap' is a plain model of the same
  cost, whose size may depend on a tokenizer. Files are read where the config has either of them. Paths become absolute.

  Args:
    config: a ConfigDict, or a nested dict.
    workdir: the run's folder; what was resolved when the run began is taken from there, so that `init_from` need not
      exist when the run is continued.

  Raises:
    InputError: see `configs.freeze` and `check_names`; or `init_from` can't be read, or no plain model has about the
      same cost.
  """
  source = runs.with_absolute_paths(configs.to_dict(config))
  source = pretrained.fill_decoder(source, workdir)
  frozen = configs.freeze(matching.fill_plain_model(source))
  check_names(frozen)
  return frozen
