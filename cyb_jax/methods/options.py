"""What the options of all methods have in common: a frozen dataclass for each method, checked when it is made."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import ClassVar

from cyb_jax.field_rules import Rule, check_fields, whole_number

if typing.TYPE_CHECKING:
  from cyb_jax.methods.backbone import Backbone
  from cyb_jax.methods.interface import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
  """The options of a method. Every method has a subclass, whose fields are its options.

  Attributes:
    name: of the method, in the registry.
    RULES: what single options must be, by name; a class has those of its bases too. They are checked when the options
      are made, and they are the accepted values that the documentation of the config shows.

  Raises:
    InputError: an option is out of its range, or two do not go together; the message names `method.FIELD`.
  """

  name: ClassVar[str]
  RULES: ClassVar[Mapping[str, Rule]] = {"pauses": whole_number()}

  def __post_init__(self):
    check_fields("method", self, self.rules())
    self.validate()

  @classmethod
  def rules(cls) -> dict[str, Rule]:
    """The rules of this class's options: its own, and those of its bases."""
    found: dict[str, Rule] = {}
    for base in reversed(cls.__mro__):
      found |= vars(base).get("RULES", {})
    own = {field.name for field in dataclasses.fields(cls)}
    return {name: rule for name, rule in found.items() if name in own}

  def validate(self) -> None:
    """Raises InputError for what can be checked without a model, in addition to the rules."""

  def build(self, backbone: Backbone) -> Method:
    """The method with these options over a decoder.

    Raises:
      InputError: an option does not go with the decoder.
    """
    raise NotImplementedError
