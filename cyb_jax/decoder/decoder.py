"""A decoder-only transformer, one configuration of which is any of the families that we load.

It knows nothing of pauses: it is given inputs that are embedded already, with their positions and, where
plain causal order is not meant, a mask; and it gives back hidden states, to be read out elsewhere.

Letters: B batch, T tokens, W slots, S = T*W flattened, D model, V vocabulary, N heads, G kv heads,
H head size, L layers, F mlp.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from cyb_jax.decoder import attention
from cyb_jax.decoder.cache import Cache, seen_places, write
from cyb_jax.decoder.lora import LoraConfig, adapt
from cyb_jax.errors import InputError
from cyb_jax.partitioning.rules import constrain

_ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
_REMAT_POLICIES = {
  "full": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
# Beside sqrt(D), so that scaled inputs start at a deviation of 1.
_SCALES = {"small": math.sqrt(2.5)}
_CHOICES = {
  "norm": ("rmsnorm", "rmsnorm_plus_one", "layernorm"),
  "activation": tuple(_ACTIVATIONS),
  "attention_bias": ("none", "qkv", "all"),
  "remat": ("none", *_REMAT_POLICIES),
  "dtype": ("float32", "bfloat16"),
  "param_dtype": ("float32", "bfloat16"),
  "attention": attention.IMPLEMENTATIONS,
  "initializer": ("normal", "scaled", "small"),
}
SIZES = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_size", "mlp_size")
_SWITCHES = (
  "gated_mlp", "mlp_bias", "parallel_residual", "tied_embeddings", "scale_embeddings", "scan_layers",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Shape and style of a decoder. The defaults are Llama's style; sizes have none.

  Raises:
    InputError: a field is out of its range, or two do not go together; the message names `decoder.field`.
  """

  vocab_size: int  # V; rows of the embedding table. Pauses and <don't know> are not among them.
  num_layers: int  # L
  d_model: int  # D
  num_heads: int  # N
  num_kv_heads: int  # G, divides N
  head_size: int  # H; N * H need not be D
  mlp_size: int  # F

  norm: str = "rmsnorm"  # or 'rmsnorm_plus_one' (Gemma: times 1 + scale), 'layernorm' (scale and bias)
  norm_epsilon: float = 1e-5
  activation: str = "silu"  # or 'gelu' (exact), 'gelu_tanh'
  gated_mlp: bool = True  # down(activation(gate x) * up x), else down(activation(up x))
  attention_bias: str = "none"  # or 'qkv', 'all' (the output projection too)
  mlp_bias: bool = False
  parallel_residual: bool = False  # x + attention(norm x) + mlp(norm' x), as in Pythia
  rope_base: float = 10_000.0
  rope_fraction: float = 1.0  # the part of each head that is rotated, from its start
  tied_embeddings: bool = True
  scale_embeddings: bool = False  # inputs times sqrt(D), as in Gemma; with initializer 'small' sqrt(2.5 D)
  soft_cap: float | None = None  # logits become cap * tanh(logits / cap): applied by the readout, not here

  initializer: str = "normal"  # or 'scaled', 'small'; see init_params
  dtype: str = "float32"  # of activations and matrix products; norms, softmax and rotations are in float32
  param_dtype: str = "float32"  # 'bfloat16' is for what isn't trained: small updates would be rounded away
  attention: str = "auto"  # or 'xla', 'cudnn', 'splash'; see attention.attend
  remat: str = "none"  # or 'full' (keeps the layers' inputs), 'dots' (and all products but attention's)
  scan_layers: bool = False  # one compiled layer, parameters stacked on a leading axis 'layers'
  lora: LoraConfig | None = None  # adapters beside some of the matrices; see lora.py

  def __post_init__(self):
    for name in SIZES:
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _bad(name, value, "an integer of at least 1")
    for name, choices in _CHOICES.items():
      if getattr(self, name) not in choices:
        raise _bad(name, getattr(self, name), f"one of {', '.join(choices)}")
    for name in _SWITCHES:
      if not isinstance(getattr(self, name), bool):
        raise _bad(name, getattr(self, name), "True or False")
    for name in ("norm_epsilon", "rope_base", "rope_fraction"):
      if not _is_positive(getattr(self, name)):
        raise _bad(name, getattr(self, name), "a positive number")
    if self.soft_cap is not None and not _is_positive(self.soft_cap):
      raise _bad("soft_cap", self.soft_cap, "a positive number, or None for no cap")
    if self.num_heads % self.num_kv_heads:
      raise _bad("num_kv_heads", self.num_kv_heads, f"a divisor of decoder.num_heads = {self.num_heads}")
    off = abs(self.rotated_size - self.rope_fraction * self.head_size)
    if self.rope_fraction > 1 or self.rotated_size % 2 or off > 1e-6:
      wanted = f"a fraction of at most 1 that gives an even part of decoder.head_size = {self.head_size}"
      raise _bad("rope_fraction", self.rope_fraction, wanted)
    if self.attention == "cudnn" and self.dtype == "float32":
      raise _bad("attention", self.attention, "auto or xla, or decoder.dtype = bfloat16 (cuDNN wants that)")
    if self.lora is not None and "gate" in self.lora.targets and not self.gated_mlp:
      raise InputError(
        f"tuning.lora_targets: {','.join(self.lora.targets)!r} names 'gate', but this decoder has none"
        " (decoder.gated_mlp is False); leave it out"
      )

  @property
  def rotated_size(self) -> int:
    """How many numbers of each head RoPE turns."""
    return round(self.rope_fraction * self.head_size)


def _is_positive(value: object) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _bad(field: str, value: object, wanted: str) -> InputError:
  return InputError(f"decoder.{field}: {value!r} will not do; expected {wanted}")


class Decoder(nn.Module):
  """Embedded inputs -> hidden states. Methods are called as `decoder.apply(variables, ..., method='embed')`.

  Parameters come from `init_params`: `embedding` [V, D]; `unembedding` [V, D] unless tied; `layers_0`,
  `layers_1`, ... or, with scan_layers, `layers` with a leading axis L; `final_norm`. A layer has
  `attention_norm`, `attention` (`query` [D, N, H], `key` and `value` [D, G, H], `out` [N, H, D]), `mlp_norm`
  and `mlp` (`gate` and `up` [D, F], `down` [F, D]); a matrix is a `kernel`, with a `bias` where configured, and
  where it has an adapter of rank r `lora_a` f32[inputs..., r] and `lora_b` f32[r, outputs...].
  """

  config: DecoderConfig

  def setup(self):
    config = self.config
    table = (config.vocab_size, config.d_model)
    self.embedding = self.param(
      "embedding",
      nn.with_logical_partitioning(embedding_init(config), ("vocab", "embed")),
      table,
      jnp.dtype(config.param_dtype),
    )
    if not config.tied_embeddings:
      self.output_embedding = self.param(
        "unembedding",
        nn.with_logical_partitioning(unembedding_init(config), ("vocab", "embed")),
        table,
        jnp.dtype(config.param_dtype),
      )
    layer = _Layer
    if config.remat != "none":
      # Inside a scan XLA cannot merge the recomputation with the original, and the barrier only costs.
      layer = nn.remat(layer, policy=_REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers)
    if config.scan_layers:
      scanned = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast, nn.broadcast),
        length=config.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      self.layers = scanned(config)
    else:
      self.layers = [layer(config) for _ in range(config.num_layers)]
    self.final_norm = _Norm(config)

  def embed(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Rows of the embedding table, times sqrt(D) where the config says so.

    Args:
      tokens: i32[...] in [0, V). An id of V or more gives NaN rather than some other token's row.

    Returns:
      [..., D] in the dtype of activations.
    """
    # Over fsdp the ids are sent to where the rows' widths lie, and what is found there comes back. Left to itself XLA
    # gathers the table in f32, and reduces a gradient as large.
    rows = jnp.take(self.embedding, constrain(tokens, "batch_of_data"), axis=0)
    rows = constrain(self.scale_inputs(rows), "batch_of_data", *(None,) * (tokens.ndim - 1), "embed")
    return constrain(rows, "batch")

  def scale_inputs(self, rows: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Rows of any input table (pauses have one of their own) as the layers take them: scaled and cast."""
    dtype = jnp.dtype(self.config.dtype)
    rows = rows.astype(dtype)
    if self.config.scale_embeddings:
      # Gemma rounds the factor to the dtype of activations, and was trained so.
      rows *= jnp.asarray(math.sqrt(self.config.d_model) * _SCALES.get(self.config.initializer, 1.0), dtype)
    return rows

  def __call__(
    self,
    inputs: Float[Array, "B S D"],
    positions: Int[Array, "#B S"],
    *,
    mask: Bool[Array, "#B 1 S S"] | attention.SegmentMask | attention.HiddenSlots | None = None,
    query_key_offset: Float[Array, "S D"] | Float[Array, "B S D"] | None = None,
  ) -> Float[Array, "B S D"]:
    """All layers and the final norm.

    Args:
      inputs: [B, S, D], embedded (and scaled) already; cast to the dtype of activations.
      positions: i32[B or 1, S], what RoPE turns by; pauses repeat their token's position.
      mask: None is causal in the order of S; otherwise boolean [B or 1, 1, S, S], True where the query (third
        axis) may see the key (fourth), causality included; or `SegmentMask` or `HiddenSlots`, told by their structure.
      query_key_offset: [S, D] or [B, S, D], added to the normed input of the query and key projections, not
        of the value's, in every layer: q = W_q (z + v), k = W_k (z + v).

    Returns:
      [B, S, D] in the dtype of activations.

    Raises:
      InputError: the config asks for cuDNN's or splash attention where it cannot run.
    """
    hidden, _ = self.run_layers(inputs, positions, mask=mask, query_key_offset=query_key_offset)
    return self.finish(hidden)

  def extend(
    self,
    inputs: Float[Array, "B Q D"],
    positions: Int[Array, "B Q"],
    cache: Cache,
    start: Int[Array, "B"] | None,
    *,
    first: Int[Array, "B"] | None = None,
    query_key_offset: Float[Array, "Q D"] | Float[Array, "B Q D"] | None = None,
  ) -> tuple[Float[Array, "B Q D"], Cache]:
    """Runs some more slots of every row behind those that the cache holds; causal.

    Args:
      inputs: [B, Q, D], as in `__call__`.
      positions: i32[B, Q], what RoPE turns by.
      cache: see there; meant to be donated.
      start: i32[B], the place of each row's first new slot; the places before it are seen. None: all rows start empty,
        and the new slots see each other alone.
      first: i32[B], places before it aren't seen; None: all are.
      query_key_offset: as in `__call__`.

    Returns:
      [B, Q, D], and the cache with the new slots in it.
    """
    hidden, cache = self.extend_layers(inputs, positions, cache, start, first=first, query_key_offset=query_key_offset)
    return self.finish(hidden), cache

  def extend_layers(
    self,
    hidden: Float[Array, "B Q D"],
    positions: Int[Array, "B Q"],
    cache: Cache,
    start: Int[Array, "B"] | None,
    *,
    first: Int[Array, "B"] | None = None,
    query_key_offset: Float[Array, "Q D"] | Float[Array, "B Q D"] | None = None,
    key_weights: attention.KeyWeights | None = None,
  ) -> tuple[Float[Array, "B Q D"], Cache]:
    """`extend` without the final norm; `key_weights`: of all C places, or where `start` is None of the Q new slots."""
    count, capacity = hidden.shape[1], cache.capacity
    if count > capacity:
      raise ValueError(f"cache: {capacity} places, but {count} slots are to be written")
    mask = None if start is None else seen_places(start, count, capacity, first)
    return self.run_layers(
      hidden,
      positions,
      mask=mask,
      query_key_offset=query_key_offset,
      cache=cache,
      start=start,
      key_weights=key_weights,
    )

  def run_layers(
    self,
    hidden: Float[Array, "B S D"],
    positions: Int[Array, "#B S"] | Float[Array, "#B S"],
    *,
    layers: tuple[int, int] | None = None,
    mask: Bool[Array, "#B 1 S C"] | attention.SegmentMask | attention.HiddenSlots | None = None,
    query_key_offset: Float[Array, "S D"] | Float[Array, "B S D"] | None = None,
    cache: Cache | None = None,
    start: Int[Array, "B"] | None = None,
    key_weights: attention.KeyWeights | None = None,
    update_scale: Float[Array, "B S"] | None = None,
  ) -> tuple[Float[Array, "B S D"], Cache | None]:
    """Some of the layers, without the final norm; for methods that look in between, or run them again.

    Args:
      hidden: [B, S, D], of the residual stream; cast to the dtype of activations.
      positions: [B or 1, S], what RoPE turns by; may lie between whole numbers.
      layers: from which layer, and before which one it ends; None: all. With `scan_layers` all is what there is.
      mask, query_key_offset: as in `__call__`.
      cache, start: as in `extend`; the cache holds just these layers.
      key_weights: how much keys count in attention, in all these layers.
      update_scale: [B, S], what both updates of the residual stream are multiplied by; None: 1.

    Returns:
      [B, S, D], and the cache with the new slots in it, where one was given.

    Raises:
      InputError: some of the layers were asked for where they are scanned over.
    """
    config = self.config
    dtype = jnp.dtype(config.dtype)
    hidden = constrain(hidden.astype(dtype), "batch", None, None)
    if query_key_offset is not None:
      query_key_offset = query_key_offset.astype(dtype)
    if update_scale is not None:
      update_scale = update_scale.astype(dtype)[..., None]
    first, last = layers or (0, config.num_layers)
    # Once for all layers.
    turn = attention.rotation(positions, config.rotated_size, config.rope_base)
    layered = None if cache is None else (cache.keys, cache.values)
    if config.scan_layers:
      if (first, last) != (0, config.num_layers):
        raise InputError("decoder.scan_layers: True, but this method runs layers one by one; set it to False")
      hidden, layered = self.layers(hidden, turn, mask, query_key_offset, layered, start, (key_weights, update_scale))
    else:
      cached = []
      for number, layer in enumerate(self.layers[first:last]):
        before = None if cache is None else (cache.keys[number], cache.values[number])
        hidden, after = layer(hidden, turn, mask, query_key_offset, before, start, (key_weights, update_scale))
        cached.append(after)
      layered = None if cache is None else tuple(zip(*cached))
    return hidden, None if cache is None else Cache(*layered)

  def finish(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """The final norm, behind the last layer."""
    return self.final_norm(hidden)

  def unembedding(self) -> Float[Array, "V D"]:
    """The output table, in the dtype of parameters: the embedding table itself where they are tied."""
    return self.embedding if self.config.tied_embeddings else self.output_embedding

  def initialize(self) -> None:
    """Touches every parameter; for `init_params`."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    self(self.embed(tokens), tokens)


def init_params(decoder: Decoder, rng: Array) -> PyTree:
  """Fresh parameters, all of them in one call.

  - 'normal': every matrix and both tables normal of standard deviation 0.02, divided by sqrt(2 L) for the
    projections that write to the residual stream (attention out, mlp down). GPT-2: Radford et al. 2019,
    https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf,
    section 2.3, and https://github.com/openai/gpt-2/blob/master/src/model.py
  - 'scaled': every matrix truncated normal of standard deviation 1/sqrt(fan in); the output table 1/sqrt(D),
    so that logits start at about 1; an untied embedding so that inputs start at 1, scale_embeddings or not. A
    tied table has the output's deviation (and inputs start at 1 where scale_embeddings is set). Fan-in
    scaling and unit inputs are PaLM's: Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, section 5.
  - 'small': every matrix and both tables truncated normal of standard deviation sqrt(2/(5 D)), divided by sqrt(2 L)
    for the projections that write to the residual stream. Nguyen and Salazar 2019, https://arxiv.org/abs/1910.05895;
    what PonderLM-2 starts from, https://arxiv.org/abs/2509.23184

  Norm scales start at one (zero for 'rmsnorm_plus_one'), biases at zero. Adapters' `lora_a` are normal of standard
  deviation 1/sqrt(fan in), their `lora_b` zero.

  Args:
    decoder: the module.
    rng: a jax.random key.

  Returns:
    The tree `params`, leaves boxed as nn.LogicallyPartitioned, the logical axes being 'vocab', 'embed',
    'heads', 'kv_heads', 'head_size', 'mlp', 'layers', 'norm', 'rank'. `nn.unbox` gives bare arrays.
  """
  # Parameters do not depend on how attention is computed, and shapes must be had where cuDNN is not.
  config = dataclasses.replace(decoder.config, attention="xla")
  return Decoder(config).init(rng, method="initialize")["params"]


class _Layer(nn.Module):
  """One transformer block. Returns a pair, as nn.scan wants: hidden states, and this layer's part of the cache."""

  config: DecoderConfig

  def setup(self):
    self.attention_norm = _Norm(self.config)
    self.attention = _Attention(self.config)
    self.mlp_norm = _Norm(self.config)
    self.mlp = _Mlp(self.config)

  def __call__(self, hidden, turn, mask, query_key_offset, cached, start, weighting):
    key_weights, scale = weighting

    def updated(hidden, by):
      return hidden + constrain(by if scale is None else by * scale, "batch", None, None)

    attended, cached = self.attention(
      self.attention_norm(hidden), turn, mask, query_key_offset, cached, start, key_weights
    )
    if self.config.parallel_residual:
      return updated(hidden, attended + self.mlp(self.mlp_norm(hidden))), cached
    hidden = updated(hidden, attended)
    return updated(hidden, self.mlp(self.mlp_norm(hidden))), cached


class _Attention(nn.Module):
  config: DecoderConfig

  def setup(self):
    config = self.config
    model, heads = (config.d_model,), (config.num_heads, config.head_size)
    kv_heads = (config.num_kv_heads, config.head_size)
    read = functools.partial(
      _Projection,
      config,
      model,
      kernel_init=_matrix_init(config, 1),
      use_bias=config.attention_bias != "none",
    )
    self.query = read(heads, axes=("embed", "heads", "head_size"))
    self.key = read(kv_heads, axes=("embed", "kv_heads", "head_size"))
    self.value = read(kv_heads, axes=("embed", "kv_heads", "head_size"))
    self.out = _Projection(
      config,
      heads,
      model,
      axes=("heads", "head_size", "embed"),
      kernel_init=_matrix_init(config, 2, writes_residual=True),
      use_bias=config.attention_bias == "all",
    )

  def __call__(self, normed, turn, mask, query_key_offset, cached, start, key_weights):
    shifted = normed if query_key_offset is None else normed + query_key_offset
    query = constrain(attention.rotate(self.query(shifted), *turn), "batch", None, "heads", None)
    key = constrain(attention.rotate(self.key(shifted), *turn), "batch", None, "kv_heads", None)
    value = constrain(self.value(normed), "batch", None, "kv_heads", None)
    if cached is None:
      attended = attention.attend(query, key, value, mask, self.config.attention, weights=key_weights)
      return self.out(attended), None
    if start is None:
      place = jnp.zeros(len(key), jnp.int32)
      cached = write(cached[0], key, place), write(cached[1], value, place)
      attended = attention.attend(query, key, value, None, self.config.attention, weights=key_weights)
      return self.out(attended), cached
    cached = write(cached[0], key, start), write(cached[1], value, start)
    # A few queries against all places, most of them masked: no kernel but XLA's takes that.
    return self.out(attention.attend(query, *cached, mask, "xla", weights=key_weights)), cached


class _Mlp(nn.Module):
  config: DecoderConfig

  def setup(self):
    config = self.config
    model, inner = (config.d_model,), (config.mlp_size,)
    read = functools.partial(
      _Projection,
      config,
      model,
      inner,
      axes=("embed", "mlp"),
      kernel_init=_matrix_init(config, 1),
      use_bias=config.mlp_bias,
    )
    if config.gated_mlp:
      self.gate = read()
    self.up = read()
    self.down = _Projection(
      config,
      inner,
      model,
      axes=("mlp", "embed"),
      kernel_init=_matrix_init(config, 1, writes_residual=True),
      use_bias=config.mlp_bias,
    )

  def __call__(self, normed):
    activation = _ACTIVATIONS[self.config.activation]
    if self.config.gated_mlp:
      inner = activation(self.gate(normed)) * self.up(normed)
    else:
      inner = activation(self.up(normed))
    return self.down(constrain(inner, "batch", None, "mlp"))


class _Projection(nn.Module):
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
    y = jnp.tensordot(x, kernel.astype(dtype), axes=len(self.inputs))
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


class _Norm(nn.Module):
  """RMSNorm, https://arxiv.org/abs/1910.07467, or LayerNorm, https://arxiv.org/abs/1607.06450; in float32."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x):
    config = self.config
    param_dtype = jnp.dtype(config.param_dtype)
    # Gemma's checkpoints store the scale less one.
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


def _matrix_init(config: DecoderConfig, num_inputs: int, *, writes_residual: bool = False) -> Callable:
  """For a kernel whose first `num_inputs` axes are contracted; the rules are in init_params."""
  if config.initializer == "normal":
    std = 0.02 / math.sqrt(2 * config.num_layers) if writes_residual else 0.02
    return nn.initializers.normal(std)
  if config.initializer == "small":
    std = math.sqrt(0.4 / config.d_model)
    return _truncated_normal(std / math.sqrt(2 * config.num_layers) if writes_residual else std)

  def init(rng, shape, dtype):
    return _truncated_normal(1 / math.sqrt(math.prod(shape[:num_inputs])))(rng, shape, dtype)

  return init


def embedding_init(config: DecoderConfig) -> Callable:
  """The initialiser of input rows; the rules are in init_params."""
  if config.tied_embeddings or config.initializer != "scaled":
    return unembedding_init(config)
  return _truncated_normal(1 / math.sqrt(config.d_model) if config.scale_embeddings else 1.0)


def unembedding_init(config: DecoderConfig) -> Callable:
  """The initialiser of output rows; the rules are in init_params."""
  if config.initializer == "normal":
    return nn.initializers.normal(0.02)
  return _truncated_normal(math.sqrt((0.4 if config.initializer == "small" else 1) / config.d_model))


def _truncated_normal(std: float) -> Callable:
  # Cutting a standard normal at two deviations leaves a deviation of 0.8796; `std` is to be what comes out.
  return nn.initializers.truncated_normal(std / 0.87962566103423978)
