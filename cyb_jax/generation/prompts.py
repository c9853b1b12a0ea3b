"""A batch of prompts and seeds as arrays, with checks of the input.

Letters: B rows, P tokens of the longest prompt without its last token, padded.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from cyb_jax.errors import InputError, check_seed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptBatch:
  """Prompts of unequal length.

  Attributes:
    before: i32[B, P], the prompts without their last tokens, padded on the right with zeros.
    last: i32[B], the prompts' last tokens.
    lengths: i32[B], the number of tokens of each prompt, including the last token.
    limits: i32[B], the maximum number of generated tokens of each row.
  """

  before: Int[np.ndarray, "B P"]
  last: Int[np.ndarray, "B"]
  lengths: Int[np.ndarray, "B"]
  limits: Int[np.ndarray, "B"]

  @classmethod
  def of(
    cls, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, context: int | None, vocab_size: int, multiple: int
  ) -> PromptBatch:
    """Pads the prompts, P to a multiple of `multiple`; see `Sampler.generate` for the other arguments.

    Raises:
      InputError: see `Sampler.generate`.
    """
    limits = _limits(prompts, max_new_tokens, context, vocab_size)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    # The last token is not part of the prefill: the sampler's loop begins with it.
    padded = -(-(int(lengths.max()) - 1) // multiple) * multiple
    before = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in enumerate(prompts):
      before[row, : len(prompt) - 1] = prompt[:-1]
    last = np.array([prompt[-1] for prompt in prompts], np.int32)
    return cls(before, last, lengths, np.array(limits, np.int32))


def random_keys(seeds: Sequence[int] | int, rows: int) -> Array:
  """key[B], a random key of each row; from one seed, to which the row's index is added, or from one seed per row.

  Raises:
    InputError: the numbers of seeds and rows differ, or a seed is out of its range.
  """
  if isinstance(seeds, numbers.Integral):
    seeds = [int(seeds) + row for row in range(rows)]
  if len(seeds) != rows:
    raise InputError(f"seeds: {len(seeds)} seeds for {rows} prompts; give one seed for each prompt")
  for seed in seeds:
    check_seed("seed", seed)
  return jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))


def _limits(prompts: Sequence[Sequence[int]], new: int, context: int | None, vocabulary: int) -> list[int]:
  """The maximum number of generated tokens of every row.

  Raises:
    InputError: see `Sampler.generate`.
  """
  if new < 1:
    raise InputError(f"max_new_tokens: {new} must be at least 1")
  if not prompts:
    raise InputError("prompt: no prompt is given; give at least one")
  limits = []
  for row, prompt in enumerate(prompts):
    if not len(prompt):
      raise InputError(f"prompt: number {row + 1} is empty; give at least one token")
    wrong = [int(token) for token in prompt if not 0 <= token < vocabulary]
    if wrong:
      raise InputError(f"prompt: number {row + 1} has the id {wrong[0]}; ids must be in 0..{vocabulary - 1}")
    limit = new if context is None else context - len(prompt)
    if limit < 1:
      raise InputError(
        f"prompt: number {row + 1} has {len(prompt)} tokens, but the context is {context}; give at most {context - 1}"
      )
    limits.append(min(new, limit))
  return limits
