"""Every field of a config: its type, default, meaning and accepted values.

The meanings are taken from the `Attributes` sections of the dataclasses, and the accepted values from the rules that
check them (`cyb_jax.field_rules`), so neither is duplicated. `--config_help` prints this reference, and the
documentation's reference is generated from it.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from cyb_jax import methods
from cyb_jax.configs import lists
from cyb_jax.configs.parsing import GROUPS
from cyb_jax.configs.schema import DECODER_FIELDS, Config
from cyb_jax.configs.validation import RULES
from cyb_jax.decoder import PRESETS, DecoderConfig
from cyb_jax.decoder.config import RULES as DECODER_RULES
from cyb_jax.decoder.config import SIZES

# The accepted values of fields without a rule, by type.
_OF_TYPE = {"bool": "True or False", "int": "a whole number", "float": "a finite number", "str": "any text"}
# The group of the fields outside all groups.
TOP = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldDoc:
  """The documentation of one field.

  Attributes:
    group: the name of the group, such as 'optimizer'; `TOP`, which is '', for `init_from`.
    name: the name of the field in its group.
    type: 'int', 'float or None', or, for a list of numbers, 'floats a:b:c'.
    default: the Python literal, such as '0.001' or "'cosine'".
    meaning: a description without line breaks.
    allowed: the accepted values, in a form that can follow 'must be'.
    methods: the names of the methods that have this option, in the order of the registry; () outside the group
      `method`, and for `method.name`, which all methods have.
  """

  group: str
  name: str
  type: str
  default: str
  meaning: str
  allowed: str
  methods: tuple[str, ...] = ()

  @property
  def path(self) -> str:
    """'optimizer.learning_rate', as in `--config.optimizer.learning_rate`."""
    return f"{self.group}.{self.name}" if self.group else self.name


def field_reference(method: str | None = None) -> list[FieldDoc]:
  """The documentation of every field of a config, in the order of the groups.

  Args:
    method: the method whose options are in the group `method`; None means the options of all methods. An option of
      several methods is listed once for each distinct type, default, meaning or set of accepted values, with the names
      of the methods that share it.

  Raises:
    InputError: there is no method of this name.
  """
  found = [*_method_fields(method), *_decoder_fields()]
  for group, of_group in GROUPS.items():
    found += _fields(group, of_group, RULES.get(group, {}))
  top = FieldDoc(
    group=TOP,
    name="init_from",
    type="str",
    default="''",
    meaning=attribute_meanings(Config)["init_from"],
    allowed="a folder or a file, or '' for fresh parameters",
  )
  return [*found, top]


def groups() -> dict[str, str]:
  """The groups of a config with their meanings, in the order of `field_reference`, without `TOP`."""
  meanings = attribute_meanings(Config)
  return {name: meanings[name] for name in ("method", "decoder", *GROUPS)}


def attribute_meanings(documented: type) -> dict[str, str]:
  """The meaning of each attribute in the `Attributes` sections of a class and its bases, each in one line.

  The section of a class has precedence over the sections of its bases.
  """
  found: dict[str, str] = {}
  for base in reversed(documented.__mro__):
    found |= _section(inspect.cleandoc(vars(base).get("__doc__") or ""))
  return found


def _section(docstring: str) -> dict[str, str]:
  section = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)+)", docstring, re.MULTILINE)
  found: dict[str, list[str]] = {}
  for line in section[1].splitlines() if section else ():
    start = re.match(r"  (\w+): (.*)", line)
    if start:
      found[start[1]] = [start[2]]
    elif line.strip():
      found[list(found)[-1]].append(line.strip())
  return {name: " ".join(lines).strip() for name, lines in found.items()}


def _fields(group: str, documented: type, rules: Mapping[str, Any]) -> list[FieldDoc]:
  """The fields of a dataclass."""
  meanings, hints = attribute_meanings(documented), typing.get_type_hints(documented)
  found = []
  for field in dataclasses.fields(documented):
    hint = hints[field.name]
    rule = rules.get(field.name)
    found.append(
      FieldDoc(
        group=group,
        name=field.name,
        type=_type(hint),
        default=_default(field, hint),
        meaning=meanings.get(field.name, ""),
        allowed=rule.wanted if rule else _OF_TYPE.get(_type(hint), ""),
      )
    )
  return found


def _method_fields(method: str | None) -> list[FieldDoc]:
  """`method.name`, and the options of one method or of all methods, sorted by name."""
  chosen = [methods.config_class(name) for name in (methods.METHODS if method is None else [method])]
  having: dict[FieldDoc, list[str]] = {}
  for config in chosen:
    for field in _fields("method", config, config.rules()):
      having.setdefault(field, []).append(config.name)
  name = FieldDoc(
    group="method",
    name="name",
    type="str",
    default="'cyb'",
    meaning="the method that is trained; deeper@SETTING or wider@SETTING, for example deeper@ap, is a plain model of"
    " the same cost as a setting.",
    allowed=f"one of {', '.join(methods.METHODS)}",
  )
  options = [dataclasses.replace(field, methods=tuple(names)) for field, names in having.items()]
  return [name, *sorted(options, key=lambda field: field.name)]


def _decoder_fields() -> list[FieldDoc]:
  """`decoder.preset`, and the fields that override the preset."""
  preset = FieldDoc(
    group="decoder",
    name="preset",
    type="str",
    default="'tiny'",
    meaning="the name of a preset of the decoder's fields; the other fields of this group override it.",
    allowed=f"one of {', '.join(PRESETS)}, or '' for the decoder of init_from",
  )
  found = [preset]
  for field in _fields("decoder", DecoderConfig, DECODER_RULES):
    if field.name not in DECODER_FIELDS:
      continue
    meaning = field.meaning
    if field.name not in SIZES:
      meaning += f" Without a preset: {field.default}."
    elif field.name == "vocab_size":
      meaning += " None: the number of the tokenizer's entries, rounded up to a multiple of 128."
    # In this group None means the preset's value, so "no cap" can't be specified.
    allowed = field.allowed.partition(", or None")[0]
    found.append(
      dataclasses.replace(field, default="None", meaning=meaning, allowed=f"{allowed}; None: the preset's value")
    )
  return found


def _type(hint: Any) -> str:
  """'float or None' for `float | None`, 'floats a:b:c' for `tuple[float, ...] | None`."""
  kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  if typing.get_origin(kinds[0]) is tuple:
    return f"{typing.get_args(kinds[0])[0].__name__}s a:b:c"
  return " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)


def _default(field: dataclasses.Field, hint: Any) -> str:
  if field.default is dataclasses.MISSING:
    return "None"
  if _type(hint).endswith("a:b:c"):
    return repr(lists.written(field.default))
  return repr(field.default)
