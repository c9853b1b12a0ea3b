"""Pause statistics against a slow reference, one token at a time; ranks against scipy for distributions that are hard
to bin; words by hand; sums that do not depend on batches or devices."""

import itertools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from models import initial_params, tiny_config
from scipy import special, stats

from cyb_jax import configs, jsonl, training
from cyb_jax.configs import ParallelismConfig
from cyb_jax.data import ByteTokenizer
from cyb_jax.errors import InputError
from cyb_jax.evaluation import PauseStatistics, accumulation, bootstrap, fixed_point, ranks, statistics_of_split
from cyb_jax.evaluation.abilities import as_trained
from cyb_jax.evaluation.token_types import TokenTypes, bins_per_pause, summarize
from cyb_jax.evaluation.words import Words
from cyb_jax.methods import Adaptive, EvalOutput
from cyb_jax.partitioning.mesh import make_mesh
from cyb_jax.stopping import SlotScores, log_stopping_distribution


def mesh_of(devices):
  return make_mesh(ParallelismConfig(), jax.devices()[:devices])


class Scripted:
  """A method whose scores come from the batch: `log_target` f32[B, T, W] and `odds` f32[B, T, W]; it is adaptive."""

  def __init__(self, num_slots=3):
    self.num_slots = num_slots

  def evaluate(self, params, batch, omega=None):
    odds = batch["odds"]
    scores = SlotScores(batch["log_target"], jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(-odds))
    log_stopping = log_stopping_distribution(scores.log_dont_know, scores.log_answer, omega)
    return EvalOutput(loss=batch["weights"], scores=scores, log_stopping=log_stopping)

  def evaluate_as_trained(self, params, batch, reading):
    return None

  def median_dont_know(self, params, batches):
    raise NotImplementedError


def scripted_batches(odds, target, *, rows=4, length=8, documents=50, seed=0):
  """Batches of a stream of tokens with given odds f[N, W] and t f[N, W]; the last batch is padded."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(97, 117, len(odds) + 1).astype(np.int32)
  group = np.sort(rng.integers(0, documents, len(odds)))
  with np.errstate(divide="ignore"):
    log_target = np.log(target).astype(np.float32)
  padded_size = -(-len(odds) // (rows * length)) * rows * length
  arrays = {
    "tokens": tokens[:-1], "targets": tokens[1:], "weights": np.ones(len(odds), np.float32),
    "group": group.astype(np.int32), "odds": odds.astype(np.float32), "log_target": log_target,
  }  # fmt: skip
  arrays = {k: np.concatenate([v, np.zeros((padded_size - len(v), *v.shape[1:]), v.dtype)]) for k, v in arrays.items()}
  context = Words(ByteTokenizer()).context
  stream = np.concatenate([np.full(context, 256), arrays["tokens"]])
  arrays["before"] = np.lib.stride_tricks.sliding_window_view(stream, context)[:padded_size]
  shaped = {k: v.reshape(-1, rows, length, *v.shape[1:]) for k, v in arrays.items()}
  shaped["before"] = shaped["before"][:, :, 0]
  return [{k: v[n] for k, v in shaped.items()} for n in range(padded_size // (rows * length))]


def told_statistics(batches, sample=None, *, documents=50, devices=1, num_slots=3):
  statistics = PauseStatistics(Scripted(num_slots), mesh_of(devices), ByteTokenizer())
  return statistics({}, lambda: batches, lambda: sample or batches[::8], documents=documents)


def random_scores(count, num_slots=3, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(0.5, 2, (count, num_slots)), rng.uniform(0.01, 1, (count, num_slots))


# Sums and ranks.


def test_fixed_point_by_hand():
  # 1.5 of 4 is 3/8 of 2^30 units: bytes 0, 0, 0, 24. Minus one unit has all bits set.
  np.testing.assert_array_equal(
    fixed_point.fixed(jnp.array([1.5, -(2.0**-28)]), 4.0), [[0, 0, 0, 24], [255, 255, 255, -1]]
  )
  real = jnp.array([[True, False, True]])
  sums = np.asarray(fixed_point.total(jnp.array([[0.25, 9.0, -3.0]]), real, 4.0), np.int64)
  assert fixed_point.value(sums, 4.0) == -2.75
  # Values beyond the bound count as the bound.
  assert fixed_point.value(np.asarray(fixed_point.fixed(jnp.array(1e30), 4.0), np.int64), 4.0) == 4.0


def test_moments_keep_a_variance_that_f32_sums_would_lose():
  rng = np.random.default_rng(0)
  x = (2.99 + 1e-5 * rng.standard_normal(5000)).astype(np.float32)
  sums = np.asarray(fixed_point.moments(jnp.asarray(x), 4.0), np.int64).sum(0)
  count, mean, variance = fixed_point.mean_and_variance(sums, 4.0)
  exact = x.astype(np.float64)
  assert count == 5000
  assert mean == pytest.approx(exact.mean(), rel=1e-12)
  assert variance == pytest.approx(exact.var(), rel=1e-4)
  assert np.isnan(fixed_point.mean_and_variance(np.zeros(17, np.int64), 4.0)[1])


def binned_spearman(x, y, sample):
  """Like the two passes, on the host."""
  found = []
  for values in (x, y):
    bins = np.searchsorted(ranks.edges(values[sample]), values, side="right")
    found.append(ranks.centred(np.bincount(bins, minlength=ranks.BINS))[bins])
  a, b = found
  return float(ranks.correlation(np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], -1).sum(0)))


def hard_cases():
  rng = np.random.default_rng(0)
  count = 100_000
  noise, other = rng.standard_normal((2, count))
  mixed = 0.4 * noise + other
  yield "collapsed at d = 0.999", 6.9 + 1e-4 * noise, 0.1 * mixed
  yield "d within 0.9 +- 0.02", special.logit(0.9 + 0.02 * np.tanh(noise)), 0.1 * mixed
  yield "gains of 1e-9", noise, 1e-9 * mixed
  yield "both, nearly the same order", 6.9 + 1e-5 * noise, 1e-9 * (noise + 0.01 * other)
  yield "heavy ties", np.round(noise), np.round(mixed)
  yield "one gain in two is 0", noise, np.where(other > 0, 0.0, mixed)
  yield "two clusters far apart", np.where(noise > 1, 20.0, -20.0) + 1e-3 * other, mixed
  # The sample has tokens of every part of the split, which may be sorted.
  yield "drifting", np.sort(noise) + 0.1 * other, np.linspace(0, 1, count) * mixed


@pytest.mark.parametrize(("x", "y"), [pytest.param(x, y, id=name) for name, x, y in hard_cases()])
def test_spearman_from_bins(x, y):
  x, y = x.astype(np.float32), y.astype(np.float32)
  sample = np.linspace(0, len(x) - 1, 8192).astype(int)
  assert binned_spearman(x, y, sample) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-3)
  # Ties have their average rank, even without a sample, if the bins separate them.
  small = slice(None, None, 1000)
  np.testing.assert_allclose(
    binned_spearman(x[small], y[small], slice(None)), stats.spearmanr(x[small], y[small]).statistic, atol=1e-9
  )


def test_ranks_by_hand():
  counts = np.array([2, 0, 1, 1])
  # Ranks 1.5, 1.5, 3, 4 of four, centred: (rank - 1/2) / 4 - 1/2.
  np.testing.assert_allclose(ranks.centred(counts)[[0, 2, 3]], [-0.25, 0.125, 0.375])
  np.testing.assert_array_equal(ranks.deciles(counts)[[0, 2, 3]], [2, 6, 8])
  edges = ranks.edges(np.array([0.3, np.nan, 0.1], np.float32))
  assert edges.shape == (ranks.BINS - 1,)
  assert (np.diff(edges[np.isfinite(edges)]) > 0).all()
  assert np.isin(np.array([0.1, 0.3], np.float32), edges).all()
  # One of two values has no order.
  assert np.isnan(ranks.correlation(np.array([2.0, 0.0, 0.0, 0.0, 0.5, 0.0])))


def test_bootstrap_interval():
  rng = np.random.default_rng(0)
  widths = []
  for groups in (40, 400):
    sums = np.stack([rng.normal(5, 1, groups) * 10, np.full(groups, 10.0)], -1)
    low, high = bootstrap.interval(sums, lambda totals: totals[:, 0] / totals[:, 1])
    estimate = sums[:, 0].sum() / sums[:, 1].sum()
    assert low < estimate < high
    # The interval of a mean of independent documents is known.
    assert high - low == pytest.approx(2 * 1.96 * (sums[:, 0] / 10).std() / np.sqrt(groups), rel=0.15)
    widths.append(high - low)
  assert widths[1] < 0.5 * widths[0]
  assert bootstrap.interval(sums[:1], lambda totals: totals[:, 0]) is None


# Given scores.


@pytest.mark.parametrize(
  ("spread", "scale"), [(2.0, 1.0), (1e-4, 1.0), (2.0, 1e-7)], ids=["plain", "collapsed", "tiny gains"]
)
def test_calibration_on_the_device(spread, scale):
  odds, target = random_scores(3000)
  odds = 6.9 + spread * (odds - 0.5)
  target = 0.25 + scale * (0.5 * target + 0.05 * np.tanh(odds - 6.9)) / 2
  got = told_statistics(scripted_batches(odds, target))
  odds, log_target = odds.astype(np.float32), np.log(target).astype(np.float32)
  gain = np.diff(np.asarray(jnp.exp(log_target)), axis=-1)
  for step, row in enumerate(got["calibration"]):
    exact = stats.spearmanr(odds[:, step], gain[:, step]).statistic
    assert row["spearman"] == pytest.approx(exact, abs=1e-3)
    assert row["interval"][0] < exact < row["interval"][1]
    assert [decile["count"] for decile in row["deciles"]] == pytest.approx([300] * 10, abs=25)
    order = np.argsort(odds[:, step], kind="stable").reshape(10, 300)
    d = special.expit(odds[:, step].astype(np.float64))
    for decile, places in zip(row["deciles"], order):
      assert decile["gain"] == pytest.approx(gain[places, step].mean(), abs=0.03 * scale)
      # The range of a bin holds its values, except for the few that share a bin with a neighbouring decile.
      inside = (d[places] >= decile["low"] - 1e-7) & (d[places] <= decile["high"] + 1e-7)
      assert inside.mean() > 0.97


def test_a_constant_decision_has_no_correlation():
  odds, target = random_scores(200)
  odds[:, 0] = 1.0
  first, second = told_statistics(scripted_batches(odds, target))["calibration"]
  assert first["spearman"] is None
  assert first["interval"] is None
  assert [row["count"] for row in first["reliability"]] == [200]
  assert second["spearman"] is not None


@pytest.mark.slow
def test_batches_devices_and_flushes_change_nothing(monkeypatch):
  odds, target = random_scores(301)
  sample = scripted_batches(odds, target, rows=8, length=8)[:2]  # the result is the same for any value
  once = jsonl.dumps(told_statistics(scripted_batches(odds, target, rows=8, length=40), sample))
  assert jsonl.dumps(told_statistics(scripted_batches(odds, target, rows=16, length=4), sample, devices=8)) == once
  monkeypatch.setattr(accumulation, "_FLUSH_NUMBERS", 32)  # after every batch
  assert jsonl.dumps(told_statistics(scripted_batches(odds, target), sample)) == once


def test_more_documents_narrow_the_intervals():
  odds, target = random_scores(4000)
  target[:, 1] = np.clip(target[:, 0] + 0.1 * np.tanh(odds[:, 0]), 0.005, 1)
  widths = []
  for count, documents in ((400, 20), (4000, 200)):
    got = told_statistics(scripted_batches(odds[:count], target[:count], documents=documents), documents=documents)
    assert got["groups"]["count"] == got["documents"] == documents
    for estimate, interval in (
      (got["perplexity"]["mixture"], got["perplexity"]["interval"]),
      (got["calibration"][0]["spearman"], got["calibration"][0]["interval"]),
    ):
      assert interval[0] < estimate < interval[1]
      widths.append(interval[1] - interval[0])
  assert widths[2] < 0.6 * widths[0]
  assert widths[3] < 0.6 * widths[1]


def test_curves_at_their_end_points():
  odds, target = random_scores(100)
  got = told_statistics(scripted_batches(odds, target))
  first, *_, last = got["curves"]["threshold"]
  slots = got["perplexity"]["slots"]
  assert (first["threshold"], first["mean_pauses"]) == (0.0, 2.0)
  assert (last["threshold"], last["mean_pauses"]) == (1.0, 0.0)
  assert first["perplexity"] == pytest.approx(slots[2], rel=1e-6)
  assert last["perplexity"] == pytest.approx(slots[0], rel=1e-6)
  half = next(row for row in got["curves"]["threshold"] if row["threshold"] == 0.5)
  assert half["perplexity"] == pytest.approx(got["perplexity"]["hard"], rel=1e-6)
  budget = got["curves"]["budget"]
  assert [row["mean_steps"] for row in budget] == [1, 1.5, 2, 2.5, 3]
  assert budget[0]["perplexity"] == pytest.approx(slots[0], rel=1e-6)
  assert budget[-1]["perplexity"] == pytest.approx(got["perplexity"]["mixture"], rel=1e-6)


def test_a_target_of_probability_0_counts_as_1024_nats(caplog):
  odds, target = random_scores(100)
  target[7] = 0.0
  got = told_statistics(scripted_batches(odds, target))
  s = np.array([reference.stopping(row, 1 - row) for row in special.expit(odds)], np.float64)
  with np.errstate(divide="ignore"):
    nats = np.minimum(-np.log((s * target).sum(-1)), 1024)
  assert got["perplexity"]["mixture"] == pytest.approx(np.exp(nats.mean()), rel=1e-4)
  assert "the loss of 1 tokens is not finite" in caplog.text
  assert json.loads(jsonl.dumps(got)) == got


# Words and types.


class Pieces:
  """A tokenizer with given pieces, in SentencePiece's notation; it takes the longest piece that fits."""

  separator_id = 0

  def __init__(self, *pieces):
    self.pieces = ["</s>", *pieces]
    self.vocab_size = len(self.pieces)

  def encode(self, text):
    ids, text = [], text.replace(" ", "▁")
    while text:
      size, token = max((len(p), i) for i, p in enumerate(self.pieces) if i and text.startswith(p))
      ids.append(token)
      text = text[size:]
    return ids

  def decode(self, ids):
    return "".join(self.pieces[i] for i in ids if i).replace("▁", " ")

  def piece(self, token):
    return self.pieces[token]


def test_words_by_hand():
  letters = [c for c in "abcdefghijklmnopqrstuvwxyzCNH"]
  tokenizer = Pieces("▁", "▁the", "▁was", "n't", "'", "-", ".", "▁won", "▁film", "s", *letters)
  words = Words(tokenizer)
  text = " the films wasn'ton won. (won)".replace("(", "-").replace(")", "-")
  ids = np.array(tokenizer.encode(text + " won"))
  pieces = [tokenizer.piece(i) for i in ids]
  assert pieces[:8] == ["▁the", "▁film", "s", "▁was", "n't", "o", "n", "▁won"]
  assert pieces[8:] == [".", "▁", "-", "w", "o", "n", "-", "▁won"]
  found, positions, classes = words.mark(np.zeros((1, words.context), int), ids[None, :-1], ids[None, 1:])
  names = [("whole", "first", "middle", "last", "other")[i] for i in positions[0]]
  assert names == [
    "whole", "first", "last", "whole", "other", "first", "last", "whole",
    "other", "other", "other", "first", "middle", "last", "other",
  ]  # fmt: skip
  # "won" after a space counts, but not after a hyphen.
  won = words.words.index(("won", "low_high"))
  assert np.flatnonzero(found[0] == won).tolist() == [7]
  assert set(found[0]) == {-1, won}
  assert [words.classes[c] if c >= 0 else None for c in classes[0]] == [
    "determiner", None, None, "verb", *[None] * 3, "verb", *[None] * 7
  ]  # fmt: skip


def test_a_word_of_several_pieces_and_across_windows():
  tokenizer = Pieces("▁", "▁was", "▁wa", *"abcdefghijklmnopqrstuvwxyzCNH'")
  words = Words(tokenizer)
  ids = np.array(tokenizer.encode(" wasn't wasnt wasn"))
  assert [tokenizer.piece(i) for i in ids[:2]] == ["▁was", "n"]
  wasn = words.words.index(("wasn", "low_low"))
  for cut in range(1, 6):
    before = np.concatenate([np.zeros(words.context, int), ids[:cut]])[None, -words.context :]
    found, positions, _ = words.mark(before, ids[None, cut:-1], ids[None, cut + 1 :])
    # "wasnt" is another word, and the last word is not in the window.
    assert (np.flatnonzero(found[0] == wasn) + cut).tolist() == [1] * (cut <= 1)
    complete = words.mark(np.zeros((1, words.context), int), ids[None, :-1], ids[None, 1:])[1]
    np.testing.assert_array_equal(positions[0], complete[0, cut:])


def test_corners_by_hand():
  tokenizer = Pieces("low", "wild", "late", "restless", "rare")
  pauses = {1: [0.5] * 8, 2: [0, 0, 0, 0, 0, 3, 3, 3], 3: [2.5] * 8, 4: [3, 3, 3, 3, 3, 0, 0, 0], 5: [1, 2]}
  bins = bins_per_pause(6, 3)
  histograms, sums = np.zeros((6, 3 * bins + 1), np.int64), np.zeros((6, 17), np.int64)
  for token, values in pauses.items():
    np.add.at(histograms[token], np.round(np.array(values) * bins).astype(int), 1)
    sums[token] = np.asarray(fixed_point.moments(jnp.array(values, jnp.float32), 4.0), np.int64).sum(0)
  types = TokenTypes(histograms, sums, 4.0, 1 / bins)
  np.testing.assert_allclose(types.median[1:], [np.median(v) for v in pauses.values()])
  np.testing.assert_allclose(types.variance[1:], [np.var(v) for v in pauses.values()], atol=1e-12)
  assert types.row(0) == {"count": 0, "median": None, "mean": None, "variance": None}
  got = summarize(types, tokenizer, min_count=8)
  assert got["eligible"] == 4
  assert got["thresholds"]["variance"] == [0.0, np.var(pauses[2])]
  corners = {name: [row["piece"] for row in rows] for name, rows in got["corners"].items()}
  # The quartiles of the medians 0, 0.5, 2.5, 3 are 0.375 and 2.625: two types are in neither quarter.
  assert corners == {"low_low": [], "low_high": ["wild"], "high_low": [], "high_high": ["restless"]}
  assert [row["piece"] for row in got["most_paused"]] == ["late", "restless", "wild", "low"]
  assert types.frequencies(6) == [
    {"low": 1, "high": 2, "types": 1, "count": 2, "mean": 1.5, "variance": 0.25},
    {"low": 3, "high": 9, "types": 4, "count": 32, "mean": 1.5, "variance": 1.625},
  ]
  nothing = summarize(types, tokenizer, min_count=100)
  assert nothing["eligible"] == 0
  assert not any(nothing["corners"].values())
  # A run with equal pauses everywhere has no corners.
  alike = TokenTypes(histograms[[1] * 6], sums[[1] * 6], 4.0, 1 / bins)
  assert not any(summarize(alike, tokenizer, min_count=1)["corners"].values())


def test_resolution_of_medians():
  assert bins_per_pause(2048, 3) == 256
  assert bins_per_pause(262_144, 3) == 16


# Methods, from a token store.

LIMIT, LENGTH, MIN_COUNT = 40, 16, 8
METHODS = {
  "cyb": {"pauses": 2, "omega": "1:2:1", "gamma": "1:1:0.5"},
  "on_policy": {"pauses": 1, "recipe": "on_policy"},
  "tbys": {"name": "tbys", "pauses": 2},
  "constant_stop": {"name": "constant_stop", "pauses": 2},
  "baseline": {"name": "baseline"},
}


def measured(name, *, limit=LIMIT, batch_size=8, devices=1, document_mask=False):
  """(statistics, method, params, store) of an untrained model on generated lookups."""
  config = tiny_config(**METHODS[name])
  config.data.document_mask = document_mask
  config = configs.freeze(config)
  store = training.open_store(config)
  method = config.build_method(store.vocab_size, data_shards=devices)
  params = initial_params(method)
  statistics = PauseStatistics(method, mesh_of(devices), store.tokenizer, min_count=MIN_COUNT)
  options = {"split": "validation", "step": 7, "limit": limit, "batch_size": batch_size}
  with jax.default_matmul_precision("highest"):
    return statistics_of_split(statistics, params, store, config, **options), method, params, store


def stream_of(store):
  return np.concatenate([np.fromfile(path, "<u2") for path in sorted(store.path.glob("validation-*.tokens"))])


def slow_tokens(method, params, store):
  """One dict per token with the method's scores in float64 and the token's categories."""
  stream = stream_of(store)
  text = "".join(chr(i) if i < 256 else "\n" for i in stream)
  # The positions of letters in words, from the text alone.
  position = ["other"] * len(text)
  for word in re.finditer(r"[a-z0-9]+", text):
    position[word.start()] = "first" if len(word[0]) > 1 else "whole"
    for i in range(word.start() + 1, word.end()):
      position[i] = "last" if i == word.end() - 1 else "middle"
  difficulty = np.fromfile(next(store.path.glob("validation-*.difficulty")), np.uint8)
  tokens = np.stack([stream[j * LENGTH : (j + 1) * LENGTH] for j in range(LIMIT)]).astype(np.int32)
  targets = np.stack([stream[j * LENGTH + 1 : (j + 1) * LENGTH + 1] for j in range(LIMIT)]).astype(np.int32)
  batch = {"tokens": tokens, "targets": targets, "weights": np.ones(tokens.shape, np.float32)}

  @jax.jit
  def predict(params, batch):
    reading = method.evaluate(params, batch)
    words = method.decoder.apply({"params": params["decoder"]}, method="unembedding")
    return reading, as_trained(method, params, batch, reading), method.hidden(params, batch), words

  with jax.default_matmul_precision("highest"):
    reading, trained, hidden, words = predict(params, batch)
  best = (np.asarray(hidden, np.float64) @ np.asarray(words, np.float64)[: store.vocab_size].T).argmax(-1)
  scores = reading.scores
  t, d = (np.exp(np.asarray(x, np.float64)) for x in (scores.log_target, scores.log_dont_know))
  rows = []
  for j in range(LIMIT):
    for k in range(LENGTH):
      place = j * LENGTH + k
      s = np.exp(np.asarray(reading.log_stopping[j, k], np.float64))
      if isinstance(method, Adaptive):
        s = np.asarray(reference.stopping(d[j, k], 1 - d[j, k]), np.float64)
      rows.append(
        {
          "t": t[j, k], "d": d[j, k], "s": s, "pauses": sum(i * x for i, x in enumerate(s)),
          "token": int(stream[place]), "position": position[place], "difficulty": int(difficulty[place + 1]),
          "document": int((stream[1 : place + 1] == 256).sum()), "correct": best[j, k] == stream[place + 1],
          "text": text[max(0, place - 12) : place + 1], "next": text[place + 1],
          "trained": None if trained is None else np.exp(np.asarray(trained.log_stopping[j, k], np.float64)),
        }
      )  # fmt: skip
  return rows


CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def check_pauses(row, pauses, resolution=1 / 256):
  assert row["count"] == len(pauses)
  if len(pauses):
    np.testing.assert_allclose([row["mean"], row["variance"]], [np.mean(pauses), np.var(pauses)], **CLOSE)
    assert row.get("median", np.median(pauses)) == pytest.approx(np.median(pauses), abs=resolution)
  else:
    assert row["mean"] is None


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=pytest.mark.slow) if name == "on_policy" else name for name in METHODS]
)
def test_against_a_slow_reference(name):
  got, method, params, store = measured(name)
  rows = slow_tokens(method, params, store)
  width = method.num_slots
  t, d, s = (np.array([row[key] for row in rows]) for key in ("t", "d", "s"))
  mixture = [-np.log(sum(row["s"] * row["t"])) for row in rows]
  assert (got["method"], got["step"], got["split"], got["limit"]) == (method.name, 7, "validation", LIMIT)
  assert (got["windows"], got["tokens"], got["num_slots"]) == (LIMIT, len(rows), width)
  assert got["documents"] == rows[-1]["document"] + 1
  assert json.loads(jsonl.dumps(got)) == got  # the result is plain JSON without nan
  perplexity = got["perplexity"]
  np.testing.assert_allclose(perplexity["mixture"], np.exp(np.mean(mixture)), **CLOSE)
  np.testing.assert_allclose(perplexity["slots"], np.exp(-np.log(t).mean(0)), **CLOSE)
  np.testing.assert_allclose(perplexity["oracle"], np.exp(-np.log(t.max(-1)).mean()), **CLOSE)
  np.testing.assert_allclose(perplexity["mean_of_logs"], np.exp(-(s * np.log(t)).sum(-1).mean()), **CLOSE)
  if name == "cyb":  # the s of training has the omega of training; its loss has the discount
    trained = np.array([row["trained"] for row in rows])
    np.testing.assert_allclose(perplexity["training"], np.exp(-np.log((trained * t).sum(-1)).mean()), **CLOSE)
    discounted = (trained * t * [1, 1, 0.5]).sum(-1)
    np.testing.assert_allclose(perplexity["loss"], np.exp(-np.log(discounted).mean()), **CLOSE)
  elif name == "on_policy":
    assert perplexity["training"] != perplexity["mixture"]
    assert perplexity["training"] == pytest.approx(perplexity["loss"])
  else:
    assert perplexity["training"] is None
    assert perplexity["loss"] == pytest.approx(perplexity["mixture"])
  if isinstance(method, Adaptive):
    hard = [next((i for i in range(width - 1) if row[i] <= 0.5), width - 1) for row in d]
    np.testing.assert_allclose(perplexity["hard"], np.exp(-np.log(t[range(len(t)), hard]).mean()), **CLOSE)
  else:
    assert perplexity["hard"] is None
  groups = got["groups"]
  for number in range(groups["count"]):
    inside = [x for x, row in zip(mixture, rows) if row["document"] == number]
    assert groups["tokens"][number] == len(inside)
    np.testing.assert_allclose(groups["nats"][number], sum(inside), **CLOSE)
  if width == 1:
    given = {"method", "step", "split", "limit", "windows", "tokens", "documents", "num_slots", "perplexity", "groups"}
    given |= {"difficulty", "fused"}
    assert got["fused"] is False
    assert {key for key, value in got.items() if value is not None} - {"limit"} == given - {"limit"}
    check_perplexity_by_difficulty(got, rows)
    for level in got["difficulty"]:
      correct = [row["correct"] for row in rows if row["difficulty"] == level["difficulty"]]
      np.testing.assert_allclose(level["accuracy"], np.mean(correct), **CLOSE)
    return
  check_latency(got["latency"], s)
  if rows[0]["trained"] is None:
    assert got["training_latency"] is None
  else:
    check_latency(got["training_latency"], np.array([row["trained"] for row in rows]))
  check_tokens(got, rows, store)
  check_difficulty(got, rows)
  if isinstance(method, Adaptive):
    check_calibration(got["calibration"], t, d)
    check_curves(got["curves"], t, d)
  else:
    assert got["calibration"] is got["curves"] is None


def check_latency(got, s):
  np.testing.assert_allclose(got["mean"], s.mean(0), **CLOSE)
  pauses = s @ np.arange(s.shape[-1])
  np.testing.assert_allclose(got["mean_pauses"], pauses.mean(), **CLOSE)
  counts, edges = np.histogram(np.clip(pauses, 0, s.shape[-1] - 1), got["histogram"]["edges"])
  assert np.diff(edges) == pytest.approx(np.full(20 * (s.shape[-1] - 1), 1 / 20))
  if len(set(pauses.round(5))) > 10:  # otherwise all values may fall on one edge
    assert abs(counts - got["histogram"]["counts"]).sum() <= 4
  assert sum(got["histogram"]["counts"]) == len(s)


def check_tokens(got, rows, store):
  types = got["types"]
  assert types["min_count"] == MIN_COUNT
  by_type = {}
  for row in rows:
    by_type.setdefault(row["token"], []).append(row["pauses"])
  assert types["eligible"] == sum(len(values) >= MIN_COUNT for values in by_type.values())
  for row in itertools.chain(types["most_paused"], types["least_paused"], *types["corners"].values()):
    check_pauses(row, by_type[row["token"]])
    assert row["piece"] == store.tokenizer.piece(row["token"])
  assert len(types["most_paused"]) == min(20, types["eligible"]) > 4
  means = [row["mean"] for row in types["most_paused"]]
  assert means == sorted(means, reverse=True)
  for row in got["word_position"]:
    check_pauses(row, [x["pauses"] for x in rows if x["position"] == row["position"]])
  assert got["word_position"][0]["count"] > 100
  for row in types["paper"]:
    after = [x["pauses"] for x in rows if x["text"].endswith(f" {row['word']}") and not x["next"].isalnum()]
    check_pauses(row, after)
  assert sum(row["count"] > 0 for row in types["paper"]) == 2  # the letters g and e
  for row in got["frequency"]:
    inside = [values for values in by_type.values() if row["low"] <= len(values) <= row["high"]]
    assert row["types"] == len(inside)
    check_pauses(row, list(itertools.chain(*inside)))
  assert sum(row["count"] for row in got["frequency"]) == len(rows)


def check_perplexity_by_difficulty(got, rows):
  assert {row["difficulty"] for row in got["difficulty"]} == {row["difficulty"] for row in rows} > {0}
  for level in got["difficulty"]:
    inside = [row for row in rows if row["difficulty"] == level["difficulty"]]
    assert level["count"] == len(inside)
    nats = np.mean([-np.log(sum(row["s"] * row["t"])) for row in inside])
    np.testing.assert_allclose(level["perplexity"], np.exp(nats), **CLOSE)


def check_difficulty(got, rows):
  check_perplexity_by_difficulty(got, rows)
  for level in got["difficulty"]:
    inside = [row for row in rows if row["difficulty"] == level["difficulty"]]
    s, correct = (np.array([row[key] for row in inside], np.float64) for key in ("s", "correct"))
    np.testing.assert_allclose(level["mean_pauses"], np.mean([row["pauses"] for row in inside]), **CLOSE)
    np.testing.assert_allclose(level["stopping"], s.mean(0), **CLOSE)
    np.testing.assert_allclose(level["slot_accuracy"], correct.mean(0), **CLOSE)
    np.testing.assert_allclose(level["accuracy"], (s * correct).sum(-1).mean(), **CLOSE)


def check_calibration(steps, t, d):
  assert [row["step"] for row in steps] == list(range(1, t.shape[-1]))
  for i, row in enumerate(steps):
    gain, better = t[:, i + 1] - t[:, i], t[:, i + 1] > t[:, i]
    assert row["spearman"] == pytest.approx(stats.spearmanr(d[:, i], gain).statistic, abs=1e-3)
    assert row["interval"][0] <= row["interval"][1]
    density = row["density"]
    counts, *_ = np.histogram2d(d[:, i], gain, [density["decision_edges"], density["gain_edges"]])
    assert abs(counts - density["counts"]).sum() <= 4
    assert np.shape(density["counts"]) == (64, 64)
    assert sum(level["count"] for level in row["reliability"]) == len(t)
    for level in row["reliability"]:
      inside = (d[:, i] >= level["low"]) & (d[:, i] < level["high"])
      assert level["count"] == pytest.approx(inside.sum(), abs=2)
      assert level["decision"] == pytest.approx(d[inside, i].mean(), abs=1e-3)
      assert level["better"] == pytest.approx(better[inside].mean(), abs=2 / inside.sum())
    # Every window is in the sample, so each bin holds one token or equal tokens.
    place = np.floor((stats.rankdata(d[:, i]) - 0.5) / len(d) * 10)
    for number, decile in enumerate(row["deciles"]):
      inside = place == number
      assert decile["count"] == pytest.approx(inside.sum(), abs=2)
      assert decile["decision"] == pytest.approx(d[inside, i].mean(), abs=1e-4)
      for key, values in (("gain", gain), ("gain_nats", np.log(t[:, i + 1] / t[:, i])), ("better", better)):
        assert decile[key] == pytest.approx(values[inside].mean(), abs=0.05)
      # Two tokens at an edge may be in the next bin, as above.
      ordered = np.sort(d[inside, i])
      assert decile["low"] <= ordered[min(2, len(ordered) - 1)] + 1e-6
      assert decile["high"] >= ordered[max(-3, -len(ordered))] - 1e-6


def check_curves(curves, t, d):
  width = t.shape[-1]
  thresholds = [row["threshold"] for row in curves["threshold"]]
  assert thresholds == sorted(thresholds)
  assert sum(d[:, :-1].min() < x < d[:, :-1].max() for x in thresholds) >= 50  # d has fine bins
  for row in curves["threshold"]:
    # A threshold equals d of a token of the sample, so rounding decides on which side the token is.
    found = []
    for threshold in (row["threshold"] - 1e-6, row["threshold"] + 1e-6):
      slots = [next((i for i in range(width - 1) if x[i] <= threshold), width - 1) for x in d]
      found.append((np.mean(slots), np.exp(-np.log(t[range(len(t)), slots]).mean())))
    (most, one), (least, other) = found
    assert least - 1e-9 <= row["mean_pauses"] <= most + 1e-9
    assert min(one, other) * (1 - 1e-3) <= row["perplexity"] <= max(one, other) * (1 + 1e-3)
  assert len(curves["budget"]) == 2 * width - 1
  for row in curves["budget"]:
    s = np.array([reference.stopping(x, 1 - x, row["omega"]) for x in d], np.float64)
    np.testing.assert_allclose(row["mean_pauses"], (s @ np.arange(width)).mean(), **CLOSE)
    np.testing.assert_allclose(row["perplexity"], np.exp(-np.log((s * t).sum(-1)).mean()), **CLOSE)
    assert row["mean_steps"] == sum((i + 1) * x for i, x in enumerate(row["omega"]))


@pytest.mark.slow
def test_devices_change_nothing():
  alone, *_ = measured("cyb")
  spread, *_ = measured("cyb", batch_size=24, devices=8)  # the last batch is padded
  assert alone["groups"]["tokens"] == spread["groups"]["tokens"]
  for key in ("mixture", "interval", "slots", "oracle"):
    np.testing.assert_allclose(alone["perplexity"][key], spread["perplexity"][key], rtol=1e-5)
  for one, other in zip(alone["calibration"], spread["calibration"]):
    assert one["spearman"] == pytest.approx(other["spearman"], abs=1e-3)
  for key in ("word_position", "difficulty"):
    assert [row["count"] for row in alone[key]] == [row["count"] for row in spread[key]]


def test_the_complete_split_and_document_mask():
  plain, *_, store = measured("baseline", limit=None)
  masked, *_ = measured("baseline", limit=10_000, document_mask=True)
  assert plain["limit"] is masked["limit"] is None
  assert plain["windows"] == masked["windows"] == store.num_windows("validation", LENGTH)
  # Every token except the first end token is a target of the document that it belongs to or ends.
  assert plain["tokens"] == store.num_tokens("validation") - 1
  assert plain["documents"] == 64
  assert plain["groups"]["tokens"] == np.diff(np.flatnonzero(stream_of(store) == 256)).tolist()
  assert masked["perplexity"]["mixture"] != plain["perplexity"]["mixture"]


def test_a_missing_split_is_refused():
  config = configs.freeze(tiny_config(**METHODS["cyb"]))
  store = training.open_store(config)
  with pytest.raises(InputError, match=r"split: 'dev' .* it has train, test, validation"):
    statistics_of_split(types.SimpleNamespace(context=1), {}, store, config, split="dev", step=0)
  with pytest.raises(InputError, match="limit: 0 must be at least 1 window"):
    statistics_of_split(types.SimpleNamespace(context=1), {}, store, config, split="test", step=0, limit=0)
