"""Forking streams, against lists of streams in float64, one row at a time; selection by hand; prefixes against the
truncated text; and copies, which do not fork."""

import dataclasses
import functools
import json
import math
import types

import cli
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, VOCABULARY, random_batch, tiny_config

from cyb_jax import configs, methods, training
from cyb_jax.configs import ParallelismConfig
from cyb_jax.decoder import DecoderConfig, empty_cache
from cyb_jax.errors import InputError
from cyb_jax.evaluation import Evaluator
from cyb_jax.methods import SlotInputs, configure
from cyb_jax.methods.slot_models.streams import select, stream_positions
from cyb_jax.partitioning.mesh import make_mesh, shardings
from cyb_jax.studies.settings import SETTINGS

THREE = dataclasses.replace(TINY, num_layers=3, num_kv_heads=2)


def drawn(method, seed=7):
  """Parameters from numpy: norm scales other than 1, and a router that decides, unlike a freshly initialised router."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-1].key in ("scale", "fork_norm"):
      return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
    size = {"fork_router": 1.5, "fork_input": 1.0}.get(path[-1].key, 0.25)
    return jnp.asarray(size * rng.normal(size=leaf.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, nn.unbox(jax.eval_shape(method.init, jax.random.key(0))))


def plain(decoder=THREE, **options):
  return methods.build(configure(**options), decoder, vocab_size=VOCABULARY)


@functools.cache
def build(decoder=THREE, name="thoughtbubbles", **options):
  method = plain(decoder, name=name, **options)
  for function in ("evaluate", "autoregressive_log_likelihood", "hidden", "loss", "extend", "hidden_slots"):
    if hasattr(method, function):
      setattr(method, function, jax.jit(getattr(method, function)))
  return method, drawn(method)


@functools.cache
def gradient_of(method):
  """The gradient of the weighted sum of losses."""

  def loss(params, batch):
    return (method.loss(params, batch, jax.random.key(0)).loss * batch["weights"]).sum()

  return jax.jit(jax.grad(loss))


# The reference: a stream is a dict with x, c and token, and a row is a list of streams.


def rms_norm(x, scale):
  return x / np.sqrt((x**2).mean() + 1e-5) * scale


def layer_norm(x, scale):
  return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * scale


def log_sigmoid(x):
  return -np.logaddexp(0.0, -x)


def turned(head, position, base=10_000.0):
  half = len(head) // 2
  angles = position * base ** (-np.arange(half) / half)
  first, second = head[:half], head[half:]
  return np.concatenate(
    [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
  )


def places(row):
  result = []
  for i, stream in enumerate(row):
    own = [j for j, other in enumerate(row) if other["token"] == stream["token"]]
    result.append(stream["token"] - 1 + (own.index(i) + 1) / len(own))
  return result


def run_layer(layer, row, segment_ids):
  """Attention and mlp, with scaled updates."""
  at = places(row)
  normed = [rms_norm(stream["x"], layer["attention_norm"]["scale"]) for stream in row]
  heads = layer["attention"]["query"]["kernel"].shape[1]
  groups, size = layer["attention"]["key"]["kernel"].shape[1:]
  made = []
  for i, stream in enumerate(row):
    update = 0
    for head in range(heads):
      group = head // (heads // groups)
      query = turned(normed[i] @ layer["attention"]["query"]["kernel"][:, head], at[i])
      logits, values = [], []
      for j in range(i + 1):
        if segment_ids is not None and segment_ids[row[j]["token"]] != segment_ids[stream["token"]]:
          continue
        key = turned(normed[j] @ layer["attention"]["key"]["kernel"][:, group], at[j])
        logits.append((query @ key + row[j]["c"]) / math.sqrt(size))
        values.append(np.exp(row[j]["c"]) * (normed[j] @ layer["attention"]["value"]["kernel"][:, group]))
      shares = np.exp(np.array(logits) - max(logits))
      update = update + (shares / shares.sum()) @ np.array(values) @ layer["attention"]["out"]["kernel"][head]
    made.append(stream["x"] + np.exp(stream["c"]) * update)
  for stream, x in zip(row, made):
    inner = rms_norm(x, layer["mlp_norm"]["scale"])
    gate = inner @ layer["mlp"]["gate"]["kernel"]
    update = (gate / (1 + np.exp(-gate)) * (inner @ layer["mlp"]["up"]["kernel"])) @ layer["mlp"]["down"]["kernel"]
    stream["x"] = x + np.exp(stream["c"]) * update


def fork(params, number, row, budget):
  """The row after a fork, and the number of forced streams whose score alone would not have been enough."""
  candidates = []
  for stream in row:
    logits = params["fork_router"][number] @ layer_norm(stream["x"], params["fork_norm"][number])
    f, k = np.maximum(log_sigmoid(logits), -20.0)
    candidates.append(stream | {"x": stream["x"] + params["fork_input"][number], "c": stream["c"] + f, "kept": False})
    candidates.append(stream | {"c": stream["c"] + k, "kept": True})
  last = {stream["token"]: i for i, stream in enumerate(candidates)}
  forced = set(last.values())
  assert all(candidates[i]["kept"] for i in forced)
  by_score = sorted(range(len(candidates)), key=lambda i: -candidates[i]["c"])
  chosen = list(forced) + [i for i in by_score if i not in forced][: budget - len(forced)]
  return [candidates[i] for i in sorted(chosen)], len(forced - set(by_score[:budget]))


def slow(method, params, tokens, targets, segment_ids=None):
  """(log-likelihoods, counters of events) of one row in which all tokens are real."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  decoder, config = params["decoder"], method.config
  row = [{"x": decoder["embedding"][token], "c": 0.0, "token": t} for t, token in enumerate(tokens)]
  budget, seen = math.floor(config.stream_budget * len(tokens) + 1e-9), {"forced": 0, "ended": 0, "dropped": 0}
  for layer in range(method.decoder.config.num_layers):
    if layer + 1 in method.slot_model.fork_layers:
      before = len(row)
      row, forced = fork(params, method.slot_model.fork_layers.index(layer + 1), row, budget)
      seen["forced"] += forced
      seen["ended"] += before - sum(stream["kept"] for stream in row)
      seen["dropped"] += 2 * before - len(row)
    run_layer(decoder[f"layers_{layer}"], row, segment_ids)
  words = decoder["embedding"][:VOCABULARY]

  def log_share(x, target):
    logits = words @ rms_norm(x, decoder["final_norm"]["scale"])
    return logits[target] - np.logaddexp.reduce(logits)

  found = []
  for t, target in enumerate(targets):
    own = [stream for stream in row if stream["token"] == t]
    weights = np.exp([stream["c"] for stream in own])
    if config.combine == "states":
      found.append(log_share(sum(w * stream["x"] for w, stream in zip(weights, own)), target))
    else:
      shares = [np.exp(log_share(stream["x"], target)) for stream in own]
      found.append(np.log(weights @ shares / weights.sum()))
  seen["streams"] = [stream["token"] for stream in row]
  return np.array(found), seen


DOCUMENTS = np.array([[0, 0, 0, 1, 1, 1, 1], [0] * 7, [0, 1, 1, 1, 1, 2, 2], [0] * 7], np.int32)
VARIANTS = {
  "three forks": {"fork_layers": (1, 2, 3)},
  "segment_ids, summed states": {"fork_layers": (2, 3), "stream_budget": 1.4, "combine": "states"},
  "budget for all": {"fork_layers": (1, 3), "stream_budget": 4.0},
}


def batch_of(variant):
  """Rows of 7 tokens; 7, 5, 6 and no tokens are real."""
  batch = random_batch(3, 4, 7)
  batch["weights"][1, 5:] = 0
  batch["weights"][2, [0, 1, 6]] = 0
  batch["weights"][3] = 0
  return batch | ({"segment_ids": DOCUMENTS} if "segment_ids" in variant else {})


def rows_of(batch):
  """(row, tokens, targets, segment_ids), the real part of each row."""
  for row, real in enumerate((7, 5, 6)):
    segment_ids = batch["segment_ids"][row] if "segment_ids" in batch else None
    yield row, batch["tokens"][row, :real], batch["targets"][row, :real], segment_ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_against_lists_of_streams(variant, exact):
  method, params = build(**VARIANTS[variant])
  batch = batch_of(variant)
  reading = method.evaluate(params, batch)
  happened = []
  for row, tokens, targets, segment_ids in rows_of(batch):
    expected, seen = slow(method, params, tokens, targets, segment_ids)
    np.testing.assert_allclose(reading.scores.log_target[row, : len(tokens), 0], expected, rtol=2e-4, atol=2e-5)
    happened.append(seen)
  assert np.isfinite(reading.loss).all()
  np.testing.assert_array_equal(reading.loss, -reading.scores.log_target[..., 0])
  # The tested events occurred; with a budget for all streams nothing was dropped.
  for name in ("forced", "ended", "dropped"):
    assert (sum(seen[name] for seen in happened) > 0) is (variant != "budget for all"), name


@pytest.mark.parametrize("variant", list(VARIANTS)[:2])
def test_prefixes_are_read_as_truncated_texts(variant, exact):
  method, params = build(**VARIANTS[variant])
  batch = batch_of(variant)
  read = method.autoregressive_log_likelihood(params, batch)
  for row, tokens, targets, segment_ids in rows_of(batch):
    expected = [slow(method, params, tokens[:n], targets[:n], segment_ids)[0][-1] for n in range(1, len(tokens) + 1)]
    np.testing.assert_allclose(read[row, : len(tokens)], expected, rtol=2e-4, atol=2e-5)
  assert np.isfinite(read).all()
  # A later token changes the predictions before it, but not those from prefixes.
  other = batch | {"tokens": batch["tokens"].copy()}
  other["tokens"][:, 4] = (other["tokens"][:, 4] + 1) % VOCABULARY
  np.testing.assert_array_equal(method.autoregressive_log_likelihood(params, other)[:, :4], read[:, :4])
  before = method.evaluate(params, batch).loss[:, :4]
  assert np.abs(method.evaluate(params, other).loss[:, :4] - before).max() > (0 if "segment_ids" in variant else 1e-3)
  np.testing.assert_allclose(read[0, -1], -method.evaluate(params, batch).loss[0, -1], rtol=1e-4)


def test_selection_by_hand():
  """The example in the module's docstring, and a second row of one real token with a budget of two."""
  token = jnp.array([[0, 0, 1, 1], [0, 0, 2, 2]])
  scores = jnp.array([[-4.0, -2, -5, -8, -3, -9, -10, -20], [-7, -6, -9, -8, 0, 0, 0, 0]])
  index, live = select(scores, token, jnp.array([4, 2]), 4, 2)
  assert index[0].tolist() == [1, 3, 4, 7]
  assert live[0].all()
  assert index[1, :2].tolist() == [1, 3]
  assert live[1].tolist() == [True, True, False, False]
  # Of streams with equal scores the left one is kept, whatever the number and the order of the rows.
  index, live = select(jnp.full((2, 8), -0.5), token.at[1].set(token[0]), jnp.array([4, 3]), 4, 2)
  assert index[0].tolist() == [0, 1, 3, 7]
  assert index[1, :3].tolist() == [0, 3, 7]
  assert live[1].tolist() == [True, True, True, False]


def test_positions_by_hand():
  token = jnp.array([[0, 1, 1, 2, 2, 2, 2, 3], [0, 0, 1, 4, 4, 4, 4, 4]])
  found = stream_positions(token, 4)
  assert found[0].tolist() == [0, 0.5, 1, 1.25, 1.5, 1.75, 2, 3]
  assert found[1, :3].tolist() == [-0.5, 0, 1]
  assert np.isfinite(found).all()


def test_one_token(exact):
  method, params = build(TINY, stream_budget=3.0)
  batch = random_batch(0, 2, 1)
  for row in range(2):
    expected, seen = slow(method, params, batch["tokens"][row], batch["targets"][row])
    np.testing.assert_allclose(-method.evaluate(params, batch).loss[row], expected, rtol=1e-4, atol=1e-5)
    assert not any(seen["streams"])
  np.testing.assert_allclose(
    method.autoregressive_log_likelihood(params, batch), -method.evaluate(params, batch).loss, rtol=1e-5
  )


def test_forks_of_negligible_weight_equal_the_baseline(exact):
  """A router solved so that f = -20 and k = 0 for every token. Heads are small, because in attention P is raised to the
  power 1 / sqrt(H).
  """
  decoder = dataclasses.replace(TINY, head_size=2)
  method, params = build(decoder, fork_layers=(1,))
  batch = random_batch(1, 1, 7)
  inputs = np.asarray(params["decoder"]["embedding"], np.float64)[batch["tokens"][0]]
  normed = np.stack([layer_norm(x, np.ones(TINY.d_model)) for x in inputs])
  solved = [np.linalg.lstsq(normed, np.full(7, wanted), rcond=None)[0] for wanted in (-60.0, 60.0)]
  params = params | {"fork_norm": jnp.ones((1, TINY.d_model)), "fork_router": jnp.asarray([solved], jnp.float32)}
  baseline, _ = build(decoder, "baseline")
  expected = baseline.evaluate(params, batch).loss
  np.testing.assert_allclose(method.evaluate(params, batch).loss, expected, rtol=1e-4)
  turned_round = params | {"fork_router": -params["fork_router"]}
  assert np.abs(method.evaluate(turned_round, batch).loss - expected).max() > 1e-2


def test_gradients_by_differences_of_the_reference(exact):
  """The layers are rematerialised."""
  method, params = build(dataclasses.replace(THREE, remat="full"), **VARIANTS["three forks"])
  batch = batch_of("three forks")
  found = gradient_of(method)(params, batch)
  rng = np.random.default_rng(0)
  exactly = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  for names in (["fork_router"], ["fork_norm", "fork_input"], ["decoder"]):
    way = {name: jax.tree.map(lambda x: rng.normal(size=x.shape), exactly[name]) for name in names}
    total = []
    for step in (1e-6, -1e-6):
      moved = {name: jax.tree.map(lambda x, v, step=step: x + step * v, exactly[name], way[name]) for name in names}
      slow_losses = [(row, slow(method, exactly | moved, *of_row)[0]) for row, *of_row in rows_of(batch)]
      total.append(-sum(x @ batch["weights"][row, : len(x)] for row, x in slow_losses))
    expected = (total[0] - total[1]) / 2e-6
    along = sum(np.vdot(a, b) for name in names for a, b in zip(*map(jax.tree.leaves, (found[name], way[name]))))
    np.testing.assert_allclose(along, expected, rtol=2e-3)
  assert (np.abs(found["fork_router"]).max((1, 2)) > 1e-3).all()
  # If all router outputs are clipped or saturated, nothing is infinite.
  steep = gradient_of(method)(params | {"fork_router": 1e4 * params["fork_router"]}, batch)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(steep))


@pytest.mark.slow
def test_evaluated_over_eight_devices(exact):
  """Both perplexities of an evaluation; tests/training/test_sharding.py covers training steps on a mesh."""
  one = {"decoder": dataclasses.replace(THREE, num_layers=1), "name": "thoughtbubbles", "stream_budget": 1.5}
  method, params = build(**one)
  batch = batch_of("one fork")
  mesh = make_mesh(ParallelismConfig(tensor=2, fsdp=2), jax.devices())
  placed = jax.device_put(params, shardings(jax.eval_shape(method.init, jax.random.key(0)), mesh))
  found = Evaluator(plain(**one), mesh).autoregressive(placed, [batch])
  found_by_name = {
    "perplexity": method.autoregressive_log_likelihood(params, batch),
    "blockwise_perplexity": -method.evaluate(params, batch).loss,
  }
  for name, log_likelihood in found_by_name.items():
    expected = np.exp(-(np.asarray(log_likelihood) * batch["weights"]).sum() / batch["weights"].sum())
    assert found[name] == pytest.approx(expected, rel=1e-5)
  assert found["perplexity"] != pytest.approx(found["blockwise_perplexity"], rel=1e-4)
  assert (found["tokens"], found["windows"]) == (7 + 5 + 4, 3)


# Copies.


def test_copies_against_lists_of_streams(exact):
  method, params = build(TINY, "copy_k", pauses=2)
  assert set(params) == {"decoder"}
  batch = random_batch(2, 2, 5) | {"segment_ids": DOCUMENTS[[0, 2], :5]}
  reading = method.evaluate(params, batch)
  decoder = jax.tree.map(lambda x: np.asarray(x, np.float64), params["decoder"])
  for row in range(2):
    streams = [
      {"x": decoder["embedding"][token], "c": 0.0, "token": t}
      for t, token in enumerate(batch["tokens"][row])
      for _ in range(3)
    ]
    for layer in range(TINY.num_layers):
      run_layer(decoder[f"layers_{layer}"], streams, batch["segment_ids"][row])
    for t, target in enumerate(batch["targets"][row]):
      for copy in range(3):
        state = rms_norm(streams[3 * t + copy]["x"], decoder["final_norm"]["scale"])
        logits = decoder["embedding"][:VOCABULARY] @ state
        expected = logits[target] - np.logaddexp.reduce(logits)
        np.testing.assert_allclose(reading.scores.log_target[row, t, copy], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(method.loss(params, batch, jax.random.key(0)).loss, -reading.scores.log_target[..., -1])


@pytest.mark.slow
def test_copies_decode_as_in_training(exact):
  method, params = build(TINY, "copy_k", pauses=2)
  batch = random_batch(4, 2, 5)
  full = method.hidden(params, batch).reshape(2, 15, -1)
  cache = empty_cache(method.cache_config, 2, 15)
  order = jnp.broadcast_to(jnp.arange(15), (2, 15))
  found = []
  for start, stop in ((0, 9), (9, 12), (12, 15)):
    places = order[:, start:stop]
    tokens = jnp.take_along_axis(batch["tokens"], places // 3, 1)
    first = jnp.full(2, start) if start else None
    hidden, cache = method.extend(params, SlotInputs(tokens, places % 3, places // 3), cache, first)
    found.append(hidden)
  np.testing.assert_allclose(jnp.concatenate(found, 1), full, rtol=1e-4, atol=1e-5)
  tokens = jnp.repeat(batch["tokens"], 3, 1)
  mask = (order[0][:, None] >= order[0])[None, None]
  slots = method.hidden_slots(params, SlotInputs(tokens, order % 3, order // 3), mask)
  np.testing.assert_allclose(slots, full, rtol=1e-4, atol=1e-5)


# Costs.


def test_where_streams_fork():
  """The published layers if there are enough layers; before the first layer only if there is no other layer."""
  published = {6: (3, 5), 7: (3, 5), 8: (3, 5), 11: (3, 7, 11), 12: (3, 7, 11), 24: (3, 7, 11), 36: (3, 7, 11)}
  ours = {1: (1,), 2: (2,), 3: (2, 3), 4: (2, 3, 4), 5: (2, 3, 5), 9: (3, 7), 10: (3, 7)}
  for layers, forks in (published | ours).items():
    decoder = dataclasses.replace(TINY, num_layers=layers)
    assert plain(decoder, name="thoughtbubbles").slot_model.fork_layers == forks


def test_costs_by_hand():
  four = {"decoder": dataclasses.replace(TINY, num_layers=4), "name": "thoughtbubbles", "stream_budget": 3.0}
  method = plain(fork_layers=(2, 4), **four)
  # 10 tokens: one layer of 10 streams, two of 20, one of 30.
  assert method.slot_model.segments(10) == [(0, 1, 10), (1, 3, 20), (3, 4, 30)]
  assert method.costs(10).forward_slots == method.costs(10).train_slots == (10 + 40 + 30) / 4
  cost = method.costs(10).forward
  # query and out 16 x 16, key and value 16 x 8, mlp 3 x 16 x 24.
  assert cost.matrices == 2 * (2 * 256 + 2 * 128 + 3 * 384) * 8
  assert cost.attention == pytest.approx(4 * 16 * (5.5 + 4 * 10.5 + 3 * 15.5))
  assert cost.readout == 3 * 2 * 16 * 32
  assert cost.routing == 2 * 2 * 16 * (1 + 2)
  assert method.costs(10).inference == cost
  # Token by token: prefixes of 1 and 2 tokens, each in a new pass except for the first layer, which is cached.
  alone = method.costs(2).autoregressive
  assert alone.matrices == pytest.approx(cost.matrices / 8 * (8 + 1 + 2 * 7) / 2)
  assert alone.attention == pytest.approx(4 * 16 * ((1 + 4 * 1.5 + 3 * 2) + 2 + 2 * (4 * 2.5 + 3 * 3.5)) / 2)
  assert alone.routing == pytest.approx(2 * 2 * 16 * ((1 + 2) + (1 + 2 * 2)) / 2)
  assert alone.readout == pytest.approx(cost.readout)  # of the last token of each prefix
  # Below five tokens the budget allows no fork: 4 layers, 3 of which run for all tokens; then 6 and 7 streams after the
  # first layer.
  scant = plain(fork_layers=(2, 4), **four | {"stream_budget": 1.2}).costs(6).autoregressive
  assert scant.matrices == pytest.approx(cost.matrices / 8 * (4 + 3 * (1 + 2 + 3 + 4) + (1 + 18) + (1 + 21)) / 6)
  states = plain(fork_layers=(2, 4), combine="states", **four)
  assert states.costs(10).forward.readout == 2 * 16 * 32
  # The budget of a longer text, to within one stream.
  assert plain(name="thoughtbubbles", stream_budget=2.3).slot_model.budgets(10).tolist() == [
    0,
    2,
    4,
    6,
    9,
    11,
    13,
    16,
    18,
    20,
    23,
  ]
  copies = plain(name="copy_k", pauses=2)
  assert copies.costs(10).inference.readout == 2 * 16 * 32
  assert copies.costs(10).autoregressive == copies.costs(10).inference
  assert copies.costs(10).inference.matrices == 3 * plain(name="baseline").costs(10).forward.matrices


@pytest.mark.parametrize(
  ("options", "fields"),
  [
    ({"name": "thoughtbubbles", "fork_layers": (1,), "stream_budget": 3.0}, {"num_layers": 1}),
    pytest.param(
      {"name": "thoughtbubbles", "fork_layers": (2,), "combine": "states"}, {"remat": "full"}, marks=pytest.mark.slow
    ),
    ({"name": "copy_k", "pauses": 2}, {"num_layers": 1}),
  ],
)
def test_executed_agrees_with_xla(options, fields):
  sizes = dict(num_layers=2, d_model=256, num_heads=4, num_kv_heads=4, head_size=64, mlp_size=768)
  decoder = DecoderConfig(vocab_size=512, **sizes | fields)
  method = methods.build(configure(**options), decoder, chunk_size=2**20)
  params = nn.unbox(jax.eval_shape(method.init, jax.random.key(0)))
  rows, weights = jax.ShapeDtypeStruct((2, 16), jnp.int32), jax.ShapeDtypeStruct((2, 16), jnp.float32)
  batch = {"tokens": rows, "targets": rows, "weights": weights}

  def loss(params, batch):
    return method.loss(params, batch, jax.random.key(0)).weighted_sum(batch["weights"])

  def counted(function):
    return jax.jit(function).lower(params, batch).compile().cost_analysis()["flops"] / (2 * 16)

  if "combine" in options:
    reading = counted(lambda params, batch: method.evaluate(params, batch).loss)
    assert method.costs(16).forward_executed.total == pytest.approx(reading, rel=0.03)
  cost = method.costs(16).train_executed
  # The mixture of streams needs the logits twice, but the softmax of so few slots is kept.
  again = cost.readout / 4 if options.get("combine", "") != "states" and options["name"] == "thoughtbubbles" else 0
  assert cost.total - again == pytest.approx(counted(jax.grad(loss)), rel=0.03)


BAD = [
  ({"pauses": 1}, r"method.pauses: unknown field; method 'thoughtbubbles' has no such option"),
  ({"combine": "sum"}, r"method.combine: 'sum' must be one of probabilities, states"),
  ({"stream_budget": 0.5}, r"method.stream_budget: 0.5 must be finite and more than 1"),
  ({"stream_budget": math.inf}, r"method.stream_budget: inf must be finite"),
  ({"stream_budget": math.nan}, r"method.stream_budget: nan must be finite"),
  ({"stream_budget": 1.0}, r"method.stream_budget: 1.0 must be finite and more than 1; with 1 nothing can fork"),
  ({"fork_layers": (3, 2)}, r"method.fork_layers: '3:2' must be numbers of layers, each once and in order"),
  ({"fork_layers": (0, 2)}, r"method.fork_layers: '0:2' must"),
  ({"fork_layers": (2, 2)}, r"method.fork_layers: '2:2' must"),
  ({"fork_layers": (5,)}, r"method.fork_layers: '5' must .* such as '2:3'"),
  ({"fork_layers": ()}, r"method.fork_layers: '' must"),
  ({"omega": (1.0,)}, r"method.omega: .* method 'thoughtbubbles' has no such option"),
  ({"decoder": {"scan_layers": True}}, r"decoder.scan_layers: True, but method 'thoughtbubbles' forks streams between"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options(options, message):
  options = {"name": "thoughtbubbles"} | options
  decoder = dataclasses.replace(THREE, **options.pop("decoder", {}))
  with pytest.raises(InputError, match=message):
    methods.build(configure(**options), decoder)


def test_budgets_without_a_fork_are_refused_before_anything_runs():
  method = plain(name="thoughtbubbles", stream_budget=1.1)
  with pytest.raises(
    InputError,
    match=r"method.stream_budget: 1.1 streams per token allow 7 streams in a window of 7 tokens, so that nothing can",
  ):
    method.costs(7)
  with pytest.raises(InputError, match=r"set at least 1.14286"):
    jax.eval_shape(method.evaluate, drawn(method), random_batch(0, 1, 7))
  assert method.slot_model.segments(10)[-1].streams == 11
  with pytest.raises(InputError, match=r"method.pauses: 0 must be a whole number of at least 1"):
    methods.build(configure(name="copy_k", pauses=0), TINY)
  with pytest.raises(InputError, match=r"method.stream_budget: unknown field; method 'copy_k' has no such option"):
    methods.build(configure(name="copy_k", pauses=1, stream_budget=4.0), TINY)


def test_budgets_that_no_number_of_forks_fills_are_refused():
  data = types.SimpleNamespace(splits=())
  method = plain(name="thoughtbubbles", fork_layers=(2,), stream_budget=2.5)
  message = r"method.stream_budget: 2.5, but 1 fork gives a token at most 2 streams; set at most 2, or more layers"
  with pytest.raises(InputError, match=message):
    method.validate_data(data, 8)
  method.validate_data(None, 8)  # a run of an earlier version
  plain(name="thoughtbubbles", fork_layers=(2,), stream_budget=2.0).validate_data(data, 8)
  plain(name="thoughtbubbles", fork_layers=(2, 3), stream_budget=4.0).validate_data(data, 8)


def test_settings_and_initial_values():
  budgets = {name: plain(**SETTINGS[name]).config.stream_budget for name in ("thoughtbubbles", "thoughtbubbles4")}
  assert budgets == {"thoughtbubbles": 2.0, "thoughtbubbles4": 4.0}
  assert plain(**SETTINGS["copy_k"]).num_slots == 4
  own = nn.unbox(jax.jit(plain(**SETTINGS["thoughtbubbles"]).slot_model.init)(jax.random.key(0)))
  assert {name: x.shape for name, x in own.items()} == {
    "fork_norm": (2, 16), "fork_router": (2, 2, 16), "fork_input": (2, 16),
  }  # fmt: skip
  assert (own["fork_norm"] == 1).all()
  assert 0.01 < own["fork_router"].std() < 0.03
  assert 0.15 < own["fork_input"].std() < 0.35


@pytest.mark.slow
def test_programs(tmp_path):
  """Trained, evaluated and reported; only the last evaluation runs token by token."""
  config = tiny_config(name="thoughtbubbles")
  config.data.document_mask = True
  config.train.update(steps=4, eval_every=2, checkpoint_every=0)
  record = training.train(configs.freeze(config), tmp_path / "run")
  assert record["autoregressive"]["windows"] == 16
  assert record["autoregressive"]["tokens"] == 256
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [line["autoregressive"] is None for line in lines if line["split"] == "validation"] == [True, False]
  again, _ = cli.run("evaluate", f"--workdir={tmp_path}/run", "--limit=20", "--autoregressive_windows=3")
  assert again["autoregressive"]["windows"] == 3
  none, _ = cli.run("evaluate", f"--workdir={tmp_path}/run", "--limit=2", "--autoregressive_windows=0")
  assert none["autoregressive"] is None
  cli.run("report", f"--workdir={tmp_path}/run", "--limit=4")
  statistics = json.loads((tmp_path / "run" / "report" / "statistics.json").read_text())
  assert statistics["autoregressive"]["windows"] == 4
  page = (tmp_path / "run" / "report" / "index.html").read_text()
  assert "Autoregressive perplexity" in page
  config.method = tiny_config(name="copy_k", pauses=1).method
  config.train.update(steps=1)
  assert training.train(configs.freeze(config), tmp_path / "copies")["autoregressive"] is None
  refused = cli.complaint("evaluate", f"--workdir={tmp_path}/copies", "--autoregressive_windows=3")
  assert refused == "--autoregressive_windows: 3, but method 'copy_k' is causal; omit it"
