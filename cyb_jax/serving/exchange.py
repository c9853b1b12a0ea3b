"""A request in the engine and the events of its answer, on the side of the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator

from cyb_jax.generation import NewTokens
from cyb_jax.generation.prompt_scores import TextScores
from cyb_jax.serving import errors
from cyb_jax.serving.answers import Envelope, Names, Token
from cyb_jax.serving.engine import ClosedError, Engine, Event, Failure, QueueFullError
from cyb_jax.serving.errors import ApiError
from cyb_jax.serving.metrics import Metrics
from cyb_jax.serving.protocol import Model, Request


@dataclasses.dataclass(frozen=True)
class Part:
  """New tokens of a choice.

  Attributes:
    choice: the index of the choice.
    tokens: its new tokens.
    ends: whether the choice is complete.
  """

  choice: int
  tokens: list[Token]
  ends: bool


class Exchange:
  """A submitted request.

  Args:
    engine: the engine.
    request: the request.
    model: the model.
    names: the names of its tokens.
    metrics: the server's metrics.

  Attributes:
    envelope: the answer.

  Raises:
    ApiError: the queue is full, or the server is shutting down.
  """

  def __init__(self, engine: Engine, request: Request, model: Model, names: Names, metrics: Metrics):
    self.envelope = Envelope(request, model, names)
    self._request, self._metrics, self._start = request, metrics, time.perf_counter()
    # The number of events of a request is bounded by its tokens, so a slow client needs no other bound.
    self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def deliver(number: int, event: Event) -> None:
      # After the end of the event loop nobody waits for the event.
      with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

    needs_engine = any(work.row.max_new_tokens or work.scores_prompt for work in request.work)
    try:
      self._tickets = engine.submit(request.work, deliver) if needs_engine else []
    except QueueFullError:
      raise ApiError(
        f"the server is busy: {engine.queue} continuations are waiting; try again later", status=429,
        kind="rate_limit_error", code="rate_limit_exceeded",
      ) from None  # fmt: skip
    except ClosedError:
      reason = (
        "the server is shutting down" if engine.alive else "the engine has ended; the server's log has the reason"
      )
      raise errors.server_error(reason, 503) from None

  def cancel(self) -> None:
    """Ends the request; it has no effect on choices that are complete."""
    for ticket in self._tickets:
      ticket.cancel()

  async def parts(self) -> AsyncIterator[Part]:
    """The parts of the answer, as they are generated.

    Raises:
      ApiError: the request has failed.
    """
    scored = [work.scores_prompt for work in self._request.work]
    open_choices = set(range(len(self._request.work)))
    for number, choice in enumerate(self.envelope.choices):
      if self._request.echo and not scored[number]:
        ends = choice.finish_reason is not None
        open_choices -= {number} if ends else set()
        yield Part(number, choice.add_prompt(None), ends)
    begun = False
    while open_choices:
      number, event = await self._events.get()
      if isinstance(event, Failure):
        raise ApiError(event.message) if event.bad_input else errors.server_error(event.message, 503)
      if number not in open_choices:
        continue  # tokens after a stop string
      choice = self.envelope.choices[number]
      if isinstance(event, TextScores):
        tokens = choice.add_prompt(event)
      else:
        assert isinstance(event, NewTokens)
        tokens = choice.add(event)
        if not begun:
          begun = True
          self._metrics.first_token(time.perf_counter() - self._start)
      ends = choice.finish_reason is not None
      if ends:
        open_choices.discard(number)
        self._tickets[number].cancel()
      yield Part(number, tokens, ends)
    self._metrics.last_token(time.perf_counter() - self._start)
