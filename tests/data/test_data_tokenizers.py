"""Tokenizers: exact round trips, no control ids from text, reproducible models."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_corpus import TRICKY, corpus

from cyb_jax.data import ByteTokenizer, SentencePieceTokenizer, load, open_tokenizer, train_sentencepiece
from cyb_jax.data.tokenizers import sentencepiece
from cyb_jax.errors import InputError


@pytest.fixture(scope="module")
def pieces():
  return train_sentencepiece(corpus(), 320)


def test_bytes_by_hand():
  tokenizer = ByteTokenizer()
  assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
  assert (tokenizer.vocab_size, tokenizer.separator_id) == (257, 256)
  assert tokenizer.decode([97, 256, 0xC3, 0xA9]) == "aé"
  assert [tokenizer.piece(i) for i in (97, 10, 256)] == ["a", "<0x0A>", "<end>"]


@pytest.mark.parametrize("text", TRICKY)
def test_no_text_encodes_to_a_control_token(text, pieces):
  for tokenizer in (ByteTokenizer(), pieces):
    ids = tokenizer.encode(text)
    assert tokenizer.separator_id not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "x", text]) == [ids, tokenizer.encode("x"), ids]
  assert 0 not in pieces.encode(text)  # <unk>


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(pieces, text):
  assert pieces.decode(pieces.encode(text)) == text


def test_pieces_are_words_not_bytes(pieces):
  assert pieces.vocab_size == 320
  assert len(pieces.encode(" not theing")) <= 4
  assert len(pieces.encode("12")) == 2  # digits are separate pieces


def test_training_is_deterministic(pieces):
  assert train_sentencepiece(corpus(), 320).model == pieces.model


def test_save_and_load(tmp_path, pieces):
  for tokenizer in (ByteTokenizer(), pieces):
    folder = tmp_path / tokenizer.describe()["kind"]
    folder.mkdir()
    tokenizer.save(folder)
    again = load(folder)
    assert again.describe() == tokenizer.describe()
    assert again.encode("the cat▁") == tokenizer.encode("the cat▁")
  same = open_tokenizer(str(tmp_path / "sentencepiece" / "tokenizer.model"))
  assert same.describe() == pieces.describe()
  (tmp_path / "bytes" / "tokenizer.json").write_text('{"kind": "bytes", "vocab_size": 12}')
  with pytest.raises(InputError, match=r"tokenizer\.json"):
    load(tmp_path / "bytes")


def test_bad_specs(tmp_path):
  with pytest.raises(InputError, match="words"):
    open_tokenizer("words")
  (tmp_path / "x.model").write_bytes(b"no model")
  with pytest.raises(InputError, match="not a SentencePiece model"):
    open_tokenizer(str(tmp_path / "x.model"))
  with pytest.raises(InputError, match="sentencepiece:8192"):
    train_sentencepiece(corpus(), 8192)
  with pytest.raises(InputError, match="sentencepiece:100"):
    train_sentencepiece(corpus(), 100)


def test_a_model_without_an_end_piece_is_rejected(pieces):
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto.FromString(pieces.model)
  model.trainer_spec.eos_id = -1
  model.trainer_spec.eos_piece = "<other>"
  with pytest.raises(InputError, match="</s>"):
    SentencePieceTokenizer(model.SerializeToString())


def test_as_a_seqio_vocabulary(pieces):
  seqio = pytest.importorskip("seqio")
  import tensorflow as tf

  from cyb_jax.data import seqio_vocabulary

  vocabulary = seqio_vocabulary(pieces)
  ids = pieces.encode("the cat▁sat\n")
  assert isinstance(vocabulary, seqio.Vocabulary)
  assert vocabulary.vocab_size == 320
  assert vocabulary.eos_id == pieces.separator_id
  assert vocabulary.encode("the cat▁sat\n") == ids
  assert vocabulary.decode([*ids, pieces.separator_id, 300]) == "the cat▁sat\n"
  assert vocabulary.encode_tf(tf.constant("the cat▁sat\n")).numpy().tolist() == ids
  assert vocabulary.decode_tf(tf.constant(ids)).numpy().decode() == "the cat▁sat\n"
  dataset = tf.data.Dataset.from_tensors({"targets": "the cat▁sat\n"})
  features = {"targets": seqio.Feature(vocabulary)}
  example = next(seqio.preprocessors.tokenize(dataset, features).as_numpy_iterator())
  assert example["targets"].tolist() == ids
  assert vocabulary == seqio_vocabulary(pieces) != seqio_vocabulary(ByteTokenizer())


def test_only_a_part_of_text_without_spaces_is_used_for_training(monkeypatch):
  """Ordinary text is always used completely, so the models of ordinary text do not change."""
  monkeypatch.setattr(sentencepiece, "_LONG_WORDS_BYTES", 2500)
  unspaced = ["x" * 1000 + "\n" + "y" * 1500, "z" * 300]
  ordinary = ["a few words\nmore", "w" * 200]
  kept = list(sentencepiece._sentences([*unspaced, *ordinary]))
  assert kept == ["x" * 1000, "y" * 1000, "y" * 500, "a few words", "more", "w" * 200]
