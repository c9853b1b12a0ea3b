"""The state of the sampler's loop, the random draws that depend on it, and the trace of slots that it may record.

Letters: B rows, N maximum number of new tokens, W slots of a token, Q slots that run together, V vocabulary,
A alternatives of a token.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cyb_jax.decoder import Cache
from cyb_jax.readout import TokenScores

# The purposes of random draws; draws for different purposes have different keys.
STEP_BUDGET, STOP, TOKEN = range(3)

EndIds = Int[Array, "*B E"]
"""The tokens that finish a row: i32[E], of all rows, or i32[B, E], of each row; -1 is no token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotTrace:
  """The scores of every slot of the generated tokens; a sampler records them only if its state has a trace.

  Attributes:
    log_dont_know: f32[B, N, W], log d at each slot of each token; NaN at slots that did not run.
    log_target: f32[B, N, W], the log-probability of the generated token at each slot, given that the slot answers; NaN
      at slots that did not run.
    log_probs: f32[B, W, V], the token distribution at each slot of the current token.
    num_alternatives: i32[B], whether the most likely tokens are recorded: they are not if all rows have 0.
    top_ids: i32[B, N, A], the A most likely tokens of the distribution that each token was read from.
    top_log_probs: f32[B, N, A], their log-probabilities.
  """

  log_dont_know: Float[Array, "B N W"]
  log_target: Float[Array, "B N W"]
  log_probs: Float[Array, "B W V"]
  num_alternatives: Int[Array, "B"]
  top_ids: Int[Array, "B N A"]
  top_log_probs: Float[Array, "B N A"]

  @classmethod
  def empty(cls, rows: int, tokens: int, slots: int, vocabulary: int, alternatives: int) -> SlotTrace:
    """A trace of B rows, N tokens, W slots, V vocabulary entries and A alternatives."""
    alternatives = min(alternatives, vocabulary)
    return cls(
      log_dont_know=jnp.full((rows, tokens, slots), jnp.nan),
      log_target=jnp.full((rows, tokens, slots), jnp.nan),
      log_probs=jnp.full((rows, slots, vocabulary), jnp.nan),
      num_alternatives=jnp.zeros(rows, jnp.int32),
      top_ids=jnp.zeros((rows, tokens, alternatives), jnp.int32),
      top_log_probs=jnp.zeros((rows, tokens, alternatives)),
    )

  def record(
    self,
    state: SamplerState,
    slots: Int[Array, "B Q"],
    scores: TokenScores,
    *,
    emits: Bool[Array, "B"],
    token: Int[Array, "B"],
    log_probs: Float[Array, "B V"],
  ) -> SlotTrace:
    """The trace after an iteration.

    Args:
      state: the state before the iteration.
      slots: i32[B, Q], the slots that have run.
      scores: [B, Q], their scores.
      emits: bool[B], the rows that generate a token.
      token: i32[B], this token.
      log_probs: f32[B, V], the distribution that the token was read from.
    """
    rows, num_slots = jnp.arange(len(token)), self.log_probs.shape[1]
    # Indices out of bounds are dropped: those of finished rows, and of pauses after the prompt.
    column = jnp.where(state.finished, self.top_ids.shape[1], state.num_generated)
    emitted = jnp.where(emits, column, self.top_ids.shape[1])
    held = self.log_probs.at[rows[:, None], slots].set(scores.log_probs, mode="drop")
    target = jnp.take_along_axis(held, token[:, None, None], 2)[..., 0]
    target = jnp.where(jnp.arange(num_slots) <= slots[:, -1:], target, jnp.nan)

    def record_alternatives() -> tuple[Array, Array]:
      values, ids = jax.lax.top_k(log_probs, self.top_ids.shape[-1])
      return (
        self.top_ids.at[rows, emitted].set(ids.astype(jnp.int32), mode="drop"),
        self.top_log_probs.at[rows, emitted].set(values, mode="drop"),
      )

    wanted = (emits & (self.num_alternatives > 0)).any()
    top_ids, top_log_probs = jax.lax.cond(wanted, record_alternatives, lambda: (self.top_ids, self.top_log_probs))
    return dataclasses.replace(
      self,
      log_dont_know=self.log_dont_know.at[rows[:, None], column[:, None], slots].set(scores.log_dont_know, mode="drop"),
      log_target=self.log_target.at[rows, emitted].set(target, mode="drop"),
      log_probs=held,
      top_ids=top_ids,
      top_log_probs=top_log_probs,
    )


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
    trace: the scores of every slot; None: they are not recorded.
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
  trace: SlotTrace | None = None

  @classmethod
  def empty(cls, cache: Cache, rows: int, tokens: int, trace: SlotTrace | None = None) -> SamplerState:
    """The state of B rows that are finished and have generated nothing, with space for N tokens each."""
    zeros, nothing = jnp.zeros(rows, jnp.int32), (rows, tokens)
    return cls(
      cache=cache,
      token=zeros,
      slot=zeros,
      cache_index=zeros,
      position=zeros,
      seeds=jax.vmap(jax.random.key)(jnp.zeros(rows, jnp.uint32)),
      pause_budget=zeros,
      token_limit=zeros,
      num_generated=zeros,
      finished=jnp.ones(rows, bool),
      tokens=jnp.full(nothing, -1, jnp.int32),
      pauses=jnp.zeros(nothing, jnp.int32),
      log_probs=jnp.zeros(nothing, jnp.float32),
      iterations=jnp.zeros((), jnp.int32),
      trace=trace,
    )

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
    end_ids: EndIds,
    trace: SlotTrace | None = None,
  ) -> SamplerState:
    """The state after an iteration in which the rows `emits` generate a token.

    Args:
      cache: the cache, including the slots of this iteration.
      emits: bool[B].
      token, pauses, log_prob: [B], stored in the rows that generate a token.
      end_ids: the tokens that finish their row.
      trace: the trace after the iteration.
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
      trace=trace,
    )
