"""The text of generated tokens: its end, and the part of it that is shown while it is generated."""

import io
import itertools

import pytest
import sentencepiece
from small_tokenizers import bpe

from cyb_jax.data import ByteTokenizer, SentencePieceTokenizer
from cyb_jax.errors import InputError
from cyb_jax.generation import Continuation

SPECIAL = ("<end>", "<|im_end|>", "<|im_start|>")


@pytest.fixture(scope="module")
def chat():
  """Byte-level BPE with the special entries of a chat."""
  return bpe([("a", "b"), ("æ", "Ĺ")], bytes_=True, special=SPECIAL)


@pytest.fixture(scope="module")
def fallback():
  """BPE whose decoder replaces all bytes of a run if one of them is in no character, like Llama 2's decoder."""
  merges = [("a", "b")]
  steps = [{"type": "ByteFallback"}, {"type": "Fuse"}]
  return bpe(merges, decoder={"type": "Sequence", "decoders": steps}, fallback=True)


def streamed(row, tokens):
  """The text of each token as it arrives, and the rest."""
  return [*(text for _, text in row.pieces(tokens, [0] * len(tokens))), row.rest()]


@pytest.mark.parametrize(
  ("stops", "kept", "text"),
  [
    (["<|im_end|>"], 3, "ab!"),
    (["<|im_end|>\n"], 4, "ab!"),
    (["!<|im_end|>"], 3, "ab"),
    (["<|im_end|>\n<|im_start|>"], 5, "ab!"),
    (["<|im_start|>"], 5, "ab!\n"),
    (["im_end"], None, "ab!\nab"),  # a part of a name is plain text, which does not occur in these tokens
    (["b!\n"], 4, "a"),  # without the names, the text consists of the tokens around a special entry
    (["never"], None, "ab!\nab"),
    ([], None, "ab!\nab"),
  ],
)
def test_stop_strings_with_special_entries(chat, stops, kept, text):
  tokens = [*chat.encode("ab!"), 1, *chat.encode("\n"), 2, *chat.encode("ab")]
  row = Continuation(chat, chat.encode("ab"), stops)
  assert row.kept(tokens) == kept
  assert row.text(tokens) == text
  assert "".join(streamed(row, tokens)) == text


def test_a_name_that_is_spelled_also_stops(chat):
  tokens = chat.encode("a<|im_end|>b")
  assert not {1, 2} & set(tokens)
  row = Continuation(chat, [0], ["<|im_end|>"])
  assert (row.kept(tokens), row.text(tokens)) == (len(tokens) - 1, "a")
  shown = streamed(row, tokens)
  assert shown == ["a", *[""] * len(tokens[1:]), ""]


def test_special_entries_of_a_sentencepiece_model():
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the dog sees", "a cat"] * 20), model_writer=model, vocab_size=26, model_type="bpe",
    hard_vocab_limit=False, minloglevel=2, control_symbols=["<|turn|>"],
  )  # fmt: skip
  tokenizer = SentencePieceTokenizer(model.getvalue())
  names = {name: i for i, name in tokenizer.special_names().items()}
  assert {"<s>", "</s>", "<|turn|>"} <= set(names)
  the, dog = tokenizer.encode("the dog"), tokenizer.encode("dog")
  row = Continuation(tokenizer, the, ["<|turn|>"])
  tokens = [*dog, names["<|turn|>"], *dog]
  assert (row.kept(tokens), row.text(tokens)) == (len(dog) + 1, " dog")
  assert "".join(streamed(row, tokens)) == " dog"


def test_the_first_bytes_of_a_stop_string_are_not_shown():
  """'日' is the beginning of the stop string until all bytes of 本 have arrived."""
  tokens = list("a日本".encode())
  row = Continuation(ByteTokenizer(), [97], ["日本"])
  assert row.kept(tokens) == len(tokens)
  assert streamed(row, tokens) == ["a", *[""] * 7]
  # If another character follows, the text is shown.
  tokens = list("a日木b".encode())
  assert streamed(Continuation(ByteTokenizer(), [97], ["日本"]), tokens) == ["a", "", "", "", "", "", "日木", "b", ""]


@pytest.mark.parametrize("stops", [[], ["日本"], ["本日", "b日"], ["é", "ab🦊"], ["\N{REPLACEMENT CHARACTER}"]])
def test_the_shown_pieces_equal_the_text(chat, stops):
  """For all texts of three of a few parts, and their beginnings; no byte is shown before its character is complete."""
  parts = ["日", "本", "b", "ab", "🦊", "é"]
  for tokenizer in (ByteTokenizer(), chat):
    prompt = tokenizer.encode("x")
    for text in map("".join, itertools.product(parts, repeat=3)):
      tokens = tokenizer.encode(text)
      for count in {len(tokens), len(tokens) - 1, len(tokens) - 2}:
        row = Continuation(tokenizer, prompt, stops)
        shown = streamed(row, tokens[:count])
        assert "".join(shown) == row.text(tokens[:count])
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in shown[:-1])


def test_bytes_that_a_decoder_may_still_replace(fallback):
  """日 is shown when the run of bytes has ended: one more byte, of no character, would change it."""
  ids = {piece: fallback.content["model"]["vocab"][f"<0x{piece:02X}>"] for piece in "日".encode()}
  tokens = [*fallback.encode("ab"), *(ids[byte] for byte in "日".encode()), *fallback.encode("a")]
  assert streamed(Continuation(fallback, fallback.encode("a")), tokens) == ["ab", "", "", "", "日a", ""]
  broken = tokens[:-1] + tokens[1:2]
  row = Continuation(fallback, fallback.encode("a"))
  assert "".join(streamed(row, broken)) == row.text(broken) == "ab" + "\N{REPLACEMENT CHARACTER}" * 4


def test_a_stop_string_that_no_text_contains():
  with pytest.raises(InputError, match=r"stop: 'a\\ud800' has '\\ud800', which is not a character"):
    Continuation(ByteTokenizer(), [97], ["a\ud800"])
