"""Reading the body of a request, with limits of its size and time."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from cyb_jax import jsonl
from cyb_jax.serving.errors import ApiError


async def read_json(http: HttpRequest, *, most: int, seconds: float) -> Any:
  """The parsed JSON of a request's body.

  Args:
    http: the request.
    most: the maximum number of bytes.
    seconds: the maximum time until the body is complete.

  Raises:
    ApiError: the body is no JSON, too large, or too slow.
  """
  kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
  # A form of another site can send other types without asking, but not this one.
  if kind != "application/json":
    raise ApiError(
      f"the header Content-Type is {kind[:60]!r}; send JSON with Content-Type: application/json", status=415
    )
  length = http.headers.get("content-length", "")
  if length.isdecimal() and int(length) > most:
    raise _too_large(most)
  body = bytearray()
  try:
    async with asyncio.timeout(seconds):
      async for part in http.stream():
        body += part
        if len(body) > most:
          raise _too_large(most)
  except TimeoutError:
    raise ApiError(f"the body is incomplete after {seconds:g} s; send it faster", status=408) from None
  except ClientDisconnect:
    raise ApiError("the client has gone", status=499) from None
  try:
    value = json.loads(bytes(body), parse_constant=_reject)
    jsonl.check_depth(value)
  except (ValueError, RecursionError) as error:
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    raise ApiError(f"body: it is no valid JSON ({reason[:200]}); send a JSON object") from None
  return value


def _reject(constant: str) -> NoReturn:
  raise ValueError(f"{constant} is no JSON")


def _too_large(most: int) -> ApiError:
  return ApiError(f"the body has more than {most} bytes; send a shorter request", status=413)
