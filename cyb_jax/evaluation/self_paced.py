"""Self-paced evaluation of a given text: its likelihood under self-paced generation.

A model trained with all pauses after every token (recipe *constant*) has never seen a context in which some pauses are
missing, but self-paced generation creates such contexts: at each token n it draws S_n ~ s, runs S_n - 1 pauses, which
stay in the context, and generates the next token y_n with probability t_{S_n}. s and t depend on the context c_n, which
holds the kept pauses of earlier tokens. So the text y has the probability

    P(y) = sum over S_1, .., S_N of prod_n s_{S_n}(c_n) t_{S_n}(c_n).

The sum has W^N terms. It is estimated with one particle: all W slots of a token are read, the target is scored as Z_n =
sum_i s_i t_i, and the kept pauses are drawn conditionally on the target, from r_i = s_i t_i / Z_n. Every factor then
has the value s t = r Z, and the product of the Z_n is exact in expectation:

    E[prod_n Z_n] = sum over S of prod_n r_{S_n} Z_n = sum over S of prod_n s_{S_n} t_{S_n} = P(y).

Its logarithm is at most log P(y) in expectation (Jensen), so the reported perplexity is an upper bound up to noise. The
draw is not conditioned on a target without weight: the pauses before it are drawn from s.

`kept` = 'stopping' draws all pauses from s without conditioning on the target. The product of the Z_n is then not the
likelihood of any sampler, because the sampler would generate the given text after other pauses.

If pauses are hidden from later tokens, no pause stays in the context, both draws give the same scores, and the output
equals that of `Method.evaluate`. If slots are loops at one cache index (`methods.EarlyExit`), later tokens see the keys
and values of a token's last loop in place of the loops that it did not run.

Letters: B batch, T tokens, W slots, N tokens of a text.
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

# How the slots that stay in the context are drawn.
KEPT = ("posterior", "stopping")
# A fixed seed, so that the same text always gives the same result.
_SEED = 0


def evaluate_self_paced(
  method: CachedDecoding, params: Params, batch: Batch, omega: Any = None, *, kept: str = "posterior", seed: int = _SEED
) -> tuple[EvalOutput, Int[Array, "B T"]]:
  """Evaluates every slot of a text whose context holds only the pauses that the model requests.

  Args:
    method: a method that decodes slot by slot.
    params: bare arrays.
    batch: see `methods.Batch`.
    omega: the step budget; see `stopping.log_stopping_distribution`.
    kept: 'posterior': the slots that stay are drawn from r; 'stopping': from s.
    seed: the seed of the draws, which also depend on the row's tokens.

  Returns:
    The output, with the loss -log sum_i s_i t_i; and i32[B, T], the number of slots of each token that stay in the
    context.
  """
  tokens, targets = batch["tokens"], batch["targets"]
  rows, length = tokens.shape
  width = method.num_slots
  slots = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (rows, width))
  keys = row_keys(jax.random.key(seed), tokens)

  def read(carry, column):
    cache, cache_index, first, position = carry
    token, target, known, begin, number = column
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
    log_kept = log_stopping
    if kept == "posterior":
      log_kept += jnp.where(known[:, None], scores.log_target, 0.0)
    used = jax.vmap(jax.random.categorical)(stop_keys, log_kept).astype(jnp.int32) + 1
    if isinstance(method, EarlyExit):
      cache = method.fill_cache(cache, cache_index=cache_index, slots=used)
    # The next token's slots overwrite the slots that are not kept.
    cache_index = cache_index + (1 if method.hides_pauses else used)
    # Hidden pauses have positions of their own in training, whether or not they run here.
    stride = (width if method.hides_pauses else used) if method.shifts_positions else 1
    return (cache, cache_index, first, position + stride), (scores, log_stopping, used)

  zeros = jnp.zeros(rows, jnp.int32)
  cache = method.empty_cache(rows, length * width)
  columns = (tokens.T, targets.T, batch["weights"].T > 0, _document_starts(batch).T, jnp.arange(length))
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
  """The scores [B, W] of the targets, from the scores of all vocabulary entries."""
  return SlotScores(
    log_target=jnp.take_along_axis(scores.log_probs, target[:, None, None], -1)[..., 0],
    log_dont_know=scores.log_dont_know,
    log_answer=scores.log_answer,
  )
