"""Connects the processes of a run, each with its own devices, and makes them stop at the same step and end together.

However the processes end, the work directory remains usable, and the same command on all hosts continues the run.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from cyb_jax.distributed import agreement
from cyb_jax.distributed.channel import Channel, KeyValueStore, first_line
from cyb_jax.distributed.watchdog import ExitReporter, Watchdog
from cyb_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Meeting:
  """The settings with which hosts connect.

  Attributes:
    coordinator: 'HOST:PORT' of host 0; or 'auto' for the address that jax detects (TPU pods, Slurm, Open MPI,
      Kubernetes); or 'none' for a single process; or '', which means 'auto' on a TPU VM and 'none' elsewhere.
    num_processes, process_id: required with 'HOST:PORT'; -1 means not given.
    join_timeout: the number of seconds for which hosts wait for each other.
    heartbeat: the number of seconds after which a host without heartbeat is considered lost.
  """

  coordinator: str = ""
  num_processes: int = -1
  process_id: int = -1
  join_timeout: int = 300
  heartbeat: int = 60

  def check(self) -> None:
    """Raises InputError if the fields are inconsistent or out of range."""
    host, colon, port = self.coordinator.rpartition(":")
    if self.coordinator in ("", "auto", "none"):
      for name in ("num_processes", "process_id"):
        if getattr(self, name) != -1:
          raise InputError(
            f"--{name}: {getattr(self, name)} requires --coordinator=HOST:PORT, but --coordinator is"
            f" {self.coordinator or 'not given'!r}"
          )
    elif not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
      raise InputError(f"--coordinator: {self.coordinator!r} is invalid; give HOST:PORT, 'auto' or 'none'")
    else:
      self._check_numbers()
    for name in ("join_timeout", "heartbeat"):
      if getattr(self, name) < 1:
        raise InputError(f"--{name}: {getattr(self, name)} must be at least 1 second")

  def _check_numbers(self) -> None:
    if self.num_processes < 1:
      raise InputError(
        f"--num_processes: {'not given' if self.num_processes == -1 else self.num_processes}; with"
        f" --coordinator={self.coordinator}, give the number of processes, at least 1"
      )
    if not 0 <= self.process_id < self.num_processes:
      raise InputError(
        f"--process_id: {'not given' if self.process_id == -1 else self.process_id}; give each process a different"
        f" number from 0 to {self.num_processes - 1}"
      )


class Cluster(Channel):
  """All hosts of a run; see `join`. It is also the channel of the main thread.

  Args:
    store: the key-value store of the hosts; None if there is only one host.
    index: the number of this host.
    count: the number of hosts.
    reporter: prints the reason if this process is killed.
  """

  def __init__(
    self, store: KeyValueStore | None = None, index: int = 0, count: int = 1, reporter: ExitReporter | None = None
  ):
    super().__init__(store, index, count)
    self._watchdog = None if store is None else Watchdog(store, index, reporter)
    self._channels: collections.Counter[str] = collections.Counter()

  def channel(self, name: str) -> Channel:
    """A channel for another thread; all hosts must pass the same name."""
    self._channels[name] += 1
    return Channel(self._store, self.index, self.count, f"{name}/{self._channels[name]}")

  def agree(self, facts: Mapping[str, Any], **options: Any) -> None:
    """Checks that all hosts have the same facts; see `agreement.agree`."""
    agreement.agree(self, facts, **options)

  def same_folder(self, folder: Any, **options: Any) -> None:
    """Checks that a path is the same folder on all hosts; see `agreement.same_folder`."""
    agreement.same_folder(self, folder, **options)

  def stops(self, requested: bool) -> bool:
    """Whether all hosts stop at this call, because a stop was requested on one of them.

    Args:
      requested: whether a stop was requested on this host.
    """
    if self._watchdog is None:
      return requested
    if requested:
      self._watchdog.request_stop()
    # Host 0 decides, because hosts that check at different times would stop at different steps.
    return self.broadcast(self._watchdog.stop_requested)

  def leave(self) -> None:
    """Disconnects this host after a run that has ended on all hosts: it has succeeded or was interrupted."""
    if self._watchdog is not None:
      self._watchdog.leave()
      jax.distributed.shutdown()
      self._watchdog.dismiss_reporter()

  def abandon(self, message: str, code: int) -> None:
    """Announces to the other hosts why this host ends, and exits at once; returns if there is only one host.

    Args:
      message: the reason, one line.
      code: the exit code of all hosts.
    """
    if self._watchdog is not None:
      self._watchdog.abandon(message, code)


ALONE = Cluster()


def join(meeting: Meeting) -> Cluster:
  """Connects this process with the other hosts; must be called before any other use of jax.

  Raises:
    InputError: the fields of `meeting` are invalid, or no host can be reached.
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
    logging.info("host %d of %d: connecting to %s", meeting.process_id, meeting.num_processes, where)
  reporter = ExitReporter(
    f"the hosts haven't connected to {where} within {meeting.join_timeout} seconds (--join_timeout): either host 0"
    " can't be reached at this address, or not all hosts were started"
  )
  # jax's preemption service would handle SIGTERM, but the training loop has its own way to stop all hosts.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      **named, initialization_timeout=meeting.join_timeout, heartbeat_timeout_seconds=meeting.heartbeat
    )
  except (ValueError, RuntimeError) as error:
    reporter.dismiss()
    if meeting.coordinator == "":
      logging.warning("no other hosts were found (%s); if there are any, give --coordinator", first_line(error))
      return _checked_alone()
    raise InputError(
      f"--coordinator: {where!r} can't be reached ({first_line(error)}); give HOST:PORT of host 0"
    ) from None
  index, count = jax.process_index(), jax.process_count()
  if count == 1:
    reporter.dismiss()
    return ALONE
  reporter.set_message(
    "this process was killed; most likely another host has died or can't be reached. The saved checkpoints are intact:"
    " start all hosts again with the same command to continue"
  )
  logging.info("host %d of %d: %d of %d devices", index, count, jax.local_device_count(), jax.device_count())
  return Cluster(KeyValueStore.of_jax(), index, count, reporter)


def _checked_alone() -> Cluster:
  """Returns ALONE; raises InputError if jax sees devices of other hosts."""
  if jax.process_count() > 1:
    raise InputError(
      f"--coordinator: not given, but jax sees the devices of {jax.process_count()} hosts; give HOST:PORT of host 0,"
      " with --num_processes and --process_id"
    )
  return ALONE


def _is_tpu_vm() -> bool:
  """Whether jax will use TPUs on this machine."""
  if importlib.util.find_spec("libtpu") is None or os.environ.get("JAX_PLATFORMS", "tpu") not in ("", "tpu"):
    return False
  return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))
