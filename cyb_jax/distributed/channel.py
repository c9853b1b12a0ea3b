"""Short messages between hosts, through the key-value store of jax's coordination service, which runs in process 0.

Arrays are never sent this way. This is the one module that reaches jax's private client of the service.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import jax

from cyb_jax.errors import HostLostError

# A message of this many turns ago has been read by all hosts, because they call a channel in step.
_TURNS_KEPT = 10_000
# The longest single request to the service, in seconds.
_REQUEST_SECONDS = 10.0


class KeyValueStore:
  """Texts by key, visible to all hosts.

  Args:
    client: of jax's coordination service.
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
    """The keys in a folder, and their texts; raises jax.errors.JaxRuntimeError where host 0 can't be reached."""
    return self._client.key_value_dir_get(folder)

  def wait(self, key: str, until: float | None) -> str | None:
    """The text of a key, as soon as a host has written it.

    Args:
      key: of the text.
      until: a time of `time.monotonic`; None: as long as host 0 lives.

    Returns:
      The text; None where the key does not exist at that time.

    Raises:
      HostLostError: host 0 can't be reached.
    """
    while True:
      left = _REQUEST_SECONDS if until is None else max(until - time.monotonic(), 0.001)
      try:
        return self._client.blocking_key_value_get(key, int(1000 * min(left, _REQUEST_SECONDS)) + 1)
      except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
          raise HostLostError(f"hosts: host 0, where they meet, can't be reached ({first_line(error)})") from None
        if until is not None and time.monotonic() >= until:
          return None


class Channel:
  """Messages between the hosts, in an order that is the same on all of them.

  All hosts make the same calls on a channel, one after the other. Every thread needs a channel of its own.

  Args:
    store: of the hosts; None: there is one host.
    index, count: of this host, and of all.
    name: of the channel, unique among them.
  """

  def __init__(self, store: KeyValueStore | None = None, index: int = 0, count: int = 1, name: str = "main"):
    self._store, self.index, self.count, self._name = store, index, count, name
    self._turns = itertools.count()

  def gather(self, value: Any, *, seconds: float | None = None, what: str = "") -> list[Any]:
    """The values of all hosts, by their numbers.

    Args:
      value: of this host; JSON.
      seconds: how long this host waits for the others; None: as long as they live.
      what: what the values are, for the error message.

    Raises:
      HostLostError: a host has given no value in time.
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
        f"hosts: {missing} of {self.count} haven't said {what} within {seconds:.0f} seconds; see their logs"
      )
    return [json.loads(text) for text in texts if text is not None]

  def broadcast(self, value: Any = None) -> Any:
    """The value of host 0; the values of the others are ignored."""
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
