"""The abilities of methods that generation and scoring depend on; no other module of the package reads them."""

from __future__ import annotations

from typing import TypeGuard

from cyb_jax.errors import InputError
from cyb_jax.methods import Adaptive, Decoding, EarlyExit, Method, PromptPauses, SequentialDecoding


def check_decodes(method: Method) -> None:
  """
  Raises:
    InputError: the method cannot run slot by slot on a cache.
  """
  if not isinstance(method, Decoding):
    raise InputError(
      f"method.name: {method.name!r} doesn't run slot by slot, so it can't generate or score text; use a method"
      " with a cache, such as 'cyb', 'tbys' or 'baseline'"
    )


def is_recurrent(method: Decoding) -> TypeGuard[SequentialDecoding]:
  """Whether each slot's input is the output of the previous slot, so that a token's slots run one after the other."""
  return isinstance(method, SequentialDecoding)


def slots_share_cache_index(method: Decoding) -> bool:
  """Whether the slots of a token are loops at one cache index, all of which run for each token of a prompt."""
  return isinstance(method, EarlyExit)


def num_prompt_pauses(method: Decoding) -> int:
  """The number of pauses that run once after the prompt, before the first token is generated."""
  return method.prompt_pauses if isinstance(method, PromptPauses) else 0


def with_prompt_pauses(method: Method, pauses: int) -> Method:
  """The same method with another number of pauses after a prompt.

  Raises:
    InputError: the method has no such pauses, or does not support this number.
  """
  if not isinstance(method, PromptPauses):
    raise InputError(
      f"--pauses: {pauses} is set, but method {method.name!r} has no pauses between a prompt and the generated text;"
      " leave it out"
    )
  return method.with_prompt_pauses(pauses)


def trained_with_all_pauses(method: Method) -> bool:
  """Whether every token of the training texts is followed by pauses that later tokens attend to."""
  return isinstance(method, Decoding) and method.num_slots > 1 and method.keeps_all_pauses


def trained_self_paced(method: Method) -> bool:
  """Whether a context with only the requested pauses is one that training has shown: pauses are hidden from other
  tokens, or their number is drawn, or there are none.
  """
  return not trained_with_all_pauses(method) or method.hides_pauses


def can_pace_itself(method: Method) -> bool:
  """Whether the model may decide the number of a token's pauses, slot by slot."""
  return isinstance(method, Adaptive) and not isinstance(method, SequentialDecoding) and method.num_slots > 1


def default_mode(method: Method) -> str:
  """The mode of `SamplingOptions` that suits a method.

  'self_paced' if the model decides when a token is read and was trained with self-paced contexts; 'constant' for other
  methods with pauses, and if a token's slots run one after the other; 'none' without pauses.
  """
  if isinstance(method, SequentialDecoding):
    return "constant"
  if method.num_slots == 1:
    return "none"
  return "self_paced" if can_pace_itself(method) and trained_self_paced(method) else "constant"
