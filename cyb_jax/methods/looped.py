"""A control: a plain model that runs its layers W times, with one slot per token: more depth without more slots."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cyb_jax.field_rules import number_of_slots
from cyb_jax.methods.backbone import Backbone
from cyb_jax.methods.composite import CachedSlotMethod
from cyb_jax.methods.objectives.last import LastSlot
from cyb_jax.methods.options import MethodConfig
from cyb_jax.methods.slot_models.loops import Loops


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopedConfig(MethodConfig):
  """The options of `looped`.

  Attributes:
    pauses: K, the number of passes through the layers after the first one.
  """

  name: ClassVar[str] = "looped"
  RULES: ClassVar = {"pauses": number_of_slots(1, note="; without a second pass through the layers it is 'baseline'")}

  pauses: int = 3

  def build(self, backbone: Backbone) -> CachedSlotMethod:
    return CachedSlotMethod(self, backbone, Loops(backbone, self.pauses + 1), LastSlot(backbone, 1))
