"""Mutual exclusion of processes: a lock of the system on a local disk, a lease in a bucket.

The system releases the lock of a process that dies. An object of a bucket remains: its holder signs it every few
seconds, and a process that finds a lease that is no longer signed takes it over.
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
from typing import IO

from absl import logging
from etils import epath

from cyb_jax.storage import in_bucket, streams

_SECONDS_BETWEEN_SIGNS = 10.0
_SECONDS_UNTIL_DEAD = 45.0


class Busy(Exception):
  """Another process holds the lock; the message names it if it is known."""


@contextlib.contextmanager
def held(path: epath.Path, *, wait: str = "", shared: bool = False) -> Iterator[None]:
  """Holds a lock for as long as the block.

  Args:
    path: the lock's file; its folder must exist. One that can be read but not written to, such as another user's, can
      be locked too.
    wait: the line that is logged before the call waits for another process; '': it doesn't wait. It never waits for the
      end of a lease in a bucket.
    shared: whether other processes may hold the lock too if they share it. Without effect in a bucket.

  Raises:
    Busy: another process holds it.
    OSError: the file can be neither written to nor read.
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
      logging.warning("%s can't be locked (%s): see that no other process does the same", path, error.strerror)
    yield


def opened(path: epath.Path) -> IO[str]:
  """The lock's file, open; it is made where it does not exist."""
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
  """Holds a lease; one whose holder has stopped to sign is taken over."""
  mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
  found = streams.read_json(path)
  if found is not None:
    logging.info("%s is held by process %s on %s; watching whether it lives", path, found.get("pid"), found.get("host"))
    deadline = time.monotonic() + _SECONDS_UNTIL_DEAD
    while time.monotonic() < deadline:
      time.sleep(_SECONDS_UNTIL_DEAD / 30)
      now = streams.read_json(path)
      if now is None:
        break
      if now != found:
        raise Busy(f"process {now.get('pid')} on {now.get('host')}")
  stop = threading.Event()
  streams.write_json(path, mine | {"signs": 0})

  def sign():
    signs = 0
    while not stop.wait(_SECONDS_BETWEEN_SIGNS):
      signs += 1
      # A bucket that fails here fails the work as well, or has recovered by then.
      with contextlib.suppress(Exception):
        streams.write_json(path, mine | {"signs": signs})

  thread = threading.Thread(target=sign, daemon=True)
  thread.start()
  try:
    yield
  finally:
    stop.set()
    thread.join()
    with contextlib.suppress(Exception):
      streams.remove(path)
