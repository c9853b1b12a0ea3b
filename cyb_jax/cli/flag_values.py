"""Checks of the values of flags."""

from __future__ import annotations

from absl import flags

from cyb_jax.errors import InputError


def required_flag(name: str, wanted: str) -> str:
  """The value of a flag that must be given."""
  value = flags.FLAGS[name].value
  if not value:
    raise InputError(f"--{name}: not given; {wanted}")
  return value


def checkpoint_flag() -> int | str:
  """The flag `--checkpoint`: 'last', 'best', or a step."""
  value = flags.FLAGS.checkpoint
  if value in ("last", "best"):
    return value
  if not value.isdecimal():
    raise InputError(f"--checkpoint: {value!r} is invalid; give last, best, or a step")
  return int(value)


def weights_flag(name: str) -> tuple[float, ...] | None:
  """The numbers of a flag such as `--omega=1:1:1:1`; None if it is ''."""
  value = flags.FLAGS[name].value
  try:
    return tuple(float(x) for x in value.split(":")) if value else None
  except ValueError:
    raise InputError(f"--{name}: {value!r} must be numbers separated by colons, such as 1:1:1:1") from None


def check_not_negative(*names: str) -> None:
  """Raises InputError for the first of these flags that is negative."""
  for name in names:
    value = flags.FLAGS[name].value
    if value < 0:
      raise InputError(f"--{name}: {value} must not be negative")
