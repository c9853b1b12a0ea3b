"""The decoder that the fields of config.json describe, for each family of transformers.

Every function reads the fields that change the computation of its family, and refuses unsupported values by name.
"""

from __future__ import annotations

from typing import Any

from cyb_jax.decoder import DecoderConfig
from cyb_jax.errors import InputError
from cyb_jax.interop import layer_types, rope_json
from cyb_jax.interop.rope_json import Rope
from cyb_jax.interop.tensors import Fields

_ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
}
_LAYERNORM = {"norm": "layernorm", "gated_mlp": False, "mlp_bias": True}


def llama(fields: Fields) -> DecoderConfig:
  """Llama 1 to 3, SmolLM 1 and 2."""
  fields.demand("rope_interleaved", (None, False))
  return _llama_style(fields, **_biases(fields))


def mistral(fields: Fields) -> DecoderConfig:
  """Mistral, with or without its window."""
  # In transformers a missing field means 4096, and null means no window.
  window = fields.count("sliding_window") if "sliding_window" in fields else 4096
  return _llama_style(fields, kv_heads=8, window=window)


def qwen2(fields: Fields) -> DecoderConfig:
  """Qwen2 and Qwen2.5."""
  fields.demand("use_mrope", (None, False))
  return _llama_style(fields, kv_heads=32, attention_bias="qkv", **_qwen_window(fields))


def qwen3(fields: Fields) -> DecoderConfig:
  """Qwen3 without experts."""
  return _llama_style(
    fields, kv_heads=32, head_size=128, query_key_norm="head", **_biases(fields, mlp=False), **_qwen_window(fields)
  )


def _qwen_window(fields: Fields) -> dict[str, Any]:
  """The window of layers from `max_window_layers` on."""
  window = fields.take("sliding_window", int, 4096)
  first, layers = fields.take("max_window_layers", int, 28), fields.layers("num_hidden_layers")
  used = fields.take("use_sliding_window", bool, False)
  are_global = layer_types.read(fields, layers, [not used or number < first for number in range(layers)])
  if all(are_global):
    return {}
  if not used:
    raise InputError(f"{fields.where}: layer_types has 'sliding_attention', but use_sliding_window is not true")
  return {"window": window, "global_every": layer_types.period(fields, "layer_types", are_global)}


def gemma(fields: Fields) -> DecoderConfig:
  """Gemma 1."""
  for cap in ("final_logit_softcapping", "attn_logit_softcapping"):  # fields of Gemma 2
    fields.demand(cap, (None,))
  return _llama_style(fields, kv_heads=16, **_gemma_style(fields))


def gemma2(fields: Fields) -> DecoderConfig:
  """Gemma 2."""
  return _llama_style(
    fields,
    kv_heads=4,
    norm_placement="both",
    query_scalar=_query_scalar(fields),
    attention_soft_cap=_cap(fields, "attn_logit_softcapping", 50.0),
    soft_cap=_cap(fields, "final_logit_softcapping", 30.0),
    **_gemma_style(fields),
    **_gemma_window(fields, 2),
  )


def gemma3(fields: Fields) -> DecoderConfig:
  """The text model of Gemma 3."""
  # transformers ignores a cap of the scores in this family.
  fields.demand("attn_logit_softcapping", (None,))
  window = _gemma_window(fields, 6)
  rope, local = rope_json.read_by_layer(fields, 1_000_000.0, 10_000.0)
  if window and "global_every" not in window:
    rope = local  # all layers are local
  local_base = local.base if "global_every" in window and local != rope else None
  return _llama_style(
    fields,
    kv_heads=4,
    norm_placement="both",
    query_key_norm="head",
    query_scalar=_query_scalar(fields),
    soft_cap=_cap(fields, "final_logit_softcapping", None),
    rope=rope,
    local_rope_base=local_base,
    **_gemma_style(fields),
    **window,
  )


def _gemma_style(fields: Fields) -> dict[str, Any]:
  fields.demand("hidden_activation", (None, "gelu_pytorch_tanh"))
  # In Gemma's older field, hidden_act, 'gelu' has always meant the tanh form.
  fields.demand("hidden_act", ("gelu", "gelu_pytorch_tanh"), "gelu_pytorch_tanh")
  fields.demand("use_bidirectional_attention", (None, False))
  style = dict(norm="rmsnorm_plus_one", activation="gelu_tanh", scale_embeddings=True, tied=True, head_size=256)
  return style | _biases(fields, mlp=False)


def _gemma_window(fields: Fields, every: int) -> dict[str, Any]:
  """The window of local layers; every `every`-th layer is global, unless the fields say otherwise."""
  layers = fields.layers("num_hidden_layers")
  every = fields.count("_sliding_window_pattern", fields.count("sliding_window_pattern", every))
  are_global = layer_types.read(fields, layers, [(number + 1) % every == 0 for number in range(layers)])
  window = fields.count("sliding_window") if "sliding_window" in fields else 4096
  if all(are_global):
    return {}
  if window is None:
    raise InputError(f"{fields.where}: sliding_window = None must be a number of tokens in this family")
  period = layer_types.period(fields, "layer_types", are_global, every)
  return {"window": window} | ({} if period is None else {"global_every": period})


def _query_scalar(fields: Fields) -> float | None:
  scalar = fields.take("query_pre_attn_scalar", float, 256.0)
  return None if scalar == fields.take("head_dim", int, 256) else scalar


def _cap(fields: Fields, name: str, default: float | None) -> float | None:
  """A bound; null means that there is none."""
  return fields.take(name, float, None) if name in fields else default


def olmo2(fields: Fields) -> DecoderConfig:
  """OLMo 2."""
  return _llama_style(fields, epsilon=1e-5, norm_placement="after", query_key_norm="all", **_biases(fields, mlp=False))


def smollm3(fields: Fields) -> DecoderConfig:
  """SmolLM3."""
  fields.demand("use_sliding_window", (None, False))
  fields.take("sliding_window", int, None)
  layers = fields.layers("num_hidden_layers")
  if not all(layer_types.read(fields, layers, [True] * layers)):
    raise InputError(f"{fields.where}: layer_types has 'sliding_attention', but use_sliding_window is not true")
  every = fields.count("no_rope_layer_interval", 4)
  have_rope = fields.take("no_rope_layers", list, [int((number + 1) % every != 0) for number in range(layers)])
  if len(have_rope) < layers or any(rope not in (0, 1) for rope in have_rope):
    raise InputError(f"{fields.where}: no_rope_layers = {have_rope!r} must have 0 or 1 for each of the {layers} layers")
  period = layer_types.period(fields, "no_rope_layers", [not rope for rope in have_rope[:layers]], every)
  style = {} if period is None else {"global_every": period, "global_rope": False}
  rope = rope_json.read(fields, base=2_000_000.0)
  return _llama_style(fields, kv_heads=4, tied=True, rope=rope, **style, **_biases(fields))


def _biases(fields: Fields, *, mlp: bool = True) -> dict[str, Any]:
  found: dict[str, Any] = {"attention_bias": "all" if fields.take("attention_bias", bool, False) else "none"}
  return found | ({"mlp_bias": fields.take("mlp_bias", bool, False)} if mlp else {})


def _llama_style(
  fields: Fields,
  *,
  kv_heads: int | None = None,
  tied: bool = False,
  head_size: int | None = None,
  epsilon: float = 1e-6,
  rope: Rope | None = None,
  **style: Any,
) -> DecoderConfig:
  """A model with Llama's fields.

  Args:
    fields: the fields of config.json.
    kv_heads, tied, head_size, epsilon: the family's values of missing fields.
    rope: RoPE; None: from the fields.
    **style: fields of DecoderConfig.
  """
  width, heads = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
  rope = rope_json.read(fields) if rope is None else rope
  if rope.fraction != 1:
    raise InputError(f"{fields.where}: partial_rotary_factor = {rope.fraction} must be 1 in this family")
  if "activation" not in style:
    style["activation"] = _activation(fields, "hidden_act", "silu")
  return _config(
    fields,
    vocab_size=fields.take("vocab_size", int),
    num_layers=fields.layers("num_hidden_layers"),
    d_model=width,
    num_heads=heads,
    num_kv_heads=fields.take("num_key_value_heads", int, kv_heads or heads),
    head_size=fields.take("head_dim", int, head_size or width // max(1, heads)),
    mlp_size=fields.take("intermediate_size", int),
    norm_epsilon=fields.take("rms_norm_eps", float, epsilon),
    rope_base=rope.base,
    rope_scaling=rope.scaling,
    tied_embeddings=fields.take("tie_word_embeddings", bool, tied),
    **style,
  )


def gpt_neox(fields: Fields) -> DecoderConfig:
  """GPT-NeoX and Pythia."""
  sizes = _equal_heads(fields, "hidden_size", "num_attention_heads")
  rope = rope_json.read(fields, "rotary_emb_base", "rotary_pct", 0.25)
  if not 0 <= rope.fraction <= 1:
    raise InputError(f"{fields.where}: rotary_pct = {rope.fraction} must be from 0 to 1; fetch the file again")
  return _config(
    fields,
    **sizes,
    **_LAYERNORM,
    num_layers=fields.layers("num_hidden_layers"),
    mlp_size=fields.take("intermediate_size", int),
    norm_epsilon=fields.take("layer_norm_eps", float, 1e-5),
    activation=_activation(fields, "hidden_act", "gelu"),
    attention_bias="all" if fields.take("attention_bias", bool, True) else "none",
    parallel_residual=fields.take("use_parallel_residual", bool, True),
    rope_base=rope.base,
    rope_fraction=int(sizes["head_size"] * rope.fraction) / sizes["head_size"],
    rope_scaling=rope.scaling,
    tied_embeddings=fields.take("tie_word_embeddings", bool, False),
  )


def gpt2(fields: Fields) -> DecoderConfig:
  """GPT-2."""
  sizes = _equal_heads(fields, "n_embd", "n_head")
  fields.demand("scale_attn_weights", (True,), True)
  fields.demand("scale_attn_by_inverse_layer_idx", (False,), False)
  fields.demand("n_ctx", (None, fields.take("n_positions", int, 1024)))  # an older name of the same number
  return _config(
    fields,
    **sizes,
    **_LAYERNORM,
    num_layers=fields.layers("n_layer"),
    mlp_size=fields.take("n_inner", int, 4 * sizes["d_model"]),
    norm_epsilon=fields.take("layer_norm_epsilon", float, 1e-5),
    activation=_activation(fields, "activation_function", "gelu_new"),
    attention_bias="all",
    learned_positions=fields.take("n_positions", int, 1024),
    tied_embeddings=fields.take("tie_word_embeddings", bool, True),
  )


def _equal_heads(fields: Fields, width_name: str, heads_name: str) -> dict[str, int]:
  """The sizes of the vocabulary, the width and the heads, in families where the heads divide the width."""
  width, heads = fields.take(width_name, int), fields.take(heads_name, int)
  if heads < 1 or width % heads:
    raise InputError(f"{fields.where}: {width_name} = {width} must be a multiple of {heads_name} = {heads}")
  return {
    "vocab_size": fields.take("vocab_size", int),
    "d_model": width,
    "num_heads": heads,
    "num_kv_heads": heads,
    "head_size": width // heads,
  }


def _config(fields: Fields, **values: Any) -> DecoderConfig:
  try:
    return DecoderConfig(**values)
  except InputError as error:
    raise InputError(f"{fields.where}: {error}") from None


def _activation(fields: Fields, name: str, default: str) -> str:
  given = fields.take(name, str, default)
  if given not in _ACTIVATIONS:
    raise InputError(f"{fields.where}: {name} = {given!r} is not one of {', '.join(map(repr, _ACTIVATIONS))}")
  return _ACTIVATIONS[given]
