"""The options of tasks: `data.options`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cyb_jax.errors import InputError
from cyb_jax.storage import absolute

# Options that locate a source and do not affect its content; they are not part of a store's recipe.
PLACES = ("data_dir", "path", "dataset", "streaming")
# Options whose value is a path, or a pattern of paths; see `cyb_jax.storage.absolute`.
_PATHS = ("pattern", "validation_pattern", "test_pattern", "data_dir", "path")


def settle(task: str, defaults: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
  """Every option of a task with its value.

  Args:
    task: the name of the task, for errors.
    defaults: default values by name, integers or strings.
    given: values that the user gives; a string is converted to an integer if the default is one, and a path is made
      absolute.

  Raises:
    InputError: an option is unknown, or a value has the wrong type.
  """
  settled = dict(defaults)
  for name, value in dict(given or {}).items():
    if name not in defaults:
      accepted = ", ".join(f"{key}={default!r}" for key, default in defaults.items())
      raise InputError(f"data.options.{name}: {task} has no such option; it accepts {accepted}")
    if isinstance(defaults[name], int):
      value = _whole_number(name, value, defaults[name])
    elif not isinstance(value, str):
      raise InputError(f"data.options.{name}={value!r}: give a string")
    settled[name] = value
  return with_absolute_paths(settled)


def with_absolute_paths(options: Mapping[str, Any]) -> dict[str, Any]:
  """The options with absolute paths, so that different spellings of a path define the same task."""
  return {name: absolute(value) if _is_path(name, value) else value for name, value in options.items()}


def _is_path(name: str, value: Any) -> bool:
  # A dataset is a name on the Hugging Face Hub unless it has the form of a path.
  return name in _PATHS or (name == "dataset" and is_folder(value))


def is_folder(dataset: str) -> bool:
  """Whether the value of the option `dataset` is a path on this disk: it begins with /, . or ~."""
  return dataset.startswith(("/", ".", "~"))


def _whole_number(name: str, value: Any, default: int) -> int:
  if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
    value = int(value)
  if not isinstance(value, int) or isinstance(value, bool):
    raise InputError(f"data.options.{name}={value!r}: give a whole number, such as {default}")
  return value


def one_of(options: Mapping[str, Any], name: str, accepted: tuple[str, ...]) -> str:
  """The value of an option, which must be one of `accepted`.

  Raises:
    InputError: the value is not accepted.
  """
  if options[name] not in accepted:
    raise InputError(f"data.options.{name}={options[name]!r}: give {' or '.join(map(repr, accepted))}")
  return options[name]
