"""Estimated costs against actual costs: bytes of arrays, XLA's memory and operations; nothing is written."""

import json
import os

import cli
import jax
import pytest
from models import tiny_config, with_part

from cyb_jax import command_line, configs, data, training
from cyb_jax.costs.memory import program_memory
from cyb_jax.errors import InputError
from cyb_jax.partitioning.mesh import data_shards, make_mesh
from cyb_jax.studies.resolution import resolve
from cyb_jax.training import estimate


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
  """Empty folders for files that might be written."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  return tmp_path


def lora(config, **tuning):
  config.init_from = "nowhere"
  config.tuning.update({"weights": "lora", "lora_rank": 2} | tuning)
  return config


def tuned(**method):
  return lora(tiny_config(**({"pauses": 2, "dont_know": "unit", "calibration_batches": 1} | method)))


def build(config):
  mesh = make_mesh(config.parallelism)
  local = config.parallelism.strategy == "pmap"
  method = config.build_method(257, data_shards=1 if local else data_shards(mesh))
  optimizer = training.make_optimizer(config.optimizer, config.train.steps, 16)
  return method, training.build_strategy(config, method, optimizer, mesh)


def on_a_device(tree):
  """The bytes of real arrays on a device."""
  here = jax.devices()[0]
  return sum(shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards if shard.device == here)


@pytest.mark.slow
@pytest.mark.parametrize(
  "parallelism",
  [
    pytest.param({"fsdp": 2, "tensor": 2}, id="data x fsdp x tensor"),
    pytest.param({"strategy": "pmap"}, id="pmap"),
  ],
)
def test_estimates_equal_actual_costs(parallelism):
  config = tuned()
  config.parallelism.update(parallelism)
  config.precision.params = "bfloat16"
  config = configs.freeze(config)
  said = training.dry_run(config)
  memory, parameters = said["memory"], said["parameters"]
  _, strategy = build(config)
  state = strategy.init()
  assert memory["parameters"] == on_a_device(state.params)
  assert memory["moments"] == on_a_device(state.opt_state)
  global_state = strategy.global_state(state)
  assert parameters["total"] == sum(x.size for x in jax.tree.leaves(global_state.params))
  tokens = jax.numpy.zeros((8, 16), "int32")
  batch = strategy.shard_batch({"tokens": tokens, "targets": tokens, "weights": jax.numpy.ones((8, 16))})
  # pmap splits its arguments when it is called.
  assert memory["batch"] == on_a_device(batch) // (8 if "strategy" in parallelism else 1)
  program = strategy.compile(state, batch)
  assert memory["peak"] == program_memory(program).peak
  assert memory["temporaries"] == program.memory_analysis().temp_size_in_bytes > memory["gradients"] > 0
  assert memory["peak"] == sum(memory[name] for name in ("parameters", "moments", "batch", "temporaries", "other"))
  # Metrics, the step counter and a few results; no array of the model is included.
  assert 0 <= memory["other"] < 1024
  assert (said["steps"], said["per_step"]) == (12, {"tokens": 128, "slots": 384})
  assert said["run"] == {"tokens": 12 * 128, "slots": 12 * 384}


def test_by_hand_and_nothing_is_written(elsewhere):
  """One layer, D = 16, 2 heads of 8, F = 32 gated: 2560 in its matrices; 384 rows for 257 bytes."""
  said = training.dry_run(configs.freeze(tuned()))
  adapters = 2 * (2 * (16 + 16))  # rank 2, query and value
  new = {"pauses": 2 * 16, "dont_know": 16 + 1 + 1}
  expected = {"embedding": 384 * 16, "layers": 2560 + 3 * 16, "lora": adapters, **new}
  # The calibrated offset is a new parameter that isn't trained.
  assert said["parameters"] == {
    "total": sum(expected.values()), "trained": adapters + sum(new.values()) - 1, **expected,
  }  # fmt: skip
  # T = 16, W = 3: 48 slots, 24.5 keys on average; see test_flops.
  want = {"matrices": 2 * 3 * 5120, "attention": 9 * 64 * 24.5, "readout": 2 * 3 * 2 * 16 * 384}
  train = said["flops"]["per_token"]["train"]["model"]
  want |= {"adapters": 3 * 3 * 2 * adapters, "routing": 0.0}
  assert train == want | {"total": sum(want.values())}
  assert said["flops"]["per_step"]["model"] == 128 * train["total"]
  assert said["flops"]["run"]["model"] == 12 * 128 * train["total"]
  assert said["advice"] is None
  assert said["memory"]["limit"] is None  # CPUs don't report it
  assert sorted(os.listdir(elsewhere)) == ["here"]
  assert os.listdir(elsewhere / "here") == []


@pytest.mark.parametrize(("scheme", "bytes_per_weight"), [("int8", 1), ("nf4", 0.5 + 4 / 64)])
def test_a_quantised_model_of_1b_by_hand(scheme, bytes_per_weight):
  """Parameters with their scales, and moments of the adapters and the new rows alone; no program is compiled."""
  config = configs.default()
  config.method.update(name="cyb", pauses=3, dont_know="token")
  config.decoder.update(preset="llama_1b", scan_layers=True)
  config.precision.params = scheme
  config = configs.freeze(lora(config, lora_rank=8, lora_targets="query,value"))
  found = estimate.outline(config, None)
  state = found.strategy.abstract()
  memory = estimate.memory_of(state, found.method, found.batch, 8, None, jax.devices()[0])
  matrices = 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192)
  # int8 has one scale for each output: 4 bytes.
  scales = 16 * 4 * (2048 + 512 + 512 + 2048 + 8192 + 8192 + 2048) if scheme == "int8" else 0
  others = 2 * (128256 * 2048 + 33 * 2048)  # the table and the norms, bfloat16
  trained = 4 * (16 * 8 * ((2048 + 2048) + (2048 + 512)) + 3 * 2048 + 2048)  # adapters, rows of pauses and <don't know>
  constants = memory["parameters"] - (matrices * bytes_per_weight + scales + others + trained)
  assert 0 <= constants <= 8
  # Two moments, and the counters of Adam and of the schedule.
  assert memory["moments"] == 2 * trained + 8
  assert memory["gradients"] == trained
  assert memory["parameters"] < 2**30 * (1.5 if scheme == "int8" else 1.1)


@pytest.mark.parametrize("weights", [pytest.param("all", marks=pytest.mark.slow), "lora"])
def test_executed_operations_equal_xlas_count(weights):
  """Within 5%: the entire step, including norms, softmax and optimizer, which aren't counted by hand."""
  config = tiny_config(pauses=2)
  config.decoder.update(d_model=128, num_heads=2, head_size=64, mlp_size=384, vocab_size=512)
  config.data.sequence_length = 64
  config = configs.freeze(lora(config, lora_rank=32, lora_targets="query,key,value,out,gate,up,down", weights=weights))
  method, strategy = build(config)
  counted = strategy.compile_abstract(training.abstract_batch(config, 8)).cost_analysis()["flops"] * len(jax.devices())
  assert 8 * 64 * method.costs(64).train_executed.total == pytest.approx(counted, rel=0.05)


def test_the_program(elsewhere):
  config = cli.write_config(elsewhere)
  said, _ = cli.run("train", f"--config={config}", "--dry_run", "--config.parallelism.strategy=pmap", cwd=elsewhere)
  assert json.loads(json.dumps(said)) == said
  assert (said["method"], said["weights"], said["strategy"], said["devices"]) == ("cyb", "all", "pmap", 1)
  assert said["parameters"]["total"] == said["parameters"]["trained"] == 8800
  assert said["memory"]["parameters"] == 4 * 8800
  assert said["timing"]["compile_seconds"] > 0
  assert sorted(os.listdir(elsewhere)) == ["here", "tiny.py"]
  assert "batch_size" in cli.complaint("train", f"--config={config}", "--dry_run", "--config.optimizer.accumulate=3")


def test_source_of_the_vocabulary(elsewhere):
  config = tiny_config()
  config.data.update(tokenizer="sentencepiece:300", task="text_files", options="pattern=nothing*.txt")

  def vocabulary():
    frozen = configs.freeze(config)
    return training.vocabulary(frozen, training.find_store(frozen))

  assert vocabulary() == (300, "data.tokenizer = 'sentencepiece:300'")
  config.data.tokenizer = "gemma.model"
  size, source = vocabulary()
  assert size is None
  assert source == "the decoder's own rows, because data.tokenizer = 'gemma.model' can't be read"
  config.decoder.vocab_size = 640
  assert vocabulary() == (None, "decoder.vocab_size, because data.tokenizer = 'gemma.model' can't be read")
  store = data.prepare("synthetic_sums", "bytes", elsewhere / "store", options={"documents": 40})
  config.data.update(store=str(store.path), tokenizer="bytes", task="synthetic_sums", options="")
  assert vocabulary() == (257, f"the token store in {store.path}")


def test_steps_of_epochs_are_known_if_the_data_is_prepared():
  config = tiny_config()
  config.data.update(task="synthetic_sums", options="documents=40")
  config.train.update(steps=0, epochs=2.0)
  frozen = configs.freeze(config)
  assert training.find_store(frozen) is None
  assert estimate._steps(frozen, None) == (None, None)
  prepared = training.open_store(frozen)
  found = training.find_store(frozen)
  assert found.path == prepared.path
  steps, source = estimate._steps(frozen, found)
  # The number of steps of two passes over all windows.
  assert steps == -(-2 * found.num_windows("train", 16) // 8)
  assert str(found.path) in source


def test_advice_lists_changes_that_help():
  config = tuned()
  config.precision.activations = "bfloat16"
  config = configs.freeze(config)
  memory = {"parameters": 60, "moments": 10, "gradients": 5, "temporaries": 20, "peak": 100, "limit": 99}
  said = estimate._advice(config, memory, 4, refused=False)
  assert said.startswith("the step needs 100 bytes and each device has 99; ")
  # Most of the memory is parameters, most of which are already frozen.
  assert said.index("precision.params = 'bfloat16'") < said.index("parallelism.fsdp = 4") < said.index("decoder.remat")
  assert "tuning.weights" not in said
  with_float32 = with_part(config, "precision", activations="float32")
  assert "precision.params" not in estimate._advice(with_float32, memory, 4, refused=False)
  whole = configs.freeze(tiny_config())
  said = estimate._advice(whole, memory | {"parameters": 10, "temporaries": 75}, 1, refused=False)
  assert (
    said.index("decoder.remat") < said.index("optimizer.accumulate above 1") < said.index("tuning.weights = 'lora'")
  )
  assert "fsdp" not in said
  assert estimate._advice(whole, memory | {"limit": 100}, 1, refused=False) is None
  assert estimate._advice(whole, memory | {"limit": None}, 1, refused=False) is None
  assert estimate._advice(whole, memory | {"peak": None}, 1, refused=True).startswith("the step doesn't compile")


def test_a_batch_that_cannot_be_split():
  config = tiny_config()
  config.data.batch_size = 12
  with pytest.raises(InputError, match=r"data\.batch_size: 12 is not divisible by 8 devices"):
    training.dry_run(configs.freeze(config))


@pytest.mark.parametrize(
  ("field", "message"),
  [
    ("data.task=hf:x", "data.task='hf:x': unknown; did you mean 'hf'?"),
    ("data.options=sourse=tfds", "data.options.sourse: synthetic_lookups has no such option"),
    ("data.options=documents=many", "data.options.documents='many': give a whole number"),
    ("data.tokenizer=sentencepiece:many", "data.tokenizer='sentencepiece:many': give a number of pieces"),
  ],
)
def test_names_of_the_data_are_checked_before_compilation(tmp_path, monkeypatch, field, message):
  changed = command_line.override(tiny_config(pauses=1), [field])
  monkeypatch.setattr("cyb_jax.training.estimate._compiled", lambda run: pytest.fail("it is compiled"))
  config = configs.freeze(changed)
  for check in (
    lambda: resolve(changed),
    lambda: training.dry_run(config),
    lambda: training.train(config, tmp_path / "run"),
  ):
    with pytest.raises(InputError) as caught:
      check()
    assert message in str(caught.value)
  assert not (tmp_path / "run").exists()
