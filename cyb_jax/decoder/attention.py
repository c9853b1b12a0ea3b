"""Attention: the masks, windows, the weights of keys, and the one place that chooses an implementation.

Letters: B batch, S slots in a row (tokens x slots per token, flattened), N heads, G kv heads, H head size, C keys;
with hidden slots T tokens of W slots each, K = W - 1.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Bool, Float, Int

from cyb_jax.decoder import blocked_attention, hidden_attention
from cyb_jax.decoder.config import ATTENTION_IMPLEMENTATIONS
from cyb_jax.errors import InputError
from cyb_jax.partitioning.rules import current_mesh, target_platform

# The kernels work in blocks of at least 128 slots; most of a block is padding if the row is shorter.
_SHORTEST_SPLASH = 128
# Shorter rows have few attention weights, which XLA computes as fast.
_SHORTEST_BLOCKS = 128
# A block of heads larger than this does not fit into vector memory.
_LARGEST_SPLASH_HEAD = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SegmentMask:
  """Causal attention in the order of the slots, within each segment of a row.

  One row with the segment ids 0 0 1 1; rows are queries, columns are keys:

            s0 s1 s2 s3
      s0     1  .  .  .
      s1     1  1  .  .
      s2     .  .  1  .
      s3     .  .  1  1

  Attributes:
    segment_ids: i32[B, S]; slots with different ids do not see each other.
  """

  segment_ids: Int[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HiddenSlots:
  """A structured mask that avoids materialising the [S, S] mask: only a token's first slot is seen by later tokens.

  A row has T tokens of W slots each, S = T*W. Slot w of token t (both counted from 0) sees the first slots of the
  tokens 0 .. t, and the slots 1 .. w of its own token. T = 2, W = 3; rows are queries, columns are keys:

                t0 . .  t1 . .
      t0 first   1 . .   . . .
         second  1 1 .   . . .
         third   1 1 1   . . .
      t1 first   1 . .   1 . .
         second  1 . .   1 1 .
         third   1 . .   1 1 1

  Attributes:
    num_slots: W.
    segment_ids: i32[B, T]; tokens with different ids do not see each other. None: one segment.
  """

  num_slots: int = dataclasses.field(metadata={"static": True})
  segment_ids: Int[Array, "B T"] | None = None


Mask = Bool[Array, "#B 1 S C"] | SegmentMask | HiddenSlots | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
  """A sliding window: of the keys that the mask shows, a query sees those less than `size` positions below its own.

  The window counts positions, and pauses have the position of their token. Two tokens with a pause each, size 1:

                    t0 p0 t1 p1
      t0 position 0  1  .  .  .
      p0          0  1  1  .  .
      t1          1  .  .  1  .
      p1          1  .  .  1  1

  Attributes:
    size: the number of positions, that of the query included.
    queries: [B or 1, S], the positions of the queries.
    keys: [B or 1, C], the positions of the keys.
    num_slots: if the positions of a row are 0, 1, .. and every position has the same number of consecutive slots, that
      number, which kernels need; else None.
  """

  size: int = dataclasses.field(metadata={"static": True})
  queries: Int[Array, "#B S"] | Float[Array, "#B S"]
  keys: Int[Array, "#B C"] | Float[Array, "#B C"]
  num_slots: int | None = dataclasses.field(default=None, metadata={"static": True})

  def seen(self) -> Bool[Array, "#B 1 S C"]:
    """Whether the key is inside of the query's window."""
    return (self.queries[:, :, None] - self.keys[:, None] < self.size)[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyWeights:
  """Weights of the keys, the same for all queries and heads.

  Attributes:
    log: f32[B, C], added to the scores before the softmax.
    value: f32[B, C], a factor of the values; it does not enter the softmax. None: 1.
  """

  log: Float[Array, "B C"]
  value: Float[Array, "B C"] | None = None


def attend(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B C G H"],
  value: Float[Array, "B C G H"],
  *,
  mask: Mask = None,
  implementation: str = "auto",
  weights: KeyWeights | None = None,
  window: Window | None = None,
  scale: float | None = None,
  soft_cap: float | None = None,
  interpret: bool = False,
) -> Float[Array, "B S N H"]:
  """softmax(scale q k^T) v with grouped heads: head n reads kv head n // (N / G).

  Args:
    query: [B, S, N, H].
    key, value: [B, C, G, H], N a multiple of G; C = S unless the keys come from a cache.
    mask: None is causal attention in the order of the slots; `SegmentMask` is the same within segments. A boolean mask
      is [B or 1, 1, S, C], True where the query (third axis) may see the key (fourth); it includes causality, and every
      query must see a key. With `HiddenSlots` XLA holds [B, N, S, T + K] attention weights instead of [B, N, S, S].
    implementation: 'xla' holds all [B, N, S, C] attention weights; 'cudnn' is flash attention on NVIDIA GPUs for 16-bit
      floats, with hidden slots only without segments and windows; 'splash' is flash attention on TPUs and 'blocks'
      flash attention in plain JAX, which suits CPUs; both take every mask except boolean ones. 'auto' is the
      platform's kernel where the kernel is supported and skips work (cuDNN: without a mask or with hidden slots;
      'blocks': rows of 128 slots or more, on one device), else 'xla'. The choice is made while tracing; the platform
      is that of the mesh in whose context the call is traced (`jax.set_mesh`, pmap), else `jax.default_backend()`.
    weights: weights of the keys; they require XLA's attention and a mask other than `HiddenSlots`. None: all keys have
      the same weight.
    window: a sliding window, in addition to the mask. 'blocks' and 'splash' need its `num_slots` and skip the keys
      before the window; so does cuDNN with one slot per position and without a mask. None: no window.
    scale: the factor of q k^T; None: 1 / sqrt(H).
    soft_cap: scores become soft_cap * tanh(scores / soft_cap) before the mask; cuDNN does not support it. None: no cap.
    interpret: run 'splash' as plain JAX operations, on any device; for tests.

  Returns:
    [B, S, N, H] in the dtype of `query`. The softmax is computed in float32.

  Raises:
    InputError: 'blocks', 'cudnn' or 'splash' is requested but cannot run.
    ValueError: `weights` with `HiddenSlots`.
  """
  rules = {"window": window, "scale": scale, "soft_cap": soft_cap}
  if weights is not None:
    return _attend_weighted(query, key, value, mask, implementation, weights, **rules)
  implementation = choose_implementation(
    query, key, mask=mask, implementation=implementation, window=window, soft_cap=soft_cap, interpret=interpret
  )
  if implementation in ("blocks", "splash"):
    return _attend_kernel(query, key, value, mask, implementation, interpret, **rules)
  if isinstance(mask, HiddenSlots) and implementation == "cudnn":
    causal = functools.partial(jax.nn.dot_product_attention, scale=1.0, is_causal=True, implementation="cudnn")
    return hidden_attention.attend(query, key, value, mask.num_slots, causal, scale=scale)
  if isinstance(mask, HiddenSlots):
    return _attend_hidden(query, key, value, mask, **rules)
  return _attend_dense(query, key, value, mask, implementation, **rules)


def _attend_kernel(query, key, value, mask, implementation, interpret, *, window, scale, soft_cap):
  """Attention by 'blocks' or 'splash'."""
  rules = {"scale": scale, "soft_cap": soft_cap}
  if window is not None:
    rules |= {"window": window.size, "window_slots": window.num_slots}
  if implementation == "blocks":
    return blocked_attention.attend(query, key, value, *_structure(mask), **rules)
  # The kernels are experimental in JAX and need a TPU, so other platforms do not import them.
  from cyb_jax.decoder import splash

  return splash.attend(query, key, value, *_structure(mask), **rules, interpret=interpret)


def _attend_dense(query, key, value, mask, implementation, *, window, scale, soft_cap, bias=None):
  """Attention by 'xla' or 'cudnn', with a boolean mask or none; `bias` is added to the scores."""
  local = None
  if implementation == "cudnn" and mask is None and window is not None and window.num_slots == 1:
    local, window = (window.size - 1, 0), None
  mask = _dense(mask, query.shape[1], window)
  if soft_cap is not None:
    return _attend_capped(query, key, value, mask, scale=scale, soft_cap=soft_cap, bias=bias)
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    bias=bias,
    mask=mask,
    scale=scale,
    is_causal=mask is None,
    local_window_size=local,
    implementation=implementation,
  )


def _structure(mask: SegmentMask | HiddenSlots | None) -> tuple[int, Int[Array, "B T"] | None]:
  """(W, segment ids) of a structured mask."""
  if mask is None:
    return 1, None
  return (mask.num_slots if isinstance(mask, HiddenSlots) else 1), mask.segment_ids


def _dense(
  mask: Bool[Array, "#B 1 S C"] | SegmentMask | None, length: int, window: Window | None
) -> Bool[Array, "#B 1 S C"] | None:
  """The mask and the window in a form that XLA's attention takes: boolean, or None for plain causal attention."""
  if mask is None and window is None:
    return None
  seen = mask
  if mask is None or isinstance(mask, SegmentMask):
    order = jnp.arange(length)
    seen = (order[:, None] >= order)[None]
    if mask is not None:
      seen = seen & (mask.segment_ids[:, :, None] == mask.segment_ids[:, None, :])
    seen = seen[:, None]
  return seen if window is None else seen & window.seen()


def _attend_weighted(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B C G H"],
  value: Float[Array, "B C G H"],
  mask: Mask,
  implementation: str,
  weights: KeyWeights,
  *,
  window: Window | None,
  scale: float | None,
  soft_cap: float | None,
) -> Float[Array, "B S N H"]:
  if implementation not in ("auto", "xla"):
    raise InputError(f"decoder.attention: {implementation!r} does not support key weights; use 'auto' or 'xla'")
  if isinstance(mask, HiddenSlots):
    raise ValueError("mask: HiddenSlots does not support key weights; use a boolean mask")
  if weights.value is not None:
    value = value * weights.value[:, :, None, None].astype(value.dtype)
  # A bias that depends on the key alone broadcasts over queries and heads; the softmax adds it in float32.
  bias = weights.log[:, None, None, :]
  return _attend_dense(query, key, value, mask, "xla", window=window, scale=scale, soft_cap=soft_cap, bias=bias)


def _attend_capped(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B C G H"],
  value: Float[Array, "B C G H"],
  mask: Bool[Array, "#B 1 S C"] | None,
  *,
  scale: float | None,
  soft_cap: float,
  bias: Float[Array, "B 1 1 C"] | None = None,
) -> Float[Array, "B S N H"]:
  """Attention with bounded scores, which `jax.nn.dot_product_attention` does not have."""
  batch, length, heads, size = query.shape
  groups = key.shape[2]
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  if mask is None:
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
  query = query.reshape(batch, length, groups, heads // groups, size)
  scores = jnp.einsum("bsgrh,bcgh->bgrsc", query, key, preferred_element_type=dtype)
  scores = _capped(scores * (size**-0.5 if scale is None else scale), soft_cap)
  if bias is not None:
    scores += bias[:, :, None]
  shares = jax.nn.softmax(jnp.where(mask[:, :, None], scores, -jnp.inf), axis=-1).astype(value.dtype)
  return jnp.einsum("bgrsc,bcgh->bsgrh", shares, value).reshape(batch, length, heads, size)


def _capped(scores: Float[Array, "..."], soft_cap: float | None) -> Float[Array, "..."]:
  return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def choose_implementation(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B C G H"],
  *,
  mask: Mask,
  implementation: str,
  interpret: bool,
  window: Window | None = None,
  soft_cap: float | None = None,
) -> str:
  """The implementation that `attend` uses, a name other than 'auto'; arguments and errors are those of `attend`."""
  if implementation not in ATTENTION_IMPLEMENTATIONS:
    raise InputError(f"decoder.attention: {implementation!r} is not one of {', '.join(ATTENTION_IMPLEMENTATIONS)}")
  if implementation == "xla":
    return "xla"
  if implementation == "blocks":
    objection = _structure_objection(query, key, mask, window)
  elif implementation == "cudnn":
    objection = _cudnn_objection(query.dtype, query.shape[-1], mask)
    if isinstance(mask, HiddenSlots) and (mask.segment_ids is not None or window is not None):
      objection = "supports hidden slots only without document_mask and without decoder.window"
    elif soft_cap is not None:
      objection = "does not support attention_soft_cap"
  elif implementation == "splash":
    objection = _splash_objection(query, key, mask, interpret, window)
  elif _splash_objection(query, key, mask, interpret, window) is None and query.shape[1] >= _SHORTEST_SPLASH:
    implementation, objection = "splash", None
  elif target_platform() == "cpu":
    # A mesh of CPU devices is for tests of sharding. The blocks' loop over rows would gather the batch there.
    fits = query.shape[1] >= _SHORTEST_BLOCKS and current_mesh() is None
    return "blocks" if fits and _structure_objection(query, key, mask, window) is None else "xla"
  else:
    # cuDNN turns a mask into a dense bias and skips no work; XLA is then as fast and supports every shape.
    if isinstance(mask, HiddenSlots):
      fits = mask.segment_ids is None and window is None
    else:
      fits = mask is None and (window is None or window.num_slots == 1)
    fits = fits and soft_cap is None and _cudnn_objection(query.dtype, query.shape[-1], mask) is None
    return "cudnn" if fits else "xla"
  if objection is not None:
    raise InputError(f"decoder.attention: {implementation!r} {objection}; use 'auto' or 'xla'")
  if implementation == "splash":
    from cyb_jax.decoder import splash

    uneven = splash.uneven(query)
    if uneven is not None:
      logging.log_first_n(
        logging.WARNING, "XLA's attention replaces the splash kernel and holds all attention weights: %s", 1, uneven
      )
      return "xla"
  return implementation


def _attend_hidden(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B S G H"],
  value: Float[Array, "B S G H"],
  slots: HiddenSlots,
  *,
  window: Window | None,
  scale: float | None,
  soft_cap: float | None,
) -> Float[Array, "B S N H"]:
  """One softmax over two sets of keys: the tokens' first slots (far), and the other slots of the query's token (near).

  Both sets share one normaliser, so no merging of two softmaxes is needed and autodiff gives the gradients.
  """
  batch, length, heads, size = query.shape
  groups, width = key.shape[2], slots.num_slots
  tokens = length // width
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  product = functools.partial(jnp.einsum, preferred_element_type=dtype)
  query = query.reshape(batch, tokens, width, groups, heads // groups, size)
  key, value = (x.reshape(batch, tokens, width, groups, size) for x in (key, value))
  scale = size**-0.5 if scale is None else scale
  # r: heads of a group; s: the keys' tokens; k: the keys' slots. The axes keep the order that the products yield.
  far = _capped(product("btwgrh,bsgh->bgtwrs", query, key[:, :, 0]) * scale, soft_cap)
  near = _capped(product("btwgrh,btkgh->btgwrk", query, key[:, :, 1:]) * scale, soft_cap)
  order = jnp.arange(tokens)
  seen = (order[:, None] >= order)[None]
  if slots.segment_ids is not None:
    seen &= slots.segment_ids[:, :, None] == slots.segment_ids[:, None, :]
  seen = seen[:, None, :, None, None]
  earlier = (jnp.arange(width)[:, None] > jnp.arange(width - 1))[:, None]
  if window is not None:
    queries, keys = (x.reshape(len(x), tokens, width) for x in (window.queries, window.keys))
    distance = queries[..., None] - keys[:, None, None, :, 0]  # [#B, t, w, s]
    seen = seen & (distance < window.size)[:, None, :, :, None]
    distance = queries[..., None] - keys[:, :, None, 1:]  # [#B, t, w, k]
    earlier = earlier & (distance < window.size)[:, :, None, :, None]
  far = jnp.where(seen, far, -jnp.inf)
  near = jnp.where(earlier, near, -jnp.inf)
  # Every token sees itself, so the maximum is finite. The maximum cancels, so it needs no gradient.
  largest = jnp.maximum(far.max(-1), jnp.swapaxes(near.max(-1, initial=-jnp.inf), 1, 2))
  largest = jax.lax.stop_gradient(largest)[..., None]
  far, near = jnp.exp(far - largest), jnp.exp(near - jnp.swapaxes(largest, 1, 2))
  total = far.sum(-1) + jnp.swapaxes(near.sum(-1), 1, 2)
  out = product("bgtwrs,bsgh->btwgrh", far.astype(value.dtype), value[:, :, 0])
  out += product("btgwrk,btkgh->btwgrh", near.astype(value.dtype), value[:, :, 1:])
  out /= jnp.moveaxis(total, 1, 3)[..., None]
  return out.reshape(batch, length, heads, size).astype(query.dtype)


def _structure_objection(
  query: Float[Array, "B S N H"], key: Float[Array, "B C G H"], mask: Mask, window: Window | None
) -> str | None:
  """Why kernels that take structured masks alone cannot run here, or None."""
  if not (mask is None or isinstance(mask, SegmentMask | HiddenSlots)):
    return "supports no boolean mask (packed rows with hidden pauses and answer trees need one)"
  if query.shape[1] != key.shape[1]:
    return f"needs as many keys as queries, not {key.shape[1]} and {query.shape[1]}"
  if window is not None:
    needed = mask.num_slots if isinstance(mask, HiddenSlots) else window.num_slots
    if needed is None or window.num_slots != needed:
      return "supports decoder.window only if all slots of a token have its position and all tokens as many slots"
  return None


def _splash_objection(
  query: Float[Array, "B S N H"],
  key: Float[Array, "B C G H"],
  mask: Mask,
  interpret: bool,
  window: Window | None = None,
) -> str | None:
  """Why splash attention cannot run here, or None."""
  if not interpret and target_platform() != "tpu":
    return f"needs a TPU, this program is for {target_platform()!r}"
  objection = _structure_objection(query, key, mask, window)
  if objection is not None:
    return objection
  if query.dtype not in (jnp.bfloat16, jnp.float32):
    return f"needs bfloat16 or float32 activations, not {jnp.dtype(query.dtype).name}"
  if query.shape[-1] > _LARGEST_SPLASH_HEAD:
    return f"needs a head size of at most {_LARGEST_SPLASH_HEAD}, not {query.shape[-1]}"
  return None


def _cudnn_objection(dtype: jnp.dtype, head_size: int, mask: Mask) -> str | None:
  """Why cuDNN's flash attention cannot run here, or None.

  The limits are those of https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html
  """
  if target_platform() != "gpu":
    return f"needs an NVIDIA GPU, this program is for {target_platform()!r}"
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"needs bfloat16 activations, not {jnp.dtype(dtype).name}"
  try:
    capability = float(jax.local_devices()[0].compute_capability)
  except (AttributeError, ValueError):  # AMD GPUs also have the platform 'gpu'
    return "needs an NVIDIA GPU"
  if capability < 8.0:
    return f"needs compute capability 8.0 or newer, not {capability}"
  largest = 256 if capability >= 9.0 else 128
  if isinstance(mask, HiddenSlots):
    if hidden_attention.kernel_head_size(head_size) > largest:
      return f"needs a head size of at most {largest - hidden_attention.EXTRA} here for hidden slots, not {head_size}"
  elif head_size % 8 or head_size > largest:
    return f"needs a head size that is a multiple of 8 and at most {largest} here, not {head_size}"
  return None
