"""Renders and encodes chats with a tokenizer's chat template."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from cyb_jax.data.tokenizers.interface import Tokenizer, check_encodable, special_pattern
from cyb_jax.errors import InputError

if TYPE_CHECKING:
  import jinja2


def render_chat(
  tokenizer: Tokenizer,
  messages: Sequence[Mapping[str, Any]],
  add_generation_prompt: bool = False,
  *,
  clock: bool = True,
) -> str:
  """The text of a chat.

  The template is rendered like in `apply_chat_template` of transformers: in Jinja's sandbox, without the line end after
  a block and the spaces before a block, with `raise_exception`, `tojson`, `strftime_now`, loop controls and the special
  tokens (`bos_token`, `eos_token`, `pad_token`, `unk_token`). The content of `{% generation %}` blocks is rendered
  without the tags. If a template calls `strftime_now`, the text depends on the date.

  `Tokenizer.encode_with_special` encodes the text, which already contains all start and end tokens of the chat.
  `encode_chat` renders and encodes messages that must not spell special tokens.

  Args:
    tokenizer: a tokenizer with a `chat_template`.
    messages: mappings with `role`, `content`, and any other keys that the template reads, in the order of the chat.
    add_generation_prompt: whether the text ends where the assistant's next message begins.
    clock: whether `strftime_now` is defined; if not, the text does not depend on the date, and templates that test for
      `strftime_now` use a fixed date.

  Raises:
    InputError: the tokenizer has no template, the package jinja2 is not installed, or the template is invalid or
      rejects the messages.

  Example:
    >>> from cyb_jax.data.tokenizers import ByteTokenizer
    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"
    >>> render_chat(tokenizer, [{"role": "user", "content": "Hello"}])
    'user: Hello\\n'
  """
  if tokenizer.chat_template is None:
    raise InputError(
      "data.tokenizer: it has no chat template; give the tokenizer of an instruct model (a folder whose"
      " tokenizer_config.json has chat_template, or a GGUF file with tokenizer.chat_template)"
    )
  template = _compiled(tokenizer.chat_template, clock)
  try:
    return template.render(
      messages=[dict(message) for message in messages],
      tools=None,
      documents=None,
      add_generation_prompt=add_generation_prompt,
      **tokenizer.special_tokens.names,
    )
  # A template is a program: its own mistakes raise errors of any type, such as AttributeError and RecursionError.
  except Exception as error:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise InputError(
      f"messages: the tokenizer's chat template rejects them ({reason}); give messages that the template accepts"
    ) from error


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, clock: bool = True) -> list[int]:
  """The ids of a chat, up to the beginning of the assistant's next message.

  The ids are equal to the encoding of `render_chat` by `encode_with_special`, with one exception: the name of a special
  entry in a message is encoded as text, so no message can end its own turn; transformers encodes it as the special
  entry. No start token is added to the output of the template.

  Args:
    tokenizer, messages, clock: see `render_chat`.

  Raises:
    InputError: as `render_chat`; or the vocabulary lacks a character.
  """
  pattern, spelled = special_pattern(tokenizer), []

  def marked(value: Any) -> Any:
    if isinstance(value, str):
      check_encodable(tokenizer, value, "messages")
      return value if pattern is None else pattern.sub(mark, value)
    if isinstance(value, Mapping):
      return {name: marked(part) for name, part in value.items()}
    return [marked(part) for part in value] if isinstance(value, list | tuple) else value

  def mark(found: re.Match[str]) -> str:
    spelled.append(found[0])
    return f"{_OPEN}{len(spelled) - 1}{_CLOSE}"

  text = render_chat(tokenizer, [marked(message) for message in messages], True, clock=clock)
  ids: list[int] = []
  for number, part in enumerate(re.split(f"{_OPEN}([0-9]+){_CLOSE}", text)):
    if number % 2:
      ids += tokenizer.encode(spelled[int(part)])
    else:
      check_encodable(tokenizer, part, "chat_template", special=True)
      ids += tokenizer.encode_with_special(part)
  return ids


# These characters enclose the number of a special entry's name in a message. Both are surrogates, which no valid text
# contains.
_OPEN, _CLOSE = "\ud800", "\ud801"


def turn_end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
  """The special entry that the template writes after an assistant's message: one id, or none.

  Some tokenizers do not list this entry among the tokens that end a text, but a model that was trained on such chats
  ends its messages with it. The result is empty if the template writes no special entry there, or if it rejects a chat
  of two messages.
  """
  messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
  try:
    text = render_chat(tokenizer, messages, clock=False)
  except InputError:
    return ()
  ids = tokenizer.encode_with_special(text.rstrip())
  return tuple(i for i in ids[-1:] if i in tokenizer.special_names())


@functools.lru_cache(maxsize=8)
def _compiled(source: str, clock: bool) -> jinja2.Template:
  try:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
  except ImportError as error:
    raise InputError(
      "chat_template: rendering it needs the package jinja2; run pip install 'cyb_jax[pretrained]'"
    ) from error
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_generation_extension(), jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = _raise_exception
  if clock:
    environment.globals["strftime_now"] = _strftime_now
  try:
    return environment.from_string(source)
  except Exception as error:  # also of Python's compiler, such as RecursionError and SyntaxError
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise InputError(
      f"chat_template: it is not a valid Jinja template ({reason}); fetch the tokenizer again"
    ) from error


@functools.cache
def _generation_extension() -> type[jinja2.ext.Extension]:
  """The block `{% generation %}`, with which templates mark the assistant's text; its content is rendered."""
  import jinja2.ext

  class Generation(jinja2.ext.Extension):
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
      next(parser.stream)
      return parser.parse_statements(("name:endgeneration",), drop_needle=True)

  return Generation


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """JSON without the HTML escapes of Jinja's own `tojson` filter."""
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
  return datetime.datetime.now().strftime(form)


def _raise_exception(message: str) -> NoReturn:
  import jinja2

  raise jinja2.TemplateError(message)
