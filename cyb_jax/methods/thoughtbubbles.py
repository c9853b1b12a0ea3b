"""Thoughtbubbles: residual streams that fork and are dropped between layers, under a budget of streams (Liu et al.
2025, https://arxiv.org/abs/2510.00219).

A stream has its residual x, a log score c (0 at the start) and the token it belongs to. In front of a forking layer a
router says f, k = max(logsigmoid(W LN(x)), -20), and every stream becomes two: to its left a fork, of score c + f, with
a learned embedding added; and itself, kept, of score c + k. Of all these a row keeps as many as it may have, those of
the highest scores, in order; the rightmost of every token is kept whatever its score is. With a budget of 4 streams,
two tokens a, b:

    streams            a            b
    candidates    a'   a       b'   b         a' is a's fork
    score        -1   -3      -2   -9
    kept         a'   a       b'   b          all four: nothing is left out

    candidates  a''  a'   a~   a   b''  b'   b~   b      in front of the next forking layer
    score       -4   -2   -5  -8   -3   -9  -10  -20
    kept             a'       a    b''            b      a and b are forced; then b'' and a' are the best of the rest

(the kept b' was not selected: its stream ends, though its fork lives on). In a layer a stream counts for P = exp(c):
attention adds c to q k before the division by sqrt(H) and multiplies values by P, and both updates of x are multiplied
by P. Stream j (from 1) of the n of token t stands at position t - 1 + j / n. A token's prediction is the mixture of its
streams', in proportion to P; or, as in the authors' code, that of the sum of their P x, which then passes the final
norm (and the norm undoes the sum's scale). Selection has no gradient: the router learns from the scores of what is
kept.

All streams of a row compete, those of later tokens with those of earlier ones: `evaluate` isn't causal, and its
log-likelihoods are not those of an autoregressive model. `autoregressive_log_likelihood` computes these: every target
from a pass over its prefix alone, which has the budget of a text of that length. There is no cache for streams that
fork: one more token may drop any stream before it.

Ours, where nothing is published: of equal scores the one further left is kept; of a row that is padded, the tokens up
to its last target of weight are real, and the budget is in proportion to them; LN has a scale and no bias. W starts
normal, of standard deviation 0.02, and a fork's embedding of 1/sqrt(D) (the authors' code).

Parameters beside the decoder's, a row for each of the F forking layers: `fork_norm` f32[F, D], the scale of LN;
`fork_router` f32[F, 2, D], W; `fork_input` f32[F, D], the embedding.

Dimensions: B batch, T tokens, S streams of a row, C of them that are kept, M streams of a token at most, D model,
L layers, F forking layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cyb_jax.costs import flops
from cyb_jax.decoder import KeyWeights, SegmentMask
from cyb_jax.errors import InputError
from cyb_jax.losses import last_slot_cross_entropy
from cyb_jax.methods.baseline import Plain
from cyb_jax.methods.interface import Batch, EvalOutput, Params
from cyb_jax.methods.paused import boxed_row
from cyb_jax.partitioning.rules import constrain
from cyb_jax.stopping import SlotScores

COMBINATIONS = ("probabilities", "states")
# Of a decision to fork or to keep, nats: what is all but impossible is no less likely than this.
_LEAST = -20.0
_ROUTER_STD = 0.02


class Segment(NamedTuple):
  """Layers between two forks: from `first`, before `last`, passed by so many streams of a row."""

  first: int
  last: int
  streams: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
  """The streams of every row, in order; behind them, where a row has fewer, what counts for nothing.

  Attributes:
    hidden: [B, S, D], the residuals.
    log_score: f32[B, S], c.
    token: i32[B, S], the token that a stream belongs to, ascending; T behind the last stream.
  """

  hidden: Float[Array, "B S D"]
  log_score: Float[Array, "B S"]
  token: Int[Array, "B S"]


class Thoughtbubbles(Plain):
  """Cross-entropy of what a token's streams say together."""

  name = "thoughtbubbles"
  options = frozenset({"fork_layers", "stream_budget", "combine"})
  exports = False
  one_pass = False
  decodes = False
  causal = False

  def validate(self) -> None:
    super().validate()
    config, layers = self.config, self.decoder.config.num_layers
    if config.pauses:
      raise InputError(f"method.pauses: {config.pauses}, but method 'thoughtbubbles' has none; set it to 0")
    if config.combine not in COMBINATIONS:
      raise InputError(f"method.combine: {config.combine!r} is none of {', '.join(map(repr, COMBINATIONS))}")
    forks = self.fork_layers
    if not forks or list(forks) != sorted(set(forks)) or not 1 <= forks[0] <= forks[-1] <= layers:
      raise InputError(
        f"method.fork_layers: {':'.join(map(str, forks))!r} must be layers in 1..{layers}, each once and in order, such"
        f" as {':'.join(map(str, _default_forks(layers)))!r}; '' for the default"
      )
    if not 1 <= config.stream_budget < math.inf:
      raise InputError(
        f"method.stream_budget: {config.stream_budget!r} must be finite and more than 1; a token needs a stream"
      )
    if config.stream_budget == 1:
      raise InputError("method.stream_budget: 1 stream a token lets nothing fork; give more, or take method 'baseline'")
    if self.decoder.config.scan_layers:
      raise InputError("decoder.scan_layers: True, but method 'thoughtbubbles' stops between layers; set it to False")

  def check_length(self, tokens: int) -> None:
    self.budgets(tokens)

  @property
  def fork_layers(self) -> tuple[int, ...]:
    """In front of which layers streams fork, from 1."""
    given = self.config.fork_layers
    return _default_forks(self.decoder.config.num_layers) if given is None else given

  def budgets(self, length: int) -> np.ndarray:
    """i32[T+1], how many streams a row may have, by how many of its tokens are real.

    Raises:
      InputError: a whole row has no room for a single fork.
    """
    counts = self._counts(length)
    if counts[-1] <= length:
      raise InputError(
        f"method.stream_budget: {self.config.stream_budget:g} streams a token are {counts[-1]} of a window of"
        f" {length}: nothing can fork; give at least {(length + 1) / length:g}"
      )
    return counts

  def _counts(self, length: int) -> np.ndarray:
    # The guard keeps a product such as 2.3 x 10 from losing a stream to rounding.
    return np.floor(self.config.stream_budget * np.arange(length + 1) + 1e-9).astype(np.int32)

  def segments(self, length: int) -> list[Segment]:
    """What is run for a window of `length` tokens; streams fork between one and the next."""
    return self._segments(length, int(self.budgets(length)[-1]))

  def _segments(self, length: int, most: int) -> list[Segment]:
    streams, first = length, 0
    result = []
    for layer in self.fork_layers:
      result.append(Segment(first, layer - 1, streams))
      first, streams = layer - 1, min(2 * streams, most)
    return [*result, Segment(first, self.decoder.config.num_layers, streams)]

  def init_own(self, rng: Array) -> Params:
    count, width = len(self.fork_layers), self.decoder.config.d_model
    router, embedding = jax.random.split(rng)
    return {
      "fork_norm": boxed_row(jnp.ones((count, width))),
      "fork_router": boxed_row(_ROUTER_STD * jax.random.normal(router, (count, 2, width))),
      "fork_input": boxed_row(jax.random.normal(embedding, (count, width)) / math.sqrt(width)),
    }

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T 1 D"]:
    """What is read with `combine` 'states'."""
    tokens = batch["tokens"]
    streams = self.streams(params, batch, real_lengths(batch))
    weighted = streams.hidden.astype(jnp.float32) * jnp.exp(streams.log_score)[..., None]
    sums = _by_token(jnp.add, weighted, streams.token, tokens.shape[1])
    return self._finish(params, constrain(sums, "batch"))[:, :, None]

  def streams(self, params: Params, batch: Batch, lengths: Int[Array, "B"]) -> Streams:
    """The streams behind the last layer, without the final norm.

    Args:
      params: bare arrays.
      batch: see `Batch`.
      lengths: i32[B], how many tokens of each row are real; what comes behind is not seen, and changes nothing.
    """
    tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
    batch_size, length = tokens.shape
    variables, size = {"params": params["decoder"]}, self.decoder.config.head_size
    budget = jnp.asarray(self.budgets(length))[lengths]
    order = jnp.arange(length, dtype=jnp.int32)
    streams = Streams(
      hidden=self.decoder.apply(variables, tokens, method="embed"),
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
        mask = SegmentMask(jnp.take_along_axis(segment_ids, _own(streams.token, length), 1))
      hidden, _ = self.decoder.apply(
        variables,
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
    """Every stream's fork and itself, and of these at most `budget` in each row, in arrays for `count`."""
    normed = _layer_norm(streams.hidden, router["fork_norm"], self.decoder.config.norm_epsilon)
    # Sums of products in f32 rather than a matrix product: what is kept must not hang on how a device rounds.
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

  def _finish(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return self.decoder.apply({"params": params["decoder"]}, hidden, method="finish")

  def evaluate(self, params: Params, batch: Batch, omega: Any = None) -> EvalOutput:
    if self.config.combine == "states":
      return super().evaluate(params, batch, omega)
    length = batch["tokens"].shape[1]
    streams = self.streams(params, batch, real_lengths(batch))
    targets = jnp.take_along_axis(batch["targets"], _own(streams.token, length), 1)
    scores = self.scores(params, self._finish(params, streams.hidden)[:, :, None], targets)
    # One scan for both sums.
    terms = jnp.stack([streams.log_score + scores.log_target[..., 0], streams.log_score], -1)
    sums = _by_token(jnp.logaddexp, terms, streams.token, length)
    log_target = sums[..., :1] - sums[..., 1:]
    scores = SlotScores(log_target, jnp.full_like(log_target, -jnp.inf), jnp.zeros_like(log_target))
    return EvalOutput(loss=last_slot_cross_entropy(scores), scores=scores, log_stopping=jnp.zeros_like(log_target))

  def autoregressive_log_likelihood(self, params: Params, batch: Batch) -> Float[Array, "B T"]:
    """The log-likelihood of an autoregressive model: T passes over as many tokens as the batch has, one after the
    other; of each pass the last real token alone is read.
    """
    tokens, targets = batch["tokens"], batch["targets"]
    length = tokens.shape[1]
    most = min(2 ** len(self.fork_layers), int(self.budgets(length)[-1]) - length + 1)  # M

    def read(last: Int[Array, ""]) -> Float[Array, "B"]:
      streams = self.streams(params, batch, jnp.full(len(tokens), last + 1))
      ends = (streams.token <= last).sum(-1, keepdims=True)
      places = ends - most + jnp.arange(most)
      own = jnp.take_along_axis(streams.token, jnp.maximum(places, 0), 1) == last
      own &= places >= 0
      places = jnp.maximum(places, 0)
      log_score = jnp.where(own, jnp.take_along_axis(streams.log_score, places, 1), -jnp.inf)
      hidden = jnp.take_along_axis(streams.hidden, places[..., None], 1)
      target = jnp.take(targets, last, axis=1)
      if self.config.combine == "states":
        hidden = (hidden.astype(jnp.float32) * jnp.exp(log_score)[..., None]).sum(1, keepdims=True)
        return self.scores(params, self._finish(params, hidden), target).log_target[:, 0]
      log_target = self.scores(params, self._finish(params, hidden), target).log_target
      return jax.nn.logsumexp(log_score + log_target, -1) - jax.nn.logsumexp(log_score, -1)

    return jnp.moveaxis(jax.lax.map(read, jnp.arange(length)), 0, 1)

  def forward_slots(self, tokens: int) -> float:
    layers = self.decoder.config.num_layers
    return sum((last - first) * streams for first, last, streams in self.segments(tokens)) / layers

  def train_slots(self, tokens: int) -> float:
    return self.forward_slots(tokens)

  def forward_cost(self, tokens: int, *, executed: bool = False) -> flops.Cost:
    return self._pass(tokens, self.segments(tokens), executed)

  def inference_cost(self, tokens: int, *, slots: float | None = None) -> flops.Cost:
    """Of reading a text at once, since there is no cache; see the head of this file."""
    return super().inference_cost(tokens, slots=slots) if slots is not None else self.forward_cost(tokens)

  def autoregressive_cost(self, tokens: int) -> flops.Cost:
    """A pass over each prefix, of which the last token alone is read, at the mean of its streams; a prefix that is too
    short for a fork has one stream a token.
    """
    total = flops.Cost()
    for length in range(1, tokens + 1):
      segments = self._segments(length, int(self._counts(length)[-1]))
      cost = self._pass(length, segments)
      total += dataclasses.replace(cost.times(length), readout=cost.readout)
    return total.times(1 / tokens)

  def train_cost(self, tokens: int, *, executed: bool = False) -> flops.Cost:
    def cost(number: int, **options) -> flops.Cost:
      frozen = self.weights != "all"
      return flops.train_pass_cost(self.decoder.config, executed=executed, frozen=frozen, scaled=number > 0, **options)

    return self._cost(tokens, self.segments(tokens), executed, cost)

  def _pass(self, tokens: int, segments: Sequence[Segment], executed: bool = False) -> flops.Cost:
    def cost(number: int, **options) -> flops.Cost:
      return flops.pass_cost(self.decoder.config, **options)

    return self._cost(tokens, segments, executed, cost)

  def _cost(
    self, tokens: int, segments: Sequence[Segment], executed: bool, cost: Callable[..., flops.Cost]
  ) -> flops.Cost:
    """The sum of `cost` of the segments, by their numbers."""
    config = self.decoder.config
    total = flops.Cost()
    for number, (first, last, streams) in enumerate(segments):
      behind = number == len(segments) - 1
      read = tokens if self.config.combine == "states" else streams
      total += cost(
        number,
        slots=streams / tokens,
        keys=flops.causal_keys(streams, executed),
        slots_read=read / tokens if behind else 0,
        layers=last - first,
        routing=0 if behind else 2 * config.d_model,
      )
    return total


def _default_forks(layers: int) -> tuple[int, ...]:
  """Of 12 layers the paper's 3, 7 and 11, and the same places of others."""
  return tuple(sorted({-(-layers * twelfths // 12) for twelfths in (3, 7, 11)}))


def real_lengths(batch: Batch) -> Int[Array, "B"]:
  """How many tokens of each row are real: up to the last whose target has weight, and at least one."""
  batch_size, length = batch["tokens"].shape
  if "weights" not in batch:
    return jnp.full(batch_size, length, jnp.int32)
  numbers = jnp.arange(1, length + 1, dtype=jnp.int32)
  return jnp.maximum(jnp.where(batch["weights"] > 0, numbers, 0).max(-1), 1)


def select(
  scores: Float[Array, "B 2S"], token: Int[Array, "B S"], budget: Int[Array, "B"], count: int, length: int
) -> tuple[Int[Array, "B C"], Bool[Array, "B C"]]:
  """Which of the forked streams are kept.

  Args:
    scores: f32[B, 2S], of fork, keep, fork, keep, ...; finite.
    token: i32[B, S], see `Streams`.
    budget: i32[B], how many a row may keep: no fewer than it has tokens, no more than `count`.
    count: C.
    length: T.

  Returns:
    Their numbers among the 2S, i32[B, C], in order; and whether there is one, bool[B, C]: a row that keeps fewer has
    them first.
  """
  alive = token < length
  after = jnp.concatenate([token[:, 1:], jnp.full_like(token[:, :1], length)], 1)
  forced = jnp.stack([jnp.zeros_like(alive), alive & (token != after)], -1).reshape(scores.shape)
  candidates = jnp.repeat(alive, 2, 1)
  ranks = jnp.where(candidates, jnp.where(forced, jnp.inf, scores), -jnp.inf)
  # A stable sort: of equal scores the one further left comes first.
  best = jnp.argsort(-ranks, axis=-1, stable=True)[:, :count]
  live = jnp.arange(count) < jnp.minimum(budget, candidates.sum(-1))[:, None]
  nothing = scores.shape[1] - 1
  return jnp.minimum(jnp.sort(jnp.where(live, best, nothing + 1), axis=-1), nothing), live


def stream_positions(token: Int[Array, "B S"], length: int) -> Float[Array, "B S"]:
  """f32[B, S], where streams stand for the rotary embeddings: stream j (from 1) of the n of token t at t - 1 + j / n.

  Args:
    token: i32[B, S], see `Streams`.
    length: T.
  """
  ends = _ends(token, length)
  starts = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))
  own = _own(token, length)
  start, count = (jnp.take_along_axis(x, own, 1) for x in (starts, ends - starts))
  number = jnp.arange(1, token.shape[1] + 1) - start
  return (own - 1) + number / jnp.maximum(count, 1)


def _own(token: Int[Array, "B S"], length: int) -> Int[Array, "B S"]:
  """The tokens of streams; behind the last stream some token that there is."""
  return jnp.minimum(token, length - 1)


def _ends(token: Int[Array, "B S"], length: int) -> Int[Array, "B T"]:
  """i32[B, T], the place behind the last stream of each token."""
  tokens = jnp.arange(length, dtype=token.dtype)
  return jax.vmap(lambda token: jnp.searchsorted(token, tokens, side="right"))(token).astype(jnp.int32)


def _by_token(
  add: Callable[[Array, Array], Array], values: Float[Array, "B S ..."], token: Int[Array, "B S"], length: int
) -> Float[Array, "B T ..."]:
  """Sums over the streams of each token; of a token without any (it isn't real) a number without meaning.

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
  places = jnp.maximum(_ends(token, length) - 1, 0)
  return jnp.take_along_axis(sums, places[wide], 1)


def _layer_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], epsilon: float) -> Float[Array, "... D"]:
  """LayerNorm, https://arxiv.org/abs/1607.06450, without its bias; in float32."""
  y = x.astype(jnp.float32)
  y -= y.mean(-1, keepdims=True)
  y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
  return y * scale.astype(jnp.float32)
