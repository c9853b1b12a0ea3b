"""The benchmarks run, print the requested values, and reject unknown values."""

import json
import subprocess
import sys

import cli
import pytest
from models import tiny_config

from cyb_jax import configs, data
from cyb_jax.benchmarks import decode, growth, timing, variants
from cyb_jax.benchmarks import train as steps
from cyb_jax.errors import InputError
from cyb_jax.studies import settings


def test_readout():
  result, _ = cli.run(
    "benchmark", "readout", "--slots=4096", "--width=16", "--vocabulary=1001", "--timed_slots=64", "--repeats=1"
  )
  assert result["temporary_bytes"] > 0
  assert result["dense_temporary_gib"] > 4096 * 1001 * 4 / 2**30
  assert result["timing"]["chunked_seconds"] > 0
  assert result["timing"]["frozen_chunked_seconds"] > 0


def test_attention():
  result, _ = cli.run(
    "benchmark", "attention", "--tokens=40", "--num_slots=4", "--heads=2", "--kv_heads=1", "--head_size=8",
    "--implementations=auto,xla", "--repeats=1",
  )  # fmt: skip
  kinds = ["none", "visible", "hidden"]
  assert [row["pauses"] for row in result["rows"]] == 2 * kinds
  assert [row["slots"] for row in result["rows"]] == 2 * [40, 160, 160]
  # Rows of 40 slots are too short for blocks.
  assert [row["implementation"] for row in result["rows"]] == ["xla", "blocks", "blocks", "xla", "xla", "xla"]
  _, visible, hidden = result["rows"][3:]
  # XLA holds a square of attention weights for each head, or with hidden pauses only the keys that are seen.
  assert visible["temporary_bytes"] > 2 * 160**2 * 4 > hidden["temporary_bytes"] / 2
  for row, times in zip(result["rows"], result["timing"]["rows"], strict=True):
    assert 0 < times["forward_seconds"]
    assert (times["visible_over_this"] == 1) is (row["pauses"] == "visible")


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--tokens=0", "--tokens: 0 must be at least 1"),
    ("--kv_heads=5", "--kv_heads: 5 must divide --heads=12"),
    ("--dtype=int8", "--dtype: 'int8' is not one of"),
    ("--implementations=flash", "'flash' is not one of auto, xla, blocks, cudnn, splash"),
    ("--implementations=cudnn", "'cudnn' needs an NVIDIA GPU, this program is for 'cpu'"),
  ],
)
def test_attention_refuses(flag, message):
  assert message in cli.complaint("benchmark", "attention", flag)


@pytest.mark.slow
def test_data():
  result, _ = cli.run("benchmark", "data", "--sequence_length=16", "--batch_size=4", "--repeats=1")
  assert result["timing"]["tokens_per_second"] > 0


@pytest.mark.slow
def test_train(tmp_path):
  """Runs without the packages that only data and TensorBoard need."""
  config = cli.write_config(tmp_path)
  variant = "baseline"
  arguments = [
    "train", f"--config={config}", f"--variant={variant}", "--variant=parallelism.strategy=pmap", "--steps=2",
    "--blocks=1", "--vocabulary=100", "--peak_tflops=0.5", f"--profile={tmp_path}/trace", "--config.data.batch_size=4",
  ]  # fmt: skip
  code = (
    "import sys\n"
    "for name in ('tensorflow', 'seqio', 'tensorflow_datasets', 'sentencepiece', 'tensorboard'):\n"
    "  sys.modules[name] = None\n"
    f"sys.argv[1:] = {arguments!r}\n"
    "from cyb_jax.cli import benchmark\n"
    "benchmark.run()\n"
  )
  env = cli.environment() | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
  done = subprocess.run(
    [sys.executable, "-c", code], env=env, cwd=cli.ROOT, text=True, capture_output=True, check=False
  )
  assert done.returncode == 0, done.stderr[-3000:]
  result = json.loads(done.stdout)
  assert not any(tmp_path.glob("cache/*"))  # compilation was timed
  assert (result["config"], result["overrides"]) == (str(config), {"data.batch_size": 4})
  assert [row["variant"] for row in result["rows"]] == ["", variant, "parallelism.strategy=pmap"]
  base, baseline, _ = result["rows"]
  # D = 16, one layer, 2 heads of 8, F = 32 gated: 4 D N H + 3 D F = 2560 parameters; rows for 100 entries: 128.
  # T = 16, W = 3: S = 48, 24.5 keys on average, 4 N H = 64 operations each; readout 2 D V = 4096.
  assert base["model_flops_per_token"] == 3 * 3 * (2 * 2560 + 64 * 24.5 + 4096)
  assert base["executed_flops_per_token"] == 3 * 3 * (2 * 2560 + 64 * 48 + 4096)
  assert baseline["model_flops_per_token"] == 3 * (2 * 2560 + 64 * 8.5 + 4096)
  # Two layer norms and the final one; <don't know> and two pauses.
  assert baseline["parameters"] == 128 * 16 + 2560 + 3 * 16
  assert base["parameters"] == baseline["parameters"] + 3 * 16
  assert [row["slots_per_token"] for row in result["rows"]] == [3, 1, 3]
  # With two moments each, and the counters of Adam and the schedule.
  assert [row["state_bytes"] for row in result["rows"]] == [12 * row["parameters"] + 8 for row in result["rows"]]
  assert [row["strategy"] for row in result["rows"]] == ["jit", "jit", "pmap"]
  assert base["program_memory_bytes"] > baseline["program_memory_bytes"] > 3 * 4 * baseline["parameters"]
  for row in result["rows"]:
    assert (row["vocabulary"], row["sequence_length"], row["batch_size"], row["devices"]) == (100, 16, 4, 1)
    times = row["timing"]
    lower, upper = times["step_seconds_quartiles"]
    assert 0 < lower <= times["step_seconds"] <= upper
    assert times["tokens_per_second"] == pytest.approx(64 / times["step_seconds"])
    assert times["slots_per_second"] == pytest.approx(row["slots_per_token"] * times["tokens_per_second"])
    assert times["mfu"] == pytest.approx(row["model_flops_per_token"] * times["tokens_per_second"] / 0.5e12)
    assert 0 <= times["data_wait"] <= 1
    assert times["compile_seconds"] > 0
  first, second, _ = result["timing"]["ratios"]
  assert first == {"variant": "", "tokens_per_second": 1, "lowest": 1, "highest": 1}
  # One block: the ratio equals that of the rows.
  expected = baseline["timing"]["tokens_per_second"] / base["timing"]["tokens_per_second"]
  assert second["tokens_per_second"] == pytest.approx(expected)
  assert all(any((tmp_path / "trace" / row).rglob("*.xplane.pb")) for row in "012")


class _Number:
  """The output of a step; it records when it is waited for."""

  def __init__(self, name, events):
    self.name, self.events = name, events

  def block_until_ready(self):
    self.events.append(f"wait {self.name}")


def test_steps_are_waited_for_two_steps_later(monkeypatch):
  events, clock = [], iter([10.0, 11.0, 13.0, 17.0])
  monkeypatch.setattr(steps.time, "perf_counter", lambda: next(clock))

  def step():
    number = _Number(sum(event.startswith("step") for event in events), events)
    events.append(f"step {number.name}")
    return number

  # Of three timed steps, the first follows the step that starts the clock.
  waited = iter([5.0, 5.5, 5.5, 6.0])
  block = steps.run_block(step, 3, lambda: next(waited))
  assert events == [
    "step 0", "step 1", "step 2", "wait 0", "step 3", "wait 1", "step 4", "wait 2", "step 5", "wait 3", "wait 5",
  ]  # fmt: skip
  assert block == steps.Block(seconds=(1.0, 2.0, 4.0), waited=1.0)
  assert block.median == 2.0


def test_timing_in_turn_and_ratios():
  calls = []
  results = timing.in_turn([lambda: calls.append("a") or 1, lambda: calls.append("b") or 2], 2)
  assert (calls, results) == (["a", "b", "a", "b"], [[1, 1], [2, 2]])
  assert timing.ratio([2.0, 3.0, 8.0], [1.0, 1.0, 2.0]) == (3.0, 2.0, 4.0)
  assert timing.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)


def test_split_of_a_variant():
  fields = ["method.pauses=1", "data.options=documents=9,seed=1", "method.omega=1:1"]
  assert variants.split(",".join(fields)) == (None, fields)
  assert variants.split(",".join(["tbys3", *fields])) == ("tbys3", fields)
  assert variants.split("dp_early") == ("dp_early", [])
  assert variants.split("deeper@ap/training") == ("deeper@ap/training", [])
  for variant in ("", "method.pauses", "method.pauses=1,method.loss", "ap,", "ap,tbys3", "=1"):
    with pytest.raises(InputError, match="not of the form field=value"):
      variants.split(variant)


def test_a_setting_replaces_the_method():
  config = tiny_config(pauses=3, recipe="on_policy", slot_budget=2.5)
  before = config.to_dict()
  for name in ("baseline", "tbys3", "ap", "dp_early", "thoughtbubbles"):
    method = configs.freeze(variants.with_setting(config, name)).method
    alone = configs.default()
    alone.method.update(settings.SETTINGS[name])
    assert method == configs.freeze(alone).method
  assert config.to_dict() == before
  assert variants.with_setting(config, "ap").data == config.data
  with pytest.raises(InputError, match="setting 'deeper@ap' also changes the decoder"):
    variants.with_setting(config, "deeper@ap")


def test_random_tokens_depend_only_on_the_step():
  batches = steps.RandomTokens(5, 40, 3)
  batch = batches(1)
  assert {name: (x.shape, str(x.dtype)) for name, x in batch.items()} == {
    "tokens": ((3, 40), "int32"), "targets": ((3, 40), "int32"), "weights": ((3, 40), "float32"),
  }  # fmt: skip
  assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all()
  assert set(batch["tokens"].flat) == set(range(5))
  assert (batches(1)["tokens"] == batch["tokens"]).all()
  assert (batches(2)["tokens"] != batch["tokens"]).any()


@pytest.mark.parametrize(
  ("tokenizer", "vocab_size", "expected"),
  [("bytes", None, 257), ("sentencepiece:300", None, 300), ("a.model", None, 8192), ("bytes", 400, 400)],
)
def test_the_vocabulary_of_a_config(tokenizer, vocab_size, expected):
  config = tiny_config()
  config.data.tokenizer = tokenizer
  config.decoder.vocab_size = vocab_size
  assert steps.own_vocabulary(configs.freeze(config)) == expected


@pytest.mark.slow
def test_the_token_store_is_read_and_must_match(tmp_path):
  store = data.prepare("synthetic_sums", "bytes", tmp_path / "store", options={"documents": 40})
  config = tiny_config()
  config.data.update(document_mask=True, sequence_length=128)
  frozen = configs.freeze(config)
  read, vocab_size = steps._open_batches(frozen, str(store.path), 0)
  assert vocab_size == 257
  batch = read(0)
  assert batch["segment_ids"].max() > 0
  with pytest.raises(InputError, match="--vocabulary: 300 is set, but the token store has 257 entries"):
    steps._open_batches(frozen, str(store.path), 300)
  config.data.batch_size = 4096
  with pytest.raises(InputError, match=r"data\.batch_size=4096: an epoch has only"):
    steps._open_batches(configs.freeze(config), str(store.path), 0)
  config.data.batch_size, config.decoder.vocab_size = 8, 64
  with pytest.raises(InputError, match=r"decoder\.vocab_size: 64, but the tokenizer has 257"):
    steps.Contender(configs.freeze(config), str(store.path), 0)
  config.data.batch_size = 12
  with pytest.raises(InputError, match=r"data\.batch_size: 12 is not divisible by 8 devices"):
    steps.Contender(configs.freeze(config), "", 0)


def test_bad_input(tmp_path):
  parts = "readout, attention, data, decode, scoring, serve, train, memory, faults, growth, sharding"
  assert f"'tempo' is unknown; there are {parts}" in cli.complaint("benchmark", "tempo")
  assert "--slots: 3 must be a positive multiple of 4" in cli.complaint("benchmark", "readout", "--slots=3")
  assert "--repeats: 0" in cli.complaint("benchmark", "data", "--repeats=0")
  assert "--devices: -1 must not be negative" in cli.complaint("benchmark", "sharding", "--devices=-1")
  message = cli.complaint("benchmark", "sharding", "--devices=3")
  assert message == "data.batch_size: 16 is not divisible by 3 devices; give 15 or 18"
  config = f"--config={cli.write_config(tmp_path)}"
  assert "--config: not given" in cli.complaint("benchmark", "train")
  assert "--steps: 1 must be at least 2" in cli.complaint("benchmark", "train", config, "--steps=1")
  assert cli.complaint("benchmark", "train", config, "--variant=method.recpie=sampled") == (
    "--variant=method.recpie=sampled: --config.method.recpie: unknown field; did you mean method.recipe?"
  )
  message = cli.complaint("benchmark", "train", config, "--variant=basline,data.batch_size=4")
  assert message.startswith("--variant=basline,data.batch_size=4: ")
  assert message.endswith("setting 'basline' is unknown; did you mean 'baseline'?")
  assert cli.complaint("benchmark", "train", config, "--variant=baseline,method.pause=1") == (
    "--variant=baseline,method.pause=1: --config.method.pause: unknown field; did you mean method.pauses?"
  )
  assert "--workdir: give either --workdir or --config" in cli.complaint("benchmark", "decode")
  message = cli.complaint("benchmark", "decode", config, "--vocabulary=29", "--variant=method.recpie=sampled")
  assert message.startswith("--variant=method.recpie=sampled: --config.method.recpie: unknown field")
  message = cli.complaint("benchmark", "decode", config, "--base=models/x")
  assert message.startswith("--base: ")
  assert message.endswith("requires --workdir; omit it for a model with fresh parameters")
  assert "--batch_sizes: '1,x' must be" in cli.complaint("benchmark", "decode", config, "--batch_sizes=1,x")
  assert "--read: 'mixture' is not one of" in cli.complaint("benchmark", "decode", config, "--read=mixture")


def test_growth_by_hand():
  """Seconds 3 n^2 for the work 5 n, of which a second measurement is an outlier."""
  rounds = {size: iter([0.0, 3.0 * size**2, 99.0, 3.0 * size**2]) for size in (2, 4, 16)}
  points = [growth.Point(size, 5.0 * size, lambda mine=mine: next(mine)) for size, mine in rounds.items()]
  found = growth.measure(points, 3)
  assert (found["sizes"], found["work"], found["seconds"]) == ([2, 4, 16], [10, 20, 80], [12, 48, 768])
  assert found["exponent"] == pytest.approx(2)
  assert found["work_exponent"] == pytest.approx(1)
  # By hand: y = 0, 1, 5 at x = 0, 1, 2 (powers of two): the slope is (5 - 0) / 2.
  assert growth.exponent([1, 2, 4], [1, 2, 32]) == pytest.approx(2.5)


@pytest.mark.slow
def test_growth_of_every_part(tmp_path):
  config = cli.write_config(tmp_path)
  sizes = {"length": (16, 32), "slots": (1, 3), "decode": (8, 16), "prepare": (20, 60)}
  sizes |= {"evaluate": (4, 8), "statistics": (4, 8)}
  for part, (small, large) in sizes.items():
    result, _ = cli.run(
      "benchmark", "growth", f"--config={config}", f"--parts={part}", f"--sizes={small},{large}", "--repeats=1",
      "--config.decoder.vocab_size=257",
    )  # fmt: skip
    (row,) = result["timing"]["rows"]
    assert (row["part"], row["sizes"]) == (part, [small, large])
    assert 0 < row["work"][0] < row["work"][1]
    assert min(row["seconds"]) > 0


def test_bad_flags_of_growth():
  assert "--parts: 'lenght' is unknown; did you mean 'length'?" in cli.complaint(
    "benchmark", "growth", "--parts=lenght"
  )
  assert "--sizes: needs a single part" in cli.complaint("benchmark", "growth", "--sizes=1,2")
  complaint = cli.complaint("benchmark", "growth", "--parts=slots", "--sizes=4,4")
  assert "--sizes: '4,4' must be at least two different whole numbers" in complaint


@pytest.mark.slow
def test_sharding():
  """On two devices: four meshes and pmap; split parameters take half the memory."""
  result, _ = cli.run("benchmark", "sharding", "--devices=2", "--vocabulary=100")
  shapes = [(row["strategy"], row["data"], row["fsdp"], row["tensor"]) for row in result["rows"]]
  assert shapes == [("jit", 1, 1, 1), ("jit", 2, 1, 1), ("jit", 1, 2, 1), ("jit", 1, 1, 2), ("pmap", 2, 1, 1)]
  assert result["within"]
  assert result["devices"] == 2
  replicated, data, fsdp, tensor, pmap = result["rows"]
  # Norms are replicated over fsdp; pauses and <don't know> over tensor too.
  norms, own = 3 * 32 * 4, 3 * 32 * 4
  assert replicated["parameter_bytes"] == data["parameter_bytes"] == pmap["parameter_bytes"]
  assert fsdp["parameter_bytes"] == (replicated["parameter_bytes"] + norms) / 2
  assert tensor["parameter_bytes"] == (replicated["parameter_bytes"] + norms + own) / 2
  for row in result["rows"]:
    assert row["moment_bytes"] == 2 * row["parameter_bytes"]
    assert row["within"]
    assert max(row["loss_deviation"], row["gradient_deviation"]) <= 1e-5


@pytest.mark.slow
def test_decode(tmp_path):
  """Every mode, with counts computed by hand."""
  result, _ = cli.run(
    "benchmark", "decode", f"--config={cli.write_config(tmp_path)}", "--vocabulary=29", "--batch_sizes=1",
    "--prompt_tokens=5", "--new_tokens=4", "--repeats=2", "--variant=baseline,decoder.num_kv_heads=1",
  )  # fmt: skip
  *rows, other = result["timing"]["rows"]
  modes = ["self_paced", "constant", "none"]
  assert [(row["batch_size"], row["mode"]) for row in rows] == [(1, mode) for mode in modes]
  for row in rows:
    a_token = {"self_paced": 1 + row["mean_pauses"], "constant": 3, "none": 1}[row["mode"]]
    assert row["slots_per_second"] == pytest.approx(a_token * row["tokens_per_second"])
    assert row["bytes_per_step"] == result["parameter_bytes"] + row["cache_bytes"]
    assert row["steps"] == pytest.approx(4 * a_token if row["mode"] == "self_paced" else 4)
  assert [ratio["batch_size"] for ratio in result["timing"]["ratios"]] == [1]
  # The variant has one mode, and half the keys and values.
  (ratio,), (described,) = result["timing"]["variants"], result["variants"]
  name = "baseline,decoder.num_kv_heads=1"
  assert ratio["variant"] == other["variant"] == described["variant"] == name
  assert ratio["mode"] == other["mode"] == "none"
  assert ratio["lowest"] <= ratio["tokens_per_second"] <= ratio["highest"]
  assert described["parameter_bytes"] < result["parameter_bytes"]
  assert other["cache_bytes"] < rows[-1]["cache_bytes"]
  assert other["bytes_per_step"] == described["parameter_bytes"] + other["cache_bytes"]


def test_speeds_of_variants_by_hand():
  seconds = {("", "none"): [2.0, 3.0, 4.0], ("", "constant"): [1.0] * 3, ("x", "none"): [1.0, 6.0, 4.0]}
  seconds["x", "self_paced"] = [1.0] * 3
  assert decode._between_variants(8, seconds) == [
    {"batch_size": 8, "variant": "x", "mode": "none", "tokens_per_second": 1.0, "lowest": 0.5, "highest": 2.0}
  ]


@pytest.mark.slow
def test_serve(tmp_path):
  pytest.importorskip("uvicorn", reason="the extra serve isn't installed")
  config = cli.write_config(tmp_path)
  cli.run("train", f"--config={config}", f"--workdir={tmp_path}/run", "--config.train.steps=6",
    "--config.data.sequence_length=64")  # fmt: skip
  flags = ["serve", "--clients=6", "--seconds=1.5", "--new_tokens=6", "--rows=3"]
  result, _ = cli.run("benchmark", *flags, f"--workdir={tmp_path}/run")
  assert (result["lost"], result["different"]) == (0, 0)
  timing = result["timing"]
  assert result["compared"] == timing["one_after_the_other"]["requests"] > 3
  assert timing["together"]["requests"] >= result["compared"]
  assert 0 < timing["together"]["seconds_to_first_token"]["p50"] <= timing["together"]["seconds_to_first_token"]["p99"]
  assert "no run" in cli.complaint("benchmark", *flags, f"--workdir={tmp_path}/none")
  assert cli.complaint("benchmark", "serve", "--clients=0").startswith("--clients: 0 must be at least 1")


_GROWTH = """
import json, os
from cyb_jax.benchmarks import memory
kept = [b"a" * (64 << 20)]
steady = memory._measure(lambda: b"b" * (8 << 20), os.getpid(), 0.05)
growing = memory._measure(lambda: kept.append(b"a" * (4 << 20)), os.getpid(), 0.05)
print(json.dumps([steady, growing]))
"""


def test_growth_is_measured_after_the_warm_up():
  """The first call keeps 64 MiB, which is no growth; afterwards every call keeps 4 MiB, or nothing.

  In a process of its own, because the kernel may take back memory of the tests before at any moment.
  """
  done = subprocess.run(
    [sys.executable, "-c", _GROWTH], env=cli.environment(), cwd=cli.ROOT, text=True, capture_output=True, check=True
  )
  steady, growing = json.loads(done.stdout)
  assert steady["repeats"] >= 8
  # A few MiB are no leak.
  assert steady["bytes_at_end"] - steady["bytes_after_warm_up"] < 8 << 20
  grown = growing["bytes_at_end"] - growing["bytes_after_warm_up"]
  assert grown > 16 << 20
  assert growing["growth_percent"] == pytest.approx(100 * grown / growing["bytes_after_warm_up"], abs=1e-3)


@pytest.mark.slow
def test_memory(tmp_path):
  pytest.importorskip("uvicorn", reason="the extra serve isn't installed")
  result, _ = cli.run("benchmark", "memory", "--seconds=1", "--most_growth=1000")
  rows = result["timing"]["rows"]
  assert [row["activity"] for row in rows] == ["training", "evaluation", "statistics", "preparation", "serving"]
  for row in rows:
    assert row["bytes_at_end"] > 1 << 20
    assert row["repeats"] >= 8
  assert "--activities: 'train' is unknown; did you mean 'training'?" in cli.complaint(
    "benchmark", "memory", "--activities=train"
  )
