"""The layers of a decoder: attention, the feed-forward network, norms and projections.

Letters: B batch, S slots of a row, C cache entries, D model, N heads, G kv heads, H head size, R rotated part of a
head.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cyb_jax.decoder import attention, quantization
from cyb_jax.decoder.cache import parts, read_filled, write
from cyb_jax.decoder.config import DecoderConfig
from cyb_jax.decoder.contraction import contract
from cyb_jax.decoder.initializers import matrix_init
from cyb_jax.decoder.lora import adapt
from cyb_jax.decoder.rope import apply_rope
from cyb_jax.partitioning.rules import constrain

_ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}

CachedLayer = tuple[Float[Array, "B C G H"], Float[Array, "B C G H"], Float[Array, "B C 1 1"] | None]
"""(keys, values, positions) of one layer, see `Cache`."""

Rope = tuple[Float[Array, "#B S R/2"], Float[Array, "#B S R/2"]]
"""(cosine, sine) from `rope.rope_factors`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerContext:
  """The inputs that all layers of a pass share; a scan over layers broadcasts them.

  Attributes:
    positions: [B or 1, S], the positions of the slots.
    ropes: RoPE in global and in local layers; None: no rotation.
    mask: see `attention.attend`; with `start`, boolean over the C cache entries.
    query_key_offset: [S, D] or [B, S, D] in the dtype of activations, added to the normed input of the query and key
      projections; None: 0.
    start: i32[B], the cache index of each row's first new slot. None: either no cache is used, or the cache is empty
      and the new slots see only each other.
    key_weights: weights of the keys; None: all keys have the same weight.
    update_scale: [B, S, 1] in the dtype of activations, a factor of both updates of the residual stream; None: 1.
    slots_per_position: see `Decoder.__call__`.
  """

  positions: Int[Array, "#B S"] | Float[Array, "#B S"]
  ropes: tuple[Rope | None, Rope | None]
  mask: attention.Mask = None
  query_key_offset: Float[Array, "S D"] | Float[Array, "B S D"] | None = None
  start: Int[Array, "B"] | None = None
  key_weights: attention.KeyWeights | None = None
  update_scale: Float[Array, "B S 1"] | None = None
  slots_per_position: int | None = dataclasses.field(default=None, metadata={"static": True})


class Layer(nn.Module):
  """One transformer block. It returns hidden states and this layer's part of the cache: `nn.scan` requires a pair.

  Attributes:
    config: the decoder's config.
    is_global: whether the layer is global; None: `__call__` gets it, because layers that a scan runs share one module.
  """

  config: DecoderConfig
  is_global: bool | None

  def setup(self):
    config = self.config
    if config.norm_placement != "after":
      self.attention_norm = Norm(config)
      self.mlp_norm = Norm(config)
    if config.norm_placement != "before":
      self.attention_post_norm = Norm(config)
      self.mlp_post_norm = Norm(config)
    self.attention = Attention(config)
    self.mlp = Mlp(config)

  def __call__(
    self,
    hidden: Float[Array, "B S D"],
    cached: CachedLayer | None,
    is_global: Bool[Array, ""] | None,
    context: LayerContext,
  ) -> tuple[Float[Array, "B S D"], CachedLayer | None]:
    placement, scale = self.config.norm_placement, context.update_scale
    is_global = self.is_global if is_global is None else is_global

    def updated(hidden, by):
      return hidden + constrain(by if scale is None else by * scale, "batch", None, None)

    normed = hidden if placement == "after" else self.attention_norm(hidden)
    attended, cached = self.attention(normed, cached=cached, is_global=is_global, context=context)
    if self.config.parallel_residual:
      return updated(hidden, attended + self.mlp(self.mlp_norm(hidden))), cached
    if placement != "before":
      attended = self.attention_post_norm(attended)
    hidden = updated(hidden, attended)
    added = self.mlp(hidden if placement == "after" else self.mlp_norm(hidden))
    if placement != "before":
      added = self.mlp_post_norm(added)
    return updated(hidden, added), cached


class Attention(nn.Module):
  """Multi-head attention with grouped kv heads and RoPE, and with an optional cache."""

  config: DecoderConfig

  def setup(self):
    config = self.config
    model, heads = (config.d_model,), (config.num_heads, config.head_size)
    kv_heads = (config.num_kv_heads, config.head_size)
    read = functools.partial(
      Projection,
      config,
      model,
      kernel_init=matrix_init(config, 1),
      use_bias=config.attention_bias != "none",
    )
    self.query = read(heads, axes=("embed", "heads", "head_size"))
    self.key = read(kv_heads, axes=("embed", "kv_heads", "head_size"))
    self.value = read(kv_heads, axes=("embed", "kv_heads", "head_size"))
    self.out = Projection(
      config,
      heads,
      model,
      axes=("heads", "head_size", "embed"),
      kernel_init=matrix_init(config, 2, writes_residual=True),
      use_bias=config.attention_bias == "all",
    )
    if config.query_key_norm != "none":
      axes = 1 if config.query_key_norm == "head" else 2
      self.query_norm = Norm(config, axes=axes)
      self.key_norm = Norm(config, axes=axes)

  def __call__(
    self,
    normed: Float[Array, "B S D"],
    *,
    cached: CachedLayer | None,
    is_global: bool | Bool[Array, ""],
    context: LayerContext,
  ) -> tuple[Float[Array, "B S D"], CachedLayer | None]:
    offset = context.query_key_offset
    shifted = normed if offset is None else normed + offset
    query, key = self.query(shifted), self.key(shifted)
    if self.config.query_key_norm != "none":
      query, key = self.query_norm(query), self.key_norm(key)
    rope = _chosen(is_global, *context.ropes)
    if rope is not None:
      query, key = apply_rope(query, *rope), apply_rope(key, *rope)
    query = constrain(query, "batch", None, "heads", None)
    key = constrain(key, "batch", None, "kv_heads", None)
    value = constrain(self.value(normed), "batch", None, "kv_heads", None)
    attend = functools.partial(self._attend, query, is_global=is_global, context=context)
    implementation = self.config.attention
    if cached is None:
      return self.out(attend(key, value, context.positions, context.mask, implementation)), None
    start = jnp.zeros(len(key), jnp.int32) if context.start is None else context.start
    keys, values, positions = write(cached[0], key, start), write(cached[1], value, start), cached[2]
    if positions is not None:
      new = jnp.broadcast_to(context.positions, key.shape[:2])[:, :, None, None]
      positions = write(positions, new, start)
    cached = keys, values, positions
    if context.start is None:
      # The cache was empty, so the new slots see only each other, and every implementation supports that. The slots of
      # prompts may be padded, so a window over their positions needs XLA's attention.
      if self.config.window is not None:
        implementation = "xla"
      return self.out(attend(key, value, context.positions, None, implementation)), cached

    # A few queries against all cache entries, most of which are masked: only XLA's attention supports that.
    def attend_first(size):
      weights = jax.tree.map(lambda x: x[:, :size], context.key_weights)
      seen = dataclasses.replace(context, key_weights=weights)
      key_positions = None if positions is None else positions[:, :size, 0, 0]
      mask = context.mask[..., :size]
      return attend(keys[:, :size], values[:, :size], key_positions, mask, "xla", context=seen)

    return self.out(read_filled(attend_first, start, query.shape[1], parts(keys))), cached

  def _attend(self, query, key, value, key_positions, mask, implementation, *, is_global, context):
    """`attention.attend` with the window of local layers; `key_positions` is None without a window."""
    config = self.config
    attend = functools.partial(
      attention.attend,
      query,
      key,
      value,
      mask=mask,
      implementation=implementation,
      weights=context.key_weights,
      scale=None if config.query_scalar is None else config.attention_scale,
      soft_cap=config.attention_soft_cap,
    )
    if config.window is None:
      return attend()
    window = attention.Window(config.window, context.positions, key_positions, context.slots_per_position)
    if isinstance(is_global, bool):
      return attend(window=None if is_global else window)
    return jax.lax.cond(is_global, attend, functools.partial(attend, window=window))


def _chosen(is_global: bool | Bool[Array, ""], of_global: Rope | None, of_local: Rope | None) -> Rope | None:
  """The RoPE of a layer that is known to be global or local, or that a scan determines."""
  if isinstance(is_global, bool):
    return of_global if is_global else of_local
  return jax.tree.map(lambda x, y: jnp.where(is_global, x, y), of_global, of_local)


class Mlp(nn.Module):
  """The feed-forward network, gated or plain."""

  config: DecoderConfig

  def setup(self):
    config = self.config
    model, inner = (config.d_model,), (config.mlp_size,)
    read = functools.partial(
      Projection,
      config,
      model,
      inner,
      axes=("embed", "mlp"),
      kernel_init=matrix_init(config, 1),
      use_bias=config.mlp_bias,
    )
    if config.gated_mlp:
      self.gate = read()
    self.up = read()
    self.down = Projection(
      config,
      inner,
      model,
      axes=("mlp", "embed"),
      kernel_init=matrix_init(config, 1, writes_residual=True),
      use_bias=config.mlp_bias,
    )

  def __call__(self, normed):
    activation = _ACTIVATIONS[self.config.activation]
    if self.config.gated_mlp:
      inner = activation(self.gate(normed)) * self.up(normed)
    else:
      inner = activation(self.up(normed))
    return self.down(constrain(inner, "batch", None, "mlp"))


class Projection(nn.Module):
  """Contracts the last axes of its input, of shape `inputs`, into axes of shape `outputs`."""

  config: DecoderConfig
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  axes: tuple[str, ...]  # logical names of inputs + outputs
  kernel_init: Callable
  use_bias: bool

  @nn.compact
  def __call__(self, x):
    dtype, param_dtype = jnp.dtype(self.config.dtype), jnp.dtype(self.config.table_dtype)
    y = self._project(x)
    if self.use_bias:
      bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[len(self.inputs) :])
      y += self.param("bias", bias_init, self.outputs, param_dtype).astype(dtype)
    lora = self.config.lora
    if lora is not None and self.name in lora.targets:
      count = len(self.inputs)
      a_init = nn.initializers.normal(1 / math.sqrt(math.prod(self.inputs)))
      a_init = nn.with_logical_partitioning(a_init, (*self.axes[:count], "rank"))
      b_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("rank", *self.axes[count:]))
      a = self.param("lora_a", a_init, (*self.inputs, lora.rank), jnp.float32)
      b = self.param("lora_b", b_init, (lora.rank, *self.outputs), jnp.float32)
      y += adapt(x, a, b, lora.scale, count)
    return y

  def _project(self, x):
    """The product with the matrix, whose parameters depend on its number format."""
    config = self.config
    if not config.is_quantized:
      kernel_init = nn.with_logical_partitioning(self.kernel_init, self.axes)
      kernel = self.param("kernel", kernel_init, self.inputs + self.outputs, jnp.dtype(config.param_dtype))
      return contract(x, kernel.astype(jnp.dtype(config.dtype)), len(self.inputs))
    scheme, outputs = config.param_dtype, self.axes[len(self.inputs) :]
    stored_shape, scale_shape = quantization.shapes(scheme, self.inputs, self.outputs)
    axes = self.axes if scheme == "int8" else (self.axes[0], *outputs)
    scale_axes = outputs if scheme == "int8" else axes
    # Quantised matrices are always read; these initial values only give activations of a usual size.
    scale = 1 / (_DEVIATION * math.sqrt(math.prod(self.inputs)))
    stored = self.param("kernel", nn.with_logical_partitioning(_drawn_integers, axes), stored_shape, scheme)
    scale_init = nn.with_logical_partitioning(nn.initializers.constant(scale), scale_axes)
    scales = self.param(quantization.SCALE, scale_init, scale_shape, jnp.float32)
    return quantization.project(x, stored, scales, self.inputs)


_DEVIATION = 73.0  # the standard deviation of integers that are uniform in [-127, 127]


def _drawn_integers(rng: Array, shape: tuple[int, ...], scheme: str) -> Array:
  dtype = quantization.storage_dtype(scheme)
  low, high = (-127, 128) if scheme == "int8" else (0, 256)
  return jax.random.randint(rng, shape, low, high, jnp.int32).astype(dtype)


class Norm(nn.Module):
  """RMSNorm, https://arxiv.org/abs/1910.07467, or LayerNorm, https://arxiv.org/abs/1607.06450; in float32.

  Attributes:
    config: the kind and the epsilon.
    axes: the number of the last axes over which the mean is taken.
  """

  config: DecoderConfig
  axes: int = 1

  @nn.compact
  def __call__(self, x):
    config = self.config
    param_dtype = jnp.dtype(config.table_dtype)
    # Gemma's checkpoints store the scale minus one.
    stored_less_one = config.norm == "rmsnorm_plus_one"
    start = nn.initializers.zeros_init() if stored_less_one else nn.initializers.ones_init()
    axes, shape = tuple(range(-self.axes, 0)), x.shape[-self.axes :]
    names = ("norm",) * self.axes
    scale = self.param("scale", nn.with_logical_partitioning(start, names), shape, param_dtype)
    scale = scale.astype(jnp.float32)
    if stored_less_one:
      scale = 1 + scale
    y = x.astype(jnp.float32)
    if config.norm == "layernorm":
      y -= y.mean(axis=axes, keepdims=True)
    y *= jax.lax.rsqrt(jnp.square(y).mean(axis=axes, keepdims=True) + config.norm_epsilon)
    y *= scale
    if config.norm == "layernorm":
      bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), names)
      y += self.param("bias", bias_init, shape, param_dtype).astype(jnp.float32)
    return y.astype(jnp.dtype(config.dtype))
