"""Self-paced evaluation of a given text: perplexity in the contexts that self-paced generation creates.

A model trained with all pauses after every token (recipe *constant*) has never seen a context in which some pauses are
missing, but self-paced generation creates such contexts. Here the tokens of the text are given. All W slots of a token
are read, and its target is scored as -log sum_i s_i t_i. Then S ~ s is drawn, independently of the target, and only the
S - 1 pauses that the model would have run stay in the context. If pauses are hidden from later tokens, none of them
stays, and the output equals that of `Method.evaluate`. If slots are loops over one place in the cache
(`methods.EarlyExit`), later tokens see at a loop that was not run what the last loop that was run has there.

Letters: B batch, T tokens, W slots.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from cyb_jax.methods import Batch, CachedDecoding, EarlyExit, EvalOutput, Params, SlotInputs
from cyb_jax.pauses import row_keys
from cyb_jax.readout import TokenScores
from cyb_jax.stopping import SlotScores, log_stopping_distribution

# A fixed seed, so that the same text always gives the same result.
_SEED = 0


def evaluate_self_paced(
  method: CachedDecoding, params: Params, batch: Batch, omega: Any = None
) -> tuple[EvalOutput, Int[Array, "B T"]]:
  """Evaluates every slot of a text whose context holds only the pauses that the model requests.

  Args:
    method: a method that decodes slot by slot.
    params: bare arrays.
    batch: see `methods.Batch`.
    omega: the step budget; see `stopping.log_stopping_distribution`.

  Returns:
    The output, with the loss -log sum_i s_i t_i; and i32[B, T], how many slots of each token were drawn to stay in the
    context.
  """
  tokens, targets = batch["tokens"], batch["targets"]
  rows, length = tokens.shape
  width = method.num_slots
  slots = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (rows, width))
  keys = row_keys(jax.random.key(_SEED), tokens)

  def read(carry, column):
    cache, cache_index, first, position = carry
    token, target, begin, number = column
    first = jnp.where(begin, cache_index, first)
    hidden, cache = method.extend(
      params,
      SlotInputs(
        tokens=jnp.broadcast_to(token[:, None], (rows, width)),
        slots=slots,
        positions=position[:, None] + (slots if method.shifts_positions else jnp.zeros_like(slots)),
      ),
      cache,
      cache_index,
      first,
    )
    scores = _target_scores(method.token_scores(params, hidden, slots), target)
    log_stopping = log_stopping_distribution(scores.log_dont_know, scores.log_answer, omega)
    stop_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
    used = jax.vmap(jax.random.categorical)(stop_keys, log_stopping).astype(jnp.int32) + 1
    if isinstance(method, EarlyExit):
      cache = method.fill_cache(cache, cache_index=cache_index, slots=used)
    # The next token's slots overwrite those that are not kept.
    cache_index = cache_index + (1 if method.hides_pauses else used)
    # In training hidden pauses occupy positions of their own, whether they are run here or not.
    stride = (width if method.hides_pauses else used) if method.shifts_positions else 1
    return (cache, cache_index, first, position + stride), (scores, log_stopping, used)

  zeros = jnp.zeros(rows, jnp.int32)
  cache = method.empty_cache(rows, length * width)
  columns = (tokens.T, targets.T, _document_starts(batch).T, jnp.arange(length))
  _, read_out = jax.lax.scan(read, (cache, zeros, zeros, zeros), columns)
  scores, log_stopping, used = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), read_out)
  loss = -jax.nn.logsumexp(log_stopping + scores.log_target, -1)
  return EvalOutput(loss=loss, scores=scores, log_stopping=log_stopping), used


def _document_starts(batch: Batch) -> Bool[Array, "B T"]:
  """Which tokens begin a document inside a row; the first token of a row is not marked."""
  starts = jnp.zeros(batch["tokens"].shape, bool)
  segment_ids = batch.get("segment_ids")
  if segment_ids is None:
    return starts
  return jnp.concatenate([starts[:, :1], segment_ids[:, 1:] != segment_ids[:, :-1]], 1)


def _target_scores(scores: TokenScores, target: Int[Array, "B"]) -> SlotScores:
  """The scores [B, W] of the targets, from those of all tokens."""
  return SlotScores(
    log_target=jnp.take_along_axis(scores.log_probs, target[:, None, None], -1)[..., 0],
    log_dont_know=scores.log_dont_know,
    log_answer=scores.log_answer,
  )
