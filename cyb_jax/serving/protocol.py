"""Parsing requests of OpenAI's interface into rows of the engine.

Fields of ours are extensions: `top_k`, `mode`, `read`, `threshold`, `max_pauses`, `pause_budget`, `prompt_pauses` (see
`SamplingOptions`), and `add_special_tokens`, whether the start token precedes a prompt.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from cyb_jax.data import tokenizers
from cyb_jax.errors import InputError
from cyb_jax.generation import RowRequest, SamplingOptions
from cyb_jax.generation.continuous import MAX_ALTERNATIVES
from cyb_jax.runs import Run
from cyb_jax.serving.engine import Work
from cyb_jax.serving.errors import ApiError, of_input
from cyb_jax.serving.fields import Fields, check_characters, quoted, wrong

_MOST_STOPS = 16
_DEFAULT_NEW = 16  # OpenAI's default of completions
_OWN = ("top_k", "mode", "read", "threshold", "max_pauses", "pause_budget", "prompt_pauses")
_SHARED = ("model", "max_tokens", "n", "seed", "stop", "stream", "stream_options", "temperature", "top_p", "logprobs",
  "frequency_penalty", "presence_penalty", "logit_bias", *_OWN)  # fmt: skip
# Fields without an effect on the text, which are ignored.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
  "prompt_cache_retention")  # fmt: skip
_COMPLETION = (*_SHARED, *_IGNORED, "prompt", "echo", "best_of", "suffix", "add_special_tokens")
_CHAT = (*_SHARED, *_IGNORED, "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "functions",
  "function_call", "response_format", "modalities", "audio", "prediction", "reasoning_effort", "verbosity",
  "parallel_tool_calls", "web_search_options")  # fmt: skip
_ROLES = ("system", "developer", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Model:
  """The served model.

  Attributes:
    run: the run.
    name: its name in the interface.
    context: the maximum number of tokens of a prompt and its continuation.
    default_mode: the mode of requests that set none.
    max_rows: the maximum number of continuations of a request.
  """

  run: Run
  name: str
  context: int
  default_mode: str
  max_rows: int


@dataclasses.dataclass(frozen=True)
class Request:
  """A parsed request.

  Attributes:
    chat: whether it is a chat.
    work: one row for each choice: for each prompt, its `n` continuations.
    n: the number of continuations of a prompt.
    stops: strings that end a continuation.
    logprobs: the number of alternatives whose log-probabilities are wanted; None: no log-probabilities.
    echo: whether the answer begins with the prompt.
    echoes: the text of each row's prompt.
    hidden_tokens: the number of first tokens of each row's prompt that the server has added; the answer omits them.
    stream: whether the answer is a stream of events.
    include_usage: whether the stream ends with the numbers of tokens.
  """

  chat: bool
  work: list[Work]
  n: int
  stops: tuple[str, ...]
  logprobs: int | None
  echo: bool
  echoes: list[str]
  hidden_tokens: list[int]
  stream: bool
  include_usage: bool


def parse_completion(body: Any, model: Model) -> Request:
  """A request of /v1/completions.

  Raises:
    ApiError: the request is invalid.
  """
  fields = Fields(body, _COMPLETION)
  _check_shared(fields, model)
  fields.neutral("suffix", "")
  echo = fields.flag("echo")
  logprobs = fields.optional_integer("logprobs", 0, MAX_ALTERNATIVES)
  n = fields.integer("n", 1, 1, model.max_rows)
  fields.integer("best_of", n, n, n)
  prompts = _prompts(fields, model)
  if len(prompts) * n > model.max_rows:
    raise ApiError(
      f"n: {n} continuations of {len(prompts)} prompts are {len(prompts) * n} rows; a request has at most"
      f" {model.max_rows}",
      param="n",
    )
  most = fields.optional_integer("max_tokens", 0, 2**31 - 1)
  if most == 0 and not echo:
    raise ApiError(
      "max_tokens: 0 generates nothing; give at least 1, or set echo to score the prompt", param="max_tokens"
    )
  new = [_new_tokens("max_tokens", most, _DEFAULT_NEW, len(ids), model) for ids, _ in prompts]
  scores = echo and logprobs is not None
  work = _work(fields, model, [ids for ids, _ in prompts], new, n, model.run.boundaries.end_ids, logprobs, scores)
  given = fields.get("prompt")
  texts = [given] if isinstance(given, str) else given
  return Request(
    chat=False,
    work=work,
    n=n,
    stops=fields.texts("stop", _MOST_STOPS),
    logprobs=logprobs,
    echo=echo,
    echoes=[
      texts[row // n] if texts and isinstance(texts[row // n], str) else _decoded(model, *prompts[row // n])
      for row in range(len(work))
    ],
    hidden_tokens=[prompts[row // n][1] for row in range(len(work))],
    stream=fields.flag("stream"),
    include_usage=_include_usage(fields),
  )


def parse_chat(body: Any, model: Model) -> Request:
  """A request of /v1/chat/completions.

  Raises:
    ApiError: the request is invalid, or the tokenizer has no chat template.
  """
  if model.run.tokenizer.chat_template is None:
    raise ApiError(
      "the model's tokenizer has no chat template, so it has no chat completions; use /v1/completions", status=404
    )
  fields = Fields(body, _CHAT)
  _check_shared(fields, model)
  for name in ("tools", "functions"):
    fields.neutral(name, [])
  fields.neutral("tool_choice", "none", "auto")
  fields.neutral("function_call", "none", "auto")
  fields.neutral("response_format", {"type": "text"})
  fields.neutral("modalities", ["text"])
  for name in ("audio", "prediction", "web_search_options"):
    fields.neutral(name)
  ids = _chat_ids(fields, model)
  n = fields.integer("n", 1, 1, model.max_rows)
  name = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
  most = fields.optional_integer(name, 1, 2**31 - 1)
  new = _new_tokens(name, most, model.context, len(ids), model)
  top = fields.integer("top_logprobs", 0, 0, MAX_ALTERNATIVES)
  if top and not fields.flag("logprobs"):
    raise ApiError(f"top_logprobs: {top} needs logprobs; set logprobs to true", param="top_logprobs")
  ends = tuple(dict.fromkeys([*model.run.boundaries.end_ids, *tokenizers.turn_end_ids(model.run.tokenizer)]))
  logprobs = top if fields.flag("logprobs") else None
  return Request(
    chat=True,
    work=_work(fields, model, [ids], [new], n, ends, logprobs, False),
    n=n,
    stops=fields.texts("stop", _MOST_STOPS),
    logprobs=logprobs,
    echo=False,
    echoes=[""] * n,
    hidden_tokens=[0] * n,
    stream=fields.flag("stream"),
    include_usage=_include_usage(fields),
  )


def _check_shared(fields: Fields, model: Model) -> None:
  """Checks the fields that completions and chats share and that have no effect on the rows."""
  name = fields.text("model", model.name)
  if name != model.name:
    raise ApiError(
      f"model: {quoted(name)} does not exist; the server has {model.name!r}", status=404, param="model",
      code="model_not_found",
    )  # fmt: skip
  for penalty in ("frequency_penalty", "presence_penalty"):
    fields.neutral(penalty, 0)
  fields.neutral("logit_bias", {})
  if fields.get("stream_options") is not None and not fields.flag("stream"):
    raise ApiError("stream_options: it is set, but stream is not; leave it out", param="stream_options")


def _include_usage(fields: Fields) -> bool:
  options = fields.get("stream_options")
  if options is None:
    return False
  if not isinstance(options, dict):
    raise wrong("stream_options", options, "an object")
  return Fields(options, ("include_usage", "include_obfuscation")).flag("include_usage")


def _sampling(fields: Fields, model: Model) -> SamplingOptions:
  """The options of sampling; without a field `read`, a request with temperature 0 is read without draws."""
  temperature = fields.number("temperature", 1.0, 0.0, 2.0)
  mode = fields.text("mode", model.default_mode)
  greedy = "mixture" if mode == "constant" else "threshold"
  # A threshold that is set would have no effect on draws.
  read = "threshold" if fields.get("threshold") is not None else greedy if temperature == 0 else "sample"
  return SamplingOptions(
    mode=mode,
    read=fields.text("read", read),
    threshold=fields.number("threshold", 0.5, 0.0, 1.0),
    max_pauses=fields.optional_integer("max_pauses", 0, 2**31 - 1) if mode != "none" else None,
    pause_budget=fields.optional_integer("pause_budget", 0, 2**31 - 1),
    prompt_pauses=fields.optional_text("prompt_pauses"),
    temperature=temperature,
    top_k=fields.integer("top_k", 0, 0, 2**31 - 1),
    top_p=fields.number("top_p", 1.0, 0.0, 1.0),
  )


def _work(
  fields: Fields,
  model: Model,
  prompts: list[list[int]],
  new: list[int],
  n: int,
  end_ids: tuple[int, ...],
  logprobs: int | None,
  scores_prompt: bool,
) -> list[Work]:
  """The rows of a request: for each prompt, its `n` continuations with consecutive seeds."""
  options = _sampling(fields, model)
  seed = fields.optional_integer("seed", 0, 2**32 - 1)
  first = int.from_bytes(os.urandom(4)) if seed is None else seed
  rows = []
  for number in range(len(prompts) * n):
    row = RowRequest(
      prompt=tuple(prompts[number // n]),
      max_new_tokens=new[number // n],
      seed=(first + number) % 2**32,
      options=options,
      end_ids=end_ids,
      alternatives=logprobs or 0,
    )
    rows.append(Work(row, scores_prompt=scores_prompt))
  return rows


def _prompts(fields: Fields, model: Model) -> list[tuple[list[int], int]]:
  """(the ids of each prompt, the number of first ids that the server has added)."""
  given = "" if fields.get("prompt") is None else fields.get("prompt")
  accepted = "a string, a list of strings, a list of token ids, or a list of such lists"
  if isinstance(given, str) or (isinstance(given, list) and given and _is_ids(given)):
    prompts = [given]
  elif isinstance(given, list) and given:
    prompts = given
  else:
    raise wrong("prompt", given, accepted)
  if len(prompts) > model.max_rows:
    raise ApiError(
      f"prompt: a list of {len(prompts)} prompts; give at most {model.max_rows} in one request", param="prompt"
    )
  starts = fields.flag("add_special_tokens", True)
  return [_encoded(prompt, starts, model, accepted) for prompt in prompts]


def _is_ids(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def _encoded(prompt: Any, starts: bool, model: Model, accepted: str) -> tuple[list[int], int]:
  """The ids of a prompt, and the number of first ids that the server has added."""
  run = model.run
  if isinstance(prompt, str):
    check_characters("prompt", prompt)
    try:
      ids = tokenizers.encode_whole(run.tokenizer, prompt, "prompt", special=run.imported)
    except InputError as error:
      raise of_input(error) from None
  elif _is_ids(prompt) and prompt:
    ids = prompt
    wrong_ids = [token for token in ids if not 0 <= token < run.method.vocab_size]
    if wrong_ids:
      raise ApiError(
        f"prompt: it has the id {wrong_ids[0]}; ids must be in 0..{run.method.vocab_size - 1}", param="prompt"
      )
  else:
    raise wrong("prompt", prompt, accepted)
  whole = run.boundaries.begun(ids) if starts else list(ids)
  if not whole:
    raise ApiError("prompt: it has no tokens, and the model has no start token; give a text", param="prompt")
  return whole, len(whole) - len(ids)


def _decoded(model: Model, ids: list[int], hidden: int) -> str:
  return model.run.tokenizer.decode(ids[hidden:])


def _new_tokens(name: str, most: int | None, default: int, prompt: int, model: Model) -> int:
  """The largest number of new tokens after a prompt of `prompt` tokens.

  Args:
    name: the field that sets it.
    most: the field's value.
    default: the largest number if the field is absent.
    prompt: the number of tokens of the prompt.
    model: the model.

  Raises:
    ApiError: the context has no space for them.
  """
  free = model.context - prompt
  new = min(default, free) if most is None else most
  if free < new or free < (most is None):
    asked = f"; {name} asks for {new} more" if most is not None else ""
    raise ApiError(
      f"prompt: {prompt} tokens{asked}, but the model's context has {model.context} tokens; shorten the prompt"
      + (f" or give at most {free}" if free > 0 and most is not None else ""),
      param=name if most is not None and free > 0 else "prompt",
      code="context_length_exceeded",
    )
  return new


def _chat_ids(fields: Fields, model: Model) -> list[int]:
  messages = fields.get("messages")
  if not isinstance(messages, list) or not messages:
    raise wrong("messages", messages, "a list of at least one message")
  parsed = [_message(f"messages[{number}]", message) for number, message in enumerate(messages)]
  run = model.run
  try:
    # As in cyb-generate: without a clock for models that this project has trained.
    ids = tokenizers.encode_chat(run.tokenizer, parsed, clock=run.imported)
  except InputError as error:
    raise of_input(error) from None
  ids = ids if run.imported else run.boundaries.begun(ids)
  if not ids:
    raise ApiError("messages: they have no tokens; give a text", param="messages")
  return ids


def _message(name: str, message: Any) -> dict[str, str]:
  """A message with one text as its content."""
  if not isinstance(message, dict):
    raise wrong(name, message, "an object with role and content")
  role, content = message.get("role"), message.get("content")
  if role not in _ROLES:
    raise wrong(f"{name}.role", role, f"one of {', '.join(_ROLES)}")
  if isinstance(content, list):
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    content = "".join(texts) if len(texts) == len(content) else content
  if not isinstance(content, str):
    raise wrong(f"{name}.content", content, "a string, or a list of parts of type text")
  check_characters(f"{name}.content", content)
  return {"role": "system" if role == "developer" else role, "content": content}
