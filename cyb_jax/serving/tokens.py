"""The model's tokenizer as routes, with which lm-evaluation-harness counts the tokens of a context."""

from __future__ import annotations

from typing import Any

from cyb_jax.data import tokenizers
from cyb_jax.errors import InputError
from cyb_jax.serving.errors import of_input
from cyb_jax.serving.fields import Fields, check_characters, wrong
from cyb_jax.serving.protocol import Model


def tokenize(body: Any, model: Model) -> dict[str, Any]:
  """The ids of a text. The name of a special entry alone is its id; in a longer text it is encoded as in prompts.

  Raises:
    ApiError: the request is invalid.
  """
  fields = Fields(body, ("model", "prompt", "add_special_tokens", "return_token_strs"))
  text, run = fields.optional_text("prompt"), model.run
  if text is None:
    raise wrong("prompt", None, "a string")
  check_characters("prompt", text)
  named = [token for token, name in _special_names(model).items() if name == text]
  try:
    ids = named[:1] or tokenizers.encode_whole(run.tokenizer, text, "prompt", special=run.imported)
  except InputError as error:
    raise of_input(error) from None
  ids = run.boundaries.begun(ids) if fields.flag("add_special_tokens", True) else ids
  return {"count": len(ids), "max_model_len": model.context, "tokens": ids}


def detokenize(body: Any, model: Model) -> dict[str, Any]:
  """The text of ids.

  Raises:
    ApiError: the request is invalid.
  """
  ids = Fields(body, ("model", "tokens")).get("tokens")
  size = model.run.method.vocab_size
  if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < size for token in ids):
    raise wrong("tokens", ids, f"a list of ids in 0..{size - 1}")
  return {"prompt": model.run.tokenizer.decode(ids)}


def tokenizer_info(model: Model) -> dict[str, Any]:
  """The names of the tokens before and after a text, and the chat template."""
  run = model.run
  names = _special_names(model)
  start = names[run.boundaries.start[0]] if run.boundaries.start else None
  return {
    "tokenizer_class": type(run.tokenizer).__name__,
    "bos_token": start,
    "eos_token": names[run.boundaries.end_ids[0]],
    "pad_token": None,
    "chat_template": run.tokenizer.chat_template,
  }


def _special_names(model: Model) -> dict[int, str]:
  """The names of special entries; some tokenizers have none for the tokens before and after a text."""
  tokenizer, boundaries = model.run.tokenizer, model.run.boundaries
  around = {token: tokenizer.piece(token) for token in (*boundaries.start, *boundaries.end_ids)}
  return around | {token: name for token, name in tokenizer.special_names().items() if name}
