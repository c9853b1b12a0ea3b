"""Sampling of a token from its distribution. The numbers are leaves of a pytree, so changing them does not recompile.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cyb_jax.generation.options import SamplingOptions


class TokenSampler(Protocol):
  """Chooses a token for every row."""

  def sample(self, keys: Array, log_probs: Float[Array, "B V"]) -> Int[Array, "B"]:
    """i32[B], a token for every row.

    Args:
      keys: key[B], a random key of each row.
      log_probs: f32[B, V], at temperature 1.
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
  """The most likely token."""

  def sample(self, keys: Array, log_probs: Float[Array, "B V"]) -> Int[Array, "B"]:
    del keys
    return jnp.argmax(log_probs, -1).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Temperature:
  """Draws from all tokens.

  Attributes:
    temperature: f32[], positive.
  """

  temperature: Float[Array, ""]

  def sample(self, keys: Array, log_probs: Float[Array, "B V"]) -> Int[Array, "B"]:
    return jax.vmap(jax.random.categorical)(keys, self.logits(log_probs)).astype(jnp.int32)

  def logits(self, log_probs: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """The unnormalised log-probabilities of the draw; -inf excludes a token."""
    return log_probs / self.temperature


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopKTopP(Temperature):
  """Draws from the k most likely tokens, restricted to the most likely of them that together have probability p.

  The most likely token is always kept. Tokens of equal probability are kept or excluded together. Top-k and top-p are
  one sampler because both use the same ranking, and because one program then suffices for requests that set only one of
  them.

  Attributes:
    top_k: i32[], at least 1.
    top_p: f32[], in (0, 1].
  """

  top_k: Int[Array, ""]
  top_p: Float[Array, ""]

  def logits(self, log_probs: Float[Array, "B V"]) -> Float[Array, "B V"]:
    logits = super().logits(log_probs)
    falling = jnp.flip(jnp.sort(logits, -1), -1)
    rank = jnp.arange(logits.shape[-1])
    falling = jnp.where(rank < self.top_k, falling, -jnp.inf)
    probabilities = jax.nn.softmax(falling, -1)
    before = jnp.cumsum(probabilities, -1) - probabilities
    # If f32 rounds top_p to 0, the most likely token is still kept.
    kept = (rank == 0) | (before < self.top_p) & (rank < self.top_k)
    lowest = jnp.where(kept, falling, math.inf).min(-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def choose_token_sampler(options: SamplingOptions, vocab_size: int) -> TokenSampler:
  """The token sampler for checked options."""
  if options.temperature == 0:
    return Greedy()
  temperature = jnp.float32(options.temperature)
  if options.top_k == 0 and options.top_p == 1:
    return Temperature(temperature)
  top_k = min(options.top_k or vocab_size, vocab_size)
  return TopKTopP(temperature, jnp.int32(top_k), jnp.float32(options.top_p))
