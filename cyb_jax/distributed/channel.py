"""Short messages between hosts, through the key-value store of jax's coordination service, which runs in process 0.

Arrays are never sent this way. This is the only module that uses jax's private client of the service.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import jax

from cyb_jax.errors import HostLostError

# All hosts make the same calls on a channel, so a message that is this many turns old has been read by all of them.
_TURNS_KEPT = 10_000
# The longest single request to the service, in seconds.
_REQUEST_SECONDS = 10.0


class KeyValueStore:
  """A mapping of keys to texts that all hosts share.

  Args:
    client: a client of jax's coordination service.
  """

  def __init__(self, client: Any):
    self._client = client

  @classmethod
  def of_jax(cls) -> KeyValueStore:
    """The store of this process, after `jax.distributed.initialize`."""
    from jax._src import distributed  # jax offers no public access to the store

    return cls(distributed.global_state.client)

  def set(self, key: str, text: str) -> None:
    """Writes a key, which must not exist yet."""
    self._client.key_value_set(key, text)

  def delete(self, key: str) -> None:
    """Deletes a key, or all keys in a folder."""
    self._client.key_value_delete(key)

  def entries(self, folder: str) -> list[tuple[str, str]]:
    """The keys in a folder, and their texts; raises jax.errors.JaxRuntimeError if host 0 can't be reached."""
    return self._client.key_value_dir_get(folder)

  def wait(self, key: str, until: float | None) -> str | None:
    """Waits until a key exists, and returns its text.

    Args:
      key: the key.
      until: the deadline, a time of `time.monotonic`; None means no deadline while host 0 can be reached.

    Returns:
      The text; None if the key does not exist at the deadline.

    Raises:
      HostLostError: host 0 can't be reached.
    """
    while True:
      left = _REQUEST_SECONDS if until is None else max(until - time.monotonic(), 0.001)
      try:
        return self._client.blocking_key_value_get(key, int(1000 * min(left, _REQUEST_SECONDS)) + 1)
      except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
          raise HostLostError(
            f"hosts: host 0 has died or can't be reached ({first_line(error)}). What was saved is intact: start all"
            " hosts again with the same command"
          ) from None
        if until is not None and time.monotonic() >= until:
          return None


class Channel:
  """Messages between the hosts, in the same order on all hosts.

  All hosts must make the same calls on a channel in the same order. Every thread needs its own channel.

  Args:
    store: the key-value store of the hosts; None if there is only one host.
    index: the number of this host.
    count: the number of hosts.
    name: the name of the channel, which must be unique.
  """

  def __init__(self, store: KeyValueStore | None = None, index: int = 0, count: int = 1, name: str = "main"):
    self._store, self.index, self.count, self._name = store, index, count, name
    self._turns = itertools.count()

  def gather(self, value: Any, *, seconds: float | None = None, what: str = "") -> list[Any]:
    """The values of all hosts, in the order of their numbers.

    Args:
      value: the value of this host, as JSON.
      seconds: the time for which this host waits for the others; None means no limit.
      what: a description of the values for the error message.

    Raises:
      HostLostError: a host hasn't sent its value in time.
    """
    if self._store is None:
      return [value]
    key = self._next()
    self._store.set(f"{key}/{self.index}", json.dumps(value))
    until = None if seconds is None else time.monotonic() + seconds
    texts = [self._store.wait(f"{key}/{host}", until) for host in range(self.count)]
    missing = ", ".join(str(host) for host, text in enumerate(texts) if text is None)
    if missing:
      raise HostLostError(
        f"hosts: {missing} of {self.count} haven't sent {what} within {seconds:.0f} seconds; see their logs, and start"
        " all hosts again with the same command"
      )
    return [json.loads(text) for text in texts if text is not None]

  def broadcast(self, value: Any = None) -> Any:
    """The value of host 0; the values of the other hosts are ignored."""
    if self._store is None:
      return value
    key = self._next()
    if self.index == 0:
      self._store.set(key, json.dumps(value))
      return value
    text = self._store.wait(key, None)
    assert text is not None  # it waits without a limit
    return json.loads(text)

  def barrier(self) -> None:
    """Returns when all hosts have called it."""
    self.gather(None)

  def _next(self) -> str:
    """The key of the next message."""
    turn = next(self._turns)
    if self.index == 0 and turn >= _TURNS_KEPT:
      self._store.delete(f"cyb_jax/{self._name}/{turn - _TURNS_KEPT}")
    return f"cyb_jax/{self._name}/{turn}"


def first_line(error: Exception) -> str:
  """The first line of an error's message, shortened."""
  return str(error).strip().splitlines()[0][:300]
