"""The routes of the server: OpenAI's interface, health, metrics and the page."""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from absl import logging
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cyb_jax.errors import InputError
from cyb_jax.evaluation.abilities import is_adaptive
from cyb_jax.generation.abilities import can_pace_itself
from cyb_jax.serving import bodies, errors, metrics
from cyb_jax.serving.answers import Names
from cyb_jax.serving.engine import Engine
from cyb_jax.serving.errors import ApiError
from cyb_jax.serving.exchange import Exchange
from cyb_jax.serving.guard import Guard
from cyb_jax.serving.protocol import Model, Request, parse_chat, parse_completion
from cyb_jax.serving.streams import Answer
from cyb_jax.serving.tokens import detokenize, tokenize, tokenizer_info

_PAGE = {"index.html": "text/html; charset=utf-8", "style.css": "text/css; charset=utf-8",
  "page.js": "text/javascript; charset=utf-8"}  # fmt: skip
_POLICY = (
  "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
  " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclasses.dataclass(frozen=True)
class Limits:
  """The limits of the server.

  Attributes:
    api_key: the key that requests must have; '': none is needed.
    hosts: the accepted names in the header Host; empty: all. A server on the loopback interface accepts only its own
      names, so that a page of another site cannot reach it under a name of its own.
    body_bytes: the maximum size of a request's body.
    body_seconds: the maximum time until a body is complete.
    write_seconds: the maximum time that a client may take to read a part of an answer.
  """

  api_key: str = ""
  hosts: frozenset[str] = frozenset()
  body_bytes: int = 2**20
  body_seconds: float = 30.0
  write_seconds: float = 60.0


class Service:
  """The handlers of the routes.

  Args:
    engine: the engine, which has been started.
    model: the served model.
    limits: the limits.
  """

  def __init__(self, engine: Engine, model: Model, limits: Limits):
    self.engine, self.model, self.limits = engine, model, limits
    self.metrics = metrics.Metrics(engine)
    self._names, self._created = Names(model.run.tokenizer), int(time.time())
    page = resources.files("cyb_jax.serving") / "page"
    self._files = {name: (page / name).read_bytes() for name in _PAGE}

  async def completions(self, http: HttpRequest) -> Response:
    return await self._generate(http, parse_completion)

  async def chat_completions(self, http: HttpRequest) -> Response:
    return await self._generate(http, parse_chat)

  async def _generate(self, http: HttpRequest, parse: Callable[[Any, Model], Request]) -> Response:
    # In a thread, because encoding a long prompt would hold up the streams of other clients.
    request = await run_in_threadpool(self._parsed, parse, await self._body(http))
    exchange = Exchange(self.engine, request, self.model, self._names, self.metrics)
    return Answer(exchange, self.limits.write_seconds)

  def _parsed(self, parse: Callable[[Any, Model], Request], body: Any) -> Request:
    request = parse(body, self.model)
    self.engine.check(request.work[0].row.options)
    return request

  async def models(self, http: HttpRequest) -> Response:
    return JSONResponse({"object": "list", "data": [self._described()]})

  async def one_model(self, http: HttpRequest) -> Response:
    if http.path_params["name"] != self.model.name:
      raise ApiError(
        f"model: {http.path_params['name'][:60]!r} does not exist; the server has {self.model.name!r}", status=404,
        param="model", code="model_not_found",
      )  # fmt: skip
    return JSONResponse(self._described())

  def _described(self) -> dict[str, Any]:
    run = self.model.run
    return {
      "id": self.model.name,
      "object": "model",
      "created": self._created,
      "owned_by": "cyb_jax",
      # Without the start token, which the server adds.
      "max_model_len": self.model.context - len(run.boundaries.start),
      "method": run.config.method.name,
      "step": run.step,
      "max_pauses": run.method.num_slots - 1,
      "is_adaptive": is_adaptive(run.method),
      "can_pace_itself": can_pace_itself(run.method),
      "default_mode": self.model.default_mode,
      "has_chat_template": run.tokenizer.chat_template is not None,
    }

  async def tokenize(self, http: HttpRequest) -> Response:
    return JSONResponse(await run_in_threadpool(tokenize, await self._body(http), self.model))

  async def detokenize(self, http: HttpRequest) -> Response:
    return JSONResponse(await run_in_threadpool(detokenize, await self._body(http), self.model))

  async def tokenizer_info(self, http: HttpRequest) -> Response:
    return JSONResponse(tokenizer_info(self.model))

  async def health(self, http: HttpRequest) -> Response:
    if not self.engine.alive:
      raise errors.server_error("the engine has ended", 503)
    return JSONResponse({"status": "ok"})

  async def prometheus(self, http: HttpRequest) -> Response:
    return Response(self.metrics.text(), headers={"content-type": metrics.CONTENT_TYPE})

  async def page(self, http: HttpRequest) -> Response:
    name = http.path_params.get("name", "index.html")
    if name not in self._files:
      raise HTTPException(404)
    headers = {"content-type": _PAGE[name], "content-security-policy": _POLICY, "cache-control": "no-cache",
      "referrer-policy": "no-referrer"}  # fmt: skip
    return Response(self._files[name], headers=headers)

  async def _body(self, http: HttpRequest) -> Any:
    return await bodies.read_json(http, most=self.limits.body_bytes, seconds=self.limits.body_seconds)

  def checked(self, handler: Callable[[HttpRequest], Awaitable[Response]]) -> Callable:
    """A handler that first checks the key of the request."""

    async def guarded(http: HttpRequest) -> Response:
      scheme, _, key = http.headers.get("authorization", "").partition(" ")
      wanted = self.limits.api_key
      if wanted and not (scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), wanted.encode())):
        raise ApiError(
          "the API key is missing or wrong; give it in the header Authorization: Bearer KEY", status=401,
          kind="authentication_error", code="invalid_api_key",
        )  # fmt: skip
      return await handler(http)

    return guarded


def build_app(engine: Engine, model: Model, limits: Limits) -> Starlette:
  """The ASGI application."""
  service = Service(engine, model, limits)

  def route(path: str, handler: Callable[[HttpRequest], Awaitable[Response]], method: str, key: bool = True) -> Route:
    return Route(path, service.checked(handler) if key else handler, methods=[method], name=path)

  return Starlette(
    routes=[
      route("/v1/completions", service.completions, "POST"),
      route("/v1/chat/completions", service.chat_completions, "POST"),
      route("/v1/models", service.models, "GET"),
      route("/v1/models/{name:path}", service.one_model, "GET"),
      route("/tokenize", service.tokenize, "POST"),
      route("/detokenize", service.detokenize, "POST"),
      route("/tokenizer_info", service.tokenizer_info, "GET"),
      route("/metrics", service.prometheus, "GET"),
      route("/health", service.health, "GET", key=False),
      route("/", service.page, "GET", key=False),
      route("/page/{name}", service.page, "GET", key=False),
    ],
    middleware=[Middleware(Guard, hosts=limits.hosts, metrics=service.metrics)],
    exception_handlers={
      ApiError: _api_error,
      InputError: _input_error,
      HTTPException: _http_error,
      Exception: _crash,
    },
  )


async def _api_error(http: HttpRequest, error: Exception) -> Response:
  assert isinstance(error, ApiError)
  return error.response()


async def _input_error(http: HttpRequest, error: Exception) -> Response:
  assert isinstance(error, InputError)
  return errors.of_input(error).response()


async def _http_error(http: HttpRequest, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  path, method = http.url.path[:60], http.method[:20]
  message = f"{path!r} does not exist" if error.status_code == 404 else f"{path!r} does not accept {method}"
  return ApiError(message, status=error.status_code).response(dict(error.headers or {}))


async def _crash(http: HttpRequest, error: Exception) -> Response:
  with contextlib.suppress(Exception):
    logging.error("%s %s has failed: %s", http.method, http.url.path, type(error).__name__)
  return errors.server_error("the server has failed on this request; its log has the reason").response()
