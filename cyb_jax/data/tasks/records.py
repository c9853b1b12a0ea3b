"""Converts rows to documents; a row is a JSON object, a row of a Parquet file, or a row of a dataset.

A row contains a text (`text_key`), a prompt and its answer (`prompt_key`, `answer_key`: the loss is on the answer
alone), or a chat (`messages_key`: the loss is on the assistant's turns alone). A chat is a list of
{"role": ..., "content": ...}; the tokenizer's chat template renders it when it is tokenized.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from cyb_jax.data.tasks.interface import Document
from cyb_jax.errors import InputError, did_you_mean, shown

# The options of every task that reads rows.
DEFAULTS = {"text_key": "", "prompt_key": "", "answer_key": "", "messages_key": "", "separator": ""}


@dataclasses.dataclass(frozen=True)
class RecordForm:
  r"""The keys of a row that contain its document.

  Attributes:
    text_key: key of the text; 'text' if no key is given.
    prompt_key, answer_key: keys of the prompt and the answer; only the answer has weight 1.
    messages_key: key of a chat; only the assistant's turns have weight 1.
    separator: the text between prompt and answer; `\n` and `\t` are a line break and a tab.

  Raises:
    InputError: keys of different forms are given, or prompt_key without answer_key, or a separator without a prompt.
  """

  text_key: str = ""
  prompt_key: str = ""
  answer_key: str = ""
  messages_key: str = ""
  separator: str = ""

  def __post_init__(self):
    if bool(self.prompt_key) != bool(self.answer_key):
      name, other = ("prompt_key", "answer_key") if self.prompt_key else ("answer_key", "prompt_key")
      raise InputError(f"data.options.{name}={getattr(self, name)!r}: give {other} too")
    given = [name for name in ("text_key", "prompt_key", "messages_key") if getattr(self, name)]
    if len(given) > 1:
      raise InputError(
        f"data.options.{given[1]}={getattr(self, given[1])!r}: {given[0]} is also given; give only text_key, or only"
        " prompt_key and answer_key, or only messages_key"
      )
    if self.prompt_key and self.prompt_key == self.answer_key:
      raise InputError(f"data.options.answer_key={self.answer_key!r}: prompt_key is the same; give two different keys")
    if self.separator and not self.prompt_key:
      raise InputError(f"data.options.separator={self.separator!r}: give prompt_key and answer_key too")
    if not given:
      object.__setattr__(self, "text_key", "text")
    escapes = {"\\n": "\n", "\\t": "\t"}
    separator = self.separator
    for escape, character in escapes.items():
      separator = separator.replace(escape, character)
    object.__setattr__(self, "separator", separator)

  @classmethod
  def of(cls, options: Mapping[str, Any]) -> RecordForm:
    """The form that a task's options describe."""
    return cls(**{name: options[name] for name in DEFAULTS})

  @property
  def annotations(self) -> tuple[str, ...]:
    """See `Task.annotations`."""
    return ("messages",) if self.messages_key else ("weights",) if self.prompt_key else ()

  @property
  def keys(self) -> list[str]:
    """The keys that are read, in order."""
    return [key for key in (self.text_key, self.prompt_key, self.answer_key, self.messages_key) if key]

  def document(self, row: Any, where: object) -> Document:
    """The document of a row.

    Args:
      row: a mapping of keys to values.
      where: its `str` names file and row, for errors.

    Raises:
      InputError: a key is missing, a value has the wrong type, an answer is empty, or a chat has no assistant's turn.
    """
    if self.messages_key:
      return self._chat(self._value("messages_key", row, where), where)
    if self.text_key:
      return Document(self._text("text_key", row, where))
    prompt, answer = self._text("prompt_key", row, where), self._text("answer_key", row, where)
    if not answer:
      raise InputError(
        f"data.options.answer_key={self.answer_key!r}: {where}: the answer is empty, so the row has no targets; remove"
        " the row"
      )
    return answer_document(prompt + self.separator, answer)

  def _value(self, option: str, row: Any, where: object) -> Any:
    key = getattr(self, option)
    if not isinstance(row, Mapping):
      raise InputError(f"data.options.{option}={key!r}: {where} is {shown(row)}, but must be an object with keys")
    if key not in row:
      raise InputError(
        f"data.options.{option}={key!r}: {where} has no such key; {did_you_mean(key, sorted(map(str, row)))}"
      )
    return row[key]

  def _text(self, option: str, row: Any, where: object) -> str:
    value = self._value(option, row, where)
    fault = text_fault(value)
    if fault:
      raise InputError(f"data.options.{option}={getattr(self, option)!r}: {where}: {fault}")
    return value

  def _chat(self, messages: Any, where: object) -> Document:
    fault = _chat_fault(messages)
    if fault:
      raise InputError(f"data.options.messages_key={self.messages_key!r}: {where}: {fault}")
    # In tables, keys that a message lacks have the value None.
    given = ({key: value for key, value in message.items() if value is not None} for message in messages)
    chat = [{"content": ""} | message for message in given]
    return Document(json.dumps(chat, ensure_ascii=False, sort_keys=True), messages=tuple(chat), where=where)


def _chat_fault(messages: Any) -> str | None:
  """Why a value is not a chat, with a remedy; None if it is one."""
  needed = '{"role": ..., "content": ...}'
  if not isinstance(messages, list) or not messages:
    return f"{shown(messages)} is not a nonempty list of {needed}"
  for number, message in enumerate(messages, 1):
    if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
      return f"message {number} is {shown(message)}; give {needed}"
    fault = text_fault(message.get("content"))
    # A message that calls tools may have no content.
    if fault and not (message.get("content") is None and message.get("tool_calls")):
      return f"the content of message {number}: {fault}"
  if all(message["role"] != "assistant" for message in messages):
    return (
      "the chat has no turn of the role 'assistant', so it has no targets; remove the row, or rename the role to"
      " 'assistant'"
    )
  return None


def text_fault(value: Any) -> str | None:
  """Why a value is not a string, with a remedy; None if it is one."""
  if isinstance(value, str):
    return None
  return f"{shown(value)} is not a string; give a key whose value is a string in every row"


def answer_document(prompt: str, answer: str) -> Document:
  """The document of a prompt and its answer; only the answer has weight 1.

  White space at the end of the prompt belongs to the answer, as in lm-evaluation-harness.
  """
  context, text = prompt.rstrip().encode(), (prompt + answer).encode()
  weights = np.zeros(len(text), np.uint8)
  weights[len(context) :] = 1
  return Document(text.decode(), weights=weights)
