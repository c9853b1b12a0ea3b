"""JSON as everybody reads it: numbers that JSON doesn't know become null."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
  """`json.dumps` of the value, with nan and infinities as null and arrays as lists."""
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
