"""The commands of docs/guides/pretrained.md that fine-tune a chat model, on small models of newer families."""

import json

import cli
import documents
import imported_models
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from cyb_jax.interop import pretrained

GUIDE = cli.ROOT / "docs" / "guides" / "pretrained.md"
SHORT = [
  "--config.train.steps=2", "--config.train.eval_every=0", "--config.train.last_eval_limit=4",
  "--config.train.trackers=", "--config.data.sequence_length=48", "--config.data.batch_size=2",
]  # fmt: skip


def commands():
  found = [
    words for words in documents.commands(GUIDE) if any("models/chat" in word or "runs/chat" in word for word in words)
  ]
  assert [words[0] for words in found] == [
    "cyb-generate", "cyb-train", "cyb-evaluate", "cyb-generate", "cyb-convert", "cyb-convert", "cyb-generate",
  ]  # fmt: skip
  return found


def fast(words):
  program, *flags = words
  extra = {
    "cyb-train": SHORT, "cyb-evaluate": ["--limit=4"], "cyb-generate": ["--max_new_tokens=4", "--nostream", "--seed=3"]
  }  # fmt: skip
  return program.removeprefix("cyb-"), [*flags, *extra.get(program, [])]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3.2", "qwen3", "gemma3"])
def test_a_chat_model_is_adapted_and_given_back(name, tmp_path):
  path = imported_models.write_folder(tmp_path / "models" / "chat", name, [0])
  settings = json.loads((path / "tokenizer_config.json").read_text())
  settings.setdefault("chat_template", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
  (path / "tokenizer_config.json").write_text(json.dumps(settings))
  chats = [[{"role": role, "content": f"the film is {i}"} for role in ("user", "assistant")] for i in range(200)]
  (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
  results = []
  for words in commands():
    program, flags = fast(words)
    result, _ = cli.run(program, *flags, cwd=tmp_path)
    results.append(result)
  _, trained, evaluated, after, adapters, merged, again = results
  assert trained["perplexity"] > 1
  assert "mean_pauses" in evaluated
  assert adapters["parameters"] < merged["parameters"] / 4
  # The run, its adapters on the base and the merged model are the same model.
  assert again["text"] == after["text"]
  run = pretrained.load_run(str(tmp_path / "runs" / "chat"))
  ids = np.arange(5, 17)[None]
  batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones((1, 11), np.float32)}

  def scores(run):
    return np.asarray(jax.jit(run.method.evaluate)(run.params, batch).scores.log_target)

  for other in ("chat-adapters", "chat-merged"):
    np.testing.assert_allclose(scores(pretrained.load(str(tmp_path / "models" / other))), scores(run), atol=2e-4)
  trained = load_file(tmp_path / "models" / "chat-adapters" / "adapter_model.safetensors")
  assert any(x.any() for name, x in trained.items() if "lora_B" in name)  # they were zero
