"""How the end of one host becomes the end of all of them, each with one line that gives the reason.

A host that fails announces its end before it leaves. A host that dies without an announcement is missed by jax's
coordination service within the heartbeat, and the service then ends the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import jax
from absl import logging

from cyb_jax.distributed.channel import KeyValueStore, first_line
from cyb_jax.errors import HostLostError

_POLL_SECONDS = 0.5
_ENDED = "cyb_jax/ended"
_STOP = "cyb_jax/stop"
# How the runtime's errors name a connection that has failed.
_TRANSPORT = ("Gloo", "NCCL", "UNAVAILABLE", "Connection", "heartbeat", "DEADLINE")


class Watchdog:
  """A thread that watches for other hosts' announcements: that they end, or that they were asked to stop.

  Args:
    store: of the hosts.
    index: of this host.
    reporter: reports an end of this process that comes from outside; None: nothing does.

  Attributes:
    stop_requested: whether this host was asked to stop; on host 0, whether any was.
  """

  def __init__(self, store: KeyValueStore, index: int, reporter: ExitReporter | None = None):
    self._store, self._index, self._reporter = store, index, reporter
    self._leaving = threading.Event()
    self.stop_requested = False
    threading.Thread(target=self._watch, name="cyb-hosts", daemon=True).start()

  def request_stop(self) -> None:
    """Announces that this host was asked to stop."""
    if not self.stop_requested:
      self.stop_requested = True
      self._store.set(f"{_STOP}/{self._index}", "1")

  def leave(self) -> None:
    """From now on, other hosts' ends are ignored, because this host is ending too."""
    self._leaving.set()

  def dismiss_reporter(self) -> None:
    """From now on, an end of this process from outside is not reported."""
    if self._reporter is not None:
      self._reporter.dismiss()

  def abandon(self, message: str, code: int) -> None:
    """Announces why this host ends, and ends its process at once.

    Args:
      message: one line.
      code: the exit code, for all hosts.
    """
    self.leave()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._store.set(f"{_ENDED}/{self._index}", json.dumps([message, code]))
    if self._index == 0:
      # The others read the announcement from this process, and would otherwise only notice that it has gone.
      time.sleep(4 * _POLL_SECONDS)
    self._exit(code)

  def _exit(self, code: int) -> None:
    self.dismiss_reporter()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: jax would wait for the others at the end, and the main thread may be in a step that never ends.
    os._exit(code)

  def _watch(self) -> None:
    while not self._leaving.wait(_POLL_SECONDS):
      try:
        ended = dict(self._store.entries(_ENDED))
        stop = self._index == 0 and self._store.entries(_STOP)
      except jax.errors.JaxRuntimeError:
        continue  # where host 0 has gone for good, jax ends this process
      if stop and not self.stop_requested:
        logging.warning("host %s was asked to stop: finishing the step, then saving", stop[0][0].rpartition("/")[2])
        self.stop_requested = True
      for key, text in ended.items():
        host = int(key.rpartition("/")[2])
        if host != self._index and not self._leaving.is_set():
          message, code = json.loads(text)
          sys.stderr.write(f"error: host {host} has ended: {message}\n")
          self._exit(code)


class ExitReporter:
  """A process that outlives this one and then prints one line, where this process is ended from outside.

  jax aborts a process whose cluster has lost a host, and leaves only a stack trace.

  Args:
    message: the line.
  """

  _SCRIPT = """
import sys
message = ""
for line in sys.stdin:
  message = line.strip()
if message:
  sys.stderr.write(f"error: {message}\\n")
"""

  def __init__(self, message: str):
    self._process = subprocess.Popen(
      [sys.executable, "-S", "-c", self._SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
      start_new_session=True,
    )  # fmt: skip
    self.set_message(message)

  def set_message(self, message: str) -> None:
    """Replaces the line."""
    with contextlib.suppress(OSError):
      self._process.stdin.write(message + "\n")
      self._process.stdin.flush()

  def dismiss(self) -> None:
    """Ends the reporter; it prints nothing."""
    self.set_message("")
    with contextlib.suppress(OSError):
      self._process.stdin.close()
    self._process.wait()


@contextlib.contextmanager
def lost_hosts(count: int) -> Iterator[None]:
  """Where there are several hosts, a connection error of the runtime inside most likely means that another has died.

  Args:
    count: how many hosts there are.

  Raises:
    HostLostError: in place of the runtime's error.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if count == 1 or not any(word in str(error) for word in _TRANSPORT):
      raise
    # By the end of this wait, a host that has failed may have announced why.
    time.sleep(4 * _POLL_SECONDS)
    raise HostLostError(
      f"hosts: another host has died or can't be reached ({first_line(error)}). What was saved is whole: start all"
      " hosts again with the same command to continue"
    ) from error
