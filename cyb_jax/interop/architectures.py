"""The architectures of transformers: their fields of config.json, and their tables of tensors; see `readers`."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cyb_jax.decoder import DecoderConfig
from cyb_jax.interop import families, layer_types, readers, rope_json
from cyb_jax.interop.families import Tensor
from cyb_jax.interop.tensors import Fields

_WRITTEN = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
  """The config and the tensors of an architecture.

  Attributes:
    architecture: its name in config.json.
    model_type: its type in config.json.
    read: the fields of config.json -> our config.
    write: our config -> the family's own fields of config.json.
    demands: the values that the family can express, by field of our config; fields of `_STYLE` that are not listed have
      the values there.
    table: our config -> the table of tensors.
    objections: our config -> what else the family can't express.
    names: the family's names of fields that other families have under another name.
    prefix: the start of all names of tensors but the output table's, which files of the model without that table lack.
  """

  architecture: str
  model_type: str
  read: Callable[[Fields], DecoderConfig]
  write: Callable[[DecoderConfig], dict[str, Any]]
  demands: Mapping[str, Sequence[Any] | Callable[[Any], bool]]
  table: Callable[[DecoderConfig], list[Tensor]]
  objections: Callable[[DecoderConfig], list[str]] = lambda config: []
  names: Mapping[str, str] = dataclasses.field(default_factory=dict)
  prefix: str = ""


# The style that a family can express unless its `demands` list other values.
_STYLE: Mapping[str, Sequence[Any]] = types.MappingProxyType({
  "norm": ("rmsnorm",), "norm_placement": ("before",), "gated_mlp": (True,), "parallel_residual": (False,),
  "query_key_norm": ("none",), "query_scalar": (None,), "attention_soft_cap": (None,), "rope_fraction": (1.0,),
  "learned_positions": (None,), "window": (None,), "global_every": (None,), "global_rope": (True,),
  "local_rope_base": (None,), "scale_embeddings": (False,), "soft_cap": (None,),
})  # fmt: skip


def objections(family: Family, config: DecoderConfig) -> list[str]:
  """What a family can't express of a config; empty if it can express all of it."""
  found = []
  for field, accepted in (_STYLE | family.demands).items():
    value = getattr(config, field)
    if callable(accepted):
      if not accepted(value):
        found.append(f"decoder.{field}, not {value!r}")
    elif value not in accepted:
      found.append(f"decoder.{field} = {' or '.join(map(repr, accepted))}, not {value!r}")
  return found + family.objections(config)


# Writing.


def _write_llama_style(config: DecoderConfig) -> dict[str, Any]:
  return {
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_size,
    "rms_norm_eps": config.norm_epsilon,
    "hidden_act": _WRITTEN[config.activation],
    "attention_bias": config.attention_bias == "all",
    **rope_json.write(config),
  }


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
  return _write_llama_style(config) | {"mlp_bias": config.mlp_bias}


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
  written = _write_llama_style(config) | {"sliding_window": config.window}
  del written["attention_bias"]
  return written


def _write_qwen2(config: DecoderConfig) -> dict[str, Any]:
  written = _write_qwen3(config)
  del written["attention_bias"]  # always on q, k, v
  return written


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
  are_global = _are_global(config)
  return _write_llama_style(config) | {
    "use_sliding_window": config.window is not None,
    "sliding_window": config.window,
    # Only `layer_types` can say that every n-th layer is global.
    "max_window_layers": 0 if config.window is not None else config.num_layers,
    "layer_types": layer_types.write(are_global),
  }


def _write_gemma(config: DecoderConfig) -> dict[str, Any]:
  return _write_llama_style(config) | {"hidden_activation": _WRITTEN[config.activation]}


def _write_gemma2(config: DecoderConfig) -> dict[str, Any]:
  return _write_gemma(config) | {
    "query_pre_attn_scalar": _whole(config.query_scalar or config.head_size),
    "attn_logit_softcapping": config.attention_soft_cap,
    "final_logit_softcapping": config.soft_cap,
    # All layers are global without a window.
    "sliding_window": 4096 if config.window is None else config.window,
    "layer_types": layer_types.write(_are_global(config)),
  }


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
  return _write_gemma2(config) | {"sliding_window_pattern": config.global_every} | rope_json.write_by_layer(config)


def _write_smollm3(config: DecoderConfig) -> dict[str, Any]:
  return _write_llama(config) | {
    "no_rope_layers": [int(not is_global) for is_global in _are_global(config)],
    "no_rope_layer_interval": config.global_every,
    "use_sliding_window": False,
    "layer_types": layer_types.write([True] * config.num_layers),  # none has a window
  }


def _write_gpt_neox(config: DecoderConfig) -> dict[str, Any]:
  fraction = config.rope_fraction
  written = rope_json.write(config)
  written["rope_parameters"]["partial_rotary_factor"] = fraction
  written["rotary_emb_base"] = written.pop("rope_theta")
  return written | {
    "layer_norm_eps": config.norm_epsilon,
    "hidden_act": _WRITTEN[config.activation],
    "attention_bias": config.attention_bias == "all",
    "use_parallel_residual": config.parallel_residual,
    "rotary_pct": fraction,
  }


def _write_gpt2(config: DecoderConfig) -> dict[str, Any]:
  return {
    "n_positions": config.learned_positions,
    "layer_norm_epsilon": config.norm_epsilon,
    "activation_function": "gelu_new" if config.activation == "gelu_tanh" else _WRITTEN[config.activation],
  }


def _are_global(config: DecoderConfig) -> list[bool]:
  return [config.is_global(number) for number in range(config.num_layers)]


def _whole(value: float) -> float:
  """An int where transformers requires one."""
  return int(value) if value == int(value) else value


# Tables.


def _named(config: DecoderConfig) -> list[Tensor]:
  names = families.HUGGINGFACE if config.norm_placement == "before" else families.HUGGINGFACE_POST_NORMS
  return families.llama_style(config, names)


# What families can't express.


def _uneven_width(config: DecoderConfig) -> list[str]:
  if config.d_model % config.num_heads:
    return [f"decoder.num_heads to divide d_model = {config.d_model}, not {config.num_heads}"]
  return []


def _unequal_heads(config: DecoderConfig) -> list[str]:
  found = _uneven_width(config)
  if config.num_kv_heads != config.num_heads:
    found.append(f"decoder.num_kv_heads = {config.num_heads} (num_heads), not {config.num_kv_heads}")
  if config.head_size * config.num_heads != config.d_model:
    found.append(f"decoder.head_size = d_model / num_heads, not {config.head_size}")
  return found


def _gemma_objections(config: DecoderConfig) -> list[str]:
  scalar = config.query_scalar
  found = _uneven_width(config)
  if scalar is not None and scalar != int(scalar):
    found.append(f"decoder.query_scalar to be a whole number, not {scalar}")
  return found


def _any(value: Any) -> bool:
  return True


_NO_MLP_BIAS = {"mlp_bias": (False,)}
_BIASES = {"attention_bias": ("none", "all")}
_GEMMA = _NO_MLP_BIAS | _BIASES | {
  "norm": ("rmsnorm_plus_one",), "activation": ("gelu_tanh",), "scale_embeddings": (True,),
}  # fmt: skip
_GEMMA_WINDOWS = _GEMMA | {
  "norm_placement": ("both",), "query_scalar": _any, "soft_cap": _any, "window": _any, "global_every": _any,
}  # fmt: skip
_LAYERNORM = {"norm": ("layernorm",), "gated_mlp": (False,), "mlp_bias": (True,)}
# The first family that can express a config writes it.
FAMILIES = (
  Family("LlamaForCausalLM", "llama", readers.llama, _write_llama, _BIASES, _named, _uneven_width),
  Family(
    "Qwen2ForCausalLM", "qwen2", readers.qwen2, _write_qwen2,
    _NO_MLP_BIAS | {"attention_bias": ("qkv",), "window": _any, "global_every": _any}, _named,
  ),
  Family("GemmaForCausalLM", "gemma", readers.gemma, _write_gemma, _GEMMA, _named),
  Family(
    "GPTNeoXForCausalLM", "gpt_neox", readers.gpt_neox, _write_gpt_neox,
    _LAYERNORM | _BIASES | {"parallel_residual": _any, "rope_fraction": _any}, families.gpt_neox, _unequal_heads,
  ),
  Family(
    "MistralForCausalLM", "mistral", readers.mistral, _write_mistral,
    _NO_MLP_BIAS | {"attention_bias": ("none",), "window": _any}, _named,
  ),
  Family(
    "Qwen3ForCausalLM", "qwen3", readers.qwen3, _write_qwen3,
    _NO_MLP_BIAS | _BIASES | {"query_key_norm": ("head",), "window": _any, "global_every": _any}, _named,
  ),
  Family(
    "Gemma2ForCausalLM", "gemma2", readers.gemma2, _write_gemma2, _GEMMA_WINDOWS | {"attention_soft_cap": _any}, _named,
    _gemma_objections,
  ),
  Family(
    "Gemma3ForCausalLM", "gemma3_text", readers.gemma3, _write_gemma3,
    _GEMMA_WINDOWS | {"query_key_norm": ("head",), "local_rope_base": _any}, _named, _gemma_objections,
  ),
  Family(
    "Olmo2ForCausalLM", "olmo2", readers.olmo2, _write_llama_style,
    _NO_MLP_BIAS | _BIASES | {"norm_placement": ("after",), "query_key_norm": ("all",)}, _named,
  ),
  Family(
    "SmolLM3ForCausalLM", "smollm3", readers.smollm3, _write_smollm3,
    _BIASES | {"global_every": _any, "global_rope": (False,)}, _named,
  ),
  Family(
    "GPT2LMHeadModel", "gpt2", readers.gpt2, _write_gpt2,
    _LAYERNORM | {"attention_bias": ("all",), "learned_positions": lambda value: value is not None},
    families.gpt2, _unequal_heads,
    names={"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
           "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"},
    prefix="transformer.",
  ),
)  # fmt: skip
