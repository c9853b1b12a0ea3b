"""Stopping time over depth: the stopping-time losses of Catch Your Breath over loops of the layers instead of pauses.

The same output row gives d after every loop. Training and evaluation read all loops. Decoding exits early, at a loop
that the model chooses for each token; `cyb_jax.methods.slot_models.read_loops` states which results are then exact.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Int

from cyb_jax.field_rules import number_of_slots
from cyb_jax.methods.backbone import Backbone
from cyb_jax.methods.objectives.stopping import StoppingOptions
from cyb_jax.methods.slot_models.read_loops import LoopCache, ReadLoops
from cyb_jax.methods.stopping_method import StoppingMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class CybLoopedConfig(StoppingOptions):
  """The options of `cyb_looped`: the options of the stopping-time losses.

  Attributes:
    pauses: K, the number of passes through the layers after the first one.
  """

  name: ClassVar[str] = "cyb_looped"
  RULES: ClassVar = {"pauses": number_of_slots(1, note="; without a second loop it is 'baseline'")}

  def build(self, backbone: Backbone) -> CybLooped:
    return CybLooped(self, backbone)


class CybLooped(StoppingMethod):
  """CYB-AP, CYB-VA and CYB-DP over loops; also implements `abilities.EarlyExit`."""

  config: CybLoopedConfig
  slot_model: ReadLoops

  def __init__(self, config: CybLoopedConfig, backbone: Backbone):
    super().__init__(config, backbone, ReadLoops(backbone, config.num_slots))

  def fill_cache(self, cache: LoopCache, *, cache_index: Int[Array, "B"], slots: Int[Array, "B"]) -> LoopCache:
    return self.slot_model.fill_cache(cache, cache_index=cache_index, slots=slots)
