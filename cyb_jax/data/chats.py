"""Chats as text with weights: the turns of the assistant are learnt, everything else is context."""

from __future__ import annotations

import hashlib

import numpy as np

from cyb_jax.data.tasks import Document
from cyb_jax.data.tokenizers import Tokenizer, render_chat
from cyb_jax.errors import InputError

# No special entry has more characters.
_LONGEST_ENTRY = 256


def template_digest(tokenizer: Tokenizer | None) -> str:
  """Hexadecimal sha256 of a tokenizer's chat template, which the tokenizer's own digest does not cover.

  Args:
    tokenizer: None: one that is trained on the task's text.

  Raises:
    InputError: it has no chat template.
  """
  if tokenizer is None or tokenizer.chat_template is None:
    raise InputError(
      "data.options.messages_key: the tokenizer has no chat template; give as data.tokenizer, or init_from, an instruct"
      " model's folder whose tokenizer_config.json has chat_template, or its GGUF file"
    )
  return hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()


def rendered(tokenizer: Tokenizer, document: Document) -> Document:
  """A chat as the text of the tokenizer's template, with weight 1 on what the assistant writes.

  An assistant's turn is what the template adds to the turns before it and the beginning of an answer
  (`add_generation_prompt`), with the special entry that ends the turn; white space after that entry has weight 0, since
  generation has stopped before it. Templates get no clock, so that the text is the same on every day.

  Args:
    tokenizer: with a chat template.
    document: with `messages`.

  Raises:
    InputError: the template refuses the messages, or writes earlier turns in another way once later ones follow, so
      that the turns cannot be found; the message names file and row.
  """
  messages = document.messages or ()
  try:
    text = render_chat(tokenizer, messages, clock=False)
    weights = np.zeros(len(text.encode()), np.uint8)
    for number, message in enumerate(messages):
      if message["role"] == "assistant":
        if number == 0:
          raise InputError(
            "messages: the chat begins with the assistant, so that where its turn begins cannot be found; put a turn of"
            " the user or the system before it"
          )
        before = render_chat(tokenizer, messages[:number], True, clock=False)
        after = render_chat(tokenizer, messages[: number + 1], clock=False)
        if not (text.startswith(after) and after.startswith(before)):
          raise InputError(
            f"messages: the chat template writes turn {number + 1} in another way once later turns follow, so that its"
            " tokens cannot be found; split the chat after each assistant's turn, or take another template"
          )
        end = _end_of_turn(tokenizer, after)
        weights[len(before.encode()) : len(after[:end].encode())] = 1
  except InputError as error:
    raise InputError(f"data.options.messages_key: {document.where}: {error}") from error
  return Document(text, weights=weights, messages=document.messages)


def _end_of_turn(tokenizer: Tokenizer, text: str) -> int:
  """Where a turn at the end of a text ends: before white space that follows a special entry."""
  stripped = text.rstrip()
  # Special entries decode to no text.
  last = tokenizer.encode_with_special(stripped[-_LONGEST_ENTRY:])[-1:]
  return len(stripped) if last and not tokenizer.decode(last) else len(text)
