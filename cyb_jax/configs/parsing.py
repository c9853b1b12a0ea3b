"""Converts a ConfigDict, or the nested dict of a config.json, to a `Config`.

`default()` is the ConfigDict that every file in `experiments/` modifies and that flags override; `freeze` converts it
to a `Config` and validates it before anything is compiled or written. Both are pure: they read no files.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from cyb_jax.configs import methods_group
from cyb_jax.configs.migration import FORMAT
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
from cyb_jax.configs.typed import typed
from cyb_jax.configs.validation import validate
from cyb_jax.decoder import PRESETS
from cyb_jax.errors import InputError, did_you_mean

GROUPS: dict[str, type] = {
  "data": DataConfig,
  "optimizer": OptimizerConfig,
  "train": TrainConfig,
  "parallelism": ParallelismConfig,
  "precision": PrecisionConfig,
  "tuning": TuningConfig,
}


def default() -> ml_collections.ConfigDict:
  """The ConfigDict that experiments start from: a tiny CYB-AP model on the reviews."""
  config = ml_collections.ConfigDict()
  config.method = ml_collections.ConfigDict(methods_group.default_method())
  for name, group in GROUPS.items():
    config[name] = ml_collections.ConfigDict({field.name: field.default for field in dataclasses.fields(group)})
  config.init_from = ""
  config.decoder = ml_collections.ConfigDict({"preset": "tiny"})
  for field in DECODER_FIELDS.values():
    config.decoder[field.name] = config_dict.placeholder(_plain_type(field.type))
  return config


def field_paths() -> list[str]:
  """The groups and all fields of a config, 'optimizer.learning_rate' for example, with the options of all methods."""
  names: dict[str, Sequence[str]] = {"method": ["name", *methods_group.all_options()]}
  names |= {name: [field.name for field in dataclasses.fields(group)] for name, group in GROUPS.items()}
  names["decoder"] = ["preset", *DECODER_FIELDS]
  return [*names, "init_from", *(f"{group}.{field}" for group, fields in names.items() for field in fields)]


def _plain_type(annotation: Any) -> type:
  """The type in an annotation such as `int` or `float | None`, which may be postponed and therefore a string."""
  name = str(annotation).split("|")[0].strip()
  return {"int": int, "float": float, "bool": bool, "str": str}[name]


def to_dict(config: ml_collections.ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """A nested dict of plain values, without unset options of the method."""
  if not isinstance(config, ml_collections.ConfigDict):
    return copy.deepcopy(dict(config))
  values = config.to_dict()
  if isinstance(values.get("method"), Mapping):
    values["method"] = methods_group.without_unset(values["method"])
  return values


def to_json(config: Config) -> str:
  """The text of config.json; see `migration` for its `format`."""
  return json.dumps({"format": FORMAT} | dict(config.source), indent=2, sort_keys=True) + "\n"


def freeze(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
  """Converts a ConfigDict, or the nested dict of a config.json, to validated frozen dataclasses.

  Names such as 'deeper@ap', and the decoder of `init_from`, must be resolved before; see `cyb_jax.studies.resolution`.

  Raises:
    InputError: a field is unknown or its value is invalid; the message names the field, the value, and the accepted
      values.
  """
  source = to_dict(config)
  source.pop("format", None)  # a config of this version needs no migration
  _check_names("", source, ["method", *GROUPS, "decoder", "init_from"])
  method = source.get("method", {})
  _check_names("method.", method, list(method) if isinstance(method, Mapping) else [])
  groups = {name: _group(name, group, source.get(name, {})) for name, group in GROUPS.items()}
  init_from = source.get("init_from", "")
  decoder = _decoder(source.get("decoder", {}))
  if not isinstance(init_from, str):
    raise InputError(f"init_from: {init_from!r} must be a folder or a file to start from, or ''")
  frozen = Config(
    method=methods_group.parse_method(method, field_paths()),
    init_from=init_from,
    decoder=types.MappingProxyType(decoder),
    source=types.MappingProxyType(source),
    **groups,
  )
  validate(frozen)
  return frozen


def _group(name: str, group: type, values: Any) -> Any:
  """The dataclass of a group with these values."""
  _check_names(f"{name}.", values, [field.name for field in dataclasses.fields(group)])
  hints = typing.get_type_hints(group)
  return group(**{field: typed(f"{name}.{field}", value, hints[field]) for field, value in values.items()})


def _decoder(values: Any) -> dict[str, Any]:
  """The preset's name and the fields that override it."""
  _check_names("decoder.", values, ["preset", *DECODER_FIELDS])
  decoder = {"preset": "tiny"} | values
  if decoder["preset"] not in ("", *PRESETS):
    hint = did_you_mean(str(decoder["preset"]), PRESETS, listed=[*PRESETS, "'' for the decoder of init_from"])
    raise InputError(f"decoder.preset: {decoder['preset']!r} is unknown; {hint}")
  return decoder


def _check_names(prefix: str, values: Any, accepted: Sequence[str]) -> None:
  if not isinstance(values, Mapping):
    raise InputError(f"config.{prefix.rstrip('.')}: {values!r} must be a group of fields")
  for name in values:
    if name not in accepted:
      own = [prefix + field for field in accepted]
      hint = did_you_mean(f"{prefix}{name}", dict.fromkeys([*own, *field_paths()]), written=str, listed=accepted)
      raise InputError(f"config.{prefix}{name}: unknown field; {hint}")
