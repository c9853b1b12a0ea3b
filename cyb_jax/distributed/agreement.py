"""What all hosts must have in common, and the check that they have it."""

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
from cyb_jax.errors import InputError

# How long hosts wait for each other's facts when they start.
_AGREE_SECONDS = 60


def agree(
  channel: Channel, facts: Mapping[str, Any], *, seconds: float | None = _AGREE_SECONDS, what: str = "what they run"
) -> None:
  """Checks that all hosts have the same facts.

  Args:
    channel: between the hosts.
    facts: JSON values, which may be nested dicts; named as the user knows them.
    seconds, what: as in `Channel.gather`.

  Raises:
    InputError: the facts differ. It is raised on all hosts alike.
    HostLostError: a host hasn't sent its facts in time.
  """
  first, *others = channel.gather(dict(facts), seconds=seconds, what=what)
  for host, theirs in enumerate(others, start=1):
    different = list(nested.differences(first, theirs))
    if different:
      more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
      listed = "; ".join(f"{path} is {a!r} on host 0, but {b!r} on host {host}" for path, a, b in different[:3])
      raise InputError(f"hosts: {listed}{more}; start all hosts with the same")


def same_folder(channel: Channel, folder: Any, *, seconds: float = 20.0) -> None:
  """Checks that all hosts see host 0's folder under a path.

  Args:
    channel: between the hosts.
    folder: a path on a disk; host 0 may write there.
    seconds: how long a shared file system may take to show a new file.

  Raises:
    InputError: some hosts don't see it.
  """
  if channel.count == 1:
    return
  token = channel.broadcast(os.urandom(16).hex())
  mark = folder / f".hosts.{token}"
  if channel.index == 0:
    mark.write_text(token)
  channel.barrier()
  until = time.monotonic() + seconds
  while not (seen := _exists(mark)) and time.monotonic() < until:
    time.sleep(0.2)
  blind = [host for host, sees in enumerate(channel.gather(seen)) if not sees]
  if channel.index == 0:
    mark.unlink()
  if blind:
    numbers = ", ".join(map(str, blind))
    raise InputError(
      f"workdir: {folder} on host {numbers} isn't the folder of host 0; give one that all hosts share, such as"
      " gs://BUCKET/FOLDER"
    )


def own_facts() -> dict[str, str]:
  """The facts that hosts of one cluster must share, whatever they run."""
  return {
    "cyb_jax": f"{__version__}, source {code_version()}",
    "jax": jax.__version__,
    "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
  }


def code_version() -> str:
  """A digest of the package's own source, since two checkouts of one version may differ."""
  package = pathlib.Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(package.rglob("*.py")):
    digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
  return digest.hexdigest()[:16]


def _exists(path: Any) -> bool:
  with contextlib.suppress(OSError):
    os.listdir(path.parent)  # a network file system looks again only when the folder is listed
  return path.exists()
