"""Several processes that train as one, each with devices of its own: how they find each other, stop at the same step,
and end together.

The work directory is whole however they end, and the same command on all hosts continues.
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
  """Where hosts meet.

  Attributes:
    coordinator: 'HOST:PORT' of host 0; 'auto', the address that jax finds by itself (TPU pods, Slurm, Open MPI,
      Kubernetes); 'none', this process is alone; '': 'auto' on a TPU VM, else 'none'.
    num_processes, process_id: with 'HOST:PORT'; -1: not given.
    join_timeout: how many seconds hosts wait for each other.
    heartbeat: the number of seconds after which a silent host counts as lost.
  """

  coordinator: str = ""
  num_processes: int = -1
  process_id: int = -1
  join_timeout: int = 300
  heartbeat: int = 60

  def check(self) -> None:
    """Raises InputError where the fields don't fit each other."""
    host, colon, port = self.coordinator.rpartition(":")
    if self.coordinator in ("", "auto", "none"):
      for name in ("num_processes", "process_id"):
        if getattr(self, name) != -1:
          raise InputError(
            f"--{name}: {getattr(self, name)} goes with --coordinator=HOST:PORT, which is"
            f" {self.coordinator or 'not given'!r}"
          )
    elif not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
      raise InputError(f"--coordinator: {self.coordinator!r} is none of HOST:PORT, 'auto' and 'none'")
    else:
      self._check_numbers()
    for name in ("join_timeout", "heartbeat"):
      if getattr(self, name) < 1:
        raise InputError(f"--{name}: {getattr(self, name)} must be at least 1 second")

  def _check_numbers(self) -> None:
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


class Cluster(Channel):
  """All hosts of a run; see `join`. As a channel it is for the main thread.

  Args:
    store: of the hosts; None: there is one host.
    index, count: of this host, and of all.
    reporter: reports an end of this process that comes from outside.
  """

  def __init__(
    self, store: KeyValueStore | None = None, index: int = 0, count: int = 1, reporter: ExitReporter | None = None
  ):
    super().__init__(store, index, count)
    self._watchdog = None if store is None else Watchdog(store, index, reporter)
    self._channels: collections.Counter[str] = collections.Counter()

  def channel(self, name: str) -> Channel:
    """A channel for another thread; all hosts ask for it by the same name."""
    self._channels[name] += 1
    return Channel(self._store, self.index, self.count, f"{name}/{self._channels[name]}")

  def agree(self, facts: Mapping[str, Any], **options: Any) -> None:
    """Checks that all hosts have the same facts; see `agreement.agree`."""
    agreement.agree(self, facts, **options)

  def same_folder(self, folder: Any, **options: Any) -> None:
    """Checks that all hosts see host 0's folder under a path; see `agreement.same_folder`."""
    agreement.same_folder(self, folder, **options)

  def stops(self, asked: bool) -> bool:
    """Whether all hosts stop at this call, because one of them was asked to stop before it.

    Args:
      asked: whether this host was asked.
    """
    if self._watchdog is None:
      return asked
    if asked:
      self._watchdog.request_stop()
    # Host 0 decides, because hosts that look at different times would stop at different steps.
    return self.broadcast(self._watchdog.stop_requested)

  def leave(self) -> None:
    """Ends a run that has succeeded or was interrupted, on all hosts alike."""
    if self._watchdog is not None:
      self._watchdog.leave()
      jax.distributed.shutdown()
      self._watchdog.dismiss_reporter()

  def abandon(self, message: str, code: int) -> None:
    """Tells the other hosts why this one ends, and ends its process at once; returns where there is one host.

    Args:
      message: one line.
      code: the exit code, for all hosts.
    """
    if self._watchdog is not None:
      self._watchdog.abandon(message, code)


ALONE = Cluster()


def join(meeting: Meeting) -> Cluster:
  """Meets the other hosts, before anything else of jax is used.

  Raises:
    InputError: the fields of `meeting` don't fit each other, or no host can be met.
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
  reporter = ExitReporter(
    f"the hosts haven't met at {where} within {meeting.join_timeout} seconds (--join_timeout): either host 0 can't be"
    " reached there, or not all of them were started"
  )
  # jax's preemption service would take SIGTERM for itself; the training loop stops all hosts in its own way.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      **named, initialization_timeout=meeting.join_timeout, heartbeat_timeout_seconds=meeting.heartbeat
    )
  except (ValueError, RuntimeError) as error:
    reporter.dismiss()
    if meeting.coordinator == "":
      logging.warning("no other hosts were found (%s); give --coordinator where there are some", first_line(error))
      return _checked_alone()
    raise InputError(f"--coordinator: {where!r} leads nowhere: {first_line(error)}") from None
  index, count = jax.process_index(), jax.process_count()
  if count == 1:
    reporter.dismiss()
    return ALONE
  reporter.set_message(
    "this process was ended from outside; most likely another host has died or can't be reached. What was saved is"
    " whole: start all hosts again with the same command to continue"
  )
  logging.info("host %d of %d: %d of %d devices", index, count, jax.local_device_count(), jax.device_count())
  return Cluster(KeyValueStore.of_jax(), index, count, reporter)


def _checked_alone() -> Cluster:
  """ALONE, where jax sees the devices of this host only."""
  if jax.process_count() > 1:
    raise InputError(
      f"--coordinator: not given, but the devices of {jax.process_count()} hosts are seen; give HOST:PORT of host 0,"
      " with --num_processes and --process_id"
    )
  return ALONE


def _is_tpu_vm() -> bool:
  """Whether jax will use TPUs here."""
  if importlib.util.find_spec("libtpu") is None or os.environ.get("JAX_PLATFORMS", "tpu") not in ("", "tpu"):
    return False
  return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))
