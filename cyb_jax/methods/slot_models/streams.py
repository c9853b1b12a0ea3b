"""Residual streams as slots: streams fork and are dropped between layers, within a budget of streams (Liu et al. 2025,
https://arxiv.org/abs/2510.00219).

A stream has a residual x, a log score c (initially 0) and the token that it belongs to. Before a forking layer a router
gives f, k = max(logsigmoid(W LN(x)), -20), and every stream becomes two candidates: on its left a fork with score c + f
and a learned embedding added to x; and the stream itself, with score c + k. A row keeps the candidates with the highest
scores, as many as its budget allows, in order; the rightmost stream of every token is always kept. With a budget of
4 streams and two tokens a, b:

    streams            a            b
    candidates    a'   a       b'   b         a' is a's fork
    score        -1   -3      -2   -9
    kept         a'   a       b'   b          all four

    candidates  a''  a'   a~   a   b''  b'   b~   b      before the next forking layer
    score       -4   -2   -5  -8   -3   -9  -10  -20
    kept             a'       a    b''            b      a and b are forced; then b'' and a' are the best of the rest

(the stream b' is dropped, but its fork b'' is kept). In a layer a stream has the weight P = exp(c): attention adds c to
q k before the division by sqrt(H) and multiplies values by P, and both updates of x are multiplied by P. Stream j (from
1) of the n streams of token t has the position t - 1 + j / n. Selection has no gradient: the router learns from the
scores of the kept streams.

Streams of later tokens compete with streams of earlier tokens in the same row, so the states are not causal. Forking
streams have no cache, because one more token may cause any earlier stream to be dropped.

Our choices for unpublished details: of streams with equal scores the left one is kept; in a padded row, the tokens up
to the last target with weight are real, and the budget is proportional to their number; LN has a scale and no bias. W
is initialised from a normal distribution with a standard deviation of 0.02, and the embedding of a fork with 1/sqrt(D)
(as in the authors' code).

Parameters, with one row for each of the F forking layers: `fork_norm` f32[F, D], the scale of LN; `fork_router`
f32[F, 2, D], W; `fork_input` f32[F, D], the embedding.

Dimensions: B batch, T tokens, S streams of a row, C kept streams of a row, D model, L layers, F forking layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cyb_jax.costs import flops
from cyb_jax.decoder import KeyWeights, SegmentMask
from cyb_jax.errors import InputError
from cyb_jax.methods.backbone import Backbone, boxed_row
from cyb_jax.methods.interface import Batch, Params
from cyb_jax.partitioning.rules import constrain

# The lower bound of the log-probability of forking or keeping, in nats.
_LEAST = -20.0
_ROUTER_STD = 0.02


class Segment(NamedTuple):
  """The layers `first` .. `last` - 1 between two forks, and the number of streams of a row that run through them."""

  first: int
  last: int
  streams: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
  """The streams of every row, in order; a row with fewer streams is padded with entries that have no effect.

  Attributes:
    hidden: [B, S, D], the residuals.
    log_score: f32[B, S], c.
    token: i32[B, S], the token of each stream, ascending; T for padding.
  """

  hidden: Float[Array, "B S D"]
  log_score: Float[Array, "B S"]
  token: Int[Array, "B S"]


class ForkedStreams:
  """Streams that fork before some layers.

  Args:
    backbone: the decoder and its readout.
    fork_layers: the layers, from 1, before which streams fork.
    budget: the number of streams per token that a row may have.
    reads_streams: whether every stream is read out; otherwise the sum of a token's streams is read out.
  """

  num_slots = 1

  def __init__(self, backbone: Backbone, fork_layers: tuple[int, ...], budget: float, *, reads_streams: bool):
    self.backbone = backbone
    self.fork_layers, self.budget, self.reads_streams = fork_layers, budget, reads_streams

  def init(self, rng: Array) -> Params:
    count, width = len(self.fork_layers), self.backbone.decoder_config.d_model
    router, embedding = jax.random.split(rng)
    return {
      "fork_norm": boxed_row(jnp.ones((count, width))),
      "fork_router": boxed_row(_ROUTER_STD * jax.random.normal(router, (count, 2, width))),
      "fork_input": boxed_row(jax.random.normal(embedding, (count, width)) / math.sqrt(width)),
    }

  def budgets(self, length: int) -> np.ndarray:
    """i32[T+1], the number of streams that a row may have, indexed by its number of real tokens.

    Raises:
      InputError: the budget of a full row allows no fork.
    """
    counts = self._counts(length)
    if counts[-1] <= length:
      raise InputError(
        f"method.stream_budget: {self.budget:g} streams per token allow {counts[-1]} streams in a window of"
        f" {length} tokens, so that nothing can fork; set at least {(length + 1) / length:g}"
      )
    return counts

  def _counts(self, length: int) -> np.ndarray:
    # The tolerance prevents a product such as 2.3 x 10 from losing a stream to rounding.
    return np.floor(self.budget * np.arange(length + 1) + 1e-9).astype(np.int32)

  def segments(self, length: int) -> list[Segment]:
    """The segments of layers for a window of `length` tokens; streams fork between two segments."""
    return self._segments(length, int(self.budgets(length)[-1]))

  def _segments(self, length: int, most: int) -> list[Segment]:
    streams, first = length, 0
    result = []
    for layer in self.fork_layers:
      result.append(Segment(first, layer - 1, streams))
      first, streams = layer - 1, min(2 * streams, most)
    return [*result, Segment(first, self.backbone.decoder_config.num_layers, streams)]

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T 1 D"]:
    """The sum of P x over each token's streams, after the final norm (which removes the scale of the sum)."""
    tokens = batch["tokens"]
    streams = self.streams(params, batch, real_lengths(batch))
    weighted = streams.hidden.astype(jnp.float32) * jnp.exp(streams.log_score)[..., None]
    sums = by_token(jnp.add, weighted, streams.token, tokens.shape[1])
    return self.finish(params, constrain(sums, "batch"))[:, :, None]

  def streams(self, params: Params, batch: Batch, lengths: Int[Array, "B"]) -> Streams:
    """The streams after the last layer, without the final norm.

    Args:
      params: bare arrays.
      batch: see `Batch`.
      lengths: i32[B], the number of real tokens of each row; later tokens are not seen and change nothing.
    """
    tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
    batch_size, length = tokens.shape
    size = self.backbone.decoder_config.head_size
    budget = jnp.asarray(self.budgets(length))[lengths]
    order = jnp.arange(length, dtype=jnp.int32)
    streams = Streams(
      hidden=self.backbone.embed(params, tokens),
      log_score=jnp.zeros((batch_size, length)),
      token=jnp.where(order < lengths[:, None], order, length),
    )
    for number, segment in enumerate(self.segments(length)):
      weights = scale = None
      if number:
        router = {name: params[name][number - 1] for name in ("fork_norm", "fork_router", "fork_input")}
        streams = self._fork(router, streams, budget, segment.streams, length)
        scale = jnp.exp(streams.log_score)
        weights = KeyWeights(streams.log_score / math.sqrt(size), scale)
      if segment.first == segment.last:
        continue
      mask = None
      if segment_ids is not None:
        mask = SegmentMask(jnp.take_along_axis(segment_ids, own_tokens(streams.token, length), 1))
      hidden, _ = self.backbone.apply(
        params,
        streams.hidden,
        stream_positions(streams.token, length),
        layers=(segment.first, segment.last),
        mask=mask,
        key_weights=weights,
        update_scale=scale,
        method="run_layers",
      )
      streams = dataclasses.replace(streams, hidden=hidden)
    return streams

  def _fork(self, router: Params, streams: Streams, budget: Int[Array, "B"], count: int, length: int) -> Streams:
    """Forks every stream and keeps at most `budget` streams in each row, in arrays of `count` entries."""
    normed = _layer_norm(streams.hidden, router["fork_norm"], self.backbone.decoder_config.norm_epsilon)
    # Sums of products in f32 instead of a matrix product: the selection must not depend on the rounding of a device.
    logits = (normed[:, :, None] * router["fork_router"].astype(jnp.float32)).sum(-1)
    scores = streams.log_score[..., None] + jnp.maximum(jax.nn.log_sigmoid(logits), _LEAST)
    scores = scores.reshape(len(scores), -1)  # fork, keep, fork, keep, ...
    index, live = select(jax.lax.stop_gradient(scores), streams.token, budget, count, length)
    parent, forked = index // 2, index % 2 == 0
    hidden = jnp.take_along_axis(streams.hidden, parent[..., None], 1)
    embedding = router["fork_input"].astype(hidden.dtype)
    return Streams(
      hidden=constrain(jnp.where(forked[..., None], hidden + embedding, hidden), "batch"),
      log_score=jnp.take_along_axis(scores, index, 1),
      token=jnp.where(live, jnp.take_along_axis(streams.token, parent, 1), length),
    )

  def finish(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """The final norm."""
    return self.backbone.apply(params, hidden, method="finish")

  def forward_slots(self, sequence_length: int) -> float:
    layers = self.backbone.decoder_config.num_layers
    return sum((last - first) * streams for first, last, streams in self.segments(sequence_length)) / layers

  def train_slots(self, sequence_length: int) -> float:
    return self.forward_slots(sequence_length)

  def forward_cost(self, sequence_length: int, *, slots_read: float, executed: bool) -> flops.Cost:
    """The readout cost depends on `reads_streams`, not on `slots_read`."""
    del slots_read
    return self._pass(sequence_length, self.segments(sequence_length), executed)

  def inference_cost(self, sequence_length: int, *, slots_read: float, slots: float | None) -> flops.Cost:
    """The cost of reading a text at once, because there is no cache."""
    if slots is not None:
      raise ValueError(f"slots: {slots}, but the number of streams follows from the budget")
    return self.forward_cost(sequence_length, slots_read=slots_read, executed=False)

  def autoregressive_cost(self, sequence_length: int) -> flops.Cost:
    """The cost of one pass over each prefix that reads only the last token, at its mean number of streams; a prefix
    that is too short for a fork has one stream per token.

    The layers before the first fork, and the output of its router, are causal: they run only for the last token, and
    the results for earlier tokens are cached. One more token may drop any later stream, so nothing else is cached.
    """
    config, total = self.backbone.decoder_config, flops.Cost()
    for length in range(1, sequence_length + 1):
      first, *forked = self._segments(length, int(self._counts(length)[-1]))
      total += flops.pass_cost(
        config,
        slots=1,
        keys=length,
        local_keys=flops.last_local_keys(config, length),
        layers=range(first.first, first.last),
        routing=2 * config.d_model,
      )
      cost = self._pass(length, forked)
      total += dataclasses.replace(cost.times(length), readout=cost.readout)
    return total.times(1 / sequence_length)

  def train_cost(self, sequence_length: int, *, slots_read: float, executed: bool) -> flops.Cost:
    del slots_read

    def cost(number: int, **options) -> flops.Cost:
      return flops.train_pass_cost(
        self.backbone.decoder_config,
        executed=executed,
        frozen=self.backbone.is_frozen,
        reads_twice=self.reads_streams,
        scaled=number > 0,
        **options,
      )

    return self._cost(sequence_length, self.segments(sequence_length), executed, cost)

  def _pass(self, tokens: int, segments: Sequence[Segment], executed: bool = False) -> flops.Cost:
    def cost(number: int, **options) -> flops.Cost:
      return flops.pass_cost(self.backbone.decoder_config, **options)

    return self._cost(tokens, segments, executed, cost)

  def _cost(
    self, tokens: int, segments: Sequence[Segment], executed: bool, cost: Callable[..., flops.Cost]
  ) -> flops.Cost:
    """The sum of `cost` over the segments; `cost` gets the segment's index."""
    config = self.backbone.decoder_config
    total = flops.Cost()
    for number, (first, last, streams) in enumerate(segments):
      is_last = number == len(segments) - 1
      read = streams if self.reads_streams else tokens
      total += cost(
        number,
        slots=streams / tokens,
        keys=flops.causal_keys(streams, executed),
        # The streams of a token lie between its position and the next one.
        local_keys=flops.local_keys(config, tokens, streams / tokens, executed=executed),
        slots_read=read / tokens if is_last else 0,
        layers=range(first, last),
        routing=0 if is_last else 2 * config.d_model,
      )
    return total


def real_lengths(batch: Batch) -> Int[Array, "B"]:
  """i32[B], the number of real tokens of each row: up to the last token whose target has weight, and at least one."""
  batch_size, length = batch["tokens"].shape
  if "weights" not in batch:
    return jnp.full(batch_size, length, jnp.int32)
  numbers = jnp.arange(1, length + 1, dtype=jnp.int32)
  return jnp.maximum(jnp.where(batch["weights"] > 0, numbers, 0).max(-1), 1)


def select(
  scores: Float[Array, "B 2S"], token: Int[Array, "B S"], budget: Int[Array, "B"], count: int, length: int
) -> tuple[Int[Array, "B C"], Bool[Array, "B C"]]:
  """Selects the streams that are kept after a fork.

  Args:
    scores: f32[B, 2S], of fork, keep, fork, keep, ...; finite.
    token: i32[B, S], see `Streams`.
    budget: i32[B], the number of streams that a row may keep: at least its number of tokens, at most `count`.
    count: C.
    length: T.

  Returns:
    i32[B, C], the indices of the kept streams among the 2S, in order; and bool[B, C], False for padding: a row that
    keeps fewer than C streams has its streams first.
  """
  alive = token < length
  after = jnp.concatenate([token[:, 1:], jnp.full_like(token[:, :1], length)], 1)
  forced = jnp.stack([jnp.zeros_like(alive), alive & (token != after)], -1).reshape(scores.shape)
  candidates = jnp.repeat(alive, 2, 1)
  ranks = jnp.where(candidates, jnp.where(forced, jnp.inf, scores), -jnp.inf)
  # A stable sort: of streams with equal scores the left one comes first.
  best = jnp.argsort(-ranks, axis=-1, stable=True)[:, :count]
  live = jnp.arange(count) < jnp.minimum(budget, candidates.sum(-1))[:, None]
  nothing = scores.shape[1] - 1
  return jnp.minimum(jnp.sort(jnp.where(live, best, nothing + 1), axis=-1), nothing), live


def stream_positions(token: Int[Array, "B S"], length: int) -> Float[Array, "B S"]:
  """f32[B, S], positions for the rotary embeddings: t - 1 + j / n for stream j (from 1) of the n of token t.

  Args:
    token: i32[B, S], see `Streams`.
    length: T.
  """
  ends = stream_ends(token, length)
  starts = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))
  own = own_tokens(token, length)
  start, count = (jnp.take_along_axis(x, own, 1) for x in (starts, ends - starts))
  number = jnp.arange(1, token.shape[1] + 1) - start
  return (own - 1) + number / jnp.maximum(count, 1)


def own_tokens(token: Int[Array, "B S"], length: int) -> Int[Array, "B S"]:
  """The tokens of streams; padding gets some valid token."""
  return jnp.minimum(token, length - 1)


def stream_ends(token: Int[Array, "B S"], length: int) -> Int[Array, "B T"]:
  """i32[B, T], one more than the index of each token's last stream."""
  tokens = jnp.arange(length, dtype=token.dtype)
  return jax.vmap(lambda token: jnp.searchsorted(token, tokens, side="right"))(token).astype(jnp.int32)


def by_token(
  add: Callable[[Array, Array], Array], values: Float[Array, "B S ..."], token: Int[Array, "B S"], length: int
) -> Float[Array, "B T ..."]:
  """Sums over the streams of each token; the result is undefined for a token without streams (which is padding).

  Args:
    add: jnp.add or jnp.logaddexp.
    values: [B, S, ...].
    token: i32[B, S], see `Streams`.
    length: T.
  """
  wide = (..., *(None,) * (values.ndim - 2))
  opens = jnp.concatenate([jnp.ones_like(token[:, :1], bool), token[:, 1:] != token[:, :-1]], 1)

  def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    return left[0] | right[0], jnp.where(right[0][wide], right[1], add(left[1], right[1]))

  _, sums = jax.lax.associative_scan(join, (opens, values), axis=1)
  places = jnp.maximum(stream_ends(token, length) - 1, 0)
  return jnp.take_along_axis(sums, places[wide], 1)


def _layer_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], epsilon: float) -> Float[Array, "... D"]:
  """LayerNorm, https://arxiv.org/abs/1607.06450, without its bias; in float32."""
  y = x.astype(jnp.float32)
  y -= y.mean(-1, keepdims=True)
  y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
  return y * scale.astype(jnp.float32)
