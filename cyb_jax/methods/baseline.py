"""No pauses: a plain language model, trained with cross-entropy."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cyb_jax.methods.backbone import Backbone
from cyb_jax.methods.composite import ExportableSlotMethod
from cyb_jax.methods.objectives.last import LastSlot
from cyb_jax.methods.options import MethodConfig
from cyb_jax.methods.slot_models.plain import Plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineConfig(MethodConfig):
  """`baseline` has no options."""

  name: ClassVar[str] = "baseline"

  def build(self, backbone: Backbone) -> ExportableSlotMethod:
    return ExportableSlotMethod(self, backbone, Plain(backbone), LastSlot(backbone, 1))
