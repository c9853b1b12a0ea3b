"""Loads our exports with transformers and compares what it says with what our own code has said of them.

Runs where torch and transformers are, not jax: `make test-parity`.

  python tests/parity/read_exports.py EXPORTS
"""

import json
import pathlib
import sys

import numpy as np
import peft
import torch
import transformers


def _close(what: str, found: torch.Tensor, expected: np.ndarray) -> float:
  difference = float(np.abs(found.numpy() - expected).max())
  assert difference <= 1e-4, f"{what}: off by {difference}"
  return difference


def main(exports: pathlib.Path) -> None:
  folders = sorted(path for path in exports.iterdir() if path.is_dir() and path.name != "adapters")
  assert folders, exports
  for folder in folders:
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    model.eval()
    own = json.loads((folder / "config.json").read_text())["cyb_jax"]
    with np.load(folder / "ours.npz") as arrays:
      ours = dict(arrays)
    # Of the rows of our tables those that only pad are not in the file.
    rows = own["rows"]
    assert own["table_rows"] == ours["logits"].shape[-1]
    pauses, dont_know = own["pause_ids"], own["dont_know_id"]
    appended = len(pauses) + (dont_know is not None)
    assert len(model.get_input_embeddings().weight) == len(model.get_output_embeddings().weight) == rows + appended

    tokens, targets = (torch.tensor(ours[name]).long() for name in ("tokens", "targets"))
    batch, length = tokens.shape
    # Each token, and behind it its pauses, which stand at its position.
    width = 1 + len(pauses)
    slots = torch.cat([tokens[..., None], torch.tensor(pauses).long().expand(batch, length, -1)], -1)
    positions = torch.arange(length).repeat_interleave(width).expand(batch, -1)
    with torch.no_grad():
      plain = model(tokens).logits[..., :rows]
      paused = model(
        slots.reshape(batch, -1), position_ids=positions, attention_mask=_masks(model.config, positions)
      ).logits.reshape(batch, length, width, -1)
    report = {"model": folder.name, "appended": appended, "logits": _close("logits", plain, ours["logits"][..., :rows])}
    normalizer = torch.logsumexp(paused[..., : own["vocab_size"]], -1)
    target = torch.take_along_dim(paused, targets[..., None, None], -1)[..., 0] - normalizer
    report["log_target"] = _close("log_target", target, ours["log_target"])
    if dont_know is not None:
      logit = paused[..., dont_know] + own["prior_shift"] + own["dont_know_bias"] + own["dont_know_offset"]
      against = torch.zeros(()) if own["method"]["dont_know"] == "unit" else normalizer
      d = torch.nn.functional.logsigmoid(logit - against)
      report |= {"log_dont_know": _close("log_dont_know", d, ours["log_dont_know"]), "mean_d": float(d.exp().mean())}
    if (folder / "text.json").exists():
      report |= _check_tokenizer(folder, own, rows + appended)
    print(json.dumps(report))
  for folder in sorted((exports / "adapters").iterdir()):
    _check_adapters(folder)


def _masks(config: transformers.PretrainedConfig, positions: torch.Tensor):
  """Causal masks, with a window over positions in the layers that have one: transformers' own counts slots."""
  order = torch.arange(positions.shape[1])
  causal = (order[:, None] >= order).expand(len(positions), 1, -1, -1)
  window = getattr(config, "sliding_window", None)
  near = causal
  if window is not None:
    near = causal & (positions[:, None, :, None] - positions[:, None, None] < window)
  full, sliding = (torch.where(seen, 0.0, torch.finfo(torch.float32).min) for seen in (causal, near))
  if config.model_type == "mistral":
    return sliding
  kinds = getattr(config, "layer_types", None)
  return full if kinds is None else {"full_attention": full, "sliding_attention": sliding}


def _check_adapters(folder: pathlib.Path) -> None:
  """Loads adapters of ours with peft, on the model that they name."""
  config = json.loads((folder / "adapter_config.json").read_text())
  base = transformers.AutoModelForCausalLM.from_pretrained(
    config["base_model_name_or_path"], attn_implementation="eager"
  )
  model = peft.PeftModel.from_pretrained(base, folder).eval()
  with np.load(folder / "ours.npz") as arrays:
    tokens, expected = torch.tensor(arrays["tokens"]).long(), arrays["logits"]
  with torch.no_grad():
    difference = _close("adapters", model(tokens).logits, expected)
    with model.disable_adapter():
      assert float((model(tokens).logits - torch.tensor(expected)).abs().max()) > 0.1
  print(json.dumps({"adapters": folder.name, "logits": difference}))


def _check_tokenizer(folder: pathlib.Path, own: dict, rows: int) -> dict:
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  assert len(tokenizer) == rows, (len(tokenizer), rows)
  names = [f"<pause_{k + 1}>" for k in range(len(own["pause_ids"]))] + ["<dont_know>"]
  assert tokenizer.convert_tokens_to_ids(names) == [*own["pause_ids"], own["dont_know_id"]]
  said = json.loads((folder / "text.json").read_text())
  # What the text spells stays text for us; there it is the entry.
  before = said["text"].partition("<pause_1>")[0]
  found = tokenizer(before, add_special_tokens=False)["input_ids"]
  assert found == said["ids"][: len(found)], found
  return {"entries": len(tokenizer)}


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
