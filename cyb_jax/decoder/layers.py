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
from jaxtyping import Array, Float, Int

from cyb_jax.decoder import attention
from cyb_jax.decoder.cache import write
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

CachedLayer = tuple[Float[Array, "B C G H"], Float[Array, "B C G H"]]
"""(keys, values) of one layer."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerContext:
  """The inputs that all layers of a pass share; a scan over layers broadcasts them.

  Attributes:
    rope: (cosine, sine), f32[B or 1, S, R/2] each, from `rope.rope_factors`.
    mask: see `attention.attend`; with `start`, boolean over the C cache entries.
    query_key_offset: [S, D] or [B, S, D] in the dtype of activations, added to the normed input of the query and key
      projections; None: 0.
    start: i32[B], the cache index of each row's first new slot. None: either no cache is used, or the cache is empty
      and the new slots see only each other.
    key_weights: weights of the keys; None: all keys have the same weight.
    update_scale: [B, S, 1] in the dtype of activations, a factor of both updates of the residual stream; None: 1.
  """

  rope: tuple[Float[Array, "#B S R/2"], Float[Array, "#B S R/2"]]
  mask: attention.Mask = None
  query_key_offset: Float[Array, "S D"] | Float[Array, "B S D"] | None = None
  start: Int[Array, "B"] | None = None
  key_weights: attention.KeyWeights | None = None
  update_scale: Float[Array, "B S 1"] | None = None


class Layer(nn.Module):
  """One transformer block. It returns hidden states and this layer's part of the cache: `nn.scan` requires a pair."""

  config: DecoderConfig

  def setup(self):
    self.attention_norm = Norm(self.config)
    self.attention = Attention(self.config)
    self.mlp_norm = Norm(self.config)
    self.mlp = Mlp(self.config)

  def __call__(
    self, hidden: Float[Array, "B S D"], cached: CachedLayer | None, context: LayerContext
  ) -> tuple[Float[Array, "B S D"], CachedLayer | None]:
    scale = context.update_scale

    def updated(hidden, by):
      return hidden + constrain(by if scale is None else by * scale, "batch", None, None)

    attended, cached = self.attention(self.attention_norm(hidden), cached=cached, context=context)
    if self.config.parallel_residual:
      return updated(hidden, attended + self.mlp(self.mlp_norm(hidden))), cached
    hidden = updated(hidden, attended)
    return updated(hidden, self.mlp(self.mlp_norm(hidden))), cached


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

  def __call__(
    self, normed: Float[Array, "B S D"], *, cached: CachedLayer | None, context: LayerContext
  ) -> tuple[Float[Array, "B S D"], CachedLayer | None]:
    offset, rope = context.query_key_offset, context.rope
    shifted = normed if offset is None else normed + offset
    query = constrain(apply_rope(self.query(shifted), *rope), "batch", None, "heads", None)
    key = constrain(apply_rope(self.key(shifted), *rope), "batch", None, "kv_heads", None)
    value = constrain(self.value(normed), "batch", None, "kv_heads", None)
    attend = functools.partial(attention.attend, query, weights=context.key_weights)
    if cached is None:
      return self.out(attend(key, value, mask=context.mask, implementation=self.config.attention)), None
    start = jnp.zeros(len(key), jnp.int32) if context.start is None else context.start
    cached = write(cached[0], key, start), write(cached[1], value, start)
    if context.start is None:
      # The cache was empty, so the new slots see only each other, and every implementation supports that.
      return self.out(attend(key, value, implementation=self.config.attention)), cached
    # A few queries against all cache entries, most of which are masked: only XLA's attention supports that.
    return self.out(attend(*cached, mask=context.mask, implementation="xla")), cached


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
    dtype, param_dtype = jnp.dtype(self.config.dtype), jnp.dtype(self.config.param_dtype)
    kernel_init = nn.with_logical_partitioning(self.kernel_init, self.axes)
    kernel = self.param("kernel", kernel_init, self.inputs + self.outputs, param_dtype)
    y = contract(x, kernel.astype(dtype), len(self.inputs))
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


class Norm(nn.Module):
  """RMSNorm, https://arxiv.org/abs/1910.07467, or LayerNorm, https://arxiv.org/abs/1607.06450; in float32."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x):
    config = self.config
    param_dtype = jnp.dtype(config.param_dtype)
    # Gemma's checkpoints store the scale minus one.
    stored_less_one = config.norm == "rmsnorm_plus_one"
    start = nn.initializers.zeros_init() if stored_less_one else nn.initializers.ones_init()
    scale = self.param("scale", nn.with_logical_partitioning(start, ("norm",)), x.shape[-1:], param_dtype)
    scale = scale.astype(jnp.float32)
    if stored_less_one:
      scale = 1 + scale
    y = x.astype(jnp.float32)
    if config.norm == "layernorm":
      y -= y.mean(axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + config.norm_epsilon)
    y *= scale
    if config.norm == "layernorm":
      bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",))
      y += self.param("bias", bias_init, x.shape[-1:], param_dtype).astype(jnp.float32)
    return y.astype(jnp.dtype(config.dtype))
