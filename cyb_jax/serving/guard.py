"""The outermost layer of the server: it checks the header Host, and counts answers."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cyb_jax.serving.errors import ApiError
from cyb_jax.serving.metrics import Metrics


class Guard:
  """An ASGI middleware.

  Args:
    app: the application.
    hosts: the accepted names in the header Host; empty: all.
    metrics: the metrics that count the answers.
  """

  def __init__(self, app: ASGIApp, hosts: frozenset[str], metrics: Metrics):
    self._app, self._hosts, self._metrics = app, hosts, metrics

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return

    async def counted(message: Message) -> None:
      if message["type"] == "http.response.start":
        message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
        # Routes, not paths: the number of metrics must not depend on requests.
        route = scope.get("route")
        self._metrics.count(getattr(route, "path", "other"), message["status"])
      await send(message)

    name = host_name(Headers(scope=scope).get("host", ""))
    if self._hosts and name not in self._hosts:
      refused = ApiError(f"the header Host names {name[:60]!r}, which is not this server", status=421)
      await refused.response()(scope, receive, counted)
      return
    await self._app(scope, receive, counted)


def host_name(header: str) -> str:
  """The name in a header Host, without the port.

  Example:
    >>> host_name("localhost:8000"), host_name("[::1]:8000"), host_name("127.0.0.1")
    ('localhost', '::1', '127.0.0.1')
  """
  if header.startswith("["):
    return header[1:].partition("]")[0]
  return header.partition(":")[0].lower()
