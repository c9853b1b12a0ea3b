r"""The syntax of options and of weighted sources in a single string.

    key=value,key=value                     options; `\,` is a comma inside a value
    reviews:0.7,jsonl(pattern=x.jsonl):0.3  sources with options and weights; also `\(`, `\)` and `\:`

A backslash before any other character is a backslash, so that `separator=\n` and Windows paths need no doubling.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

from cyb_jax.errors import InputError

_SPECIAL = ",():"


@dataclasses.dataclass(frozen=True)
class Item:
  """One source of a mixture.

  Attributes:
    name: the name of a task, or the path of a token store.
    options: the options by name.
    weight: the weight, above 0; the weights of a mixture need not sum to 1.
  """

  name: str
  options: dict[str, str]
  weight: float


def parse_options(field: str, text: str) -> dict[str, str]:
  r"""The options in 'key=value,key=value'.

  Args:
    field: the field or flag whose value is the text, for errors.
    text: the text; '' contains no options.

  Raises:
    InputError: a part has no '=' or no key, or a key occurs twice.

  Example:
    >>> parse_options("data.options", r"pattern=a\,b.txt,unit=line")
    {'pattern': 'a,b.txt', 'unit': 'line'}
  """
  options: dict[str, str] = {}
  for part in _parts(field, text):
    key, equals, value = part.partition("=")
    key = key.strip()
    if not equals or not key:
      raise InputError(rf"{field}: {part!r} is not of the form key=value; write a comma inside a value as \,")
    if key in options:
      raise InputError(f"{field}: {key!r} is given twice, as {options[key]!r} and {_plain(value)!r}; give it once")
    options[key] = _plain(value)
  return options


def parse_mixture(field: str, text: str) -> tuple[Item, ...]:
  """The sources in 'name:weight,name(key=value,...):weight'; an omitted weight is 1.

  Args:
    field: the field or flag whose value is the text, for errors.
    text: the text; it must contain at least one source.

  Raises:
    InputError: a part is not a source, brackets do not match, a weight is not above 0, or a source occurs twice.

  Example:
    >>> [(item.name, item.weight) for item in parse_mixture("data.mixture", "c4_en:0.7,jsonl(pattern=a.jsonl):0.3")]
    [('c4_en', 0.7), ('jsonl', 0.3)]
  """
  items: list[Item] = []
  for part in _parts(field, text):
    match = re.fullmatch(r"(?s)((?:\\.|[^\\()])+?)(?:\((.*)\))?(?::([^:()]*))?", part.strip())
    if not match or (match[2] is None and re.search(r"(?<!\\)[()]", part)):
      raise InputError(f"{field}: {part!r} is not a source; write name:weight or name(key=value,...):weight")
    name, weight = match[1], match[3]
    if match[2] is None and weight is not None and not _number(weight):
      name, weight = f"{name}:{weight}", None  # seqio:NAME, or the URL of a bucket, without a weight
    item = Item(_plain(name.strip()), parse_options(field, match[2] or ""), _weight(field, part, weight))
    if any(item.name == other.name and item.options == other.options for other in items):
      raise InputError(f"{field}: {item.name!r} occurs twice with the same options; give it once")
    items.append(item)
  if not items:
    raise InputError(f"{field}: {text!r} contains no source; write name:weight,name:weight")
  return tuple(items)


def written_options(options: Mapping[str, str]) -> str:
  """The inverse of `parse_options`: the options as a text."""
  return ",".join(f"{key}={_escaped(value)}" for key, value in options.items())


def written_mixture(items: Iterable[Item]) -> str:
  """The inverse of `parse_mixture`: the sources as a text."""
  return ",".join(_written(item) for item in items)


def _written(item: Item) -> str:
  options = f"({written_options(item.options)})" if item.options else ""
  return f"{_escaped(item.name)}{options}:{item.weight!r}"


def _weight(field: str, part: str, text: str | None) -> float:
  if text is None:
    return 1.0
  weight = float(text) if _number(text) else math.nan
  if not (math.isfinite(weight) and weight > 0):
    raise InputError(f"{field}: the weight {text!r} of {part!r} is not above 0; give a weight above 0, or omit it")
  return weight


def _number(text: str) -> bool:
  try:
    float(text)
  except ValueError:
    return False
  return True


def _parts(field: str, text: str) -> Iterator[str]:
  """The nonempty parts between commas that are neither escaped nor inside brackets.

  Raises:
    InputError: brackets do not match.
  """
  part, depth, escaped = "", 0, False
  for character in text:
    if character == "," and not escaped and depth == 0:
      if part.strip():
        yield part
      part = ""
    else:
      if not escaped:
        depth += (character == "(") - (character == ")")
      part += character
    escaped = character == "\\" and not escaped
  if depth:
    raise InputError(rf"{field}: the brackets in {text!r} do not match; write a bracket inside a value as \( or \)")
  if part.strip():
    yield part


def _escaped(text: str) -> str:
  """The text with a backslash before each comma and bracket."""
  return re.sub(r"([,()])", r"\\\1", text)


def _plain(text: str) -> str:
  """The text without the backslashes before special characters."""
  return re.sub(rf"\\([{re.escape(_SPECIAL)}])", r"\1", text)
