"""Attention of hidden slots by a kernel for causal attention: the slots of a token become heads of one query.

A slot sees the first slots of the tokens before its own (far keys), and the slots of its own token up to itself (near
keys). All slots of a token see the same far keys, so the kernel computes T queries of N*W heads instead of T*W queries
of N heads: its weights are W times fewer, and its blocks need no mask of their own. The near keys are few; XLA computes
their scores s, c = logsumexp(s) and their output u = softmax(s) v.

Both parts have one softmax. Merging two softmaxes by their log-sum-exps would need the gradient of the kernel's
log-sum-exp, which kernels do not give. Instead the kernel sees the near keys as one more key, the first of the row,
which every query sees and which has the score c:

    query of a slot:    q  c        key of a token:     k  0        value of a token:    v  0
                                    the near keys' key: 0  1        the near keys' value: 0  1

The kernel's softmax is then the softmax over all keys. Its output is the far keys' part of the result, and in the
additional dimension the weight a of the near keys: the result is far + a u. All of it is differentiable as it stands.
c is split into numbers of 8 bits, in a dimension each, because the kernel multiplies in 16 bits.

Causal attention of T keys is enough: the last token's first slot is near or not seen, so the tokens' keys start at the
second place of the row.

On a GPU this lets cuDNN, which supports no structured masks, compute hidden slots. TPUs have splash attention's mask,
see `splash`, because XLA's operations on the near keys would move more bytes there than the mask's kernel.

Dimensions: B batch, S = T*W slots in a row, T tokens, W slots of a token, N heads, G kv heads, R = N / G, H head size.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# The dimensions that a vector gets in addition, one for each part of the near keys' score: three have the 24 bits of a
# float32, the fourth has the rest of a float64.
EXTRA = 4
# Kernels need head sizes that are multiples of this.
_MULTIPLE = 8

Causal = Callable[[Float[Array, "B T N*W D"], Float[Array, "B T G D"], Float[Array, "B T G D"]], Array]


def kernel_head_size(head_size: int) -> int:
  """D, the head size that the kernel sees."""
  return -(-(head_size + EXTRA) // _MULTIPLE) * _MULTIPLE


def attend(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B S G H"],
  value: Float[Array, "B S G H"],
  num_slots: int,
  causal: Causal,
  *,
  scale: float | None = None,
) -> Float[Array, "B S N H"]:
  """softmax(scale q k^T) v of hidden slots, see `attention.HiddenSlots`; one segment.

  Args:
    query: [B, S, N, H]; it is scaled in float32 and rounded back to its dtype.
    key, value: [B, S, G, H], N a multiple of G.
    num_slots: W.
    causal: softmax(q k^T) v, causal and without a scale, with grouped heads: a function of queries [B, T, N*W, D] and
      of keys and values [B, T, G, D] that returns [B, T, N*W, D]; D = kernel_head_size(H).
    scale: the factor of q k^T; None: 1 / sqrt(H).

  Returns:
    [B, S, N, H] in the dtype of `query`.
  """
  batch, length, heads, size = query.shape
  groups, tokens = key.shape[2], length // num_slots
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  query = (query.astype(dtype) * (size**-0.5 if scale is None else scale)).astype(query.dtype)
  # A token's slots are the last axis of heads, so that heads can be split over devices.
  query = query.reshape(batch, tokens, num_slots, groups, heads // groups, size).transpose(0, 1, 3, 4, 2, 5)
  key, value = (x.reshape(batch, tokens, num_slots, groups, size).swapaxes(2, 3) for x in (key, value))
  near, normalizer = _attend_near(query, key, value)

  extra = kernel_head_size(size) - size
  # Zeros behind the other parts; the first part is also the dimension of the near keys' weight.
  parts = _split(normalizer).astype(query.dtype)
  queries = jnp.concatenate([query, _pad_last(parts, extra)], -1).reshape(batch, tokens, -1, size + extra)
  dimension = np.arange(size + extra)
  keys = _behind((dimension >= size) & (dimension < size + EXTRA), key[:, :, :, 0])
  values = _behind(dimension == size, value[:, :, :, 0])
  out = causal(queries, keys, values).reshape(*query.shape[:-1], size + extra).astype(dtype)
  out = (out[..., :size] + out[..., size, None] * near).astype(query.dtype)
  return out.transpose(0, 1, 4, 2, 3, 5).reshape(batch, length, heads, size)


def _attend_near(
  query: Float[Array, "B T G R W H"], key: Float[Array, "B T G W H"], value: Float[Array, "B T G W H"]
) -> tuple[Float[Array, "B T G R W H"], Float[Array, "B T G R W"]]:
  """The output over the slots of the query's token, and the log-sum-exp of their scores, in float32 or float64."""
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  slots = range(query.shape[4])
  # Sums of products, which XLA fuses: matrix products of W rows would fill a matrix unit with padding. Each pair of
  # slots is an operation of its own, because a product of all pairs would be stored.
  outputs, normalizers = [], []
  for own in slots:
    seen = slots[: own + 1]
    scores = [(query[..., own, :].astype(dtype) * key[:, :, :, None, k].astype(dtype)).sum(-1) for k in seen]
    normalizer = jax.nn.logsumexp(jnp.stack(scores), 0)
    shares = [jnp.exp(score - normalizer)[..., None] for score in scores]
    outputs.append(sum(share * value[:, :, :, None, k].astype(dtype) for share, k in zip(shares, seen)))
    normalizers.append(normalizer)
  return jnp.stack(outputs, 4), jnp.stack(normalizers, 4)


def _split(x: Float[Array, "..."]) -> Float[Array, "... P"]:
  """x as a sum of P = `EXTRA` numbers, all but the last of them bfloat16 numbers. The first one has the gradient."""
  parts, rest = [], jax.lax.stop_gradient(x)
  for _ in range(EXTRA - 1):
    # XLA may remove a cast to bfloat16 and back, but not this operation.
    parts.append(jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
    rest = rest - parts[-1]
  first = parts[0] + (x - jax.lax.stop_gradient(x))
  return jnp.stack([first, *parts[1:], rest], -1)


def _pad_last(x: Float[Array, "... P"], size: int) -> Float[Array, "... size"]:
  return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, size - x.shape[-1]),))


def _behind(first: np.ndarray, x: Float[Array, "B T G H"]) -> Float[Array, "B T G D"]:
  """The rows of x behind the row `first`, without the last one."""
  rows = _pad_last(x[:, :-1], len(first))
  return jnp.concatenate([jnp.broadcast_to(jnp.asarray(first, x.dtype), (len(x), 1, *rows.shape[2:])), rows], 1)
