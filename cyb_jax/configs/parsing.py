"""From a ConfigDict, or the nested dict of a config.json, to a `Config`.

`default()` is the ConfigDict that every file in `experiments/` starts from and that flags override; `freeze` turns it
into a `Config`, validated whole, before anything is compiled or written. Both are pure: they read no file.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from cyb_jax.configs import methods_group
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
from cyb_jax.configs.validation import validate
from cyb_jax.decoder import PRESETS
from cyb_jax.errors import InputError, did_you_mean
from cyb_jax.methods import MethodConfig

_GROUPS: dict[str, type] = {
  "method": MethodConfig,
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
  for name, group in _GROUPS.items():
    values = {field.name: field.default for field in dataclasses.fields(group)}
    if name == "method":
      values = methods_group.default_method()
    config[name] = ml_collections.ConfigDict(values)
  config.init_from = ""
  config.decoder = ml_collections.ConfigDict({"preset": "tiny"})
  for field in DECODER_FIELDS.values():
    config.decoder[field.name] = config_dict.placeholder(_plain_type(field.type))
  return config


def _plain_type(annotation: Any) -> type:
  """The one type of `int`, `float | None`, ... given as a type or, with postponed annotations, as its source."""
  name = str(annotation).split("|")[0].strip()
  return {"int": int, "float": float, "bool": bool, "str": str}[name]


def to_dict(config: ml_collections.ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """A nested dict of plain values."""
  if isinstance(config, ml_collections.ConfigDict):
    return config.to_dict()
  return copy.deepcopy(dict(config))


def to_json(config: Config) -> str:
  """The text of config.json."""
  return json.dumps(dict(config.source), indent=2, sort_keys=True) + "\n"


def freeze(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
  """Frozen dataclasses from a ConfigDict (or the nested dict of a config.json), validated whole.

  Names such as 'deeper@ap', and a decoder that is that of `init_from`, are resolved before; see
  `cyb_jax.studies.resolution`.

  Raises:
    InputError: one line that names the field, the value, and what would be accepted.
  """
  source = to_dict(config)
  _check_names("", source, [*_GROUPS, "decoder", "init_from"])
  groups = {name: _group(name, group, source.get(name, {})) for name, group in _GROUPS.items()}
  init_from = source.get("init_from", "")
  decoder = _decoder(source.get("decoder", {}))
  if not isinstance(init_from, str):
    raise InputError(f"init_from: {init_from!r} must be a folder or a file to start from, or ''")
  frozen = Config(
    init_from=init_from, decoder=types.MappingProxyType(decoder), source=types.MappingProxyType(source), **groups
  )
  validate(frozen)
  return frozen


def _group(name: str, group: type, values: Any) -> Any:
  """The dataclass of a group's values."""
  _check_names(f"{name}.", values, [field.name for field in dataclasses.fields(group)])
  if name == "method":
    values = methods_group.parse_method(values)
  return group(**{field: _typed(f"{name}.{field}", value, group, field) for field, value in values.items()})


def _decoder(values: Any) -> dict[str, Any]:
  """The preset's name and the fields that override it."""
  _check_names("decoder.", values, ["preset", *DECODER_FIELDS])
  decoder = {"preset": "tiny"} | values
  if decoder["preset"] not in ("", *PRESETS):
    raise InputError(
      f"decoder.preset: {decoder['preset']!r} is none of {', '.join(PRESETS)}, and not '', the decoder of init_from"
    )
  return decoder


def _check_names(prefix: str, values: Any, accepted: Sequence[str]) -> None:
  if not isinstance(values, Mapping):
    raise InputError(f"config.{prefix.rstrip('.')}: {values!r} must be a group of fields")
  for name in values:
    if name not in accepted:
      hint = did_you_mean(str(name), accepted, written=lambda close: prefix + close)
      raise InputError(f"config.{prefix}{name}: unknown field; {hint}")


def _typed(path: str, value: Any, group: type, name: str) -> Any:
  """The value, as the type of its field; a float field accepts an int."""
  annotation = typing.get_type_hints(group)[name]
  accepted = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
  accepted = tuple(typing.get_origin(kind) or kind for kind in accepted)
  if float in accepted and isinstance(value, int | float) and not isinstance(value, bool):
    if not math.isfinite(value):
      raise InputError(f"{path}: {value!r} must be finite")
    return float(value)
  if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
    wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in accepted)
    raise InputError(f"{path}: {value!r} must be {wanted}")
  return value
