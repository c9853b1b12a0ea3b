"""PonderLM-2: latent thoughts, whose input is the previous slot's state, and cross-entropy at the last thought.

https://arxiv.org/abs/2509.23184; see `cyb_jax.methods.slot_models.thoughts`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array

from cyb_jax.field_rules import Rule, number_of_slots
from cyb_jax.methods.backbone import Backbone
from cyb_jax.methods.composite import SequentialSlotMethod
from cyb_jax.methods.interface import Batch, Params, TokenLosses
from cyb_jax.methods.objectives.last import LastSlot
from cyb_jax.methods.options import MethodConfig
from cyb_jax.methods.slot_models.thoughts import Thoughts


@dataclasses.dataclass(frozen=True, kw_only=True)
class PonderOptions(MethodConfig):
  """The options of latent thoughts.

  Attributes:
    pauses: K, the number of latent thoughts after every token.
    jacobi: the number of passes that refine all latent thoughts at once, as MINIMUM:MAXIMUM; a training step draws the
      number uniformly, and evaluation uses the maximum.
  """

  RULES: ClassVar = {
    "pauses": number_of_slots(1, note="; without pauses it is 'baseline'"),
    "jacobi": Rule(
      lambda value: len(value) == 2 and 0 <= value[0] <= value[1],
      "the minimum and the maximum number of passes, such as '2:3'",
    ),
  }

  pauses: int = 1
  jacobi: tuple[int, ...] = (2, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PonderLM2Config(PonderOptions):
  """The options of `ponderlm2`: the options of latent thoughts."""

  name: ClassVar[str] = "ponderlm2"

  def build(self, backbone: Backbone) -> PonderLM2:
    return PonderLM2(self, backbone)


class PonderLM2(SequentialSlotMethod):
  """Cross-entropy at slot K, the only slot that is trained and decoded; evaluation reports a loss for each slot."""

  slot_model: Thoughts

  def __init__(self, config: PonderLM2Config, backbone: Backbone):
    slots = Thoughts(backbone, config.pauses + 1, config.jacobi)
    super().__init__(config, backbone, slots, LastSlot(backbone, slots.num_slots))

  def loss(self, params: Params, batch: Batch, rng: Array, step: Any = None) -> TokenLosses:
    hidden = self.slot_model.ponder(params, batch, self.slot_model.draw_passes(rng), is_pruned=False)
    return self.objective.loss(params, hidden, batch)
