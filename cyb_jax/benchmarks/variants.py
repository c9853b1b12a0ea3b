"""Variants of a config, as the flag `--variant` writes them.

ap                                   a setting: its method replaces the config's
tbys3,data.batch_size=8              a setting, and fields that are changed after it
method.pauses=1,method.loss=va       fields alone: the rest of the method stays the config's
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING

from cyb_jax.errors import InputError

if TYPE_CHECKING:
  import ml_collections

# A field's name has a dot, a setting's has none.
_FIELD = re.compile(r"\w+(\.\w+)*=")
_SETTING = re.compile(r"[\w@/]+")


def split(variant: str) -> tuple[str | None, list[str]]:
  """'ap,a.b=1,c.d=x,y' as ('ap', ['a.b=1', 'c.d=x,y']): a comma separates two fields where a field's name follows.

  Returns:
    The setting, None if the first part is a field; and the fields. The setting's name is not checked.

  Raises:
    InputError: a part that is neither the name of a setting, at the beginning, nor field=value.
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
  """A copy of a config whose method is that of a setting of `cyb_jax.studies.settings`, and nothing of its own.

  Raises:
    InputError: there is no such setting, or it changes more than the method.
  """
  from cyb_jax import configs
  from cyb_jax.studies import settings

  settings.check(name)
  if name not in settings.SETTINGS:
    raise InputError(f"setting {name!r} changes the decoder too; give the config of it, experiments/NAME.py:{name}")
  changed = copy.deepcopy(source)
  changed.method = configs.default().method
  changed.method.update(settings.SETTINGS[name])
  return changed
