"""Self-paced text generation, and the likelihood of given text."""

from cyb_jax.generation.abilities import default_mode
from cyb_jax.generation.continuous import Lane, NewTokens, RowRequest, RunningBatch
from cyb_jax.generation.options import SamplingOptions
from cyb_jax.generation.sampler import Generation, Sampler
from cyb_jax.generation.scoring import Score, Scorer
from cyb_jax.generation.state import SamplerState
from cyb_jax.generation.text import PAUSE_MARK, Continuation, printable

__all__ = [
  "PAUSE_MARK",
  "Continuation",
  "Generation",
  "Lane",
  "NewTokens",
  "RowRequest",
  "RunningBatch",
  "Sampler",
  "SamplerState",
  "SamplingOptions",
  "Score",
  "Scorer",
  "default_mode",
  "printable",
]
