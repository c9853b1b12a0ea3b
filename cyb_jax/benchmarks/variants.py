"""Variants of a config in the syntax of the flag `--variant`.

ap                                   a setting: its method replaces the config's
tbys3,data.batch_size=8              a setting, and fields that are changed afterwards
method.pauses=1,method.loss=va       only fields: the other options of the method are the config's
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import flags

from cyb_jax import command_line
from cyb_jax.errors import InputError

if TYPE_CHECKING:
  import ml_collections

# The name of a field has a dot; the name of a setting does not.
_FIELD = re.compile(r"\w+(\.\w+)*=")
_SETTING = re.compile(r"[\w@/]+")


def define_flag() -> None:
  flags.DEFINE_multi_string(
    "variant",
    [],
    "A variant that is measured in addition to the config itself: a setting, whose method replaces the config's"
    " ('baseline', 'tbys3', 'ap'), fields ('method.pauses=1,method.pause_visibility=hidden'), or a setting and fields"
    " ('tbys3,data.batch_size=8'). May be given several times.",
  )


def applied(source: ml_collections.ConfigDict, variant: str) -> ml_collections.ConfigDict:
  """The config of a variant; '' is the config itself.

  Raises:
    InputError: the variant is invalid.
  """
  if not variant:
    return source
  setting, fields = split(variant)
  return command_line.override(source if setting is None else with_setting(source, setting), fields)


@contextlib.contextmanager
def named(variant: str) -> Iterator[None]:
  """Errors of the `with` block name the variant; '' is the config itself."""
  try:
    yield
  except InputError as error:
    if not variant:
      raise
    raise InputError(f"--variant={variant}: {error}") from None


def split(variant: str) -> tuple[str | None, list[str]]:
  """Splits 'ap,a.b=1,c.d=x,y' into ('ap', ['a.b=1', 'c.d=x,y']): a comma before a field's name separates two fields.

  Returns:
    The setting, None if the first part is a field; and the fields. The setting's name is not checked.

  Raises:
    InputError: a part is neither field=value nor, at the beginning, the name of a setting.
  """
  first, comma, rest = variant.partition(",")
  setting = first if _SETTING.fullmatch(first) else None
  if setting is not None and not comma:
    return setting, []
  fields = re.split(r",(?=\w+(?:\.\w+)+(?:=|,|$))", variant if setting is None else rest)
  for field in fields:
    if not _FIELD.match(field):
      raise InputError(f"{field!r} is not of the form field=value, such as method.pauses=1")
  return setting, fields


def with_setting(source: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
  """A copy of a config whose method is replaced completely by that of a setting of `cyb_jax.studies.settings`.

  Raises:
    InputError: the setting does not exist, or changes more than the method.
  """
  from cyb_jax import configs
  from cyb_jax.studies import settings

  settings.check(name)
  if name not in settings.SETTINGS:
    raise InputError(
      f"setting {name!r} also changes the decoder; give its config instead, --config=experiments/NAME.py:{name}"
    )
  changed = copy.deepcopy(source)
  changed.method = configs.default().method
  changed.method.update(settings.SETTINGS[name])
  return changed
