"""Converts a config.json of an earlier version to a config of this version.

`format` in config.json counts the changes of the meaning of a missing field. If it is less than `FORMAT`, or missing,
each field that was added or whose default has changed since then gets the value with which the run was started. The run
is therefore loaded and continued without changes.

- `train.tensorboard`, a switch, is now `train.trackers`; this applies to every format.
- Format 1 has no `tuning.new_rows`: rows that `init_from` lacks were initialised as with 'mean'.
- In format 1, `thoughtbubbles` without `method.fork_layers` forks before layers 3, 7 and 11 of 12, and at proportional
  layers in other decoders.
- In formats 1 and 2, the preset `llama_1b` has no `decoder.rope_scaling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cyb_jax.configs import lists, methods_group
from cyb_jax.decoder import PRESETS
from cyb_jax.errors import InputError, shown

FORMAT = 3
# Fields of earlier versions, and the fields that replace them.
REPLACED = {"train.tensorboard": "train.trackers"}


def migrated(recorded: Mapping[str, Any]) -> dict[str, Any]:
  """Converts the nested dict of a config.json to a config of this version, which has no field `format`."""
  written = recorded.get("format", 1)
  if not isinstance(written, int):
    raise InputError(f"config.format: {shown(written)} must be an integer; restore config.json")
  source = {name: value for name, value in recorded.items() if name != "format"}
  if isinstance(source.get("method"), Mapping):
    source["method"] = methods_group.migrated(source["method"])
  if isinstance(source.get("train"), Mapping) and "tensorboard" in source["train"]:
    values = {name: value for name, value in source["train"].items() if name != "tensorboard"}
    source["train"] = {"trackers": "tensorboard" if source["train"]["tensorboard"] else "", **values}
  if written >= FORMAT:
    return source
  for (group, name), value in _earlier_values(source, written).items():
    values = _group(source, group)
    if _is_open(values.get(name)):
      source[group] = {**values, name: value}
  return source


def continued(source: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
  """The config with which a run of this or an earlier version is continued.

  If the default of a field has changed since the run was started, and the config has the default, the field gets the
  run's value: the command that has started a run also continues it.

  Args:
    source: the nested dict of the config, without unset options of the method.
    recorded: the nested dict of the run's config.json.
  """
  result, run = dict(source), migrated(recorded)
  method, of_run = (x.get("method", {}) for x in (source, run))
  if not all(isinstance(x, Mapping) for x in (method, of_run)) or method.get("name") != of_run.get("name"):
    return result
  for (group, name), earlier in _earlier_values(run, 1).items():
    values, value = result.get(group, {}), run.get(group, {}).get(name)
    if value == earlier and (_is_open(values.get(name)) or values.get(name) == _DEFAULTS.get((group, name))):
      result[group] = {**values, name: value}
  return result


# Defaults of fields in groups other than `method`, in which unset fields have their defaults.
_DEFAULTS = {("tuning", "new_rows"): "auto"}


def _earlier_values(source: Mapping[str, Any], written: int) -> dict[tuple[str, str], Any]:
  """The values that missing fields had in the format `written` and later ones, by group and name."""
  values: dict[tuple[str, str], Any] = {}
  decoder, method = _group(source, "decoder"), _group(source, "method")
  if decoder.get("preset") == "llama_1b":
    values["decoder", "rope_scaling"] = ""
  if written > 1:
    return values
  if source.get("init_from"):
    values["tuning", "new_rows"] = "mean"
  preset = decoder.get("preset")
  layers = decoder.get("num_layers") or (PRESETS[preset].num_layers if preset in list(PRESETS) else None)
  if method.get("name") == "thoughtbubbles" and isinstance(layers, int):
    values["method", "fork_layers"] = lists.written(sorted({-(-layers * part // 12) for part in (3, 7, 11)}))
  return values


def _group(source: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  """The fields of a group; none if the group is no object, which `parsing.freeze` reports."""
  values = source.get(name)
  return values if isinstance(values, Mapping) else {}


def _is_open(value: Any) -> bool:
  return value is None or value == ""
