"""Strict JSON: nan and the infinities, for which JSON has no number, become null."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
  """Returns `json.dumps` of the value, with nan and the infinities as null and arrays as lists.

  Args:
    value: nested dicts, lists and tuples of numbers, strings, None and arrays; keys become strings.
    **options: as for `json.dumps`.

  Example:
    >>> dumps({"loss": float("nan"), 3: (1, 2)})
    '{"loss": null, "3": [1, 2]}'
  """
  return json.dumps(_finite(value), **options)


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {str(k): _finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  if hasattr(value, "tolist"):
    return _finite(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
