"""Several processes that train as one, each with devices of its own: how they find each other, agree on what they do,
stop at the same step, and end together.

JAX's own coordination service, which runs in process 0, carries short texts between them; arrays never go this way. A
process is called a host here, whether or not it has a machine to itself.

What ends a host ends all of them, each with one line that says why: a host that fails tells the others before it
leaves, and one that dies without a word is missed by the service within the heartbeat, which then ends the others
itself. The work directory is whole in either case, and the same command on all hosts continues.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging
from jaxtyping import PyTree

from cyb_jax import __version__
from cyb_jax.errors import HostLostError, InputError

# How long hosts wait for what each of them says at once, when it starts.
_AGREE_SECONDS = 60
_POLL_SECONDS = 0.5
# Texts of so many turns ago were read by everybody: hosts step together.
_TURNS_KEPT = 10_000
_ENDED = "cyb_jax/ended"
_STOP = "cyb_jax/stop"


@dataclasses.dataclass(frozen=True)
class Meeting:
  """Where hosts meet.

  Attributes:
    coordinator: 'HOST:PORT' of host 0; 'auto', what jax finds by itself (TPU pods, Slurm, Open MPI, Kubernetes);
      'none', this process is alone; '': 'auto' on a TPU VM, else 'none'.
    num_processes, process_id: of 'HOST:PORT'; -1: not given.
    join_timeout: seconds that hosts wait for each other.
    heartbeat: seconds after which a host that says nothing counts as lost.
  """

  coordinator: str = ""
  num_processes: int = -1
  process_id: int = -1
  join_timeout: int = 300
  heartbeat: int = 60

  def check(self) -> None:
    """Raises InputError where these don't fit each other."""
    host, colon, port = self.coordinator.rpartition(":")
    counted = self.num_processes != -1 or self.process_id != -1
    if self.coordinator in ("", "auto", "none"):
      if counted:
        name, value = (
          ("num_processes", self.num_processes) if self.num_processes != -1 else ("process_id", self.process_id)
        )
        raise InputError(
          f"--{name}: {value} goes with --coordinator=HOST:PORT, which is {self.coordinator or 'not given'!r}"
        )
    elif not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
      raise InputError(f"--coordinator: {self.coordinator!r} is none of HOST:PORT, 'auto' and 'none'")
    else:
      if self.num_processes < 1:
        raise InputError(
          f"--num_processes: {'not given' if self.num_processes == -1 else self.num_processes}; with"
          f" --coordinator={self.coordinator} it says how many processes there are, at least 1"
        )
      if not 0 <= self.process_id < self.num_processes:
        raise InputError(
          f"--process_id: {'not given' if self.process_id == -1 else self.process_id}; give each process a number of"
          f" its own from 0 to {self.num_processes - 1}"
        )
    for name in ("join_timeout", "heartbeat"):
      if getattr(self, name) < 1:
        raise InputError(f"--{name}: {getattr(self, name)} must be at least 1 second")


class Channel:
  """Texts between the hosts, in an order that is the same on all of them.

  All hosts make the same calls on a channel, one after the other; threads that run beside each other need one each.

  Args:
    client: of jax's coordination service; None: there is one host.
    index, count: of this host, and of all.
    name: the channel's own.
  """

  def __init__(self, client: Any = None, index: int = 0, count: int = 1, name: str = "main"):
    self._client, self.index, self.count, self._name = client, index, count, name
    self._turns = itertools.count()

  def gather(self, value: Any, *, seconds: float | None = None, what: str = "") -> list[Any]:
    """What every host has given, by its number.

    Args:
      value: what this host gives; JSON.
      seconds: how long the others are waited for; None: as long as they live.
      what: they are to say, for the message.

    Raises:
      HostLostError: a host hasn't said it in time.
    """
    if self.count == 1:
      return [value]
    key = self._next()
    self._client.key_value_set(f"{key}/{self.index}", json.dumps(value))
    until = None if seconds is None else time.monotonic() + seconds
    values, missing = [], []
    for host in range(self.count):
      text = self._get(f"{key}/{host}", until)
      missing += [host] * (text is None)
      values.append(None if text is None else json.loads(text))
    if missing:
      numbers = ", ".join(map(str, missing))
      raise HostLostError(
        f"hosts: {numbers} of {self.count} haven't said {what} within {seconds:.0f} seconds; see their logs"
      )
    return values

  def broadcast(self, value: Any = None) -> Any:
    """What host 0 has given; the others' values are not looked at."""
    if self.count == 1:
      return value
    key = self._next()
    if self.index == 0:
      self._client.key_value_set(key, json.dumps(value))
      return value
    text = self._get(key, None)
    return json.loads(text)

  def barrier(self) -> None:
    """Until all hosts are here."""
    self.gather(None)

  def agree(
    self, facts: Mapping[str, Any], *, seconds: float | None = _AGREE_SECONDS, what: str = "what they run"
  ) -> None:
    """Whether all hosts have the same facts.

    Args:
      facts: JSON values, nested dicts among them; named as the user knows them.
      seconds, what: as in `gather`.

    Raises:
      InputError: they differ. On all hosts alike.
      HostLostError: a host hasn't said its own in time.
    """
    told = self.gather(dict(facts), seconds=seconds, what=what)
    for host, theirs in enumerate(told):
      different = list(_differences(told[0], theirs))
      if different:
        more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
        said = "; ".join(f"{path} is {a!r} on host 0, but {b!r} on host {host}" for path, a, b in different[:3])
        raise InputError(f"hosts: {said}{more}; start all hosts with the same")

  def same_folder(self, folder: Any, *, seconds: float = 20.0) -> None:
    """Whether all hosts see host 0's folder under this path.

    Args:
      folder: a path; host 0 may write there.
      seconds: that a shared file system may take to show a new file.

    Raises:
      InputError: some don't.
    """
    if self.count == 1:
      return
    token = self.broadcast(os.urandom(16).hex())
    mark = folder / f".hosts.{token}"
    if self.index == 0:
      mark.write_text(token)
    self.barrier()
    until = time.monotonic() + seconds
    while not (seen := _exists(mark)) and time.monotonic() < until:
      time.sleep(0.2)
    blind = [host for host, sees in enumerate(self.gather(seen)) if not sees]
    if self.index == 0:
      mark.unlink()
    if blind:
      numbers = ", ".join(map(str, blind))
      raise InputError(
        f"workdir: {folder} on host {numbers} isn't the folder of host 0; give one that all hosts share, such as"
        " gs://BUCKET/FOLDER"
      )

  def _next(self) -> str:
    turn = next(self._turns)
    if self.index == 0 and turn >= _TURNS_KEPT:
      self._client.key_value_delete(f"cyb_jax/{self._name}/{turn - _TURNS_KEPT}")
    return f"cyb_jax/{self._name}/{turn}"

  def _get(self, key: str, until: float | None) -> str | None:
    while True:
      left = 10.0 if until is None else max(until - time.monotonic(), 0.001)
      try:
        return self._client.blocking_key_value_get(key, int(1000 * min(left, 10.0)) + 1)
      except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
          raise HostLostError(f"hosts: host 0, where they meet, can't be reached ({_first_line(error)})") from None
        if until is not None and time.monotonic() >= until:
          return None


class Cluster(Channel):
  """All hosts of a run; see `join`. Its own channel is for the main thread."""

  def __init__(self, client: Any = None, index: int = 0, count: int = 1, watcher: _Watcher | None = None):
    super().__init__(client, index, count)
    self._watcher = watcher
    self._leaving = threading.Event()
    self._asked = False
    self._channels: collections.Counter[str] = collections.Counter()
    if client is not None:
      threading.Thread(target=self._watch, name="cyb-hosts", daemon=True).start()

  def channel(self, name: str) -> Channel:
    """One for another thread; hosts call it by the same name."""
    self._channels[name] += 1
    return Channel(self._client, self.index, self.count, f"{name}/{self._channels[name]}")

  def stops(self, asked: bool) -> bool:
    """Whether all hosts stop here, at this same call: where any of them was asked to before.

    Args:
      asked: whether this one was.
    """
    if self.count == 1:
      return asked
    if asked and not self._asked:
      self._asked = True
      self._client.key_value_set(f"{_STOP}/{self.index}", "1")
    # Host 0 decides, or hosts that look at different times would stop at different steps.
    return self.broadcast(self._asked)

  def leave(self) -> None:
    """The end of a run that went well, or was interrupted, on all hosts alike."""
    self._leaving.set()
    if self.count > 1:
      jax.distributed.shutdown()
    if self._watcher is not None:
      self._watcher.dismiss()

  def abandon(self, message: str, code: int) -> None:
    """Tells the others why this host ends, and ends its process at once; returns where there is one host.

    Args:
      message: one line.
      code: the exit code, for all.
    """
    if self.count == 1:
      return
    self._leaving.set()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(f"{_ENDED}/{self.index}", json.dumps([message, code]))
    if self.index == 0:
      # The others hear it from here, and would only see that it is gone.
      time.sleep(4 * _POLL_SECONDS)
    self._exit(code)

  def _exit(self, code: int) -> None:
    if self._watcher is not None:
      self._watcher.dismiss()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: jax would wait for the others at the end, and the main thread may be in a step that never ends.
    os._exit(code)

  def _watch(self) -> None:
    """In a thread: what other hosts say."""
    while not self._leaving.wait(_POLL_SECONDS):
      try:
        ended = dict(self._client.key_value_dir_get(_ENDED))
        stop = self.index == 0 and self._client.key_value_dir_get(_STOP)
      except jax.errors.JaxRuntimeError:
        continue  # where host 0 has gone for good, jax ends this process
      if stop and not self._asked:
        logging.warning("host %s was asked to stop: finishing the step, then saving", stop[0][0].rpartition("/")[2])
        self._asked = True
      for key, text in ended.items():
        host = int(key.rpartition("/")[2])
        if host != self.index and not self._leaving.is_set():
          message, code = json.loads(text)
          sys.stderr.write(f"error: host {host} has ended: {message}\n")
          self._exit(code)


ALONE = Cluster()


def join(meeting: Meeting) -> Cluster:
  """Meets the other hosts, before anything else of jax is used.

  Raises:
    InputError: flags that don't fit, or nobody there to meet.
  """
  meeting.check()
  where = meeting.coordinator or ("auto" if _is_tpu_vm() else "none")
  if where == "none":
    return ALONE
  named = {}
  if where != "auto":
    named = {"coordinator_address": where, "num_processes": meeting.num_processes, "process_id": meeting.process_id}
    if meeting.num_processes == 1:
      return ALONE
    logging.info("host %d of %d: meeting the others at %s", meeting.process_id, meeting.num_processes, where)
  watcher = _Watcher(
    f"the hosts haven't met at {where} within {meeting.join_timeout} seconds (--join_timeout): either host 0 can't be"
    " reached there, or not all of them were started"
  )
  # It would take SIGTERM for itself; the loop has its own way to stop on all hosts.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      **named, initialization_timeout=meeting.join_timeout, heartbeat_timeout_seconds=meeting.heartbeat
    )
  except (ValueError, RuntimeError) as error:
    watcher.dismiss()
    if meeting.coordinator == "":
      logging.warning("no other hosts were found (%s); give --coordinator where there are some", _first_line(error))
      return _alone_indeed()
    raise InputError(f"--coordinator: {where!r} leads nowhere: {_first_line(error)}") from None
  from jax._src import distributed  # there is no public way to its key-value store

  index, count = jax.process_index(), jax.process_count()
  if count == 1:
    watcher.dismiss()
    return ALONE
  watcher.say(
    "this process was ended from outside; most likely another host has died or can't be reached. What was saved is"
    " whole: start all hosts again with the same command to continue"
  )
  logging.info("host %d of %d: %d of %d devices", index, count, jax.local_device_count(), jax.device_count())
  return Cluster(distributed.global_state.client, index, count, watcher)


def _alone_indeed() -> Cluster:
  if jax.process_count() > 1:
    raise InputError(
      f"--coordinator: not given, but the devices of {jax.process_count()} hosts are seen; give HOST:PORT of host 0,"
      " with --num_processes and --process_id"
    )
  return ALONE


@contextlib.contextmanager
def losses_told(cluster: Cluster) -> Iterator[None]:
  """Where there are several hosts, an error of the runtime inside is most likely the death of another one.

  Raises:
    HostLostError: in its place.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if cluster.count == 1 or not _is_of_transport(error):
      raise
    # Whoever has failed may have said why by now.
    time.sleep(4 * _POLL_SECONDS)
    raise HostLostError(
      f"hosts: another host has died or can't be reached ({_first_line(error)}). What was saved is whole: start all"
      " hosts again with the same command to continue"
    ) from error


def _is_of_transport(error: Exception) -> bool:
  return any(word in str(error) for word in ("Gloo", "NCCL", "UNAVAILABLE", "Connection", "heartbeat", "DEADLINE"))


def fetch(tree: PyTree) -> PyTree:
  """Arrays as numpy's on every host, also those that lie over several; all hosts must call it."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  from jax.experimental import multihost_utils

  def whole(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return jax.device_get(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(whole, tree)


def own_facts() -> dict[str, str]:
  """What hosts that work as one must have alike, whatever they do."""
  return {
    "cyb_jax": f"{__version__}, source {code_version()}",
    "jax": jax.__version__,
    "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
  }


def code_version() -> str:
  """A digest of the package's own source: two checkouts of one version may differ."""
  package = pathlib.Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(package.rglob("*.py")):
    digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
  return digest.hexdigest()[:16]


def _differences(mine: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
  if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
    for name in sorted({*mine, *theirs}):
      yield from _differences(mine.get(name), theirs.get(name), f"{path}.{name}" if path else name)
  elif mine != theirs:
    yield path, mine, theirs


def _exists(path: Any) -> bool:
  with contextlib.suppress(OSError):
    os.listdir(path.parent)  # network file systems look again only when they are asked for the folder
  return path.exists()


def _is_tpu_vm() -> bool:
  """Whether jax will use TPUs here."""
  if importlib.util.find_spec("libtpu") is None or os.environ.get("JAX_PLATFORMS", "tpu") not in ("", "tpu"):
    return False
  return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def _first_line(error: Exception) -> str:
  return str(error).strip().splitlines()[0][:300]


class _Watcher:
  """A process that outlives this one by a line, where this one is ended from outside: jax aborts a process whose
  cluster has lost a host, and leaves a stack trace for a message.

  Args:
    words: what it would say.
  """

  _SCRIPT = """
import sys
words = ""
for line in sys.stdin:
  words = line.strip()
if words:
  sys.stderr.write(f"error: {words}\\n")
"""

  def __init__(self, words: str):
    self._process = subprocess.Popen(
      [sys.executable, "-S", "-c", self._SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
      start_new_session=True,
    )  # fmt: skip
    self.say(words)

  def say(self, words: str) -> None:
    """From now on it would say this."""
    with contextlib.suppress(OSError):
      self._process.stdin.write(words + "\n")
      self._process.stdin.flush()

  def dismiss(self) -> None:
    """It says nothing."""
    self.say("")
    with contextlib.suppress(OSError):
      self._process.stdin.close()
    self._process.wait()
