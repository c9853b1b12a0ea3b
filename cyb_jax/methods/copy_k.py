"""Copies: the embedding of every token is repeated K more times, and the rightmost copy is read. This is the baseline
of Thoughtbubbles with streams but without decisions (Liu et al. 2025, https://arxiv.org/abs/2510.00219).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from cyb_jax.field_rules import number_of_slots
from cyb_jax.methods.backbone import Backbone
from cyb_jax.methods.composite import CachedSlotMethod
from cyb_jax.methods.objectives.last import LastSlot
from cyb_jax.methods.options import MethodConfig
from cyb_jax.methods.slot_models.copies import Copies


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyKConfig(MethodConfig):
  """The options of `copy_k`.

  Attributes:
    pauses: K, the number of copies of a token in addition to the token itself.
  """

  name: ClassVar[str] = "copy_k"
  RULES: ClassVar = {"pauses": number_of_slots(1, note="; without copies it is 'baseline'")}

  pauses: int = 3

  def build(self, backbone: Backbone) -> CachedSlotMethod:
    num_slots = self.pauses + 1
    return CachedSlotMethod(self, backbone, Copies(backbone, num_slots), LastSlot(backbone, num_slots))
