"""A control: the mean over slots of the cross-entropy, read as the mixture of all slots with equal shares."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cyb_jax.field_rules import number_of_slots
from cyb_jax.methods.backbone import Backbone
from cyb_jax.methods.composite import ExportableSlotMethod
from cyb_jax.methods.objectives.mean import MeanSlots
from cyb_jax.methods.slot_models.pauses import PauseOptions, Pauses


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanSlotsConfig(PauseOptions):
  """The options of `mean_slots`: the options of pauses."""

  name: ClassVar[str] = "mean_slots"
  RULES: ClassVar = {"pauses": number_of_slots(1, note="; without pauses it is 'baseline'")}

  def build(self, backbone: Backbone) -> ExportableSlotMethod:
    slots = Pauses(backbone, self)
    return ExportableSlotMethod(self, backbone, slots, MeanSlots(backbone, slots.num_slots))
