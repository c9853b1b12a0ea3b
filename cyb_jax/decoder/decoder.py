"""A decoder-only transformer; each supported model family is one of its configurations.

The decoder knows nothing about pauses. The caller passes embedded inputs, their positions and, unless attention is
plainly causal, a mask. The decoder returns hidden states, which the caller reads out.

Letters: B batch, T tokens, W slots, S = T*W flattened, Q new slots of a row, C cache entries, D model, V vocabulary,
N heads, G kv heads, H head size, L layers, F mlp.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from cyb_jax.decoder.attention import KeyWeights, Mask
from cyb_jax.decoder.blocked_attention import KERNEL_RESULTS
from cyb_jax.decoder.cache import Cache, cache_mask
from cyb_jax.decoder.config import DecoderConfig
from cyb_jax.decoder.initializers import embedding_init, unembedding_init
from cyb_jax.decoder.layers import Layer, LayerContext, Norm, Rope
from cyb_jax.decoder.rope import rope_factors
from cyb_jax.errors import InputError
from cyb_jax.partitioning.rules import constrain


def _is_kept(primitive: Any, *inputs: Any, **params: Any) -> bool:
  """Whether `remat` 'dots' keeps a result for the backward pass: a policy of jax.checkpoint.

  The only product that contracts two axes, heads and head size, is that of attention's output. A kernel's result is
  kept in its place: it has the same size, and is far more expensive to compute again.
  """
  if jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **params):
    (contracted, _), _ = params["dimension_numbers"]
    return len(contracted) == 1
  return jax.checkpoint_policies.save_only_these_names(KERNEL_RESULTS)(primitive, *inputs, **params)


_REMAT_POLICIES = {"full": None, "dots": _is_kept}
# Factors of scaled inputs in addition to sqrt(D), so that these inputs start at a deviation of 1.
_SCALES = {"small": math.sqrt(2.5)}


class Decoder(nn.Module):
  """Embedded inputs -> hidden states. Methods are called as `decoder.apply(variables, ..., method='embed')`.

  Parameters come from `init_params`: `embedding` [V, D]; `unembedding` [V, D] unless tied; `layers_0`, `layers_1`,
  ... or, with scan_layers, `layers` with a leading axis L; `final_norm`; with learned positions `position_embedding`
  [P, D]. A layer has `attention` (`query` [D, N, H], `key` and `value` [D, G, H], `out` [N, H, D]; with norms of
  queries and keys `query_norm` and `key_norm`, [H], or [N, H] and [G, H]), `mlp` (`gate` and `up` [D, F], `down` [F,
  D]), and, by `norm_placement`, `attention_norm` and `mlp_norm`, `attention_post_norm` and `mlp_post_norm`, or all
  four. A matrix is a `kernel`, with a `bias` where configured. A matrix with an adapter of rank r also has `lora_a`
  f32[inputs..., r] and `lora_b` f32[r, outputs...].

  Attributes:
    config: the shape and style.
  """

  config: DecoderConfig

  def setup(self):
    config = self.config
    table = (config.vocab_size, config.d_model)
    self.embedding = self.param(
      "embedding",
      nn.with_logical_partitioning(embedding_init(config), ("vocab", "embed")),
      table,
      jnp.dtype(config.table_dtype),
    )
    if not config.tied_embeddings:
      self.output_embedding = self.param(
        "unembedding",
        nn.with_logical_partitioning(unembedding_init(config), ("vocab", "embed")),
        table,
        jnp.dtype(config.table_dtype),
      )
    if config.learned_positions is not None:
      self.position_embedding = self.param(
        "position_embedding",
        nn.with_logical_partitioning(embedding_init(config), ("positions", "embed")),
        (config.learned_positions, config.d_model),
        jnp.dtype(config.table_dtype),
      )
    layer = Layer
    if config.remat != "none":
      # In a scan XLA cannot merge the recomputation with the original, so the barrier against merging only costs time.
      layer = nn.remat(layer, policy=_REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers)
    if config.scan_layers:
      scanned = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, 0, nn.broadcast),  # the cache and the kinds have an axis of layers; the context is shared
        length=config.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      self.layers = scanned(config, None if config.global_every else config.is_global(0))
    else:
      self.layers = [layer(config, config.is_global(number)) for number in range(config.num_layers)]
    self.final_norm = Norm(config)

  def embed(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Rows of the embedding table, times sqrt(D) with `scale_embeddings`.

    Args:
      tokens: i32[...] in [0, V). An id of V or more gives a row of NaN, not the row of another token.

    Returns:
      [..., D] in the dtype of activations.
    """
    # With fsdp each device looks up all ids in its part of the table's width, and the devices exchange rows. Without
    # the constraints XLA gathers the full table in f32 and reduces a gradient of that size.
    rows = jnp.take(self.embedding, constrain(tokens, "batch_of_data"), axis=0)
    rows = constrain(self.scale_inputs(rows), "batch_of_data", *(None,) * (tokens.ndim - 1), "embed")
    return constrain(rows, "batch")

  def scale_inputs(self, rows: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Scales and casts the rows of an input table (the embedding table, or the pauses' own) for the first layer."""
    dtype = jnp.dtype(self.config.dtype)
    rows = rows.astype(dtype)
    if self.config.scale_embeddings:
      # Gemma was trained with the factor rounded to the dtype of activations.
      rows *= jnp.asarray(math.sqrt(self.config.d_model) * _SCALES.get(self.config.initializer, 1.0), dtype)
    return rows

  def __call__(
    self,
    inputs: Float[Array, "B S D"],
    positions: Int[Array, "#B S"],
    *,
    mask: Mask = None,
    query_key_offset: Float[Array, "S D"] | Float[Array, "B S D"] | None = None,
    slots_per_position: int | None = None,
  ) -> Float[Array, "B S D"]:
    """All layers and the final norm.

    Args:
      inputs: [B, S, D], embedded and scaled; cast to the dtype of activations.
      positions: i32[B or 1, S], the positions; pauses repeat their token's position.
      mask: None is causal attention in the order of S; otherwise boolean [B or 1, 1, S, S], True where the query (third
        axis) may see the key (fourth), causality included, or a structured mask, `SegmentMask` or `HiddenSlots`.
      query_key_offset: [S, D] or [B, S, D], added to the normed input of the query and key projections, not of the
        value projection, in every layer: q = W_q (z + v), k = W_k (z + v).
      slots_per_position: the number of consecutive slots with the same position, if the positions of all rows are
        0, 1, .. in order: kernels need it for a window. None: unknown, then a window needs XLA's attention.

    Returns:
      [B, S, D] in the dtype of activations.

    Raises:
      InputError: the config requests cuDNN's or splash attention where it cannot run.
    """
    hidden, _ = self.run_layers(
      inputs, positions, mask=mask, query_key_offset=query_key_offset, slots_per_position=slots_per_position
    )
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
    """Runs Q new slots of every row after those that the cache holds; causal.

    Args:
      inputs: [B, Q, D], as in `__call__`.
      positions: i32[B, Q], the positions.
      cache: see `Cache`; meant to be donated.
      start: i32[B], the cache index of each row's first new slot; the entries before that index are seen. None: all
        rows are empty, and the new slots see only each other.
      first: i32[B], entries before this index are not seen; None: all are seen.
      query_key_offset: as in `__call__`.

    Returns:
      [B, Q, D], and the cache that also holds the new slots.
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
    key_weights: KeyWeights | None = None,
  ) -> tuple[Float[Array, "B Q D"], Cache]:
    """`extend` without the final norm.

    The arguments and results are the same as in `extend`, except:
      hidden: [B, Q, D], the residual stream.
      key_weights: weights of all C cache entries, or of the Q new slots if `start` is None.

    Raises:
      ValueError: more new slots than the cache has entries.
    """
    count, capacity = hidden.shape[1], cache.capacity
    if count > capacity:
      raise ValueError(f"cache: capacity {capacity} is too small for {count} new slots; it must be at least {count}")
    mask = None if start is None else cache_mask(start, count, capacity, first)
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
    mask: Mask = None,
    query_key_offset: Float[Array, "S D"] | Float[Array, "B S D"] | None = None,
    cache: Cache | None = None,
    start: Int[Array, "B"] | None = None,
    key_weights: KeyWeights | None = None,
    update_scale: Float[Array, "B S"] | None = None,
    slots_per_position: int | None = None,
  ) -> tuple[Float[Array, "B S D"], Cache | None]:
    """Runs some or all layers, without the final norm; for methods that need states in between or repeat layers.

    Learned positions are added before the first layer, so methods that repeat the layers add them in every loop, as
    RoPE rotates in every loop.

    Args:
      hidden: [B, S, D], the residual stream; cast to the dtype of activations.
      positions: [B or 1, S], the positions; with RoPE they may be fractions.
      layers: (first, end), the layers first .. end - 1; None: all. With `scan_layers` only all layers are supported.
      mask, query_key_offset: as in `__call__`.
      cache, start: as in `extend`; the cache holds only these layers.
      key_weights: weights of the keys in attention, in all these layers.
      update_scale: [B, S], a factor of both updates of the residual stream; None: 1.
      slots_per_position: as in `__call__`.

    Returns:
      [B, S, D]; and the cache that also holds the new slots, or None without a cache.

    Raises:
      InputError: a part of the layers is requested with `scan_layers`, or fractions of learned positions.
    """
    config = self.config
    dtype = jnp.dtype(config.dtype)
    hidden = constrain(hidden.astype(dtype), "batch", None, None)
    first, last = layers or (0, config.num_layers)
    if config.learned_positions is not None and first == 0:
      hidden = hidden + self._position_rows(positions).astype(dtype)
    context = LayerContext(
      positions=positions,
      ropes=self._ropes(positions),
      mask=mask,
      query_key_offset=None if query_key_offset is None else query_key_offset.astype(dtype),
      start=start,
      key_weights=key_weights,
      update_scale=None if update_scale is None else update_scale.astype(dtype)[..., None],
      slots_per_position=slots_per_position,
    )
    if config.scan_layers:
      if (first, last) != (0, config.num_layers):
        raise InputError("decoder.scan_layers: True, but this method runs layers one by one; set it to False")
      return self._scan(hidden, cache, context)
    written = []
    for number, layer in enumerate(self.layers[first:last]):
      hidden, cached = layer(hidden, None if cache is None else cache.layer(number), None, context)
      written.append(cached)
    return hidden, None if cache is None else Cache.of_layers(written)

  def _scan(
    self, hidden: Float[Array, "B S D"], cache: Cache | None, context: LayerContext
  ) -> tuple[Float[Array, "B S D"], Cache | None]:
    """All layers, one of which is compiled."""
    config, kinds = self.config, None
    if config.global_every:
      kinds = jnp.asarray([config.is_global(number) for number in range(config.num_layers)])
    cached = None if cache is None else (cache.keys, cache.values, cache.positions)
    hidden, cached = self.layers(hidden, cached, kinds, context)
    return hidden, None if cached is None else Cache(*cached)

  def _position_rows(self, positions: Int[Array, "#B S"]) -> Float[Array, "#B S D"]:
    """Rows of the table of learned positions; a position outside of the table gives a row of NaN."""
    if not jnp.issubdtype(positions.dtype, jnp.integer):
      raise InputError(
        f"decoder.learned_positions: {self.config.learned_positions}, but this method needs fractions of positions,"
        " which only RoPE has; use another decoder"
      )
    return constrain(jnp.take(self.position_embedding, positions, axis=0), None, None, None)

  def _ropes(self, positions: Int[Array, "#B S"] | Float[Array, "#B S"]) -> tuple[Rope | None, Rope | None]:
    """RoPE of global and of local layers."""
    config = self.config
    if config.learned_positions is not None:
      return None, None
    size = config.rotated_size
    everywhere = rope_factors(positions, size, config.rope_base, config.scaling)
    local = everywhere
    if config.local_rope_base is not None:
      local = rope_factors(positions, size, config.local_rope_base)
    if config.global_rope:
      return everywhere, local
    # In a scan the angles of all layers are arrays, and those of an angle of 0 change nothing.
    none = (jnp.ones_like(local[0]), jnp.zeros_like(local[1])) if config.scan_layers else None
    return none, local

  def finish(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """The final norm, to be applied after the last layer."""
    return self.final_norm(hidden)

  def unembedding(self) -> Float[Array, "V D"]:
    """The output table, in the dtype of parameters: the embedding table itself if the two are tied."""
    return self.embedding if self.config.tied_embeddings else self.output_embedding

  def initialize(self) -> None:
    """Uses every parameter; for `init_params`."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    self(self.embed(tokens), tokens)


def init_params(decoder: Decoder, rng: Array) -> PyTree:
  """Initialises all parameters.

  - 'normal': every matrix and both tables normal of standard deviation 0.02, divided by sqrt(2 L) for the
    projections that write to the residual stream (attention out, mlp down). GPT-2: Radford et al. 2019,
    https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf,
    section 2.3, and https://github.com/openai/gpt-2/blob/master/src/model.py
  - 'scaled': every matrix truncated normal of standard deviation 1/sqrt(fan in); the output table of deviation
    1/sqrt(D), so that logits start at about 1; an untied embedding so that inputs start at 1, with and without
    scale_embeddings. A tied table has the deviation of the output table (and inputs start at 1 with scale_embeddings).
    Fan-in scaling and unit inputs follow PaLM: Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, section 5.
  - 'small': every matrix and both tables truncated normal of standard deviation sqrt(2/(5 D)), divided by sqrt(2 L)
    for the projections that write to the residual stream. Nguyen and Salazar 2019, https://arxiv.org/abs/1910.05895;
    PonderLM-2 uses this initialiser, https://arxiv.org/abs/2509.23184

  Norm scales start at one (zero for 'rmsnorm_plus_one'), biases at zero. Adapters' `lora_a` are normal of standard
  deviation 1/sqrt(fan in), their `lora_b` zero.

  Args:
    decoder: the module.
    rng: a jax.random key.

  Returns:
    The tree `params`, leaves boxed as nn.LogicallyPartitioned, the logical axes being 'vocab', 'embed',
    'heads', 'kv_heads', 'head_size', 'mlp', 'layers', 'norm', 'rank'. `nn.unbox` gives bare arrays.
  """
  # Parameters do not depend on the implementation of attention, and shapes are also needed where cuDNN cannot run.
  config = dataclasses.replace(decoder.config, attention="xla")
  return Decoder(config).init(rng, method="initialize")["params"]
