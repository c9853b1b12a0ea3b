"""Training with several processes on the loopback interface: results, invalid input, and how the processes end."""

import collections
import contextlib
import json
import os
import pathlib
import signal
import socket
import threading
import time
import types

import cli
import jax
import numpy as np
import pytest
from absl import logging
from jax.sharding import Mesh

from cyb_jax.cli import hosts
from cyb_jax.distributed.agreement import agree, code_version, same_folder
from cyb_jax.distributed.channel import Channel, KeyValueStore
from cyb_jax.distributed.cluster import ALONE, Meeting
from cyb_jax.errors import DivergedError, HostLostError, InputError
from cyb_jax.partitioning.mesh import AXES, batch_sharding, host_rows, owned_rows

STEPS = 12


class FakeClient:
  """jax's key-value store, for threads."""

  def __init__(self):
    self.values, self.changed = {}, threading.Condition()

  def key_value_set(self, key, value):
    with self.changed:
      assert key not in self.values
      self.values[key] = value
      self.changed.notify_all()

  def key_value_delete(self, key):
    with self.changed:
      self.values = {k: v for k, v in self.values.items() if k != key and not k.startswith(key + "/")}

  def blocking_key_value_get(self, key, milliseconds):
    with self.changed:
      if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: nothing there")
      return self.values[key]


def on_threads(count, body):
  """The result or the exception of `body(channel)` for each host."""
  client, results = FakeClient(), [None] * count

  def run(index):
    try:
      results[index] = body(Channel(KeyValueStore(client), index, count))
    except Exception as error:
      results[index] = error

  threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return results


def test_texts_reach_every_host():
  def body(channel):
    received = [channel.gather({"host": channel.index}), channel.broadcast(10 + channel.index)]
    channel.barrier()
    return [*received, channel.gather(channel.index)]

  everybody = [[{"host": 0}, {"host": 1}, {"host": 2}], 10, [0, 1, 2]]
  assert on_threads(3, body) == [everybody] * 3
  assert ALONE.gather(7) == [7]
  assert ALONE.broadcast(7) == 7
  assert ALONE.stops(True)
  assert not ALONE.stops(False)


def test_differences_are_reported_on_all_hosts():
  def body(channel):
    steps = 5 if channel.index == 2 else 6
    agree(channel, {"config": {"train": {"steps": steps, "seed": 0}}, "jax": "1"})

  errors = on_threads(3, body)
  expected = (
    "hosts: config.train.steps is 6 on host 0, but 5 on host 2; start all hosts with the same code, flags and"
    " environment"
  )
  assert [str(error) for error in errors] == [expected] * 3
  assert on_threads(3, lambda channel: agree(channel, {"a": [1, None]})) == [None] * 3


def test_a_host_that_sends_nothing_is_reported():
  def body(channel):
    if channel.index != 1:
      agree(channel, {}, seconds=0.2)

  first, second, third = on_threads(3, body)
  assert second is None
  for error in (first, third):
    assert isinstance(error, HostLostError)  # the folder may be shared at the next start
    assert str(error) == (
      "hosts: 1 of 3 haven't sent their settings within 0 seconds; see their logs, and start all hosts again with the"
      " same command"
    )


def test_folders_that_are_not_shared(tmp_path):
  """Separate folders with the same path, like on two machines."""
  folders = [tmp_path / name for name in "abc"]
  for folder in folders:
    folder.mkdir()
  ends = on_threads(3, lambda channel: same_folder(channel, folders[channel.index], seconds=0.3))
  assert all(str(end).startswith("workdir: ") and "on host 1, 2 isn't the folder of host 0" in str(end) for end in ends)
  assert on_threads(3, lambda channel: same_folder(channel, folders[0])) == [None] * 3
  assert not any(any(folder.iterdir()) for folder in folders)


@pytest.mark.parametrize(
  ("meeting", "message"),
  [
    (dict(coordinator="somewhere"), "--coordinator: 'somewhere' is invalid; give HOST:PORT"),
    (dict(coordinator="a:b"), "--coordinator: 'a:b'"),
    (dict(coordinator="a:99999"), "--coordinator: 'a:99999'"),
    (dict(coordinator="a:1"), "--num_processes: not given"),
    (dict(coordinator="a:1", num_processes=0), "--num_processes: 0"),
    (
      dict(coordinator="a:1", num_processes=2),
      "--process_id: not given; give each process a different number from 0 to 1",
    ),
    (dict(coordinator="a:1", num_processes=2, process_id=2), "--process_id: 2"),
    (dict(num_processes=2), "--num_processes: 2 requires --coordinator=HOST:PORT"),
    (dict(coordinator="none", process_id=1), "--process_id: 1 requires --coordinator=HOST:PORT"),
    (dict(heartbeat=0), "--heartbeat: 0"),
    (dict(join_timeout=-5), "--join_timeout: -5"),
  ],
)
def test_incompatible_flags(meeting, message):
  with pytest.raises(InputError, match=message):
    Meeting(**meeting).check()


def test_a_digest_distinguishes_checkouts():
  assert len(code_version()) == 16
  assert code_version() == code_version()


def test_every_row_of_a_batch_is_owned_by_one_host():
  """Two hosts of four devices each, distinguished by their numbers: on one axis, and across both axes."""

  class Device:
    def __init__(self, device):
      self.device, self.process_index = device, device.id // 4

  devices = np.array([Device(device) for device in jax.devices()])

  class Spread:
    """The sharding of a batch over such devices, from the view of one host."""

    def __init__(self, host, shape):
      real = batch_sharding(Mesh(np.array(jax.devices()).reshape(shape), AXES))
      self._map, self._host = real.devices_indices_map, host

    def devices_indices_map(self, shape):
      return {devices[device.id]: index for device, index in self._map(shape).items()}

    def addressable_devices_indices_map(self, shape):
      return {d: index for d, index in self.devices_indices_map(shape).items() if d.process_index == self._host}

  for shape, first, second in (
    ((8, 1, 1), range(8), range(8, 16)),
    ((2, 2, 2), range(8), range(8, 16)),
    ((1, 1, 8), range(16), range(16)),  # tensor parallelism over both hosts: each host reads all rows
  ):
    rows = [host_rows(Spread(host, shape), 16).tolist() for host in (0, 1)]
    assert rows == [list(first), list(second)]
    own = [np.array(rows[host])[owned_rows(Spread(host, shape), 16, host)].tolist() for host in (0, 1)]
    assert sorted(own[0] + own[1]) == list(range(16))


# The following tests start processes.


def free_port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def start(program, count, *flags, devices=2, own=None, join=60, only=None):
  """The processes of a cluster; `own`: flags of each host; `only`: the hosts that are started."""
  port = free_port()
  count_flag = f" --xla_force_host_platform_device_count={devices}"
  env = {"XLA_FLAGS": cli.environment()["XLA_FLAGS"] + count_flag, "NPROC": "32"}
  met = [f"--coordinator=localhost:{port}", f"--num_processes={count}", "--heartbeat=10", f"--join_timeout={join}"]
  if count == 1:
    met = []
  return [
    cli.Forked(program, *flags, *met, *([f"--process_id={host}"] if met else []), *(own[host] if own else ()), env=env)
    for host in (range(count) if only is None else only)
  ]


def ended(processes, expect):
  """(the JSON object of host 0, the errors of each host) of processes that end with exit code `expect`."""
  results = [process.wait(120) for process in processes]
  codes = [code for code, _, _ in results]
  assert codes == [expect] * len(processes), "\n".join(err[-3000:] for _, _, err in results)
  # Gloo, which connects CPUs, writes lines of its own; of this package, only host 0 logs.
  spoken = [[line for line in out.splitlines() if line.startswith("{")] for _, out, _ in results]
  assert not any(spoken[1:])
  return json.loads(spoken[0][-1]) if spoken[0] else None, [err for _, _, err in results]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
  path = cli.write_config(tmp_path_factory.mktemp("hosts"))
  every = dict(steps=STEPS, log_every=1, eval_every=6, checkpoint_every=4)
  return [f"--config={path}", *(f"--config.train.{name}={value}" for name, value in every.items())]


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("alone")
  return workdir, ended(start("train", 1, *flags, f"--workdir={workdir}", devices=4), 0)[0]


@pytest.fixture(scope="module")
def together(flags, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("together")
  return workdir, ended(start("train", 2, *flags, f"--workdir={workdir}"), 0)[0]


def rows(workdir):
  found = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in row.items() if k != "timing"} for row in found]


def assert_close(found, expected):
  assert len(found) == len(expected)
  for row, other in zip(found, expected):
    assert row.keys() == other.keys()
    for name, value in row.items():
      if name != "calibration" and isinstance(value, float | list):  # ranks change where values are close
        np.testing.assert_allclose(value, other[name], rtol=1e-5, atol=1e-6, err_msg=name)
      elif name != "calibration":
        assert value == other[name], name


def test_two_hosts_equal_one(alone, together, flags):
  """The last batch of the validation split is also uneven."""
  assert_close(rows(together[0]), rows(alone[0]))
  assert_close([together[1]], [alone[1]])
  evaluation = [f"--workdir={together[0]}", "--split=test", "--batch_size=6"]
  one, _ = ended(start("evaluate", 1, *evaluation, devices=1), 0)
  two, _ = ended(start("evaluate", 2, *evaluation, devices=1), 0)
  assert_close([two], [one])
  assert json.loads((together[0] / "evaluation.json").read_text()) == two


def until(condition, seconds=90):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.005)


def stepped(workdir, step):
  path = pathlib.Path(workdir) / "metrics.jsonl"
  return lambda: path.exists() and any(row["step"] >= step for row in map(json.loads, path.read_text().splitlines()))


@pytest.mark.slow
def test_a_run_continues_with_any_number_of_hosts(alone, flags, tmp_path):
  """A stop request on one host stops all at the same step; another number of hosts, and pmap, continue the run."""
  slow = [*flags, f"--workdir={tmp_path}"]
  over = "--config.parallelism"
  for count, devices, more in ((2, 2, (f"{over}.strategy=pmap",)), (4, 1, (f"{over}.fsdp=2", f"{over}.tensor=2"))):
    before = len(rows(tmp_path)) if (tmp_path / "metrics.jsonl").exists() else 0
    processes = start("train", count, *slow, *more, devices=devices)
    until(lambda before=before: (tmp_path / "metrics.jsonl").exists() and len(rows(tmp_path)) > before)
    processes[-1].kill(signal.SIGTERM)
    _, errors = ended(processes, 75)
    assert "a stop was requested on another host: saved at step" in errors[0]
  ended(start("train", 1, *slow, devices=4), 0)
  assert_close(rows(tmp_path), rows(alone[0]))


def test_hosts_leave_together_after_a_divergence(monkeypatch):
  """Host 0 may still write its last metrics to a bucket, so no other host ends it."""
  calls = []
  cluster = types.SimpleNamespace(
    index=1, count=2, barrier=lambda: calls.append("barrier"), leave=lambda: calls.append("leave"),
    abandon=lambda *_: calls.append("abandon"),
  )  # fmt: skip
  monkeypatch.setattr("cyb_jax.distributed.cluster.join", lambda _: cluster)
  given = collections.defaultdict(lambda: types.SimpleNamespace(value=0))
  monkeypatch.setattr(hosts, "flags", types.SimpleNamespace(FLAGS=given))

  def diverge(_):
    raise DivergedError("step 3")

  before = logging.get_verbosity()
  with pytest.raises(DivergedError):
    hosts.on_hosts(diverge, interrupted="")
  logging.set_verbosity(before)
  assert calls == ["barrier", "leave"]


@pytest.mark.slow
def test_starts_of_runs_on_two_hosts(alone, flags, tmp_path):
  """init_from with calibration, and the evaluation of the start (steps = 0), are those of one host."""
  begun = [*flags, f"--config.init_from={alone[0]}", "--config.method.calibration_batches=2"]
  for steps in (0, 2):
    found = {}
    for count in (1, 2):
      workdir = tmp_path / f"{steps}-{count}"
      options = [*begun, f"--config.train.steps={steps}", "--config.train.epochs=0", f"--workdir={workdir}"]
      found[count] = ended(start("train", count, *options, devices=2 // count), 0)[0]
      assert found[count]["step"] == steps
    assert_close([found[2]], [found[1]])
    assert_close(rows(tmp_path / f"{steps}-2"), rows(tmp_path / f"{steps}-1"))


@pytest.mark.slow
def test_a_signal_on_one_host_ends_an_evaluation_on_all(tmp_path):
  os.mkfifo(tmp_path / "config.json")
  processes = start("evaluate", 2, f"--workdir={tmp_path}", devices=1)
  pipes = []
  until(lambda: not pipes and _is_read(tmp_path / "config.json", pipes))
  time.sleep(1)  # both hosts have met, and wait for the config
  processes[1].kill(signal.SIGTERM)
  _, errors = ended(processes, 75)
  os.close(pipes[0])
  assert "signal 15: ended; the same command starts again" in errors[1]
  assert "error: host 1 has ended: signal 15: ended; the same command starts again" in errors[0]
  assert "Traceback" not in "".join(errors)


def _is_read(pipe, opened):
  """Whether a process has opened a named pipe for reading; its writing end is then appended to a list."""
  with contextlib.suppress(OSError):
    opened.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
  return bool(opened)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "moment"), [(1, "step"), (0, "save")])
def test_a_killed_host_ends_all_and_the_run_continues(together, flags, tmp_path, victim, moment):
  """The continued run is bitwise equal to an undisturbed one."""
  flags = [*flags, f"--workdir={tmp_path}"]
  processes = start("train", 2, *flags)
  unfinished = tmp_path / "checkpoints" / "unfinished"
  until(stepped(tmp_path, 5) if moment == "step" else lambda: unfinished.is_dir() and any(unfinished.iterdir()))
  processes[victim].kill()
  clock = time.monotonic()
  code, _, _ = processes[1 - victim].wait(60)
  assert time.monotonic() - clock < 30
  assert code not in (0, 75)
  last = last_words(processes[1 - victim])
  assert "another host has died or can't be reached" in last
  assert "same command" in last
  processes[victim].wait()
  ended(start("train", 2, *flags), 0)
  assert rows(tmp_path) == rows(together[0])
  assert arrays(tmp_path) == arrays(together[0])


def last_words(process):
  """The last line of a process that has ended; if it was aborted, another process writes it shortly afterwards."""
  until(lambda: process.texts()[1].strip().splitlines()[-1].startswith("error: "), seconds=20)
  return process.texts()[1].strip().splitlines()[-1]


def arrays(workdir):
  from cyb_jax.checkpointing.workdir import checkpoints_in

  state = checkpoints_in(workdir, read_only=True).read(STEPS).state
  return {jax.tree_util.keystr(path): leaf.tobytes() for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.slow
def test_inconsistent_hosts_are_rejected(flags, tmp_path):
  """A different config, different folders, a missing host: all hosts report it in one line, and nothing is written."""
  workdir = f"--workdir={tmp_path / 'run'}"
  other = start("train", 2, *flags, workdir, own=[(), ("--config.train.seed=1",)])
  _, errors = ended(other, 2)
  expected = (
    "hosts: config.train.seed is 0 on host 0, but 1 on host 1; start all hosts with the same code, flags and"
    " environment"
  )
  assert all(expected in err for err in errors)
  assert not (tmp_path / "run").exists()

  processes = start("train", 2, *flags, workdir, own=[(), ("--config.data.options=documents=8",)])
  assert all("config.data.options is 'documents=64' on host 0" in err for err in ended(processes, 2)[1])

  processes = start("train", 2, *flags, own=[(workdir,), (f"--workdir={tmp_path / 'else'}",)])
  _, errors = ended(processes, 2)
  assert all("workdir is " in err for err in errors)

  clock = time.monotonic()
  (lonely,) = start("train", 2, *flags, workdir, join=3, only=[0])
  code, _, _ = lonely.wait(60)
  assert code not in (0, 75)
  assert time.monotonic() - clock < 40
  assert "haven't connected to localhost:" in last_words(lonely)
