"""Planned studies: the runs of a plan and their order, the recorded results, and the tables; once with real runs."""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
import subprocess

import numpy as np
import pytest
from absl import flags

from cyb_jax import command_line, data, training
from cyb_jax.cli import study as program
from cyb_jax.errors import Failed, InputError, Interrupted
from cyb_jax.evaluation import bootstrap
from cyb_jax.studies import (
  documents,
  planned,
  planned_costs,
  planned_runs,
  planned_status,
  planned_tables,
  plans,
  processes,
)
from cyb_jax.studies import plan as comparisons
from cyb_jax.studies.plans import PlannedStudy, Pretraining, Row
from cyb_jax.studies.processes import Processes
from cyb_jax.studies.resolution import resolve
from cyb_jax.studies.results_file import ResultsFile

TINY = PlannedStudy(
  name="tiny",
  config="experiments/reviews.py",
  size="nano",
  fields=(
    "data.task=synthetic_lookups", "data.options=documents=400", "data.tokenizer=bytes", "data.sequence_length=16",
    "data.batch_size=8", "data.fraction=1.0", "decoder.num_layers=1", "decoder.d_model=16", "decoder.head_size=8",
    "train.trackers=", "train.eval_every=0",
  ),
  step_tokens=128,
  rates=(1e-3, 2e-3),
  search_steps=1,
  groups=(
    (
      Row(name="baseline", setting="baseline", steps=4, seeds=2),
      Row(name="ap", setting="ap1", steps=4, seeds=1, fields=("method.dont_know_prior=0.5",), paced=True, cost=2.0),
    ),
    (Row(name="baseline_long", setting="baseline", steps=12, seeds=1, rate_of="baseline"),),
  ),
  reference="baseline",
  longer="baseline_long",
  paced_windows=8,
)  # fmt: skip
KEYS = [
  "baseline/rate0.001", "baseline/rate0.002", "ap/rate0.001", "ap/rate0.002", "baseline/seed0", "ap/seed0",
  "baseline/seed1", "baseline_long/seed0",
]  # fmt: skip
TUNED = dataclasses.replace(
  TINY,
  name="tuned",
  config="experiments/finetune_reviews.py",
  pretraining=Pretraining(
    config="experiments/reviews.py", argument="baseline,nano", fields=("data.tokenizer=bytes",), lengths=(6, 12),
    rate=1e-3, limit=0.03, cost=1.0, task="synthetic_lookups", percent=60,
  ),
)  # fmt: skip


class Programs:
  """Replaces the processes: numbers that depend only on the arguments.

  `dies`: the number of trainings after which the study is killed; `fails`: a part of the folder of a run whose program
  fails; `diverges`: a part of the folder of a run that diverges; `gain`: the gain of three times the steps, in nats.
  """

  def __init__(self, dies=None, fails=None, diverges=None, gain=0.1):
    self.trained, self.paced, self.given = [], [], {}
    self.dies, self.fails, self.diverges, self.gain = dies, fails, diverges, gain

  def __call__(self, module, *options):
    name = module.rpartition(".")[2]
    if name == "documents":
      seed = int(options[0][-1])
      return {"tokens": [2, 3, 5], "losses": [5.0 + seed, 4.0, 3.0 if "ap" in options[0] else 3.5]}
    given = dict(option.lstrip("-").split("=", 1) for option in options)
    workdir = pathlib.Path(given["workdir"])
    if name == "evaluate":
      self.paced.append(given)
      return record(44.0) | {"limit": 8, "constant_perplexity": 40.0, "context_pauses": 0.5, "inference_flops": 1.5e6}
    if self.dies is not None and len(self.trained) >= self.dies:
      raise KeyboardInterrupt
    self.trained.append(workdir)
    self.given[str(workdir)] = given
    if self.fails and self.fails in str(workdir):
      raise Failed("python -m cyb_jax.cli.train ended with 2: error: no", {})
    if self.diverges and self.diverges in str(workdir):
      return {"perplexity": None}
    workdir.mkdir(parents=True)
    (workdir / "evaluation.json").write_text("{}")
    rate, steps = float(given["config.optimizer.learning_rate"]), int(given["config.train.steps"])
    digit = int(hashlib.sha256(str(options[0]).encode()).hexdigest(), 16) % 7
    loss = 4 + 10 * abs(rate - 2e-3) + digit / 1000 + int(given["config.train.seed"]) / 100
    return record(math.exp(loss - self.gain * math.log(steps / 4) / math.log(3)))

  def keys(self, folder):
    return [str(path.relative_to(folder)) for path in self.trained]


def record(perplexity):
  return {
    "perplexity": perplexity, "loss": math.log(perplexity), "mean_pauses": 0.5, "train_tokens": 10, "train_slots": 20,
    "train_flops": 3e6, "inference_flops": 2e6, "inference_slots": None,
  }  # fmt: skip


def installed(monkeypatch, **options):
  programs = Programs(**options)
  monkeypatch.setattr(Processes, "program", lambda _, *words: programs(*words))
  return programs


def without_seconds(path):
  return [line for line in path.read_text().splitlines() if not line.startswith(' "seconds"')]


def table(plan, path):
  results = ResultsFile(path, plan)
  return planned_tables.text(plan, planned_tables.table(plan, results.runs, results.documents))


def run(plan, folder, path, jobs=1):
  return planned.run(plan, folder, ResultsFile(path, plan), jobs)


def test_a_killed_study_continues_from_its_results_file(tmp_path, monkeypatch):
  uninterrupted = installed(monkeypatch)
  assert run(TINY, tmp_path / "uninterrupted", tmp_path / "uninterrupted.json", jobs=2)["missing"] == 0
  assert sorted(uninterrupted.keys(tmp_path / "uninterrupted")) == sorted(KEYS)
  trained, path = [], tmp_path / "results.json"
  for number in range(len(KEYS)):
    # A new folder each time: the finished runs are known from the file.
    programs = installed(monkeypatch, dies=1)
    if number < len(KEYS) - 1:
      with pytest.raises(KeyboardInterrupt):
        run(TINY, tmp_path / str(number), path)
    else:
      assert run(TINY, tmp_path / str(number), path) == {
        "plan": "tiny", "results": str(path), "done": 8, "missing": 0,
      }  # fmt: skip
    trained += programs.keys(tmp_path / str(number))
  assert trained == KEYS
  assert without_seconds(path) == without_seconds(tmp_path / "uninterrupted.json")
  assert table(TINY, path) == table(TINY, tmp_path / "uninterrupted.json")
  programs = installed(monkeypatch)
  run(TINY, tmp_path / "again", path)
  assert not programs.trained


def test_commands_and_records_of_runs(tmp_path, monkeypatch):
  programs = installed(monkeypatch)
  folder, path = tmp_path / "study", tmp_path / "deep" / "results.json"
  run(TINY, folder, path)
  given = programs.given[f"{folder}/ap/seed0"]
  assert given["config"] == "experiments/reviews.py:ap1,nano"
  assert given["config.optimizer.learning_rate"] == "0.002"
  assert given["config.method.dont_know_prior"] == "0.5"
  assert (given["config.train.steps"], given["config.train.seed"], given["config.data.seed"]) == ("4", "0", "0")
  assert programs.given[f"{folder}/ap/rate0.001"]["config.train.steps"] == "1"
  assert programs.given[f"{folder}/baseline/seed1"]["config.data.seed"] == "1"
  assert [(call["workdir"], call["context"], call["limit"]) for call in programs.paced] == [
    (f"{folder}/ap/seed0", "self_paced", "8")
  ]
  content = json.loads(path.read_text())
  assert list(content["runs"]) == sorted(KEYS)
  entry = content["runs"]["ap/seed0"]
  names = ("row", "stage", "setting", "rate", "steps")
  assert [entry[name] for name in names] == ["ap", "final", "ap1", 0.002, 4]
  assert entry["document_losses"] == [5.0, 4.0, 3.0]
  assert content["documents"] == {entry["documents"]: [2, 3, 5]}
  assert entry["self_paced"]["constant_perplexity"] == 40.0
  assert "documents" not in content["runs"]["ap/rate0.001"]
  # One value per line, so that a new run adds a few lines to a diff.
  assert ' "document_losses": [5.0, 4.0, 3.0],\n' in path.read_text()


def test_a_plan_runs_in_order_and_two_at_a_time():
  runs = planned_runs.expand(TINY, {})
  assert [run.key for run in runs] == KEYS
  assert [run.key for run in runs if run.ready] == KEYS[:4]
  searched = {"baseline/rate0.001": {"perplexity": 5.0}, "baseline/rate0.002": {"perplexity": None}}
  found = {run.key: run.rate for run in planned_runs.expand(TINY, searched)}
  assert (found["baseline/seed0"], found["baseline_long/seed0"], found["ap/seed0"]) == (1e-3, 1e-3, None)


def test_a_failure_does_not_affect_independent_runs(tmp_path, monkeypatch):
  programs = installed(monkeypatch, fails="ap/rate0.001")
  with pytest.raises(Failed, match=r"^1 runs of the study failed, the first: python -m .*: no\. The same command"):
    run(TINY, tmp_path / "study", tmp_path / "results.json")
  assert programs.keys(tmp_path / "study") == [key for key in KEYS if key != "ap/seed0"]
  programs = installed(monkeypatch)
  run(TINY, tmp_path / "study", tmp_path / "results.json")
  assert programs.keys(tmp_path / "study") == ["ap/rate0.001", "ap/seed0"]


def test_a_rate_with_divergence_is_not_chosen(tmp_path, monkeypatch):
  installed(monkeypatch, diverges="baseline/rate0.002")
  path = tmp_path / "results.json"
  run(TINY, tmp_path / "study", path)
  assert ResultsFile(path, TINY).runs["baseline/seed0"]["rate"] == 1e-3
  assert re.search(r"\| baseline \| [\d.]+ \| diverges \|", table(TINY, path))


def test_a_study_ends_when_a_run_is_interrupted(tmp_path, monkeypatch):
  """Even if the signal does not reach the study: it starts no further run, and records no failure."""
  started = []

  def interrupted(_, command):
    started.append(command)
    return subprocess.CompletedProcess(command, 75, "", "interrupted at step 1")

  monkeypatch.setattr(Processes, "run", interrupted)
  with pytest.raises(Interrupted, match="the same command continues"):
    run(TINY, tmp_path / "study", tmp_path / "results.json")
  assert len(started) == 1
  assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(("gain", "lengths"), [(0.02, [6]), (0.1, [6, 12])])
def test_the_gate_decides_the_length_of_pretraining(gain, lengths, tmp_path, monkeypatch):
  programs = installed(monkeypatch, gain=gain)
  monkeypatch.setattr(documents, "open_task", lambda task: data.open_task(task, {"documents": 64}))
  folder, path = tmp_path / "study", tmp_path / "results.json"
  state = planned_status.status(TUNED, folder, {}, 1)[1]
  assert len(state["missing"]) == len(KEYS) + 1
  run(TUNED, folder, path)
  keys = programs.keys(folder)
  assert [key for key in keys if key.startswith("pretraining")] == [f"pretraining/{length}" for length in lengths]
  gate = [f"baseline/from{lengths[0]}/rate0.001", f"baseline/from{lengths[0]}/rate0.002"]
  gate += [f"baseline/from{lengths[0]}/seed0", f"baseline_long/from{lengths[0]}/seed0"]
  assert keys[:5] == ["pretraining/6", *gate]
  assert len(keys) == 9 + 5 * (len(lengths) - 1) == len(set(keys))
  given = programs.given[f"{folder}/ap/from{lengths[-1]}/seed0"]
  assert given["config.init_from"] == f"{folder}/pretraining/{lengths[-1]}"
  assert given["config.data.options"] == (
    f"pattern={folder}/text/finetuning.jsonl,validation_pattern={folder}/text/validation.jsonl"
  )
  assert programs.given[f"{folder}/pretraining/6"]["config"] == "experiments/reviews.py:baseline,nano"
  assert "config.decoder.d_model" not in programs.given[f"{folder}/pretraining/6"]
  verdict = "passed" if gain < 0.03 else "not passed"
  assert f" = {gain:.4f} nats, at most 0.03: {verdict}\n" in table(TUNED, path)
  # Only the missing runs are run; the folder of the model that they start from was deleted.
  content = json.loads(path.read_text())
  del content["runs"][f"ap/from{lengths[-1]}/seed0"]
  path.write_text(json.dumps(content))
  programs = installed(monkeypatch, gain=gain)
  run(TUNED, tmp_path / "fresh", path)
  assert programs.keys(tmp_path / "fresh") == [f"pretraining/{lengths[-1]}", f"ap/from{lengths[-1]}/seed0"]


def test_the_rows_do_not_wait_for_the_gate_of_the_only_length():
  assert TUNED.pretraining is not None
  plan = dataclasses.replace(TUNED, pretraining=dataclasses.replace(TUNED.pretraining, lengths=(6,)))
  runs = planned_runs.expand(plan, {})
  assert len(runs) == len(KEYS) + 1
  assert [run.key for run in runs if run.ready] == [
    "pretraining/6", *(f"{row}/from6/rate{rate}" for row in ("baseline", "ap") for rate in (0.001, 0.002))
  ]  # fmt: skip
  assert [run.key for run in planned_runs.expand(TUNED, {}) if run.ready] == [run.key for run in runs if run.ready][:3]


def test_no_run_starts_from_a_pretrained_model_that_diverges(tmp_path, monkeypatch):
  programs = installed(monkeypatch, diverges="pretraining")
  monkeypatch.setattr(documents, "open_task", lambda task: data.open_task(task, {"documents": 64}))
  with pytest.raises(Failed, match=r"pretraining/6 diverges at rate 0\.001, and nothing can start from it") as failed:
    run(TUNED, tmp_path / "study", tmp_path / "results.json")
  assert programs.keys(tmp_path / "study") == ["pretraining/6"]
  assert failed.value.result["done"] == 0


def test_text_is_divided_by_document(tmp_path, monkeypatch):
  monkeypatch.setattr(documents, "open_task", lambda task: data.open_task(task, {"documents": 2000}))
  paths = documents.write_parts("synthetic_lookups", 60, tmp_path)
  texts = {part: [json.loads(line)["text"] for line in path.read_text().splitlines()] for part, path in paths.items()}
  assert not set(texts["pretraining"]) & set(texts["finetuning"])
  share = len(texts["pretraining"]) / (len(texts["pretraining"]) + len(texts["finetuning"]))
  assert 0.55 < share < 0.65
  assert texts["validation"]
  before = {part: path.stat().st_mtime_ns for part, path in paths.items()}
  documents.write_parts("synthetic_lookups", 60, tmp_path)
  assert before == {part: path.stat().st_mtime_ns for part, path in paths.items()}


def test_differences_by_hand():
  """Two documents of 1 and 3 tokens, with differences of -1 and +0.2 nats per token."""
  counts = {"x": [1, 3]}
  entry = {"documents": "x", "document_losses": [2.0, 3.0]}
  other = [{"documents": "x", "document_losses": losses} for losses in ([2.5, 2.8], [3.5, 2.8])]
  mean, interval = planned_tables.difference([entry], other, counts)
  assert mean == pytest.approx((-1 * 1 + 0.2 * 3) / 4)
  # Two documents are drawn twice: a resample of only one of them is the lowest, and of the other the highest.
  np.testing.assert_allclose(interval, [-1.0, 0.2], atol=1e-12)
  sums = np.array([[-1.0, 1.0], [0.6, 3.0]])
  assert interval == pytest.approx(bootstrap.interval(sums, lambda totals: totals[:, 0] / totals[:, 1]))
  assert planned_tables.difference([entry], [entry | {"documents": "y"}], counts) is None
  assert planned_tables.difference([entry], [], counts) is None


def test_tokens_to_reach_by_hand():
  """From 10 to 40 tokens the loss falls by 2 ln 4, so by 2 nats per factor e."""
  short, long = (10.0, 5.0), (40.0, 5.0 - 2 * math.log(4))
  assert planned_tables.tokens_to_reach(5.0 - 2 * math.log(2), short, long) == pytest.approx(20.0)
  assert planned_tables.tokens_to_reach(5.0, short, long) == pytest.approx(10.0)
  assert planned_tables.tokens_to_reach(5.0 + 2 * math.log(2), short, long) == pytest.approx(5.0)
  assert planned_tables.tokens_to_reach(4.0, short, (40.0, 5.0)) is None


def test_the_table_by_hand(tmp_path, monkeypatch):
  installed(monkeypatch)
  run(TINY, tmp_path / "study", tmp_path / "results.json")
  results = ResultsFile(tmp_path / "results.json", TINY)
  # Losses of 4.0 and 4.1 with the two seeds; with three times the tokens 3.95.
  for key, loss in {"baseline/seed0": 4.0, "baseline/seed1": 4.1, "ap/seed0": 4.0, "baseline_long/seed0": 3.95}.items():
    results.runs[key]["perplexity"] = math.exp(loss)
  numbers = planned_tables.table(TINY, results.runs, results.documents)
  baseline, ap, long = numbers["rows"]
  assert (baseline["row"], baseline["seeds"], baseline["of_seeds"]) == ("baseline", 2, 2)
  assert baseline["perplexity"] == pytest.approx((math.exp(4.0) + math.exp(4.1)) / 2)
  # 4.05 at 512 tokens, 3.95 at 1,536: a loss of 4.0 is half-way in the logarithm.
  assert ap["reference_tokens"]["tokens"] == pytest.approx(512 * math.sqrt(3))
  assert not ap["reference_tokens"]["extrapolation"]
  assert long["reference_tokens"] == {"tokens": pytest.approx(1536), "extrapolation": False}
  # Documents of 2, 3 and 5 tokens. The baseline has 5, 4 and 3.5 with the seed of `ap`, and ap 5, 4 and 3.
  assert ap["difference"] == pytest.approx(-0.5 * 5 / 10)
  assert ap["difference_seeds"] == [pytest.approx(0.0)]
  assert long["difference_seeds"] == [pytest.approx(-0.05)]
  assert baseline["difference_seeds"] is None
  assert ap["self_paced"]["perplexity"] == pytest.approx(math.exp(4.0) * 44 / 40)
  assert (ap["self_paced"]["pauses"], ap["self_paced"]["inference_flops"]) == (0.5, 1.5e6)
  # With all slots it costs as much as the baseline here and is better; self-paced it costs less. The row with more data
  # is not on the front.
  assert (baseline["front"], ap["front"], long["front"]) == ([], ["I", "P"], [])
  assert "under the training omega" not in planned_tables.text(TINY, numbers).splitlines()[0]
  line = next(line for line in planned_tables.text(TINY, numbers).splitlines() if line.startswith("| ap "))
  cells = [cell.strip() for cell in line.split("|")[1:-1]]
  assert cells[:4] == ["ap", "1", "0.002", "54.60"]
  assert cells[4].startswith("-0.2500 (")
  assert cells[5:] == ["+0.000", "0.500", "2.00", "2M", "60.06", "0.500", "1.5M", "0.000887M", "I P"]
  # Without the seed of the row, all seeds of the baseline are compared.
  results.runs["ap/seed0"]["seed"] = 7
  changed = planned_tables.table(TINY, results.runs, results.documents)["rows"][1]
  assert changed["difference"] == pytest.approx((-0.5 * 2 - 0.5 * 5) / 10)
  assert changed["difference_seeds"] is None
  results.runs["ap/seed0"]["seed"] = 0
  # This column exists only if a row is trained under another step budget.
  results.runs["ap/seed0"]["training_omega"] = {"perplexity": 50.0}
  numbers = planned_tables.table(TINY, results.runs, results.documents)
  lines = [[cell.strip() for cell in line.split("|")] for line in planned_tables.text(TINY, numbers).splitlines()]
  assert (lines[0][5], lines[2][5], lines[3][5]) == ("under the training omega", "-", "50.00")


def test_a_row_is_compared_with_its_own_reference(tmp_path, monkeypatch):
  """The last row against `ap`: the documents' losses differ by 0.5 at 5 of 10 tokens."""
  installed(monkeypatch)
  *groups, last = TINY.groups
  (row,) = last
  plan = dataclasses.replace(TINY, groups=(*groups, (dataclasses.replace(row, compared_with="ap"),)))
  run(plan, tmp_path / "study", tmp_path / "results.json")
  results = ResultsFile(tmp_path / "results.json", plan)
  numbers = planned_tables.table(plan, results.runs, results.documents)
  ours, before = (found["rows"][-1] for found in (numbers, planned_tables.table(TINY, results.runs, results.documents)))
  assert ours["row"] == row.name
  assert before["difference"] == pytest.approx(0.0)
  assert ours["difference"] == pytest.approx(0.5 * 5 / 10)
  # How far another pretrained model is on the way of the reference is not known.
  assert (ours["reference_tokens"], ours["front"]) == (None, [])
  line = planned_tables.text(plan, numbers).splitlines()[2 + len(numbers["rows"]) - 1]
  assert line.split("|")[5].strip().endswith("), to ap")


def test_the_status_of_a_study(tmp_path, monkeypatch):
  folder = tmp_path / "study"
  text, state = planned_status.status(TINY, folder, {}, 2)
  assert (state["done"], state["missing"], state["hours_left"], state["is_running"]) == (0, KEYS, None, False)
  assert "hours left with --jobs=2: unknown" in text
  entry = {"perplexity": 5.0, "seconds": 36.0}
  results = {"baseline/rate0.001": entry, "baseline/rate0.002": entry}
  # A step of the baseline takes 36 s, and a step of ap twice as long; one run is half done.
  (folder / "baseline" / "seed0").mkdir(parents=True)
  line = {"split": "train", "step": 2, "timing": {"seconds": 72.0}}
  (folder / "baseline" / "seed0" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
  text, state = planned_status.status(TINY, folder, results, 2)
  assert state["begun"] == {"baseline/seed0": 2}
  assert "interrupted: baseline/seed0, step 2 of 4" in text
  assert "| baseline      | 2 of 2 | 0 of 2 | seed0, seed1" in text
  steps = 2 * (1 + 1 + 4) + 2 + 4 + 12
  assert state["hours_left"] == pytest.approx(36 * steps / 2 / 3600, abs=0.01)


def damaged(change):
  def write(path):
    content = {"plan": "tiny", "identity": TINY.identity, "documents": {}, "runs": {}}
    content["runs"]["baseline/rate0.001"] = {
      "stage": "search", "row": "baseline", "setting": "baseline", "fields": [], "seed": 0, "steps": 1, "rate": 1e-3,
      "start": "", "version": "0", "seconds": 1.0, "perplexity": 9.0,
    }  # fmt: skip
    change(content)
    path.write_text(json.dumps(content))

  return write


@pytest.mark.parametrize(
  ("write", "message"),
  [
    (lambda path: path.write_text("{"), r"is damaged \(invalid JSON: .*\); restore it from the repository"),
    (lambda path: path.write_text("[]"), r"is damaged \(it is not an object\)"),
    (lambda path: path.write_text('{"plan": "tiny"}'), r"is damaged \(it has no 'identity'\)"),
    (lambda path: path.mkdir(), r"can't be read \(Is a directory\)"),
    (damaged(lambda content: content.update(plan="scratch")), "has the results of the plan 'scratch', not 'tiny'"),
    (
      damaged(lambda content: content["identity"].update(rates=[1e-3])),
      r"of another version of the plan 'tiny' with rates = \[0.001\], not \[0.001, 0.002\]",
    ),
    (damaged(lambda content: content.pop("runs")), r"is damaged \(it has no 'runs'\)"),
    (
      damaged(lambda content: content["runs"]["baseline/rate0.001"].pop("perplexity")),
      r"is damaged \(run 'baseline/rate0.001' has no perplexity\)",
    ),
    (
      damaged(lambda content: content["runs"]["baseline/rate0.001"].update(perplexity="low")),
      r"is damaged \(run 'baseline/rate0.001' has the perplexity 'low'\)",
    ),
    (
      damaged(lambda content: content["runs"]["baseline/rate0.001"].update(document_losses=[1.0], documents="x")),
      r"is damaged \(it has no 'x'\)",
    ),
    (
      damaged(lambda content: content["runs"].update(other=content["runs"]["baseline/rate0.001"])),
      "the plan 'tiny' has no run 'other'; remove its entry",
    ),
    (
      damaged(lambda content: content["runs"]["baseline/rate0.001"].update(steps=7)),
      "'baseline/rate0.001' was run with steps = 7, but the plan has 1; remove its entry",
    ),
  ],
)
def test_bad_results(write, message, tmp_path):
  path = tmp_path / "results.json"
  write(path)
  with pytest.raises(InputError, match=message):
    ResultsFile(path, TINY)


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--plan=scrach"], "--plan: 'scrach' is unknown; did you mean 'scratch'?"),
    (["--plan="], "--plan: '' is unknown; there are scratch, finetune, gpu"),
    (["--plan=scratch", "--seeds=3"], "--seeds: the plan 'scratch' fixes it; omit it, or omit --plan"),
    (["--plan=scratch", "--settings=ap"], "--settings: the plan 'scratch' fixes it"),
    (["--plan=scratch", "--smoke"], "--smoke: the plan 'scratch' fixes it"),
    (["--plan=scratch", "--nosearch"], "--search: the plan 'scratch' fixes it"),
    (["--plan=scratch", "--jobs=0"], "--jobs: 0 must be at least 1"),
    (["--plan=scratch", "--status", "--table"], "--table: --status is also given"),
    (["--plan=scratch", "--table", "--costs"], "--costs: --table is also given"),
    (["--plan=gpu", "--flops_per_second=1e12"], "--flops_per_second: 1e+12 is only used by --costs"),
    (["--plan=gpu", "--costs", "--flops_per_second=-1"], "--flops_per_second: -1 must not be negative"),
    (["--plan=gpu"], "--stores: the plan 'gpu' trains on prepared token stores"),
    (["--plan=scratch", "--stores=x"], "--stores: the plan 'scratch' prepares its own token stores"),
    (["--status", "--workdir=x"], "--status: it requires --plan"),
    (["--dry_run", "--workdir=x"], "--dry_run: it requires --plan"),
    (["--results=x.json", "--workdir=x"], "--results: it requires --plan"),
  ],
)
def test_bad_flags(words, message, monkeypatch, tmp_path):
  values = flags.FlagValues()
  monkeypatch.setattr(flags, "FLAGS", values)
  for name in ("DEFINE_string", "DEFINE_list", "DEFINE_bool", "DEFINE_integer", "DEFINE_float", "DEFINE"):
    define = getattr(flags, name)
    monkeypatch.setattr(flags, name, lambda *a, define=define, **k: define(*a, **k, flag_values=values))
  monkeypatch.chdir(tmp_path)
  program.define_flags()
  values(["cyb-study", *words])
  with pytest.raises(InputError) as error:
    program.main(["cyb-study"])
  assert str(error.value).startswith(message)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("plan", plans.PLANS.values(), ids=lambda plan: plan.name)
def test_the_rows_of_the_plans_are_valid_configs(plan):
  """Each row resolves, has the plan's number of tokens per step, and nearly the counted cost."""
  by_row = {run.row: run for run in planned_runs.expand(plan, {})}
  models = {name: planned_costs.model_of(plan, run) for name, run in by_row.items()}
  unit = models[plan.reference].step_flops
  for row in plan.rows:
    model = models[row.name]
    assert model.paced == row.paced, row.name
    assert row.cost == pytest.approx(model.step_flops / unit, rel=0.03), row.name
    assert model.start == (("normal", False, True) if plan is plans.GPU else ("small", True, False)), row.name
    sizes = json.loads(model.identity)["data"]
    assert sizes["batch_size"] * sizes["sequence_length"] == plan.step_tokens
  if plan.pretraining:
    # The rows that are fine-tuned have the decoder of the pretrained model.
    decoders = [json.loads(model.identity)["decoder"] for model in models.values()]
    assert all(decoder == decoders[0] for decoder in decoders)


def test_costs_by_hand():
  """D = 16, one layer, 2 heads of 8, F = 128: 4 D N H + 3 D F + D V matrix elements, and 4 N H operations per key."""
  counted = planned_costs.costs(TINY, flops_per_second=1e6)
  vocabulary = 128 * math.ceil(data.ByteTokenizer.vocab_size / 128)  # the rows of the table
  per_token = 3 * (2 * (4 * 16 * 16 + 3 * 16 * 128 + 16 * vocabulary) + 4 * 16 * (16 + 1) / 2)
  baseline, ap, long = counted["rows"]
  assert (baseline["row"], baseline["runs"]) == ("baseline", 4)
  assert (baseline["flops_per_token"], baseline["flops"]) == pytest.approx((per_token, 10 * 128 * per_token))
  assert (ap["runs"], long["runs"], counted["runs"]) == (3, 1, 8)
  assert ap["flops_per_token"] > 2 * per_token
  assert long["flops"] == pytest.approx(12 * 128 * per_token)
  assert counted["flops"] == baseline["flops"] + ap["flops"] + long["flops"]
  assert counted["hours"] == counted["flops"] / 3.6e9
  assert planned_costs.text(counted).splitlines()[-1].startswith("tiny: 8 runs, ")


def test_the_plan_of_a_gpu():
  """30M parameters in the layers, and the rows of `finetune` at 6.7 times the tokens."""
  rows, tuned = ({row.name: row for row in plan.rows} for plan in (plans.GPU, plans.FINETUNE))
  assert rows.keys() == tuned.keys() - {"ap_3x", "baseline_again"}
  for name, row in rows.items():
    assert (row.setting, row.fields, row.paced) == (tuned[name].setting, tuned[name].fields, tuned[name].paced)
    assert row.steps * plans.GPU.step_tokens == pytest.approx(20 / 3 * tuned[name].steps * plans.FINETUNE.step_tokens)
  run = planned_runs.expand(plans.GPU, {})[0]
  assert run.key == "pretraining/3000"
  # D = 512, F = 1536, nine layers.
  decoder = json.loads(planned_costs.model_of(plans.GPU, run).identity)["decoder"]
  layers = decoder["num_layers"]
  assert (layers, layers * (4 * 512**2 + 3 * 512 * 1536)) == (9, 30_670_848)
  assert 35e6 < planned_costs.step_flops(plans.GPU, run) / plans.GPU.step_tokens / 6 < 37e6


@pytest.mark.parametrize("plan", plans.PLANS.values(), ids=lambda plan: plan.name)
def test_a_dry_run_has_the_rows_of_its_plan(plan, tmp_path):
  dry = plans.dry_run(plan)
  assert [row.name for row in dry.rows] == [row.name for row in plan.rows]
  assert all(row.steps <= 6 and row.seeds == 1 for row in dry.rows)
  assert dry.row(dry.longer).steps > dry.row(dry.reference).steps
  run = planned_runs.expand(dry, {})[-1]
  config = json.loads(planned_costs.model_of(dry, run).identity)
  assert config["data"]["batch_size"] * config["data"]["sequence_length"] == dry.step_tokens
  assert (config["decoder"]["d_model"], config["decoder"]["num_layers"]) == (32, 2)
  installed_results = ResultsFile(tmp_path / "results.json", dry)
  installed_results.add("baseline/rate0.004", {})
  with pytest.raises(InputError, match=f"results of the plan '{plan.name}-dry-run', not '{plan.name}'"):
    ResultsFile(tmp_path / "results.json", plan)


def test_prepared_stores(tmp_path, monkeypatch):
  """A plan whose text is divided beforehand trains on the two stores of a folder."""
  assert TUNED.pretraining is not None
  plan = dataclasses.replace(TUNED, pretraining=dataclasses.replace(TUNED.pretraining, task=""))
  with pytest.raises(InputError, match="--stores: the plan 'tuned' trains on prepared token stores; give the folder"):
    planned.check_stores(plan, "")
  with pytest.raises(InputError, match=r"/pretraining is not a token store; experiments/gpu_pack\.py writes a pack"):
    planned.check_stores(plan, str(tmp_path))
  with pytest.raises(InputError, match="--stores: the plan 'tuned' prepares its own token stores; omit it"):
    planned.check_stores(TUNED, str(tmp_path))
  assert planned.check_stores(TUNED, "") is None
  for part in ("pretraining", "finetuning"):
    (tmp_path / "stores" / part).mkdir(parents=True)
    (tmp_path / "stores" / part / "store.json").write_text("{}")
  stores = planned.check_stores(plan, str(tmp_path / "stores"))
  programs = installed(monkeypatch, gain=0.02)
  folder = tmp_path / "study"
  planned.run(plan, folder, ResultsFile(tmp_path / "results.json", plan), 1, stores)
  given = {key: programs.given[f"{folder}/{key}"] for key in ("pretraining/6", "ap/from6/seed0")}
  for key, part in (("pretraining/6", "pretraining"), ("ap/from6/seed0", "finetuning")):
    assert (given[key]["config.data.task"], given[key]["config.data.store"]) == ("jsonl", f"{stores}/{part}")


def test_jobs_share_cores_and_the_memory_of_a_gpu(monkeypatch):
  for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: set(range(16)))
  started = []

  class Started:
    returncode = 0

    def __init__(self, command, env, **_):
      started.append((command, env))

    def communicate(self):
      return "", ""

  monkeypatch.setattr(processes.subprocess, "Popen", Started)
  pool = Processes(3)
  for _ in range(3):
    pool.run(["x"])
  cores = [set(map(int, command[3].split(","))) for command, _ in started]
  assert set.union(*cores) == set(range(16))
  assert sum(map(len, cores)) == 16
  assert {env["XLA_CLIENT_MEM_FRACTION"] for _, env in started} == {"0.300"}
  assert started[0][1]["PATH"] == processes.os.environ["PATH"]
  assert processes.environment(1) is None  # jax's own default
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  assert processes.environment(3) is None  # the user's choice


def test_the_recipe_from_scratch_is_the_best_row():
  """The setting `ap_scratch` trains what the row with the lowest perplexity trains, of those that decide for each token
  and were trained on the same tokens.
  """
  path = pathlib.Path(comparisons.experiment("experiments/reviews.py").__file__).parent / "results/scratch.json"
  entries = json.loads(path.read_text())["runs"]
  first = {entry["row"]: entry["perplexity"] for key, entry in entries.items() if key.endswith("/seed0")}
  rows = {row.name: row for row in plans.SCRATCH.rows if row.name in first and row.paced and row.name != "cyb_looped"}
  best = rows[min(rows, key=first.__getitem__)]
  get_config = comparisons.experiment("experiments/reviews.py").get_config
  trained = command_line.override(get_config(f"{best.setting},nano"), [*plans.SCRATCH.fields, *best.fields])
  ours = command_line.override(get_config("ap_scratch,nano"), list(plans.SCRATCH.fields))
  ours, trained = resolve(ours), resolve(trained)
  assert (ours.method, ours.decoder) == (trained.method, trained.decoder)


def test_the_plans_match_the_readme():
  """5M and 15M tokens from scratch; 1, 1.8 and 3 times the fine-tuning tokens."""
  scratch = {row.name: row for row in plans.SCRATCH.rows}
  assert scratch["ap"].steps * plans.SCRATCH.step_tokens == 5_120_000
  assert scratch["baseline_3x"].steps == 3 * scratch["baseline"].steps
  assert [row.name for row in plans.SCRATCH.groups[0]] == ["baseline", "ap", "mos", "ap_hidden", "tbys3"]
  one = {"ap_prior_0.9", "ap_on_policy", "constant_stop", "wider@ap", "ap_held", "mos_tanh", "ap_sampled", "ap1"}
  one |= {"mean_slots", "looped", "ponderlm2"}
  assert {name: row.seeds for name, row in scratch.items()} == {name: 1 if name in one else 3 for name in scratch}
  assert plans.SCRATCH.search_steps * plans.SCRATCH.step_tokens == 2_048_000
  tuned = {row.name: row.steps for row in plans.FINETUNE.rows}
  assert (tuned["baseline"], tuned["tbys3_1.8x"], tuned["baseline_3x"]) == (600, 1080, 1800)
  for plan in plans.PLANS.values():
    assert len(list(plan.rows)) == len({row.name for row in plan.rows})
    assert {row.rate_of for row in plan.rows if row.rate_of} <= {row.name for row in plan.rows if not row.rate_of}


def in_process(_, module, *options):
  """Runs the programs of a study in this process."""
  from cyb_jax import evaluation
  from cyb_jax.configs import ParallelismConfig
  from cyb_jax.interop import pretrained
  from cyb_jax.partitioning.mesh import make_mesh
  from cyb_jax.training.run_data import open_recorded_or_new_store

  if module.endswith("documents"):
    found = pretrained.load_run(options[0])
    return documents.document_losses(found, open_recorded_or_new_store(found.config, found.meta))
  given = dict(option.lstrip("-").split("=", 1) for option in options)
  workdir = given.pop("workdir")
  if module.endswith("train"):
    path, _, argument = given.pop("config").partition(":")
    config = comparisons.experiment(path).get_config(argument)
    fields = [f"{name.removeprefix('config.')}={value}" for name, value in given.items()]
    return training.train(resolve(command_line.override(config, fields)), workdir)
  found = pretrained.load_run(workdir, mesh=(mesh := make_mesh(ParallelismConfig())))
  store = open_recorded_or_new_store(found.config, found.meta)
  evaluator = evaluation.Evaluator(found.method, mesh, None, given["context"])
  options = {"split": given["split"], "limit": int(given["limit"]), "step": found.step, "meta": found.meta}
  return evaluation.evaluate_split(evaluator, found.params, store, found.config, **options)


@pytest.mark.slow
def test_a_tiny_plan_with_real_runs(tmp_path, monkeypatch):
  """The study is killed twice and continues in an empty folder; losses by document equal those of the evaluations."""
  calls = []

  def program(processes, module, *options):
    if module.endswith("train"):
      calls.append(options)
      if len(calls) % 3 == 0:
        raise KeyboardInterrupt
    return in_process(processes, module, *options)

  monkeypatch.setattr(Processes, "program", program)
  plan = dataclasses.replace(
    TINY, rates=(2e-3,), groups=((dataclasses.replace(TINY.row("baseline"), seeds=1), TINY.row("ap")), TINY.groups[1])
  )
  path, folders = tmp_path / "results.json", 0
  while True:
    folders += 1
    try:
      run(plan, tmp_path / str(folders), path)
      break
    except KeyboardInterrupt:
      continue
  assert folders == 3
  results = ResultsFile(path, plan)
  assert len(results.runs) == 5
  for key in ("baseline/seed0", "ap/seed0", "baseline_long/seed0"):
    entry = results.runs[key]
    tokens = results.documents[entry["documents"]]
    assert sum(tokens) == entry["tokens"]
    loss = np.dot(tokens, entry["document_losses"]) / sum(tokens)
    assert loss == pytest.approx(math.log(entry["perplexity"]), abs=2e-6)
  assert results.runs["ap/seed0"]["self_paced"]["limit"] == 8
  assert results.runs["ap/seed0"]["train_slots"] == 2 * results.runs["ap/seed0"]["train_tokens"] == 1024
  before = table(plan, path)
  assert "| ap " in before
  monkeypatch.setattr(Processes, "program", None)
  run(plan, tmp_path / "empty", path)
  assert table(plan, path) == before
