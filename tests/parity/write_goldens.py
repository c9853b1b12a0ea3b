"""Small models of every family with random weights, as transformers saves them, and their logits.

Runs where torch and transformers are, not jax: `make test-parity`. It writes one folder a model, with config.json,
model.safetensors and goldens.npz: `tokens` i32[B, T] and `logits` f32[B, T, V].

  python tests/parity/write_goldens.py OUTPUT
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

_SIZES = dict(vocab_size=67, hidden_size=36, num_hidden_layers=2, max_position_embeddings=64)
_RMS = dict(intermediate_size=50, num_attention_heads=6, num_key_value_heads=2, head_dim=10)
_NEOX = dict(intermediate_size=70, num_attention_heads=3)
# A window that is shorter than the nine tokens, and a context that scaled RoPE exceeds.
_WINDOW, _CONTEXT = 3, 6
_DEEP = _SIZES | {"num_hidden_layers": 3}
_SCALINGS = {
  "linear": dict(factor=4.0),
  "dynamic": dict(factor=4.0),
  "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=_CONTEXT),
  "yarn": dict(factor=4.0, original_max_position_embeddings=_CONTEXT),
  "yarn_given": dict(factor=4.0, original_max_position_embeddings=_CONTEXT, attention_factor=0.8, beta_fast=2.0,
                     beta_slow=0.3, truncate=False),
}  # fmt: skip


def _models() -> dict[str, transformers.PretrainedConfig]:
  llama, neox = transformers.LlamaConfig, transformers.GPTNeoXConfig
  rope = {"rope_type": "default", "rope_theta": 1000.0}
  return {
    "llama": llama(**_SIZES, **_RMS, rope_parameters=dict(rope), tie_word_embeddings=True),
    "llama_untied_biased": llama(
      **_SIZES, **_RMS, rope_parameters=dict(rope), rms_norm_eps=1e-5, attention_bias=True, mlp_bias=True
    ),
    "qwen2": transformers.Qwen2Config(**_SIZES, **_RMS, rope_parameters=dict(rope), tie_word_embeddings=True),
    "gemma": transformers.GemmaConfig(**_SIZES, **(_RMS | {"num_key_value_heads": 1}), rope_parameters=dict(rope)),
    "pythia": neox(
      **_SIZES | {"hidden_size": 48}, **_NEOX,
      rope_parameters=rope | {"partial_rotary_factor": 0.25}, use_parallel_residual=True,
    ),
    "neox_serial": neox(
      **_SIZES, **_NEOX, rope_parameters=rope | {"partial_rotary_factor": 1.0}, use_parallel_residual=False,
      hidden_act="gelu_new", tie_word_embeddings=True,
    ),
    **{
      f"llama_{name}": llama(
        **_SIZES | ({"max_position_embeddings": _CONTEXT} if name == "dynamic" else {}), **_RMS,
        rope_parameters={"rope_type": name.partition("_")[0], "rope_theta": 1000.0, **numbers},
        tie_word_embeddings=True,
      )
      for name, numbers in _SCALINGS.items()
    },
    "mistral": transformers.MistralConfig(**_SIZES, **_RMS, rope_parameters=dict(rope), sliding_window=_WINDOW),
    "qwen3": transformers.Qwen3Config(**_SIZES, **_RMS, rope_parameters=dict(rope), tie_word_embeddings=True),
    "qwen3_window": transformers.Qwen3Config(
      **_DEEP, **_RMS, rope_parameters=dict(rope), attention_bias=True, use_sliding_window=True,
      sliding_window=_WINDOW, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma2": transformers.Gemma2Config(
      **_DEEP, **_RMS, rope_parameters=dict(rope), sliding_window=_WINDOW, query_pre_attn_scalar=17,
      attn_logit_softcapping=2.0, final_logit_softcapping=6.0,
    ),
    "gemma3": transformers.Gemma3TextConfig(
      **_DEEP, **_RMS, sliding_window=_WINDOW, query_pre_attn_scalar=17,
      layer_types=["sliding_attention", "full_attention", "sliding_attention"],
      rope_parameters={
        "sliding_attention": dict(rope),
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
      },
    ),
    "olmo2": transformers.Olmo2Config(
      **_SIZES, **(_RMS | {"head_dim": 6}), rope_parameters=dict(rope)
    ),
    "smollm3": transformers.SmolLM3Config(
      **_DEEP, **(_RMS | {"head_dim": 6}), rope_parameters=dict(rope), no_rope_layer_interval=2,
      pad_token_id=None, bos_token_id=None, eos_token_id=None,
    ),
    "gpt2": transformers.GPT2Config(
      vocab_size=67, n_positions=16, n_embd=36, n_layer=2, n_head=3, n_inner=50, bos_token_id=None, eos_token_id=None
    ),
  }  # fmt: skip


def _randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
  """Weights of which none is zero, one, or so small that a mistake could hide."""
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.35 if parameter.ndim == 2 else 1.0))


def main(output: pathlib.Path) -> None:
  for number, (name, config) in enumerate(_models().items()):
    generator = torch.Generator().manual_seed(number)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    _randomise(model, generator)
    tokens = torch.randint(0, config.vocab_size, (2, 9), generator=generator)
    with torch.no_grad():
      logits = model(tokens).logits
    folder = output / name
    model.save_pretrained(folder, max_shard_size="20KB" if name == "llama_untied_biased" else "5GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez(folder / "goldens.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())
    print(json.dumps({"model": name, "deviation": round(float(logits.std()), 3)}))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
