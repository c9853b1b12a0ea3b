"""The server over HTTP: OpenAI's client, plain requests, streams, and clients that leave."""

import http.client
import json
import re
import socket
import threading

import jax
import numpy as np
import openai
import pytest
from served import CONTEXT, serving, until

from cyb_jax.data import ByteTokenizer
from cyb_jax.generation import Sampler, SamplingOptions, Scorer

START = ByteTokenizer.separator_id


@pytest.fixture
def client(served):
  with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
    yield client


def sampled(run, text, new, seed, **options):
  """The sampler's result for a text."""
  with jax.default_matmul_precision(run.config.precision.matmul):
    return Sampler(run.method, SamplingOptions(**options)).generate(
      run.params, [[START, *text.encode()]], max_new_tokens=new, seeds=[seed], end_id=START, context=CONTEXT
    )


def test_openai_client_completes(served, run, client):
  answer = client.completions.create(model="tiny", prompt="ab", max_tokens=5, seed=3, temperature=0.8)
  expected = sampled(run, "ab", 5, 3, temperature=0.8)
  (choice,) = answer.choices
  assert choice.token_ids == expected.tokens[0]
  assert choice.pauses == expected.pauses[0]
  assert choice.text == run.tokenizer.decode(expected.tokens[0])
  assert choice.finish_reason == "length"
  assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 5)
  assert served.complete(prompt=["ab", "ab"], n=2, max_tokens=1)["usage"]["prompt_tokens"] == 6
  assert (answer.usage.pauses, answer.usage.slots) == (sum(choice.pauses), 5 + sum(choice.pauses))
  for pauses, slots in zip(choice.pauses, choice.slots):
    assert {name: len(values) for name, values in slots.items()} == dict.fromkeys("dts", pauses + 1)
    assert slots["s"][0] == pytest.approx(1 - slots["d"][0], abs=1e-5)
  assert [model.id for model in client.models.list()] == ["tiny"]
  assert client.models.retrieve("tiny").max_pauses == 2


def test_openai_client_streams_the_same_text(client):
  options = {"model": "tiny", "prompt": "ab", "max_tokens": 9, "seed": 11, "n": 2}
  whole = client.completions.create(**options)
  texts, reasons, pauses = ["", ""], [None, None], [[], []]
  *parts, last = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
  for part in parts:
    (choice,) = part.choices
    texts[choice.index] += choice.text
    pauses[choice.index] += choice.pauses
    reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert len(choice.token_ids) == 1
  assert texts == [choice.text for choice in whole.choices]
  assert reasons == [choice.finish_reason for choice in whole.choices]
  assert pauses == [choice.pauses for choice in whole.choices]
  assert last.choices == []
  assert last.usage == whole.usage
  # The choices have consecutive seeds.
  again = client.completions.create(**options | {"seed": 12, "n": 1})
  assert again.choices[0].text == whole.choices[1].text


def test_openai_client_chats(served, run, client):
  messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
  options = {"model": "tiny", "messages": messages, "max_completion_tokens": 6, "seed": 2}
  answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
  expected = sampled(run, "user: hi\nassistant: ", 6, 2)
  assert answer.choices[0].message.content == run.tokenizer.decode(expected.tokens[0])
  content = answer.choices[0].logprobs.content
  assert [entry.logprob for entry in content] == pytest.approx(expected.log_probs[0], abs=1e-4)
  assert [len(entry.top_logprobs) for entry in content] == [2] * 6
  parts = list(client.chat.completions.create(**options, stream=True))
  assert parts[0].choices[0].delta.role == "assistant"
  assert "".join(part.choices[0].delta.content for part in parts) == answer.choices[0].message.content
  assert parts[-1].choices[0].finish_reason == "length"


def test_openai_client_gets_errors_of_its_own_types(client):
  with pytest.raises(openai.BadRequestError, match="temperature: 3 must be a number") as caught:
    client.completions.create(model="tiny", prompt="a", temperature=3)
  assert caught.value.param == "temperature"
  with pytest.raises(openai.NotFoundError, match="the server has 'tiny'") as caught:
    client.completions.create(model="gpt", prompt="a")
  assert caught.value.code == "model_not_found"
  with pytest.raises(openai.BadRequestError) as caught:
    client.completions.create(model="tiny", prompt="a" * 60)
  assert caught.value.code == "context_length_exceeded"


def test_extensions_change_how_text_is_generated(served, run):
  greedy = served.complete(prompt="ab", max_tokens=6, temperature=0, threshold=0.2)["choices"][0]
  expected = sampled(run, "ab", 6, 0, temperature=0, read="threshold", threshold=0.2)
  assert (greedy["token_ids"], greedy["pauses"]) == (expected.tokens[0], expected.pauses[0])
  assert len(set(greedy["pauses"])) > 1
  always = served.complete(prompt="ab", max_tokens=6, temperature=0, threshold=0)["choices"][0]
  assert always["pauses"] == [2] * 6
  limited = served.complete(prompt="ab", max_tokens=6, temperature=0, threshold=0, pause_budget=3)["choices"][0]
  assert limited["pauses"] == [2, 1, 0, 0, 0, 0]
  one = served.complete(prompt="ab", max_tokens=6, temperature=0, threshold=0, max_pauses=1)["choices"][0]
  assert one["pauses"] == [1] * 6
  none = served.complete(prompt="ab", max_tokens=6, temperature=0, mode="none")["choices"][0]
  assert none["pauses"] == [0] * 6


@pytest.mark.slow
def test_mode_constant(served, run):
  mixed = served.complete(prompt="ab", max_tokens=6, temperature=0, mode="constant")
  expected = sampled(run, "ab", 6, 0, temperature=0, mode="constant", read="mixture")
  (choice,) = mixed["choices"]
  assert mixed["usage"]["slots"] == 18
  assert (choice["token_ids"], choice["pauses"]) == (expected.tokens[0], [2] * 6)
  assert [sum(slots["s"]) for slots in choice["slots"]] == pytest.approx([1] * 6, abs=1e-4)


def test_echo_scores_the_prompt(served, run):
  body = {"prompt": ["abc", "xy"], "max_tokens": 2, "echo": True, "logprobs": 1, "temperature": 0}
  answer = served.complete(**body)
  scorer = Scorer(run.method, run.params, context=CONTEXT, start_id=START)
  with jax.default_matmul_precision(run.config.precision.matmul):
    scores = scorer.score([([START], b"abc"), ([START], b"xy")])
  for text, score, choice in zip(("abc", "xy"), scores, answer["choices"]):
    assert choice["text"].startswith(text)
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][: len(text)] == list(text)
    assert sum(logprobs["token_logprobs"][: len(text)]) == pytest.approx(score.log_likelihood, abs=1e-4)
    assert logprobs["text_offset"][: len(text)] == list(range(len(text)))
    assert {len(values) for values in logprobs.values()} == {len(text) + 2}
    for token, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"]):
      assert token <= max(top.values())
      assert 1 <= len(top) <= 2
  # The prompt alone, as text and as ids, with and without the start token.
  only = served.complete(**body | {"max_tokens": 0})["choices"][0]
  assert only["text"] == "abc"
  assert only["logprobs"]["token_logprobs"] == answer["choices"][0]["logprobs"]["token_logprobs"][:3]
  assert only["finish_reason"] == "length"
  ids = served.complete(**body | {"max_tokens": 0, "prompt": list(b"abc")})["choices"][0]
  assert ids == only
  bare = served.complete(**body | {"max_tokens": 0, "prompt": list(b"abc"), "add_special_tokens": False})
  assert bare["choices"][0]["logprobs"]["token_logprobs"][0] is None
  # Without log-probabilities nothing is computed.
  assert served.complete(prompt="abc", max_tokens=0, echo=True)["choices"][0]["text"] == "abc"
  streamed = served.stream(**body)
  assert (
    "".join(part["choices"][0]["text"] for part in streamed if part["choices"][0]["index"] == 1)
    == (answer["choices"][1]["text"])
  )
  offsets = [
    offset for part in streamed if not part["choices"][0]["index"]
    for offset in part["choices"][0]["logprobs"]["text_offset"]
  ]  # fmt: skip
  assert offsets == answer["choices"][0]["logprobs"]["text_offset"]


def test_stop_strings_end_a_choice_and_its_row(served):
  free = served.complete(prompt="ab", max_tokens=30, seed=5)["choices"][0]["text"]
  stop = next(
    free[i : i + 2] for i in range(4, 20) if free.index(free[i : i + 2]) == i and free[i : i + 2].isprintable()
  )
  options = {"prompt": "ab", "max_tokens": 30, "seed": 5, "stop": ["zzz", stop]}
  stopped = served.complete(**options)["choices"][0]
  assert stopped["text"] == free[: free.index(stop)]
  assert stopped["finish_reason"] == "stop"
  assert len(stopped["token_ids"]) < 30
  parts = [part["choices"][0] for part in served.stream(**options)]
  assert "".join(part["text"] for part in parts) == stopped["text"]
  assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]
  until(lambda: served.engine.num_running == 0)


def test_the_same_text_under_load(served):
  """Texts for a seed, alone and among other requests; no answer is lost or mixed."""
  bodies = [
    {"prompt": "abcdefghij"[: 1 + number % 7], "max_tokens": 4 + number % 9, "seed": number,
     "temperature": [0, 0.7, 1.0][number % 3], "mode": ["self_paced", "none"][number % 2], "top_k": number % 4}
    for number in range(16)
  ]  # fmt: skip
  alone = [served.complete(**body)["choices"][0] for body in bodies]
  together = [None] * len(bodies)

  def ask(number):
    parts = [part["choices"][0] for part in served.stream(**bodies[number])]
    names = ("token_ids", "pauses", "slots")
    together[number] = {name: [value for part in parts for value in part[name]] for name in names}
    together[number]["text"] = "".join(part["text"] for part in parts)

  threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(bodies))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  for one, other in zip(alone, together):
    assert {name: one[name] for name in other} == other


def test_a_client_that_leaves_frees_its_rows(served):
  before = served.engine.stats.cancelled
  for stream in (True, False):
    body = json.dumps({"prompt": "ab", "max_tokens": 40, "n": 20, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
      raw.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
      )
      if stream:
        assert b"200 OK" in raw.recv(1000)
      else:
        until(lambda: served.engine.num_running)
    until(lambda: served.engine.num_running == served.engine.num_waiting == 0)
    assert served.engine.stats.cancelled > before + 10
    before = served.engine.stats.cancelled
  assert served.complete(prompt="ab", max_tokens=2)["choices"]


def test_bad_requests_over_http(served):
  """Requests that never become JSON, and other routes; the server answers the next request."""
  post = ("POST", "/v1/completions")
  table = [
    (*post, b"{", {}, 400, "body: it is no valid JSON"),
    (*post, b"[" * 100_000, {}, 400, "nested too deeply"),
    (*post, b'{"seed": NaN}', {}, 400, "NaN is no JSON"),
    (*post, b"\xff\xfe", {}, 400, "body: it is no valid JSON"),
    (*post, b"", {}, 400, "body: it is no valid JSON"),
    (*post, b'{"max_tokens": %s}' % (b"9" * 5000), {}, 400, "body: it is no valid JSON"),
    (*post, b"[1]", {}, 400, "body: [1] must be a JSON object"),
    (*post, b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "send JSON with Content-Type"),
    (*post, b" " * (2**20 + 1), {}, 413, "more than 1048576 bytes"),
    ("GET", "/v1/completions", None, {}, 405, "'/v1/completions' does not accept GET"),
    ("POST", "/v1/embeddings", {}, {}, 404, "'/v1/embeddings' does not exist"),
    ("GET", "/v1/models/other", None, {}, 404, "'other' does not exist"),
    ("GET", "/page/../app.py", None, {}, 404, "does not exist"),
    ("GET", "/v1/models", None, {"Host": "evil.example"}, 421, "'evil.example', which is not this server"),
  ]
  for method, path, body, headers, wanted, message in table:
    status, _, data = served.request(method, path, body, headers)
    error = json.loads(data)["error"]
    assert (status, set(error)) == (wanted, {"message", "type", "param", "code"}), path
    assert message in error["message"]
    assert "Traceback" not in error["message"]
  status, answer = served.post("/v1/completions", {"prompt": "a", "max_pauses": 7})
  assert (status, answer["error"]["param"]) == (400, "max_pauses")
  assert "0..2" in answer["error"]["message"]
  assert served.complete(prompt="a", max_tokens=1)["choices"]


def test_a_body_in_pieces_without_a_length_is_limited(served):
  connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
  parts = (b" " * 2**16 for _ in range(40))
  connection.request("POST", "/v1/completions", parts, {"Content-Type": "application/json"}, encode_chunked=True)
  assert connection.getresponse().status == 413
  connection.close()


def test_health_metrics_and_page(served):
  served.complete(prompt="ab", max_tokens=3)
  assert json.loads(served.request("GET", "/health")[2]) == {"status": "ok"}
  status, headers, text = served.request("GET", "/metrics")
  assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
  values = dict(re.findall(r"^(\w+(?:\{.*\})?) ([\d.e+]+)$", text.decode(), re.MULTILINE))
  assert float(values["cyb_generated_tokens_total"]) == served.engine.stats.tokens > 0
  assert float(values['cyb_http_requests_total{route="/v1/completions",status="200"}']) > 0
  assert float(values["cyb_time_to_first_token_seconds_count"]) > 0
  for path, kind in (("/", "text/html"), ("/page/page.js", "text/javascript"), ("/page/style.css", "text/css")):
    status, headers, _ = served.request("GET", path)
    assert status == 200
    assert headers["content-type"] == f"{kind}; charset=utf-8"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_key_slow_bodies_and_a_full_queue(run):
  with serving(run, queue=4, api_key="secret", body_seconds=1.0) as served:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
      status, answer = served.post("/v1/completions", {"prompt": "a"}, headers)
      assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
      assert served.request("GET", "/metrics", headers=headers)[0] == 401
    assert served.request("GET", "/health")[0] == served.request("GET", "/")[0] == 200
    key = {"Authorization": "Bearer secret"}
    assert served.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, key)[0] == 200
    status, answer = served.post("/v1/completions", {"prompt": "a", "n": 5}, key)
    assert (status, answer["error"]["param"]) == (400, "n")
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
      raw.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer secret\r\nContent-Length: 99\r\n\r\n{"
      )
      assert b" 408 " in raw.recv(1000)
    answers = []
    bodies = [{"prompt": "a", "max_tokens": 40, "n": 4, "seed": number} for number in range(6)]
    ask = lambda body: answers.append(served.post("/v1/completions", body, key))  # noqa: E731
    threads = [threading.Thread(target=ask, args=(body,)) for body in bodies]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(60)
    statuses = sorted(status for status, _ in answers)
    assert statuses[0] == 200
    assert statuses[-1] == 429
    assert {answer["error"]["code"] for status, answer in answers if status == 429} == {"rate_limit_exceeded"}


def test_numbers_in_answers_are_finite(served):
  """A token that can't be drawn has probability zero; JSON has no infinity."""
  status, _, data = served.request("POST", "/v1/completions", {"prompt": "a", "max_tokens": 3, "logprobs": 5})
  assert status == 200
  json.loads(data, parse_constant=lambda name: pytest.fail(name))
  values = np.array(json.loads(data)["choices"][0]["logprobs"]["token_logprobs"])
  assert np.isfinite(values).all()
