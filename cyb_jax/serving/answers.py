"""Answers in OpenAI's form, from the events of the engine.

In addition to OpenAI's fields, a choice has one entry for each generated token in `token_ids`, `pauses` (the number of
pauses before the token was read) and `slots` (for each slot that ran: d, the probability of abstaining; t, the
probability of the token, given that the slot answers; s, the probability that the answer is read at this slot if a
pause is requested with probability d; null if the method has no such value).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from cyb_jax.data import Tokenizer
from cyb_jax.generation import Continuation, NewTokens
from cyb_jax.generation.prompt_scores import TextScores
from cyb_jax.serving.protocol import Model, Request

# New tokens are decoded together with this many prompt tokens, because the text of the first new token depends on them.
_PROMPT_END = 16
# JSON has no infinity; a token cannot be less likely than this in f32.
_LOWEST = -9999.0
_DIGITS = 6


@dataclasses.dataclass(frozen=True)
class Token:
  """A generated token, or a token of the prompt that is echoed.

  Attributes:
    token: its id.
    text: the text that the token completes.
    name: the text of the token alone; tokens that are a part of a character or special have a printable name.
    log_prob: its log-probability; None: unknown.
    alternatives: (name, id, log-probability) of the most likely tokens in its place.
    pauses: the number of pauses; None for a token of the prompt.
    slots: `d`, `t` and `s` of each slot that ran.
  """

  token: int
  text: str
  name: str
  log_prob: float | None
  alternatives: list[tuple[str, int, float]]
  pauses: int | None = None
  slots: dict[str, list[float | None]] | None = None


class Names:
  """The texts of single tokens.

  Args:
    tokenizer: the model's tokenizer.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    # Some tokenizers drop the first space of a text, so a token is decoded after another one.
    self._before = tokenizer.encode("a")[:8]
    self._length = len(tokenizer.decode(self._before))
    self.of = functools.lru_cache(maxsize=2**16)(self._of)

  def _of(self, token: int) -> str:
    text = self._tokenizer.decode([*self._before, token])[self._length :]
    return text if text and "\N{REPLACEMENT CHARACTER}" not in text else self._tokenizer.piece(token)


class Choice:
  """One continuation, which grows by the events of the engine.

  Args:
    request: the request.
    row: the index of the choice.
    model: the model.
    names: the names of its tokens.

  Attributes:
    finish_reason: None while it grows; 'stop' after an end token or a stop string; 'length' after the last token.
    tokens: the tokens of the answer so far, with the prompt if it is echoed.
    num_tokens, num_pauses, num_slots: sums over the generated tokens.
  """

  def __init__(self, request: Request, row: int, model: Model, names: Names):
    self._request, self._row, self._model, self._names = request, row, model, names
    self._work = request.work[row].row
    self._continuation = Continuation(model.run.tokenizer, self._work.prompt[-_PROMPT_END:], request.stops)
    self._ids: list[int] = []
    self.tokens: list[Token] = []
    self.finish_reason: str | None = None if self._work.max_new_tokens else "length"
    self.num_tokens = self.num_pauses = self.num_slots = 0

  def add_prompt(self, scores: TextScores | None) -> list[Token]:
    """The tokens of the prompt, if it is echoed; `scores` are its log-probabilities, if they are wanted."""
    hidden = self._request.hidden_tokens[self._row]
    ids = self._work.prompt[hidden:]
    # The first token of a text has no log-probability, unless a start token precedes it.
    log_probs = [None, *scores.log_probs][hidden:] if scores else [None] * len(ids)
    alternatives = [[], *scores.alternatives][hidden:] if scores else [[]] * len(ids)
    echoed = self._request.echoes[self._row]
    # The text belongs to the first token; the others' offsets are the sums of their names.
    self.tokens += [
      Token(token, "" if number else echoed, self._names.of(token), log_prob, self._alternatives(others))
      for number, (token, log_prob, others) in enumerate(zip(ids, log_probs, alternatives))
    ]
    return self.tokens[-len(ids) :] if ids else []

  def add(self, new: NewTokens) -> list[Token]:
    """The tokens of an event that belong to the answer."""
    kept = None
    if self._request.stops and new.tokens:
      kept = self._continuation.kept([*self._ids, *new.tokens])
    count = len(new.tokens) if kept is None else kept - len(self._ids)
    self._ids += new.tokens[:count]
    if kept is not None or (new.finished and self._ids and self._ids[-1] in self._work.end_ids):
      self.finish_reason = "stop"
    elif new.finished:
      self.finish_reason = "length"
    texts = [text for _, text in self._continuation.pieces(new.tokens[:count], new.pauses[:count])]
    if texts and self.finish_reason is not None:
      texts[-1] += self._continuation.rest()
    added = []
    for number, text in enumerate(texts):
      token, pauses, slots = new.tokens[number], new.pauses[number], new.log_dont_know[number]
      added.append(
        Token(
          token,
          text,
          self._names.of(token),
          new.log_probs[number],
          self._alternatives(new.alternatives[number] if new.alternatives else []),
          pauses,
          slot_scores(slots, new.log_targets[number], self._model.run.method.num_slots),
        )
      )
      self.num_tokens += 1
      self.num_pauses += pauses
      self.num_slots += len(slots)
    self.tokens += added
    return added

  def _alternatives(self, given: Iterable[tuple[int, float]]) -> list[tuple[str, int, float]]:
    return [(self._names.of(token), token, log_prob) for token, log_prob in given]


def slot_scores(
  log_dont_know: Sequence[float], log_targets: Sequence[float], num_slots: int
) -> dict[str, list[float | None]]:
  """`d`, `t` and `s` of the slots that ran; W = `num_slots` slots are the most that a token has.

  Example:
    >>> slot_scores([math.log(0.5), math.log(0.25)], [math.log(0.125), math.log(1.0)], 3)
    {'d': [0.5, 0.25], 't': [0.125, 1.0], 's': [0.5, 0.375]}
  """
  d, t = ([None if math.isnan(x) else math.exp(x) for x in each] for each in (log_dont_know, log_targets))
  s: list[float | None] = []
  reached: float | None = 1.0
  for slot, each in enumerate(d):
    stops = 1.0 if slot == num_slots - 1 else None if each is None else 1 - each
    s.append(None if reached is None or stops is None else reached * stops)
    reached = None if reached is None or each is None else reached * each
  return {"d": _rounded(d), "t": _rounded(t), "s": _rounded(s)}


def _rounded(values: Iterable[float | None]) -> list[float | None]:
  return [None if x is None else round(x, _DIGITS) for x in values]


class Envelope:
  """The fields of an answer that do not depend on its choices.

  Args:
    request: the request.
    model: the model.
    names: the names of its tokens.
  """

  def __init__(self, request: Request, model: Model, names: Names):
    self.request = request
    self.choices = [Choice(request, row, model, names) for row in range(len(request.work))]
    prefix = "chatcmpl" if request.chat else "cmpl"
    self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}

  def whole(self) -> dict[str, Any]:
    """The answer to a request that is not streamed."""
    kind = "chat.completion" if self.request.chat else "text_completion"
    choices = []
    for index, choice in enumerate(self.choices):
      described = self._described(choice, choice.tokens, 0)
      if self.request.chat:
        described["message"] = {"role": "assistant", "content": described.pop("text"), "refusal": None}
      choices.append({"index": index, **described, "finish_reason": choice.finish_reason})
    return {**self._head, "object": kind, "choices": choices, "usage": self.usage()}

  def part(self, index: int, tokens: Sequence[Token], offset: int, *, ends: bool) -> dict[str, Any]:
    """An event of a stream: new tokens of a choice.

    Args:
      index: the choice.
      tokens: the new tokens.
      offset: the number of characters of the choice before them.
      ends: whether they are the last tokens.
    """
    choice = self.choices[index]
    described = self._described(choice, tokens, offset)
    if self.request.chat:
      described["delta"] = {"content": described.pop("text")}
    described = {"index": index, **described, "finish_reason": choice.finish_reason if ends else None}
    return {**self._head, "object": self._part_kind, "choices": [described], **self._no_usage()}

  def first_part(self, index: int) -> dict[str, Any]:
    """The first event of a choice of a chat, which has the role."""
    described = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    return {**self._head, "object": self._part_kind, "choices": [described], **self._no_usage()}

  def last_part(self) -> dict[str, Any]:
    """The last event of a stream with `include_usage`."""
    return {**self._head, "object": self._part_kind, "choices": [], "usage": self.usage()}

  def usage(self) -> dict[str, Any]:
    """The numbers of tokens; those of a prompt count once, however many continuations it has."""
    new = sum(choice.num_tokens for choice in self.choices)
    before = sum(len(work.row.prompt) for work in self.request.work[:: self.request.n])
    return {
      "prompt_tokens": before,
      "completion_tokens": new,
      "total_tokens": before + new,
      "pauses": sum(choice.num_pauses for choice in self.choices),
      "slots": sum(choice.num_slots for choice in self.choices),
    }

  @property
  def _part_kind(self) -> str:
    return "chat.completion.chunk" if self.request.chat else "text_completion"

  def _no_usage(self) -> dict[str, Any]:
    return {"usage": None} if self.request.include_usage else {}

  def _described(self, choice: Choice, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    generated = [token for token in tokens if token.pauses is not None]
    wanted = self.request.logprobs
    logprobs = None if wanted is None else _chat_logprobs(tokens) if self.request.chat else _logprobs(tokens, offset)
    return {
      "text": "".join(token.text for token in tokens),
      "logprobs": logprobs,
      "token_ids": [token.token for token in generated],
      "pauses": [token.pauses for token in generated],
      "slots": [token.slots for token in generated],
    }


def _logprobs(tokens: Sequence[Token], offset: int) -> dict[str, Any]:
  """`logprobs` of completions: OpenAI's alternatives include the token itself."""
  offsets, tops = [], []
  place = offset
  for token in tokens:
    offsets.append(place)
    place += len(token.text) if token.pauses is not None else len(token.name)
    # Different tokens may have the same text; the most likely one is kept.
    top: dict[str, float] = {}
    for name, _, log_prob in token.alternatives:
      top.setdefault(name, _finite(log_prob))
    if token.log_prob is not None:
      top.setdefault(token.name, _finite(token.log_prob))
    tops.append(top if token.log_prob is not None else None)
  return {
    "tokens": [token.name for token in tokens],
    "token_logprobs": [None if token.log_prob is None else _finite(token.log_prob) for token in tokens],
    "top_logprobs": tops,
    "text_offset": offsets,
  }


def _chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
  """`logprobs` of chats."""

  def entry(name: str, log_prob: float) -> dict[str, Any]:
    return {"token": name, "logprob": _finite(log_prob), "bytes": list(name.encode())}

  content = [
    {
      **entry(token.name, token.log_prob if token.log_prob is not None else _LOWEST),
      "top_logprobs": [entry(name, log_prob) for name, _, log_prob in token.alternatives],
    }
    for token in tokens
  ]
  return {"content": content, "refusal": None}


def _finite(log_prob: float) -> float:
  return log_prob if math.isfinite(log_prob) else _LOWEST
