"""Decoder configurations by name, and the number of parameters of a decoder."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Mapping

import jax

from cyb_jax.decoder.config import DecoderConfig
from cyb_jax.decoder.decoder import Decoder, init_params
from cyb_jax.errors import InputError, did_you_mean

_GPT_STYLE = dict(norm="layernorm", activation="gelu_tanh", gated_mlp=False, attention_bias="all", mlp_bias=True)
_PYTHIA_STYLE = dict(
  vocab_size=50304, norm="layernorm", activation="gelu", gated_mlp=False, attention_bias="all", mlp_bias=True,
  parallel_residual=True, rope_fraction=0.25, tied_embeddings=False,
)  # fmt: skip
_GEMMA_STYLE = dict(
  vocab_size=256000, norm="rmsnorm_plus_one", norm_epsilon=1e-6, activation="gelu_tanh",
  scale_embeddings=True, initializer="scaled",
)  # fmt: skip

PRESETS: Mapping[str, DecoderConfig] = types.MappingProxyType({
  # For tests, probes and CPUs; Llama's style. The vocabulary is the tokenizer's: pass vocab_size.
  # 0.12M in the layers + 64 V; 0.19M at 1024.
  "nano": DecoderConfig(
    vocab_size=1024, num_layers=3, d_model=64, num_heads=2, num_kv_heads=2, head_size=32, mlp_size=128
  ),
  # 0.43M in the layers + 128 V; 1.5M at 8192.
  "tiny": DecoderConfig(
    vocab_size=8192, num_layers=2, d_model=128, num_heads=2, num_kv_heads=2, head_size=64, mlp_size=384
  ),
  # 8.4M in the layers + 256 V; 10.5M at 8192.
  "small": DecoderConfig(
    vocab_size=8192, num_layers=8, d_model=256, num_heads=4, num_kv_heads=4, head_size=64, mlp_size=1024
  ),
  # 27.3M in the layers + 512 V; 31.5M at 8192. For studies of methods on one accelerator.
  "medium": DecoderConfig(
    vocab_size=8192, num_layers=8, d_model=512, num_heads=8, num_kv_heads=8, head_size=64, mlp_size=1536
  ),
  # GPT-2's width and depth. RoPE replaces its 1024 learned positions, so a pause can share the position of its
  # token. There are 123,653,376 parameters instead of 124,439,808, and GPT-2's own weights do not fit.
  "gpt2_124m": DecoderConfig(
    vocab_size=50257, num_layers=12, d_model=768, num_heads=12, num_kv_heads=12, head_size=64, mlp_size=3072,
    **_GPT_STYLE,
  ),
  # https://huggingface.co/HuggingFaceTB/SmolLM2-135M/blob/main/config.json
  "smollm2_135m": DecoderConfig(
    vocab_size=49152, num_layers=30, d_model=576, num_heads=9, num_kv_heads=3, head_size=64, mlp_size=1536,
    rope_base=100_000.0,
  ),
  # https://huggingface.co/EleutherAI/pythia-160m/blob/main/config.json
  "pythia_160m": DecoderConfig(
    num_layers=12, d_model=768, num_heads=12, num_kv_heads=12, head_size=64, mlp_size=3072, **_PYTHIA_STYLE
  ),
  # https://huggingface.co/EleutherAI/pythia-410m/blob/main/config.json
  "pythia_410m": DecoderConfig(
    num_layers=24, d_model=1024, num_heads=16, num_kv_heads=16, head_size=64, mlp_size=4096, **_PYTHIA_STYLE
  ),
  # Llama 3.2 1B: https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
  "llama_1b": DecoderConfig(
    vocab_size=128256, num_layers=16, d_model=2048, num_heads=32, num_kv_heads=8, head_size=64, mlp_size=8192,
    rope_base=500_000.0, rope_scaling="llama3:factor=32,context=8192",
  ),
  # https://huggingface.co/google/gemma-2b/blob/main/config.json; Gemma Team 2024, https://arxiv.org/abs/2403.08295
  "gemma1_2b": DecoderConfig(
    num_layers=18, d_model=2048, num_heads=8, num_kv_heads=1, head_size=256, mlp_size=16384, **_GEMMA_STYLE
  ),
  # https://huggingface.co/google/gemma-7b/blob/main/config.json
  "gemma1_7b": DecoderConfig(
    num_layers=28, d_model=3072, num_heads=16, num_kv_heads=16, head_size=256, mlp_size=24576, **_GEMMA_STYLE
  ),
})  # fmt: skip


def preset(name: str, **overrides: object) -> DecoderConfig:
  """Returns the configuration of that name, with some fields replaced.

  Args:
    name: a key of PRESETS.
    **overrides: fields of DecoderConfig.

  Raises:
    InputError: the preset or a field does not exist, or a value is invalid.
  """
  if name not in PRESETS:
    raise InputError(f"decoder.preset: {name!r} is unknown; {did_you_mean(name, PRESETS)}")
  fields = [field.name for field in dataclasses.fields(DecoderConfig)]
  for field, value in overrides.items():
    if field not in fields:
      raise InputError(f"decoder.{field}: unknown field, got {value!r}; {did_you_mean(field, fields)}")
  return dataclasses.replace(PRESETS[name], **overrides)


def num_params(config: DecoderConfig) -> int:
  """The number of parameters of a decoder, computed from shapes without allocating them; a tied table counts once."""
  shapes = jax.eval_shape(functools.partial(init_params, Decoder(config)), jax.random.key(0))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
