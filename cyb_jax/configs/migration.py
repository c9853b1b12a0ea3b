"""A config.json of an earlier version, read as a config of this version.

`format` in config.json counts the changes of the meaning of an absent field. Where it is less than `FORMAT`, or absent,
each field that has been added or whose default has changed since then gets the value that the run was started with, so
that the run is loaded, and continued, as it was.

- Format 1 has no `tuning.new_rows`: rows that `init_from` had not got started as with 'mean'.
- `train.tensorboard`, a switch, is now `train.trackers`; in every format.
- In format 1 `thoughtbubbles` without `method.fork_layers` forks before the layers 3, 7 and 11 of 12, and in proportion
  in every other decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cyb_jax.configs import lists, methods_group
from cyb_jax.decoder import PRESETS

FORMAT = 2


def migrated(recorded: Mapping[str, Any]) -> dict[str, Any]:
  """The nested dict of a config.json as a config of this version, which has no `format`."""
  source = {name: value for name, value in recorded.items() if name != "format"}
  if isinstance(source.get("method"), Mapping):
    source["method"] = methods_group.migrated(source["method"])
  if isinstance(source.get("train"), Mapping) and "tensorboard" in source["train"]:
    values = {name: value for name, value in source["train"].items() if name != "tensorboard"}
    source["train"] = {"trackers": "tensorboard" if source["train"]["tensorboard"] else "", **values}
  if recorded.get("format", 1) >= FORMAT:
    return source
  for (group, name), value in _earlier_values(source).items():
    values = source.get(group, {})
    if _is_open(values.get(name)):
      source[group] = {**values, name: value}
  return source


def continued(source: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
  """The config with which a run is continued that an earlier version may have started.

  A field whose default has changed since then, and which the config leaves at its default, gets the run's value: the
  command that has started a run also continues it.

  Args:
    source: nested dict; options of the method that are not set are absent.
    recorded: that of the run's config.json.
  """
  result, run = dict(source), migrated(recorded)
  method, of_run = (x.get("method", {}) for x in (source, run))
  if not all(isinstance(x, Mapping) for x in (method, of_run)) or method.get("name") != of_run.get("name"):
    return result
  for (group, name), earlier in _earlier_values(run).items():
    values, value = result.get(group, {}), run.get(group, {}).get(name)
    if value == earlier and (_is_open(values.get(name)) or values.get(name) == _DEFAULTS.get((group, name))):
      result[group] = {**values, name: value}
  return result


# Of groups other than `method`, which have a value for each field.
_DEFAULTS = {("tuning", "new_rows"): "auto"}


def _earlier_values(source: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
  """What absent fields, by group and name, meant in format 1."""
  values: dict[tuple[str, str], Any] = {}
  if source.get("init_from"):
    values["tuning", "new_rows"] = "mean"
  decoder, method = source.get("decoder", {}), source.get("method", {})
  layers = decoder.get("num_layers") or getattr(PRESETS.get(decoder.get("preset", "")), "num_layers", None)
  if method.get("name") == "thoughtbubbles" and layers:
    values["method", "fork_layers"] = lists.written(sorted({-(-layers * part // 12) for part in (3, 7, 11)}))
  return values


def _is_open(value: Any) -> bool:
  return value is None or value == ""
