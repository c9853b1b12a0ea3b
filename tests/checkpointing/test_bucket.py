"""Runs in a simulated bucket (gs://) with failures: they are equal to runs on a disk."""

import asyncio
import json
import os
import pathlib
import re
import signal
import time
import types

import bucket as buckets
import cli
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import assert_trees_equal, tiny_config

import cyb_jax
from cyb_jax import configs, storage, training
from cyb_jax.benchmarks.compared_runs import first_difference
from cyb_jax.checkpointing import bucket as backend
from cyb_jax.checkpointing.manager import Checkpoints
from cyb_jax.checkpointing.workdir import checkpoints_in, is_run
from cyb_jax.errors import DivergedError, InputError, StorageError
from cyb_jax.interop import pretrained
from cyb_jax.report import output
from cyb_jax.training import metrics

gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install 'cyb_jax[gcs]'")

# Exceptions in orbax's threads after a failed save.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STATE = {"params": jnp.arange(4.0), "step": jnp.zeros((), jnp.int32)}


@pytest.fixture
def bucket():
  served = buckets.serving()
  served.clear()
  yield served
  served.clear()


def put_folder(bucket, folder, prefix):
  for path in pathlib.Path(folder).rglob("*"):
    if path.is_file():
      bucket.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def fetch(bucket, prefix, folder):
  """Copies the content of the bucket to a disk."""
  for name, content in bucket.contents(prefix + "/").items():
    path = folder / name.removeprefix(prefix + "/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return folder


def test_the_last_metrics_of_a_diverged_run_are_uploaded(bucket):
  def diverge():
    with metrics.MetricsLog("gs://runs/diverged", 0) as log:
      log.write({"split": "train", "step": 3, "loss": None})
      raise DivergedError("step 3")

  with pytest.raises(DivergedError):
    diverge()
  assert json.loads(bucket.contents("diverged/")["diverged/metrics.jsonl"])["step"] == 3


# --- programs


# Only one process reads the config, and gcsfs doesn't wait before it repeats a request.
MORE = """
import asyncio, os, pathlib, types
import gcsfs

pathlib.Path({path!r}).write_text(str(os.getpid()))
sleep = asyncio.sleep
gcsfs.retry.asyncio = types.SimpleNamespace(sleep=lambda _: sleep(0.01))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A config file, and its run on a disk: 40 steps, a checkpoint every 6 steps."""
  folder = tmp_path_factory.mktemp("programs")
  path = cli.write_config(folder)
  path.write_text(path.read_text() + MORE.format(path=str(folder / "pid")))
  cli.run("train", *flags(folder), f"--workdir={folder / 'whole'}")
  return folder


def flags(folder):
  return (
    f"--config={folder / 'tiny.py'}",
    f"--config.data.store={folder / 'store'}",
    "--config.train.trackers=tensorboard",
  )


@pytest.mark.slow
def test_killed_rejected_and_continued(folder, bucket, tmp_path):
  """After kills during and between saves, lost connections, denials and delays, the run equals a run on a disk."""
  train = ("train", *flags(folder), "--workdir=gs://runs/a/run")
  env = bucket.environment

  def before(method, matching, there, act):
    """Acts at the first request of a method whose name matches, once an object exists."""

    def trouble(asked, name, length):
      del length
      if asked == method and re.search(matching, name) and f"a/run/checkpoints/{there}" in bucket.names():
        act()
      return None

    bucket.trouble = trouble

  def steps():
    return checkpoints_in("gs://runs/a/run", read_only=True).steps()

  def kill():
    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)

  # During the second save.
  before("POST", "checkpoints/12/commit_success.txt", "12/state/commit_success.txt", kill)
  code, _, err = cli.forked(*train, env=env)
  assert code == -signal.SIGKILL, err[-3000:]
  bucket.trouble = None
  assert bucket.names("a/run/checkpoints/12/state/")
  assert steps() == [6]

  # Between two saves.
  before("POST", "metrics.jsonl", "12/checksums.json", kill)
  code, _, err = cli.forked(*train, env=env)
  assert code == -signal.SIGKILL, err[-3000:]
  bucket.trouble = None
  assert steps()[-1] in (12, 18)

  before("POST", "metrics.jsonl", "24/checksums.json", bucket.refuse)
  line = cli.complaint(*train, expect=1, env=env)
  # The error may be in the upload of metrics or in the save, whichever needs the bucket first.
  assert re.match(r"(gs://runs/a/run/metrics.jsonl|checkpoint 30 .*): the bucket can't be reached \(Co", line)
  bucket.trouble = None
  line = cli.complaint(*train, expect=1, env=env)  # the bucket now also rejects the start
  assert line == "gs://runs/a/run: the bucket can't be reached (Connection refused)"
  bucket.open()
  assert steps()[-1] in (24, 30)

  bucket.trouble = lambda method, name, _: 403 if method == "POST" and "/36/state/ocdbt" in name else None
  line = cli.complaint(*train, expect=1, env=env)
  assert line == (
    "checkpoint 36 can't be saved in gs://runs/a/run/checkpoints: the bucket denies access to this account (HTTP 403);"
    " the same command continues from the checkpoint of step 30"
  )

  waits = [buckets.troubles([503], "POST", pattern) for pattern in ("/36/state/ocdbt", "/40/meta/", "metrics.jsonl")]
  waits.append(buckets.troubles(["cut"], "GET", "config.json"))
  bucket.trouble = lambda *asked: next(filter(None, (wait(*asked) for wait in waits)), None)
  evaluation, _ = cli.run(*train, env=env)
  assert not any(bucket.trouble("POST", name, 0) for name in ("/36/state/ocdbt", "/40/meta/", "metrics.jsonl"))
  bucket.trouble = None

  copy = fetch(bucket, "a/run", tmp_path / "copy")
  assert first_difference(folder / "whole", copy) is None
  assert json.loads(bucket.contents()["a/run/evaluation.json"]) == evaluation
  assert not bucket.names("a/run/.")
  assert len(bucket.names("a/run/tensorboard/events.out.tfevents.")) >= 3
  # The run is evaluated in the bucket.
  found, _ = cli.run("evaluate", "--workdir=gs://runs/a/run", "--limit=4", env=env)
  expected, _ = cli.run("evaluate", f"--workdir={folder / 'whole'}", "--limit=4")
  assert found == expected
  assert json.loads(bucket.contents()["a/run/evaluation.json"]) == found


def test_a_rejected_start(folder, bucket):
  bucket.trouble = lambda *_: 403
  line = cli.complaint("train", *flags(folder), "--workdir=gs://runs/b", env=bucket.environment)
  assert line == "gs://runs/b: the bucket denies access to this account (HTTP 403)"
  line = cli.complaint("evaluate", "--workdir=gs://runs/b", env=bucket.environment)
  assert line == "gs://runs/b: the bucket denies access to this account (HTTP 403)"


# --- in this process


@pytest.fixture(scope="module")
def config():
  return configs.freeze(tiny_config())


@pytest.fixture
def impatient(monkeypatch):
  """gcsfs doesn't wait before it repeats a request."""
  sleep = asyncio.sleep
  monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=lambda _: sleep(0)))


@pytest.mark.parametrize(
  ("status", "message"),
  [
    (401, r"the bucket requires authentication \(HTTP 401\); run gcloud auth application-default login"),
    (403, r"the bucket denies access to this account \(HTTP 403\)"),
    (418, r"the bucket rejected the request \(HTTP 418\)"),
    (503, r"the bucket rejected the request \(HTTP 503\)"),
    ("cut", r"the bucket can't be reached \(.*not completed"),
  ],
)
def test_answers_of_a_bucket_at_the_start(bucket, config, impatient, status, message):
  bucket.trouble = lambda *_: status
  # A failure that may be temporary is not bad input.
  kind = StorageError if status in (503, "cut") else InputError
  with pytest.raises(kind, match=f"^gs://runs/run: {message}"):
    training.train(config, "gs://runs/run")
  assert not bucket.objects


def test_no_bucket(bucket, config):
  with pytest.raises(InputError, match=r"gs://other/run: there is no bucket gs://other; create it first"):
    training.train(config, "gs://other/run")
  with pytest.raises(InputError, match=r"gs://: the bucket is missing"):
    training.train(config, "gs://")
  with pytest.raises(InputError, match=r"--profile: 3, but no trace can be written to gs://runs/run"):
    training.train(config, "gs://runs/run", profile=3)
  with pytest.raises(InputError, match=r"workdir: gs://runs/none contains no run"):
    pretrained.load_run("gs://runs/none")
  assert not is_run("gs://runs/none")


def test_a_run_that_was_copied_to_a_bucket(folder, bucket):
  """Its checksums are of another kind, and are also checked in the bucket."""
  put_folder(bucket, folder / "whole", "copied")
  there, here = cyb_jax.load("gs://runs/copied"), cyb_jax.load(folder / "whole")
  assert there.step == here.step == 40
  assert there.config == here.config
  assert_trees_equal(there.params, here.params)
  found = pretrained.open_pretrained("gs://runs/copied")
  assert found.kind == "run"
  assert found.tokenizer.describe() == here.tokenizer.describe()
  # A byte is changed; the size is unchanged.
  name = max(bucket.names("copied/checkpoints/40/state"), key=lambda name: len(bucket.contents()[name]))
  content = bytearray(bucket.contents()[name])
  content[len(content) // 2] ^= 1
  bucket.put(name, content)
  assert cyb_jax.load("gs://runs/copied").step == 36
  with pytest.raises(InputError, match=r"checkpoint: 40 in gs://runs/copied/checkpoints is damaged: state/.* altered"):
    cyb_jax.load("gs://runs/copied", 40)


@pytest.fixture
def saved(bucket):
  checkpoints = Checkpoints("gs://runs/c", keep=2)
  for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, float("nan")), (5, None)):
    checkpoints.save(step, jax.tree.map(lambda x, s=step: x + s, STATE), {"tokens": 10 * step}, loss=loss)
  checkpoints.wait()
  yield checkpoints
  checkpoints.close()


def test_checkpoints(saved, bucket):
  assert saved.steps() == [2, 4, 5]
  assert (saved.find("last"), saved.find("best")) == (5, 2)
  assert saved.meta(4) == {"tokens": 40}
  np.testing.assert_array_equal(saved.read(4).state["params"], np.arange(4.0) + 4)
  # Nothing remains of deleted checkpoints.
  assert {name.split("/")[1] for name in bucket.names("c/")} == {"2", "4", "5", "owner.json"}
  # No byte of the state is read to find damage.
  bucket.requests.clear()
  assert saved.damage(5) is None
  assert all(name.endswith(("checksums.json", "c/5/")) for _, name in bucket.requests)


def test_damage(saved, bucket):
  names = bucket.names("c/5/")
  assert len(names) > 10
  for name in names:
    content = bucket.contents()[name]
    flipped = bytes([content[0] ^ 1]) + content[1:]
    short = name.removeprefix("c/5/")
    for other, damage in (
      (flipped, "was altered"),
      (content + b" ", f"is {len(content) + 1} bytes, not {len(content)}"),
    ):
      bucket.put(name, other)
      if short != "checksums.json":
        assert saved.damage(5) == f"{short} {damage}"
    del bucket.objects[name]
    assert saved.damage(5) == f"{short} is missing"
    bucket.put(name, content)
  assert saved.damage(5) is None


def test_a_bucket_that_denies_access_is_neither_empty_nor_damaged(saved, bucket):
  before = bucket.contents()
  bucket.trouble = lambda *_: 403
  for ask in (saved.steps, lambda: saved.damage(5), lambda: saved.find("last"), lambda: saved.meta(5)):
    with pytest.raises(StorageError, match=r"gs://runs/c.*: the bucket denies access to this account \(HTTP 403\)"):
      ask()
  with pytest.raises(StorageError, match="HTTP 403"):
    Checkpoints("gs://runs/c")
  bucket.trouble = lambda method, name, _: 403 if name.endswith("5/checksums.json") else None
  with pytest.raises(StorageError, match="HTTP 403"):
    Checkpoints("gs://runs/c")
  before.pop("c/owner.json")
  assert {name: content for name, content in bucket.contents().items() if name != "c/owner.json"} == before


def test_remains_of_killed_runs(saved, bucket):
  """Incomplete saves and deletions are deleted; damaged checkpoints are moved to the quarantine completely."""
  bucket.put("c/7/state/manifest.ocdbt", b"half")
  del bucket.objects["c/4/checksums.json"]
  del bucket.objects["c/5/state/manifest.ocdbt"]
  damaged = {name.removeprefix("c/5/"): content for name, content in bucket.contents("c/5/").items()}
  reader = Checkpoints("gs://runs/c", read_only=True)
  assert reader.steps() == [2, 5]
  assert bucket.names("c/7/")  # a training run may be writing
  again = Checkpoints("gs://runs/c", keep=2)
  assert again.steps() == [2]
  assert not bucket.names("c/4/") + bucket.names("c/5/") + bucket.names("c/7/")
  assert bucket.contents("c/damaged/5/") == {f"c/damaged/5/{name}": content for name, content in damaged.items()}
  bucket.put("c/5/state/manifest.ocdbt", b"of a run that has been taken over")
  again.save(5, STATE, {})
  again.wait()
  assert again.steps() == [2, 5]
  assert again.damage(5) is None
  np.testing.assert_array_equal(again.read(5).state["params"], STATE["params"])
  again.close()


def test_a_damaged_checkpoint_whose_move_was_interrupted(saved, bucket):
  del bucket.objects["c/5/state/manifest.ocdbt"]
  bucket.trouble = lambda method, name, _: 403 if method == "POST" and name == "c/5/meta/metadata" else None
  with pytest.raises(StorageError):
    Checkpoints("gs://runs/c")
  assert "c/5/checksums.json" in bucket.names()  # so the rest is not taken for an unfinished save
  bucket.trouble = None
  Checkpoints("gs://runs/c").close()
  assert not bucket.names("c/5/")
  assert "c/damaged/5.1/meta/metadata" in bucket.names()


@pytest.fixture
def few_retries(monkeypatch):
  """Makes TensorStore give up early; by default it would retry for longer than a test may last."""
  monkeypatch.setattr(backend, "RETRIES", {"max_retries": 3, "initial_delay": "0.01s", "max_delay": "0.01s"})


@pytest.mark.parametrize(
  ("part", "trouble"),
  [("ocdbt.process_0/d/", 503), ("ocdbt.process_0/d/", "refused"), ("d/", 503)],
  ids=["arrays-503", "arrays-refused", "merge-503"],
)
def test_a_bucket_that_fails_during_a_save(bucket, impatient, few_retries, part, trouble):
  """The bucket fails while TensorStore writes the arrays, or the index of all processes' arrays."""
  checkpoints = Checkpoints("gs://runs/c")
  checkpoints.save(1, STATE, {})
  checkpoints.wait()

  def fail(method, name, length):
    if method == "POST" and f"2/state/{part}" in name:
      if trouble == 503:
        return 503
      bucket.refuse()
    return None

  bucket.trouble = fail
  start = time.monotonic()
  checkpoints.save(2, STATE, {})
  with pytest.raises(
    StorageError, match=r"checkpoint 2 can't be saved .*: the bucket .*; the same command continues from"
  ):
    checkpoints.wait()
  assert time.monotonic() - start < 10
  checkpoints.close()


def test_a_bucket_that_fails_while_a_checkpoint_is_read(saved, bucket, impatient, few_retries):
  reader = Checkpoints("gs://runs/c", read_only=True)
  bucket.trouble = lambda method, name, _: 503 if "/5/state/d/" in name else None  # read by TensorStore
  start = time.monotonic()
  with pytest.raises(StorageError, match=r"checkpoint 5 in gs://runs/c can't be read: the bucket .* \(HTTP 503\)"):
    reader.read(5)
  assert time.monotonic() - start < 10


def test_a_second_run_takes_over(saved, bucket):
  later = Checkpoints("gs://runs/c", keep=2)
  saved.save(6, STATE, {})
  with pytest.raises(
    StorageError, match=r"gs://runs/c: another run has taken over this folder \(.*process \d+.*\) and continues"
  ):
    saved.wait()
  assert later.steps() == [2, 4, 5]
  later.close()


def test_metrics(bucket, monkeypatch):
  log = metrics.MetricsLog("gs://runs/run", 0, trackers="tensorboard")
  row = {"split": "train", "loss": 0.5}
  log.write(row | {"step": 1})
  assert not bucket.names("run/metrics")
  log.flush()
  log.write(row | {"step": 2})
  assert [row["step"] for row in metrics.read_metrics("gs://runs/run")] == [1]
  monkeypatch.setattr(metrics, "_UPLOAD_SECONDS", 0.0)
  log.write(row | {"step": 3})
  assert [row["step"] for row in metrics.read_metrics("gs://runs/run")] == [1, 2, 3]
  log.close()
  assert len(bucket.names("run/tensorboard/events.out.tfevents.")) == 1
  log = metrics.MetricsLog("gs://runs/run", 2)
  log.write(row | {"step": 4})
  bucket.trouble = lambda *_: 403
  start = time.monotonic()
  log.close()  # logs a warning
  assert time.monotonic() - start < 5
  bucket.trouble = None
  assert [row["step"] for row in metrics.read_metrics("gs://runs/run")] == [1, 2, 4]


def test_a_report_in_a_bucket(bucket):
  path = output.check_output("gs://runs/run/report")
  page = output.generator(["a.png", "b.png"])
  output.write_folder(path, {"index.html": page, "a.png": b"1", "b.png": b"2"})
  output.check_output("gs://runs/run/report")
  output.write_folder(path, {"index.html": page, "a.png": b"3"})
  assert bucket.contents() == {"run/report/index.html": page.encode(), "run/report/a.png": b"3"}
  bucket.put("run/report/mine.txt", b"")
  with pytest.raises(
    InputError, match=r"--output: gs://runs/run/report holds 'mine.txt', which is not part of a report"
  ):
    output.check_output("gs://runs/run/report")


def test_folders(bucket, tmp_path):
  folder = storage.place("gs://runs/a")
  bucket.put("a/", b"")  # like the web console creates a folder
  bucket.put("ab/x", b"")
  assert storage.names(folder) == list(storage.files(folder)) == []
  with storage.new_folder(folder) as local:
    (local / "b").mkdir()
    (local / "b" / "c").write_text("é")
  assert storage.names(folder) == ["b"]
  assert list(storage.files(folder)) == ["b/c"]
  with storage.local_folder(folder) as local:
    assert (local / "b" / "c").read_text() == "é"
  bucket.put("a/large", bytes(2**20) * 11)
  files = storage.files(folder)
  assert files.size("large") == 11 * 2**20
  (tmp_path / "large").write_bytes(bytes(2**20) * 11)
  for kind in ("md5", "sha256"):
    assert files.digest("large", kind) == storage.files(tmp_path).digest("large", kind)
  storage.upload_folder(tmp_path, folder / "up")  # in parts
  assert bucket.contents()["a/up/large"] == bytes(2**20) * 11
  storage.remove_tree(folder)
  assert bucket.names() == ["a/", "ab/x"]
