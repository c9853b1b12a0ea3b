"""Greedy texts of imported models equal those of transformers, token for token, in every supported format.

The goldens, tests/parity/goldens/texts.json, are written by tests/parity/write_texts.py (`make test-parity`).
"""

import json
import os
import pathlib
import struct

import cli
import imported_models
import jax
import numpy as np
import pytest
from file_formats import llama2c_bytes, write_gguf
from safetensors.numpy import load_file

from cyb_jax.data.tokenizers import render_chat
from cyb_jax.generation import Sampler, SamplingOptions
from cyb_jax.interop import pretrained

pytest.importorskip("tokenizers")

_FOLDER = os.environ.get("CYB_JAX_GOLDENS", pathlib.Path(__file__).parents[1] / "parity" / "goldens")
GOLDENS = json.loads((pathlib.Path(_FOLDER) / "texts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  folder = tmp_path_factory.mktemp("imported")
  for name, golden in GOLDENS.items():
    imported_models.write_folder(folder / name, name, golden["end_ids"])
  return folder


def teacher_forced(run, golden):
  """The most likely token after the prompt and after each token of the golden text."""
  ids = np.array([golden["prompt_ids"] + golden["free_ids"][:-1]])

  @jax.jit
  def best(params, tokens):
    hidden = run.method.hidden(params, {"tokens": tokens})[0, :, 0]
    slots = np.zeros(len(hidden), np.int32)
    return run.method.token_scores(params, hidden, slots).log_probs.argmax(-1)

  return np.asarray(best(run.params, ids))[len(golden["prompt_ids"]) - 1 :].tolist()


def check(run, golden):
  """Compares the prompt's tokens, the text, and (by induction over its tokens) the result of greedy decoding."""
  tokenizer = run.tokenizer
  assert [*run.boundaries.start, *tokenizer.encode(imported_models.PROMPT)] == golden["prompt_ids"]
  assert teacher_forced(run, golden) == golden["free_ids"]
  if "chat" in golden:
    assert render_chat(tokenizer, golden["chat"]) == golden["chat_text"]
    assert tokenizer.encode_with_special(golden["chat_text"]) == golden["chat_ids"]


@pytest.mark.parametrize("name", GOLDENS)
def test_a_hugging_face_folder(folders, name):
  golden, run = GOLDENS[name], pretrained.load(str(folders / name))
  check(run, golden)
  assert run.boundaries.end_ids == tuple(dict.fromkeys(golden["end_ids"]))
  text = run.tokenizer.decode(golden["prompt_ids"] + golden["free_ids"])
  assert text.removeprefix(run.tokenizer.decode(golden["prompt_ids"])).strip() == golden["text"].strip()


def gguf_tokenizer(name, writer):
  """The metadata that llama.cpp's converter writes, without keys that have a default."""
  _, content, settings = imported_models.MODELS[name]
  if content["model"]["byte_fallback"]:
    style = "gemma" if name == "gemma" else "llama"
    tokens, scores, kinds = map(list, zip(*imported_models.sentencepiece_pieces(style)))
    writer.add_tokenizer_model("llama")
    if name == "gemma":
      writer.add_add_space_prefix(False)
  else:
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    special = {entry["content"] for entry in content["added_tokens"]}
    kinds = [3 if token in special else 1 for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre({"smollm2": "smollm", "llama3": "llama-bpe"}.get(name, name))
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
  # Padded as by llama.cpp's converter, so that all rows of the embedding are tokens.
  padding = range(len(tokens), imported_models.ROWS)
  writer.add_token_list(tokens + [f"[PAD{number}]" for number in padding])
  writer.add_token_types(kinds + [5 for _ in padding])
  if content["model"]["byte_fallback"]:
    writer.add_token_scores(scores + [-1000.0 for _ in padding])
  for key, add in (("bos_token", writer.add_bos_token_id), ("eos_token", writer.add_eos_token_id)):
    if settings[key] is not None and name != "llama2":
      add(tokens.index(settings[key]))
  if name == "smollm2":
    writer.add_add_bos_token(False)
  if "chat_template" in settings:
    writer.add_chat_template(settings["chat_template"])


@pytest.mark.parametrize("name", ["llama2", "smollm2", "llama3", "qwen2", "gemma"])
def test_a_gguf_file(folders, tmp_path, name):
  golden, path = GOLDENS[name], tmp_path / "model.gguf"
  decoder = pretrained.open_pretrained(str(folders / name)).decoder
  architecture = imported_models.MODELS[name][0]
  tensors = load_file(folders / name / "model.safetensors")
  write_gguf(path, tensors, decoder, architecture, tokenizer=lambda writer: gguf_tokenizer(name, writer))
  run = pretrained.load(str(path))
  check(run, golden)
  assert run.boundaries.end_ids == tuple(golden["end_ids"][:1])


def test_a_binary_of_llama2c(folders, tmp_path):
  decoder = pretrained.open_pretrained(str(folders / "llama2")).decoder
  tensors = load_file(folders / "llama2" / "model.safetensors")
  (tmp_path / "model.bin").write_bytes(llama2c_bytes("version1", tensors, decoder))
  pieces = [
    (piece.replace("▁", " ").encode(), score) for piece, score, _ in imported_models.sentencepiece_pieces("llama")
  ]
  content = struct.pack("<i", max(len(piece) for piece, _ in pieces))
  content += b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in pieces)
  (tmp_path / "tokenizer.bin").write_bytes(content)
  run = pretrained.load(str(tmp_path / "model.bin"))
  check(run, GOLDENS["llama2"])
  # These models were trained with documents after the begin token, without an end token.
  assert run.boundaries.end_ids == (1,)


def test_generation_ends_at_any_end_token(folders):
  """Only generation_config.json names the second end token."""
  golden = GOLDENS["smollm2"]
  path = f"--init_from={folders}/smollm2"
  flags = ("--temperature=0", "--mode=none", f"--max_new_tokens={imported_models.NEW_TOKENS}", "--stream=False")
  record, _ = cli.run("generate", path, f"--prompt={imported_models.PROMPT}", *flags)
  assert record["tokens"] == len(golden["ids"]) < imported_models.NEW_TOKENS
  run = pretrained.load(str(folders / "smollm2"))
  sampler = Sampler(run.method, SamplingOptions(mode="none", temperature=0))
  for ends in (golden["end_ids"], [290, *range(3, 15), golden["end_ids"][1]], golden["end_ids"][1]):
    generation = sampler.generate(run.params, [golden["prompt_ids"]], max_new_tokens=16, end_id=ends)
    first = next(i for i, token in enumerate(golden["free_ids"]) if token in np.atleast_1d(ends))
    assert generation.tokens == [golden["free_ids"][: first + 1]]
  generation = sampler.generate(run.params, [golden["prompt_ids"]], max_new_tokens=16)
  assert generation.tokens == [golden["free_ids"]]


@pytest.mark.parametrize("name", GOLDENS)
def test_a_converted_folder_generates_the_same_text(folders, tmp_path, name):
  """Ids of special tokens, the chat template and rows without an entry: everything that affects a text is preserved."""
  golden, before = GOLDENS[name], pretrained.load(str(folders / name))
  cli.run("convert", "--from=hf", f"--input={folders / name}", f"--output={tmp_path}/out")
  after = pretrained.load(f"{tmp_path}/out")
  check(after, golden)
  assert after.imported
  assert after.boundaries == before.boundaries
  assert after.tokenizer.describe() == before.tokenizer.describe()
  assert after.tokenizer.special_tokens == before.tokenizer.special_tokens
  assert after.method.vocab_size == imported_models.ROWS
  written = [json.loads((tmp_path / "out" / file).read_text()) for file in ("config.json", "generation_config.json")]
  for content in written:
    assert content["eos_token_id"] == golden["end_ids"]
    assert content["pad_token_id"] == before.tokenizer.special_tokens.pad_id
    assert content["bos_token_id"] == before.tokenizer.special_tokens.bos_id
