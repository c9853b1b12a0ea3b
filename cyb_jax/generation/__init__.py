"""Text at the model's own pace, and how likely it finds text that is given."""

from cyb_jax.generation.options import SamplingOptions, default_mode
from cyb_jax.generation.sampler import Generation, Sampler, SamplerState
from cyb_jax.generation.scoring import Score, Scorer
from cyb_jax.generation.text import PAUSE_MARK, Continuation, printable

__all__ = [
  "PAUSE_MARK",
  "Continuation",
  "Generation",
  "Sampler",
  "SamplerState",
  "SamplingOptions",
  "Score",
  "Scorer",
  "default_mode",
  "printable",
]
