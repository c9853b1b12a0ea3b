"""A control: the mixture over slots of CYB, with a stopping distribution that does not depend on the context.

CYB reads a mixture of slots, and a mixture alone lowers the loss. Here the shares are W trained numbers, the same for
every token: the gain of CYB over this method is due to the decision for each token.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cyb_jax.field_rules import INNER_SHARE, number_of_slots, or_none
from cyb_jax.methods.backbone import Backbone
from cyb_jax.methods.composite import ExportableSlotMethod
from cyb_jax.methods.objectives.constant import ConstantShares
from cyb_jax.methods.slot_models.pauses import PauseOptions, Pauses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantStopConfig(PauseOptions):
  """The options of `constant_stop`: the options of pauses, and the initial shares.

  Attributes:
    dont_know_prior: the initial shares equal the stopping distribution of an untrained CYB with this prior; None:
      equal shares.
  """

  name: ClassVar[str] = "constant_stop"
  RULES: ClassVar = {
    "pauses": number_of_slots(1, note="; without pauses it is 'baseline'"),
    "dont_know_prior": or_none(INNER_SHARE, "for equal shares"),
  }

  dont_know_prior: float | None = 0.9

  def build(self, backbone: Backbone) -> ExportableSlotMethod:
    slots = Pauses(backbone, self)
    return ExportableSlotMethod(self, backbone, slots, ConstantShares(backbone, slots.num_slots, self.dont_know_prior))
