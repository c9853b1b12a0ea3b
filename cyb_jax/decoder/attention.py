"""Rotary positions, and the one place that chooses how attention is computed.

Letters: B batch, S slots in a row (tokens x slots per token, flattened), N heads, G kv heads, H head size,
R rotated part of a head, C keys; where slots are hidden, T tokens of W slots each, K = W - 1.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Bool, Float, Int

from cyb_jax.errors import InputError

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")
# The kernels work in blocks of 128 or more: below that most of a block is filled up.
_SHORTEST_SPLASH = 128
# Of longer heads a block doesn't fit into vector memory.
_LARGEST_SPLASH_HEAD = 256


def rotation(
  positions: Int[Array, "B S"], rotated_size: int, base: float
) -> tuple[Float[Array, "B S R/2"], Float[Array, "B S R/2"]]:
  """Cosine and sine of the rotary angles, positions * base^(-2i/R) for i = 0 .. R/2-1.

  Positions are given, never counted: a pause stands at the position of its token. Angles are float32 whatever
  the activations are: bfloat16 cannot tell position 257 from 258.

  Args:
    positions: i32[B, S].
    rotated_size: R, even: how many of a head's H numbers are rotated.
    base: the longest wavelength is close to 2 pi base.

  Returns:
    (cosine, sine), both f32[B, S, R/2].

  References: Su et al. 2021, RoFormer, https://arxiv.org/abs/2104.09864
  """
  exponents = jnp.arange(0, rotated_size, 2, dtype=jnp.float32) / rotated_size
  angles = positions.astype(jnp.float32)[..., None] * base**-exponents
  return jnp.cos(angles), jnp.sin(angles)


def rotate(
  heads: Float[Array, "B S N H"], cosine: Float[Array, "B S R/2"], sine: Float[Array, "B S R/2"]
) -> Float[Array, "B S N H"]:
  """Rotates the first R numbers of every head; the others pass through.

  Number i is paired with number i + R/2, as in NeoX, Pythia, Gemma and the Hugging Face Llama (the RoFormer
  paper pairs neighbours; the two differ by a permutation of the projections' columns). With R = 4 of H = 6:

      heads    x0 x1 x2 x3 x4 x5
      pairs    (x0, x2) turns by angle 0, (x1, x3) by angle 1; x4 and x5 stay

  Args:
    heads: [B, S, N, H], any float dtype; the rotation is computed in float32.
    cosine, sine: f32[B or 1, S, R/2] from `rotation`.

  Returns:
    [B, S, N, H] in the dtype of `heads`.
  """
  half = cosine.shape[-1]
  cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
  first, second, rest = jnp.split(heads, (half, 2 * half), axis=-1)
  dtype = heads.dtype
  first, second = first.astype(jnp.float32), second.astype(jnp.float32)
  turned = (first * cosine - second * sine).astype(dtype), (second * cosine + first * sine).astype(dtype)
  return jnp.concatenate((*turned, rest), axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SegmentMask:
  """Causal in the order of the slots, inside of a segment.

  Attributes:
    segment_ids: i32[B, S]; slots with different ids don't see each other.
  """

  segment_ids: Int[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HiddenSlots:
  """A mask told by its structure, where that costs less than the square: slots that other tokens don't see.

  The row is T tokens of W slots each, S = T*W. Slot w of token t (from 0) sees the first slots of the tokens 0 .. t and
  the slots 1 .. w of its own; T = 2, W = 3:

                t0 . .  t1 . .
      t0 first   1 . .   . . .
         second  1 1 .   . . .
         third   1 1 1   . . .
      t1 first   1 . .   1 . .
         second  1 . .   1 1 .
         third   1 . .   1 1 1

  Attributes:
    num_slots: W.
    segment_ids: i32[B, T]; tokens with different ids don't see each other. None: all do.
  """

  num_slots: int = dataclasses.field(metadata={"static": True})
  segment_ids: Int[Array, "B T"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyWeights:
  """How much keys count, beside what the query makes of them; the same for all queries and heads.

  Attributes:
    log: f32[B, C], added to q k^T / sqrt(H), before the softmax.
    value: f32[B, C], what values are multiplied by behind the softmax; None: 1.
  """

  log: Float[Array, "B C"]
  value: Float[Array, "B C"] | None = None


def attend(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B C G H"],
  value: Float[Array, "B C G H"],
  mask: Bool[Array, "#B 1 S C"] | SegmentMask | HiddenSlots | None = None,
  implementation: str = "auto",
  *,
  weights: KeyWeights | None = None,
  interpret: bool = False,
) -> Float[Array, "B S N H"]:
  """softmax(q k^T / sqrt(H)) v with grouped heads: head n reads kv head n // (N / G).

  Args:
    query: [B, S, N, H].
    key, value: [B, C, G, H], N a multiple of G; C = S but where keys come from a cache.
    mask: None is causal in the order of the slots, `SegmentMask` the same inside of a segment. Otherwise boolean
      [B or 1, 1, S, C], True where the query (third axis) may see the key (fourth); it must hold causality itself, and
      let every query see a key. Or `HiddenSlots`; XLA then holds [B, N, S, T + K] weights in place of [B, N, S, S].
    implementation: 'xla' holds all [B, N, S, C] weights; 'cudnn' is flash attention on NVIDIA GPUs for 16-bit
      floats; 'splash' is flash attention on TPUs, for all masks but boolean ones. 'auto' is the kernel of the platform
      where it is supported and skips work (cuDNN: no mask), else xla. The choice is made while tracing; the platform is
      that of the mesh under which this is traced (`jax.set_mesh`, pmap), else `jax.default_backend()`.
    weights: of the keys, XLA's alone, and not with `HiddenSlots`; None: all count alike.
    interpret: run 'splash' as plain JAX operations, on any device; for tests.

  Returns:
    [B, S, N, H] in the dtype of `query`. The softmax is computed in float32.

  Raises:
    InputError: 'cudnn' or 'splash' was asked for where it cannot run.
  """
  if weights is not None:
    return _attend_weighted(query, key, value, mask, implementation, weights)
  implementation = _choose(query, key, mask, implementation, interpret)
  if implementation == "splash":
    # Part of what is experimental in JAX, and of no use where there is no TPU.
    from cyb_jax.decoder import splash

    width, segment_ids = 1, None
    if isinstance(mask, HiddenSlots):
      width, segment_ids = mask.num_slots, mask.segment_ids
    elif isinstance(mask, SegmentMask):
      segment_ids = mask.segment_ids
    return splash.attend(query, key, value, width, segment_ids, interpret=interpret)
  if isinstance(mask, HiddenSlots):
    return _attend_hidden(query, key, value, mask)
  mask = _dense(mask, query.shape[1])
  return jax.nn.dot_product_attention(
    query, key, value, mask=mask, is_causal=mask is None, implementation=implementation
  )


def _dense(mask: Bool[Array, "#B 1 S C"] | SegmentMask | None, length: int) -> Bool[Array, "#B 1 S C"] | None:
  """A mask that XLA's attention takes."""
  if not isinstance(mask, SegmentMask):
    return mask
  order = jnp.arange(length)
  seen = (order[:, None] >= order) & (mask.segment_ids[:, :, None] == mask.segment_ids[:, None, :])
  return seen[:, None]


def _attend_weighted(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B C G H"],
  value: Float[Array, "B C G H"],
  mask: Bool[Array, "#B 1 S C"] | SegmentMask | None,
  implementation: str,
  weights: KeyWeights,
) -> Float[Array, "B S N H"]:
  if implementation not in ("auto", "xla"):
    raise InputError(f"decoder.attention: {implementation!r} takes no weights of keys; use 'auto' or 'xla'")
  if isinstance(mask, HiddenSlots):
    raise ValueError("mask: HiddenSlots takes no weights of keys; give a boolean one")
  if weights.value is not None:
    value = value * weights.value[:, :, None, None].astype(value.dtype)
  # What depends on the key alone may stand beside the product: softmax adds it in float32.
  mask = _dense(mask, query.shape[1])
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    bias=weights.log[:, None, None, :],
    mask=mask,
    is_causal=mask is None,
    implementation="xla",
  )


def _choose(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B C G H"],
  mask: Bool[Array, "#B 1 S C"] | SegmentMask | HiddenSlots | None,
  implementation: str,
  interpret: bool,
) -> str:
  """The one place that chooses: 'xla', 'cudnn' or 'splash'. Arguments and errors are those of `attend`."""
  if implementation not in IMPLEMENTATIONS:
    raise InputError(f"decoder.attention: {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
  if implementation == "xla":
    return "xla"
  if implementation == "cudnn":
    objection = _cudnn_objection(query.dtype, query.shape[-1])
    if isinstance(mask, HiddenSlots):
      objection = "has no hidden slots"
  elif implementation == "splash":
    objection = _splash_objection(query, key, mask, interpret)
  elif _splash_objection(query, key, mask, interpret) is None and query.shape[1] >= _SHORTEST_SPLASH:
    implementation, objection = "splash", None
  else:
    # cuDNN turns a mask into a dense bias and skips nothing: then XLA is as good, and takes every shape.
    fits = mask is None and _cudnn_objection(query.dtype, query.shape[-1]) is None
    return "cudnn" if fits else "xla"
  if objection is not None:
    raise InputError(f"decoder.attention: {implementation!r} {objection}; use 'auto' or 'xla'")
  if implementation == "splash":
    from cyb_jax.decoder import splash

    uneven = splash.uneven(query)
    if uneven is not None:
      logging.log_first_n(logging.WARNING, "attention is XLA's, and holds all its weights: %s", 1, uneven)
      return "xla"
  return implementation


def _attend_hidden(
  query: Float[Array, "B S N H"], key: Float[Array, "B S G H"], value: Float[Array, "B S G H"], slots: HiddenSlots
) -> Float[Array, "B S N H"]:
  """One softmax over two sets of keys: the tokens' first slots, and the other slots of the query's own token.

  Neither is normalised by itself, so there is nothing to merge, and gradients are autodiff's own.
  """
  batch, length, heads, size = query.shape
  groups, width = key.shape[2], slots.num_slots
  tokens = length // width
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  product = functools.partial(jnp.einsum, preferred_element_type=dtype)
  query = query.reshape(batch, tokens, width, groups, heads // groups, size)
  key, value = (x.reshape(batch, tokens, width, groups, size) for x in (key, value))
  # r: heads of a group; s: the keys' tokens; k: the keys' slots. In the order in which products come.
  far = product("btwgrh,bsgh->bgtwrs", query, key[:, :, 0]) * size**-0.5
  near = product("btwgrh,btkgh->btgwrk", query, key[:, :, 1:]) * size**-0.5
  order = jnp.arange(tokens)
  seen = (order[:, None] >= order)[None]
  if slots.segment_ids is not None:
    seen &= slots.segment_ids[:, :, None] == slots.segment_ids[:, None, :]
  far = jnp.where(seen[:, None, :, None, None], far, -jnp.inf)
  earlier = jnp.arange(width)[:, None] > jnp.arange(width - 1)
  near = jnp.where(earlier[:, None], near, -jnp.inf)
  # A token sees itself: the largest is finite. It cancels, so it needs no gradient.
  largest = jnp.maximum(far.max(-1), jnp.swapaxes(near.max(-1, initial=-jnp.inf), 1, 2))
  largest = jax.lax.stop_gradient(largest)[..., None]
  far, near = jnp.exp(far - largest), jnp.exp(near - jnp.swapaxes(largest, 1, 2))
  total = far.sum(-1) + jnp.swapaxes(near.sum(-1), 1, 2)
  out = product("bgtwrs,bsgh->btwgrh", far.astype(value.dtype), value[:, :, 0])
  out += product("btgwrk,btkgh->btwgrh", near.astype(value.dtype), value[:, :, 1:])
  out /= jnp.moveaxis(total, 1, 3)[..., None]
  return out.reshape(batch, length, heads, size).astype(query.dtype)


def _platform() -> str:
  """What the program being traced is to run on: it may be compiled for another machine than this."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def _splash_objection(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B C G H"],
  mask: Bool[Array, "#B 1 S C"] | SegmentMask | HiddenSlots | None,
  interpret: bool,
) -> str | None:
  """Why splash attention cannot run here, or None."""
  if not interpret and _platform() != "tpu":
    return f"needs a TPU, this program is for {_platform()!r}"
  if not (mask is None or isinstance(mask, SegmentMask | HiddenSlots)):
    return "takes no boolean mask (of hidden pauses in packed rows, of trees of answers)"
  if query.shape[1] != key.shape[1]:
    return f"needs as many keys as queries, not {key.shape[1]} and {query.shape[1]}"
  if query.dtype not in (jnp.bfloat16, jnp.float32):
    return f"needs bfloat16 or float32 activations, not {jnp.dtype(query.dtype).name}"
  if query.shape[-1] > _LARGEST_SPLASH_HEAD:
    return f"needs a head size of at most {_LARGEST_SPLASH_HEAD}, not {query.shape[-1]}"
  return None


def _cudnn_objection(dtype: jnp.dtype, head_size: int) -> str | None:
  """Why cuDNN's flash attention cannot run here, or None.

  The limits are those of https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html
  """
  if _platform() != "gpu":
    return f"needs an NVIDIA GPU, this program is for {_platform()!r}"
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"needs bfloat16 activations, not {jnp.dtype(dtype).name}"
  try:
    capability = float(jax.local_devices()[0].compute_capability)
  except (AttributeError, ValueError):  # an AMD GPU is a 'gpu' too
    return "needs an NVIDIA GPU"
  if capability < 8.0:
    return f"needs compute capability 8.0 or newer, not {capability}"
  largest = 256 if capability >= 9.0 else 128
  if head_size % 8 or head_size > largest:
    return f"needs a head size that is a multiple of 8 and at most {largest} here, not {head_size}"
  return None
