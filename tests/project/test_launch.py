"""launch/: the real programs against a cloud in a folder (tests/fake_cloud.py); no test can reach a real one."""

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
  """A checkout of its own, with nothing uncommitted."""
  folder = tmp_path_factory.mktemp("checkout")
  shutil.copytree(LAUNCH, folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
  (folder / "constraints.txt").write_text("")
  for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "all of it")):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=folder, check=True)
  return folder


@pytest.fixture(autouse=True)
def _heeds_ctrl_c():
  """A suite that runs in the background was told not to, and its children are as it is."""
  before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
  before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


class Cloud(FakeCloud):
  """launch/tpu.py before a cloud in a folder."""

  def __init__(self, folder, checkout):
    super().__init__(folder)
    self.checkout, self.started = checkout, 0
    # Were the real gcloud ever called, it would know no account, no project and no way out.
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
      assert str(folder) in shutil.which("gcloud", path=path), "the fake isn't first"

  def start(self, command, *words, flags=MACHINE, training=TRAINING):
    """launch/tpu.py, running."""
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
    """(the JSON object of the last line, standard error) of what `start` has started."""
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
      assert time.monotonic() < until, f"it never came to it: {self.told()}"
      time.sleep(0.02)

  def trains(self):
    return (self.folder / "flags-1").exists()


@pytest.fixture
def cloud(tmp_path, checkout):
  made = Cloud(tmp_path, checkout)
  yield made
  made.close()


SETUP = ["scp all", "unpack all", "install all", "run all"]


def worker_lines(err, label):
  return [line.removeprefix(f"{label} | ") for line in err.splitlines() if line.startswith(f"{label} | ")]


def test_all_goes_well(cloud):
  cloud.plays(states=[["ACCEPTED", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
  result, err = cloud.run("train")
  assert cloud.told() == ["create", *SETUP, "delete"]
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


def test_no_room_is_asked_for_again(cloud):
  cloud.plays(create=["quota", "capacity"], states=[["FAILED"], ["ACTIVE"]])
  result, err = cloud.run("train")
  assert cloud.told() == ["create", "create", "create", "delete", "create", *SETUP, "delete"]
  assert (result["retries"], result["machines_lost"]) == (3, 0)
  assert "Quota limit" in err
  assert "no room for it" in err
  # Each wait is twice as long as the one before.
  assert re.findall(r"in a row, in ([\d.]+) s", err) == ["0.01", "0.02", "0.04"]
  assert cloud.is_empty()


def test_it_gives_up(cloud):
  cloud.plays(create=["quota"] * 9)
  result, _ = cloud.run("train", "--max_retries=2", expect=1)
  assert cloud.told() == ["create"] * 3
  assert (result["state"], result["left"]) == ("gave_up", [])
  assert "--max_retries" in result["reason"]
  assert "Quota limit" in result["reason"]


def test_what_is_denied_is_not_asked_for_again(cloud):
  cloud.plays(create=["denied"])
  result, _ = cloud.run("train", expect=2)
  assert cloud.told() == ["create"]
  assert "tpu.nodes.create" in result["reason"]


@pytest.mark.parametrize("how", ["SUSPENDED", "PREEMPTED", "VANISHED", "FAILED"])
def test_a_machine_that_is_taken_away_is_replaced(cloud, how):
  cloud.plays(train=[f"force {how}", "0"])
  result, err = cloud.run("train")
  assert cloud.told() == ["create", *SETUP, "delete", "create", *SETUP, "delete"]
  assert (result["state"], result["machines_lost"], result["retries"]) == ("finished", 1, 1)
  assert {"SUSPENDED": "is SUSPENDED", "VANISHED": "NOT_FOUND"}.get(how, how) in err
  # The same command continues from the bucket.
  assert (cloud.folder / "flags-0").read_text().splitlines() == list(TRAINING)
  assert worker_lines(err, "w1").count("start 2") == 1
  assert cloud.is_empty()


def test_it_gives_up_on_machines_that_are_always_taken_away(cloud):
  cloud.plays(train=["force SUSPENDED"])
  result, _ = cloud.run("train", "--max_retries=1", expect=1)
  assert (result["state"], result["machines_lost"]) == ("gave_up", 2)
  assert cloud.is_empty()


def test_training_for_long_sets_the_retries_back(cloud):
  cloud.plays(train=["force SUSPENDED", "force SUSPENDED", "0"])
  result, _ = cloud.run("train", "--max_retries=1", "--healthy_seconds=0")
  assert (result["state"], result["retries"]) == ("finished", 2)


@pytest.mark.parametrize("match", ["scp", "install"])
def test_taken_away_before_it_trains(cloud, match):
  cloud.plays(ssh=[{"match": match, "times": 1, "do": "force SUSPENDED"}])
  result, _ = cloud.run("train")
  before = SETUP[: SETUP.index(f"{match} all") + 1]
  assert cloud.told() == ["create", *before, "delete", "create", *SETUP, "delete"]
  assert result["machines_lost"] == 1
  assert cloud.is_empty()


def test_one_worker_that_fails_is_tried_again_alone(cloud):
  cloud.plays(ssh=[{"match": "install", "worker": "1", "times": 2, "do": "fail"}])
  result, err = cloud.run("train")
  assert cloud.told() == ["create", *SETUP[:3], "install 0", "install 1", "install 1", "run all", "delete"]
  assert re.search(r"w1: .*\[255\].*attempt 1 of 3", err)
  assert (result["state"], result["retries"]) == ("finished", 0)


def test_one_worker_that_always_fails_needs_another_machine(cloud):
  cloud.plays(ssh=[{"match": "install", "worker": "1", "times": 4, "do": "fail"}])
  result, _ = cloud.run("train")
  tried = ["install 0", "install 1", "install 1", "install 1"]
  assert cloud.told() == ["create", *SETUP[:3], *tried, "delete", "create", *SETUP, "delete"]
  assert (result["state"], result["machines_lost"]) == ("finished", 1)


def test_an_installation_that_fails_everywhere_ends_it(cloud):
  cloud.plays(ssh=[{"match": "install", "do": "exit 1"}])
  result, _ = cloud.run("train", "--ssh_attempts=2", expect=1)
  assert result["state"] == "failed"
  assert cloud.told().count("create") == 1
  assert cloud.is_empty()


def test_a_worker_that_hangs_is_given_up(cloud):
  cloud.plays(
    ssh=[{"match": "unpack", "times": 0, "do": ""}, {"match": "tar", "worker": "0", "times": 1, "do": "hang"}]
  )
  result, err = cloud.run("train", "--step_seconds=1")
  assert "no answer in 1 seconds" in err
  assert result["state"] == "finished"


def test_a_log_that_breaks_off_is_taken_up_where_it_was(cloud):
  cloud.plays(train=["slow"], ssh=[{"match": "follow", "worker": "1", "times": 2, "do": "drop"}])
  result, err = cloud.run("train")
  for label in ("w0", "w1"):
    lines = worker_lines(err, label)
    assert lines == ["start 1", *(f"step {i}" for i in range(1, 7)), '{"perplexity": 2.5}']
  assert "w1: its log broke off" in err
  assert result["state"] == "finished"


def test_a_worker_out_of_reach_needs_another_machine(cloud):
  cloud.plays(train=["wait,wait", "0"], ssh=[{"match": "follow", "worker": "1", "machines": 1, "do": "fail"}])
  result, err = cloud.run("train", "--unreachable_seconds=0.3")
  assert "w1 can't be reached any more" in err
  assert (result["state"], result["machines_lost"]) == ("finished", 1)
  assert cloud.is_empty()


def test_a_crash_is_started_again_on_the_same_machine(cloud):
  cloud.plays(train=["1", "134", "0"])
  result, _ = cloud.run("train", "--max_crashes=2")
  assert cloud.told() == ["create", *SETUP, "halt all", "run all", "halt all", "run all", "delete"]
  assert (result["state"], result["crashes"]) == ("finished", 2)


def test_crashes_have_an_end(cloud):
  cloud.plays(train=["1"])
  result, _ = cloud.run("train", "--max_crashes=1", expect=1)
  assert (result["state"], result["crashes"]) == ("failed", 2)
  assert "w0 1" in result["reason"]
  assert cloud.is_empty()


def test_bad_input_is_not_tried_again(cloud):
  cloud.plays(train=["2"])
  result, _ = cloud.run("train", expect=2)
  assert (result["state"], result["exit_codes"]) == ("bad_input", {"w0": "2", "w1": "2"})
  assert cloud.told() == ["create", *SETUP, "delete"]


def test_interrupted_on_a_machine_that_stays_it_is_continued_there(cloud):
  cloud.plays(train=["75", "0"])
  result, _ = cloud.run("train")
  assert cloud.told() == ["create", *SETUP, "halt all", "run all", "delete"]
  assert (result["state"], result["retries"], result["crashes"]) == ("finished", 1, 0)


def test_a_worker_that_goes_on_alone_is_stopped(cloud):
  cloud.plays(train=["1,wait", "0"])
  result, err = cloud.run("train", "--straggler_seconds=0.3")
  assert cloud.told() == ["create", *SETUP, "halt all", "halt all", "run all", "delete"]
  assert "saved" in worker_lines(err, "w1")
  assert result["state"] == "finished"


def test_deletion_is_tried_until_it_works(cloud):
  cloud.plays(delete=["fail", "fail", "leave the node"])
  result, _ = cloud.run("train")
  assert cloud.told()[-4:] == ["delete", "delete", "delete", "delete node"]
  assert result["left"] == []
  assert cloud.is_empty()


def test_what_cannot_be_deleted_is_named(cloud):
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
  cloud.waits_for(lambda: sign in cloud.told())
  if phase == "follow":
    cloud.waits_for(cloud.trains)
  elif phase in ("queue", "backoff"):
    time.sleep(0.3)
  process.send_signal(signal.SIGINT)
  result, _ = cloud.ends(process, expect=75)
  assert (result["state"], result["left"]) == ("interrupted", [])
  assert cloud.is_empty() if phase != "backoff" else "delete" not in cloud.told()
  # Where it trains it saves first.
  assert cloud.told()[-2:] == ["halt all", "delete"] if phase == "follow" else "halt all" not in cloud.told()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_asks_to_end_is_a_ctrl_c(cloud, number):
  cloud.plays(states=[["WAITING_FOR_RESOURCES"]])
  process = cloud.start("train")
  cloud.waits_for(lambda: "create" in cloud.told())
  process.send_signal(number)
  result, _ = cloud.ends(process, expect=75)
  assert result["state"] == "interrupted"
  assert cloud.is_empty()


def test_ctrl_c_with_keep_leaves_it_training(cloud):
  cloud.plays(train=["wait"])
  process = cloud.start("train", "--keep")
  cloud.waits_for(cloud.trains)
  process.send_signal(signal.SIGINT)
  _, err = cloud.ends(process, expect=75)
  assert cloud.told() == ["create", *SETUP]
  assert "cyb is kept, and billed; delete it with: gcloud compute tpus queued-resources delete cyb" in err
  # The same command takes it up again, without touching what runs.
  cloud.plays(train=["wait"])
  process = cloud.start("train")
  cloud.waits_for(lambda: "w0 | step 3" in process.log.read_text())
  process.send_signal(signal.SIGINT)
  _, err = cloud.ends(process, expect=75)
  assert worker_lines(err, "w0")[:2] == ["start 1", "step 1"]
  assert "start 2" not in err
  assert "75" in err
  assert cloud.told().count("create") == 1
  assert cloud.is_empty()


def test_a_second_ctrl_c_says_what_is_left(cloud):
  cloud.plays(states=[["WAITING_FOR_RESOURCES"]], delete=["hang"])
  process = cloud.start("train", "--delete_seconds=60")
  cloud.waits_for(lambda: "create" in cloud.told())
  process.send_signal(signal.SIGINT)
  cloud.waits_for(lambda: "delete" in cloud.told())
  process.send_signal(signal.SIGINT)
  result, err = cloud.ends(process, expect=1)
  assert result["left"] == ["queued resource cyb (WAITING_FOR_RESOURCES)"]
  assert f"delete it with: {result['delete']}" in err


def test_a_second_ctrl_c_waits_for_no_training(cloud):
  cloud.plays(train=["stubborn"])
  process = cloud.start("train", "--stop_seconds=60")
  cloud.waits_for(cloud.trains)
  process.send_signal(signal.SIGINT)
  cloud.waits_for(lambda: "halt all" in cloud.told())
  process.send_signal(signal.SIGINT)
  result, _ = cloud.ends(process, expect=75)
  assert result["state"] == "interrupted"
  assert cloud.is_empty()


def test_two_slices(cloud):
  cloud.plays(train=["slow"])
  result, err = cloud.run("train", "--slices=2")
  assert cloud.told() == ["create", *(step for step in SETUP for _ in range(2)), "delete"]
  assert list(result["exit_codes"]) == ["s0w0", "s0w1", "s1w0", "s1w1"]
  assert worker_lines(err, "s1w1")[-2:] == ["step 6", '{"perplexity": 2.5}']
  assert cloud.is_empty()


def test_its_parts_one_by_one(cloud):
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
  assert "still there, and billed" in err
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


def test_stopped_from_elsewhere_the_machine_stays(cloud):
  cloud.plays(train=["wait"])
  process = cloud.start("train")
  cloud.waits_for(cloud.trains)
  cloud.run("stop", training=())
  result, err = cloud.ends(process, expect=75)
  assert result["state"] == "stopped"
  assert "cyb is kept, and billed" in err
  assert not cloud.is_empty()


def test_a_machine_of_another_type_is_not_taken(cloud):
  cloud.run("create", training=())
  result, _ = cloud.run("train", "--type=v6e-8", expect=2)
  assert "is there already, as a v5litepod-16" in result["reason"]
  assert not cloud.is_empty()


def test_uncommitted_changes_are_named(cloud, tmp_path):
  mine = tmp_path / "changed"
  shutil.copytree(cloud.checkout, mine)
  (mine / "constraints.txt").write_text("jax==0\n")
  (mine / "new.py").write_text("")
  _, err = cloud.run("train", f"--checkout={mine}", expect=2)
  assert "--checkout: 1 files have changes that the last commit" in err
  assert "(constraints.txt)" in err
  assert cloud.told() == []
  _, err = cloud.run("train", f"--checkout={mine}", "--allow_dirty")
  assert "1 untracked files are not uploaded: new.py" in err
  _, err = cloud.run("train", f"--checkout={tmp_path / 'home'}", expect=2)
  assert "isn't a git checkout" in err


# What is printed.


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
  assert cloud.told() == []
  return out.replace(str(cloud.checkout), "CHECKOUT").replace(str(cloud.folder / "cache"), "CACHE")


def test_the_runbook(cloud):
  out = printed(cloud)
  title, *steps = out.strip().split("\n\n")
  whys, commands = zip(*(step.split("\n") for step in steps))
  assert "\n".join([title, "", *commands, ""]) == RUNBOOK
  assert all(re.fullmatch(r"# [A-Z].{10,}\.", why) for why in whys)


def test_the_runbook_is_what_is_run(cloud):
  cloud.plays(hosts=4)
  wanted = [shlex.split(line)[1:] for line in printed(cloud).splitlines() if line.startswith("gcloud")]
  cloud.run("train")
  done = cloud.asked
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
def test_an_image_and_hosts_belong_to_each_type(accelerator, image, hosts):
  sys.path.insert(0, str(LAUNCH))
  try:
    import commands
  finally:
    sys.path.remove(str(LAUNCH))
  assert commands.hosts(accelerator) == hosts
  words = commands.create(commands.Machine("cyb", "z", accelerator))
  assert f"--runtime-version={image}" in words


def test_every_flag_of_the_machine_is_passed_on(cloud):
  line = printed(
    cloud,
    *("--nospot", "--reserved", "--project=my-project", "--network=net", "--subnetwork=sub", "--internal_ips", "--iap"),
    *("--service_account=a@b.iam.gserviceaccount.com", "--labels=team=nlp,run=ap", "--tags=ssh,tpu", "--queue_for=6h"),
    *("--image=v2-other", "--slices=2"),
  )
  (create,) = [x for x in line.splitlines() if "queued-resources create" in x]
  assert create == (
    "gcloud compute tpus queued-resources create cyb --zone=us-west4-a --project=my-project"
    " --accelerator-type=v5litepod-16"
    " --runtime-version=v2-other --node-count=2 --node-prefix=cyb --reserved --network=net --subnetwork=sub"
    " --service-account=a@b.iam.gserviceaccount.com --labels=team=nlp,run=ap --tags=ssh,tpu --internal-ips"
    " --valid-until-duration=6h --quiet"
  )
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


# Command, flags, what stands behind --, the complaint.
BAD = [
  ("", (), (), "command: '' is none of train, create, queue"),
  ("trian", (), (), "command: 'trian' is none of train"),
  ("train", ("more",), TRAINING, "arguments: 'more' are left over"),
  ("train", ("--nmae=x",), TRAINING, "Unknown command line flag 'nmae'"),
  ("train", ("--name=",), TRAINING, "--name: not given"),
  ("train", ("--name=Cyb_1",), TRAINING, "--name: 'Cyb_1' is none: at most 63 lower-case"),
  ("train", ("--name=" + "a" * 64,), TRAINING, "--name: "),
  ("train", ("--name=" + "a" * 62, "--slices=2"), TRAINING, "is too long with the number of a slice"),
  ("train", ("--zone=",), TRAINING, "--zone: not given"),
  ("train", ("--zone=us-central2",), TRAINING, "--zone: 'us-central2' isn't a zone such as us-central2-b"),
  ("train", ("--type=",), TRAINING, "--type: not given; such as v4-8, v5litepod-8, v5p-8, v6e-8"),
  ("train", ("--type=v5e",), TRAINING, "--type: 'v5e' is no accelerator type"),
  ("train", ("--type=v9-8",), TRAINING, "--image: not given, and none is known for --type=v9-8"),
  ("train", ("--reserved",), TRAINING, "--spot: True together with --reserved"),
  ("train", ("--project=x",), TRAINING, "--project: 'x' isn't a project's id"),
  ("train", ("--labels=a",), TRAINING, "--labels: 'a' isn't key=value"),
  ("train", ("--tags=A",), TRAINING, "--tags: 'A' isn't names in lower case"),
  ("train", ("--service_account=me",), TRAINING, "--service_account: 'me' isn't the account's email"),
  ("train", ("--subnetwork=s",), TRAINING, "--subnetwork: given without --network"),
  ("train", ("--queue_for=6",), TRAINING, "--queue_for: '6' isn't a duration"),
  ("train", ("--poll_seconds=-1",), TRAINING, "--poll_seconds: -1.0 is negative"),
  ("train", ("--delete_attempts=0",), TRAINING, "--delete_attempts: 0, but there must be one"),
  ("train", ("--runner=docker",), TRAINING, "flag --runner=docker"),
  ("train", (), (), "--: nothing behind it"),
  ("train", (), TRAINING[1:], "--config: not among the flags of cyb-train"),
  ("train", (), TRAINING[:1], "--workdir: not among the flags of cyb-train"),
  ("train", (), (TRAINING[0], "--workdir", "gs://bucket"), "--workdir: 'gs://bucket' isn't gs://BUCKET/FOLDER"),
  (
    "train",
    (),
    (TRAINING[0], "--workdir=/r"),
    "lies on the disk of a machine that may be taken away at any time; give gs:",
  ),
  ("train", ("--nospot",), (TRAINING[0], "--workdir=/r"), "'/r' lies on the disk of a machine of 4 hosts"),
  ("stop", (), TRAINING, "behind --, but `stop` trains nothing"),
  ("logs", ("--worker=a",), (), "--worker: 'a' isn't a worker's number"),
]


def test_bad_flags_are_one_line(cloud):
  """In one process that forks for each: most of the time would go into their starts."""
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
  assert cloud.told() == []


def test_a_local_work_directory_where_that_is_meant(cloud):
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


def test_a_laptop_needs_no_jax(cloud):
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
  """A boot of a machine with launch/startup.sh, as root would run it."""
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


def test_the_startup_script_does_only_what_is_missing(cloud, tmp_path):
  run = cloud.folder / "opt" / "cyb_run"
  starts, installs = cloud.folder / "starts-cyb-0", cloud.folder / "pip"
  archive = tmp_path / "source.tar.gz"
  cloud.plays(train=["75", "1", "0", "2"])

  # A source that isn't there: whoever follows the log is told.
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
  # Interrupted, then crashed: it goes on at the next boot, with nothing installed again.
  for n in (2, 3):
    boots(cloud, archive)
    assert int(starts.read_text()) == n
  assert len(installs.read_text().splitlines()) == 1
  # Done: nothing more at any boot.
  assert (run / "exit").read_text() == "0\n"
  boots(cloud, archive)
  assert int(starts.read_text()) == 3
  # Another source is another training; bad input ends it for good too.
  other = archive.rename(tmp_path / "other.tar.gz")
  boots(cloud, other)
  assert int(starts.read_text()) == 4
  assert len(installs.read_text().splitlines()) == 2
  boots(cloud, other)
  assert int(starts.read_text()) == 4


def test_with_the_startup_script_the_machine_does_it_all(cloud):
  cloud.plays(ssh=[{"match": "follow", "do": "ends 0"}])
  result, _ = cloud.run("train", "--runner=startup")
  assert cloud.told() == ["storage", "create", "delete"]
  (create,) = [words for words in cloud.asked if "create" in words]
  (flags,) = re.findall(r"cyb-flags=(\S+)", " ".join(create))
  assert pathlib.Path(flags).name == "cyb-flags.txt"
  assert list((cloud.folder / "bucket").glob("bucket/cyb_jax-source/*.tar.gz"))
  assert (result["state"], result["exit_codes"]) == ("finished", {"w0": "0", "w1": "0"})
  assert cloud.flags_of_the_machine == list(TRAINING)


@pytest.mark.parametrize(
  ("code", "job", "requeued"),
  [(0, "", False), (1, "", False), (2, "", False), (75, "JobState=RUNNING", True), (75, "JobState=CANCELLED", False)],
)
def test_slurm_queues_again_what_was_interrupted(tmp_path, code, job, requeued):
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
def test_scripts_are_sound(path):
  subprocess.run(["bash", "-n", str(path)], check=True)
  if shutil.which("shellcheck") is None:
    pytest.skip("shellcheck isn't installed; only the syntax was checked")
  done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def described(name):
  """A YAML file of launch/."""
  return yaml.safe_load((LAUNCH / name).read_text())


def test_the_examples_name_what_there_is():
  """Every flag is one of cyb-train, every config and field is there."""
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


def test_the_image_brings_what_is_installed():
  """What launch/Dockerfile copies is there, and enough to build the package."""
  text = (LAUNCH / "Dockerfile").read_text()
  copied = [word for line in re.findall(r"^COPY (.*)", text, re.MULTILINE) for word in line.split()[:-1]]
  assert all((ROOT / path).exists() for path in copied)
  assert {"pyproject.toml", "constraints.txt", "cyb_jax", "experiments", "README.md", "LICENSE"} <= set(copied)
  assert 'ENTRYPOINT ["cyb-train"]' in text


def test_readme_names_what_there_is():
  readme = (LAUNCH / "README.md").read_text()
  for path in re.findall(r"`(?:launch/)?([\w.]+\.(?:py|sh|yaml))`", readme):
    assert (LAUNCH / path).exists() or (ROOT / path).exists(), path
  for flag in re.findall(r"`--(\w+)[`=]", readme):
    source = (LAUNCH / "options.py").read_text()
    assert f'"{flag}"' in source or flag in {"help", "config", "workdir", "coordinator"}, flag
  assert "<!-- compile table -->" in readme
