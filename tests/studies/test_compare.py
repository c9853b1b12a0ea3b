"""The comparison of methods: the runs of a study and its use of their results; once with real programs."""

import json
import math
import pathlib
import subprocess
import sys

import cli
import pytest

from cyb_jax.errors import Failed, InputError
from cyb_jax.studies import plan, results, runner, study
from cyb_jax.studies.options import Options

CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import models
from cyb_jax.studies import settings

def get_config(argument):
  config = models.tiny_config(name="baseline")
  settings.apply(config, *settings.parse(argument, setting="ap", size="tiny", regime="1x3"))
  config.data.fraction = 1.0
  return config
"""


QUICKSTART = str(cli.ROOT / "experiments" / "quickstart.py")


def record(perplexity, **more):
  return {
    "perplexity": perplexity, "mean_pauses": 0.5, "latency": [0.5, 0.5], "slot_perplexity": [9.0, 8.0],
    "train_tokens": 10, "train_slots": 20, "train_flops": 3e15, "inference_slots": None, "inference_flops": 2e6,
  } | more  # fmt: skip


class Programs:
  """Replaces the processes: validation is best at a rate of 2e-3, and a run's folder has the files that the programs
  write.

  `fails`: an argument of the command that fails; `dies`: the number of commands after which the study is killed;
  `diverges`: seeds.
  """

  def __init__(self, fails=None, dies=None, diverges=()):
    self.calls = []
    self.fails, self.dies, self.diverges = fails, dies, diverges

  def __call__(self, study, name, *options):
    given = dict(option.lstrip("-").split("=", 1) for option in options)
    if len(self.calls) == self.dies:
      raise KeyboardInterrupt
    self.calls.append((name, given))
    if self.fails and any(self.fails in option for option in options):
      raise Failed(f"python -m cyb_jax.cli.{name} {' '.join(options)} ended with 2: error: no", {})
    if "compare" in given:
      assert all((pathlib.Path(run) / "report" / "index.html").exists() for run in given["compare"].split(","))
      return {"report": f"{given['output']}/index.html"}
    workdir = pathlib.Path(given["workdir"])
    if name == "report":
      (workdir / "report").mkdir()
      (workdir / "report" / "index.html").write_text("")
      return {}
    if name == "evaluate":
      # The program overwrites the record of the validation in evaluation.json.
      (workdir / "evaluation.json").write_text("{}")
      if given.get("context") == "self_paced":
        more = {"constant_perplexity": 40.0, "context_pauses": 1.5, "inference_flops": 1e6}
        return record(44.0, **more)
      assert given["split"] == "test"
      return record(100.0 + float(workdir.name.rpartition("seed")[2]))
    workdir.mkdir(parents=True)
    rate = float(given["config.optimizer.learning_rate"])
    if rate > 3e-3 or int(given["config.train.seed"]) in self.diverges:
      return {"perplexity": None}  # the result of a run that diverges
    assert given["config.train.seed"] == given["config.data.seed"]
    result = record(50 + abs(rate - 2e-3) * 1e4)
    (workdir / "evaluation.json").write_text(json.dumps(result))
    return result

  def workdirs(self, name):
    return [pathlib.Path(given["workdir"]) for found, given in self.calls if found == name]


def installed(monkeypatch, **options):
  programs = Programs(**options)
  monkeypatch.setattr(runner.Study, "_program", lambda study, *words: programs(study, *words))
  return programs


def run_study(folder, config, chosen, given, **options):
  return study.run(folder, Options(config=config, settings=chosen, rates=given, **options))


def model(step=1.0, inference=1.0, method="x", **more):
  return plan.Model(method=method, step_flops=step, inference_flops=inference, **more)


MODELS = {
  "baseline": model(method="baseline"),
  "slow": model(4.5, 4.0),
  "alike": model(4.0, 4.05),
  "cheap": model(2.0, 1.01),
  **{name: model(4.0, 4.0, "baseline") for name in ("deeper@slow", "wider@slow")},
}


def planned(equal, steps=9, chosen=("baseline", "slow", "alike", "cheap"), models=MODELS):
  entries = plan.plan(chosen, equal, steps, "baseline", models)
  return [(entry.setting, entry.steps, entry.equal) for entry in entries]


def test_uneven_initialisations_are_reported():
  models = {"baseline": model(start=("normal", True)), "a": model(start=("normal", True))}
  assert plan.uneven_starts(models, "baseline") is None
  note = plan.uneven_starts(models | {"b": model(start=("small", True))}, "baseline")
  assert note.startswith("b: the decoder has another initialisation than that of baseline")
  assert "--fields=decoder.initializer=small" in note


def test_plan_of_equal_tokens():
  assert planned(["tokens"]) == [(name, 9, ("tokens",)) for name in ("baseline", "slow", "alike", "cheap")]


def test_plan_of_equal_training_flops():
  """9 steps of the reference cost 9 FLOPs: 2 steps of 4.5, or 2 of 4 with one FLOP left."""
  steps = [(name, count) for name, count, _ in planned(["training_flops"])]
  assert steps == [("baseline", 9), ("slow", 2), ("alike", 2), ("cheap", 4)]
  # 0.3 / 0.1 is 2.9999999999999996 in floating point.
  models = {"baseline": model(0.1, method="baseline"), "slow": model(0.3)}
  assert planned(["training_flops"], 3, ["slow"], models)[0][1] == 1
  with pytest.raises(
    InputError, match=r"--steps: 4 steps of 'baseline' cost 4 .* small for one step of 'slow', which costs 4\.5; .* 5$"
  ):
    planned(["training_flops"], 4)


def test_plan_of_equal_inference_flops():
  """Settings of the same cost share two plain models, and settings that cost no more than a plain model have none."""
  found = planned(["inference_flops"])
  assert [name for name, *_ in found] == ["baseline", "slow", "alike", "cheap", "deeper@slow", "wider@slow"]
  assert {steps for _, steps, _ in found} == {9}
  # Nothing is matched to the first and the last setting, so they are run under equal tokens.
  assert [equal for *_, equal in found] == [
    ("tokens",), ("inference_flops",), ("inference_flops",), ("tokens",), ("inference_flops",), ("inference_flops",),
  ]  # fmt: skip
  assert plan.partners(["alike", "slow", "cheap", "baseline"], MODELS) == {"alike": ["alike", "slow"]}


def test_rows_of_several_budgets_are_run_once():
  found = planned(["tokens", "training_flops", "inference_flops"], chosen=("baseline", "slow"))
  assert found == [
    ("baseline", 9, ("tokens", "training_flops")),
    ("slow", 9, ("tokens", "inference_flops")),
    ("slow", 2, ("training_flops",)),
    ("deeper@slow", 9, ("inference_flops",)),
    ("wider@slow", 9, ("inference_flops",)),
  ]
  # Settings with equal configs are also run once.
  models = MODELS | {name: model(4.0, 4.0, "baseline", identity="same") for name in ("deeper@slow", "wider@slow")}
  (last,) = plan.plan(["deeper@slow", "wider@slow"], ["tokens"], 9, "baseline", models)
  assert (last.setting, last.also) == ("deeper@slow", ("wider@slow",))


def test_rates_are_chosen_on_validation_and_test_is_evaluated_once(tmp_path, monkeypatch):
  programs = installed(monkeypatch)
  study = (QUICKSTART, ["baseline", "ap"], ["5e-4", "1e-3"])
  result = run_study(tmp_path, *study, seeds=3, steps=7, jobs=2)
  trained = programs.workdirs("train")
  # Two rates are given; the best rate is twice the higher one, and twice the best rate is tried too.
  assert len(trained) == len(set(trained)) == 2 * (4 + 2)
  tested = programs.workdirs("evaluate")
  assert sorted(tested) == sorted(
    tmp_path / setting / f"rate0.002-seed{seed}" for setting in ("baseline", "ap") for seed in range(3)
  )
  assert [name for name, _ in programs.calls].count("report") == len(tested) + 1
  assert result["report"] == f"{tmp_path}/report/index.html"
  row = result["rows"][1]
  assert row["setting"] == "ap"
  assert row["learning_rate"] == 2e-3
  assert row["perplexity"] == 101.0
  assert row["perplexity_seeds"] == [100.0, 101.0, 102.0]
  assert row["perplexity_deviation"] == 1.0
  assert row["validation_by_rate"] == {"0.0005": 65.0, "0.001": 60.0, "0.002": 50.0, "0.004": math.inf}
  written = json.loads((tmp_path / "comparison.json").read_text())
  assert written["rows"][0]["validation_by_rate"]["0.004"] is None
  assert written["rows"][0]["perplexity_seeds"] == result["rows"][0]["perplexity_seeds"]
  # The last program wrote the test's record to evaluation.json; tuning must not use it.
  assert json.loads((tmp_path / "ap" / "rate0.002-seed0" / "validation.json").read_text())["perplexity"] == 50.0
  calls = len(programs.calls)
  assert run_study(tmp_path, *study, seeds=3, steps=7, jobs=1) == result
  assert len(programs.calls) == calls + 1  # the page with all runs
  with pytest.raises(InputError, match=r"--steps: 8, but .* holds a study with 7"):
    run_study(tmp_path, *study, seeds=3, steps=8, jobs=1)
  with pytest.raises(InputError, match=r"--size: 'nano', but .* holds a study with ''"):
    run_study(tmp_path, *study, seeds=3, steps=7, jobs=1, size="nano")


ROW = {
  "setting", "also", "equal", "steps", "seeds", "diverged", "learning_rate", "method", "autoregressive", "perplexity",
  "perplexity_seeds", "perplexity_deviation", "blockwise_perplexity", "mean_pauses", "train_tokens", "train_slots",
  "train_tokens_learnt", "blockwise_inference_flops", "slots_per_token", "inference_slots", "train_flops",
  "train_executed_flops", "inference_flops", "parameters", "self_paced", "pareto", "latency", "slot_perplexity",
  "matched", "validation_by_rate", "loss_perplexity", "training_perplexity",
}  # fmt: skip
PINNED = {"seeds": 2, "jobs": 1, "report": False, "search": False}
ALL = ["tokens", "training_flops", "inference_flops"]


def test_a_study_of_all_budgets(tmp_path, monkeypatch):
  programs = installed(monkeypatch)
  options = PINNED | {
    "steps": 60,
    "equal": ALL,
    "size": "nano",
    "test": False,
    "self_paced": 32,
    "note": "Only a test.",
  }
  options |= {"fields": ["data.tokenizer=sentencepiece:1024"]}
  result = run_study(tmp_path, QUICKSTART, ["baseline", "ap"], ["2e-3"], **options)
  labels = [(row["setting"], row["steps"]) for row in result["rows"]]
  # A step of ap costs 4.73 times as much as a step of the baseline.
  assert labels == [("baseline", 60), ("ap", 60), ("ap", 12), ("deeper@ap", 60), ("wider@ap", 60)]
  assert all(set(row) == ROW for row in result["rows"])
  assert json.loads((tmp_path / "comparison.json").read_text()) == json.loads(json.dumps(result))
  # Each with both seeds, none twice; the longer run is in a separate folder with its own schedule.
  trained = programs.workdirs("train")
  assert len(set(trained)) == len(trained) == 10
  (scaled,) = [given for name, given in programs.calls if given["workdir"].endswith("ap/steps12-rate0.002-seed1")][:1]
  assert scaled["config.train.steps"] == "12"
  assert scaled["config"] == f"{QUICKSTART}:ap,nano"
  assert scaled["config.data.tokenizer"] == "sentencepiece:1024"
  # Adaptive models are also evaluated self-paced: 10% worse in this test.
  paced = {given["workdir"] for name, given in programs.calls if name == "evaluate"}
  assert paced == {f"{tmp_path}/ap/{steps}rate0.002-seed{seed}" for steps in ("", "steps12-") for seed in (0, 1)}
  found = result["rows"][1]["self_paced"]
  assert found["perplexities"] == pytest.approx((55.0, 55.0))
  assert (found["pauses"], found["inference_flops"]) == (1.5, 1e6)
  assert result["rows"][0]["self_paced"] is None
  matched = result["rows"][3]["matched"]
  assert abs(matched["mismatch"]) < 0.01
  # The programs of this test measure the same cost for all rows.
  assert matched == {
    "settings": ["ap"],
    "measure": "inference",
    "mismatch": matched["mismatch"],
    "mismatch_measured": 0,
  }
  assert result["rows"][0]["parameters"] == 254_400
  table = (tmp_path / "comparison.md").read_text()
  assert "Only a test." in table
  assert "| 3s | ap, 12 steps, self-paced " in table
  assert f"| ap ({matched['mismatch']:+.1%}, measured +0.0%) " in table
  assert "diverged" not in table
  page = (tmp_path / "index.html").read_text()
  assert "deeper@ap" in page
  assert '<td class="word">training FLOPs</td>' in page
  assert all((tmp_path / f"pareto_{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("train", "inference"))


def test_a_killed_study_continues(tmp_path, monkeypatch):
  options = PINNED | {"steps": 60, "test": True}
  study = (tmp_path, QUICKSTART, ["baseline", "tbys1"], ["2e-3"])
  uninterrupted = installed(monkeypatch)
  expected = run_study(tmp_path / "uninterrupted", *study[1:], **options)
  assert len(uninterrupted.calls) == 8
  before = []
  for _ in range(7):
    programs = installed(monkeypatch, dies=1)
    with pytest.raises(KeyboardInterrupt):
      run_study(*study, **options)
    before += programs.calls
  programs = installed(monkeypatch)
  assert run_study(*study, **options) == expected
  before += programs.calls
  assert [(name, given["workdir"].removeprefix(str(tmp_path))) for name, given in before] == [
    (name, given["workdir"].removeprefix(str(tmp_path / "uninterrupted"))) for name, given in uninterrupted.calls
  ]


def test_a_failure_does_not_affect_other_rows(tmp_path, monkeypatch):
  programs = installed(monkeypatch, fails="quickstart.py:tbys1")
  study = (tmp_path, QUICKSTART, ["tbys1", "baseline", "tbys2"], ["2e-3"])
  with pytest.raises(
    Failed, match=r"^1 of the study's programs failed, the first: python -m cyb_jax\.cli\.train .*: no\. The"
  ):
    run_study(*study, **PINNED, steps=7)
  assert len(programs.calls) == 1 + 2 * 4
  written = json.loads((tmp_path / "comparison.json").read_text())
  assert [row["setting"] for row in written["rows"]] == ["baseline", "tbys2"]
  programs = installed(monkeypatch)
  result = run_study(*study, **PINNED, steps=7)
  assert [row["setting"] for row in result["rows"]] == ["tbys1", "baseline", "tbys2"]
  assert len(programs.calls) == 4


def test_a_setting_that_diverges_is_reported_at_the_end(tmp_path, monkeypatch):
  installed(monkeypatch)
  with pytest.raises(Failed, match=r"--rates: baseline diverges at 1, 0\.5, 0\.25, 0\.125, 0\.0625; give lower rates"):
    run_study(tmp_path, QUICKSTART, ["baseline"], ["1.0"], seeds=1, jobs=1, steps=1)


def test_a_seed_that_diverges_does_not_affect_the_others(tmp_path, monkeypatch):
  installed(monkeypatch, diverges=[1])
  study = (tmp_path, QUICKSTART, ["baseline"], ["2e-3"])
  result = run_study(*study, **PINNED | {"seeds": 3, "report": True}, steps=7)
  (row,) = result["rows"]
  assert (row["seeds"], row["diverged"], row["perplexity_seeds"]) == (2, 1, [100.0, 102.0])
  assert result["report"] == f"{tmp_path}/report/index.html"
  assert "1 of 3 seeds" in (tmp_path / "comparison.md").read_text()
  # If all seeds diverge on the test split, there is no row.
  monkeypatch.setattr(runner.Study, "evaluate", lambda *_: record(None))
  with pytest.raises(Failed, match=r"baseline diverges at rate 0\.002 with all seeds") as failed:
    run_study(*study, **PINNED | {"seeds": 3}, steps=7)
  assert "rows" not in failed.value.result


def test_rates_are_chosen_by_the_compared_perplexity(tmp_path, monkeypatch):
  options = Options(config=QUICKSTART, settings=["ap"], rates=["1e-3"], seeds=1, steps=7, jobs=1, search=False)
  tuner = runner.Study(tmp_path, options)
  found = {"perplexity": 9.0, "blockwise_perplexity": 3.0}
  by_rate = {1e-3: record(20.0, autoregressive=None), 2e-3: record(10.0, autoregressive=found)}
  monkeypatch.setattr(tuner, "train", lambda entry, rate, seed: by_rate[rate])
  tuned = tuner.tune(plan.Entry("x", 7, ()), list(by_rate))
  assert tuned == {1e-3: 20.0, 2e-3: 30.0}


def test_a_measured_cost_below_the_matched_cost_is_reported():
  models = MODELS | {"ap": model(4.0, 4.0), "deeper@ap": model(4.0, 4.02, "baseline")}
  entry = plan.Entry("deeper@ap", 9, ("inference_flops",))
  costs = {("ap", 9): 3.0, ("deeper@ap", 9): 4.02}
  found = results.match_of(entry, plan.Plan(models, {"ap": ["ap", "va_uniform"]}, [], None), costs)
  assert (found["mismatch"], found["mismatch_measured"]) == (pytest.approx(0.005), pytest.approx(0.34))
  assert results.describe_match(found) == "ap, va_uniform (+0.5%, measured +34.0%)"
  # The row of the matched setting may have failed.
  assert results.match_of(entry, plan.Plan(models, {}, [], None), {("deeper@ap", 9): 4.02})["mismatch_measured"] is None


def test_rates_may_be_fixed(tmp_path, monkeypatch):
  programs = installed(monkeypatch)
  study = (QUICKSTART, ["baseline"], ["1e-3"])
  result = run_study(tmp_path, *study, seeds=1, steps=7, jobs=1, report=False, search=False)
  assert [name for name, _ in programs.calls] == ["train", "evaluate"]
  assert result["rows"][0]["learning_rate"] == 1e-3
  assert "report" not in result


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("given", ["nan"], "--rates: 'nan' must be positive numbers"),
    ("given", ["1e-3", "x"], "--rates: '1e-3,x' must be positive numbers"),
    ("chosen", [], "--settings: '' must be settings"),
    ("chosen", ["ap", "ap"], "--settings: 'ap,ap' must be settings .* each once"),
    ("chosen", ["app"], "setting 'app' is unknown; did you mean 'ap'"),
    ("chosen", ["deeper@baseline"], "which is itself a plain model"),
    ("reference", "baselin", "setting 'baselin' is unknown; did you mean 'baseline'"),
    ("seeds", 0, "--seeds: 0 must be at least 1"),
    ("jobs", -1, "--jobs: -1 must be at least 1"),
    ("self_paced", -1, "--self_paced: -1 must not be negative"),
    ("equal", ["flops"], "--equal: 'flops' must be some of tokens, training_flops, inference_flops, each once"),
    ("equal", [], "--equal: '' must be some of"),
    ("size", "nanno", "size 'nanno' is unknown; did you mean 'nano'"),
    ("fields", ["data.batch_sise=3"], "--config.data.batch_sise: unknown field"),
    ("config", "nowhere.py", "--config: nowhere.py does not exist"),
    ("equal", ["training_flops"], r"--steps: 1 steps of 'baseline' cost .* too small for one step of 'ap'"),
  ],
)
def test_bad_input(name, value, message, tmp_path, monkeypatch):
  programs = installed(monkeypatch)
  study = {"config": QUICKSTART, "chosen": ["baseline", "ap"], "given": ["1e-3"], "seeds": 1, "steps": 1, "jobs": 1}
  with pytest.raises(InputError, match=message):
    run_study(tmp_path / "study", **study | {name: value})
  assert not programs.calls
  assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_with_real_programs(tmp_path):
  config = tmp_path / "tiny.py"
  config.write_text(CONFIG.format(tests=str(cli.ROOT / "tests" / "support")))
  command = [sys.executable, "experiments/compare.py", f"--config={config}", f"--workdir={tmp_path}/study", "--steps=2"]
  options = ["--settings=baseline,mean_slots", "--rates=1e-30", "--seeds=2", "--jobs=2"]
  done = subprocess.run(command + options, capture_output=True, text=True, env=cli.environment(), cwd=cli.ROOT)
  assert done.returncode == 0, done.stderr[-2000:]
  rows = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
  assert [row["setting"] for row in rows] == ["baseline", "mean_slots"]
  assert rows[0]["train_tokens"] == rows[1]["train_tokens"] == 2 * 8 * 16
  assert rows[1]["train_slots"] == 4 * rows[0]["train_slots"]
  assert len(rows[1]["perplexity_seeds"]) == 2
  assert (tmp_path / "study" / "report" / "index.html").stat().st_size > 10_000
  bad = subprocess.run([*command, "--rates=x"], capture_output=True, text=True, env=cli.environment(), cwd=cli.ROOT)
  assert (bad.returncode, bad.stderr.strip().splitlines()[-1]) == (2, "error: --rates: 'x' must be positive numbers")
