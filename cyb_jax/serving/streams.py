"""The response to a request for text: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from absl import logging
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from cyb_jax.serving import errors
from cyb_jax.serving.errors import ApiError
from cyb_jax.serving.exchange import Exchange, Part

_HEADERS = [
  (b"content-type", b"text/event-stream; charset=utf-8"),
  (b"cache-control", b"no-store"),
  # Proxies must not hold back the events.
  (b"x-accel-buffering", b"no"),
]


class Answer(Response):
  """An ASGI response that ends the request in the engine if the client leaves.

  Args:
    exchange: the submitted request.
    write_seconds: the maximum time that the client may take to read a part.
  """

  def __init__(self, exchange: Exchange, write_seconds: float):
    self._exchange, self._write_seconds = exchange, write_seconds
    self._request = exchange.envelope.request
    self._offsets = [0] * len(exchange.envelope.choices)
    self.background = None

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    write = self._stream(send) if self._request.stream else self._whole(scope, receive, send)
    writer, left = asyncio.ensure_future(write), asyncio.ensure_future(_left(receive))
    try:
      await asyncio.wait({writer, left}, return_when=asyncio.FIRST_COMPLETED)
    finally:
      # Also if the server cancels this task.
      self._exchange.cancel()
      for task in (writer, left):
        task.cancel()
      results = await asyncio.gather(writer, left, return_exceptions=True)
    if isinstance(results[0], Exception):
      raise results[0]

  async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      async for _ in self._exchange.parts():
        pass
    except ApiError as error:
      await error.response()(scope, receive, send)
      return
    await JSONResponse(self._exchange.envelope.whole())(scope, receive, send)

  async def _stream(self, send: Send) -> None:
    begun = False
    try:
      async for part in self._exchange.parts():
        events = [*([] if begun else self._first_events()), *self._events(part)]
        if not begun:
          begun = True
          await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        if events:
          await self._write(send, events)
    except ApiError as error:
      if not begun:
        response = error.response()
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body})
        return
      # Without [DONE], which says that the answer is complete.
      await self._write(send, [error.body])
      await send({"type": "http.response.body", "body": b"", "more_body": False})
      return
    except TimeoutError:
      logging.info("a client has read nothing for %g s; its request is ended", self._write_seconds)
      return
    except Exception:
      # The status has been sent, so the stream itself has to say it.
      if begun:
        failed = errors.server_error("the server has failed on this request; its log has the reason")
        await self._write(send, [failed.body])
      raise
    last = [self._exchange.envelope.last_part()] if self._request.include_usage else []
    await self._write(send, [*last, "[DONE]"])
    await send({"type": "http.response.body", "body": b"", "more_body": False})

  def _first_events(self) -> Iterator[dict[str, Any]]:
    if self._request.chat:
      yield from map(self._exchange.envelope.first_part, range(len(self._offsets)))

  def _events(self, part: Part) -> Iterator[dict[str, Any]]:
    """One event for each generated token, and one for the prompt."""
    prompt = [token for token in part.tokens if token.pauses is None]
    groups = [prompt] if prompt else [[token] for token in part.tokens]
    if part.ends and not groups:
      groups = [[]]
    for number, tokens in enumerate(groups):
      ends = part.ends and number == len(groups) - 1
      yield self._exchange.envelope.part(part.choice, tokens, self._offsets[part.choice], ends=ends)
      self._offsets[part.choice] += sum(len(token.text) for token in tokens)

  async def _write(self, send: Send, events: list[Any]) -> None:
    lines = (event if isinstance(event, str) else json.dumps(event, separators=(",", ":")) for event in events)
    body = "".join(f"data: {line}\n\n" for line in lines).encode()
    async with asyncio.timeout(self._write_seconds):
      await send({"type": "http.response.body", "body": body, "more_body": True})


async def _left(receive: Receive) -> None:
  """Waits until the client has closed the connection."""
  while (await receive())["type"] != "http.disconnect":
    pass
