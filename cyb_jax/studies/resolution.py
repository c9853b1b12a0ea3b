"""Resolution of a user's config to a `Config`: names and fields that depend on other files are filled in."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import ml_collections

from cyb_jax import configs, runs, storage
from cyb_jax.checkpointing.workdir import read_config
from cyb_jax.configs import Config
from cyb_jax.errors import InputError
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
  source = _fill_decoder(source, workdir)
  frozen = configs.freeze(matching.fill_plain_model(source))
  check_names(frozen)
  return frozen


def _fill_decoder(source: Mapping[str, Any], workdir: str | os.PathLike | None = None) -> Mapping[str, Any]:
  """A nested config in which the decoder of `init_from` replaces an open decoder (`decoder.preset=''`).

  Args:
    source: see `configs.freeze`.
    workdir: the run's folder; its config.json has the decoder of a run that has begun, so that `init_from` need not
      exist when the run continues.

  Raises:
    InputError: `init_from` can't be read.
  """
  decoder = source.get("decoder", {})
  open_decoder = isinstance(decoder, Mapping) and decoder.get("preset") == ""
  if open_decoder and not source.get("init_from") and decoder.get("d_model") is None:
    raise InputError(
      "init_from: not set, but decoder.preset = '' is the decoder of init_from; set init_from, or a preset"
    )
  if not (open_decoder and isinstance(source.get("init_from"), str)):
    return source
  found: Mapping[str, Any] = {}
  with storage.starting(workdir or ""):
    held = workdir is not None and storage.exists(storage.place(workdir) / "config.json")
  if held:
    recorded = runs.with_absolute_paths(read_config(workdir))
    if recorded.get("init_from") == runs.with_absolute_paths(source)["init_from"]:
      found = recorded["decoder"]
  if not found and source["init_from"]:
    found = dataclasses.asdict(pretrained.open_pretrained(source["init_from"]).decoder)
    found = {
      name: value for name, value in found.items() if name in configs.DECODER_FIELDS and name not in pretrained.MANNER
    }
  filled = {name: value for name, value in found.items() if decoder.get(name) is None}
  return dict(source) | {"decoder": decoder | filled}
