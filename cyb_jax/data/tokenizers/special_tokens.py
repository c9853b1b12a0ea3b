"""Special tokens of a model's texts and chats, in addition to the separator of documents in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cyb_jax.errors import InputError, shown

if TYPE_CHECKING:
  from cyb_jax.data.tokenizers.interface import Tokenizer


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """The special tokens that a model's files specify; they do not affect the encoding of a text.

  Attributes:
    bos_id: the token that begins a text or a chat; None if the files specify none. `Tokenizer.adds_start` determines
      whether it precedes a text that is not the continuation of another text.
    end_ids: the tokens that end a generated text, the tokenizer's own eos first; empty means the separator.
    pad_id: the padding token; None if the files specify none.
    chat_template: a Jinja template of chats, see `chat.render_chat`; None if the files contain none.
    names: the texts of special tokens by the names that a chat template reads: `bos_token`, `eos_token`, `pad_token`,
      `unk_token`. A token without a name in the tokenizer's own files is absent, even if the model's files have its id.
  """

  bos_id: int | None = None
  end_ids: tuple[int, ...] = ()
  pad_id: int | None = None
  chat_template: str | None = None
  names: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def ids(self) -> set[int]:
    """All ids."""
    return {*self.end_ids, *(i for i in (self.bos_id, self.pad_id) if i is not None)}

  def check(self, entries: Callable[[int], bool], name: str) -> None:
    """Checks that all ids are entries of a vocabulary.

    Args:
      entries: id -> whether the vocabulary has an entry with this id.
      name: prefix of the error message: the file.

    Raises:
      InputError: an id has no entry.
    """
    for number in sorted(self.ids()):
      if not entries(number):
        raise InputError(f"{name}: the special token {number} is not among its entries; give the right id")

  def to_json(self) -> dict[str, Any]:
    """The fields that are set, for a JSON file; `from_json` reads them."""
    values = dataclasses.asdict(self) | {"end_ids": list(self.end_ids), "names": dict(self.names)}
    return {name: value for name, value in values.items() if value not in (None, [], {})}

  @classmethod
  def from_json(cls, values: Any, where: str) -> SpecialTokens:
    """Converts the result of `to_json` back.

    Raises:
      InputError: the values are invalid; the message begins with `where`.
    """
    kinds = {"bos_id": int, "end_ids": list, "pad_id": int, "chat_template": str, "names": dict}
    valid = isinstance(values, Mapping) and values.keys() <= kinds.keys()
    valid = valid and all(isinstance(value, kinds[name]) for name, value in values.items())
    valid = valid and all(isinstance(i, int) for i in values.get("end_ids", ()))
    valid = valid and all(isinstance(text, str) for text in values.get("names", {}).values())
    if not valid:
      raise InputError(f"{where}: special_tokens = {shown(values)} is invalid; restore the file")
    return cls(**dict(values) | {"end_ids": tuple(values.get("end_ids", ()))})


@dataclasses.dataclass(frozen=True)
class TextBoundaries:
  """The ids before and after a text in a model's training data.

  Attributes:
    start: the ids before a text that is not the continuation of another text: one, or none.
    end_ids: each of these ids ends a generated text; there is at least one.
  """

  start: tuple[int, ...]
  end_ids: tuple[int, ...]

  def begun(self, ids: Sequence[int]) -> list[int]:
    """The ids of a text with `start` before them, unless the text itself begins with `start`."""
    return list(ids) if tuple(ids[: len(self.start)]) == self.start else [*self.start, *ids]


def text_boundaries(tokenizer: Tokenizer, *, imported: bool) -> TextBoundaries:
  """The boundaries of a model's texts.

  Training in this project puts a start token before every document and the separator after it, regardless of the tokens
  that the tokenizer's files specify for chats. An imported model gets a start token only if its tokenizer adds one, and
  its texts end at the tokens that its files specify.

  Args:
    tokenizer: the model's tokenizer.
    imported: whether the model was imported and has not been trained by this project.
  """
  named = tokenizer.special_tokens.end_ids
  if imported:
    return TextBoundaries((tokenizer.start_id,) if tokenizer.adds_start else (), named or (tokenizer.separator_id,))
  return TextBoundaries((tokenizer.start_id,), tuple(dict.fromkeys((*named, tokenizer.separator_id))))
