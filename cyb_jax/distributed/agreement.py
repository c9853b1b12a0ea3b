"""Checks that all hosts have the same facts, such as code version and config, and see the same folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax

from cyb_jax import __version__, nested
from cyb_jax.distributed.channel import Channel
from cyb_jax.errors import InputError, writing

# The number of seconds for which hosts wait for each other's facts when they start.
_AGREE_SECONDS = 60


def agree(
  channel: Channel, facts: Mapping[str, Any], *, seconds: float | None = _AGREE_SECONDS, what: str = "their settings"
) -> None:
  """Checks that all hosts have the same facts.

  Args:
    channel: the channel between the hosts.
    facts: JSON values, possibly nested dicts; their names appear in the error message.
    seconds, what: see `Channel.gather`.

  Raises:
    InputError: the facts differ. It is raised on all hosts.
    HostLostError: a host hasn't sent its facts in time.
  """
  first, *others = channel.gather(dict(facts), seconds=seconds, what=what)
  for host, theirs in enumerate(others, start=1):
    different = list(nested.differences(first, theirs))
    if different:
      more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
      listed = "; ".join(f"{path} is {a!r} on host 0, but {b!r} on host {host}" for path, a, b in different[:3])
      raise InputError(f"hosts: {listed}{more}; start all hosts with the same code, flags and environment")


def same_folder(channel: Channel, folder: Any, *, seconds: float = 20.0) -> None:
  """Checks that a path is the same folder on all hosts.

  Args:
    channel: the channel between the hosts.
    folder: a path on a disk; host 0 must have write permission.
    seconds: the time that a shared file system may take to show a new file.

  Raises:
    InputError: some hosts don't see it.
    StorageError: host 0 can't write to it.
  """
  if channel.count == 1:
    return
  token = channel.broadcast(os.urandom(16).hex())
  mark = folder / f".hosts.{token}"
  if channel.index == 0:
    with writing(f"workdir: {folder}"):
      mark.write_text(token)
  channel.barrier()
  until = time.monotonic() + seconds
  while not (seen := _exists(mark)) and time.monotonic() < until:
    time.sleep(0.2)
  missing = [host for host, sees in enumerate(channel.gather(seen)) if not sees]
  if channel.index == 0:
    with writing(f"workdir: {folder}"):
      mark.unlink()
  if missing:
    numbers = ", ".join(map(str, missing))
    raise InputError(
      f"workdir: {folder} on host {numbers} isn't the folder of host 0; give a folder that all hosts share, such as"
      " gs://BUCKET/FOLDER"
    )


def own_facts() -> dict[str, str]:
  """The facts that all hosts of a cluster must share, independently of the config."""
  return {
    "cyb_jax": f"{__version__}, source {code_version()}",
    "jax": jax.__version__,
    "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
  }


def code_version() -> str:
  """A digest of the package's source, because two checkouts of the same version may differ."""
  package = pathlib.Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(package.rglob("*.py")):
    digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
  return digest.hexdigest()[:16]


def _exists(path: Any) -> bool:
  with contextlib.suppress(OSError):
    os.listdir(path.parent)  # listing the folder refreshes the cache of a network file system
  return path.exists()
