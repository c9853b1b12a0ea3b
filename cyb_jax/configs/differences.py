"""The comparison of two configs, with the defaults of the fields that they do not set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cyb_jax import nested
from cyb_jax.configs import methods_group
from cyb_jax.configs.parsing import default

# A run may be continued with other values of these fields: they affect where and how fast it computes, but not its
# results.
_OPERATIONAL = (
  "parallelism", "data.store", "train.checkpoint_every", "train.keep", "train.trackers", "train.max_skipped",
)  # fmt: skip


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """The fields in which two nested configs differ, as 'a.b: old -> new', without fields that do not affect results.

  A missing field has its default, because an older version may have written the config. The same holds for an option
  that only one of two methods has.
  """
  old, new = (_with_tokenizer_of_store(filled(source)) for source in (old, new))
  options = methods_group.defaults(old["method"]["name"]) | methods_group.defaults(new["method"]["name"])
  found = nested.differences(*({**x, "method": options | x["method"]} for x in (old, new)))
  return [f"{path}: {a!r} -> {b!r}" for path, a, b in found if not _is_operational(path)]


def filled(source: Mapping[str, Any]) -> dict[str, Any]:
  """A nested config in which all missing fields have their defaults, including the options of its method."""
  defaults = {name: group for name, group in default().to_dict().items() if name != "method"}
  return _filled(source, defaults) | {"method": methods_group.filled(source.get("method", {}))}


def _with_tokenizer_of_store(source: dict[str, Any]) -> dict[str, Any]:
  """The config with a constant instead of the path of data.store's own tokenizer, so the store may be moved."""
  data = source["data"]
  if not (isinstance(data, Mapping) and data["store"] and data["tokenizer"] == data["store"]):
    return source
  return source | {"data": {**data, "tokenizer": "of data.store"}}


def _is_operational(path: str) -> bool:
  return any(path == name or path.startswith(f"{name}.") for name in _OPERATIONAL)


def _filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
  filled = dict(values)
  for name, value in defaults.items():
    if isinstance(value, Mapping) and isinstance(values.get(name, {}), Mapping):
      filled[name] = _filled(values.get(name, {}), value)
    else:
      filled.setdefault(name, value)
  return filled
