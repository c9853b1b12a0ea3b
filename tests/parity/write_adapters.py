"""Adapters of golden models, as peft saves them, and the logits of the adapted models.

Runs where torch, transformers and peft are, not jax: `make test-parity`. It writes one folder for each set of adapters,
with peft's files and goldens.npz: `tokens` i32[B, T] and `logits` f32[B, T, V].

  python tests/parity/write_adapters.py GOLDENS
"""

import json
import pathlib
import sys

import numpy as np
import peft
import torch
import transformers

_COMMON = dict(r=3, lora_alpha=5, task_type="CAUSAL_LM")
_ADAPTERS = {
  "llama_lora": ("llama", dict(target_modules=["q_proj", "o_proj", "gate_proj", "down_proj"])),
  "gemma3_rslora": ("gemma3", dict(target_modules="all-linear", use_rslora=True)),
  "llama_dora": ("llama", dict(target_modules=["q_proj", "v_proj", "up_proj"], use_dora=True, layers_to_transform=[1])),
}


def main(goldens: pathlib.Path) -> None:
  for number, (name, (base, options)) in enumerate(_ADAPTERS.items()):
    generator = torch.Generator().manual_seed(number)
    model = transformers.AutoModelForCausalLM.from_pretrained(goldens / base, attn_implementation="eager")
    model = peft.get_peft_model(model, peft.LoraConfig(**_COMMON, **options)).eval()
    with torch.no_grad():
      for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name and "magnitude" not in parameter_name:
          parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        elif "magnitude" in parameter_name:
          parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
      tokens = torch.randint(0, model.config.vocab_size, (2, 9), generator=generator)
      logits = model(tokens).logits
    folder = goldens / "adapters" / name
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    # Relative to the folder of the adapters, so that the goldens can be moved.
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
      json.dumps(config | {"base_model_name_or_path": f"../../{base}"}, indent=2, sort_keys=True) + "\n"
    )
    np.savez(folder / "goldens.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())
    print(json.dumps({"adapters": name, "deviation": round(float(logits.std()), 3)}))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
