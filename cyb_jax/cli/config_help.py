"""The text of `--config_help`: every field of a config with its type, default, value in this config, meaning and
accepted values.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from cyb_jax import configs
from cyb_jax.configs import documentation
from cyb_jax.configs.documentation import FieldDoc
from cyb_jax.decoder import PRESETS
from cyb_jax.errors import InputError, did_you_mean
from cyb_jax.studies import settings

WIDTH = 100
# The value of `--config_help` without a value.
ALL = "all"


def config_help(config: Mapping[str, Any], wanted: str = ALL) -> str:
  """The documentation of the fields of a config, as text of at most `WIDTH` columns.

  Nothing is validated, read or compiled, so a config with an invalid value can also be described.

  Args:
    config: a nested dict, such as the result of `configs.to_dict`; only the options of its method are described.
    wanted: a group such as 'optimizer', a field such as 'optimizer.learning_rate', or `ALL`.

  Raises:
    InputError: there is no such group or field, or the config's method is unknown.
  """
  reference = documentation.field_reference(_method(config))
  groups = documentation.groups()
  chosen = [field for field in reference if wanted in (ALL, field.group, field.path)]
  if not chosen:
    hint = did_you_mean(wanted, [*groups, *(field.path for field in reference)], listed=groups)
    raise InputError(f"--config_help: {wanted!r} is not a group or a field of the config; {hint}")
  parts = []
  for group in dict.fromkeys(field.group for field in chosen):
    if group:
      parts.append(textwrap.fill(f"{group}: {groups[group]}", WIDTH))
    parts += [_describe(field, config) for field in chosen if field.group == group]
  return "\n\n".join(parts) + "\n"


def _method(config: Mapping[str, Any]) -> str:
  """The name of the method whose options the config has; for 'deeper@ap', it is the plain model."""
  name = config["method"]["name"]
  return settings.SETTINGS[settings.PLAIN]["name"] if settings.parse_match(str(name)) else name


def _describe(field: FieldDoc, config: Mapping[str, Any]) -> str:
  facts = f"{field.type}; here {_here(field, config)}; default {field.default}; accepted: {field.allowed}"
  lines = [f"  --config.{field.path}"]
  for text in (facts, field.meaning):
    lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
  return "\n".join(lines)


def _here(field: FieldDoc, config: Mapping[str, Any]) -> str:
  """The value of a field in a config, with the value that an unset field of the decoder gets."""
  values = config.get(field.group, {}) if field.group else config
  if field.name not in values:
    return field.default  # an unset option of the method
  value = values[field.name]
  if field.group != "decoder" or value is not None:
    return repr(value)
  preset = values.get("preset")
  if field.name == "vocab_size":
    return "None (the size of the tokenizer's vocabulary)"
  if preset not in PRESETS:
    return "None (the value of init_from)"
  return f"None ({getattr(PRESETS[preset], field.name)!r}, of the preset {preset!r})"


def show_config_help(config: Any, wanted: str) -> str:
  """`config_help` of a ConfigDict; None means the config that experiments start from."""
  return config_help(configs.to_dict(configs.default() if config is None else config), wanted)
