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
    return most_likely(super().logits(log_probs), self.top_k, self.top_p)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowTokenSampler:
  """Each row has its own sampler: the tokens are those of `choose_token_sampler` for the row's options.

  Attributes:
    temperature: f32[B], at least 0; 0: the most likely token.
    top_k: i32[B], in 1..V.
    top_p: f32[B], in (0, 1].
  """

  temperature: Float[Array, "B"]
  top_k: Int[Array, "B"]
  top_p: Float[Array, "B"]

  def sample(self, keys: Array, log_probs: Float[Array, "B V"]) -> Int[Array, "B"]:
    greedy = self.temperature == 0
    best = Greedy().sample(keys, log_probs)
    # Draws and sorting are skipped if no row needs them.
    drawn = jax.lax.cond(greedy.all(), lambda: best, lambda: self._draw(keys, log_probs))
    return jnp.where(greedy, best, drawn)

  def _draw(self, keys: Array, log_probs: Float[Array, "B V"]) -> Int[Array, "B"]:
    logits = log_probs / jnp.where(self.temperature == 0, 1.0, self.temperature)[:, None]
    restricted = (self.top_k < logits.shape[-1]) | (self.top_p < 1)

    def restrict() -> Array:
      kept = most_likely(logits, self.top_k[:, None], self.top_p[:, None])
      return jnp.where(restricted[:, None], kept, logits)

    logits = jax.lax.cond(restricted.any(), restrict, lambda: logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def most_likely(
  logits: Float[Array, "B V"],
  top_k: Int[Array, "*B 1"] | Int[Array, ""],
  top_p: Float[Array, "*B 1"] | Float[Array, ""],
) -> Float[Array, "B V"]:
  """The logits with -inf for the tokens that `TopKTopP` excludes; `top_k` and `top_p` broadcast to [B, V]."""
  falling = jnp.flip(jnp.sort(logits, -1), -1)
  rank = jnp.arange(logits.shape[-1])
  falling = jnp.where(rank < top_k, falling, -jnp.inf)
  probabilities = jax.nn.softmax(falling, -1)
  before = jnp.cumsum(probabilities, -1) - probabilities
  # If f32 rounds top_p to 0, the most likely token is still kept.
  kept = (rank == 0) | (before < top_p) & (rank < top_k)
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
