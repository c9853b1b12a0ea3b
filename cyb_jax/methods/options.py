"""The base class of the options of methods: a frozen dataclass for each method, validated on construction."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import ClassVar

from cyb_jax.field_rules import Rule, check_fields, number_of_slots

if typing.TYPE_CHECKING:
  from cyb_jax.methods.backbone import Backbone
  from cyb_jax.methods.interface import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
  """The options of a method. Every method has a subclass, whose fields are its options.

  Attributes:
    name: the name of the method in the registry.
    RULES: the accepted values of single options, by name; a class also has the rules of its bases. The rules are
      checked on construction, and the documentation of the config shows them.

  Raises:
    InputError: an option is out of its range, or two options are incompatible; the message names `method.FIELD`.
  """

  name: ClassVar[str]
  RULES: ClassVar[Mapping[str, Rule]] = {"pauses": number_of_slots()}

  def __post_init__(self):
    check_fields("method", self, self.rules())
    self.validate()

  @classmethod
  def rules(cls) -> dict[str, Rule]:
    """The rules of this class's options, from this class and its bases."""
    found: dict[str, Rule] = {}
    for base in reversed(cls.__mro__):
      found |= vars(base).get("RULES", {})
    own = {field.name for field in dataclasses.fields(cls)}
    return {name: rule for name, rule in found.items() if name in own}

  def validate(self) -> None:
    """Raises InputError if options are invalid; runs after the rules and needs no model."""

  def build(self, backbone: Backbone) -> Method:
    """The method with these options over a decoder.

    Raises:
      InputError: an option is incompatible with the decoder.
    """
    raise NotImplementedError
