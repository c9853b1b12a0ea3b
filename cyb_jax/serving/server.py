"""The server's socket and its life: it serves until a signal, then completes the running requests."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from absl import logging
from starlette.applications import Starlette

from cyb_jax.errors import InputError
from cyb_jax.signals import restored

# Names of the loopback interface in the header Host.
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def bind(host: str, port: int) -> socket.socket:
  """A bound socket; port 0 is any free port.

  Raises:
    InputError: the address can't be bound.
  """
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
  except (OSError, UnicodeError) as error:
    raise InputError(f"--host: {host!r} is no address of this machine ({error}); give 127.0.0.1 or 0.0.0.0") from None
  bound = socket.socket(family, kind, protocol)
  bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    bound.bind(address)
  except OSError as error:
    bound.close()
    if error.errno == errno.EADDRINUSE:
      raise InputError(f"--port: {port} on {host} is in use; give another port, or 0 for any free port") from None
    if error.errno == errno.EACCES:
      raise InputError(f"--port: {port} needs the rights of an administrator; give a port from 1024 on") from None
    raise InputError(f"--host: {host!r} can't be bound ({os.strerror(error.errno or 0)}); give 127.0.0.1") from None
  return bound


def address_of(bound: socket.socket) -> str:
  """The address as in a URL, such as '127.0.0.1:8000'."""
  host, port = bound.getsockname()[:2]
  return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
  """Whether only programs of this machine reach the socket."""
  return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def host_names(bound: socket.socket) -> frozenset[str]:
  """The names in the header Host that a server on the loopback interface accepts; empty for other servers."""
  return frozenset((*_LOOPBACK, bound.getsockname()[0])) if is_loopback(bound) else frozenset()


class Server:
  """Serves an application until a signal; then it accepts no more connections and completes the requests.

  Args:
    app: the application.
    bound: a bound socket, which is closed at the end.
    drain_seconds: the maximum time to complete the requests after a signal.
    connections: the maximum number of connections at the same time.
    ready: called when the server accepts connections.
  """

  def __init__(
    self,
    app: Starlette,
    bound: socket.socket,
    *,
    drain_seconds: int,
    connections: int,
    ready: Callable[[], None] = lambda: None,
  ):
    config = uvicorn.Config(
      app,
      log_config=None,
      access_log=False,
      lifespan="off",
      ws="none",
      server_header=False,
      timeout_graceful_shutdown=drain_seconds,
      limit_concurrency=connections,
      backlog=max(128, connections),
    )
    self._server, self._bound = _Uvicorn(config, ready), bound

  @property
  def started(self) -> bool:
    """Whether the server accepts connections."""
    return self._server.started

  def run(self) -> None:
    """Serves until `stop` is called or SIGTERM or SIGINT arrives in the main thread."""
    with restored():
      asyncio.run(self._run())

  def stop(self) -> None:
    """Ends the server after the running requests; a second call ends it at once."""
    if self._server.should_exit:
      self._server.force_exit = True
    else:
      logging.info("no more requests are accepted; completing the running ones")
      self._server.should_exit = True

  async def _run(self) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
      # Only the main thread may handle signals; elsewhere, the caller stops the server.
      with contextlib.suppress(ValueError, RuntimeError):
        loop.add_signal_handler(number, self.stop)
    await self._server.serve(sockets=[self._bound])


class _Uvicorn(uvicorn.Server):
  """A server whose signals `Server` handles, and that says when it accepts connections."""

  def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
    super().__init__(config)
    self._ready = ready

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    await super().startup(sockets)
    self._ready()

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    yield
