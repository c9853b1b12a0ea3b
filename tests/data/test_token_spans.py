"""Determines the tokens of a continuation or an answer, where a token may span the border."""

import io

import numpy as np
import pytest
import sentencepiece
from small_tokenizers import bpe

from cyb_jax.data import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece
from cyb_jax.data.pieces import Encoder
from cyb_jax.data.tasks import Document
from cyb_jax.data.tokenizers import continuation_start, encode_pairs, tokens_with

TEXTS = ["Answer: A", "Q: é日本?\nAnswer:  B", "日", "a▁b ▁", " x", "", "naïve 🦊 Answer"]


@pytest.fixture(scope="module")
def answer():
  """'Answer' and 'Ans' are entries, but 'wer' is not."""
  return bpe([("A", "n"), ("An", "s"), ("w", "e"), ("Ans", "we"), ("Answe", "r")])


@pytest.fixture(scope="module")
def byte_level():
  """Byte-level BPE; the first two bytes of 日, ': A', and the last byte of é with a following space are entries."""
  merges = [("æ", "Ĺ"), ("Ġ", "A"), (":", "ĠA"), ("©", "Ġ")]
  return bpe(merges, bytes_=True)


@pytest.fixture(scope="module")
def prefixed():
  """A SentencePiece model that puts a space before every text, like Llama's."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["Answer: A", "Answer: B", "the Answer"] * 50), model_writer=model, vocab_size=290,
    model_type="bpe", byte_fallback=True, hard_vocab_limit=False, bos_id=-1, minloglevel=2,
    normalization_rule_name="identity", remove_extra_whitespaces=False,
  )  # fmt: skip
  return SentencePieceTokenizer(model.getvalue())


@pytest.fixture(scope="module")
def trained():
  return train_sentencepiece(["Q: the answer is\nAnswer: A", "Answer: B"] * 50, 274)


@pytest.fixture(scope="module")
def normalizing():
  """A SentencePiece model that normalizes text: a ligature becomes two letters, several spaces become one."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["Answer: fine", "the fi Answer"] * 50), model_writer=model, vocab_size=290,
    model_type="bpe", byte_fallback=True, hard_vocab_limit=False, bos_id=-1, minloglevel=2,
  )  # fmt: skip
  return SentencePieceTokenizer(model.getvalue())


TOKENIZERS = ["answer", "byte_level", "prefixed", "trained", "bytes"]


def named(name, request):
  return ByteTokenizer() if name == "bytes" else request.getfixturevalue(name)


def pieces(tokenizer, ids):
  return [tokenizer.piece(i) for i in ids]


def test_the_rule_by_hand():
  spans = np.array([[0, 3], [3, 5], [3, 5], [5, 6]])
  starts = [continuation_start(spans, border, 6) for border in range(7)]
  assert starts == [0, 0, 0, 1, 1, 3, 4]
  assert tokens_with(spans, np.array([0, 0, 1, 0, 0, 0], bool)).tolist() == [True, False, False, False]
  assert tokens_with(spans, np.array([0, 0, 0, 0, 1, 0], bool)).tolist() == [False, True, True, False]
  # A token after the text has the weight of the last byte, and an empty text has no tokens.
  assert tokens_with(np.array([[0, 1], [1, 2]]), np.array([True])).tolist() == [True, True]
  assert continuation_start(np.zeros((0, 2), int), 0, 0) == 0


def test_a_token_across_the_border(answer):
  """'Ans' and 'wer' form one token, which belongs to 'wer'."""
  assert pieces(answer, answer.encode("Ans")) == ["Ans"]
  ((context, continuation),) = encode_pairs(answer, [("Ans", "wer")])
  assert (context, pieces(answer, continuation)) == ([], ["Answer"])
  ((context, continuation),) = encode_pairs(answer, [("AnsAns", "werwe")])
  assert (pieces(answer, context), pieces(answer, continuation)) == (["Ans"], ["Answer", "we"])


def test_the_context_encoded_separately_has_more_tokens(answer):
  """'Answe' encoded separately ends with a token that no prefix of the text has, so its token count misleads."""
  tokenizer = bpe([("b", "c"), ("a", "bc")])
  assert (len(tokenizer.encode("aab")), pieces(tokenizer, tokenizer.encode("aabc"))) == (3, ["a", "abc"])
  assert encode_pairs(tokenizer, [("aab", "c")]) == [(tokenizer.encode("a"), tokenizer.encode("abc"))]
  # Without a merge across the border, both ways are equal.
  assert encode_pairs(answer, [("Ans", "Ans")]) == [(answer.encode("Ans"), answer.encode("Ans"))]


def test_characters_across_tokens(byte_level):
  def parted(context, continuation):
    ((before, after),) = encode_pairs(byte_level, [(context, continuation)])
    return len(before), len(after)

  assert len(byte_level.encode("日")) == 2
  assert parted("日", "日") == (2, 2)
  assert parted("", "日") == (0, 2)
  # ': A' is one token.
  assert parted("日:", " A日") == (2, 3)
  # The last byte of é and the space are one token: the space begins the continuation, and this token is its first.
  assert len(byte_level.encode("é ")) == 2
  assert parted("é", " ") == (1, 1)


def test_a_space_before_the_text(prefixed):
  ((context, continuation),) = encode_pairs(prefixed, [("Answer:", " A")])
  assert prefixed.decode([*context, *continuation]) == "Answer: A"
  assert pieces(prefixed, continuation) == ["▁A"]
  assert encode_pairs(prefixed, [("", "Answer")]) == [([], prefixed.encode("Answer"))]
  # The text's own characters are encoded as bytes after the added space.
  assert pieces(prefixed, prefixed.encode("日")) == ["▁", "<0xE6>", "<0x97>", "<0xA5>"]
  assert encode_pairs(prefixed, [("日", "日")]) == [(prefixed.encode("日"), prefixed.encode("日")[1:])]


def test_a_model_that_normalizes_text(normalizing):
  text = "  ﬁne  Answer"
  ((ids, spans),) = normalizing.encode_spans([text])
  assert ids == normalizing.encode("fine Answer")
  assert [text.encode()[slice(*span)].decode() for span in spans.tolist()] == ["ﬁne", "  Answer"]
  ((context, continuation),) = encode_pairs(normalizing, [("  ﬁne", "  Answer")])
  assert [*context, *continuation] == ids
  assert normalizing.decode(continuation) == "Answer"


@pytest.mark.parametrize("name", ["prefixed", "trained"])
def test_counted_spans_equal_the_librarys_spans(name, request):
  """The spans that are computed from the lengths of pieces, against the library's alignment."""
  tokenizer = named(name, request)
  for text in TEXTS:
    ids = tokenizer.encode(text)
    counted = tokenizer._counted_spans(ids, text)
    (found,) = tokenizer._library_spans([text])
    assert counted is not None or "▁" in text
    if counted is not None:
      assert counted.tolist() == found.tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_spans_cover_the_text(name, request):
  """The ids equal those of `encode`; the spans ascend, are not empty, and cover every byte."""
  tokenizer = named(name, request)
  texts = ["AnsAnswer", "wer", ""] if name == "answer" else TEXTS
  for text, (ids, spans) in zip(texts, tokenizer.encode_spans(texts), strict=True):
    assert list(ids) == tokenizer.encode(text)
    assert spans.shape == (len(ids), 2)
    assert (np.diff(spans, axis=0) >= 0).all()
    assert (spans[:, 0] < spans[:, 1]).all()
    assert {i for first, end in spans.tolist() for i in range(first, end)} == set(range(len(text.encode())))


@pytest.mark.parametrize("name", ["byte_level", "trained", "bytes"])
def test_borders_against_the_bytes_of_the_tokens(name, request):
  """The reference counts bytes: it finds the first token at which the text is longer than the context."""
  tokenizer = named(name, request)
  names = {} if name != "byte_level" else {i: entry for entry, i in tokenizer.content["model"]["vocab"].items()}

  def num_bytes(token):
    if name == "byte_level":
      return len(names[token])  # its entries represent a byte by a character
    piece = tokenizer.piece(token)
    if name == "bytes" or piece.startswith("<0x"):
      return 1
    return len(piece.replace("▁", " ").encode())

  for text in TEXTS:
    for border in range(len(text) + 1):
      context, continuation = text[:border], text[border:]
      ((before, after),) = encode_pairs(tokenizer, [(context, continuation)])
      ids = tokenizer.encode(text)
      lengths = np.cumsum([num_bytes(i) for i in ids])
      assert len(ids) == 0 or lengths[-1] == len(text.encode())
      assert [*before, *after] == ids
      assert len(before) == int((lengths <= len(context.encode())).sum())


def weights_of(tokenizer, *parts):
  """The weights of the tokens of a document, and of its end token; `parts` are (text, weight)."""
  text = "".join(part for part, _ in parts)
  weights = np.concatenate([np.full(len(part.encode()), weight, np.uint8) for part, weight in parts])
  encoded = Encoder(tokenizer, ("weights",)).encode([Document(text, weights=weights)])
  assert encoded.weighted_tokens.tolist() == [encoded.annotations["weights"].sum()]
  return encoded.annotations["weights"].tolist()


def test_an_answer_that_begins_in_the_prompts_last_token_has_weight(answer, byte_level):
  assert weights_of(answer, ("Ans", 0), ("wer", 1)) == [1, 1]
  assert weights_of(byte_level, ("日:", 0), (" A", 1)) == [0, 0, 1, 1]
  # A token with an answer's end and the next prompt's beginning also has weight 1; otherwise the answer would be lost.
  assert weights_of(byte_level, (":", 0), (" A", 1), ("é", 0), (" ", 0)) == [1, 0, 0, 0]
  assert weights_of(byte_level, ("é", 1), (" é", 0)) == [1, 1, 0, 0, 0]
  # All bytes of a character of several tokens have weight 1.
  assert weights_of(byte_level, ("日", 0), ("日", 1), ("日", 0)) == [0, 0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_weights_begin_at_the_continuation(name, request):
  tokenizer = named(name, request)
  for text in ["AnsAnswer", "wer"] if name == "answer" else filter(None, TEXTS):
    for border in range(len(text)):
      ((before, after),) = encode_pairs(tokenizer, [(text[:border], text[border:])])
      expected = [0] * len(before) + [1] * (len(after) + 1)
      assert weights_of(tokenizer, (text[:border], 0), (text[border:], 1)) == expected
