"""The abilities of methods that generation and scoring depend on; no other module of the package reads them."""

from __future__ import annotations

from jaxtyping import Array, Float, Int, PyTree

from cyb_jax.errors import InputError
from cyb_jax.methods import METHODS, Method
from cyb_jax.methods.paused import PausedMethod


def check_decodes(method: Method) -> None:
  """
  Raises:
    InputError: the method cannot run slot by slot on a cache.
  """
  if not method.decodes:
    having = ", ".join(name for name, found in METHODS.items() if found.decodes)
    raise InputError(
      f"method.name: {method.name!r} doesn't run slot by slot: its text can't be generated or scored; {having} do"
    )


def is_recurrent(method: Method) -> bool:
  """Whether each slot's input is the output of the slot before it, so that a token's slots run one after the other."""
  return method.feeds_back


def num_prompt_pauses(method: Method) -> int:
  """How many pauses run once after the prompt, before the first token is generated."""
  return method.prompt_pauses


def default_mode(method: Method) -> str:
  """The mode of `SamplingOptions` that suits a method.

  'self_paced' if the model decides when a token is read; 'constant' if a rule decides, or if a token's slots run one
  after the other; 'none' without pauses.
  """
  if is_recurrent(method):
    return "constant"
  if method.num_slots == 1:
    return "none"
  return "self_paced" if method.decides else "constant"


def run_token(
  method: PausedMethod,
  params: PyTree,
  token: Int[Array, "B"],
  position: Int[Array, "B"],
  cache: PyTree,
  cache_index: Int[Array, "B"],
) -> tuple[Float[Array, "B D"], PyTree, Int[Array, "B"]]:
  """Runs a token's slots one after the other, for methods that are `is_recurrent`.

  Args:
    method: a method that is recurrent.
    params: bare arrays.
    token: i32[B], the token of each row.
    position: i32[B], its rotary position.
    cache: of `method.empty_cache`.
    cache_index: i32[B], where the token's first slot is written; the slots before that index are seen.

  Returns:
    [B, D], the state to be read; the cache; and i32[B], how many slots of the token the cache now holds.
  """
  return method.run_token(params, token, position, cache, cache_index)
