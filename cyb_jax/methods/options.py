"""What the options of all methods have in common: a frozen dataclass for each method, checked when it is made."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any, ClassVar

from cyb_jax.errors import InputError

if typing.TYPE_CHECKING:
  from cyb_jax.methods.backbone import Backbone
  from cyb_jax.methods.interface import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
  """The options of a method. Every method has a subclass, whose fields are its options.

  Attributes:
    name: of the method, in the registry.

  Raises:
    InputError: an option is out of its range, or two do not go together; the message names `method.FIELD`.
  """

  name: ClassVar[str]

  def __post_init__(self):
    self.validate()

  def validate(self) -> None:
    """Raises InputError for what can be checked without a model."""
    pauses = getattr(self, "pauses", 0)
    if isinstance(pauses, bool) or not isinstance(pauses, int) or pauses < 0:
      raise InputError(f"method.pauses: {pauses!r} must be a whole number that is not negative")

  def build(self, backbone: Backbone) -> Method:
    """The method with these options over a decoder.

    Raises:
      InputError: an option does not go with the decoder.
    """
    raise NotImplementedError

  def needs_pauses(self, otherwise: str) -> None:
    """Raises InputError where `pauses` is 0; `otherwise`: what such a model is."""
    if not getattr(self, "pauses", 0):
      raise InputError(f"method.pauses: 0, but method {self.name!r} needs at least 1; {otherwise}")


def one_of(field: str, value: Any, accepted: Iterable[str]) -> None:
  """Raises InputError for a value of `method.FIELD` that is not accepted."""
  accepted = tuple(accepted)
  if value not in accepted:
    raise InputError(f"method.{field}: {value!r} is none of {', '.join(map(repr, accepted))}")
