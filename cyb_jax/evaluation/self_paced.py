"""Reading a text at the model's own pace: what perplexity is worth in the contexts that self-paced inference makes.

A model trained with all pauses after every token (recipe *constant*) has never seen a context in which some are
missing, but that is what it meets when it speaks at its own pace. Here the text is given, token by token. All W slots
of a token are read, and its target is scored as -log sum_i s_i t_i; then S ~ s is drawn, without looking at the target,
and only the S - 1 pauses that the model would have run stay in the context. Where pauses are hidden from later tokens
none stays, and the output is the constant one.

Dimensions: B batch, T tokens, W slots, C places in the cache, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from cyb_jax.decoder import empty_cache
from cyb_jax.methods import Batch, EvalOutput
from cyb_jax.methods.interface import Params
from cyb_jax.methods.paused import PausedMethod
from cyb_jax.pauses import row_keys
from cyb_jax.stopping import SlotScores, log_stopping_distribution

# The same text is read the same way every time.
_SEED = 0


def evaluate_self_paced(
  method: PausedMethod, params: Params, batch: Batch, omega: Any = None
) -> tuple[EvalOutput, Int[Array, "B T"]]:
  """Reads every slot of a text whose context holds the pauses alone that the model asks for.

  Args:
    method: run slot by slot.
    params: bare arrays.
    batch: see `methods.Batch`.
    omega: what the world grants; see `stopping.log_stopping_distribution`.

  Returns:
    The output, its loss -log sum_i s_i t_i; and i32[B, T], how many slots of each token the context kept, as drawn.
  """
  tokens, targets = batch["tokens"], batch["targets"]
  rows, length = tokens.shape
  width = method.num_slots
  slots = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (rows, width))
  keys = row_keys(jax.random.key(_SEED), tokens)
  segment_ids = batch.get("segment_ids")
  begins = jnp.zeros(tokens.shape, bool)
  if segment_ids is not None:
    begins = jnp.concatenate([begins[:, :1], segment_ids[:, 1:] != segment_ids[:, :-1]], 1)

  def read(carry, column):
    cache, place, first, position = carry
    token, target, begin, number = column
    first = jnp.where(begin, place, first)
    hidden, cache = method.extend(
      params,
      jnp.broadcast_to(token[:, None], (rows, width)),
      slots,
      position[:, None] + (slots if method.shifts_positions else jnp.zeros_like(slots)),
      cache,
      place,
      first,
    )
    words = method.token_scores(params, hidden, slots)
    scores = SlotScores(
      log_target=jnp.take_along_axis(words.log_probs, target[:, None, None], -1)[..., 0],
      log_dont_know=words.log_dont_know,
      log_answer=words.log_answer,
    )
    log_stopping = log_stopping_distribution(scores.log_dont_know, scores.log_answer, omega)
    stop_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
    used = jax.vmap(jax.random.categorical)(stop_keys, log_stopping).astype(jnp.int32) + 1
    # Slots that aren't kept are written over by the next token's.
    place = place + (1 if method.hides_pauses else used)
    # Hidden pauses that aren't run stand, in training, all the same.
    stride = (width if method.hides_pauses else used) if method.shifts_positions else 1
    return (cache, place, first, position + stride), (scores, log_stopping, used)

  zeros = jnp.zeros(rows, jnp.int32)
  cache = empty_cache(method.cache_config, rows, length * width)
  columns = (tokens.T, targets.T, begins.T, jnp.arange(length))
  _, read_out = jax.lax.scan(read, (cache, zeros, zeros, zeros), columns)
  scores, log_stopping, used = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), read_out)
  loss = -jax.nn.logsumexp(log_stopping + scores.log_target, -1)
  return EvalOutput(loss=loss, scores=scores, log_stopping=log_stopping), used
