"""Exports of runs: only entries of the vocabulary are written, and texts begin and end as in training."""

import json

import imported_models
import jax
import numpy as np
import pytest
from models import tiny_config
from safetensors.numpy import load_file, save_file
from text_corpus import corpus

from cyb_jax import configs, interop, runs
from cyb_jax.data.tokenizers import open_tokenizer, train_sentencepiece
from cyb_jax.interop import pretrained

tokenizers = pytest.importorskip("tokenizers")

TEXT = "A film that wasn't bad, wasn't good; it was a film."


def run_of(tokenizer, **options):
  """An untrained run, whose tables are padded to a multiple of 128 rows."""
  source = tiny_config(**options)
  config = configs.freeze(source)
  method = config.build_method(tokenizer.vocab_size)
  rng = np.random.default_rng(0)
  shapes = runs.abstract_params(method, None)
  params = jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(0, 0.5, x.shape), x.dtype), shapes)
  return runs.Run(config, method, params, tokenizer, 3, {})


def export(run, folder):
  interop.write_huggingface(
    folder, run.method.decoder.config, run.params, run.tokenizer, method=run.config.method, step=run.step
  )
  return pretrained.load(str(folder))


def log_likelihoods(run, ids):
  ids = np.array([ids])
  batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones((1, ids.shape[1] - 1), np.float32)}
  return np.asarray(jax.jit(run.method.evaluate)(run.params, batch).scores.log_target)


@pytest.mark.parametrize("options", [dict(name="baseline"), dict(name="cyb", pauses=2)], ids=["baseline", "cyb"])
def test_padding_rows_are_not_written(tmp_path, options):
  run = run_of(train_sentencepiece(corpus(), 300), **options)
  back = export(run, tmp_path / "out")
  appended = 3 if options["name"] == "cyb" else 0
  fields = json.loads((tmp_path / "out" / "config.json").read_text())
  table = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
  assert run.method.decoder.config.vocab_size == 384
  assert fields["vocab_size"] == len(table) == 300 + appended
  assert (fields["cyb_jax"]["vocab_size"], fields["cyb_jax"]["rows"]) == (300, 300)
  written = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
  assert written.get_vocab_size() == len(table)
  # The imported model has the run's shapes, so that a config of the run fits it.
  assert (back.method.decoder.config.vocab_size, back.method.vocab_size, back.imported) == (384, 300, False)
  ids = [run.tokenizer.separator_id, *run.tokenizer.encode(TEXT)]
  np.testing.assert_array_equal(log_likelihoods(back, ids), log_likelihoods(run, ids))
  # Also with an explicit tokenizer, whose file does not determine the number of rows.
  given = pretrained.open_pretrained(str(tmp_path / "out"), tokenizer=str(tmp_path / "out" / "tokenizer.model"))
  assert given.tokenizer.vocab_size == 300
  if not appended:
    # For a program that does not know our extensions, such as transformers.
    (tmp_path / "out" / "config.json").write_text(json.dumps(fields | {"cyb_jax": None}))
    other = pretrained.load(str(tmp_path / "out"))
    assert (other.method.decoder.config.vocab_size, other.imported) == (300, True)
    np.testing.assert_allclose(log_likelihoods(other, ids), log_likelihoods(run, ids), rtol=1e-5)


def test_an_export_of_version_0_1_distinguishes_its_rows(tmp_path):
  """It has all rows of the run's tables, and its config.json has the number of vocabulary entries."""
  run = run_of(train_sentencepiece(corpus(), 300), name="cyb", pauses=2)
  new = export(run, tmp_path / "new")
  config = run.method.decoder.config
  fields = json.loads((tmp_path / "new" / "config.json").read_text())
  tensors = load_file(tmp_path / "new" / "model.safetensors")
  table = tensors["model.embed_tokens.weight"]
  padding = np.asarray(run.params["decoder"]["embedding"])[300:]
  tensors["model.embed_tokens.weight"] = np.concatenate([table[:300], padding, table[300:]])
  old = fields["cyb_jax"] | {"rows": 384, "pause_ids": [384, 385], "dont_know_id": 386}
  del old["table_rows"]
  save_file(tensors, tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})
  (tmp_path / "new" / "config.json").write_text(json.dumps(fields | {"vocab_size": 387, "cyb_jax": old}))
  back = pretrained.load(str(tmp_path / "new"), config=None)
  assert (back.method.decoder.config, back.method.vocab_size) == (config, 300)
  ids = [run.tokenizer.separator_id, *run.tokenizer.encode(TEXT)]
  np.testing.assert_array_equal(log_likelihoods(back, ids), log_likelihoods(new, ids))


def test_texts_of_a_run_begin_and_end_as_in_training(tmp_path):
  """A run with an instruct model's tokenizer: its documents begin with the separator, which imported models lack."""
  folder = imported_models.write_folder(tmp_path / "smollm2", "smollm2", [2])
  tokenizer = open_tokenizer(folder)
  run = run_of(tokenizer, name="baseline")
  assert not tokenizer.adds_start
  assert (run.boundaries.start, run.boundaries.end_ids) == ((0,), (2, 0))
  assert pretrained.load(str(folder)).boundaries.start == ()
  back = export(run, tmp_path / "out")
  assert back.boundaries == run.boundaries
  assert back.tokenizer.describe() == tokenizer.describe()
  for file in ("config.json", "generation_config.json"):
    fields = json.loads((tmp_path / "out" / file).read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["pad_token_id"]) == (1, [2, 0], 2)
  # transformers begins a text as in training, and keeps the special tokens of the chat template.
  written = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
  assert written.encode("The film").ids == [0, *tokenizer.encode("The film")]
  settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
  assert (settings["bos_token"], settings["eos_token"]) == ("<|im_start|>", "<|im_end|>")
  assert "add_bos_token" not in settings
