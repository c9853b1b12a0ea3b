"""Initial parameters of a run: export and import, the initialisation of new rows, and programs that accept both runs
and weights."""

import json
import shutil

import cli
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import assert_trees_equal, tiny_config

import cyb_jax
from cyb_jax import configs, training
from cyb_jax.decoder import merge_lora
from cyb_jax.errors import InputError
from cyb_jax.interop import pretrained
from cyb_jax.studies.resolution import resolve


def started(folder, **method):
  """A config that starts from a folder and uses its decoder and tokenizer."""
  config = tiny_config(**method)
  config.decoder = configs.default().decoder
  config.decoder.preset = ""
  config.data.tokenizer = ""
  config.init_from = str(folder)
  config.train.update(steps=2, eval_every=0, checkpoint_every=0, log_every=1)
  return config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A plain run, and the same model as a Hugging Face folder."""
  folder = tmp_path_factory.mktemp("pretrained")
  config = tiny_config(name="baseline")
  config.train.update(steps=2, eval_every=0)
  training.train(configs.freeze(config), folder / "plain")
  record, _ = cli.run("convert", "--to=hf", f"--workdir={folder}/plain", f"--output={folder}/hf")
  assert record["method"] == "baseline"
  return folder


@pytest.fixture(scope="module")
def tuned(folders):
  """A run that is fine-tuned from the Hugging Face folder with adapters."""
  config = started(folders / "hf", pauses=2, calibration_batches=1)
  config.tuning.update(weights="lora", lora_rank=2, lora_targets="query,down")
  config.optimizer.learning_rate = 0.01
  training.train(resolve(config), folders / "tuned")
  return folders / "tuned"


def entries(params):
  """The parameters with zeros in the padding rows of the tables, which an export does not have."""
  decoder = {
    name: leaf.at[257:].set(0) if name in ("embedding", "unembedding") else leaf
    for name, leaf in params["decoder"].items()
  }
  return params | {"decoder": decoder}


def test_weights_are_preserved_bit_for_bit(folders):
  ours, theirs = cyb_jax.load(folders / "plain"), cyb_jax.load(folders / "hf")
  assert_trees_equal(entries(ours.params), theirs.params)
  assert theirs.method.name == "baseline"
  assert theirs.tokenizer.describe() == ours.tokenizer.describe()
  batch = {
    "tokens": np.arange(12).reshape(2, 6),
    "targets": np.ones((2, 6), int),
    "weights": np.ones((2, 6), np.float32),
  }
  a, b = (run.method.evaluate(run.params, batch).scores for run in (ours, theirs))
  assert_trees_equal(a, b)


def new_rows(folders, caplog, choice, **method):
  """(parameters, the 257 entries of the embedding, the log), from the Hugging Face folder."""
  config = started(folders / "hf", **{"pauses": 2} | method)
  config.tuning.new_rows = choice
  caplog.clear()
  caplog.set_level("INFO", logger="absl")  # another test may have set the level of this logger
  run = pretrained.load(str(folders / "hf"), resolve(config))
  plain = entries(cyb_jax.load(folders / "plain").params)["decoder"]
  assert_trees_equal(run.params["decoder"], plain)
  return run.params, np.asarray(plain["embedding"], np.float64)[:257], caplog.text


@pytest.mark.parametrize("choice", ["auto", "zero"])
def test_pauses_with_their_token_start_near_zero(folders, caplog, choice):
  params, table, logged = new_rows(folders, caplog, choice, pause_input="token+pause")
  rows, deviation = np.asarray(params["pause_input"], np.float64), table.std(0)
  assert rows.shape == (2, 16)
  assert 0.005 < np.abs(rows / deviation).mean() < 0.04
  assert np.abs(rows[0] - rows[1]).max() > 0.005 * deviation.mean()
  assert "pauses start at zero plus noise of 0.02 of the embeddings' deviation" in logged
  dont_know = (np.asarray(params["dont_know"]) - table.mean(0)) / deviation
  assert 0.04 < np.abs(dont_know).mean() < 0.13
  assert "<don't know> starts at a draw around the mean" in logged


@pytest.mark.parametrize("choice", ["auto", "draws"])
def test_pauses_without_their_token_start_at_independent_draws(folders, caplog, choice):
  params, table, logged = new_rows(folders, caplog, choice, pauses=50, pause_input="pause")
  drawn = (np.asarray(params["pause_input"], np.float64) - table.mean(0)) / table.std(0)
  # 800 normal numbers.
  assert abs(drawn.mean()) < 0.015
  assert drawn.std() == pytest.approx(0.1, abs=0.01)
  everything = np.concatenate([params["pause_input"], np.asarray(params["dont_know"])[None]])
  assert len(np.unique(everything, axis=0)) == 51
  assert "pauses start at a draw around the mean of the embeddings" in logged
  again, *_ = new_rows(folders, caplog, choice, pauses=50, pause_input="pause")
  assert_trees_equal(params, again)


def test_new_rows_may_start_from_the_mean(folders, caplog):
  """The only initialisation of version 0.1."""
  params, table, logged = new_rows(folders, caplog, "mean")
  np.testing.assert_allclose(params["pause_input"], [table.mean(0)] * 2, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(params["dont_know"], table.mean(0), rtol=1e-5, atol=1e-7)
  assert "pauses start from the mean of the embeddings" in logged


def test_new_rows_start_from_unused_entries(folders, monkeypatch, caplog):
  """The paper's setup: pauses in order, then <don't know>."""
  from cyb_jax.data import ByteTokenizer

  monkeypatch.setattr(ByteTokenizer, "unused_ids", lambda self: [7, 9, 30, 31])
  for choice in ("auto", "unused", "mean"):
    params, table, logged = new_rows(folders, caplog, choice, pause_input="pause")
    np.testing.assert_array_equal(params["pause_input"], table[[7, 9]].astype(np.float32))
    np.testing.assert_array_equal(params["dont_know"], table[30].astype(np.float32))
    assert "pauses start from the unused entries [7, 9]" in logged
  # If pauses start near zero, <don't know> uses the first entry.
  params, table, _ = new_rows(folders, caplog, "auto", pause_input="token+pause")
  np.testing.assert_array_equal(params["dont_know"], table[7].astype(np.float32))
  assert np.abs(params["pause_input"]).max() < np.abs(table).max() / 10
  # Two entries are too few for three rows.
  monkeypatch.setattr(ByteTokenizer, "unused_ids", lambda self: [7, 9])
  params, *_ = new_rows(folders, caplog, "auto", pause_input="pause")
  assert not np.array_equal(params["pause_input"], table[[7, 9]].astype(np.float32))
  message = r"tuning.new_rows: 'unused', but the vocabulary has 2 unused entries.* 'cyb' has 3 new rows .*'auto' or"
  with pytest.raises(InputError, match=message):
    new_rows(folders, caplog, "unused", pause_input="pause")


def test_the_zero_initialisation_preserves_the_model(folders, caplog, exact):
  """With rows of zeros the last slot of every token equals the model without pauses, and with hidden pauses so does the
  first slot.
  """
  batch = {
    "tokens": np.arange(12).reshape(2, 6),
    "targets": np.ones((2, 6), int),
    "weights": np.ones((2, 6), np.float32),
  }
  plain = cyb_jax.load(folders / "plain")
  expected = np.asarray(plain.method.hidden(plain.params, batch))[:, :, 0]
  for visibility, slot in (("visible", -1), ("hidden", 0)):
    config = started(folders / "hf", pauses=2, pause_input="token+pause", pause_visibility=visibility)
    run = pretrained.load(str(folders / "hf"), resolve(config))
    zeroed = run.params | {"pause_input": jnp.zeros_like(run.params["pause_input"])}
    hidden = np.asarray(run.method.hidden(zeroed, batch))
    np.testing.assert_allclose(hidden[:, :, slot], expected, rtol=1e-4, atol=1e-5)
    near = np.asarray(run.method.hidden(run.params, batch))
    assert np.abs(near - expected[:, :, None]).mean() < 0.1 * np.abs(expected).mean()


def test_a_unit_starts_at_its_prior(folders):
  run = pretrained.load(str(folders / "hf"), resolve(started(folders / "hf", pauses=1, dont_know="unit")))
  assert not np.any(run.params["dont_know"])


@pytest.mark.slow
def test_adapters_are_merged_on_export(tuned, folders):
  run = cyb_jax.load(tuned)
  assert run.config.source["decoder"]["d_model"] == 16  # the resolved fields are recorded
  plain = cyb_jax.load(folders / "plain").params["decoder"]
  base = {k: v for k, v in run.params["decoder"]["layers_0"]["attention"]["query"].items() if k == "kernel"}
  assert_trees_equal(base, {"kernel": plain["layers_0"]["attention"]["query"]["kernel"]})
  record, _ = cli.run("convert", "--to=hf", f"--workdir={tuned}", f"--output={folders}/export")
  assert (record["method"], record["vocab_size"]) == ("cyb", 257 + 3)
  back = cyb_jax.load(folders / "export")
  merged, config = merge_lora(run.params["decoder"], run.method.decoder.config)
  assert_trees_equal(back.params, entries(run.params | {"decoder": merged}))
  assert back.method.config == run.method.config
  assert back.method.decoder.config == config
  assert (back.step, run.step) == (2, 2)
  assert float(back.params["dont_know_offset"]) != 0
  written = json.loads((folders / "export" / "config.json").read_text())
  assert written["vocab_size"] == 257 + 3
  # log(0.9 / 0.1 * |V|) with |V| = 257 vocabulary entries and <don't know>.
  assert written["cyb_jax"]["prior_shift"] == pytest.approx(np.log(9 * 257), rel=1e-6)


def test_a_run_may_start_from_a_run_with_adapters(tuned, folders):
  run = cyb_jax.load(tuned)
  merged, _ = merge_lora(run.params["decoder"], run.method.decoder.config)
  on = pretrained.load(str(tuned), resolve(started(tuned, pauses=2, calibration_batches=1)))
  assert_trees_equal(on.params, run.params | {"decoder": merged})


@pytest.mark.slow
def test_a_run_continues_without_its_init_from(folders, tmp_path, caplog):
  shutil.copytree(folders / "hf", tmp_path / "hf")
  config = started(tmp_path / "hf", pauses=1)
  caplog.set_level("INFO", logger="absl")  # another test may have set the level of this logger
  first = training.train(resolve(config, tmp_path / "run"), tmp_path / "run")
  assert "the median of d over" in caplog.text
  assert "method.calibration_batches would add" in caplog.text
  shutil.rmtree(tmp_path / "hf")
  assert training.train(resolve(config, tmp_path / "run"), tmp_path / "run") == first
  with pytest.raises(InputError, match="hf: no such folder or file"):
    resolve(config, tmp_path / "other")


def test_programs_accept_weights_like_runs(folders, tmp_path):
  path = tmp_path / "plain.py"
  path.write_text(
    f"import sys\nsys.path[:0] = {[str(cli.ROOT / 'tests' / folder) for folder in ('support', 'interop')]!r}\n"
    "import test_pretrained\n\n"
    "def get_config(argument=''):\n"
    "  return test_pretrained.started('', name='baseline')\n"
  )
  mine, _ = cli.run("evaluate", f"--workdir={folders}/plain")
  record, _ = cli.run("evaluate", f"--init_from={folders}/hf", f"--config={path}")
  assert record["perplexity"] == mine["perplexity"]
  assert record["train_tokens"] == 0
  flags = ("--prompt=a", "--max_new_tokens=4", "--temperature=0", "--stream=False")
  result, _ = cli.run("generate", f"--init_from={folders}/hf", *flags)
  assert result["text"] == cli.run("generate", f"--workdir={folders}/plain", *flags)[0]["text"]


@pytest.mark.parametrize(
  ("program", "flags", "words"),
  [
    ("evaluate", ["--init_from={folders}/hf"], "--config: not given"),
    ("evaluate", ["--workdir={folders}/plain", "--init_from={folders}/hf", "--config={root}/experiments/reviews.py"],
     "--workdir: --init_from is also given"),
    ("generate", ["--prompt=a"], "--workdir: not given; give the run's folder as --workdir"),
    ("generate", ["--prompt=a", "--init_from={folders}/none"], "none: no such folder or file"),
    ("generate", ["--prompt=a", "--init_from={folders}/hf", "--checkpoint=best"], "is not a run and has no checkpoint"),
    ("generate", ["--prompt=a", "--workdir={folders}/plain", "--tokenizer=bytes"], "--tokenizer: 'bytes' requires"),
    ("train", ["--config={root}/experiments/smollm2_reviews.py", "--workdir={tmp}/x"], "init_from: not set, but"),
    ("convert", ["--output={tmp}/x"], "--from, --to: give one of them"),
    ("convert", ["--from=torch", "--output={tmp}/x"], "--from: 'torch' is unknown; give one of hf, gguf, llama2c"),
    ("convert", ["--from=gguf", "--input={folders}/hf", "--output={tmp}/x"], "is of kind 'huggingface'"),
    ("convert", ["--from=hf", "--input={folders}/hf", "--output={folders}/hf"], "already exists; give another"),
    ("convert", ["--from=hf", "--input={folders}/hf", "--output={tmp}/x", "--checkpoint=3"], "--checkpoint: '3'"),
    ("convert", ["--to=hf", "--workdir={folders}/hf", "--output={tmp}/x"], "hf contains a Hugging Face model"),
    ("convert", ["--to=hf", "--workdir={folders}/plain", "--output={tmp}/x", "--dtype=int8"], "--dtype: 'int8'"),
    ("convert", ["--to=hf", "--workdir={folders}/plain", "--input=/y", "--output={tmp}/x"], "has no effect"),
  ],
)  # fmt: skip
def test_bad_flags(program, flags, words, folders, tmp_path):
  given = [flag.format(folders=folders, tmp=tmp_path, root=cli.ROOT) for flag in flags]
  assert words in cli.complaint(program, *given)
  assert not any(tmp_path.iterdir())


def test_bad_starts(folders):
  config = started("", pauses=1)
  with pytest.raises(InputError, match=r"init_from: not set, but decoder.preset = '' is the decoder of init_from"):
    resolve(config)
  config.decoder.d_model = 16
  with pytest.raises(InputError, match=r"decoder.vocab_size: not set; .* set init_from to use its decoder"):
    resolve(config)
  config = tiny_config(pauses=1)
  config.data.tokenizer = ""
  with pytest.raises(InputError, match=r"data.tokenizer: '' means the tokenizer of init_from, which isn't set"):
    training.train(configs.freeze(config), folders / "no")
  config = started(folders / "hf", pauses=1)
  config.decoder.norm_epsilon = 1e-3
  with pytest.raises(InputError, match=r"has decoder.norm_epsilon = 1e-05, but this config has 0.001"):
    training.train(resolve(config), folders / "no")
  assert not (folders / "no").exists()


def test_missing_parameters_equal_those_of_training(folders):
  """Parameters that `init_from` does not have are equal in `load` and in training."""
  config = started(folders / "hf", pauses=1)
  config.tuning.update(weights="lora", lora_rank=2)
  config.train.update(steps=0, epochs=0.0)
  frozen = resolve(config)
  training.train(frozen, folders / "drawn")
  assert_trees_equal(pretrained.load(str(folders / "hf"), frozen).params, cyb_jax.load(folders / "drawn").params)


def test_a_converted_folder_keeps_its_context(folders, tmp_path):
  shutil.copytree(folders / "hf", tmp_path / "long")
  path = tmp_path / "long" / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 8192}))
  cli.run("convert", "--from=hf", f"--input={tmp_path}/long", f"--output={tmp_path}/again")
  assert json.loads((tmp_path / "again" / "config.json").read_text())["max_position_embeddings"] == 8192
  assert cyb_jax.load(tmp_path / "again").config.data.sequence_length == 2048


def test_bfloat16(folders, tmp_path):
  cli.run("convert", "--from=hf", f"--input={folders}/hf", f"--output={tmp_path}/half", "--dtype=bfloat16")
  half, full = cyb_jax.load(tmp_path / "half"), cyb_jax.load(folders / "hf")
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), full.params)
  assert_trees_equal(half.params, rounded)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_quantised_base(scheme, folders, tmp_path):
  """A run trains adapters on it, continues, starts other runs, and is exported; the base never changes."""
  config = started(folders / "hf", pauses=2, pause_input="token+pause")
  config.tuning.update(weights="lora", lora_rank=2)
  config.precision.params = scheme
  config.train.update(steps=1, checkpoint_every=1)
  training.train(resolve(config), tmp_path / "run")
  first = cyb_jax.load(str(tmp_path / "run"))
  config.train.steps = 2
  training.train(resolve(config), tmp_path / "more")
  run = cyb_jax.load(str(tmp_path / "more"))

  def integers(params):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if path[-1].key in ("kernel", "kernel_scale")}  # fmt: skip

  base = integers(run.params["decoder"])
  assert {leaf.dtype.name for name, leaf in base.items() if "scale" not in name} == {
    {"int8": "int8", "nf4": "uint8"}[scheme]
  }
  jax.tree.map(np.testing.assert_array_equal, base, integers(first.params["decoder"]))
  assert np.abs(run.params["decoder"]["layers_0"]["attention"]["query"]["lora_b"]).max() > 0
  # The expanded matrices are close to those of the model.
  plain, _ = merge_lora(run.params["decoder"], run.method.decoder.config)
  original = pretrained.load(str(folders / "hf")).params["decoder"]
  up, expected = (x["layers_0"]["mlp"]["up"]["kernel"] for x in (plain, original))
  assert 0 < np.abs(up - expected).max() < (0.01 if scheme == "int8" else 0.2) * np.abs(expected).max()
  # Another run may start from this one, in any number format.
  for params in ("float32", scheme):
    config.precision.params, config.init_from = params, str(tmp_path / "more")
    again = pretrained.load(pretrained.open_pretrained(config.init_from), resolve(config))
    assert integers(again.params["decoder"]).keys() >= {"['layers_0']['mlp']['up']['kernel']"}
    merged, _ = merge_lora(again.params["decoder"], again.method.decoder.config)
    np.testing.assert_allclose(
      merged["layers_0"]["mlp"]["up"]["kernel"], up, atol=0.02 * float(np.abs(up).max()) if params == scheme else 1e-6
    )
  # Exports are expanded and merged.
  cli.run("convert", "--to=hf", f"--workdir={tmp_path}/more", f"--output={tmp_path}/out")
  exported = pretrained.load(str(tmp_path / "out")).params["decoder"]
  np.testing.assert_allclose(exported["layers_0"]["mlp"]["up"]["kernel"], up, atol=1e-6)


def test_a_quantised_base_is_not_trained(folders):
  config = started(folders / "hf")
  config.precision.params = "int8"
  with pytest.raises(InputError, match=r"precision\.params: 'int8' must be float32 if tuning\.weights = 'all'"):
    resolve(config)
