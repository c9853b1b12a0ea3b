"""TBYS, "think before you speak": K pauses after every token, cross-entropy at the last one.

https://arxiv.org/abs/2310.02226, in the form of the comparison in arXiv 2510.13879.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cyb_jax.field_rules import number_of_slots
from cyb_jax.methods.backbone import Backbone
from cyb_jax.methods.composite import ExportableSlotMethod
from cyb_jax.methods.objectives.last import LastSlot
from cyb_jax.methods.slot_models.pauses import PauseOptions, Pauses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TbysConfig(PauseOptions):
  """The options of `tbys`: the options of pauses."""

  name: ClassVar[str] = "tbys"
  RULES: ClassVar = {"pauses": number_of_slots(1, note="; without pauses it is 'baseline'")}

  def build(self, backbone: Backbone) -> ExportableSlotMethod:
    slots = Pauses(backbone, self)
    return ExportableSlotMethod(self, backbone, slots, LastSlot(backbone, slots.num_slots))
