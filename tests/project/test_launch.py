"""launch/: the real programs against a simulated cloud (tests/support/fake_cloud.py); no test can reach a real one."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import yaml
from fake_cloud import FakeCloud, script

from cyb_jax import configs

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TRAINING = ("--config=experiments/c4.py:ap,gpt2_124m", "--workdir=gs://bucket/runs/ap", "--config.data.task=c4 en")
QUICK = (
  *("--poll_seconds=0.25", "--backoff_seconds=0.01", "--reconnect_seconds=0.05", "--grace_seconds=0.1"),
  *("--stop_seconds=3", "--delete_seconds=5", "--straggler_seconds=10"),
)
MACHINE = ("--name=cyb", "--zone=us-west4-a", "--type=v5litepod-16", "--spot")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
  """A separate checkout without uncommitted changes."""
  folder = tmp_path_factory.mktemp("checkout")
  shutil.copytree(LAUNCH, folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
  (folder / "constraints.txt").write_text("")
  for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "all files")):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=folder, check=True)
  return folder


@pytest.fixture(autouse=True)
def _handle_ctrl_c():
  """Restores the default handlers: a background shell job ignores SIGINT, and child processes inherit this."""
  before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
  before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


class Cloud(FakeCloud):
  """Runs launch/tpu.py against a simulated cloud."""

  def __init__(self, folder, checkout):
    super().__init__(folder)
    self.checkout, self.started = checkout, 0
    # If the real gcloud were called, it would have no account, no project and no network access.
    self.env = {k: v for k, v in os.environ.items() if not k.startswith("CLOUDSDK_")} | {
      "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
      "HOME": str(folder / "home"),
      "XDG_CACHE_HOME": str(folder / "cache"),
      "CLOUDSDK_CONFIG": str(folder / "gcloud-config"),
      "CLOUDSDK_CORE_PROJECT": "nowhere-at-all",
      "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
      "CLOUDSDK_PROXY_TYPE": "http",
      "CLOUDSDK_PROXY_ADDRESS": "127.0.0.1",
      "CLOUDSDK_PROXY_PORT": "9",
    }
    for path in (self.env["PATH"], f"{folder / 'worker-bin'}:{self.env['PATH']}"):
      assert str(folder) in shutil.which("gcloud", path=path), "the simulated gcloud isn't first on PATH"

  def start(self, command, *words, flags=MACHINE, training=TRAINING):
    """Starts launch/tpu.py; returns the process."""
    rest = ("--", *training) if training else ()
    line = [sys.executable, str(self.checkout / "launch" / "tpu.py"), command, *flags, *QUICK, *words, *rest]
    self.started += 1
    path = self.folder / f"err-{self.started}"
    with open(path, "w") as log:
      null, pipe = subprocess.DEVNULL, subprocess.PIPE
      process = subprocess.Popen(line, env=self.env, stdout=pipe, stderr=log, stdin=null, text=True)
    process.log = path
    return process

  def ends(self, process, expect=0):
    """(the JSON object of the last line, standard error) of a process that `start` has started."""
    out, _ = process.communicate(timeout=60)
    err = process.log.read_text()
    assert process.returncode == expect, f"exit code {process.returncode}\n{err[-6000:]}"
    assert "Traceback" not in err, err
    lines = out.strip().splitlines()
    return (json.loads(lines[-1]) if lines and lines[-1].startswith("{") else out), err

  def run(self, command, *words, expect=0, **options):
    return self.ends(self.start(command, *words, **options), expect)

  def waits_for(self, condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
      assert time.monotonic() < until, f"the condition did not become true: {self.calls()}"
      time.sleep(0.02)

  def trains(self):
    return all((self.folder / f"flags-{worker}").exists() for worker in range(2))


@pytest.fixture
def cloud(tmp_path, checkout):
  made = Cloud(tmp_path, checkout)
  yield made
  made.close()


SETUP = ["scp all", "unpack all", "install all", "run all"]


def worker_lines(err, label):
  return [line.removeprefix(f"{label} | ") for line in err.splitlines() if line.startswith(f"{label} | ")]


def test_a_run_without_failures(cloud):
  cloud.plays(states=[["ACCEPTED", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
  result, err = cloud.run("train")
  assert cloud.calls() == ["create", *SETUP, "delete"]
  assert cloud.is_empty()
  assert result == {
    "name": "cyb",
    "state": "finished",
    "reason": "",
    "exit_codes": {"w0": "0", "w1": "0"},
    "retries": 0,
    "machines_lost": 0,
    "crashes": 0,
    "queue_states": ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
    "evaluation": {"perplexity": 2.5},
    "left": [],
    "delete": None,
  }
  for label in ("w0", "w1"):
    assert worker_lines(err, label) == ["start 1", "step 1", "step 2", "step 3", '{"perplexity": 2.5}']
  assert (cloud.folder / "flags-1").read_text().splitlines() == list(TRAINING)
  for state in ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
    assert err.count(f"cyb: {state}: ") == 1
  assert not list(cloud.folder.glob("cache/*/*"))


def test_a_request_without_capacity_is_repeated(cloud):
  cloud.plays(create=["quota", "capacity"], states=[["FAILED"], ["ACTIVE"]])
  result, err = cloud.run("train")
  assert cloud.calls() == ["create", "create", "create", "delete", "create", *SETUP, "delete"]
  assert (result["retries"], result["machines_lost"]) == (3, 0)
  assert "Quota limit" in err
  assert "no capacity left" in err
  # Each wait is twice as long as the previous one.
  assert re.findall(r"in a row, in ([\d.]+) s", err) == ["0.01", "0.02", "0.04"]
  assert cloud.is_empty()


def test_it_gives_up_after_max_retries(cloud):
  cloud.plays(create=["quota"] * 9)
  result, _ = cloud.run("train", "--max_retries=2", expect=1)
  assert cloud.calls() == ["create"] * 3
  assert (result["state"], result["left"]) == ("gave_up", [])
  assert "--max_retries" in result["reason"]
  assert "Quota limit" in result["reason"]


def test_a_denied_request_is_not_repeated(cloud):
  cloud.plays(create=["denied"])
  result, _ = cloud.run("train", expect=2)
  assert cloud.calls() == ["create"]
  assert "tpu.nodes.create" in result["reason"]


@pytest.mark.parametrize("how", ["SUSPENDED", "PREEMPTED", "VANISHED", "FAILED"])
def test_a_preempted_machine_is_replaced(cloud, how):
  cloud.plays(train=[f"force {how}", "0"])
  result, err = cloud.run("train")
  assert cloud.calls() == ["create", *SETUP, "delete", "create", *SETUP, "delete"]
  assert (result["state"], result["machines_lost"], result["retries"]) == ("finished", 1, 1)
  assert {"SUSPENDED": "is SUSPENDED", "VANISHED": "NOT_FOUND"}.get(how, how) in err
  # The same command continues from the bucket.
  assert (cloud.folder / "flags-0").read_text().splitlines() == list(TRAINING)
  assert worker_lines(err, "w1").count("start 2") == 1
  assert cloud.is_empty()


def test_it_gives_up_if_all_machines_are_preempted(cloud):
  cloud.plays(train=["force SUSPENDED"])
  result, _ = cloud.run("train", "--max_retries=1", expect=1)
  assert (result["state"], result["machines_lost"]) == ("gave_up", 2)
  assert cloud.is_empty()


def test_long_training_resets_the_retries(cloud):
  cloud.plays(train=["force SUSPENDED", "force SUSPENDED", "0"])
  result, _ = cloud.run("train", "--max_retries=1", "--healthy_seconds=0")
  assert (result["state"], result["retries"]) == ("finished", 2)


@pytest.mark.parametrize("match", ["scp", "install"])
def test_a_preemption_before_training(cloud, match):
  cloud.plays(ssh=[{"match": match, "times": 1, "do": "force SUSPENDED"}])
  result, _ = cloud.run("train")
  before = SETUP[: SETUP.index(f"{match} all") + 1]
  assert cloud.calls() == ["create", *before, "delete", "create", *SETUP, "delete"]
  assert result["machines_lost"] == 1
  assert cloud.is_empty()


def test_a_failing_worker_is_retried_separately(cloud):
  cloud.plays(ssh=[{"match": "install", "worker": "1", "times": 2, "do": "fail"}])
  result, err = cloud.run("train")
  assert cloud.calls() == ["create", *SETUP[:3], "install 0", "install 1", "install 1", "run all", "delete"]
  assert re.search(r"w1: .*\[255\].*attempt 1 of 3", err)
  assert (result["state"], result["retries"]) == ("finished", 0)


def test_a_worker_that_always_fails_needs_another_machine(cloud):
  cloud.plays(ssh=[{"match": "install", "worker": "1", "times": 4, "do": "fail"}])
  result, _ = cloud.run("train")
  tried = ["install 0", "install 1", "install 1", "install 1"]
  assert cloud.calls() == ["create", *SETUP[:3], *tried, "delete", "create", *SETUP, "delete"]
  assert (result["state"], result["machines_lost"]) == ("finished", 1)


def test_an_installation_that_fails_on_all_workers_is_an_error(cloud):
  cloud.plays(ssh=[{"match": "install", "do": "exit 1"}])
  result, _ = cloud.run("train", "--ssh_attempts=2", expect=1)
  assert result["state"] == "failed"
  assert cloud.calls().count("create") == 1
  assert cloud.is_empty()


def test_a_hanging_worker_is_abandoned(cloud):
  cloud.plays(
    ssh=[{"match": "unpack", "times": 0, "do": ""}, {"match": "tar", "worker": "0", "times": 1, "do": "hang"}]
  )
  result, err = cloud.run("train", "--step_seconds=1")
  assert "no answer in 1 seconds" in err
  assert result["state"] == "finished"


def test_an_interrupted_log_continues_at_the_next_line(cloud):
  cloud.plays(train=["slow"], ssh=[{"match": "follow", "worker": "1", "times": 2, "do": "drop"}])
  result, err = cloud.run("train")
  for label in ("w0", "w1"):
    lines = worker_lines(err, label)
    assert lines == ["start 1", *(f"step {i}" for i in range(1, 7)), '{"perplexity": 2.5}']
  assert "w1: the connection broke" in err
  assert result["state"] == "finished"


def test_an_unreachable_worker_needs_another_machine(cloud):
  cloud.plays(train=["wait,wait", "0"], ssh=[{"match": "follow", "worker": "1", "machines": 1, "do": "fail"}])
  result, err = cloud.run("train", "--unreachable_seconds=0.3")
  assert "w1 is unreachable" in err
  assert (result["state"], result["machines_lost"]) == ("finished", 1)
  assert cloud.is_empty()


def test_after_a_crash_training_restarts_on_the_same_machine(cloud):
  cloud.plays(train=["1", "134", "0"])
  result, _ = cloud.run("train", "--max_crashes=2")
  assert cloud.calls() == ["create", *SETUP, "halt all", "run all", "halt all", "run all", "delete"]
  assert (result["state"], result["crashes"]) == ("finished", 2)


def test_the_number_of_crashes_is_limited(cloud):
  cloud.plays(train=["1"])
  result, _ = cloud.run("train", "--max_crashes=1", expect=1)
  assert (result["state"], result["crashes"]) == ("failed", 2)
  assert "w0 1" in result["reason"]
  assert cloud.is_empty()


def test_bad_input_is_not_retried(cloud):
  cloud.plays(train=["2"])
  result, _ = cloud.run("train", expect=2)
  assert (result["state"], result["exit_codes"]) == ("bad_input", {"w0": "2", "w1": "2"})
  assert cloud.calls() == ["create", *SETUP, "delete"]


def test_interrupted_training_continues_on_a_machine_that_is_not_preempted(cloud):
  cloud.plays(train=["75", "0"])
  result, _ = cloud.run("train")
  assert cloud.calls() == ["create", *SETUP, "halt all", "run all", "delete"]
  assert (result["state"], result["retries"], result["crashes"]) == ("finished", 1, 0)


def test_a_straggler_is_stopped(cloud):
  cloud.plays(train=["1,wait", "0"])
  result, err = cloud.run("train", "--straggler_seconds=0.3")
  assert cloud.calls() == ["create", *SETUP, "halt all", "halt all", "run all", "delete"]
  assert "saved" in worker_lines(err, "w1")
  assert result["state"] == "finished"


def test_deletion_is_repeated_until_it_succeeds(cloud):
  cloud.plays(delete=["fail", "fail", "leave the node"])
  result, _ = cloud.run("train")
  assert cloud.calls()[-4:] == ["delete", "delete", "delete", "delete node"]
  assert result["left"] == []
  assert cloud.is_empty()


def test_resources_that_cannot_be_deleted_are_listed(cloud):
  cloud.plays(delete_default="fail")
  result, err = cloud.run("train", "--delete_attempts=2", expect=1)
  assert result["state"] == "finished"
  assert result["left"] == ["queued resource cyb (ACTIVE)", "node cyb (READY)"]
  assert result["delete"] == "gcloud compute tpus queued-resources delete cyb --zone=us-west4-a --force --quiet"
  assert f"delete it with: {result['delete']}" in err


PHASES = {
  "create": dict(create=["slow"]),
  "queue": dict(states=[["WAITING_FOR_RESOURCES"]]),
  "scp": dict(ssh=[{"match": "scp", "do": "hang"}]),
  "install": dict(ssh=[{"match": "install", "do": "hang"}]),
  "follow": dict(train=["wait"]),
  "backoff": dict(create=["quota"] * 9),
}


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_leaves_nothing_billed(cloud, phase):
  cloud.plays(**PHASES[phase])
  process = cloud.start("train", *(["--backoff_seconds=30"] if phase == "backoff" else []))
  marks = {"queue": "create", "follow": "run all", "backoff": "create"}
  sign = marks.get(phase, phase if phase == "create" else f"{phase} all")
  cloud.waits_for(lambda: sign in cloud.calls())
  if phase == "follow":
    cloud.waits_for(cloud.trains)
  elif phase in ("queue", "backoff"):
    time.sleep(0.3)
  process.send_signal(signal.SIGINT)
  result, _ = cloud.ends(process, expect=75)
  assert (result["state"], result["left"]) == ("interrupted", [])
  assert cloud.is_empty() if phase != "backoff" else "delete" not in cloud.calls()
  # If training is in progress, it saves first.
  assert cloud.calls()[-2:] == ["halt all", "delete"] if phase == "follow" else "halt all" not in cloud.calls()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_are_handled_like_ctrl_c(cloud, number):
  cloud.plays(states=[["WAITING_FOR_RESOURCES"]])
  process = cloud.start("train")
  cloud.waits_for(lambda: "create" in cloud.calls())
  process.send_signal(number)
  result, _ = cloud.ends(process, expect=75)
  assert result["state"] == "interrupted"
  assert cloud.is_empty()


def test_ctrl_c_with_keep_does_not_stop_training(cloud):
  cloud.plays(train=["wait"])
  process = cloud.start("train", "--keep")
  cloud.waits_for(cloud.trains)
  process.send_signal(signal.SIGINT)
  _, err = cloud.ends(process, expect=75)
  assert cloud.calls() == ["create", *SETUP]
  assert "cyb is kept, and billed; delete it with: gcloud compute tpus queued-resources delete cyb" in err
  # The same command continues to supervise the running training.
  cloud.plays(train=["wait"])
  process = cloud.start("train")
  cloud.waits_for(lambda: "w0 | step 3" in process.log.read_text())
  process.send_signal(signal.SIGINT)
  _, err = cloud.ends(process, expect=75)
  assert worker_lines(err, "w0")[:2] == ["start 1", "step 1"]
  assert "start 2" not in err
  assert "75" in err
  assert cloud.calls().count("create") == 1
  assert cloud.is_empty()


def test_a_machine_that_trains_with_other_flags_is_neither_used_nor_deleted(cloud):
  cloud.plays(train=["wait"])
  process = cloud.start("train", "--keep")
  cloud.waits_for(cloud.trains)
  process.send_signal(signal.SIGINT)
  cloud.ends(process, expect=75)
  before, other = cloud.calls(), (*TRAINING, "--config.train.steps=9")
  result, _ = cloud.run("train", training=other, expect=2)
  assert result["state"] == "refused"
  assert f"cyb already trains with other flags: cyb-train {shlex.join(TRAINING[:2])} " in result["reason"]
  _, err = cloud.run("run", training=other, expect=2)
  assert "cyb already trains with other flags: cyb-train" in err
  assert cloud.calls() == [*before, "trains 0", "trains 0"]
  assert not cloud.is_empty()
  # By hand, on a worker.
  home = cloud.folder / "homes" / "cyb" / "0"
  env = {"HOME": str(home), "PATH": f"{cloud.folder / 'worker-bin'}:/usr/bin:/bin", "CLOUD": str(cloud.folder)}
  words = ["bash", str(home / "cyb_jax" / "launch" / "worker.sh"), "run"]
  same = subprocess.run([*words, *TRAINING], env=env, capture_output=True, text=True, check=False)
  assert (same.returncode, same.stdout) == (0, "training is already in progress with these flags\n")
  different = subprocess.run([*words, *other], env=env, capture_output=True, text=True, check=False)
  assert different.returncode == 2
  assert different.stderr.startswith("error: training is already in progress with other flags: --config=experiments/c4")


def test_queue_for_ends_the_retries(cloud):
  cloud.plays(states=[["FAILED"]])
  result, _ = cloud.run("train", "--queue_for=3s", "--max_retries=1000", expect=1)
  assert result["state"] == "gave_up"
  assert "no machine within --queue_for=3s: cyb is FAILED" in result["reason"]
  assert 1 <= result["retries"] < 20
  limits = [word for words in cloud.recorded for word in words if word.startswith("--valid-until-duration=")]
  assert limits[0] == "--valid-until-duration=3s"
  assert limits == sorted(limits, reverse=True)
  assert limits[-1] in ("--valid-until-duration=1s", "--valid-until-duration=2s")
  assert cloud.is_empty()


def test_a_data_disk_is_mounted_on_all_workers(cloud):
  result, _ = cloud.run("train", "--data_disk=projects/p/zones/us-west4-a/disks/c4")
  assert cloud.calls() == ["create", *SETUP[:3], "mount all", "run all", "delete"]
  assert result["state"] == "finished"
  (create,) = [words for words in cloud.recorded if words[2:4] == ["queued-resources", "create"]]
  assert "--data-disk=source=projects/p/zones/us-west4-a/disks/c4,mode=read-only" in create
  mounts = (cloud.folder / "mounts").read_text().splitlines()
  assert len(mounts) == 2
  assert all(line.startswith("-o ro,noload /dev/disk/by-id/google-persistent-disk-1 ") for line in mounts)


def test_a_second_ctrl_c_lists_the_remaining_resources(cloud):
  cloud.plays(states=[["WAITING_FOR_RESOURCES"]], delete=["hang"])
  process = cloud.start("train", "--delete_seconds=60")
  cloud.waits_for(lambda: "create" in cloud.calls())
  process.send_signal(signal.SIGINT)
  cloud.waits_for(lambda: "delete" in cloud.calls())
  process.send_signal(signal.SIGINT)
  result, err = cloud.ends(process, expect=1)
  assert result["left"] == ["queued resource cyb (WAITING_FOR_RESOURCES)"]
  assert f"delete it with: {result['delete']}" in err


def test_a_second_ctrl_c_does_not_wait_for_training(cloud):
  cloud.plays(train=["stubborn"])
  process = cloud.start("train", "--stop_seconds=60")
  cloud.waits_for(cloud.trains)
  process.send_signal(signal.SIGINT)
  cloud.waits_for(lambda: "halt all" in cloud.calls())
  process.send_signal(signal.SIGINT)
  result, _ = cloud.ends(process, expect=75)
  assert result["state"] == "interrupted"
  assert cloud.is_empty()


def test_two_slices(cloud):
  cloud.plays(train=["slow"])
  result, err = cloud.run("train", "--slices=2")
  assert cloud.calls() == ["create", *(step for step in SETUP for _ in range(2)), "delete"]
  assert list(result["exit_codes"]) == ["s0w0", "s0w1", "s1w0", "s1w1"]
  assert worker_lines(err, "s1w1")[-2:] == ["step 6", '{"perplexity": 2.5}']
  assert cloud.is_empty()


def test_the_commands_one_by_one(cloud):
  cloud.plays(train=["wait"], states=[["ACCEPTED", "ACCEPTED", "ACTIVE"]])
  parts = dict(training=())
  assert cloud.run("create", **parts)[0] == {"name": "cyb", "state": "ACCEPTED"}
  assert cloud.run("queue", **parts)[0]["queue_states"] == ["ACCEPTED", "ACTIVE"]
  assert cloud.run("upload", **parts)[0]["workers"] == 2
  assert cloud.run("run")[0]["state"] == "started"
  status, _ = cloud.run("status", "--training", **parts)
  assert status == {
    "name": "cyb",
    "state": "ACTIVE",
    "nodes": [{"name": "cyb", "state": "READY", "health": "HEALTHY", "workers": 2}],
    "training": {"w0": "running", "w1": "running"},
  }
  cloud.waits_for(cloud.trains)
  process = cloud.start("logs", "--lines=1", "--worker=1", **parts)
  out, _ = process.communicate(timeout=20)
  assert out.splitlines()[0] == "w1 | step 3"
  assert json.loads(out.splitlines()[-1])["exit_codes"] == {"w1": "running"}
  ssh = subprocess.run(
    [sys.executable, str(LAUNCH / "tpu.py"), "ssh", *MACHINE, "--worker=1", "--", "echo", "$WORKER is here"],
    env=cloud.env,
    capture_output=True,
    text=True,
    check=True,
  )
  assert ssh.stdout == "$WORKER is here\n"
  stopped, err = cloud.run("stop", **parts)
  assert stopped["workers"] == ["75 stopped", "75 stopped"]
  assert "still exists, and is billed" in err
  process = cloud.start("logs", "--follow", **parts)
  out, _ = process.communicate(timeout=20)
  assert "w0 | saved" in out
  assert json.loads(out.splitlines()[-1])["exit_codes"] == {"w0": "75 stopped", "w1": "75 stopped"}
  assert not cloud.is_empty()
  assert cloud.run("delete", **parts)[0] == {"name": "cyb", "state": "gone", "left": []}
  assert cloud.is_empty()
  assert cloud.run("delete", **parts)[0]["state"] == "gone"
  assert cloud.run("status", **parts)[0]["state"] == "NOT_FOUND"
  cloud.run("run", expect=1)


def test_stop_in_another_terminal_keeps_the_machine(cloud):
  cloud.plays(train=["wait"])
  process = cloud.start("train")
  cloud.waits_for(cloud.trains)
  cloud.run("stop", training=())
  result, err = cloud.ends(process, expect=75)
  assert result["state"] == "stopped"
  assert "cyb is kept, and billed" in err
  assert not cloud.is_empty()


def test_an_existing_machine_of_another_type_is_not_used(cloud):
  cloud.run("create", training=())
  result, _ = cloud.run("train", "--type=v6e-8", expect=2)
  assert "already exists with type v5litepod-16" in result["reason"]
  assert not cloud.is_empty()


def test_uncommitted_changes_are_listed(cloud, tmp_path):
  mine = tmp_path / "changed"
  shutil.copytree(cloud.checkout, mine)
  (mine / "constraints.txt").write_text("jax==0\n")
  (mine / "new.py").write_text("")
  _, err = cloud.run("train", f"--checkout={mine}", expect=2)
  assert "--checkout: 1 files have changes that are not in the last commit" in err
  assert "(constraints.txt)" in err
  assert cloud.calls() == []
  _, err = cloud.run("train", f"--checkout={mine}", "--allow_dirty")
  assert "1 untracked files are not uploaded: new.py" in err
  _, err = cloud.run("train", f"--checkout={tmp_path / 'home'}", expect=2)
  assert "is not a git checkout" in err


# Printed commands.


RUNBOOK = """\
# train: cyb in us-west4-a, v5litepod-16 (4 hosts). Nothing was run.

mkdir -p CACHE/cyb_jax-launch/cyb
git -C CHECKOUT archive --format=tar.gz --output=CACHE/cyb_jax-launch/cyb/cyb_jax.tar.gz HEAD
gcloud compute tpus queued-resources create cyb --zone=us-west4-a --accelerator-type=v5litepod-16 \
--runtime-version=v2-alpha-tpuv5-lite --node-id=cyb --spot --quiet
gcloud compute tpus queued-resources describe cyb --zone=us-west4-a --format=json
gcloud compute tpus tpu-vm describe cyb --zone=us-west4-a --format=json
gcloud compute tpus tpu-vm scp CACHE/cyb_jax-launch/cyb/cyb_jax.tar.gz cyb:cyb_jax.tar.gz --zone=us-west4-a \
--worker=all --quiet
gcloud compute tpus tpu-vm ssh cyb --zone=us-west4-a --worker=all --quiet \
--command='rm -rf cyb_jax && mkdir cyb_jax && tar -xzf cyb_jax.tar.gz -C cyb_jax'
gcloud compute tpus tpu-vm ssh cyb --zone=us-west4-a --worker=all --quiet \
--command='bash cyb_jax/launch/worker.sh install tpu,reviews'
gcloud compute tpus tpu-vm ssh cyb --zone=us-west4-a --worker=all --quiet \
--command='bash cyb_jax/launch/worker.sh run --config=experiments/c4.py:ap,gpt2_124m --workdir=gs://bucket/runs/ap \
--config.data.task='"'"'c4 en'"'"''
gcloud compute tpus tpu-vm ssh cyb --zone=us-west4-a --worker=0 --quiet \
--command='bash cyb_jax/launch/worker.sh follow 1'
gcloud compute tpus queued-resources delete cyb --zone=us-west4-a --force --quiet
gcloud compute tpus queued-resources describe cyb --zone=us-west4-a --format=json
gcloud compute tpus tpu-vm describe cyb --zone=us-west4-a --format=json
"""


def printed(cloud, *words, command="train", **options):
  out, _ = cloud.run(command, "--dry_run", *words, **options)
  assert cloud.calls() == []
  return out.replace(str(cloud.checkout), "CHECKOUT").replace(str(cloud.folder / "cache"), "CACHE")


def test_the_runbook(cloud):
  out = printed(cloud)
  title, *steps = out.strip().split("\n\n")
  whys, commands = zip(*(step.split("\n") for step in steps))
  assert "\n".join([title, "", *commands, ""]) == RUNBOOK
  assert all(re.fullmatch(r"# [A-Z].{10,}\.", why) for why in whys)


def test_the_runbook_has_the_commands_that_are_run(cloud):
  cloud.plays(hosts=4)
  wanted = [shlex.split(line)[1:] for line in printed(cloud).splitlines() if line.startswith("gcloud")]
  cloud.run("train")
  done = cloud.recorded
  wanted = [[w.replace("CACHE", str(cloud.folder / "cache")) for w in words] for words in wanted]
  assert all(words in done for words in wanted)
  looks = ("--format=json", "follow 1")
  assert [w for w in done if not any(x in w[-1] for x in looks)] == [
    w for w in wanted if not any(x in w[-1] for x in looks)
  ]


@pytest.mark.parametrize(
  ("accelerator", "image", "hosts"),
  [
    ("v4-8", "tpu-ubuntu2204-base", 1),
    ("v4-32", "tpu-ubuntu2204-base", 4),
    ("v5litepod-8", "v2-alpha-tpuv5-lite", 1),
    ("v5litepod-64", "v2-alpha-tpuv5-lite", 16),
    ("v5p-16", "v2-alpha-tpuv5", 2),
    ("v6e-8", "v2-alpha-tpuv6e", 1),
    ("v6e-16", "v2-alpha-tpuv6e", 4),
  ],
)
def test_image_and_hosts_of_each_type(accelerator, image, hosts):
  sys.path.insert(0, str(LAUNCH))
  try:
    import commands
  finally:
    sys.path.remove(str(LAUNCH))
  assert commands.hosts(accelerator) == hosts
  words = commands.create(commands.Machine("cyb", "z", accelerator))
  assert f"--runtime-version={image}" in words


def test_all_flags_of_the_machine_are_passed_to_gcloud(cloud):
  line = printed(
    cloud,
    *("--nospot", "--reserved", "--project=my-project", "--network=net", "--subnetwork=sub", "--internal_ips", "--iap"),
    *("--service_account=a@b.iam.gserviceaccount.com", "--labels=team=nlp,run=ap", "--tags=ssh,tpu", "--queue_for=6h"),
    *("--image=v2-other", "--slices=2", "--data_disk=c4"),
  )
  (create,) = [x for x in line.splitlines() if "queued-resources create" in x]
  assert create == (
    "gcloud compute tpus queued-resources create cyb --zone=us-west4-a --project=my-project"
    " --accelerator-type=v5litepod-16"
    " --runtime-version=v2-other --node-count=2 --node-prefix=cyb --reserved --network=net --subnetwork=sub"
    " --service-account=a@b.iam.gserviceaccount.com --labels=team=nlp,run=ap --tags=ssh,tpu --internal-ips"
    " --data-disk=source=projects/my-project/zones/us-west4-a/disks/c4,mode=read-only --valid-until-duration=6h --quiet"
  )
  assert line.count("worker.sh mount'") == 2
  for ssh in (x for x in line.splitlines() if "tpu-vm s" in x):
    assert "--tunnel-through-iap" in ssh
    assert "--project=my-project" in ssh


def test_the_runbook_of_a_startup_script(cloud):
  out = printed(cloud, "--runner=startup")
  commit = subprocess.run(
    ["git", "rev-parse", "HEAD"], cwd=cloud.checkout, capture_output=True, text=True, check=True
  ).stdout[:12]
  source = f"gs://bucket/cyb_jax-source/{commit}.tar.gz"
  assert f"gcloud storage cp CACHE/cyb_jax-launch/cyb/cyb_jax.tar.gz {source}" in out
  flags = "--config=experiments/c4.py:ap,gpt2_124m --workdir=gs://bucket/runs/ap --config.data.task='c4 en'"
  assert rf"printf '%s\n' {flags} > CACHE/cyb_jax-launch/cyb/cyb-flags.txt" in out
  assert (
    "--metadata-from-file=startup-script=CHECKOUT/launch/startup.sh,cyb-flags=CACHE/cyb_jax-launch/cyb/cyb-flags.txt"
    f" --metadata='^|^cyb-source={source}|cyb-extras=tpu,reviews'" in out
  )
  assert "scp" not in out
  assert "worker.sh run" not in out
  assert "--command='sudo bash /opt/cyb/cyb_jax/launch/worker.sh follow 1'" in out


# Command, flags, words after --, message.
BAD = [
  ("", (), (), "command: '' is unknown; give one of train, create, queue"),
  ("trian", (), (), "command: 'trian' is unknown; give one of train"),
  ("train", ("more",), TRAINING, "arguments: 'more' is unexpected"),
  ("train", ("--nmae=x",), TRAINING, "Unknown command line flag 'nmae'"),
  ("train", ("--name=",), TRAINING, "--name: not given"),
  ("train", ("--name=Cyb_1",), TRAINING, "--name: 'Cyb_1' is invalid; give at most 63 lower-case"),
  ("train", ("--name=" + "a" * 64,), TRAINING, "--name: "),
  ("train", ("--name=" + "a" * 62, "--slices=2"), TRAINING, "is too long, because the numbers of slices"),
  ("train", ("--zone=",), TRAINING, "--zone: not given"),
  ("train", ("--zone=us-central2",), TRAINING, "--zone: 'us-central2' is invalid; give a zone such as us-central2-b"),
  ("train", ("--type=",), TRAINING, "--type: not given; give a type such as v4-8, v5litepod-8, v5p-8, v6e-8"),
  ("train", ("--type=v5e",), TRAINING, "--type: 'v5e' is invalid; give an accelerator type"),
  ("train", ("--type=v9-8",), TRAINING, "--image: not given, and --type=v9-8 has no default"),
  ("train", ("--reserved",), TRAINING, "--spot: --reserved is also given"),
  ("train", ("--project=x",), TRAINING, "--project: 'x' is invalid; give a project's id"),
  ("train", ("--labels=a",), TRAINING, "--labels: 'a' is invalid; give key=value"),
  ("train", ("--tags=A",), TRAINING, "--tags: 'A' is invalid; give lower-case names"),
  ("train", ("--service_account=me",), TRAINING, "--service_account: 'me' is invalid; give the account's email"),
  ("train", ("--subnetwork=s",), TRAINING, "--subnetwork: 's' requires --network"),
  ("train", ("--queue_for=6",), TRAINING, "--queue_for: '6' is invalid; give a duration"),
  ("train", ("--data_disk=c4",), TRAINING, "--data_disk: 'c4' requires --project; give it, or projects/PROJECT/"),
  ("train", ("--data_disk=C4",), TRAINING, "--data_disk: 'C4' is invalid; give the name of a disk"),
  ("train", ("--poll_seconds=-1",), TRAINING, "--poll_seconds: -1.0 must not be negative"),
  ("train", ("--delete_attempts=0",), TRAINING, "--delete_attempts: 0 must be at least 1"),
  ("train", ("--runner=docker",), TRAINING, "flag --runner=docker"),
  ("train", (), (), "--: no flags of cyb-train"),
  ("train", (), TRAINING[1:], "--config: not given; give it among the flags of cyb-train"),
  ("train", (), TRAINING[:1], "--workdir: not given; give it among the flags of cyb-train"),
  (
    "train",
    (),
    (TRAINING[0], "--workdir", "gs://bucket"),
    "--workdir: 'gs://bucket' is invalid; give gs://BUCKET/FOLDER",
  ),
  (
    "train",
    (),
    (TRAINING[0], "--workdir=/r"),
    "is on the disk of a machine that may be preempted at any time; give gs:",
  ),
  ("train", ("--nospot",), (TRAINING[0], "--workdir=/r"), "'/r' is on the disk of a machine of 4 hosts"),
  ("stop", (), TRAINING, "after --, but `stop` does not train"),
  ("logs", ("--worker=a",), (), "--worker: 'a' is invalid; give the number of a worker"),
]


def test_bad_flags_are_one_line(cloud):
  """Each command runs in a fork of one process, because starting Python for each would take most of the time."""
  code = f"""
    import json, os, sys
    sys.path.insert(0, {str(cloud.checkout / "launch")!r})
    import tpu
    for i, words in enumerate(json.load(sys.stdin)):
      pid = os.fork()
      if not pid:
        for to, name in ((1, "out"), (2, "err")):
          os.dup2(os.open(f"{cloud.folder}/{{i}}-{{name}}", os.O_CREAT | os.O_WRONLY), to)
        sys.argv = words
        tpu.run()
      print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
  """
  lines = [
    ["tpu.py", *([command] if command else []), *MACHINE, *words, *(("--", *training) if training else ())]
    for command, words, training, _ in BAD
  ]
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)],
    env=cloud.env,
    input=json.dumps(lines),
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.split() == ["2"] * len(BAD)
  for i, (*_, message) in enumerate(BAD):
    assert (cloud.folder / f"{i}-out").read_text() == ""
    (line,) = [x for x in (cloud.folder / f"{i}-err").read_text().splitlines() if x.startswith("error: ")]
    assert message in line
  assert cloud.calls() == []


def test_a_local_work_directory_that_is_allowed(cloud):
  here = (TRAINING[0], "--workdir=/r")
  assert "--workdir=/r" in printed(cloud, "--nospot", "--type=v4-8", training=here)
  assert "--workdir=/r" in printed(cloud, "--allow_local_workdir", training=here)


def test_without_gcloud(cloud, tmp_path):
  only = tmp_path / "only"
  only.mkdir()
  (only / "git").symlink_to(shutil.which("git"))
  cloud.env["PATH"] = str(only)
  _, err = cloud.run("train", expect=2)
  assert "gcloud: not found on PATH" in err


def test_jax_is_not_needed(cloud):
  code = f"""
    import sys
    for name in ("jax", "flax", "numpy", "cyb_jax", "ml_collections"):
      sys.modules[name] = None
    sys.path.insert(0, {str(LAUNCH)!r})
    sys.argv = ["tpu.py", "status", *{MACHINE!r}, "--dry_run"]
    import tpu
    tpu.run()
  """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)], env=cloud.env, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert "queued-resources describe cyb" in done.stdout


# The scripts.


SYSTEMCTL = """
echo "$@" >>"$CLOUD/systemctl"
unit="$CLOUD/units/cyb-train.service"
case "$*" in
  *show*) if [[ -e $CLOUD/running ]]; then echo active; else echo inactive; fi ;;
  *start*--no-block*) touch "$CLOUD/running"; bash "$(sed -n 's/^ExecStart=.* //p' "$unit")"; rm "$CLOUD/running" ;;
esac
exit 0
"""

CURL = """
case "${@: -1}" in
  */cyb-source) echo "$SOURCE" ;;
  */cyb-flags) printf '%s\\n' '--config=a b' --workdir=gs://bucket/w ;;
  *) exit 22 ;;
esac
"""


def boots(cloud, archive):
  """Boots a machine with launch/startup.sh, which is run like by root."""
  (cloud.folder / "units").mkdir(exist_ok=True)
  for name, text in (("systemctl", SYSTEMCTL), ("curl", CURL), ("gcloud", 'cp "$3" "$4"')):
    script(cloud.folder / "worker-bin" / name, text)
  env = {
    "PATH": f"{cloud.folder / 'worker-bin'}:/usr/bin:/bin",
    "HOME": str(cloud.folder / "home" / "root"),
    "CLOUD": str(cloud.folder),
    "NODE": "cyb",
    "WORKER": "0",
    "CYB_HOME": str(cloud.folder / "opt"),
    "CYB_UNITS": str(cloud.folder / "units"),
    "SOURCE": str(archive),
  }
  return subprocess.run(
    ["bash", str(LAUNCH / "startup.sh")], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
  )


def test_the_startup_script_runs_only_missing_steps(cloud, tmp_path):
  run = cloud.folder / "opt" / "cyb_run"
  starts, installs = cloud.folder / "starts-cyb-0", cloud.folder / "pip"
  archive = tmp_path / "source.tar.gz"
  cloud.plays(train=["75", "1", "0", "2"])

  # The source does not exist; an exit code is written for processes that follow the log.
  done = boots(cloud, archive)
  assert done.returncode == 1
  assert (run / "exit").read_text() == "1\n"
  assert not starts.exists()

  subprocess.run(["git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"], cwd=cloud.checkout, check=True)
  done = boots(cloud, archive)
  assert done.returncode == 0, (run / "log").read_text()
  assert "-c constraints.txt .[tpu,reviews]" in installs.read_text()
  assert (cloud.folder / "flags-0").read_text().splitlines() == ["--config=a b", "--workdir=gs://bucket/w"]
  assert (run / "exit").read_text() == "75\n"
  assert "step 3" in (run / "log").read_text()
  unit = (cloud.folder / "units" / "cyb-train.service").read_text()
  assert "Restart=on-failure" in unit
  assert "RestartPreventExitStatus=2" in unit
  # After an interruption and after a crash, training continues at the next boot without another installation.
  for n in (2, 3):
    boots(cloud, archive)
    assert int(starts.read_text()) == n
  assert len(installs.read_text().splitlines()) == 1
  # When training is done, nothing is started at later boots.
  assert (run / "exit").read_text() == "0\n"
  boots(cloud, archive)
  assert int(starts.read_text()) == 3
  # Another source starts another training; after bad input, it is not started again.
  other = archive.rename(tmp_path / "other.tar.gz")
  boots(cloud, other)
  assert int(starts.read_text()) == 4
  assert len(installs.read_text().splitlines()) == 2
  boots(cloud, other)
  assert int(starts.read_text()) == 4


def test_training_with_the_startup_script(cloud):
  cloud.plays(ssh=[{"match": "follow", "do": "ends 0"}])
  result, _ = cloud.run("train", "--runner=startup")
  assert cloud.calls() == ["storage", "create", "delete"]
  (create,) = [words for words in cloud.recorded if "create" in words]
  (flags,) = re.findall(r"cyb-flags=(\S+)", " ".join(create))
  assert pathlib.Path(flags).name == "cyb-flags.txt"
  assert list((cloud.folder / "bucket").glob("bucket/cyb_jax-source/*.tar.gz"))
  assert (result["state"], result["exit_codes"]) == ("finished", {"w0": "0", "w1": "0"})
  assert cloud.flags_of_the_machine == list(TRAINING)


@pytest.mark.parametrize(
  ("code", "job", "requeued"),
  [(0, "", False), (1, "", False), (2, "", False), (75, "JobState=RUNNING", True), (75, "JobState=CANCELLED", False)],
)
def test_slurm_requeues_an_interrupted_job(tmp_path, code, job, requeued):
  for name, text in (
    ("srun", f'echo "$@" >"{tmp_path}/srun"; exit {code}'),
    ("scontrol", f'echo "{job}"; echo "$@" >>"{tmp_path}/scontrol"'),
  ):
    script(tmp_path / name, text)
  (tmp_path / ".venv" / "bin").mkdir(parents=True)
  script(tmp_path / ".venv" / "bin" / "cyb-train", "true")
  env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
  line = ["bash", str(LAUNCH / "slurm_gpu.sh")]
  done = subprocess.run([*line, *TRAINING], env=env | {"CYB_REQUEUE_SECONDS": "0"}, capture_output=True, check=False)
  assert done.returncode == code
  assert ("requeue 7" in (tmp_path / "scontrol").read_text()) == requeued
  assert (tmp_path / "srun").read_text().endswith(f"/.venv/bin/cyb-train --coordinator=auto {' '.join(TRAINING)}\n")
  assert subprocess.run(line, env=env, capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(path):
  subprocess.run(["bash", "-n", str(path)], check=True)
  if shutil.which("shellcheck") is None:
    pytest.skip("shellcheck isn't installed; only the syntax was checked")
  done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def described(name):
  """A YAML file of launch/."""
  return yaml.safe_load((LAUNCH / name).read_text())


def test_the_examples_use_existing_flags_and_fields():
  """Every flag is a flag of cyb-train, and every config and field exists."""
  jobset = described("gke_jobset.yaml")
  (job,) = jobset["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  (container,) = spec["template"]["spec"]["containers"]
  assert spec["completions"] == spec["parallelism"] == 4
  assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
  assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
  assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
  assert jobset["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"

  sky = described("skypilot.yaml")
  run = sky["run"]
  for name, value in sky["envs"].items():
    assert f"${name}" in run
    run = run.replace(f"${name}", value)
  assert "worker.sh install" in sky["setup"]

  readme = re.findall(r"```sh\n(.*?)```", (LAUNCH / "README.md").read_text(), re.DOTALL)
  slurm = (LAUNCH / "slurm_gpu.sh").read_text()
  texts = [" ".join(container["args"]), run, slurm, (LAUNCH / "gke_jobset.yaml").read_text(), *readme]
  known = subprocess.run(
    [sys.executable, "-m", "cyb_jax.cli.train", "--helpfull"],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  ).stdout
  fields = json.loads(configs.to_json(configs.freeze(configs.default())))
  for text in texts:
    for config in re.findall(r"--config=(\S+?\.py)", text):
      assert (ROOT / config.strip("\"'")).exists()
    for field in re.findall(r"--config\.([\w.]+)=", text):
      found = fields
      for part in field.split("."):
        found = found[part]
  ours = set(re.findall(r"--(\w+)=", " ".join([*container["args"], *re.findall(r"cyb-train(.*)", run)])))
  assert ours == {"coordinator", "config", "workdir"}
  for flag in ours:
    assert re.search(rf"--(\[no\])?{flag}\b", known), f"cyb-train has no --{flag}"


def test_the_image_contains_the_package():
  """The files that launch/Dockerfile copies exist and are sufficient to build the package."""
  text = (LAUNCH / "Dockerfile").read_text()
  copied = [word for line in re.findall(r"^COPY (.*)", text, re.MULTILINE) for word in line.split()[:-1]]
  assert all((ROOT / path).exists() for path in copied)
  assert {"pyproject.toml", "constraints.txt", "cyb_jax", "experiments", "README.md", "LICENSE"} <= set(copied)
  assert 'ENTRYPOINT ["cyb-train"]' in text


def test_the_readme_mentions_existing_files_and_flags():
  readme = (LAUNCH / "README.md").read_text()
  for path in re.findall(r"`(?:launch/)?([\w.]+\.(?:py|sh|yaml))`", readme):
    assert (LAUNCH / path).exists() or (ROOT / path).exists(), path
  for flag in re.findall(r"`--(\w+)[`=]", readme):
    source = (LAUNCH / "options.py").read_text()
    assert f'"{flag}"' in source or flag in {"help", "config", "workdir", "coordinator"}, flag
  assert "<!-- compile table -->" in readme
