"""Hugging Face folders: config.json and safetensors, one file or shards. Pickles are never opened.

Fields of config.json that change the function are read; unsupported values and unknown fields are refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cyb_jax.data import tokenizers
from cyb_jax.decoder import DecoderConfig
from cyb_jax.errors import InputError, reading
from cyb_jax.interop import families
from cyb_jax.interop.families import Tensor
from cyb_jax.interop.tensors import Fields, TensorInfo, is_float, package

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# In our exports: the key in config.json, the file of parameters that transformers does not have, and the folder of a
# tokenizer that transformers does not support.
CYB_JAX = "cyb_jax"
OWN = "cyb_jax.safetensors"
TOKENIZER = tokenizers.EXPORTED
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# Fields about training, generation or the program that wrote the file, and fields that are read elsewhere.
HARMLESS = frozenset({
  "_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled",
  "architectures", "model_type", CYB_JAX, "dtype", "torch_dtype", "transformers_version", "transformers.js_config",
  "initializer_range", "max_position_embeddings", "use_cache", "pretraining_tp", "is_llama_config", "unsloth_version",
  "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id",
  "attention_dropout", "hidden_dropout", "classifier_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob",
  "gradient_checkpointing",
  "max_window_layers", "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
  "is_decoder", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "tokenizer_class",
  "finetuning_task", "prefix", "tie_encoder_decoder", "cross_attention_hidden_size", "pruned_heads", "use_bfloat16",
  "torchscript", "tf_legacy_loss", "bad_words_ids", "do_sample", "early_stopping", "max_length", "min_length",
  "num_beams", "num_beam_groups", "num_return_sequences", "temperature", "top_k", "top_p", "typical_p",
  "repetition_penalty", "length_penalty", "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
  "begin_suppress_tokens", "suppress_tokens", "exponential_decay_length_penalty", "forced_bos_token_id",
  "forced_eos_token_id", "remove_invalid_values", "return_dict_in_generate", "output_scores",
})  # fmt: skip

# Buffers that older versions of transformers stored with the weights.
HARMLESS_TENSORS = (r".*\.rotary_emb\.inv_freq", r".*\.attention\.(bias|masked_bias)")

_ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
}
_WRITTEN = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
  """The config and the tensors of an architecture.

  Attributes:
    architecture: its name in config.json.
    model_type: its type in config.json.
    read: the fields of config.json -> our config.
    write: our config -> the family's own fields of config.json.
    demands: the values that the family can express, by field of our config.
    table: our config -> the table of tensors.
    written: whether exports use the family.
  """

  architecture: str
  model_type: str
  read: Callable[[Fields], DecoderConfig]
  write: Callable[[DecoderConfig], dict[str, Any]]
  demands: Mapping[str, Sequence[Any]]
  table: Callable[[DecoderConfig], list[Tensor]]
  written: bool = True


def _llama(fields: Fields, **defaults: Any) -> DecoderConfig:
  bias = fields.take("attention_bias", bool, False)
  fields.demand("rope_interleaved", (None, False))
  return _llama_style(
    fields,
    activation=_activation(fields, "hidden_act", "silu"),
    attention_bias="all" if bias else "none",
    mlp_bias=fields.take("mlp_bias", bool, False),
    **defaults,
  )


def _mistral(fields: Fields) -> DecoderConfig:
  # In transformers a missing field means 4096, and null means no window.
  if "sliding_window" not in fields:
    raise InputError(
      f"{fields.where}: sliding_window is missing, which means 4096; this version only supports null, no window"
    )
  fields.demand("sliding_window", (None,))
  return _llama_style(fields, activation=_activation(fields, "hidden_act", "silu"), kv_heads=8)


def _qwen2(fields: Fields) -> DecoderConfig:
  for name in ("use_sliding_window", "use_mrope"):
    fields.demand(name, (None, False))
  fields.take("sliding_window", int, 0)
  kinds = fields.take("layer_types", list, [])
  if any(kind != "full_attention" for kind in kinds):
    raise InputError(f"{fields.where}: layer_types has {set(kinds)}; this version only supports 'full_attention'")
  return _llama_style(fields, activation=_activation(fields, "hidden_act", "silu"), kv_heads=32, attention_bias="qkv")


def _gemma(fields: Fields) -> DecoderConfig:
  # In Gemma's older field, hidden_act, 'gelu' has always meant the tanh form.
  fields.demand("hidden_activation", (None, "gelu_pytorch_tanh"))
  fields.demand("hidden_act", ("gelu", "gelu_pytorch_tanh"), "gelu_pytorch_tanh")
  fields.demand("use_bidirectional_attention", (None, False))
  for cap in ("final_logit_softcapping", "attn_logit_softcapping"):  # fields of Gemma 2
    fields.demand(cap, (None,))
  bias = fields.take("attention_bias", bool, False)
  return _llama_style(
    fields,
    activation="gelu_tanh",
    norm="rmsnorm_plus_one",
    scale_embeddings=True,
    attention_bias="all" if bias else "none",
    kv_heads=16,
    tied=True,
    head_size=256,
  )


def _llama_style(
  fields: Fields, *, kv_heads: int | None = None, tied: bool = False, head_size: int | None = None, **style: Any
) -> DecoderConfig:
  width, heads = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
  base, fraction = _rope(fields)
  if fraction != 1:
    raise InputError(f"{fields.where}: partial_rotary_factor = {fraction} must be 1 in this family")
  return _config(
    fields,
    vocab_size=fields.take("vocab_size", int),
    num_layers=fields.take("num_hidden_layers", int),
    d_model=width,
    num_heads=heads,
    num_kv_heads=fields.take("num_key_value_heads", int, kv_heads or heads),
    head_size=fields.take("head_dim", int, head_size or width // max(1, heads)),
    mlp_size=fields.take("intermediate_size", int),
    norm_epsilon=fields.take("rms_norm_eps", float, 1e-6),
    rope_base=base,
    tied_embeddings=fields.take("tie_word_embeddings", bool, tied),
    **style,
  )


def _gpt_neox(fields: Fields) -> DecoderConfig:
  width, heads = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
  if heads < 1 or width % heads:
    raise InputError(f"{fields.where}: hidden_size = {width} must be a multiple of num_attention_heads = {heads}")
  size = width // heads
  base, fraction = _rope(fields, "rotary_emb_base", "rotary_pct", 0.25)
  return _config(
    fields,
    vocab_size=fields.take("vocab_size", int),
    num_layers=fields.take("num_hidden_layers", int),
    d_model=width,
    num_heads=heads,
    num_kv_heads=heads,
    head_size=size,
    mlp_size=fields.take("intermediate_size", int),
    norm="layernorm",
    norm_epsilon=fields.take("layer_norm_eps", float, 1e-5),
    activation=_activation(fields, "hidden_act", "gelu"),
    gated_mlp=False,
    attention_bias="all" if fields.take("attention_bias", bool, True) else "none",
    mlp_bias=True,
    parallel_residual=fields.take("use_parallel_residual", bool, True),
    rope_base=base,
    rope_fraction=int(size * fraction) / size,
    tied_embeddings=fields.take("tie_word_embeddings", bool, False),
  )


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


def _rope(
  fields: Fields, base_name: str = "rope_theta", fraction_name: str = "partial_rotary_factor", fraction: float = 1.0
) -> tuple[float, float]:
  """(base, fraction) of RoPE, in the old spelling (separate fields) or the new spelling (`rope_parameters`)."""
  base = fields.take(base_name, float, 10_000.0)
  fraction = fields.take(fraction_name, float, fraction)
  if base_name != "rope_theta":  # the files of this family have either name
    base = fields.take("rope_theta", float, base)
  for name in ("rope_parameters", "rope_scaling"):  # the latter takes precedence, as in transformers
    given = {f"{name}.{key}": value for key, value in fields.take(name, dict, {}).items()}
    inner = Fields(fields.where, given, f"{name}.")
    for kind in ("rope_type", "type"):
      inner.demand(kind, ("default",), "default")
    base, fraction = inner.take("rope_theta", float, base), inner.take("partial_rotary_factor", float, fraction)
    inner.finish()
  return base, fraction


def _write_llama_style(config: DecoderConfig) -> dict[str, Any]:
  return {
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_size,
    "rms_norm_eps": config.norm_epsilon,
    "hidden_act": _WRITTEN[config.activation],
    "attention_bias": config.attention_bias == "all",
    "rope_theta": config.rope_base,
    "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
  }


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
  return _write_llama_style(config) | {"mlp_bias": config.mlp_bias}


def _write_qwen2(config: DecoderConfig) -> dict[str, Any]:
  written = _write_llama_style(config) | {"use_sliding_window": False, "sliding_window": None}
  del written["attention_bias"]  # always on q, k, v
  return written


def _write_gemma(config: DecoderConfig) -> dict[str, Any]:
  return _write_llama_style(config) | {"hidden_activation": _WRITTEN[config.activation]}


def _write_gpt_neox(config: DecoderConfig) -> dict[str, Any]:
  base, fraction = config.rope_base, config.rope_fraction
  return {
    "layer_norm_eps": config.norm_epsilon,
    "hidden_act": _WRITTEN[config.activation],
    "attention_bias": config.attention_bias == "all",
    "use_parallel_residual": config.parallel_residual,
    "rotary_emb_base": base,
    "rotary_pct": fraction,
    "rope_parameters": {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": fraction},
  }


def _named(config: DecoderConfig) -> list[Tensor]:
  return families.llama_style(config, families.HUGGINGFACE)


_RMS_DEMANDS = {
  "norm": ("rmsnorm",), "gated_mlp": (True,), "parallel_residual": (False,), "rope_fraction": (1.0,),
  "scale_embeddings": (False,), "soft_cap": (None,),
}  # fmt: skip
FAMILIES = (
  Family(
    "LlamaForCausalLM", "llama", _llama, _write_llama, _RMS_DEMANDS | {"attention_bias": ("none", "all")}, _named
  ),
  Family(
    "Qwen2ForCausalLM", "qwen2", _qwen2, _write_qwen2,
    _RMS_DEMANDS | {"attention_bias": ("qkv",), "mlp_bias": (False,)}, _named,
  ),
  Family(
    "GemmaForCausalLM", "gemma", _gemma, _write_gemma,
    _RMS_DEMANDS | {
      "norm": ("rmsnorm_plus_one",), "activation": ("gelu_tanh",), "attention_bias": ("none", "all"),
      "mlp_bias": (False,), "scale_embeddings": (True,),
    },
    _named,
  ),
  Family(
    "GPTNeoXForCausalLM", "gpt_neox", _gpt_neox, _write_gpt_neox,
    {
      "norm": ("layernorm",), "gated_mlp": (False,), "attention_bias": ("none", "all"), "mlp_bias": (True,),
      "scale_embeddings": (False,), "soft_cap": (None,),
    },
    families.gpt_neox,
  ),
  # Read, but never written, because the Llama family expresses the same models.
  Family("MistralForCausalLM", "mistral", _mistral, _write_llama, {}, _named, written=False),
)  # fmt: skip


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object in a file.

  Raises:
    InputError: the file can't be read, or does not hold an object.
  """
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: can't be read ({error}); it must hold a JSON object") from None
  if not isinstance(values, dict):
    raise InputError(f"{path}: {type(values).__name__} instead of a JSON object")
  return values


def read_config(path: pathlib.Path) -> tuple[Family, DecoderConfig, dict[str, Any]]:
  """The family of a config.json, our config, and all its fields; also checks `max_position_embeddings`.

  Raises:
    InputError: an architecture or a field is unsupported.
  """
  values = read_json(path)
  known = ", ".join(family.architecture for family in FAMILIES)
  fields = Fields(path, values)
  named = fields.take("architectures", list, [])
  kind = fields.take("model_type", str, None)
  for family in FAMILIES:
    if named == [family.architecture] or (not named and kind == family.model_type):
      break
  else:
    raise InputError(f"{path}: architectures = {named or kind!r} is unsupported; this version loads {known}")
  if kind not in (None, family.model_type):
    raise InputError(
      f"{path}: model_type = {kind!r}, but architectures = {named!r} has the model_type {family.model_type!r}"
    )
  for name in ("is_encoder_decoder", "add_cross_attention", "quantization_config"):
    fields.demand(name, (None, False))
  config = family.read(fields)
  fields.count("max_position_embeddings")
  fields.finish(HARMLESS)
  return family, config, values


class SafetensorsFiles:
  """The tensors of a folder's safetensors, memory-mapped.

  Args:
    folder: a folder with the single file, or with model.safetensors.index.json and its shards.
    single: the name of the single file.

  Raises:
    InputError: both are missing, a shard is missing or truncated, or a shard lacks a tensor of the index.
  """

  def __init__(self, folder: pathlib.Path, single: str = SINGLE):
    self.infos: dict[str, TensorInfo] = {}
    if (folder / single).is_file():
      self._add(folder / single)
    elif single != SINGLE:
      raise InputError(f"{folder / single}: missing, but config.json refers to it; download it")
    elif (folder / INDEX).is_file():
      self._add_shards(folder)
    else:
      raise InputError(_no_weights(folder))

  def _add(self, path: pathlib.Path, names: Sequence[str] | None = None) -> None:
    with reading(str(path)):
      path.open("rb").close()  # safetensors reports every file that it can't open as missing
    try:
      file = package("safetensors", str(path)).safe_open(path, framework="numpy")
    except OSError as error:
      raise InputError(f"{path}: can't be read ({error})") from None
    except Exception as error:  # safetensors' own exception, if the header doesn't match the file
      raise InputError(
        f"{path}: not a complete safetensors file, {path.stat().st_size} bytes ({error}); download it again"
      ) from None
    present = set(file.keys())
    for name in sorted(present) if names is None else names:
      if name not in present:
        raise InputError(f"{path}: the tensor {name} is missing, but {INDEX} lists it; download the file again")
      part = file.get_slice(name)
      self.infos[name] = TensorInfo(tuple(part.get_shape()), part.get_dtype(), path, is_float(part.get_dtype()))

  def _add_shards(self, folder: pathlib.Path) -> None:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
      raise InputError(f"{folder / INDEX}: weight_map is missing; it must map each tensor to its file")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
      shards.setdefault(file, []).append(name)
    for file, names in sorted(shards.items()):
      if pathlib.PurePath(file).name != file or not file.endswith(".safetensors"):
        raise InputError(f"{folder / INDEX}: {file!r} must be the name of a safetensors file in this folder")
      if not (folder / file).is_file():
        raise InputError(f"{folder / file}: the shard is missing, but {INDEX} lists it for {names[0]}; download it")
      self._add(folder / file, names)

  def read(self, name: str) -> np.ndarray:
    # Opened for each tensor, because pages that were read count as memory until the memory map is closed.
    path = self.infos[name].file
    with package("safetensors", str(path)).safe_open(path, framework="numpy") as file:
      return file.get_tensor(name)


def _no_weights(folder: pathlib.Path) -> str:
  pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
  if pickles:
    return f"{folder / pickles[0]}: a pickle, which this version never opens; convert it to safetensors"
  if (folder / "adapter_config.json").exists():
    return f"{folder}: an adapter without its model; merge it and save the complete model as safetensors"
  return f"{folder}: neither {SINGLE} nor {INDEX} exists; give a Hugging Face folder with safetensors"
