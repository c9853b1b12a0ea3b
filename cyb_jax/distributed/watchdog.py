"""Ends all hosts when one host ends; each host prints one line with the reason.

A host that fails announces this before it exits. If a host dies without an announcement, jax's coordination service
notices the missing heartbeat and aborts the other hosts.
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
# The store doesn't answer if host 0 has died.
_ANNOUNCING_SECONDS = 5.0
_ENDED = "cyb_jax/ended"
_STOP = "cyb_jax/stop"
# Words that identify a failed connection in errors of the runtime.
_COLLECTIVES = ("Gloo", "NCCL")
_TRANSPORT = (*_COLLECTIVES, "UNAVAILABLE", "Connection", "heartbeat", "DEADLINE")


class Watchdog:
  """A thread that polls the other hosts' announcements of their end and of stop requests.

  Args:
    store: the key-value store of the hosts.
    index: the number of this host.
    reporter: prints the reason if this process is killed; None means that nothing is printed.

  Attributes:
    stop_requested: whether a stop was requested on this host; on host 0, whether it was requested on any host.
  """

  def __init__(self, store: KeyValueStore, index: int, reporter: ExitReporter | None = None):
    self._store, self._index, self._reporter = store, index, reporter
    self._leaving = threading.Event()
    self.stop_requested = False
    threading.Thread(target=self._watch, name="cyb-hosts", daemon=True).start()

  def request_stop(self) -> None:
    """Announces that a stop was requested on this host."""
    if not self.stop_requested:
      self.stop_requested = True
      self._store.set(f"{_STOP}/{self._index}", "1")

  def leave(self) -> None:
    """Makes the watchdog ignore the end of other hosts from now on, because this host is also ending."""
    self._leaving.set()

  def dismiss_reporter(self) -> None:
    """Makes the reporter print nothing if this process is killed from now on."""
    if self._reporter is not None:
      self._reporter.dismiss()

  def abandon(self, message: str, code: int) -> None:
    """Announces why this host ends, and exits at once.

    Args:
      message: the reason, one line.
      code: the exit code of all hosts.
    """
    self.leave()
    # The caller has reported the reason. If host 0 has died, jax aborts this process during the announcement.
    self.dismiss_reporter()
    announcement = threading.Thread(target=self._announce, args=(message, code), daemon=True)
    announcement.start()
    announcement.join(_ANNOUNCING_SECONDS)
    if self._index == 0:
      # The other hosts read the announcement from this process, so it must not exit before they have read it.
      time.sleep(4 * _POLL_SECONDS)
    self._exit(code)

  def _announce(self, message: str, code: int) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._store.set(f"{_ENDED}/{self._index}", json.dumps([message, code]))

  def _exit(self, code: int) -> None:
    self.dismiss_reporter()
    sys.stdout.flush()
    sys.stderr.flush()
    # sys.exit would not work: jax would wait for the other hosts, and the main thread may be in a step that never ends.
    os._exit(code)

  def _watch(self) -> None:
    while not self._leaving.wait(_POLL_SECONDS):
      try:
        ended = dict(self._store.entries(_ENDED))
        stop = self._index == 0 and self._store.entries(_STOP)
      except jax.errors.JaxRuntimeError:
        continue  # if host 0 has died, jax ends this process
      if stop and not self.stop_requested:
        host = stop[0][0].rpartition("/")[2]
        logging.warning("a stop was requested on host %s: finishing the step, then saving", host)
        self.stop_requested = True
      for key, text in ended.items():
        host = int(key.rpartition("/")[2])
        if host != self._index and not self._leaving.is_set():
          message, code = json.loads(text)
          sys.stderr.write(f"error: host {host} has ended: {message}\n")
          self._exit(code)


class ExitReporter:
  """A child process that prints one line if this process is killed.

  When a cluster loses a host, jax aborts the processes of the other hosts, which print only a stack trace.

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
    """Ends the reporter; it prints nothing. It may be called again."""
    if self._process.stdin.closed:
      return
    self.set_message("")
    with contextlib.suppress(OSError):
      self._process.stdin.close()
    self._process.wait()


@contextlib.contextmanager
def lost_hosts(count: int) -> Iterator[None]:
  """Converts a connection error of the runtime inside the `with` block to an error about a lost host.

  If there are several hosts, the most likely cause of a connection error is that another host has died.

  Args:
    count: the number of hosts.

  Raises:
    HostLostError: the runtime raised a connection error, and there are several hosts.
  """
  try:
    yield
  except Exception as error:
    failure = _failed_connection(error)
    if count == 1 or failure is None:
      raise
    # During this wait, a host that has failed can announce the reason, and the watchdog then ends this process.
    time.sleep(4 * _POLL_SECONDS)
    raise HostLostError(
      f"hosts: another host has died or can't be reached ({first_line(failure)}). The saved checkpoints are intact:"
      " start all hosts again with the same command to continue"
    ) from error


def _failed_connection(error: BaseException) -> BaseException | None:
  """The error of the runtime about a failed connection that an error is, or reports; None if there is none."""
  if isinstance(error, TimeoutError) and error.__cause__ is not None:  # of orbax, which waits for all hosts
    error = error.__cause__
  # A collective outside a compiled function raises a ValueError, as TensorStore does for a bucket.
  words = _TRANSPORT if isinstance(error, jax.errors.JaxRuntimeError) else _COLLECTIVES
  known = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
  return error if known and any(word in str(error) for word in words) else None
