"""Chats as weighted text: the assistant's turns have weight 1, and everything else is context with weight 0."""

from __future__ import annotations

import hashlib

import numpy as np

from cyb_jax.data.tasks import Document
from cyb_jax.data.tokenizers import Tokenizer, render_chat
from cyb_jax.errors import InputError

# An upper bound of the number of characters in a special entry.
_LONGEST_ENTRY = 256


def template_digest(tokenizer: Tokenizer | None) -> str:
  """Hexadecimal sha256 of a tokenizer's chat template, which the tokenizer's own digest does not cover.

  Args:
    tokenizer: the tokenizer; None means one that is trained on the task's text, which has no chat template.

  Raises:
    InputError: the tokenizer has no chat template.
  """
  if tokenizer is None or tokenizer.chat_template is None:
    raise InputError(
      "data.options.messages_key: the tokenizer has no chat template; set data.tokenizer or init_from to the folder of"
      " an instruct model whose tokenizer_config.json has chat_template, or to its GGUF file"
    )
  return hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()


def rendered(tokenizer: Tokenizer, document: Document) -> Document:
  """Renders a chat with the tokenizer's chat template; the assistant's turns have weight 1.

  The text of an assistant's turn is the difference between two renderings: the chat up to and including this turn,
  and the chat before it with `add_generation_prompt`. It includes the special entry that ends the turn. White space
  after that entry has weight 0, because generation stops before it. Templates cannot read the clock, so the text does
  not depend on the date.

  Args:
    tokenizer: a tokenizer with a chat template.
    document: a document with `messages`.

  Raises:
    InputError: the template rejects the messages, or renders a turn differently when later turns follow, so the turn
      cannot be located; the message names the file and the row.
  """
  messages = document.messages or ()
  try:
    text = render_chat(tokenizer, messages, clock=False)
    weights = np.zeros(len(text.encode()), np.uint8)
    for number, message in enumerate(messages):
      if message["role"] == "assistant":
        if number == 0:
          raise InputError(
            "messages: the chat begins with a turn of the assistant, whose beginning cannot be located; put a turn of"
            " the user or the system before it"
          )
        before = render_chat(tokenizer, messages[:number], True, clock=False)
        after = render_chat(tokenizer, messages[: number + 1], clock=False)
        if not (text.startswith(after) and after.startswith(before)):
          raise InputError(
            f"messages: the chat template renders turn {number + 1} differently when later turns follow, so its tokens"
            " cannot be located; split the chat after each of the assistant's turns, or use another template"
          )
        end = _end_of_turn(tokenizer, after)
        weights[len(before.encode()) : len(after[:end].encode())] = 1
  except InputError as error:
    raise InputError(f"data.options.messages_key: {document.where}: {error}") from error
  return Document(text, weights=weights, messages=document.messages)


def _end_of_turn(tokenizer: Tokenizer, text: str) -> int:
  """The index at which the last turn of a text ends: before white space that follows a special entry."""
  stripped = text.rstrip()
  # Special entries decode to no text.
  last = tokenizer.encode_with_special(stripped[-_LONGEST_ENTRY:])[-1:]
  return len(stripped) if last and not tokenizer.decode(last) else len(text)
