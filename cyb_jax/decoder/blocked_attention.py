"""Flash attention in plain JAX, for CPUs: blocks of queries, and rows of the batch one after the other.

XLA's attention writes all attention weights of a batch to memory, several times. Here a block of weights stays in the
cache of a core, keys after a block of queries are not read, and the backward pass computes the weights again from the
stored log-sum-exp (https://arxiv.org/abs/2205.14135):

    p = exp(q k^T - lse),    ds = p * (dout v^T - sum(dout * out)),    dq = ds k,    dk = ds^T q,    dv = p^T dout.

Causal attention over slots is the case W = 1 of hidden slots: a query of token t sees the first slots of the tokens
0 .. t (far keys), and with W > 1 the earlier slots of its own token (near keys). With a window it sees only the last of
these tokens, and the far keys before a block's window are not read.

Dimensions: B batch, S slots, T tokens, W slots of a token, K = W - 1 near keys, N heads, G kv heads, H head size. Each
(batch row, kv head) is a row: r rows that are computed together, M = (N / G) * W queries of a token in a row, J groups
of r rows; q tokens of a block of queries, C tokens that it can see.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

# The name, for policies of jax.checkpoint, of a kernel's result and of its log-sum-exp.
KERNEL_RESULTS = "attention"
# Queries of a block, and attention weights that are computed together: they and their gradients fit into 2 MiB.
_BLOCK_QUERIES = 64
_BLOCK_WEIGHTS = 2**15
# More blocks are a longer program without being faster.
_MOST_BLOCKS = 16


class _Keys(NamedTuple):
  """The keys of rows, or their values: of the first slots, and of the other slots (None where W = 1)."""

  far: Float[Array, "r T H"]
  near: Float[Array, "r T K H"] | None


class _Rows(NamedTuple):
  """What the passes read of rows; `query` is already divided by sqrt(H)."""

  query: Float[Array, "r T M H"]
  key: _Keys
  value: _Keys
  segments: Int[Array, "r T"] | None


class _Rules(NamedTuple):
  """The scores and the window; static.

  Attributes:
    scale: the factor of q k^T; None: 1 / sqrt(H).
    soft_cap: the bound of scores; None: no bound.
    window: the number of positions that a query sees, its own included; None: all.
    per_position: the number of consecutive tokens, in the sense of this module, with the same position.
  """

  scale: float | None
  soft_cap: float | None
  window: int | None
  per_position: int


class _Weights(NamedTuple):
  """Scores or weights of the keys of a block of queries."""

  far: Float[Array, "r q M C"]
  near: Float[Array, "r q M K"] | None


def attend(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B S G H"],
  value: Float[Array, "B S G H"],
  width: int,
  segment_ids: Int[Array, "B T"] | None,
  *,
  scale: float | None = None,
  soft_cap: float | None = None,
  window: int | None = None,
  window_slots: int | None = None,
) -> Float[Array, "B S N H"]:
  """softmax(q k^T / sqrt(H)) v, causal, with hidden slots where `width` is above 1.

  Args:
    query: [B, S, N, H].
    key, value: [B, S, G, H], N a multiple of G.
    width: W; slots of a token after its first one are seen by later slots of the same token only.
    segment_ids: i32[B, T]; tokens with different ids do not see each other. None: one segment.
    scale, soft_cap: see `attention.attend`.
    window: the number of positions that a query sees, its own included; None: all.
    window_slots: the number of consecutive slots with the same position; with hidden slots `width`.

  Returns:
    [B, S, N, H] in the dtype of `query`. Scores, softmax and sums are in float32 (float64 for float64 inputs).
  """
  rules = _Rules(scale, soft_cap, window, 1 if window is None else window_slots // width)
  return _attend(width, rules, query, key, value, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(width: int, rules: _Rules, query: Array, key: Array, value: Array, segment_ids: Array | None) -> Array:
  return _attend_forward(width, rules, query, key, value, segment_ids)[0]


def _attend_forward(width: int, rules: _Rules, query: Array, key: Array, value: Array, segment_ids: Array | None):
  layout = _Layout(query.shape, key.shape[2], width, rules.scale)
  rows = layout.rows(query, key, value, segment_ids)
  results = jax.lax.map(functools.partial(_forward, rules), rows)
  out, normalizer = checkpoint_name(results, KERNEL_RESULTS)
  return layout.join_queries(out, query.dtype), (rows, out, normalizer, segment_ids)


def _attend_backward(width: int, rules: _Rules, residuals, cotangent: Float[Array, "B S N H"]):
  rows, out, normalizer, segment_ids = residuals
  layout = _Layout(cotangent.shape, math.prod(rows.key.far.shape[:2]) // len(cotangent), width, rules.scale)
  backward = functools.partial(_backward, rules)
  d_query, d_key, d_value = jax.lax.map(backward, (rows, out, normalizer, layout.split_queries(cotangent)))
  dtype = cotangent.dtype
  gradients = (
    layout.join_queries(d_query * layout.scale, dtype),
    layout.join_keys(d_key, dtype),
    layout.join_keys(d_value, dtype),
  )
  return *gradients, None if segment_ids is None else np.zeros(segment_ids.shape, jax.dtypes.float0)


_attend.defvjp(_attend_forward, _attend_backward)


class _Layout:
  """How arrays of a batch are divided into rows, and rows into groups of r: [B, S, N, H] is [B*G/r, r, T, M, H]."""

  def __init__(self, query_shape: tuple[int, ...], groups: int, width: int, scale: float | None):
    self.batch, self.length, self.heads, size = query_shape
    self.groups, self.width = groups, width
    self.tokens = self.length // width
    self.scale = size**-0.5 if scale is None else scale
    rows = self.batch * self.groups
    # At the first block there are fewest keys, at the last all of them.
    weights = min(_BLOCK_QUERIES, self.length) * self.tokens * (self.heads // self.groups)
    most = max(1, _BLOCK_WEIGHTS // max(1, weights))
    self.together = max(r for r in range(1, min(rows, most) + 1) if rows % r == 0)

  def rows(self, query: Array, key: Array, value: Array, segment_ids: Array | None) -> _Rows:
    """All inputs, divided; the queries are scaled."""
    segments = None
    if segment_ids is not None:
      segments = jnp.repeat(segment_ids, self.groups, 0).reshape(-1, self.together, self.tokens)
    query = (query * self.scale).astype(query.dtype)
    return _Rows(self.split_queries(query), self._split_keys(key), self._split_keys(value), segments)

  def split_queries(self, x: Float[Array, "B S N H"]) -> Float[Array, "J r T M H"]:
    x = x.reshape(self.batch, self.tokens, self.width, self.groups, self.heads // self.groups, -1)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(-1, self.together, self.tokens, self._queries, x.shape[-1])

  def join_queries(self, x: Float[Array, "J r T M H"], dtype: jnp.dtype) -> Float[Array, "B S N H"]:
    x = x.reshape(self.batch, self.groups, self.tokens, self.heads // self.groups, self.width, -1)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(self.batch, self.length, self.heads, -1).astype(dtype)

  def _split_keys(self, x: Float[Array, "B S G H"]) -> _Keys:
    x = x.reshape(self.batch, self.tokens, self.width, self.groups, -1).transpose(0, 3, 1, 2, 4)
    x = x.reshape(-1, self.together, *x.shape[2:])
    return _Keys(x[:, :, :, 0], x[:, :, :, 1:] if self.width > 1 else None)

  def join_keys(self, keys: _Keys, dtype: jnp.dtype) -> Float[Array, "B S G H"]:
    x = keys.far[:, :, :, None]
    if keys.near is not None:
      x = jnp.concatenate([x, keys.near], 3)
    x = x.reshape(self.batch, self.groups, self.tokens, self.width, -1).transpose(0, 2, 3, 1, 4)
    return x.reshape(self.batch, self.length, self.groups, -1).astype(dtype)

  @property
  def _queries(self) -> int:
    return self.heads // self.groups * self.width


def _forward(rules: _Rules, rows: _Rows) -> tuple[Float[Array, "r T M H"], Float[Array, "r T M"]]:
  """The output and the log-sum-exp of the scores of every query."""
  outputs, normalizers = [], []
  for block in _blocks(rows.query, rules):
    scores = _scores(rows, block, rules)
    largest = scores.far.max(-1, keepdims=True)
    if scores.near is not None:
      largest = jnp.maximum(largest, scores.near.max(-1, keepdims=True))
    weights = _Weights(*(None if x is None else jnp.exp(x - largest) for x in scores))
    total = weights.far.sum(-1, keepdims=True)
    if weights.near is not None:
      total += weights.near.sum(-1, keepdims=True)
    outputs.append(_combine(weights, rows.value, block) / total)
    normalizers.append((largest + jnp.log(total))[..., 0])
  return jnp.concatenate(outputs, 1), jnp.concatenate(normalizers, 1)


def _backward(
  rules: _Rules,
  arguments: tuple[_Rows, Float[Array, "r T M H"], Float[Array, "r T M"], Float[Array, "r T M H"]],
) -> tuple[Float[Array, "r T M H"], _Keys, _Keys]:
  """The gradients by the scaled queries, the keys and the values, in the dtype of the sums."""
  rows, out, normalizer, cotangent = arguments
  d_query = []
  d_far_key, d_far_value = (jnp.zeros(x.far.shape, out.dtype) for x in (rows.key, rows.value))
  d_near_key, d_near_value = [], []
  product = functools.partial(jnp.einsum, preferred_element_type=out.dtype)
  delta = (out * cotangent).sum(-1, keepdims=True)
  for block in _blocks(rows.query, rules):
    d_out, query = cotangent[:, block.queries], rows.query[:, block.queries]
    scores = _scores(rows, block, rules)
    weights = _Weights(*(None if x is None else jnp.exp(x - normalizer[:, block.queries, :, None]) for x in scores))
    d_weights = _products(d_out, rows.value, block)
    d_scores = _Weights(*(None if p is None else p * (d - delta[:, block.queries]) for p, d in zip(weights, d_weights)))
    if rules.soft_cap is not None:
      # The derivative of the cap. A hidden key has the score -inf and the weight 0.
      d_scores = _Weights(
        *(
          None if d is None else d * jnp.where(p > 0, 1 - (s / rules.soft_cap) ** 2, 0)
          for d, p, s in zip(d_scores, weights, scores)
        )
      )
    d_query.append(_combine(d_scores, rows.key, block))
    d_far_key = d_far_key.at[:, block.keys].add(product("rtmc,rtmh->rch", d_scores.far.astype(query.dtype), query))
    d_far_value = d_far_value.at[:, block.keys].add(product("rtmc,rtmh->rch", weights.far.astype(d_out.dtype), d_out))
    if d_scores.near is not None:
      # Matrix products of a few numbers for each token are slow on a CPU; a sum of products is not.
      d_near_key.append((d_scores.near[..., None] * query[:, :, :, None]).sum(2))
      d_near_value.append((weights.near[..., None] * d_out[:, :, :, None]).sum(2))
  near = [jnp.concatenate(x, 1) if x else None for x in (d_near_key, d_near_value)]
  return jnp.concatenate(d_query, 1), _Keys(d_far_key, near[0]), _Keys(d_far_value, near[1])


class _Block(NamedTuple):
  """The tokens of a block of queries, and the tokens whose first slots these queries can see."""

  queries: slice
  keys: slice


def _blocks(query: Float[Array, "r T M H"], rules: _Rules) -> list[_Block]:
  """The blocks, in order."""
  tokens, queries = query.shape[1:3]
  size = max(1, _BLOCK_QUERIES // queries, -(-tokens // _MOST_BLOCKS))
  blocks = []
  for begin in range(0, tokens, size):
    end, first = min(begin + size, tokens), 0
    if rules.window is not None:
      first = max(0, begin // rules.per_position - rules.window + 1) * rules.per_position
    blocks.append(_Block(slice(begin, end), slice(first, end)))
  return blocks


def _scores(rows: _Rows, block: _Block, rules: _Rules) -> _Weights:
  """The scores of a block of queries, -inf where a key is not seen."""
  far, near = _products(rows.query[:, block.queries], rows.key, block)
  if rules.soft_cap is not None:
    far, near = (None if x is None else rules.soft_cap * jnp.tanh(x / rules.soft_cap) for x in (far, near))
  far = jnp.where(_seen(rows.segments, block, rules), far, -jnp.inf)
  if near is None:
    return _Weights(far, None)
  width = near.shape[-1] + 1
  slot = np.arange(near.shape[-2]) % width  # of each query
  return _Weights(far, jnp.where(slot[:, None] > np.arange(width - 1), near, -jnp.inf))


def _seen(segments: Int[Array, "r T"] | None, block: _Block, rules: _Rules) -> Bool[Array, "#r q 1 C"]:
  """Whether the tokens of a block of queries see the first slots of the tokens of its keys."""
  query, key = (jnp.arange(part.start, part.stop) for part in block)
  seen = query[:, None] >= key
  if rules.window is not None:
    seen &= query[:, None] // rules.per_position - key // rules.per_position < rules.window
  if segments is None:
    return seen[None, :, None]
  return (seen & (segments[:, block.queries, None] == segments[:, None, block.keys]))[:, :, None]


def _products(x: Float[Array, "r q M H"], keys: _Keys, block: _Block) -> _Weights:
  """The products of the vectors of a block of queries with all keys that the block can see."""
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.promote_types(keys.far.dtype, jnp.float32))
  x = x.astype(keys.far.dtype)
  far = product("rtmh,rch->rtmc", x, keys.far[:, block.keys])
  near = None if keys.near is None else product("rtmh,rtkh->rtmk", x, keys.near[:, block.queries])
  return _Weights(far, near)


def _combine(weights: _Weights, keys: _Keys, block: _Block) -> Float[Array, "r q M H"]:
  """The sum of keys or values by their weights."""
  product = functools.partial(jnp.einsum, preferred_element_type=weights.far.dtype)
  out = product("rtmc,rch->rtmh", weights.far.astype(keys.far.dtype), keys.far[:, block.keys])
  if weights.near is not None:
    out += product("rtmk,rtkh->rtmh", weights.near.astype(keys.far.dtype), keys.near[:, block.queries])
  return out
