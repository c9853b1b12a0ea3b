"""Strict JSON: `dumps` writes neither nan nor infinities, and `loads` rejects strings that UTF-8 cannot represent."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

# The largest number of lists and objects around a value; Python itself fails at a depth that depends on the caller.
_MAX_DEPTH = 100
# The escape of a surrogate, which may be unpaired.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


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


def loads(text: str | bytes) -> Any:
  r"""Returns `json.loads` of a text, all of whose strings are representable in UTF-8.

  A JSON text may contain the escape of an unpaired surrogate, which Python accepts but cannot encode.

  Args:
    text: a JSON text; bytes are UTF-8.

  Raises:
    ValueError: the text is not JSON, not UTF-8, nested in more than 100 levels, or has a lone surrogate. Callers add
      the file and the line.

  Example:
    >>> loads(b'{"text": "caf\\u00e9"}')
    {'text': 'café'}
    >>> loads(b'{"text": "caf\\ud83d"}')
    Traceback (most recent call last):
    ValueError: 'caf\ud83d' in 'text' has a lone surrogate, which is not a character
  """
  try:
    decoded = text.decode() if isinstance(text, bytes) else text
    value = json.loads(decoded)
  except UnicodeDecodeError as error:
    raise ValueError(f"not UTF-8 at byte {error.start} ({error.reason})") from error
  except json.JSONDecodeError as error:
    raise ValueError(f"invalid JSON: {error.msg} at character {error.pos}") from error
  except RecursionError as error:
    raise ValueError("nested too deeply") from error
  check_depth(value)
  if isinstance(text, str) or _SURROGATE.search(decoded):
    _check_characters(value, "")
  return value


def read_object(path: Any) -> dict[str, Any]:
  """Returns the JSON object in a local file.

  Args:
    path: the path of the file, a pathlib.Path or an epath.Path.

  Raises:
    OSError: the file can't be read.
    ValueError: as `loads`, or the file contains another value than an object. The message names the file.
  """
  try:
    value = loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path}: a JSON {type(value).__name__} instead of an object")
  return value


def check_depth(value: Any) -> None:
  """Raises ValueError if a value of `json.loads` has more than 100 levels of lists and objects."""
  level = [value]
  for _ in range(_MAX_DEPTH):
    level = [item for each in level for item in _items(each) if isinstance(item, dict | list)]
    if not level:
      return
  raise ValueError(f"nested too deeply, in more than {_MAX_DEPTH} levels")


def _items(value: Any) -> Iterable[Any]:
  if isinstance(value, dict):
    return value.values()
  return value if isinstance(value, list) else ()


def _check_characters(value: Any, place: str) -> None:
  """Raises ValueError if a string or key in the value has a lone surrogate; `place` is the value's key or index."""
  if isinstance(value, dict):
    for key, item in value.items():
      _check_characters(key, "a key")
      _check_characters(item, repr(key))
  elif isinstance(value, list):
    for number, item in enumerate(value):
      _check_characters(item, f"{place}[{number}]")
  elif isinstance(value, str):
    try:
      value.encode()
    except UnicodeEncodeError as error:
      around = value[max(0, error.start - 20) : error.start + 1]
      where = f" in {place}" if place else ""
      raise ValueError(f"{around!r}{where} has a lone surrogate, which is not a character") from error


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
