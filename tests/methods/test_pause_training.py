"""Pause-training: the places of pauses and the slots that are read, against slots that are laid out in Python; text
that is generated and scored after a prompt with pauses."""

import dataclasses
import functools
import json
import math
import re

import cli
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, VOCABULARY, assert_trees_close, build, random_batch, tiny_config
from scipy import stats

from cyb_jax import configs, data, methods, training
from cyb_jax.configs import ParallelismConfig
from cyb_jax.decoder import Decoder, DecoderConfig
from cyb_jax.errors import InputError
from cyb_jax.evaluation import Evaluator
from cyb_jax.generation import Sampler, SamplingOptions, Scorer
from cyb_jax.generation.abilities import with_prompt_pauses
from cyb_jax.interop import pretrained
from cyb_jax.methods import configure
from cyb_jax.partitioning.mesh import make_mesh
from cyb_jax.pauses import lengths_after_prefixes, lengths_at_random, pack
from cyb_jax.studies import settings
from cyb_jax.training.metrics import read_metrics

PAUSE = -1
DECODER = Decoder(TINY)


def model(places="random", pauses=2, decoder=TINY, **options):
  method, params = build(decoder, name="pause_training", pauses=pauses, pause_places=places, **options)
  method.evaluate = jax.jit(method.evaluate)
  return method, params


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(decoder, params, stream, mask):
  variables = {"params": params["decoder"]}
  words = decoder.apply(variables, jnp.maximum(stream, 0), method="embed")
  inputs = jnp.where((stream == PAUSE)[:, None], params["pause_input"], words)
  hidden = decoder.apply(variables, inputs[None], jnp.arange(len(stream))[None], mask=mask[None, None])[0]
  return hidden, decoder.apply(variables, method="unembedding")


def logits(method, params, stream, segment_ids=None, size=48):
  """f64[S, V]: the decoder's logits at each slot of a row whose slots are tokens or PAUSE."""
  mask = np.tril(np.ones((size, size), bool))
  if segment_ids is not None:
    mask[: len(stream), : len(stream)] &= np.equal.outer(segment_ids, segment_ids)
  # Attention is causal, so the padding at the end is not seen.
  hidden, unembedding = hidden_of(DECODER, params, np.pad(stream, (0, size - len(stream))), mask)
  return (np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64)[:VOCABULARY].T)[: len(stream)]


def log_softmax(logits):
  return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def by_hand(method, params, tokens, targets, counts, cut, segment_ids=None):
  """-log p of each target of a row, given the number of pauses after each token; None for a token that is cut off."""
  stream, numbers, places = [], [], []
  for i, token in enumerate(tokens):
    stream += [int(token), *[PAUSE] * int(counts[i])]
    numbers += [0 if segment_ids is None else int(segment_ids[i])] * (1 + int(counts[i]))
    places.append(len(stream) - 1)
  slot_logits = logits(method, params, stream[:cut], None if segment_ids is None else numbers[:cut])
  return [
    -log_softmax(slot_logits[place])[target] if place < cut else None
    for place, target in zip(places, targets, strict=True)
  ]


def check(method, params, batch, counts, cut, found, kept):
  """Compares the losses of each row with those of `by_hand`."""
  for row in range(len(counts)):
    segment_ids = batch["segment_ids"][row] if "segment_ids" in batch else None
    expected = by_hand(method, params, batch["tokens"][row], batch["targets"][row], counts[row], cut, segment_ids)
    np.testing.assert_array_equal(kept[row], [value is not None for value in expected])
    for value, loss in zip(expected, found[row], strict=True):
      if value is not None:
        np.testing.assert_allclose(loss, value, rtol=2e-5)


# Places of pauses.


def test_which_slot_is_read_for_each_token():
  # a p b p p c d in a row that is cut to 6 slots: a is read at 1, b at 4, c at 5, and d is cut off.
  packing = pack(jnp.array([[2, 3, 1, 1]]), 3, 6)
  assert packing.token.tolist() == [[0, 0, 1, 1, 1, 2]]
  assert packing.slot.tolist() == [[0, 1, 0, 1, 2, 0]]
  assert packing.places[..., -1].tolist()[0][:3] == [1, 4, 5]
  assert packing.kept.tolist() == [[True, True, True, False]]


def test_places_are_drawn_uniformly():
  """There are 10 ways of placing 2 pauses after the first of 4 tokens; each occurs in a tenth of the rows."""
  tokens = jnp.array(np.random.default_rng(0).integers(0, 1000, (5000, 4)))
  lengths = np.asarray(lengths_at_random(jax.random.key(0), tokens, 2))
  assert (lengths.sum(-1) == 6).all()
  ways, counts = np.unique(lengths, axis=0, return_counts=True)
  assert len(ways) == math.comb(5, 2)
  assert stats.chisquare(counts).pvalue > 1e-3
  # The draw depends only on the row's tokens and the key, not on the row's index in the batch.
  order = np.random.default_rng(1).permutation(len(tokens))
  np.testing.assert_array_equal(lengths_at_random(jax.random.key(0), tokens[order], 2), lengths[order])
  assert (lengths_at_random(jax.random.key(1), tokens, 2) != lengths).any()
  np.testing.assert_array_equal(lengths_at_random(jax.random.key(0), tokens, 0), 1)


def test_prefixes_by_hand():
  def lengths(weights, most=9):
    found = lengths_after_prefixes(jnp.array([weights], jnp.float32), 3, most)
    return [x.tolist()[0] for x in found]

  # Two targets with weight begin in each row; the first row's first target begins before the row.
  assert lengths([0, 0, 1, 1, 0, 1]) == [[1, 1, 4, 1, 1, 4], [True] * 6]
  assert lengths([1, 0, 0, 1, 0, 0]) == [[1, 1, 1, 4, 1, 1], [True] * 6]
  assert lengths([1, 1, 1, 1, 1, 1]) == [[1] * 6, [True] * 6]
  assert lengths([0, 1, 0, 1, 0, 1], most=2) == [[1, 4, 1, 4, 1, 1], [True] * 5 + [False]]
  assert lengths([0, 1, 0], most=0) == [[1, 1, 1], [True, False, False]]


# Training and evaluation.


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_random_against_a_stream_in_python(masked, exact):
  method, params = model(pause_fraction=0.4)
  batch = random_batch(length=10)
  if masked:
    batch["segment_ids"] = np.cumsum(batch["tokens"] % 5 == 0, -1).astype(np.int32)
  key = jax.random.key(3)
  counts = np.asarray(lengths_at_random(key, batch["tokens"], 4)) - 1
  losses = method.loss(params, batch, key)
  assert (counts.sum(-1) == 4).all()
  check(method, params, batch, counts, 10, losses.loss, losses.kept)
  np.testing.assert_array_equal(losses.slots, counts + 1)
  np.testing.assert_array_equal(losses.log_likelihood, -losses.loss)
  assert 0 < (~losses.kept).sum() <= 4 * 4
  # Evaluation reads the text without pauses, and with pauses without cutting tokens off.
  reading = method.evaluate(params, batch)
  check(method, params, batch, 0 * counts, 10, reading.loss, np.ones((4, 10), bool))
  trained = method.evaluate_as_trained(params, batch, reading)
  counts = np.asarray(lengths_at_random(jax.random.key(0), batch["tokens"], 4)) - 1
  check(method, params, batch, counts, 14, trained.loss, np.ones((4, 10), bool))


def prefix_batch(rows=3, length=32):
  """Two documents in each row, each a prefix and a target, at different places; the last row has a third document."""
  batch = random_batch(5, rows, length)
  weights = np.zeros((rows, length), np.float32)
  segment_ids = np.zeros((rows, length), np.int32)
  for row in range(rows):
    weights[row, 4 + row : 7 + row] = weights[row, 15:18] = 1
    segment_ids[row, 7 + row :] = 1
  weights[-1, 24:26] = 1
  return batch | {"weights": weights, "segment_ids": segment_ids}


@pytest.mark.parametrize("masked", [False, True])
def test_prefixes_against_a_stream_in_python(masked, exact):
  method, params = model("prefix", pauses=3)
  batch = prefix_batch()
  if not masked:
    del batch["segment_ids"]
  losses, reading = method.loss(params, batch, jax.random.key(0)), method.evaluate(params, batch)
  counts = np.zeros((3, 32), int)
  counts[[0, 1, 2], [4, 5, 6]] = counts[:, 15] = 3
  kept = np.ones((3, 32), bool)
  check(method, params, batch, counts, 99, losses.loss, kept)
  # The row has no slots for the pauses of a third prefix within 32 tokens, so its target has no weight; evaluation
  # reads the target.
  kept[2, 24:] = False
  np.testing.assert_array_equal(losses.kept, kept)
  check(method, params, batch, counts, 99, reading.loss, np.ones((3, 32), bool))
  np.testing.assert_array_equal(reading.slots, counts + 1)


def test_a_packed_document_is_read_independently(exact):
  method, params = model("prefix", pauses=3)
  batch = prefix_batch()
  losses = method.loss(params, batch, jax.random.key(0)).loss
  for row in range(2):
    own = slice(7 + row, 32)
    alone = {name: np.roll(x[row : row + 1], -own.start, 1) for name, x in batch.items()}
    found = method.loss(params, alone, jax.random.key(0)).loss
    np.testing.assert_allclose(found[0, : 32 - own.start], losses[row, own], rtol=2e-5)
  # Without the mask the results differ.
  del batch["segment_ids"]
  assert np.abs(method.loss(params, batch, jax.random.key(0)).loss - losses)[:, 10:].max() > 1e-3


def test_none_is_the_baseline():
  method, params = model("none", pauses=0)
  baseline, _ = build(name="baseline")
  assert set(params) == {"decoder"}
  batch = prefix_batch()
  found, expected = (m.loss(params, batch, jax.random.key(0)) for m in (method, baseline))
  assert found.kept is None
  np.testing.assert_array_equal(found.loss, expected.loss)
  # With pauses at inference there is a pause row, which training does not change.
  method, params = model("none", pauses=4)
  assert params["pause_input"].shape == (1, TINY.d_model)
  np.testing.assert_array_equal(method.loss(params, batch, jax.random.key(0)).loss, expected.loss)


@pytest.mark.slow
@pytest.mark.parametrize("places", ["random", "prefix"])
def test_the_pause_is_trained(places):
  method, params = model(places, pause_fraction=0.3 if places == "random" else 0.1)
  batch = prefix_batch()

  @jax.jit
  def loss(params):
    losses = method.loss(params, batch, jax.random.key(0))
    return (losses.loss * batch["weights"] * losses.kept).sum()

  gradient = jax.grad(loss)(params)
  assert np.abs(gradient["pause_input"]).max() > 1e-4
  # By central differences, in one direction.
  direction = jax.random.normal(jax.random.key(1), params["pause_input"].shape)

  def moved(step):
    return loss(params | {"pause_input": params["pause_input"] + step * direction})

  slope = (moved(2e-3) - moved(-2e-3)) / 4e-3
  np.testing.assert_allclose((gradient["pause_input"] * direction).sum(), slope, rtol=2e-2)


@pytest.mark.parametrize(
  ("strategy", "accumulate"),
  [pytest.param(*x, marks=pytest.mark.slow) for x in (("jit", 2), ("jit", 1), ("pmap", 1))],
)
def test_a_step_is_the_same_on_any_number_of_devices(strategy, accumulate):
  config = tiny_config(name="pause_training", pause_fraction=0.3)
  config.parallelism.strategy = strategy
  config.optimizer.accumulate = accumulate
  states = []
  for devices, parts in ((4 // accumulate, accumulate), (1, 1)):
    config.optimizer.accumulate = parts
    frozen = configs.freeze(config)
    mesh = make_mesh(frozen.parallelism, jax.devices()[:devices])
    method = frozen.build_method(257)
    run = training.build_strategy(frozen, method, training.make_optimizer(frozen.optimizer, 5, 16), mesh)
    state = run.step(run.init(), run.shard_batch(random_batch(batch_size=8, length=16)))
    states.append(jax.device_get(run.global_state(state)))
  many, one = states
  assert one.totals.dropped == many.totals.dropped > 0
  assert one.totals.tokens + one.totals.dropped == 8 * 16
  np.testing.assert_allclose(many.totals.loss, one.totals.loss, rtol=1e-5)
  assert_trees_close(many.params, one.params, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_scanned_layers_and_remat_give_equal_results():
  plain, params = model(pause_fraction=0.3)
  scanned, _ = model(pause_fraction=0.3, decoder=dataclasses.replace(TINY, scan_layers=True, remat="full"))
  layers = jax.tree.map(lambda *x: jnp.stack(x), *(params["decoder"][f"layers_{i}"] for i in range(TINY.num_layers)))
  decoder = {k: v for k, v in params["decoder"].items() if not k.startswith("layers")} | {"layers": layers}
  batch = random_batch()
  found = scanned.loss(params | {"decoder": decoder}, batch, jax.random.key(0))
  np.testing.assert_allclose(found.loss, plain.loss(params, batch, jax.random.key(0)).loss, rtol=1e-5)


@pytest.mark.slow
def test_evaluation_reports_both_perplexities():
  """The perplexity without pauses, and the perplexity with pauses drawn with a fixed seed."""
  method, params = model(pause_fraction=0.4)
  batch = random_batch(length=10)
  mesh = make_mesh(ParallelismConfig(), jax.devices()[:1])
  got = Evaluator(method, mesh)(params, [batch])
  reading = method.evaluate(params, batch)
  trained = method.evaluate_as_trained(params, batch, reading)
  np.testing.assert_allclose(got["perplexity"], np.exp(reading.loss.mean()), rtol=1e-5)
  np.testing.assert_allclose(got["training_omega"]["perplexity"], np.exp(trained.loss.mean()), rtol=1e-5)
  assert got["loss_perplexity"] == pytest.approx(got["training_omega"]["perplexity"])
  assert got["training_omega"]["perplexity"] != got["perplexity"]
  assert got["inference_slots"] is None
  # For a model that pauses after prefixes, the cost of a token with pauses, whether or not the token has weight.
  method, params = model("prefix", pauses=3)
  got = Evaluator(method, mesh)(params, [prefix_batch()])
  assert got["inference_slots"] == pytest.approx((96 + 6 * 3) / 96)
  assert got["training_omega"] is None


# After a prompt.

PROMPTS = [[5], [1, 7, 2, 9], [8, 6, 0, 11, 12, 13, 2]]


@pytest.mark.parametrize("pauses", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_text_generated_after_pauses_equals_a_slow_loop(pauses, exact):
  method, params = model("random", pauses=pauses)
  generation = Sampler(method, SamplingOptions(mode="none", temperature=0)).generate(params, PROMPTS, max_new_tokens=4)
  for row, prompt in enumerate(PROMPTS):
    stream, tokens, log_probs = [*prompt, *[PAUSE] * pauses], [], []
    for _ in range(4):
      of_vocabulary = log_softmax(logits(method, params, stream)[-1])
      tokens.append(int(of_vocabulary.argmax()))
      log_probs.append(of_vocabulary.max())
      stream.append(tokens[-1])
    assert generation.tokens[row] == tokens
    np.testing.assert_allclose(generation.log_probs[row], log_probs, atol=1e-5)
    assert generation.pauses[row] == [pauses, 0, 0, 0]
    assert generation.slots[row] == 4 + pauses


@pytest.mark.slow
def test_a_different_number_of_pauses_at_inference():
  method, params = model("prefix", pauses=3)
  fewer, _ = model("prefix", pauses=1)
  batch = prefix_batch()
  other = method.with_prompt_pauses(1)
  assert other.prompt_pauses == 1
  np.testing.assert_allclose(other.evaluate(params, batch).loss, fewer.evaluate(params, batch).loss, rtol=1e-5)
  none = method.with_prompt_pauses(0)
  np.testing.assert_allclose(
    none.evaluate(params, batch).loss, model("none", 0)[0].evaluate(params, batch).loss, rtol=1e-5
  )
  with pytest.raises(InputError, match=r"--pauses: 2 is set, but the run has no learned pause"):
    model("none", pauses=0)[0].with_prompt_pauses(2)
  with pytest.raises(InputError, match=r"--pauses: 2 is set, but method 'looped' has no pauses between a prompt"):
    with_prompt_pauses(build(name="looped", pauses=1)[0], 2)


def test_scores_after_pauses_equal_a_slow_loop(exact):
  method, params = model("prefix", pauses=3)
  shared = [3, 1, 4, 1]
  requests = [(shared, [9, 2]), (shared, [6]), ([], [5, 3]), ([7] * 30, [8, 9]), ([2, 7], [1, 8, 2])]
  scores = Scorer(method, params, context=12, start_id=0).score(requests)
  for (context, continuation), score in zip(requests, scores, strict=True):
    context = (context or [0])[-(13 - len(continuation)) :]
    stream = [*context, *[PAUSE] * 3, *continuation]
    slot_logits = logits(method, params, stream)[len(context) + 2 : -1]
    words = [log_softmax(row) for row in slot_logits]
    expected = sum(row[word] for row, word in zip(words, continuation, strict=True))
    np.testing.assert_allclose(score.log_likelihood, expected, rtol=1e-5)
    assert score.greedy == all(row.argmax() == word for row, word in zip(words, continuation, strict=True))
    assert (score.tokens, score.pauses) == (len(continuation), 3)
  # All continuations share a context of 4 tokens and 3 pauses, and each runs all of its tokens except the last.
  assert [score.slots for score in scores[:3]] == [3.5 + 1, 3.5, 1 + 3 + 1]
  # A text that is scored completely has no prompt.
  plain = Scorer(method.with_prompt_pauses(0), params, context=12, start_id=0)
  texts = [list(range(1, 9)), list(range(20))]
  for a, b in zip(Scorer(method, params, context=12, start_id=0).score_rolling(texts), plain.score_rolling(texts)):
    assert a == b
  # A continuation that is longer than the context has the pauses once.
  long = Scorer(method, params, context=12, start_id=0).score([(shared, list(range(20)))])[0]
  assert (long.tokens, long.pauses) == (20, 3)
  first = Scorer(method, params, context=12, start_id=0).score([(shared, list(range(9)))])[0]
  assert first.log_likelihood > long.log_likelihood


# Costs.


@pytest.mark.parametrize("places", ["random", "prefix"])
@pytest.mark.slow
def test_executed_agrees_with_xla(places):
  config = DecoderConfig(
    vocab_size=512, num_layers=1, d_model=256, num_heads=4, num_kv_heads=4, head_size=64, mlp_size=768
  )
  method = methods.build(configure(name="pause_training", pauses=10, pause_places=places), config, chunk_size=2**20)
  params = nn.unbox(jax.eval_shape(method.init, jax.random.key(0)))
  rows, weights = jax.ShapeDtypeStruct((2, 64), jnp.int32), jax.ShapeDtypeStruct((2, 64), jnp.float32)
  batch = {"tokens": rows, "targets": rows, "weights": weights}

  def counted(function):
    return jax.jit(function).lower(params, batch).compile().cost_analysis()["flops"] / (2 * 64)

  def evaluated(params, batch):
    output = method.evaluate(params, batch)
    again = method.evaluate_as_trained(params, batch, output)
    return output.loss, None if again is None else again.loss

  costs = method.costs(64)
  assert costs.forward_executed.total * costs.evaluation_passes == pytest.approx(counted(evaluated), rel=0.03)
  step = counted(jax.grad(lambda params, batch: method.loss(params, batch, jax.random.key(0)).loss.sum()))
  # XLA unrolls a scan of one chunk and then reuses the logits.
  again = costs.forward.readout
  assert costs.train_executed.total - again == pytest.approx(step, rel=0.03)


def test_cost_by_hand():
  plain = build(name="baseline")[0]
  random, prefix = model("random")[0], model("prefix", pauses=10)[0]
  assert random.costs(64).train_slots == 64
  assert random.costs(64).train == plain.costs(64).train
  assert random.costs(64).inference == plain.costs(64).inference
  # The second pass of an evaluation with random pauses has rows of 64 tokens and 6 pauses.
  assert random.costs(64).evaluation_passes * random.costs(64).forward_slots == 64 + 70
  twice, once = random.costs(64).forward, plain.costs(64).forward
  assert twice.matrices == pytest.approx(once.matrices * (1 + 70 / 64) / 2)
  assert twice.attention == pytest.approx(once.attention * (1 + 70 / 64 * 71 / 65) / 2)
  assert twice.readout == once.readout
  # Slots for the pauses of three prefixes in 64 tokens.
  assert prefix.costs(64).train_slots == 64 + 30
  cost, once = prefix.costs(64).forward, plain.costs(64).forward
  assert cost.matrices == pytest.approx(once.matrices * 94 / 64)
  assert cost.attention == pytest.approx(once.attention * 94 / 64 * 95 / 65)
  assert cost.readout == once.readout
  assert plain.costs(64).trained_tokens == prefix.costs(64).trained_tokens == 64
  assert prefix.costs(64, slots=6.0).inference.matrices == pytest.approx(6 * once.matrices)


def test_trained_tokens_is_the_mean_number_of_kept_tokens():
  method = model("random")[0]
  tokens = jnp.asarray(np.random.default_rng(0).integers(VOCABULARY, size=(4096, 32)))
  kept = pack(lengths_at_random(jax.random.key(0), tokens, 3), 4, 32).kept.sum(-1)
  assert method.costs(32).trained_tokens == pytest.approx(1 + (31 * 31 - 3) / 34)
  assert method.costs(32).trained_tokens == pytest.approx(float(kept.mean()), rel=2e-3)


# End to end.


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"places": "often"}, "method.pause_places: 'often' must be one of random, prefix, none"),
    ({"pause_fraction": 1.0}, "method.pause_fraction: 1.0 must be inside (0, 1)"),
    ({"places": "prefix", "pause_fraction": 0.2}, "method.pause_fraction: 0.2 is set, but method.pause_places"),
    ({"pauses": -1}, "method.pauses: -1 must be a whole number"),
    ({"recipe": "sampled"}, "method.recipe: unknown field; method 'pause_training' has no such option"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(InputError, match=re.escape(message)):
    model(**options)
  with pytest.raises(InputError, match=r"method.pause_places: unknown field; method 'baseline' has no such option"):
    build(name="baseline", pause_places="none")


def test_mode_constant_is_refused():
  with pytest.raises(
    InputError, match=r"mode: 'constant' runs the same pauses after every token, but method 'pause_tr"
  ):
    Sampler(model()[0], SamplingOptions(mode="constant"))


def test_a_task_without_targets_is_refused_before_anything_is_written(tmp_path, monkeypatch):
  config = tiny_config(name="pause_training", pause_places="prefix")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  with pytest.raises(InputError, match=r"data.task: 'synthetic_lookups' has no prefixes and targets"):
    training.train(configs.freeze(config), tmp_path / "run")
  assert not list(tmp_path.glob("cache/**/*.tokens"))
  store = data.prepare("synthetic_lookups", "bytes", tmp_path / "store", options={"documents": 64})
  config.data.store = str(store.path)
  with pytest.raises(InputError, match=r"data.task: 'synthetic_lookups' has no prefixes and targets"):
    training.train(configs.freeze(config), tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()


def test_combinations_of_pretraining_and_fine_tuning_freeze():
  from experiments import pause_training

  assert "experiments/pause_training.py" in pause_training.__doc__
  # A run resolves its decoder and its tokenizer from `init_from`.
  start = {"init_from": "somewhere", "decoder": {"preset": "tiny"}}
  made = {run: configs.freeze(pause_training.get_config(run).to_dict() | start) for run in settings.PAUSE_RUNS}
  assert {run: (config.method.pause_places, config.method.pauses) for run, config in made.items()} == {
    "pretrain_standard": ("none", 0),
    "pretrain_pause": ("random", 10),
    "finetune_standard": ("none", 0),
    "finetune_pause": ("prefix", 10),
  }
  assert pause_training.get_config("finetune_pause,commonsense_qa").data.task == "commonsense_qa"
  with pytest.raises(InputError, match=r"config argument: run 'finetune_pauses' is unknown; did you mean"):
    pause_training.get_config("finetune_pauses")
  with pytest.raises(InputError, match=r"config argument: data.task 'c4_en' is unknown"):
    pause_training.get_config("finetune_pause,c4_en")


CONFIG = """
import sys
sys.path[:0] = {tests!r}
import test_pause_training

get_config = test_pause_training.get_config
"""


def get_config(argument=""):
  config = tiny_config(name="pause_training", pauses=2, pause_places=argument or "random")
  config.train.update(steps=4, log_every=2, eval_every=0, checkpoint_every=0)
  config.data.sequence_length = 48
  if argument:
    config.data.task = "synthetic_questions"
  return config


@pytest.mark.slow
def test_pretrained_then_fine_tuned(tmp_path):
  """The programs, on a run with random pauses and a run that starts from it and trains answers after pauses."""
  path, first, second = tmp_path / "tiny.py", tmp_path / "first", tmp_path / "second"
  path.write_text(CONFIG.format(tests=[str(cli.ROOT / "tests" / folder) for folder in ("support", "methods")]))
  record, _ = cli.run("train", f"--config={path}", f"--workdir={first}")
  assert record["training_omega"]["perplexity"] > 1
  assert all(row["dropped_tokens"] > 0 for row in read_metrics(first) if row["split"] == "train")
  record, err = cli.run("train", f"--config={path}:prefix", f"--config.init_from={first}", f"--workdir={second}")
  assert "is freshly initialised" not in err
  # Two pauses in each document.
  assert 1.0 < record["inference_slots"] < 1.5
  fewer, _ = cli.run("evaluate", f"--workdir={second}", "--pauses=0")
  assert (fewer["pauses"], fewer["inference_slots"]) == (0, 1)
  assert fewer["perplexity"] != record["perplexity"]
  assert json.loads((second / "evaluation.json").read_text())["perplexity"] == record["perplexity"]
  result, _ = cli.run("generate", f"--workdir={second}", "--prompt=a=1 ?a=", "--max_new_tokens=3", "--pauses=5")
  assert result["pauses"][0][0] == 5
  cli.run("report", f"--workdir={second}")
  assert (second / "report" / "index.html").exists()
  # A run without pauses may start from a pause run, and a pause run may start from that run; its pause is then drawn
  # around the mean of the embeddings.
  config = get_config("none")
  config.method.pauses = 0
  plain = pretrained.load(str(second), configs.freeze(config))
  assert set(plain.params) == {"decoder"}
  config.train.steps = 0
  config.train.epochs = 0.0
  config.init_from = str(second)
  training.train(configs.freeze(config), tmp_path / "plain")
  again = pretrained.load(str(tmp_path / "plain"), configs.freeze(get_config("prefix"))).params
  embedding = again["decoder"]["embedding"][:257]
  drawn = (again["pause_input"] - embedding.mean(0)) / embedding.std(0)
  assert 0.03 < np.abs(drawn).mean() < 0.14
