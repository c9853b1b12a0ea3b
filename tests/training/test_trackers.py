"""Trackers: what they are given, that a run continues there, and that none of them stops training."""

import collections
import json
import math
import pathlib
import struct
import time
import types

import pytest
from models import tiny_config

from cyb_jax import configs, storage, training
from cyb_jax.errors import DivergedError, InputError
from cyb_jax.studies import plans
from cyb_jax.studies.results_file import ResultsFile
from cyb_jax.training import trackers
from cyb_jax.training.metrics import MetricsLog, read_metrics
from cyb_jax.training.trackers import registry


class Fake:
  """Records its calls; `fails` names the method that raises, `prints` is written to standard output by all."""

  package, extra = "json", ""
  calls: list
  fails = ""

  def __init__(self, run):
    self.run_id = run.run_id or f"id of {run.name}"
    self._called("start", run.step, run.run_id)

  def _called(self, name, *values):
    print(f"{name} prints")
    self.calls.append((name, *values))
    if self.fails == name:
      raise RuntimeError(f"{name} fails\nand more")

  def log_config(self, config):
    self._called("log_config", config)

  def log_metrics(self, step, metrics):
    self._called("log_metrics", step, metrics)

  def log_report(self, folder):
    self._called("log_report", sorted(path.name for path in folder.iterdir()))

  def finish(self, *, complete):
    self._called("finish", complete)


@pytest.fixture
def fake(monkeypatch):
  """A registered tracker 'fake'."""
  tracker = type("New", (Fake,), {"calls": []})
  monkeypatch.setitem(registry.TRACKERS, "fake", tracker)
  return tracker


@pytest.fixture
def broken(monkeypatch):
  """A registered tracker 'broken', which fails in the method that a test sets."""
  tracker = type("Broken", (Fake,), {"calls": []})
  monkeypatch.setitem(registry.TRACKERS, "broken", tracker)
  return tracker


def names(calls):
  return [name for name, *_ in calls]


ROW = {
  "split": "train", "step": 3, "loss": 2.5, "latency": [0.25, 0.75], "limit": None, "name": "x", "flag": True,
  "timing": {"seconds": 2},
}  # fmt: skip


def test_a_tracker_gets_config_and_numbers(tmp_path, fake, capsys):
  with MetricsLog(tmp_path, 2, trackers="fake", config={"train": {"steps": 5}}) as log:
    log.write(ROW)
  assert fake.calls == [
    ("start", 2, None),
    ("log_config", {"train": {"steps": 5}}),
    ("log_metrics", 3, {
      "train/loss": 2.5, "train/latency/0": 0.25, "train/latency/1": 0.75, "train/timing/seconds": 2.0,
    }),
    ("finish", True),
  ]  # fmt: skip
  # Standard output belongs to the program's result.
  out, err = capsys.readouterr()
  assert out == ""
  assert "log_metrics prints" in err


def test_a_run_continues_under_its_id(tmp_path, fake):
  for step in (0, 4):
    MetricsLog(tmp_path, step, trackers="fake,tensorboard").close()
  assert [call[1:] for call in fake.calls if call[0] == "start"] == [(0, None), (4, f"id of {tmp_path.name}")]
  # TensorBoard continues by its files.
  assert json.loads((tmp_path / "trackers.json").read_text()) == {"fake": f"id of {tmp_path.name}"}
  # The id is written before anything else happens: a killed run has it too.
  assert names(fake.calls)[:2] == ["start", "log_config"]
  (tmp_path / "trackers.json").write_text("{")
  MetricsLog(tmp_path, 5, trackers="fake").close()
  assert fake.calls[-3] == ("start", 5, None)


@pytest.mark.parametrize("method", ["start", "log_config", "log_metrics", "log_report", "finish"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(tmp_path, fake, broken, method, caplog):
  broken.fails = method
  report = tmp_path / "report"
  report.mkdir()
  found = trackers.Trackers("broken,fake", storage.place(tmp_path), tmp_path, 0)
  found.log_config({})
  for _ in range(2):
    found.log_metrics(ROW)
  found.log_report(report)
  found.finish()
  everything = ["start", "log_config", "log_metrics", "log_metrics", "log_report", "finish"]
  assert names(fake.calls) == everything
  assert names(broken.calls) == everything[: everything.index(method) + 1]
  warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
  assert warnings == [f"tracker broken has failed and is left out: RuntimeError: {method} fails"]


def test_training_is_the_same_with_trackers_that_work_and_fail(tmp_path, fake, broken):
  config = tiny_config(pauses=2)
  config.train.update(steps=4, log_every=1, eval_every=2)
  plain = training.train(configs.freeze(config), tmp_path / "plain")
  config.train.trackers = "fake,broken"
  broken.fails = "log_metrics"
  assert training.train(configs.freeze(config), tmp_path / "run") == plain
  rows = read_metrics(tmp_path / "run")
  found = [(step, metrics) for name, step, metrics in (c for c in fake.calls if c[0] == "log_metrics")]
  assert [step for step, _ in found] == [row["step"] for row in rows]
  for (_, metrics), row in zip(found, rows):
    assert metrics[f"{row['split']}/loss"] == row["loss"]
  assert names(broken.calls) == ["start", "log_config", "log_metrics"]
  (_, given) = next(call for call in fake.calls if call[0] == "log_config")
  assert (given["train"]["trackers"], given["method"]["pauses"]) == ("fake,broken", 2)
  # Trackers change no result: the run may be continued with others.
  config.train.update(trackers="")
  assert training.train(configs.freeze(config), tmp_path / "run") == plain


def test_a_run_that_ends_with_an_error_is_not_complete(tmp_path, fake):
  config = tiny_config(pauses=2)
  config.optimizer.learning_rate = 1e30
  config.train.update(steps=8, log_every=1, max_skipped=1, trackers="fake")
  with pytest.raises(DivergedError):
    training.train(configs.freeze(config), tmp_path)
  assert fake.calls[-1] == ("finish", False)


def test_a_report_goes_where_the_metrics_are(tmp_path, fake, broken):
  report = tmp_path / "report"
  report.mkdir()
  (report / "index.html").write_text("page")
  place = storage.place(tmp_path)
  trackers.log_report("tensorboard,fake", place, report)  # no tracker has seen the run
  assert fake.calls == []
  MetricsLog(tmp_path, 0, trackers="fake").close()
  fake.calls.clear()
  trackers.log_report("tensorboard,fake,broken,of another version", place, report)
  assert fake.calls == [
    ("start", 0, f"id of {tmp_path.name}"), ("log_report", ["index.html"]), ("finish", True),
  ]  # fmt: skip
  assert broken.calls == []


@pytest.mark.parametrize(
  ("names", "message"),
  [
    ("wandbb", r"train.trackers: 'wandbb' is unknown; did you mean 'wandb'\?"),
    ("comet", r"train.trackers: 'comet' is unknown; there are tensorboard, wandb, trackio, mlflow"),
    ("tensorboard, tensorboard", "'tensorboard' is given twice"),
  ],
)
def test_unknown_trackers_are_refused(names, message):
  with pytest.raises(InputError, match=message):
    trackers.check_trackers(names)


def test_a_missing_package_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
  find = registry.importlib.util.find_spec
  # A folder of that name in the working directory is no package.
  other = {"wandb": None, "mlflow": types.SimpleNamespace(origin=None)}
  monkeypatch.setattr(
    registry.importlib.util, "find_spec", lambda name: other.get(name) if name in other else find(name)
  )
  trackers.check_installed(" tensorboard ,")
  for name in other:
    config = tiny_config(pauses=2)
    config.train.trackers = f"tensorboard,{name}"
    with pytest.raises(InputError, match=rf"train.trackers: '{name}' needs .* pip install 'cyb_jax\[{name}\]'"):
      training.train(configs.freeze(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_results_of_a_plan_that_named_the_switch_are_read(tmp_path):
  plan = next(iter(plans.PLANS.values()))
  path = tmp_path / "results.json"
  file = ResultsFile(path, plan)
  text = file._text()
  assert "train.trackers=" in text
  path.write_text(text.replace("train.trackers=", "train.tensorboard=False"))
  assert ResultsFile(path, plan).runs == {}


# The libraries themselves, without a network. They are no dependencies of the tests: make test skips these.


def write(tmp_path, name, step, losses):
  """One process of a run: metrics from a step on, then the end."""
  with MetricsLog(tmp_path / "my run", step, trackers=name, config={"train": {"steps": 4}, "omega": [0.5, 0.5]}) as log:
    for loss in losses:
      step += 1
      log.write({"split": "train", "step": step, "loss": loss, "sources": {"jsonl(pattern=a*)": {"tokens": 3}}})


def report(tmp_path, name):
  folder = tmp_path / "report"
  folder.mkdir()
  (folder / "index.html").write_text("page")
  trackers.log_report(name, storage.place(tmp_path / "my run"), folder)


def run_id(tmp_path, name):
  return json.loads((tmp_path / "my run" / "trackers.json").read_text())[name]


def in_two_processes(tmp_path, name, caplog, capsys):
  """A run that is continued, and its report; the library's id of it."""
  (tmp_path / "my run").mkdir()
  write(tmp_path, name, 0, [3.0, float("nan")])
  found = run_id(tmp_path, name)
  write(tmp_path, name, 1, [2.0, 1.0])
  report(tmp_path, name)
  assert run_id(tmp_path, name) == found
  assert [record.getMessage() for record in caplog.records if "tracker" in record.getMessage()] == []
  assert capsys.readouterr().out == ""
  return found


def wandb_records(path):
  """The records of a file of wandb by their kinds; it is a log of LevelDB after seven bytes of its own."""
  from wandb.proto import wandb_internal_pb2

  content, found = path.read_bytes(), collections.defaultdict(list)
  place, data = 7, b""
  while place + 7 <= len(content):
    space = 2**15 - place % 2**15
    if space < 7:  # the rest of a block that has no space for a header
      place += space
      continue
    _, size, kind = struct.unpack_from("<IHB", content, place)
    data += content[place + 7 : place + 7 + size]
    place += 7 + size
    if kind in (1, 4):  # whole, or the last part
      record = wandb_internal_pb2.Record.FromString(data)
      name = record.WhichOneof("record_type")
      found[name].append(getattr(record, name))
      data = b""
  return found


def test_wandb(tmp_path, monkeypatch, caplog, capsys):
  wandb = pytest.importorskip("wandb", reason="wandb is not installed (extra wandb)")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  found = in_two_processes(tmp_path, "wandb", caplog, capsys)
  files = sorted((tmp_path / "my run" / "wandb").glob(f"offline-run-*-{found}/run-{found}.wandb"))
  assert len(files) == 3
  # wandb's own process writes the last records after the run has been finished.
  deadline = time.monotonic() + 30
  while not all(wandb_records(file)["exit"] for file in files) and time.monotonic() < deadline:
    time.sleep(0.1)
  records = [wandb_records(file) for file in files]
  runs = [(record.run_id, record.display_name, record.project) for each in records for record in each["run"]]
  assert runs == [(found, "my run", "cyb_jax")] * 3
  history = [record.item for each in records for record in each["history"]]
  rows = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in items} for items in history]
  assert [row["_step"] for row in rows] == [1, 2, 2, 3]
  assert [row["train/loss"] for row in rows if not math.isnan(row["train/loss"])] == [3.0, 2.0, 1.0]
  assert [record.type for each in records for record in each["artifact"]] == ["report"]
  assert wandb.run is None


def test_trackio(tmp_path, monkeypatch, caplog, capsys):
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
  trackio = pytest.importorskip("trackio", reason="trackio is not installed (extra trackio)")
  from trackio.sqlite_storage import SQLiteStorage

  monkeypatch.setenv("TRACKIO_PROJECT", f"test-{tmp_path.name}")  # the folder is read once, at the import
  found = in_two_processes(tmp_path, "trackio", caplog, capsys)
  assert found.startswith("my run-")
  rows = SQLiteStorage.get_logs(f"test-{tmp_path.name}", found)
  assert [row["step"] for row in rows] == [1, 2, 2, 3]
  assert [row["train/loss"] for row in rows[2:]] == [2.0, 1.0]
  (run,) = trackio.Api().runs(f"test-{tmp_path.name}")
  assert (run.name, run.config["train"]) == (found, {"steps": 4})
  stored = [path for path in (tmp_path / "trackio" / "artifacts").rglob("*") if path.is_file()]
  assert "page" in [path.read_text() for path in stored]


def test_mlflow(tmp_path, monkeypatch, caplog, capsys):
  mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (extra mlflow)")
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
  monkeypatch.chdir(tmp_path)
  found = in_two_processes(tmp_path, "mlflow", caplog, capsys)
  client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
  run = client.get_run(found)
  assert (run.info.run_name, run.info.status) == ("my run", "FINISHED")
  assert run.data.params == {"train.steps": "4", "omega": "[0.5, 0.5]"}
  history = client.get_metric_history(found, "train/loss")
  assert sorted((point.step, point.value) for point in history if not math.isnan(point.value)) == [
    (1, 3.0), (2, 2.0), (3, 1.0),
  ]  # fmt: skip
  assert "train/sources/jsonl_pattern_a__/tokens" in run.data.metrics
  assert [pathlib.PurePath(file.path).name for file in client.list_artifacts(found, "report")] == ["index.html"]
