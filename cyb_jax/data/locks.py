"""Mutual exclusion of processes: a lock of the operating system on a local disk, a lease in a bucket.

The operating system releases the lock of a process that dies, but an object in a bucket remains. The holder of a lease
therefore renews it every few seconds, and another process takes over a lease that is no longer renewed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

from absl import logging
from etils import epath

from cyb_jax.storage import in_bucket, streams

_SECONDS_BETWEEN_RENEWALS = 10.0
_SECONDS_UNTIL_DEAD = 45.0
# Longer than a process that has found no lease needs to write its own.
_SECONDS_TO_SETTLE = 2.0


class Busy(Exception):
  """Another process holds the lock; the message names the process if it is known."""


@contextlib.contextmanager
def held(path: epath.Path, *, wait: str = "", shared: bool = False) -> Iterator[None]:
  """Holds a lock inside the `with` block.

  Args:
    path: the lock file; its folder must exist. Read permission is enough, so the file may belong to another user.
    wait: the line that is logged before the call waits for another process; if it is '', the call doesn't wait. The
      call never waits for the end of a lease in a bucket.
    shared: whether other processes that also pass `shared=True` may hold the lock at the same time. It has no effect
      in a bucket.

  Raises:
    Busy: another process holds the lock.
    OSError: the file can be neither written nor read.
  """
  if in_bucket(path):
    with _leased(path):
      yield
    return
  mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
  with opened(path) as file:
    try:
      fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
      if not wait:
        raise Busy("another process of this machine") from None
      logging.info("%s", wait)
      fcntl.flock(file, mode)
    except OSError as error:  # some network file systems have no locks
      logging.warning(
        "%s can't be locked (%s): make sure that no other process writes there at the same time", path, error.strerror
      )
    yield


def opened(path: epath.Path) -> IO[str]:
  """Opens a lock file; the file is created if it does not exist."""
  try:
    return open(path, "a")
  except OSError as error:
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
      raise
    try:
      return open(path)
    except OSError:
      raise error from None


@contextlib.contextmanager
def _leased(path: epath.Path) -> Iterator[None]:
  """Holds a lease; a lease that its holder no longer renews is taken over.

  If several processes write their lease at the same time, the process that has written last holds it.
  """
  mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
  found = streams.read_json(path)
  if found is not None:
    logging.info(
      "%s is held by process %s on %s; checking whether that process is alive",
      path,
      found.get("pid"),
      found.get("host"),
    )
    deadline = time.monotonic() + _SECONDS_UNTIL_DEAD
    while time.monotonic() < deadline:
      time.sleep(_SECONDS_UNTIL_DEAD / 30)
      now = streams.read_json(path)
      if now is None:
        break
      if now != found:
        raise Busy(f"process {now.get('pid')} on {now.get('host')}")

  def other() -> dict[str, Any] | None:
    now = streams.read_json(path)
    return None if now is None or now.get("token") == mine["token"] else now

  stop = threading.Event()
  streams.write_json(path, mine | {"renewals": 0})
  time.sleep(_SECONDS_TO_SETTLE)
  if (holder := other()) is not None:
    raise Busy(f"process {holder.get('pid')} on {holder.get('host')}")

  def renew():
    renewals = 0
    while not stop.wait(_SECONDS_BETWEEN_RENEWALS):
      renewals += 1
      # If the bucket fails here and does not recover, the block inside the lease fails with an error of its own.
      with contextlib.suppress(Exception):
        if other() is None:
          streams.write_json(path, mine | {"renewals": renewals})

  thread = threading.Thread(target=renew, daemon=True)
  thread.start()
  try:
    yield
  finally:
    stop.set()
    thread.join()
    with contextlib.suppress(Exception):
      if other() is None:
        streams.remove(path)
