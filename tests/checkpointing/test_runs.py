"""Complete runs: the work directory, bit-exact resume after kills and signals, evaluation, bad input."""

import json
import os
import pathlib
import shutil
import signal
import sys
import time
import types

import cli
import jax
import numpy as np
import pytest
from models import assert_trees_equal, tiny_config

import cyb_jax
from cyb_jax import configs, data, storage, training
from cyb_jax.checkpointing.workdir import checkpoints_in, read_config
from cyb_jax.errors import DivergedError, InputError, Interrupted
from cyb_jax.interop import pretrained

KEYS = {
  "method", "step", "split", "loss", "perplexity", "mean_pauses", "latency", "slot_perplexity", "oracle_perplexity",
  "hard_perplexity", "calibration", "tokens", "slots", "flops", "train_tokens", "train_slots", "train_flops",
}  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "cyb"
  record = training.train(configs.freeze(tiny_config(pauses=2)), folder)
  assert record == json.loads((folder / "evaluation.json").read_text())
  return folder


def rows(workdir, *, timing=False):
  lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if timing or k != "timing"} for line in lines]


def test_the_folder(workdir):
  assert {p.name for p in workdir.iterdir()} == {
    "config.json", "tokenizer", "metrics.jsonl", "checkpoints", "evaluation.json", ".lock",
  }  # fmt: skip
  metrics = rows(workdir)
  assert [r["step"] for r in metrics if r["split"] == "train"] == [3, 6, 9, 12]
  assert [r["step"] for r in metrics if r["split"] == "validation"] == [6, 12]
  # The newest two, including the one of the best validation.
  assert checkpoints_in(workdir, read_only=True).steps() == [10, 12]


def test_host_0_checks_a_checkpoint_for_all_hosts(workdir, monkeypatch):
  told = []
  first = types.SimpleNamespace(index=0, count=2, broadcast=lambda step: told.append(step) or step)
  run = pretrained.load_run(workdir, "best", cluster=first)
  assert told == [run.step]
  monkeypatch.setattr("cyb_jax.checkpointing.integrity.damage", None)  # another host reads no file to check it
  second = types.SimpleNamespace(index=1, count=2, broadcast=lambda _: run.step)
  other = pretrained.load_run(workdir, "best", cluster=second)
  assert other.step == run.step
  assert_trees_equal(other.params, run.params)


def test_evaluation_has_all_keys(workdir):
  record = json.loads((workdir / "evaluation.json").read_text())
  assert KEYS <= set(record)
  store = training.open_store(configs.freeze(read_config(workdir)))
  # The entire split, once: every token except the first end token is a target.
  assert record["tokens"] == store.num_tokens("validation") - 1
  assert record["slots"] == 3 * 16 * store.num_windows("validation", 16)
  assert record["train_tokens"] == 12 * 8 * 16
  assert record["train_slots"] == 3 * record["train_tokens"]
  assert len(record["latency"]) == len(record["slot_perplexity"]) == 3
  assert sum(record["latency"]) == pytest.approx(1.0)
  assert len(record["calibration"]) == 2
  assert record["oracle_perplexity"] <= min(record["slot_perplexity"])
  assert record["perplexity"] <= max(record["slot_perplexity"])
  nats = np.log(record["perplexity"]) * record["tokens"]
  assert record["bits_per_byte"] == pytest.approx(nats / np.log(2) / store.num_bytes("validation"))


def test_load(workdir):
  run = cyb_jax.load(workdir)
  assert run.step == 12
  assert run.tokenizer.decode(run.tokenizer.encode("a=1")) == "a=1"
  tokens = np.array([run.tokenizer.encode("b=3 q=7")])
  batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
  reading = jax.jit(run.method.evaluate)(run.params, batch)
  assert reading.loss.shape == (1, 6)
  assert cyb_jax.load(workdir, 10).step == 10
  assert cyb_jax.load(workdir, "best").step == 12


@pytest.mark.slow
def test_evaluation_does_not_depend_on_the_batch_size(workdir):
  first = json.loads((workdir / "evaluation.json").read_text())
  copy = workdir.parent / "copy"
  shutil.copytree(workdir, copy)
  again, _ = cli.run("evaluate", f"--workdir={copy}", "--batch_size=3")
  assert again["tokens"] == first["tokens"]
  for key in ("loss", "perplexity", "mean_pauses", "hard_perplexity"):
    assert again[key] == pytest.approx(first[key], rel=1e-5)
  twice, _ = cli.run("evaluate", f"--workdir={copy}", "--batch_size=3")
  assert twice == again
  part, _ = cli.run("evaluate", f"--workdir={copy}", "--limit=5", "--split=test", "--omega=1:1:1", "--checkpoint=10")
  assert part["tokens"] == 5 * 16
  assert part["step"] == 10
  assert part["split"] == "test"
  assert part["bits_per_byte"] is None
  assert (part["limit"], part["omega"]) == (5, [1.0, 1.0, 1.0])
  assert (first["limit"], first["omega"]) == (None, None)


def test_a_finished_run_repeats_nothing(workdir):
  before = (workdir / "metrics.jsonl").read_bytes()
  record = training.train(configs.freeze(tiny_config(pauses=2)), workdir)
  assert record == json.loads((workdir / "evaluation.json").read_text())
  assert (workdir / "metrics.jsonl").read_bytes() == before


def final_state(workdir):
  checkpoints = checkpoints_in(workdir, read_only=True)
  config = configs.freeze(read_config(workdir))
  from cyb_jax.partitioning.mesh import make_mesh

  mesh = make_mesh(config.parallelism, jax.devices()[:1])
  method = config.build_method(257)
  optimizer = training.make_optimizer(config.optimizer, 40, 16)
  strategy = training.build_strategy(config, method, optimizer, mesh)
  return checkpoints.restore(checkpoints.find("last"), strategy.abstract())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  folder = tmp_path_factory.mktemp("undisturbed")
  record, err = cli.run("train", f"--config={cli.write_config(folder)}", f"--workdir={folder}/run")
  # 257 bytes need 384 rows of 16; a layer of 2560 and three norms; two pauses and <don't know>. Three arrays of f32.
  assert "cyb: 8,800 parameters, 0.1 MiB of parameters and optimizer state per device; 40 steps of 8 x 16 tokens" in err
  return folder / "run", record


def wait_for_rows(workdir, count, process):
  path = pathlib.Path(workdir) / "metrics.jsonl"
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline:
    if path.exists() and path.read_text().count("\n") >= count:
      return
    assert process.poll() is None, process.stderr.read()[-2000:]
    time.sleep(0.005)
  raise AssertionError("no metrics appeared")


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow)]
)
def test_stop_and_resume_is_bit_exact(tmp_path, undisturbed, number, code):
  flags = f"--config={cli.write_config(tmp_path)}", f"--workdir={tmp_path}/run"
  process = cli.start("train", *flags)
  wait_for_rows(tmp_path / "run", 5, process)
  process.send_signal(number)
  process.communicate(timeout=120)
  assert process.returncode == code
  stopped_at = checkpoints_in(tmp_path / "run", read_only=True).steps()
  record, log = cli.run("train", *flags)
  if code == 75:
    assert stopped_at
    assert f"restored step {stopped_at[-1]}" in log
  folder, expected = undisturbed
  assert record == expected
  assert rows(tmp_path / "run") == rows(folder)
  ours, theirs = final_state(tmp_path / "run"), final_state(folder)
  assert ours.step == theirs.step == 40
  assert ours.meta == theirs.meta
  assert_trees_equal(ours.state, theirs.state)


# Replaces the compiler: a C function that takes minutes and is not interrupted by signals.
_COMPILES_LONG = """
import hashlib, pathlib
from cyb_jax.training import strategies

def step(self, state, batch):
  pathlib.Path({marker!r}).touch()
  hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000_000)

strategies.JitStrategy.step = step
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_compilation_ends_immediately(tmp_path, number):
  path, marker = cli.write_config(tmp_path), tmp_path / "compiling"
  path.write_text(path.read_text() + _COMPILES_LONG.format(marker=str(marker)))
  process = cli.Forked("train", f"--config={path}", f"--workdir={tmp_path}/run")
  deadline = time.monotonic() + 120
  while not marker.exists():
    assert time.monotonic() < deadline, process.texts()
    time.sleep(0.01)
  process.kill(number)
  start = time.monotonic()
  code, out, err = process.wait(60)
  assert (code, out) == (75, "")
  assert time.monotonic() - start < 30
  assert f"signal {number}: ended before the first step was done, so nothing is lost" in err
  assert "Traceback" not in err
  assert checkpoints_in(tmp_path / "run", read_only=True).steps() == []


def test_a_signal_during_the_checks_ends_immediately(tmp_path, monkeypatch):
  def interrupted(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)

  monkeypatch.setattr("cyb_jax.training.trainer.preflight", interrupted)
  with pytest.raises(Interrupted, match="nothing is lost"):
    training.train(configs.freeze(tiny_config(pauses=2)), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_jit_and_pmap_continue_each_others_runs(tmp_path):
  """The result of a run does not depend on the strategy, so one strategy continues a checkpoint of the other."""
  config = tiny_config(pauses=1)
  config.train.update(steps=10, checkpoint_every=5, eval_every=0)
  whole = training.train(configs.freeze(config), tmp_path / "jit")
  shutil.copytree(tmp_path / "jit", tmp_path / "both")
  shutil.rmtree(tmp_path / "both" / "checkpoints" / "10")
  config.parallelism.strategy = "pmap"
  both = training.train(configs.freeze(config), tmp_path / "both")
  assert both["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-4)


@pytest.mark.parametrize(
  ("method", "undefined"),
  [
    ({"name": "baseline"}, ("hard_perplexity", "calibration", "training_omega")),
    pytest.param(
      {"name": "tbys", "pauses": 2}, ("hard_perplexity", "calibration", "training_omega"), marks=pytest.mark.slow
    ),
    ({"pauses": 1, "omega": "1:1"}, ()),
    pytest.param({"pauses": 1, "loss": "va", "rho": "3:1"}, ("training_omega",), marks=pytest.mark.slow),
    pytest.param(
      {"pauses": 1, "loss": "dp", "rho": "0:1", "alpha": 0.1, "dont_know": "unit"},
      ("training_omega",),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_every_method_trains_and_evaluates(tmp_path, method, undefined):
  config = tiny_config(**method)
  config.train.update(steps=2, eval_every=0, checkpoint_every=0)
  record = training.train(configs.freeze(config), tmp_path / "run")
  assert KEYS <= set(record)
  for key in ("hard_perplexity", "calibration", "training_omega"):
    assert (record[key] is None) is (key in undefined), key
  assert len(record["latency"]) == method.get("pauses", 0) + 1
  if method.get("name") == "tbys":
    assert record["latency"] == [0.0, 0.0, 1.0]
    refusal = cli.complaint("evaluate", f"--workdir={tmp_path}/run", "--omega=1:1:1")
    assert "method 'tbys' has no stopping decision" in refusal
    assert record["slot_perplexity"][-1] == pytest.approx(record["perplexity"], rel=1e-5)
  if method.get("name") == "baseline":
    assert record["perplexity"] == pytest.approx(record["loss_perplexity"], rel=1e-5)


@pytest.mark.slow
def test_document_mask_and_accumulation_train(tmp_path):
  config = tiny_config(pauses=1)
  config.data.update(document_mask=True, batch_size=16)
  config.optimizer.accumulate = 2
  config.train.update(steps=2, eval_every=0)
  masked = training.train(configs.freeze(config), tmp_path / "masked")
  config.data.document_mask = False
  plain = training.train(configs.freeze(config), tmp_path / "plain")
  assert masked["perplexity"] != plain["perplexity"]


def test_zero_steps_evaluate_the_initial_parameters(tmp_path, workdir):
  config = tiny_config(pauses=2)
  config.train.update(steps=0, epochs=0.0)
  config.init_from = str(workdir)
  record = training.train(configs.freeze(config), tmp_path / "run")
  trained = json.loads((workdir / "evaluation.json").read_text())
  assert record["step"] == 0
  assert training.train(configs.freeze(config), tmp_path / "run") == record
  assert len(rows(tmp_path / "run")) == 1
  assert record["perplexity"] == pytest.approx(trained["perplexity"], rel=1e-6)


def test_init_from_keeps_new_parameters(tmp_path, workdir):
  config = tiny_config(pauses=1)
  config.train.update(steps=0, epochs=0.0)
  config.init_from = str(workdir)
  training.train(configs.freeze(config), tmp_path / "run")
  ours, theirs = cyb_jax.load(tmp_path / "run"), cyb_jax.load(workdir)
  assert_trees_equal(ours.params["decoder"], theirs.params["decoder"])
  assert ours.params["pause_input"].shape == (1, 16)
  config.decoder.mlp_size = 48
  with pytest.raises(InputError, match=r"init_from: .* has decoder.mlp_size = 32, but this config has 48"):
    training.train(configs.freeze(config), tmp_path / "other")
  config.decoder.update(mlp_size=32, rope_base=7.0)
  with pytest.raises(InputError, match=r"init_from: .* has decoder.rope_base = 10000.0, but this config has 7.0"):
    training.train(configs.freeze(config), tmp_path / "other")
  config.init_from = str(tmp_path / "nowhere")
  with pytest.raises(InputError, match=r"nowhere: no such folder or file"):
    training.train(configs.freeze(config), tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_a_signal_during_validation_saves(tmp_path, monkeypatch):
  from cyb_jax.training import trainer

  whole = trainer.Trainer.evaluate

  def interrupted(self, run, *arguments, **options):
    if run.step == 6:
      os.kill(os.getpid(), signal.SIGTERM)
    return whole(self, run, *arguments, **options)

  monkeypatch.setattr(trainer.Trainer, "evaluate", interrupted)
  config = tiny_config(pauses=1)
  config.train.checkpoint_every = 0
  with pytest.raises(Interrupted, match="saved at step 6 of 12"):
    training.train(configs.freeze(config), tmp_path / "run")
  assert checkpoints_in(tmp_path / "run", read_only=True).steps() == [6]


@pytest.mark.slow
def test_nonfinite_numbers_stop_the_run(tmp_path, caplog):
  config = tiny_config(pauses=1)
  config.optimizer.update(learning_rate=1e30, clip_norm=0.0, warmup_fraction=0.0, schedule="constant")
  config.train.update(eval_every=0, checkpoint_every=1, max_skipped=4)
  with pytest.raises(DivergedError, match=r"step 5: the loss or the gradient of the last 4 steps isn't finite"):
    training.train(configs.freeze(config), tmp_path / "run")
  assert "steps were not applied, because their loss or gradient isn't finite: 2, 3" in caplog.text
  assert [(row["skipped"], row["skipped_steps"]) for row in rows(tmp_path / "run")] == [(2, [2, 3])]
  # Older checkpoints are not replaced.
  assert checkpoints_in(tmp_path / "run", read_only=True).steps() == [1]


@pytest.mark.slow
def test_a_diverging_run_ends_with_one_line(tmp_path):
  rate = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=0.0", "--config.train.max_skipped=2"]
  result, err = cli.run("train", f"--config={cli.write_config(tmp_path)}", f"--workdir={tmp_path}/run", *rate, expect=1)
  assert result is None
  assert "Traceback" not in err
  assert "train.max_skipped = 2" in err.splitlines()[-1]


@pytest.mark.slow
def test_the_best_checkpoint_is_selected_on_equal_windows(tmp_path):
  """Losses over a few windows during training and over all windows at the end are not comparable."""
  config = tiny_config(pauses=1)
  config.train.update(steps=10, eval_every=5, eval_limit=1, checkpoint_every=5)
  training.train(configs.freeze(config), tmp_path / "run")
  checkpoints = checkpoints_in(tmp_path / "run", read_only=True)
  limited = {
    step: cli.run("evaluate", f"--workdir={tmp_path}/run", "--limit=1", f"--checkpoint={step}")[0]["loss"]
    for step in (5, 10)
  }
  assert checkpoints.find("best") == min(limited, key=limited.get)


def test_removed_metrics_are_not_an_error(tmp_path):
  config = tiny_config(pauses=1)
  config.train.update(steps=2, eval_every=0, last_eval_limit=3)
  first = training.train(configs.freeze(config), tmp_path / "run")
  assert (first["limit"], first["tokens"]) == (3, 48)
  (tmp_path / "run" / "metrics.jsonl").unlink()
  assert training.train(configs.freeze(config), tmp_path / "run")["perplexity"] == first["perplexity"]


def test_profile(tmp_path):
  config = tiny_config(pauses=1)
  config.train.update(eval_every=0, checkpoint_every=0)
  training.train(configs.freeze(config), tmp_path / "run", profile=5)
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_collapse_causes_a_warning(tmp_path, monkeypatch):
  from cyb_jax.training import hooks

  warnings = []
  monkeypatch.setattr(hooks.logging, "warning", lambda text, *args: warnings.append(text % args))
  config = tiny_config(pauses=1, dont_know_prior=0.999)
  config.train.update(steps=4, log_every=1, eval_every=0)
  training.train(configs.freeze(config), tmp_path / "run")
  (warning,) = [w for w in warnings if "collapsed" in w]
  assert "after 1 pauses" in warning


# Bad input: one clear error, and nothing is written.


def refused(tmp_path, message, **changes):
  config = tiny_config(pauses=1)
  for path, value in changes.items():
    part, _, name = path.partition("__")
    config[part][name] = value
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
  with pytest.raises(InputError, match=message) as info:
    training.train(configs.freeze(config), tmp_path / "run")
  assert "\n" not in str(info.value)
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


@pytest.fixture
def store(tmp_path):
  return data.prepare("synthetic_lookups", "bytes", tmp_path / "store", options={"documents": 64}).path


def test_another_tokenizer(tmp_path, store):
  refused(tmp_path, r"data.tokenizer: 'sentencepiece:512' .* was prepared with", data__store=str(store),
          data__tokenizer="sentencepiece:512")  # fmt: skip


def test_another_task(tmp_path, store):
  refused(tmp_path, r"data.task: 'synthetic_sums', but .*'synthetic_lookups'", data__store=str(store),
          data__task="synthetic_sums")  # fmt: skip


def test_other_options(tmp_path, store):
  refused(tmp_path, r"data.options: documents=65, but the token store .* with documents=64", data__store=str(store),
          data__options="documents=65")  # fmt: skip


def test_truncated_and_altered_stores(tmp_path, store):
  shard = next(store.glob("train-*.tokens"))
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-2])
  refused(tmp_path, r"data.store: .*train-00000.tokens is \d+ bytes, not", data__store=str(store))
  shard.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
  refused(tmp_path, r"data.store: .*train-00000.tokens was altered", data__store=str(store))


def test_no_validation_split(tmp_path):
  for i in range(3):
    (tmp_path / f"{i}.txt").write_text(f"{i} words " * 100)
  refused(tmp_path, r"data.task: 'text_files' has no document in the validation split.*train has 3",
    data__task="text_files",
          data__options=f"pattern={tmp_path}/*.txt")  # fmt: skip


def test_batch_larger_than_an_epoch(tmp_path, store):
  refused(tmp_path, r"data.batch_size=8000: an epoch has only \d+ windows", data__store=str(store),
          data__batch_size=8000)  # fmt: skip


def test_a_workdir_that_is_not_a_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  monkeypatch.setattr(storage.bucket, "file_system", storage.bucket.file_system.__wrapped__)
  for name, message in (
    ("s3://bucket/run", "s3://bucket/run: unsupported URL; give a path on a disk or gs://bucket/folder"),
    ("gs://bucket/run", r"gs://: the package gcsfs is not installed; run pip install 'cyb_jax\[gcs\]'"),
  ):
    with pytest.raises(InputError, match=message):
      training.train(configs.freeze(tiny_config()), name)
  assert not list(tmp_path.iterdir())


def test_empty_task(tmp_path):
  (tmp_path / "empty.txt").write_text("")
  refused(tmp_path, r"data.task='text_files': no text", data__task="text_files",
          data__options=f"pattern={tmp_path}/*.txt")  # fmt: skip


def test_sequence_longer_than_the_data(tmp_path, store):
  refused(tmp_path, r"data.sequence_length=1000000: .* only \d+ tokens", data__store=str(store),
          data__sequence_length=10**6)  # fmt: skip


def test_batch_not_divisible_by_devices(tmp_path, store):
  refused(tmp_path, r"data.batch_size: 12 is not divisible by 8 devices; give 8 or 16", data__store=str(store),
          data__batch_size=12)  # fmt: skip


def test_workdir_of_another_config(workdir):
  config = tiny_config(pauses=2)
  config.optimizer.learning_rate = 0.5
  before = (workdir / "config.json").read_bytes()
  with pytest.raises(InputError, match=r"workdir: .* another config \(optimizer.learning_rate: 0.002 -> 0.5\)"):
    training.train(configs.freeze(config), workdir)
  assert (workdir / "config.json").read_bytes() == before


def test_no_write_permission(tmp_path):
  # A folder in which root can't write either.
  if not pathlib.Path("/proc").is_dir():
    pytest.skip("needs /proc")
  with pytest.raises(InputError, match=r"workdir: can't write in /proc"):
    training.train(configs.freeze(tiny_config()), "/proc/nowhere/run")
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match=r"workdir: .*file is a file; give a folder"):
    training.train(configs.freeze(tiny_config()), tmp_path / "file" / "run")


def test_store_of_another_run(tmp_path, store):
  config = tiny_config(pauses=1)
  config.data.store = str(store)
  config.train.update(steps=1, eval_every=0)
  training.train(configs.freeze(config), tmp_path / "run")
  shutil.rmtree(store)
  data.prepare("synthetic_lookups", "bytes", store, options={"documents": 65})
  before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
  with pytest.raises(InputError, match=r"data.store: .* has fingerprint"):
    training.train(configs.freeze(config), tmp_path / "run")
  assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def text_config(pattern, **data_fields):
  config = tiny_config(pauses=1)
  fields = {"task": "text_files", "options": f"pattern={pattern},unit=line", "tokenizer": "sentencepiece:300"}
  config.data.update(fields | data_fields)
  config.train.update(steps=2, eval_every=0)
  return config


WORDS = """
sun moon rain river stone cloud tree winter summer garden window paper kitchen morning evening silver
""".split()  # noqa: SIM905


def write_text(path, seed):
  words = np.random.default_rng(seed).choice(WORDS, (400, 9))
  path.write_text("\n".join(f"{i} " + " ".join(row) for i, row in enumerate(words)))


@pytest.mark.slow
def test_a_run_does_not_need_its_source(tmp_path):
  """A changed text or its deletion does not affect a run: it continues and is evaluated with its store."""
  text = tmp_path / "a.txt"
  write_text(text, 0)
  config = text_config(text)
  first = training.train(configs.freeze(config), tmp_path / "run")
  model = (tmp_path / "run" / "tokenizer" / "tokenizer.model").read_bytes()
  write_text(text, 1)
  assert training.train(configs.freeze(config), tmp_path / "run") == first
  text.unlink()
  record, _ = cli.run("evaluate", f"--workdir={tmp_path}/run")
  assert record["perplexity"] == pytest.approx(first["perplexity"], rel=1e-5)
  assert (tmp_path / "run" / "tokenizer" / "tokenizer.model").read_bytes() == model


def test_init_from_another_tokenizer(tmp_path):
  for name, seed in (("a", 0), ("b", 1)):
    write_text(tmp_path / f"{name}.txt", seed)
  training.train(configs.freeze(text_config(tmp_path / "a.txt")), tmp_path / "a")
  config = text_config(tmp_path / "b.txt")
  config.init_from = str(tmp_path / "a")
  with pytest.raises(InputError, match=r"init_from: .* was trained with another tokenizer"):
    training.train(configs.freeze(config), tmp_path / "b")
  assert not (tmp_path / "b").exists()


def test_programs_report_bad_input_in_one_line(tmp_path, workdir):
  config = cli.write_config(tmp_path)
  run = f"--workdir={tmp_path}/run"
  assert "--config: not given" in cli.complaint("train", run)
  assert "--workdir: not given" in cli.complaint("train", f"--config={config}")
  assert "--config.method.pausess: unknown field; did you mean method.pauses?" in cli.complaint(
    "train", f"--config={config}", run, "--config.method.pausess=1"
  )
  assert "--config.nothing.x: unknown field" in cli.complaint(
    "train", f"--config={config}", run, "--config.nothing.x=1"
  )
  assert "nothing.py" in cli.complaint("train", "--config=nothing.py", run, "--config.train.steps=1")
  assert "nothing.py" in cli.complaint("train", "--config=nothing.py", run)
  # From another folder, the config is found in both forms; the error is about the missing flag.
  for flags in (("--config=experiments/quickstart.py",), ("--config", "experiments/quickstart.py:tbys3")):
    assert "--workdir: not given" in cli.complaint("train", *flags, cwd=tmp_path)
  broken = tmp_path / "broken.py"
  broken.write_text("def get_config():\n  return 1 / 0\n")
  assert "division by zero" in cli.complaint("train", f"--config={broken}", run)
  assert "setting 'app' is unknown; did you mean 'ap'?" in cli.complaint(
    "train", "--config=experiments/quickstart.py:app", run
  )
  assert "method.pauses: -1" in cli.complaint("train", f"--config={config}", run, "--config.method.pauses=-1")
  assert "arguments: 'extra' is unexpected" in cli.complaint("train", f"--config={config}", run, "extra")
  assert not (tmp_path / "run").exists()
  assert "contains no run" in cli.complaint("evaluate", f"--workdir={tmp_path}/nothing")
  assert "--checkpoint: 'newest'" in cli.complaint("evaluate", f"--workdir={workdir}", "--checkpoint=newest")
  assert "checkpoint: there is no checkpoint 11; give one of 10, 12" in cli.complaint(
    "evaluate", f"--workdir={workdir}", "--checkpoint=11"
  )
  assert "--omega: '1:1' is invalid for 3 slots" in cli.complaint("evaluate", f"--workdir={workdir}", "--omega=1:1")
  assert "split: 'tset' is not in" in cli.complaint("evaluate", f"--workdir={workdir}", "--split=tset")
  assert f"--store: {cli.ROOT}/nowhere does not exist" in cli.complaint(
    "evaluate", f"--workdir={workdir}", "--store=nowhere"
  )
  assert "--limit: -1 must not be negative" in cli.complaint("evaluate", f"--workdir={workdir}", "--limit=-1")


def test_an_unsupported_kernel_is_rejected_before_anything_is_written(tmp_path):
  config = tiny_config()
  config.decoder.attention = "splash"
  with pytest.raises(InputError, match=r"decoder.attention: 'splash' needs a TPU, this program is for 'cpu'"):
    training.train(configs.freeze(config), tmp_path / "run")
  assert not (tmp_path / "run").exists()
