"""The comparison of methods: which runs it makes, what it takes from them; once with real programs."""

import json
import math
import pathlib
import subprocess
import sys

import cli
import pytest

from cyb_jax.errors import InputError
from experiments import compare

CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import models
from cyb_jax import settings

def get_config(argument):
  config = models.tiny_config(pause_input="pause")
  settings.apply(config, *settings.parse(argument, setting="ap", size="tiny", regime="1x3"))
  config.data.fraction = 1.0
  return config
"""


def record(perplexity):
  return {
    "perplexity": perplexity, "mean_pauses": 0.5, "latency": [0.5, 0.5], "slot_perplexity": [9.0, 8.0],
    "train_tokens": 10, "train_slots": 20, "train_flops": 3e15,
  }  # fmt: skip


class Programs:
  """In place of processes: validation is best at a rate of 2e-3, and a run's folder holds what it would."""

  def __init__(self):
    self.calls = []

  def __call__(self, study, name, *options):
    given = dict(option.lstrip("-").split("=", 1) for option in options)
    self.calls.append((name, given))
    if "compare" in given:
      assert all((pathlib.Path(run) / "report" / "index.html").exists() for run in given["compare"].split(","))
      return {"report": f"{given['output']}/index.html"}
    workdir = pathlib.Path(given["workdir"])
    if name == "report":
      (workdir / "report").mkdir()
      (workdir / "report" / "index.html").write_text("")
      return {}
    if name == "evaluate":
      assert given["split"] == "test"
      # The program itself leaves what it found where the validation's record lay.
      (workdir / "evaluation.json").write_text("{}")
      return record(100.0 + float(workdir.name.rpartition("seed")[2]))
    workdir.mkdir(parents=True)
    rate = float(given["config.optimizer.learning_rate"])
    if rate > 3e-3:
      return {"perplexity": None}  # what a run that diverges comes down to
    assert given["config.train.seed"] == given["config.data.seed"]
    result = record(50 + abs(rate - 2e-3) * 1e4)
    (workdir / "evaluation.json").write_text(json.dumps(result))
    return result


def test_rates_are_chosen_on_validation_and_test_is_read_once(tmp_path, monkeypatch):
  programs = Programs()
  monkeypatch.setattr(compare.Study, "_program", lambda study, *words: programs(study, *words))
  study = ("quickstart.py", ["baseline", "ap"], ["5e-4", "1e-3"])
  result = compare.run(tmp_path, *study, seeds=3, steps=7, jobs=2)
  trained = [given["workdir"] for name, given in programs.calls if name == "train"]
  # Two rates were given; the best is twice the higher one, and twice that was tried too.
  assert len(trained) == len(set(trained)) == 2 * (4 + 2)
  tested = [given["workdir"] for name, given in programs.calls if name == "evaluate"]
  assert sorted(tested) == sorted(
    f"{tmp_path}/{setting}/rate0.002-seed{seed}" for setting in ("baseline", "ap") for seed in range(3)
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
  table = (tmp_path / "comparison.md").read_text()
  assert "| `ap` | 0.002 | 101.0 +- 1.0 | 9.0 8.0 | 0.50 | .500 .500 | 10 | 3000.0 |" in table
  # The last program to run left the test's record in evaluation.json: what is tuned on must not be that.
  assert json.loads((tmp_path / "ap" / "rate0.002-seed0" / "validation.json").read_text())["perplexity"] == 50.0
  calls = len(programs.calls)
  assert compare.run(tmp_path, *study, seeds=3, steps=7, jobs=1) == result
  assert len(programs.calls) == calls + 1  # the page that shows all of them
  with pytest.raises(InputError, match=r"--steps: 8, but .* holds a study with 7"):
    compare.run(tmp_path, *study, seeds=3, steps=8, jobs=1)


def test_rates_may_be_pinned(tmp_path, monkeypatch):
  programs = Programs()
  monkeypatch.setattr(compare.Study, "_program", lambda study, *words: programs(study, *words))
  study = ("quickstart.py", ["baseline"], ["1e-3"])
  result = compare.run(tmp_path, *study, seeds=1, steps=7, jobs=1, report=False, search=False)
  assert [name for name, _ in programs.calls] == ["train", "evaluate"]
  assert result["rows"][0]["learning_rate"] == 1e-3
  assert "report" not in result


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("given", ["nan"], "--rates: 'nan' must be positive numbers"),
    ("given", ["1e-3", "x"], "--rates: '1e-3,x' aren't all numbers"),
    ("given", ["1.0"], "--rates: baseline diverges at 1, 0.5, 0.25, 0.125, 0.0625; give lower ones"),
    ("chosen", [], "--settings: '' must be settings"),
    ("chosen", ["ap", "ap"], "--settings: 'ap,ap' must be settings .* each once"),
    ("chosen", ["app"], "setting 'app' is unknown; did you mean 'ap'"),
    ("seeds", 0, "--seeds: 0 must be at least 1"),
  ],
)
def test_bad_input(name, value, message, tmp_path, monkeypatch):
  programs = Programs()
  monkeypatch.setattr(compare.Study, "_program", lambda study, *words: programs(study, *words))
  study = {"config": "c.py", "chosen": ["baseline"], "given": ["1e-3"], "seeds": 1, "steps": 1, "jobs": 1}
  with pytest.raises(InputError, match=message):
    compare.run(tmp_path, **study | {name: value})


@pytest.mark.slow
def test_with_real_programs(tmp_path):
  config = tmp_path / "tiny.py"
  config.write_text(CONFIG.format(tests=str(cli.ROOT / "tests")))
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
  assert (bad.returncode, bad.stderr.strip().splitlines()[-1]) == (2, "error: --rates: 'x' aren't all numbers")
