"""Special tokens of a model's texts and chats, next to the separator that joins documents in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cyb_jax.errors import InputError

if TYPE_CHECKING:
  from cyb_jax.data.tokenizers.interface import Tokenizer


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """The special tokens that a model's files name; none of them changes how a text is encoded.

  Attributes:
    bos_id: the token that begins a text or a chat; None: the files name none. Whether it precedes a text that is given
      alone is `Tokenizer.adds_start`.
    end_ids: the tokens that end a generated text, the tokenizer's own eos first; empty: the separator of documents.
    pad_id: the token that fills rows; None: the files name none.
    chat_template: a Jinja template of chats, see `chat.render_chat`; None: the files contain none.
    names: the texts of special tokens by the names that a chat template reads: `bos_token`, `eos_token`, `pad_token`,
      `unk_token`. A token that the tokenizer's own files do not name is absent, even if the model's files number it.
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
      entries: whether an id has an entry.
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
    """Reads what `to_json` returned.

    Raises:
      InputError: another form; the message begins with `where`.
    """
    kinds = {"bos_id": int, "end_ids": list, "pad_id": int, "chat_template": str, "names": dict}
    valid = isinstance(values, Mapping) and values.keys() <= kinds.keys()
    valid = valid and all(isinstance(value, kinds[name]) for name, value in values.items())
    valid = valid and all(isinstance(i, int) for i in values.get("end_ids", ()))
    valid = valid and all(isinstance(text, str) for text in values.get("names", {}).values())
    if not valid:
      raise InputError(f"{where}: special_tokens = {values!r} is invalid; restore the file")
    return cls(**dict(values) | {"end_ids": tuple(values.get("end_ids", ()))})


@dataclasses.dataclass(frozen=True)
class TextBoundaries:
  """The ids before and after a text, as a model has learned them.

  Attributes:
    start: the ids before a text that is given alone: one, or none.
    end_ids: the ids of which each ends a generated text; at least one.
  """

  start: tuple[int, ...]
  end_ids: tuple[int, ...]

  def begun(self, ids: Sequence[int]) -> list[int]:
    """The ids of a text after those of `start`, which are not repeated where the text itself spells them."""
    return list(ids) if tuple(ids[: len(self.start)]) == self.start else [*self.start, *ids]


def text_boundaries(tokenizer: Tokenizer, *, imported: bool) -> TextBoundaries:
  """The boundaries of the texts of a model.

  Training in this project puts a start token before every document and the separator after it, whatever tokens the
  tokenizer's files name for chats. A model of another project, as it was trained there, gets a start token only if its
  tokenizer adds one, and its text ends at the tokens that its files name.

  Args:
    tokenizer: of the model.
    imported: whether the model is one of another project that has not been trained here.
  """
  named = tokenizer.special_tokens.end_ids
  if imported:
    return TextBoundaries((tokenizer.start_id,) if tokenizer.adds_start else (), named or (tokenizer.separator_id,))
  return TextBoundaries((tokenizer.start_id,), tuple(dict.fromkeys((*named, tokenizer.separator_id))))
