"""Parsing requests: defaults, and an error in OpenAI's form for each kind of bad input."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import CONTEXT

from cyb_jax.data import ByteTokenizer
from cyb_jax.generation import SamplingOptions
from cyb_jax.serving.errors import ApiError
from cyb_jax.serving.fields import quoted
from cyb_jax.serving.protocol import _CHAT, _COMPLETION, Model, parse_chat, parse_completion

START = ByteTokenizer.separator_id
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(run):
  return Model(run, "tiny", CONTEXT, "self_paced", max_rows=8)


def test_defaults(model):
  request = parse_completion({"prompt": "ab"}, model)
  (work,) = request.work
  assert work.row.prompt == (START, 97, 98)
  assert work.row.options == SamplingOptions()
  assert (work.row.max_new_tokens, work.row.end_ids, work.scores_prompt) == (16, (START,), False)
  assert (request.stream, request.echo, request.logprobs, request.stops) == (False, False, None, ())
  # Null is the same as an absent field, and fields without effect are ignored.
  nulls = dict.fromkeys(("stop", "seed", "n", "logit_bias", "best_of", "suffix", "logprobs", "mode", "stream"))
  same = parse_completion({"prompt": "ab", "user": "me", "frequency_penalty": 0.0, "logit_bias": {}} | nulls, model)
  assert dataclasses.replace(same.work[0].row, seed=0) == dataclasses.replace(work.row, seed=0)
  # Requests without a seed differ.
  assert same.work[0].row.seed != work.row.seed
  chat = parse_chat({"messages": HI}, model)
  assert chat.work[0].row.max_new_tokens == CONTEXT - len(chat.work[0].row.prompt)


def test_reading_follows_the_temperature(model):
  def read(**body):
    return parse_completion({"prompt": "ab", **body}, model).work[0].row.options.read

  assert read() == "sample"
  assert read(temperature=0) == "threshold"
  assert read(threshold=0.3) == "threshold"
  assert read(temperature=0, mode="constant") == "mixture"
  assert read(temperature=0, read="sample") == "sample"


def test_prompts_and_choices_are_rows(model):
  request = parse_completion({"prompt": ["a", [98, 99]], "n": 2, "seed": 2**32 - 1, "max_tokens": 3}, model)
  assert [work.row.prompt for work in request.work] == [(START, 97)] * 2 + [(START, 98, 99)] * 2
  assert [work.row.seed for work in request.work] == [2**32 - 1, 0, 1, 2]
  assert request.echoes == ["a", "a", "bc", "bc"]
  started = parse_completion({"prompt": [START, 98]}, model)
  assert (started.work[0].row.prompt, started.hidden_tokens) == ((START, 98), [0])
  assert parse_completion({}, model).work[0].row.prompt == (START,)


def test_chats_are_rendered(model):
  messages = [
    {"role": "developer", "content": "x"},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
  ]
  prompt = parse_chat({"messages": messages, "max_tokens": 2}, model).work[0].row.prompt
  assert bytes(prompt[1:]) == b"system: x\nuser: ab\nassistant: "


COMPLETIONS = [
  ([], "body: [] must be a JSON object", None),
  ({"a\ud800\n": 1}, r"'a\ud800\n': unknown field", r"'a\ud800\n'"),
  ({"promt": "a"}, "promt: unknown field; did you mean 'prompt'?", "promt"),
  ({"prompt": 7}, "prompt: 7 must be a string, a list of strings", "prompt"),
  ({"prompt": []}, "prompt: [] must be", "prompt"),
  ({"prompt": ["a", 1]}, "prompt: 1 must be", "prompt"),
  ({"prompt": [True]}, "prompt: True must be", "prompt"),
  ({"prompt": [97, 999]}, "prompt: it has the id 999; ids must be in 0..", "prompt"),
  ({"prompt": [-1]}, "prompt: it has the id -1", "prompt"),
  ({"prompt": "a\ud800"}, "is not a character", "prompt"),
  ({"prompt": "", "add_special_tokens": False}, "prompt: it has no tokens", "prompt"),
  ({"prompt": "a" * CONTEXT}, "prompt: 49 tokens, but the model's context has 48 tokens", "prompt"),
  ({"prompt": "a", "max_tokens": 99}, "asks for 99 more", "max_tokens"),
  ({"prompt": ["a"] * 9}, "prompt: a list of 9 prompts; give at most 8", "prompt"),
  ({"prompt": ["a"] * 3, "n": 3}, "n: 3 continuations of 3 prompts are 9 rows", "n"),
  ({"n": 0}, "n: 0 must be a whole number in 1..8", "n"),
  ({"n": 2, "best_of": 3}, "best_of: 3 must be", "best_of"),
  ({"max_tokens": 0}, "max_tokens: 0 generates nothing", "max_tokens"),
  ({"max_tokens": "9"}, "max_tokens: '9' must be a whole number", "max_tokens"),
  ({"max_tokens": 1.5}, "max_tokens: 1.5 must be a whole number", "max_tokens"),
  ({"max_tokens": True}, "max_tokens: True must be a whole number", "max_tokens"),
  ({"temperature": -1}, "temperature: -1 must be a number in 0..2", "temperature"),
  ({"temperature": "1"}, "temperature: '1' must be a number", "temperature"),
  ({"top_p": 2}, "top_p: 2 must be a number in 0..1", "top_p"),
  ({"threshold": 1.1}, "threshold: 1.1 must be a number in 0..1", "threshold"),
  ({"seed": -1}, "seed: -1 must be a whole number in 0..4294967295", "seed"),
  ({"stop": ""}, "stop: '' must be a nonempty string", "stop"),
  ({"stop": ["a", 1]}, "stop: ['a', 1] must be", "stop"),
  ({"stop": ["a"] * 17}, "stop: ", "stop"),
  ({"stop": "\udc00"}, "is not a character", "stop"),
  ({"stream": "yes"}, "stream: 'yes' must be true or false", "stream"),
  ({"stream_options": {"include_usage": True}}, "stream_options: it is set, but stream is not", "stream_options"),
  ({"stream": True, "stream_options": 1}, "stream_options: 1 must be an object", "stream_options"),
  ({"logprobs": 21}, "logprobs: 21 must be a whole number in 0..20", "logprobs"),
  ({"logprobs": True}, "logprobs: True must be", "logprobs"),
  ({"echo": 1}, "echo: 1 must be true or false", "echo"),
  ({"suffix": "x"}, "suffix: 'x' is unsupported; leave it out", "suffix"),
  ({"presence_penalty": 0.5}, "presence_penalty: 0.5 is unsupported", "presence_penalty"),
  ({"logit_bias": {"5": 1}}, "logit_bias: ", "logit_bias"),
  ({"model": 5}, "model: 5 must be a string", "model"),
  ({"mode": 1}, "mode: 1 must be a string", "mode"),
  ({"pause_budget": -1}, "pause_budget: -1 must be", "pause_budget"),
]


@pytest.mark.parametrize(("body", "message", "param"), COMPLETIONS, ids=lambda value: quoted(value)[:30])
def test_bad_completions(model, body, message, param):
  with pytest.raises(ApiError) as caught:
    parse_completion(body, model)
  described = caught.value.body["error"]
  assert message in described["message"]
  assert (caught.value.status, described["param"], described["type"]) == (400, param, "invalid_request_error")
  assert len(described["message"]) < 300


CHATS = [
  ({}, "messages: None must be a list of at least one message"),
  ({"messages": []}, "messages: [] must be"),
  ({"messages": ["hi"]}, "messages[0]: 'hi' must be an object"),
  ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role: 'robot' must be one of system"),
  ({"messages": [*HI, {"role": "user"}]}, "messages[1].content: None must be a string"),
  ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content: "),
  ({"messages": [{"role": "user", "content": "\ud800"}]}, "is not a character"),
  ({"messages": HI, "prompt": "a"}, "prompt: unknown field"),
  ({"messages": HI, "tools": [{"type": "function"}]}, "tools: "),
  ({"messages": HI, "response_format": {"type": "json_object"}}, "response_format: "),
  ({"messages": HI, "top_logprobs": 2}, "top_logprobs: 2 needs logprobs"),
  ({"messages": HI, "logprobs": 2}, "logprobs: 2 must be true or false"),
  ({"messages": HI, "max_tokens": 0}, "max_tokens: 0 must be"),
  ({"messages": [{"role": "user", "content": "a" * 60}]}, "but the model's context has 48 tokens"),
]


@pytest.mark.parametrize(("body", "message"), CHATS, ids=lambda value: quoted(value)[:30])
def test_bad_chats(model, body, message):
  with pytest.raises(ApiError) as caught:
    parse_chat(body, model)
  assert message in str(caught.value)
  assert caught.value.status == 400


def test_a_model_without_a_template_has_no_chats(model):
  bare = dataclasses.replace(model, run=dataclasses.replace(model.run, tokenizer=ByteTokenizer()))
  with pytest.raises(ApiError, match="no chat template") as caught:
    parse_chat({"messages": HI}, bare)
  assert caught.value.status == 404


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
  max_leaves=5,
)


def parsed(parse, body, model):
  """The request, or its refusal."""
  try:
    return parse(body, model)
  except ApiError as error:
    return error


@settings(max_examples=25)
@given(data=st.data())
def test_any_json_is_parsed_or_refused(model, data):
  """A wrong value is the fault of the request, never a crash."""
  for known, required, parse in (
    (_COMPLETION, {"prompt": "a"}, parse_completion),
    (_CHAT, {"messages": HI}, parse_chat),
  ):
    body = data.draw(st.dictionaries(st.sampled_from(known), JSON, max_size=3) | JSON)
    result = parsed(parse, required | body if isinstance(body, dict) else body, model)
    if isinstance(result, ApiError):
      assert 400 <= result.status < 500
      assert json.dumps(result.body, ensure_ascii=False).encode()
      assert "\n" not in str(result)
