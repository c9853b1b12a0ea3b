"""Nested mappings, such as configs and the facts that hosts compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
  """Yields (path, old value, new value) for every leaf in which two nested mappings differ, sorted by path.

  Args:
    old: a mapping whose values may be mappings.
    new: another mapping; a name that one of the two lacks has the value None.
    path: the path of `old` and `new` in larger mappings, names joined by dots.
  """
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    for name in sorted({*old, *new}):
      yield from differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
  elif old != new:
    yield path, old, new
