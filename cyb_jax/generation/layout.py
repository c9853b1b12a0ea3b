"""The cache indices and rotary positions of the slots of a row.

Letters: B rows, P tokens of a prompt, N maximum number of new tokens, W slots of a token.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from cyb_jax.generation.state import SamplerState
from cyb_jax.methods import Decoding


@dataclasses.dataclass(frozen=True)
class SlotLayout:
  """The arrangement of slots in the cache and in positions; hashable, static in compiled programs.

  Attributes:
    num_slots: W, the maximum number of slots of a generated token.
    prompt_slots: the number of slots of each token of the prompt.
    keeps_pauses: whether the pauses of a token stay in the context of later tokens. Otherwise the next token overwrites
      them in the cache.
    shifts_positions: whether a pause has its own position.
    prompt_stride: the distance in positions between neighbouring tokens of the prompt.
    stride: the distance in positions between neighbouring generated tokens; None: the number of slots that the first of
      the two tokens has run.
  """

  num_slots: int
  prompt_slots: int
  keeps_pauses: bool
  shifts_positions: bool
  prompt_stride: int
  stride: int | None

  @classmethod
  def of(cls, method: Decoding, num_slots: int, *, pauses_in_prompt: bool) -> SlotLayout:
    """The layout that matches the method's training layout, with `num_slots` slots per token."""
    # No later token sees hidden pauses, so the hidden pauses of the prompt are not run.
    prompt_slots = num_slots if pauses_in_prompt and not method.hides_pauses else 1
    if not method.shifts_positions:
      strides = (1, 1)
    elif method.hides_pauses:
      # Hidden pauses have positions of their own in training, whether or not they run at inference.
      strides = (method.num_slots, method.num_slots)
    else:
      strides = (prompt_slots, None)
    return cls(num_slots, prompt_slots, not method.hides_pauses, method.shifts_positions, *strides)

  def positions(self, position: Int[Array, "..."], slot: Int[Array, "..."]) -> Int[Array, "..."]:
    """The rotary positions of a token's slots, from the token's own position."""
    return position + (slot if self.shifts_positions else jnp.zeros_like(slot))

  def capacity(self, prompt_tokens: int, new_tokens: int) -> int:
    """The number of cache entries that a row needs: for its prompt without the last token, and for all later tokens."""
    of_token = self.num_slots if self.keeps_pauses else 1
    return prompt_tokens * self.prompt_slots + (new_tokens - 1) * of_token + self.num_slots

  def next_token(self, before: SamplerState, state: SamplerState, ran: Int[Array, "B"] | int) -> SamplerState:
    """Advances the cache index and position of the unfinished rows that have generated a token.

    Args:
      before: the state before the iteration.
      state: the state after the token was generated.
      ran: i32[B], the number of slots that the token before the generated token has run.
    """
    moves = (state.num_generated > before.num_generated) & ~state.finished
    return dataclasses.replace(
      state,
      cache_index=state.cache_index + jnp.where(moves, ran if self.keeps_pauses else 1, 0),
      position=state.position + jnp.where(moves, ran if self.stride is None else self.stride, 0),
    )
