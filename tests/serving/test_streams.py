"""Answers to clients that read slowly, and failures in the middle of a stream, without a network."""

import asyncio
import json

from served import until

from cyb_jax.generation import RunningBatch
from cyb_jax.serving.answers import Names
from cyb_jax.serving.exchange import Exchange
from cyb_jax.serving.metrics import Metrics
from cyb_jax.serving.protocol import parse_completion
from cyb_jax.serving.streams import Answer


def answer(served, send, *, write_seconds=5.0, receive=None, **body):
  """Runs the answer to a request with functions in place of the client."""

  async def forever():
    await asyncio.Event().wait()

  async def run():
    request = parse_completion({"prompt": "ab", **body}, served.model)
    exchange = Exchange(served.engine, request, served.model, Names(served.model.run.tokenizer), metrics)
    await Answer(exchange, write_seconds)({"type": "http"}, receive or forever, send)

  metrics = Metrics(served.engine)
  asyncio.run(asyncio.wait_for(run(), 30))


def test_a_client_that_reads_nothing_is_left(served):
  before, sent = served.engine.stats.cancelled, []

  async def send(message):
    sent.append(message)
    if len(sent) > 2:
      await asyncio.Event().wait()

  answer(served, send, write_seconds=0.1, max_tokens=40, n=20, stream=True)
  until(lambda: served.engine.num_running == served.engine.num_waiting == 0)
  assert served.engine.stats.cancelled > before
  assert sent[-1].get("more_body", True)  # the answer is not completed


def test_a_failure_after_the_first_token_ends_the_stream_with_an_error(served, monkeypatch):
  sent, chunks, advance = [], [], RunningBatch.advance

  async def send(message):
    sent.append(message)

  def advance_once(batch, iterations):
    chunks.append(iterations)
    return advance(batch, iterations) if len(chunks) == 1 else 1 / 0

  with monkeypatch.context() as patch:
    patch.setattr(RunningBatch, "advance", advance_once)
    answer(served, send, max_tokens=40, stream=True)
  events = b"".join(message.get("body", b"") for message in sent).decode().split("\n\n")
  assert json.loads(events[0].removeprefix("data: "))["choices"]
  error = json.loads(events[-2].removeprefix("data: "))["error"]
  assert error["type"] == "server_error"
  assert "[DONE]" not in events[-2]
  assert served.complete(prompt="ab", max_tokens=2)["choices"]


def test_a_failure_before_the_first_token_is_a_status(served, monkeypatch):
  sent = []

  async def send(message):
    sent.append(message)

  with monkeypatch.context() as patch:
    patch.setattr(RunningBatch, "join", lambda *_: 1 / 0)
    answer(served, send, max_tokens=4, stream=True)
  assert sent[0]["status"] == 503
  assert json.loads(sent[1]["body"])["error"]["type"] == "server_error"
