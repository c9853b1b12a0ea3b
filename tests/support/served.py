"""A tiny untrained run, and a server of it on a free port of this process."""

import contextlib
import http.client
import json
import threading
import time

import jax
from models import initial_params, tiny_config

from cyb_jax import configs
from cyb_jax.data import ByteTokenizer
from cyb_jax.runs import Run

CONTEXT = 48
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


def untrained_run(**method):
  """A run whose model has fresh parameters, and d that is spread over (0, 1)."""
  paced = {"pauses": 2, "dont_know_prior": 0.5, "pause_visibility": "hidden"}
  source = tiny_config(**(method if "name" in method else paced | method))
  source.data.sequence_length = CONTEXT
  config = configs.freeze(source)
  model = config.build_method(ByteTokenizer.vocab_size)
  params = initial_params(model)
  if "dont_know" in params:
    params["dont_know"] = 2 * jax.random.normal(jax.random.key(5), params["dont_know"].shape)
  tokenizer = ByteTokenizer()
  tokenizer.chat_template = TEMPLATE
  return Run(config, model, params, tokenizer, 7, {})


class Served:
  """A server in a thread.

  Attributes:
    engine, model, server, port, url: of the server.
  """

  def __init__(self, run, *, rows=3, queue=24, chunk=3, name="tiny", **limits):
    from cyb_jax.serving.app import Limits, build_app
    from cyb_jax.serving.engine import Engine
    from cyb_jax.serving.protocol import Model
    from cyb_jax.serving.server import Server, bind, host_names

    bound = bind("127.0.0.1", 0)
    self.port = bound.getsockname()[1]
    self.url = f"http://127.0.0.1:{self.port}"
    self.engine = Engine(run, rows=rows, queue=queue, chunk=chunk)
    self.model = Model(run, name, self.engine.context, self.engine.default_mode, max_rows=queue)
    app = build_app(self.engine, self.model, Limits(hosts=host_names(bound), **limits))
    self.engine.start()
    self.server = Server(app, bound, drain_seconds=5, connections=100)
    self.thread = threading.Thread(target=self.server.run, daemon=True)
    self.thread.start()
    until(lambda: self.server.started)

  def request(self, method, path, body=None, headers=None):
    """(status, headers, bytes of the body) of one request; a body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
    sent = {"Content-Type": "application/json"} if body is not None else {}
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    with contextlib.closing(connection):
      connection.request(method, path, data, sent | (headers or {}))
      answer = connection.getresponse()
      return answer.status, dict(answer.getheaders()), answer.read()

  def post(self, path, body, headers=None):
    """(status, JSON) of a request."""
    status, _, data = self.request("POST", path, body, headers)
    return status, json.loads(data)

  def complete(self, **body):
    """The JSON of a completion that must succeed."""
    status, answer = self.post("/v1/completions", body)
    assert status == 200, answer
    return answer

  def stream(self, path="/v1/completions", **body):
    """The JSON objects of a streamed answer."""
    status, _, data = self.request("POST", path, body | {"stream": True})
    assert status == 200, data
    return events(data)

  def close(self):
    self.server.stop()
    self.thread.join(60)
    assert not self.thread.is_alive()
    assert self.engine.close(drain=False, timeout=60)


def events(data):
  """The JSON objects of server-sent events, which end with [DONE]."""
  lines = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line]
  assert lines[-1] == "[DONE]"
  return [json.loads(line) for line in lines[:-1]]


@contextlib.contextmanager
def serving(run, **options):
  served = Served(run, **options)
  try:
    yield served
  finally:
    served.close()


def until(condition, seconds=60):
  """Waits for a condition."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "still waiting"
    time.sleep(0.005)
