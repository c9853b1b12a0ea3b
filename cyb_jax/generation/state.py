"""The state of the sampler's loop, and the random draws that depend on it.

Letters: B rows, N maximum number of new tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cyb_jax.decoder import Cache

# The purposes of random draws; draws for different purposes have different keys.
STEP_BUDGET, STOP, TOKEN = range(3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
  """The state of every row; the loop carries it and donates its buffers.

  Attributes:
    cache: the cache of the slots in the rows' contexts.
    token: i32[B], the current token: first the prompt's last token, then the last generated token.
    slot: i32[B], the index of the token's next slot: 0 is the token itself, k is its k-th pause. Always 0 in mode
      constant.
    cache_index: i32[B], the cache index of the token's own slot.
    position: i32[B], the rotary position of the token.
    seeds: key[B], a random key of every row.
    pause_budget: i32[B], the remaining number of pauses that the row may request.
    token_limit: i32[B], the maximum number of generated tokens of the row.
    num_generated: i32[B], the number of generated tokens of the row.
    finished: bool[B], whether the row is complete.
    tokens: i32[B, N], the generated tokens, padded with -1.
    pauses: i32[B, N], the number of pauses before each token was read.
    log_probs: f32[B, N], the log-probability of each token, see `Generation`.
    iterations: i32[], the number of iterations of the loop.
  """

  cache: Cache
  token: Int[Array, "B"]
  slot: Int[Array, "B"]
  cache_index: Int[Array, "B"]
  position: Int[Array, "B"]
  seeds: Array
  pause_budget: Int[Array, "B"]
  token_limit: Int[Array, "B"]
  num_generated: Int[Array, "B"]
  finished: Bool[Array, "B"]
  tokens: Int[Array, "B N"]
  pauses: Int[Array, "B N"]
  log_probs: Float[Array, "B N"]
  iterations: Int[Array, ""]

  def keys(self, purpose: int) -> Array:
    """key[B], a random key of each row for its current token, its current slot and this purpose."""

    def key(seed: Array, num_generated: Array, slot: Array) -> Array:
      return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(seed, num_generated), slot), purpose)

    return jax.vmap(key)(self.seeds, self.num_generated, self.slot)

  def uniform(self, purpose: int) -> Float[Array, "B"]:
    """f32[B], a uniform number in [0, 1) for each row, drawn with `keys`."""
    return jax.vmap(jax.random.uniform)(self.keys(purpose))

  def emit(
    self,
    cache: Cache,
    emits: Bool[Array, "B"],
    *,
    token: Int[Array, "B"],
    pauses: Int[Array, "B"],
    log_prob: Float[Array, "B"],
    end_ids: Int[Array, "E"],
  ) -> SamplerState:
    """The state after an iteration in which the rows `emits` generate a token.

    Args:
      cache: the cache, including the slots of this iteration.
      emits: bool[B].
      token, pauses, log_prob: [B], stored in the rows that generate a token.
      end_ids: i32[E], the tokens that finish their row.
    """
    rows = jnp.arange(len(token))
    # An index out of bounds is dropped.
    column = jnp.where(emits, self.num_generated, self.tokens.shape[1])
    num_generated = self.num_generated + emits
    return dataclasses.replace(
      self,
      cache=cache,
      token=jnp.where(emits, token, self.token),
      num_generated=num_generated,
      finished=self.finished | (emits & ((token[:, None] == end_ids).any(-1) | (num_generated >= self.token_limit))),
      tokens=self.tokens.at[rows, column].set(token, mode="drop"),
      pauses=self.pauses.at[rows, column].set(pauses, mode="drop"),
      log_probs=self.log_probs.at[rows, column].set(log_prob, mode="drop"),
      iterations=self.iterations + 1,
    )
