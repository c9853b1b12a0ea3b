"""Mixtures: the source of each example, the evaluation stream, the recorded values, and invalid input."""

import collections
import json
import logging

import numpy as np
import pytest

from cyb_jax.data import MixtureBatches, TokenStore, evaluation_batches, open_token_store, prepare, prepare_mixture
from cyb_jax.data.mixture_batches import period
from cyb_jax.errors import InputError
from cyb_jax.option_syntax import Item, parse_mixture

T, B = 16, 4


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
  """Three byte-level stores with 400, 90 and 30 documents; the last store has weights."""
  folder = tmp_path_factory.mktemp("stores")
  for name, task, documents in (
    ("a", "synthetic_sums", 400),
    ("b", "synthetic_lookups", 90),
    ("c", "synthetic_questions", 30),
  ):
    prepare(task, "bytes", folder / name, options={"documents": documents})
  return folder


def mixture(stores, tmp_path, weights=(0.5, 0.3, 0.2), names="abc"):
  items = [Item(str(stores / name), {}, weight) for name, weight in zip(names, weights)]
  return prepare_mixture(items, "bytes", tmp_path / "mixture")


@pytest.mark.parametrize(
  ("weights", "counts"),
  [([0.7, 0.3], [182, 78]), ([1.0], [256]), ([0.5, 0.25, 0.25], [128, 64, 64]), ([1 / 3, 2 / 3], [86, 172])],
)
def test_a_period_has_integer_shares(weights, counts):
  assert period(weights) == counts


def test_an_irrational_weight_is_rounded_to_a_ten_thousandth():
  weights = np.array([np.pi, np.e, 1.0]) / (np.pi + np.e + 1)
  counts = period(weights.tolist())
  assert sum(counts) == 10_000
  assert np.abs(np.array(counts) / 10_000 - weights).max() <= 1e-4
  with pytest.raises(InputError, match="at least 1 / 10000"):
    period([1 - 1e-6, 1e-6])


def test_examples_are_of_their_sources_by_weight_and_each_window_is_read_once_an_epoch(stores, tmp_path):
  store = mixture(stores, tmp_path)
  batches = MixtureBatches(store.sources, sequence_length=T, batch_size=B, seed=3)
  windows = [source.store.num_windows("train", T) for source in store.sources]
  seen = [collections.Counter() for _ in store.sources]
  steps = -(-10 * max(windows) // B)
  for step in range(steps):
    sources, numbers = batches.windows(step)
    for source, number in zip(sources, numbers):
      seen[source][int(number)] += 1
    if step % 97 == 0 or step == steps - 1:
      counts = [sum(counted.values()) for counted in seen]
      assert batches.read_windows(step + 1) == dict(zip("abc", counts))
      # Every 260 examples contain 130, 78 and 52 examples of the sources.
      examples = (step + 1) * B
      assert all(abs(count - examples * w) < 40 for count, w in zip(counts, (0.5, 0.3, 0.2)))
  for periods in (1, 7):
    assert batches.read_windows(periods * 260 // B) == {"a": periods * 130, "b": periods * 78, "c": periods * 52}
  for counted, size, epochs in zip(seen, windows, batches.epochs(steps).values()):
    assert set(counted) <= set(range(size))
    assert (
      max(counted.values()) - min(counted[i] for i in range(size)) <= 1
    )  # all windows are read once before any twice
    assert epochs == sum(counted.values()) / size
  assert batches.epochs(steps)["c"] > 2  # the small source has started a new epoch


@pytest.mark.parametrize("weights", [(0.7123, 0.2, 0.0877), (0.71, 0.19, 0.1)])
def test_every_epoch_of_a_source_has_each_window_once(stores, tmp_path, weights):
  """Also if the pattern is longer than an epoch, because a source's examples are numbered in reading order."""
  store = mixture(stores, tmp_path, weights)
  batches = MixtureBatches(store.sources, sequence_length=T, batch_size=B, seed=0)
  size = store.sources[2].store.num_windows("train", T)
  read = []
  for step in range(int(2.5 * size / weights[2] / B)):
    sources, numbers = batches.windows(step)
    read += numbers[sources == 2].tolist()
  assert len(read) > 2 * size
  for epoch in (0, 1):
    assert sorted(read[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_a_prepared_mixture_is_opened_without_writing(stores, tmp_path):
  path = mixture(stores, tmp_path).path
  before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
  mixture(stores, tmp_path)
  assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_a_source_smaller_than_its_part_of_a_batch_or_a_window_is_rejected(stores, tmp_path):
  store = mixture(stores, tmp_path, (0.02, 0.02, 0.96))
  with pytest.raises(InputError, match=r"source 'c': data.batch_size=512: .* about 492 examples .*only \d+ windows"):
    MixtureBatches(store.sources, sequence_length=T, batch_size=512, seed=0)
  with pytest.raises(InputError, match=r"source 'c': data.sequence_length=5000"):
    MixtureBatches(store.sources, sequence_length=5000, batch_size=1, seed=0)


def test_a_batch_depends_only_on_seed_and_step_and_contains_its_rows(stores, tmp_path):
  store = mixture(stores, tmp_path)
  whole = MixtureBatches(store.sources, sequence_length=T, batch_size=B, seed=0)
  again = MixtureBatches(store.sources, sequence_length=T, batch_size=B, seed=0, rows=np.array([2, 0]))
  other = MixtureBatches(store.sources, sequence_length=T, batch_size=B, seed=1)
  for step in (1000, 3):
    batch, part = whole(step), again(step)
    assert {name: array.dtype.name for name, array in batch.items()} == {
      'tokens': 'int32', 'targets': 'int32', 'weights': 'float32'
    }  # fmt: skip
    for name, array in batch.items():
      np.testing.assert_array_equal(part[name], array[[2, 0]])
    sources, numbers = whole.windows(step)
    for row, (source, number) in enumerate(zip(sources, numbers)):
      tokens, weights = store.sources[source].store.windows("train", np.array([number]), T)
      np.testing.assert_array_equal(np.append(batch["tokens"][row], batch["targets"][row, -1]), tokens[0])
      np.testing.assert_array_equal(batch["weights"][row], weights[0])
  assert any((whole(step)["tokens"] != other(step)["tokens"]).any() for step in range(3))


def test_evaluation_concatenates_the_streams_of_all_sources(stores, tmp_path):
  store = mixture(stores, tmp_path)
  end, parts, weights, starts, difficulty = [256], [], [], [], []
  for source in store.sources:
    of = source.store
    n = of.num_tokens("validation")
    tokens, weight = of.windows("validation", np.array([0]), n - 1)
    starts += [start + len(end) - 1 + sum(map(len, parts)) for start in of.document_starts("validation").tolist()]
    parts.append(tokens[0, 1:])
    weights.append(weight[0])
    difficulty.append(of.difficulty("validation", np.array([0]), n - 1)[0])
  expected = np.concatenate([end, *parts])
  size = store.num_tokens("validation")
  assert size == len(expected)
  tokens, weight = store.windows("validation", np.array([0]), size - 1)
  np.testing.assert_array_equal(tokens[0], expected)
  np.testing.assert_array_equal(weight[0], np.concatenate(weights))
  np.testing.assert_array_equal(store.difficulty("validation", np.array([0]), size - 1)[0], np.concatenate(difficulty))
  np.testing.assert_array_equal(store.document_starts("validation"), starts)
  assert store.num_targets("validation") == weight.sum()
  assert store.num_bytes("validation") == sum(source.store.num_bytes("validation") for source in store.sources)
  batches = list(evaluation_batches(store, "validation", sequence_length=T, batch_size=B))
  assert sum(batch["weights"].sum() for batch in batches) == store.num_targets("validation")


def test_a_reopened_mixture_detects_a_replaced_source(stores, tmp_path):
  store = mixture(stores, tmp_path)
  opened = open_token_store(store.path, verify=True)
  assert opened.fingerprint == store.fingerprint
  assert [(s.name, s.weight, s.store.path) for s in opened.sources] == [
    (s.name, s.weight, s.store.path) for s in store.sources
  ]
  assert isinstance(open_token_store(stores / "a"), TokenStore)
  assert opened.source("b").task == "synthetic_lookups"
  with pytest.raises(InputError, match=r"source='d': the mixture has a, b, c"):
    opened.source("d")
  places = json.loads((store.path / "sources.json").read_text())
  (store.path / "sources.json").write_text(json.dumps(places | {"a": places["b"]}))
  with pytest.raises(InputError, match="is not the source 'a'"):
    open_token_store(store.path)
  (store.path / "sources.json").write_text(json.dumps(places | {"a": str(tmp_path / "gone")}))
  with pytest.raises(InputError, match="its source 'a' is not in"):
    open_token_store(store.path)


def test_a_mixture_of_tasks_trains_one_tokenizer_on_all_tasks(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  for name, letters in (("x", "abc"), ("y", "uvw")):
    rng = np.random.default_rng(len(name) + ord(name))
    lines = (" ".join("".join(rng.choice(list(letters), 4)) for _ in range(12)) for _ in range(300))
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
  items = parse_mixture("data.mixture", f"jsonl(pattern={tmp_path}/x.jsonl):3,jsonl(pattern={tmp_path}/y.jsonl):1")
  assert prepare_mixture(items, "sentencepiece:300", write=False) is None
  assert not (tmp_path / "cache").exists()
  store = prepare_mixture(items, "sentencepiece:300")
  assert [source.name for source in store.sources] == ["jsonl", "jsonl-2"]
  assert [source.weight for source in store.sources] == [0.75, 0.25]
  assert store.vocab_size == 300
  for letter in "abcuvw":  # both alphabets have pieces; other letters are encoded as bytes
    assert store.tokenizer.piece(store.tokenizer.encode(letter)[0]) == letter
  again = prepare_mixture(items, "sentencepiece:300", write=False)
  assert (again.fingerprint, again.path) == (store.fingerprint, store.path)


REFUSED = {
  "nothing": (["/nothing/here"], "there is no token store in '/nothing/here'"),
  "unknown": (["imdb_review"], r"data.task='imdb_review'"),
  "options": (["a(unit=line)"], "has no options"),
  "which": (["a", "jsonl(pattern=)"], "data.mixture: source 'jsonl': data.options.pattern=''"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_missing_source_is_rejected(stores, tmp_path, case):
  names, part = REFUSED[case]
  text = ",".join(str(stores / name) if name[0] == "a" else name for name in names)
  with pytest.raises(InputError, match=part):
    prepare_mixture(parse_mixture("data.mixture", text), "bytes", tmp_path / "mixture")
  assert not (tmp_path / "mixture").exists()


def test_a_mixture_is_not_a_source(stores, tmp_path):
  inner = mixture(stores, tmp_path)
  with pytest.raises(InputError, match="is a mixture; give its sources"):
    prepare_mixture([Item(str(inner.path), {}, 1.0)], "bytes", tmp_path / "outer")


def test_stores_of_different_tokenizers_are_rejected(stores, tmp_path):
  prepare("synthetic_sums", "sentencepiece:299", tmp_path / "d", options={"documents": 50})
  items = [Item(str(stores / "a"), {}, 1.0), Item(str(tmp_path / "d"), {}, 1.0)]
  with pytest.raises(InputError, match="different tokenizers"):
    prepare_mixture(items, "bytes", tmp_path / "mixture")
  with pytest.raises(InputError, match=r"data.tokenizer='sentencepiece:300': the token store .*/a of data.mixture"):
    prepare_mixture(items[:1], "sentencepiece:300", tmp_path / "mixture")
  assert not (tmp_path / "mixture").exists()


def test_the_end_of_a_sources_epoch_is_logged_once(stores, tmp_path, caplog):
  from cyb_jax.training.hooks import SourceCounts

  batches = MixtureBatches(mixture(stores, tmp_path).sources, sequence_length=T, batch_size=B, seed=0)
  counts = SourceCounts(batches, T, 0)
  once = next(step for step in range(10_000) if batches.epochs(step)["c"] >= 1)
  with caplog.at_level(logging.INFO, logger="absl"):
    line = counts(once - 1)
    assert not caplog.records
    counts(once)
    counts(once + 1)
  assert [record.getMessage() for record in caplog.records] == [
    "source c: epoch 1 is complete; the next epoch begins, in a new order"
  ]
  assert line["sources"]["c"]["tokens"] == batches.read_windows(once - 1)["c"] * T
  # A resumed run logs only the epochs that it completes itself.
  assert SourceCounts(batches, T, once)(once)["sources"]["c"]["epochs"] >= 1
  assert len(caplog.records) == 1
