"""The kinds of layers in config.json: a list with one entry for each layer, or the period of the global layers."""

from __future__ import annotations

from collections.abc import Sequence

from cyb_jax.errors import InputError
from cyb_jax.interop.tensors import Fields

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def read(fields: Fields, num_layers: int, default: Sequence[bool]) -> tuple[bool, ...]:
  """Whether each layer is global, from `layer_types`.

  Args:
    fields: the fields of config.json.
    num_layers: L.
    default: the result without the field.

  Raises:
    InputError: there is another kind, or the list has another length.
  """
  kinds = fields.take("layer_types", list, None)
  if kinds is None:
    return tuple(default)
  unknown = [kind for kind in kinds if kind not in (_LOCAL, _GLOBAL)]
  if unknown or len(kinds) != num_layers:
    found = f"{unknown[0]!r}" if unknown else f"{len(kinds)} entries"
    raise InputError(
      f"{fields.where}: layer_types has {found}; it must have one of {_LOCAL!r} and {_GLOBAL!r} for each of the"
      f" {num_layers} layers"
    )
  return tuple(kind == _GLOBAL for kind in kinds)


def period(fields: Fields, name: str, are_global: Sequence[bool], expected: int | None = None) -> int | None:
  """n if exactly the layers n, 2n, .. are global, counted from 1; None if no layer is global.

  Args:
    fields: the fields of config.json.
    name: the field that lists the layers, for errors.
    are_global: whether each layer is global.
    expected: the family's period, which is returned if no layer is global because the model has too few layers.

  Raises:
    InputError: there is no such n.
  """
  if not any(are_global):
    return expected if expected is not None and expected > len(are_global) else None
  every = list(are_global).index(True) + 1
  if any(is_global != ((number + 1) % every == 0) for number, is_global in enumerate(are_global)):
    kinds = "".join("G" if is_global else "l" for is_global in are_global)
    raise InputError(
      f"{fields.where}: {name} gives global and local layers in the order {kinds}; this version supports only that"
      " every n-th layer is global"
    )
  return every


def write(are_global: Sequence[bool]) -> list[str]:
  """The list `layer_types`."""
  return [_GLOBAL if is_global else _LOCAL for is_global in are_global]
