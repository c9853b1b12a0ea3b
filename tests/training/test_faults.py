"""Runs that are killed, or whose disk fails or is damaged, have the same results; permanent errors are reported."""

import contextlib
import itertools
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading
import time

import cli
import jax.numpy as jnp
import pytest
from absl import logging
from models import tiny_config

import cyb_jax
from cyb_jax import configs, data, storage, training
from cyb_jax.benchmarks.compared_runs import first_difference
from cyb_jax.benchmarks.lives import PHASES
from cyb_jax.checkpointing.manager import Checkpoints
from cyb_jax.checkpointing.workdir import Lock, checkpoints_in
from cyb_jax.errors import InputError, StorageError
from cyb_jax.training import run_data, trainer

# Exceptions in orbax's threads after a failed save.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.slow
def test_kills():
  """The short form of `cyb-benchmark faults`."""
  result, _ = cli.run("benchmark", "faults", "--kills=3")
  assert result["identical"]
  assert result["difference"] is None
  assert result["phases"].keys() == PHASES.keys()
  assert sum(result["phases"].values()) == result["kills"] == 3
  assert "--kills: 0 must be at least 1" in cli.complaint("benchmark", "faults", "--kills=0")
  assert "--kills_seed: -1 must be in" in cli.complaint("benchmark", "faults", "--kills_seed=-1")


@pytest.fixture
def two_folders(tmp_path):
  """Two folders that look like the same finished run."""
  for name in ("a", "b"):
    (tmp_path / name / "tokenizer").mkdir(parents=True)
    for file in ("config.json", "evaluation.json", "tokenizer/tokenizer.json"):
      (tmp_path / name / file).write_text("{}")
    rows = [{"split": "train", "step": step, "loss": 0.5, "timing": {"seconds": name}} for step in (1, 2)]
    (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save(tmp_path / name, jnp.arange(3.0))
  return tmp_path / "a", tmp_path / "b"


def save(folder, array, steps=(1, 2)):
  with contextlib.closing(checkpoints_in(folder, keep=2)) as checkpoints:
    for step in steps:
      checkpoints.save(step, {"params": {"x": array + step}}, {"train_tokens": step})


def test_every_difference_is_found(two_folders):
  a, b = two_folders
  assert first_difference(a, b) is None
  for file in ("config.json", "evaluation.json", "tokenizer/tokenizer.json"):
    (b / file).write_text("{ }")
    assert first_difference(a, b) == file
    (b / file).write_text("{}")
  shutil.rmtree(b / "checkpoints")
  save(b, jnp.array([0.0, 1.0, 2.0000002]))
  assert first_difference(a, b) == "checkpoint 1: params/x"
  shutil.rmtree(b / "checkpoints" / "1")
  assert first_difference(a, b) == "checkpoints: [2], not [1, 2]"
  text = (b / "metrics.jsonl").read_text()
  (b / "metrics.jsonl").write_text(text.splitlines(keepends=True)[0])
  assert first_difference(a, b) == "metrics.jsonl: 1 lines, not 2"
  (b / "metrics.jsonl").write_text(text.replace("0.5", "0.25"))
  assert first_difference(a, b) == "metrics.jsonl, line 1, loss"


def test_a_checkpoint_that_a_signal_has_added_is_no_difference(two_folders):
  for folder, steps in zip(two_folders, ((1, 3), (2, 3))):
    shutil.rmtree(folder / "checkpoints")
    save(folder, jnp.arange(3.0), steps)
  assert first_difference(*two_folders) == "checkpoints: [2, 3], not [1, 3]"
  assert first_difference(*two_folders, interrupted={2, 7}) is None
  assert first_difference(*two_folders, interrupted={1, 3}) == "checkpoints: [2, 3], not [1, 3]"
  shutil.rmtree(two_folders[1] / "checkpoints" / "3")
  assert first_difference(*two_folders, interrupted={2}) == "checkpoints: [2], not [1, 3]"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  source = tiny_config(pauses=1)
  folder = tmp_path_factory.mktemp("store") / "store"
  source.data.store = str(data.prepare("synthetic_lookups", "bytes", folder, options={"documents": 64}).path)
  return configs.freeze(source)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config):
  """An undisturbed run: 12 steps, checkpoints at 5, 10 and 12, of which the newest two are kept."""
  folder = tmp_path_factory.mktemp("whole") / "run"
  training.train(config, folder)
  return folder


@pytest.fixture
def copy(tmp_path, whole):
  return pathlib.Path(shutil.copytree(whole, tmp_path / "run"))


def contents(folder):
  return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def largest_file(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
  whole = bytearray(path.read_bytes())
  whole[len(whole) // 2] ^= 1
  path.write_bytes(whole)


@pytest.fixture
def warnings(monkeypatch):
  seen = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: seen.append(text % args))
  return seen


def test_a_damaged_newest_checkpoint_is_skipped(copy, config, whole, warnings):
  flip(largest_file(copy / "checkpoints" / "12" / "state"))
  assert cyb_jax.load(copy).step == 10
  assert any("checkpoint 12" in w and "was altered; 10 is used instead" in w for w in warnings)
  with pytest.raises(InputError, match=r"checkpoint: 12 in .* is damaged: state/.* was altered"):
    cyb_jax.load(copy, 12)
  with pytest.raises(InputError, match=r"checkpoint: 12 in .* is damaged"):  # the only one with a validation
    cyb_jax.load(copy, "best")
  before = contents(copy / "checkpoints" / "12")
  (copy / "evaluation.json").unlink()
  training.train(config, copy)
  assert first_difference(whole, copy) is None
  # It is moved, not deleted.
  assert sorted(contents(copy / "checkpoints" / "damaged" / "12").values()) == sorted(before.values())
  assert any("it was moved to" in w and "damaged/12; 10 is used instead" in w for w in warnings)


def test_a_run_never_silently_restarts(copy, config):
  for step in ("10", "12"):
    largest_file(copy / "checkpoints" / step / "state").unlink()
  before = contents(copy / "checkpoints")
  for _ in range(2):
    with pytest.raises(
      InputError, match=r"checkpoints: all checkpoints in .* are damaged \(12: state/.* is missing; 10: state/"
    ):
      training.train(config, copy)
  with pytest.raises(InputError, match=r"checkpoints: all checkpoints in .* are damaged"):
    cyb_jax.load(copy)
  assert contents(copy / "checkpoints") == before


def test_a_killed_start(tmp_path, config, whole):
  """Incomplete files, folders, saves and deletions of a killed start do not prevent a restart."""
  folder = tmp_path / "run"
  (folder / "tokenizer").mkdir(parents=True)
  (folder / "tokenizer" / "tokenizer.json").write_text("{")
  shutil.copy(whole / "config.json", folder)
  (folder / "config.json.123.tmp").write_text("{")
  (folder / "metrics.jsonl").write_text('{"split": "train", "st')
  for leftover in ("5.orbax-checkpoint-tmp", "5.deleted/state"):
    (folder / "checkpoints" / "unfinished" / leftover).mkdir(parents=True)
  training.train(config, folder)
  assert first_difference(whole, folder) is None
  assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
  assert {p.name for p in (folder / "checkpoints").iterdir()} == {"10", "12"}


def test_a_second_run_in_a_folder_is_rejected(copy, config, tmp_path):
  with Lock(copy):
    before = contents(copy)
    with pytest.raises(InputError, match=r"workdir: another run is training in .*run; wait for its end"):
      training.train(config, copy)
    assert cyb_jax.load(copy).step == 12  # readers are not affected by the lock
    # It is also rejected in a separate process, for any config.
    flags = f"--config={cli.write_config(tmp_path)}", f"--workdir={copy}"
    assert "another run is training in" in cli.complaint("train", *flags)
    assert contents(copy) == before
  training.train(config, copy)


def test_two_runs_that_start_together(tmp_path, config, monkeypatch):
  """Both have seen an empty folder; the second to write is rejected, whether the first still runs or has ended."""
  folder = tmp_path / "run"
  prepared = run_data.open_store

  def other_holds(config):
    folder.mkdir()
    lock.__enter__()
    lock.hold()
    return prepared(config)

  with contextlib.closing(contextlib.ExitStack()) as stack:
    lock = Lock(folder)
    stack.push(lock)
    monkeypatch.setattr(run_data, "open_store", other_holds)
    with pytest.raises(InputError, match="another run is training in"):
      training.train(config, folder)
    assert [p.name for p in folder.iterdir()] == [".lock"]

  def other_ends(config):
    monkeypatch.setattr(run_data, "open_store", prepared)
    thread = threading.Thread(target=training.train, args=(config, folder))
    thread.start()
    thread.join()
    return prepared(config)

  shutil.rmtree(folder)
  monkeypatch.setattr(run_data, "open_store", other_ends)
  with pytest.raises(InputError, match=r"another run has just trained in .*; start again to continue it"):
    training.train(config, folder)
  assert cyb_jax.load(folder).step == 12


def test_an_altered_shard_stops_a_run_before_it_continues(copy, config, tmp_path):
  store = pathlib.Path(config.data.store)
  shutil.copytree(store, tmp_path / "kept")
  shutil.rmtree(copy / "checkpoints" / "12")
  before = contents(copy)
  flip(next(store.glob("train-*.tokens")))
  try:
    with pytest.raises(InputError, match=r"data.store: .*train-00000.tokens was altered"):
      training.train(config, copy)
  finally:
    shutil.rmtree(store)
    shutil.copytree(tmp_path / "kept", store)
  assert contents(copy) == before


@contextlib.contextmanager
def largest_files(size):
  """Limits the size of files, which simulates a full disk for root and other users."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def disturbed_at(monkeypatch, step, disturb):
  """Calls `disturb` when the validation of a step begins and the previous save is complete."""
  whole = trainer.Trainer.evaluate

  def evaluate(self, run, *arguments, **options):
    if run.step == step:
      while list(self.folder.glob("checkpoints/unfinished/*")):
        time.sleep(0.01)
      disturb()
    return whole(self, run, *arguments, **options)

  monkeypatch.setattr(trainer.Trainer, "evaluate", evaluate)


def test_a_save_that_fails_on_a_full_disk(tmp_path, config, whole, monkeypatch):
  folder = tmp_path / "run"
  with contextlib.ExitStack() as limits, monkeypatch.context() as patch:
    # Sufficient for lines of metrics and for the small files of a checkpoint, but not for the arrays.
    disturbed_at(patch, 6, lambda: limits.enter_context(largest_files(4096)))
    with pytest.raises(
      StorageError,
      match=r"checkpoint 10 .*: the file exceeds the size limit .*; the same command continues from",
    ):
      training.train(config, folder)
  # Orbax may have gone on for a while with what it had begun; that goes at the next start.
  assert {p.name for p in (folder / "checkpoints").iterdir()} - {"unfinished"} == {"5"}
  assert cyb_jax.load(folder).step == 5
  training.train(config, folder)
  assert first_difference(whole, folder) is None


@pytest.mark.slow
def test_a_line_of_metrics_that_fails_on_a_full_disk(tmp_path, config, whole, monkeypatch):
  folder = tmp_path / "run"
  with contextlib.ExitStack() as limits, monkeypatch.context() as patch:
    metrics = folder / "metrics.jsonl"
    disturbed_at(patch, 6, lambda: limits.enter_context(largest_files(metrics.stat().st_size + 9)))
    with pytest.raises(
      StorageError,
      match=r"metrics.jsonl \(step 6\) can't be written: the file exceeds the size limit .* give the same command",
    ):
      training.train(config, folder)
  assert not metrics.read_text().endswith("\n")
  training.train(config, folder)
  assert first_difference(whole, folder) is None


@contextlib.contextmanager
def mounted(*options):
  try:
    mount = subprocess.run(["mount", *options], capture_output=True)
  except FileNotFoundError:
    pytest.skip("needs mount")
  if mount.returncode:
    pytest.skip(f"may not mount here: {mount.stderr.decode().strip()}")
  try:
    yield
  finally:
    subprocess.run(["umount", "-l", options[-1]], check=True)


def test_a_full_disk(tmp_path, config, whole, monkeypatch):
  folder = tmp_path / "run"
  folder.mkdir()
  with mounted("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)):

    def fill():
      with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
          file.write(bytes(4096))
      os.truncate(folder / "filler", (folder / "filler").stat().st_size - 40960)

    with monkeypatch.context() as patch:
      disturbed_at(patch, 6, fill)
      with pytest.raises(
        StorageError, match=r"checkpoint 10 can't be saved in .*: the disk is full; the same command continues from"
      ):
        training.train(config, folder)
    (folder / "filler").unlink()
    training.train(config, folder)
    assert first_difference(whole, folder) is None


@pytest.mark.slow
def test_a_folder_that_becomes_read_only(tmp_path, config, whole, monkeypatch):
  folder = tmp_path / "run"
  checkpoints = folder / "checkpoints"
  with contextlib.ExitStack() as stack, monkeypatch.context() as patch:

    def forbid():
      loop_checkpoints = str(checkpoints)
      if os.geteuid():
        checkpoints.chmod(0o555)
        (checkpoints / "unfinished").chmod(0o555)
        stack.callback(checkpoints.chmod, 0o755)
        stack.callback((checkpoints / "unfinished").chmod, 0o755)
      else:  # permissions don't restrict this user
        stack.enter_context(mounted("--bind", "-r", loop_checkpoints, loop_checkpoints))

    disturbed_at(patch, 6, forbid)
    with pytest.raises(
      StorageError, match=r"checkpoint 10 can't be saved in .*(read-only|denied); the same command continues from"
    ):
      training.train(config, folder)
  training.train(config, folder)
  assert first_difference(whole, folder) is None


def test_a_token_store_that_fails_on_a_full_disk(tmp_path):
  def prepare():
    return data.prepare("synthetic_lookups", "bytes", tmp_path / "store", options={"documents": 64})

  wanted = (
    r"piece-.* can't be written: the file exceeds the size limit .*; finished files are kept, and the same command"
  )
  with largest_files(500), pytest.raises(StorageError, match=wanted):
    prepare()
  assert not (tmp_path / "store").exists()
  assert prepare().num_tokens("train") > 500
  assert sorted(p.name for p in tmp_path.iterdir()) == [".store.lock", "store"]


def test_programs_report_a_full_disk_in_one_line(tmp_path, config):
  """Exit code 1, and no traceback."""
  store = f"--config.data.store={config.data.store}"
  flags = f"--config={cli.write_config(tmp_path)}", f"--workdir={tmp_path}/run", store
  command = 'ulimit -f 8; exec "$@"'  # blocks of 512 or 1024 bytes
  process = subprocess.run(
    ["bash", "-c", command, "bash", *cli.command("train", *flags)],
    env=cli.environment() | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    cwd=cli.ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert process.returncode == 1
  assert "Traceback" not in process.stderr
  (line,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
  assert "checkpoint 6 can't be saved in" in line
  assert line.endswith(
    "the file exceeds the size limit of the file system or the process; there is no earlier checkpoint, so the same"
    " command starts again"
  )


def test_a_clock_that_is_set_forward(tmp_path, monkeypatch):
  """Orbax measures saves by the clock, here with 25 minutes between two readings."""
  readings = itertools.count(time.time(), 1500.0)
  with monkeypatch.context() as patch:
    patch.setattr(time, "time", lambda: next(readings))
    save(tmp_path, jnp.arange(3.0))
  assert checkpoints_in(tmp_path, read_only=True).steps() == [1, 2]


LEAVES_A_COROUTINE = """
from cyb_jax.cli import launching
from cyb_jax.errors import StorageError

async def write_fragment():
  pass

def main(argv):
  write_fragment()
  raise StorageError("the disk is full")

launching.launch(main)
"""


def test_a_failed_save_has_one_line():
  """Orbax leaves coroutines that Python would complain about."""
  command = [sys.executable, "-c", LEAVES_A_COROUTINE]
  done = subprocess.run(command, env=cli.environment(), capture_output=True, text=True, check=False)
  assert (done.returncode, done.stderr) == (1, "error: the disk is full\n")


def test_errors_in_the_background_are_raised(tmp_path, monkeypatch):
  """The next save, wait or close raises the unchanged error once."""

  def broken(*_, **__):
    raise ZeroDivisionError("broken")

  state = {"params": jnp.arange(3.0)}
  for number, next_call in enumerate(
    (lambda c: c.save(2, state, {}), lambda c: c.wait(), lambda c: c.close()), start=1
  ):
    checkpoints = Checkpoints(tmp_path / str(number))
    with monkeypatch.context() as patch:
      patch.setattr(storage.disk.DiskFiles, "digest", broken)
      checkpoints.save(1, state, {})
      with pytest.raises(ZeroDivisionError):
        next_call(checkpoints)
    assert checkpoints.steps() == []
    checkpoints.close()
