"""Where the slots of a row are stored in the cache, and which rotary positions they have.

Letters: B rows, P tokens of a prompt, N new tokens at most, W slots of a token.
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
    num_slots: W, the most slots that a generated token may have.
    prompt_slots: slots of each token of the prompt.
    keeps_pauses: whether the pauses of a token stay in the context of later tokens. Otherwise the next token overwrites
      them in the cache.
    shifts_positions: whether a pause takes a position of its own.
    prompt_stride: positions between neighbouring tokens of the prompt.
    stride: positions between neighbouring generated tokens; None: as many as the first of the two has run slots.
  """

  num_slots: int
  prompt_slots: int
  keeps_pauses: bool
  shifts_positions: bool
  prompt_stride: int
  stride: int | None

  @classmethod
  def of(cls, method: Decoding, num_slots: int, *, pauses_in_prompt: bool) -> SlotLayout:
    """The layout that equals the method's training layout, with `num_slots` slots of a token."""
    # No later token sees hidden pauses, so those of the prompt are not run.
    prompt_slots = num_slots if pauses_in_prompt and not method.hides_pauses else 1
    if not method.shifts_positions:
      strides = (1, 1)
    elif method.hides_pauses:
      # In training hidden pauses occupy positions of their own, whether they are run here or not.
      strides = (method.num_slots, method.num_slots)
    else:
      strides = (prompt_slots, None)
    return cls(num_slots, prompt_slots, not method.hides_pauses, method.shifts_positions, *strides)

  def positions(self, position: Int[Array, "..."], slot: Int[Array, "..."]) -> Int[Array, "..."]:
    """The rotary positions of a token's slots, from the token's own position."""
    return position + (slot if self.shifts_positions else jnp.zeros_like(slot))

  def capacity(self, prompt_tokens: int, new_tokens: int) -> int:
    """Cache entries that a row needs for its prompt without the last token, and for the tokens after that."""
    of_token = self.num_slots if self.keeps_pauses else 1
    return prompt_tokens * self.prompt_slots + (new_tokens - 1) * of_token + self.num_slots

  def next_token(self, before: SamplerState, state: SamplerState, ran: Int[Array, "B"] | int) -> SamplerState:
    """Moves the rows that have generated a token, and are not finished, on to that token.

    Args:
      before: the state before the iteration.
      state: the state after the token was generated.
      ran: i32[B], how many slots have run of the token before the generated one.
    """
    moves = (state.num_generated > before.num_generated) & ~state.finished
    return dataclasses.replace(
      state,
      cache_index=state.cache_index + jnp.where(moves, ran if self.keeps_pauses else 1, 0),
      position=state.position + jnp.where(moves, ran if self.stride is None else self.stride, 0),
    )
