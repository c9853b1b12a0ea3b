"""Resolution of a user's config to a `Config`: names and fields that depend on other files are filled in."""

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
  cost, whose size may depend on a tokenizer. Both need files to be read. Paths become absolute.

  Args:
    config: a ConfigDict, or a nested dict.
    workdir: the run's folder; the resolved decoder of a run that has begun is read from its config.json, so that
      `init_from` need not exist when the run continues.

  Raises:
    InputError: see `configs.freeze` and `check_names`; or `init_from` can't be read, or no plain model has nearly the
      same cost.
  """
  source = runs.with_absolute_paths(configs.to_dict(config))
  source = pretrained.fill_decoder(source, workdir)
  frozen = configs.freeze(matching.fill_plain_model(source))
  check_names(frozen)
  return frozen
