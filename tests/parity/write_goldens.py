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
