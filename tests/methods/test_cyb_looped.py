"""cyb_looped: the stopping-time losses over loops of the layers, against float64; decoding with and without exits; a
complete run, from training to generated text."""

import dataclasses
import functools
import math

import cli
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from float64_decoder import Float64Decoder
from models import TINY, VOCABULARY, build, initial_params, random_batch, tiny_config

from cyb_jax import configs, methods, runs, training
from cyb_jax.costs import flops
from cyb_jax.data import ByteTokenizer, with_segment_ids
from cyb_jax.errors import InputError
from cyb_jax.evaluation import Evaluator, evaluate_self_paced, evaluate_split
from cyb_jax.generation import Sampler, SamplingOptions, Scorer
from cyb_jax.interop import pretrained
from cyb_jax.methods import CachedDecoding, Calibrated, EarlyExit, Exportable, SlotInputs, configure
from cyb_jax.partitioning.mesh import make_mesh
from cyb_jax.stopping import hard_slot

# The capacity of all caches, so that few programs are compiled.
CAPACITY = 12

LOSSES = {
  "ap": {},
  "ap omega gamma": {"omega": (1.0, 0.0, 3.0), "gamma": (1.0, 0.9, 0.5)},
  "va": {"loss": "va", "rho": (3.0, 1.0, 1.0)},
  "dp": {"loss": "dp", "rho": (1.0, 0.0, 2.0), "alpha": 0.3},
}


def states_of(decoder, tokens, loops, seen=None):
  """f64[W, T, D]: the state after each loop."""
  x, states = decoder.embed(tokens), []
  for _ in range(loops):
    x = decoder.layers(x, seen)
    states.append(decoder.finish(x))
  return np.array(states)


def scores_of(decoder, states, dont_know_prior=0.9):
  """(probabilities of the vocabulary given an answer, d), f64[..., V] and f64[...]."""
  unembedding = decoder.decoder["embedding"][: decoder.vocab_size]
  logits, row = states @ unembedding.T, states @ decoder.params["dont_know"]
  shift = math.log(dont_know_prior * decoder.vocab_size / (1 - dont_know_prior))
  total = np.log(np.exp(logits).sum(-1))
  return decoder.probabilities(states), 1 / (1 + np.exp(total - row - shift))


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=pytest.mark.slow) if "omega" in name else name for name in LOSSES]
)
def test_losses_against_float64(name, exact):
  options = LOSSES[name]
  method, params = build(name="cyb_looped", pauses=2, **options)
  batch = random_batch(1, 2, 5)
  found = method.loss(params, batch, jax.random.key(0))
  decoder = Float64Decoder(method, params)
  for row in range(2):
    words, d = scores_of(decoder, states_of(decoder, batch["tokens"][row], 3))
    for token, target in enumerate(batch["targets"][row]):
      t, d_of, a_of = words[:, token, target], d[:, token], 1 - d[:, token]
      if options.get("loss") == "va":
        expected = reference.cyb_va(t, d_of, a_of, options["rho"])
      elif options.get("loss") == "dp":
        expected = reference.cyb_dp(t, d_of, a_of, options["rho"], options["alpha"])
      else:
        expected = reference.cyb(t, d_of, a_of, options.get("omega"), options.get("gamma"))
      assert found.loss[row, token] == pytest.approx(expected, rel=1e-4)
      np.testing.assert_allclose(
        found.stopping[row, token], reference.stopping(d_of, a_of, options.get("omega")), rtol=2e-4
      )


def test_gradient_against_finite_differences(exact):
  method, params = build(name="cyb_looped", pauses=1)
  batch = random_batch(2, 1, 4)

  def loss(params):
    return method.loss(params, batch, jax.random.key(0)).loss.sum()

  gradient = jax.jit(jax.grad(loss))(params)

  def expected(delta):
    moved = params | {
      "decoder": {
        **params["decoder"],
        "layers_0": jax.tree.map(lambda x: np.asarray(x, np.float64), params["decoder"]["layers_0"]),
      }
    }
    kernel = moved["decoder"]["layers_0"]["mlp"]["down"]["kernel"].copy()
    kernel[1, 2] += delta
    moved["decoder"]["layers_0"]["mlp"]["down"]["kernel"] = kernel
    decoder = Float64Decoder(method, moved)
    words, d = scores_of(decoder, states_of(decoder, batch["tokens"][0], 2))
    of = range(4)
    return sum(reference.cyb(words[:, i, batch["targets"][0, i]], d[:, i], 1 - d[:, i]) for i in of)

  numeric = (expected(1e-4) - expected(-1e-4)) / 2e-4
  assert gradient["decoder"]["layers_0"]["mlp"]["down"]["kernel"][1, 2] == pytest.approx(numeric, rel=1e-3, abs=1e-5)
  # d is trained through its own row.
  assert np.abs(gradient["dont_know"]).max() > 1e-4


def test_d_of_0_is_a_plain_model_and_d_of_1_is_looped(exact):
  """d = 0 everywhere reads the first loop, d = 1 the last loop."""
  method, params = build(name="cyb_looped", pauses=2, dont_know_prior=None)
  plain, _ = build(name="baseline")
  looped, _ = build(name="looped", pauses=2)
  batch = random_batch(3)
  output = jax.jit(method.evaluate)(params, batch)
  np.testing.assert_allclose(-output.scores.log_target[..., 0], plain.evaluate(params, batch).loss, rtol=1e-5)
  np.testing.assert_allclose(-output.scores.log_target[..., -1], looped.evaluate(params, batch).loss, rtol=1e-5)
  mixed = jax.nn.logsumexp(output.log_stopping + output.scores.log_target, -1)
  np.testing.assert_allclose(output.log_likelihood, mixed, rtol=1e-6)


@functools.cache
def compiled(method):
  """`method.extend`, compiled once for each number of rows; without compilation it takes seconds."""
  return jax.jit(method.extend)


def decode(method, params, tokens, slots_of):
  """Runs each row's tokens on a cache, token t with `slots_of[t]` loops one after the other; [B, T, W, D], nan for
  loops that do not run.
  """
  rows, length = tokens.shape
  cache = method.empty_cache(rows, CAPACITY)
  extend = compiled(method)
  states = np.full((rows, length, method.num_slots, TINY.d_model), np.nan)
  for token in range(length):
    at = jnp.full((rows,), token)
    for slot in range(slots_of[token]):
      inputs = SlotInputs(tokens[:, token : token + 1], jnp.full((rows, 1), slot), at[:, None])
      hidden, cache = extend(params, inputs, cache, at + slot)
      states[:, token, slot] = hidden[:, 0]
  return states


@pytest.mark.parametrize("scan_layers", [pytest.param(True, marks=pytest.mark.slow), False])
def test_decoding_with_all_loops_equals_the_training_forward(scan_layers, exact):
  method, params = build(dataclasses.replace(TINY, scan_layers=scan_layers), name="cyb_looped", pauses=2)
  batch = random_batch(4, 2, 5)
  hidden = method.hidden(params, batch)
  np.testing.assert_allclose(decode(method, params, batch["tokens"], [3] * 5), hidden, rtol=1e-4, atol=1e-5)
  # All loops of a token in one call, after a prompt that runs in one call.
  cache = method.empty_cache(2, CAPACITY)
  tokens, order = batch["tokens"], np.broadcast_to(np.arange(3), (2, 3))
  prompt = SlotInputs(tokens[:, :4], np.zeros((2, 4), int), np.broadcast_to(np.arange(4), (2, 4)))
  _, cache = compiled(method)(params, prompt, cache, None)
  last = SlotInputs(np.repeat(tokens[:, 4:5], 3, 1), order, np.full((2, 3), 4))
  last, _ = compiled(method)(params, last, cache, jnp.array([4, 4]))
  np.testing.assert_allclose(last, hidden[:, 4], rtol=1e-4, atol=1e-5)


def test_skipped_loops_are_filled_from_the_last_loop_that_ran(exact):
  """Against float64, layer by layer: the keys and values of an early exit also fill its later loops."""
  method, params = build(name="cyb_looped", pauses=2)
  tokens, slots_of = random_batch(5, 1, 5)["tokens"], [2, 1, 3, 1, 3]
  found = decode(method, params, tokens, slots_of)
  decoder, loops = Float64Decoder(method, params), method.num_slots
  x = decoder.embed(tokens[0])
  cached = {}
  for loop in range(loops):
    for number in range(TINY.num_layers):
      keys, values = decoder.keys_and_values(x, number)
      if loop:
        ran = np.array(slots_of)[:, None, None] > loop
        keys, values = (np.where(ran, new, old) for new, old in zip((keys, values), cached[number]))
      cached[number] = keys, values
      x = decoder.layer(x, number, np.tril(np.ones((5, 5), bool)), keys, values)
    for token, count in enumerate(slots_of):
      if loop < count:
        np.testing.assert_allclose(found[0, token, loop], decoder.finish(x)[token], rtol=1e-4, atol=1e-5)
  # The exit has an effect on later tokens: their states differ from those of a forward pass without exits.
  full = np.asarray(method.hidden(params, {"tokens": tokens}))
  np.testing.assert_allclose(found[0, 0, :2], full[0, 0, :2], rtol=1e-4, atol=1e-5)
  assert np.abs(found[0, 4, 2] - full[0, 4, 2]).max() > 1e-3


@pytest.mark.slow
def test_fill_cache_equals_an_early_exit():
  method, params = build(name="cyb_looped", pauses=2)
  tokens = random_batch(6, 2, 1)["tokens"]

  def extended(count):
    slots = np.broadcast_to(np.arange(count), (2, count))
    inputs = SlotInputs(np.repeat(tokens, count, 1), slots, np.zeros((2, count), int))
    return compiled(method)(params, inputs, method.empty_cache(2, 2), jnp.zeros(2, int))[1]

  filled = method.fill_cache(extended(3), cache_index=jnp.zeros(2, int), slots=jnp.array([2, 2]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), filled.slots, extended(2).slots)


def spread(params):
  """The parameters with a row of `<don't know>` for which d differs between tokens."""
  return params | {"dont_know": jax.random.normal(jax.random.key(5), params["dont_know"].shape)}


@pytest.mark.parametrize("documents", [pytest.param(True, marks=pytest.mark.slow), False])
def test_self_paced_evaluation_fills_skipped_loops(documents, exact):
  """Against all loops of each token after earlier tokens that were decoded loop by loop, each up to its own exit."""
  method, params = build(name="cyb_looped", pauses=2, dont_know_prior=0.5)
  params, batch = spread(params), random_batch(53, 1, 6)
  if documents:
    batch = with_segment_ids(batch, int(batch["tokens"][0, 2]))
    assert batch["segment_ids"].max() > 0
  output, used = jax.jit(functools.partial(evaluate_self_paced, method))(params, batch)
  used = np.asarray(used)[0]
  assert len(set(used.tolist())) == 3
  segments = batch.get("segment_ids", np.zeros((1, 6), int))[0]
  for token in range(6):
    begin = int(np.argmax(segments == segments[token]))
    tokens = batch["tokens"][:, begin : token + 1]
    states = decode(method, params, tokens, [*used[begin:token], 3])[0, -1]
    scores = method.token_scores(params, jnp.asarray(states, jnp.float32), jnp.arange(3))
    expected = scores.log_probs[:, batch["targets"][0, token]]
    np.testing.assert_allclose(output.scores.log_target[0, token], expected, atol=2e-5)
    np.testing.assert_allclose(output.scores.log_dont_know[0, token], scores.log_dont_know, atol=2e-5)
  differs = np.abs(output.scores.log_target - method.evaluate(params, batch).scores.log_target)[0]
  # The first loop has the keys of training; later loops of later tokens have other keys.
  assert differs[:, 0].max() < 2e-5
  assert differs[:, 2].max() > 1e-3


def test_states_of_slots_in_any_order(exact):
  """The order of scoring: a context of one slot per token, then tokens with all slots."""
  method, params = build(name="cyb_looped", pauses=1)
  tokens = random_batch(7, 1, 4)["tokens"]
  slots = np.array([[0, 0, 0, 1, 0, 1]])
  token = np.array([[0, 1, 2, 2, 3, 3]])
  order = np.arange(6)
  seen = (order[:, None] >= order) & ((slots[0] == 0) | (token[0][:, None] == token[0]))
  found = jax.jit(method.hidden_slots)(
    params, SlotInputs(tokens[:, token[0]], slots, token), jnp.asarray(seen)[None, None]
  )
  hidden = method.hidden(params, {"tokens": tokens})
  np.testing.assert_allclose(found[0], hidden[0, token[0], slots[0]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [pytest.param("constant", marks=pytest.mark.slow), "self_paced"])
def test_text_of_the_sampler(mode, exact):
  """Greedy text against tokens that are decoded by hand, each at its own loop."""
  method, params = build(name="cyb_looped", pauses=2, dont_know_prior=0.5)
  options = SamplingOptions(mode=mode, read="threshold", temperature=0.0)
  generation = Sampler(method, options).generate(params, [[3, 4, 5], [7]], max_new_tokens=4)
  for prompt, tokens, pauses in zip([[3, 4, 5], [7]], generation.tokens, generation.pauses):
    text, slots_of = list(prompt), [3] * (len(prompt) - 1)
    for token, paused in zip(tokens, pauses):
      run = 3 if mode == "constant" else paused + 1
      states = decode(method, params, np.array([text]), [*slots_of, run])[0, -1]
      scores = method.token_scores(params, jnp.asarray(states[:run], jnp.float32), jnp.arange(run))
      slot = int(hard_slot(jnp.pad(scores.log_dont_know, (0, 3 - run)), 0.5)) if mode == "constant" else paused
      assert slot == paused
      assert int(scores.log_probs[slot].argmax()) == token
      if mode == "self_paced":
        assert (np.asarray(scores.log_dont_know[:paused]) > math.log(0.5)).all()
        assert paused == 2 or scores.log_dont_know[paused] <= math.log(0.5)
      text.append(token)
      slots_of.append(run)


def test_abilities_and_refusals():
  method, _ = build(name="cyb_looped", pauses=1)
  for ability in (CachedDecoding, Calibrated, EarlyExit):
    assert isinstance(method, ability)
  assert not isinstance(method, Exportable)
  with pytest.raises(InputError, match=r"method.pauses: 0 must be a whole number of at least 1"):
    configure("cyb_looped", pauses=0)
  with pytest.raises(InputError, match=r"method.pause_input: unknown field"):
    configure("cyb_looped", pause_input="pause")


@pytest.mark.slow
def test_calibration_sets_the_median():
  method = methods.build(configure("cyb_looped", pauses=1, calibration_batches=1), TINY, vocab_size=VOCABULARY)
  params = initial_params(method)
  batch = random_batch(8)
  calibrated = method.calibrate(params, [batch])
  median, tokens = method.median_dont_know(calibrated, [batch])
  assert (tokens, median) == (24, pytest.approx(math.log(9), abs=1e-4))


def one_device():
  return make_mesh(configs.ParallelismConfig(), jax.devices()[:1])


def check_text(method, params):
  """Text is generated self-paced, and requests have the likelihood of a forward pass over the complete text."""
  generation = Sampler(method).generate(params, [[3, 4], [5]], max_new_tokens=3)
  assert [len(row) for row in generation.tokens] == [3, 3]
  assert generation.slots == [len(row) + sum(pauses) for row, pauses in zip(generation.tokens, generation.pauses)]
  requests = [([3, 4, 5], [6, 7]), ([3, 4, 5], [8, 2]), ([9], [1, 2, 3, 5])]
  texts = np.array([[*context, *continuation] for context, continuation in requests])
  output = jax.jit(method.evaluate)(params, {"tokens": texts[:, :-1], "targets": texts[:, 1:]})
  scores = Scorer(method, params, context=16, start_id=0, row_slots=32).score(requests)
  for (context, _), score, likelihoods in zip(requests, scores, output.log_likelihood):
    assert score.log_likelihood == pytest.approx(float(likelihoods[len(context) - 1 :].sum()), rel=1e-4)


@pytest.mark.slow
def test_a_model_after_a_few_steps_evaluates_and_generates():
  """The checks of `test_a_run_is_trained_evaluated_scored_and_generates`, without a work directory."""
  method, params = build(name="cyb_looped", pauses=2, dont_know_prior=0.5)
  batch = random_batch(10, 4, 6)

  @jax.jit
  def step(params):
    value, gradient = jax.value_and_grad(lambda p: method.loss(p, batch, jax.random.key(0)).loss.mean())(params)
    return jax.tree.map(lambda x, dx: x - 0.3 * dx, params, gradient), value

  losses = []
  for _ in range(6):
    params, value = step(params)
    losses.append(float(value))
  assert losses[-1] < losses[0] - 0.1
  record = Evaluator(method, one_device(), context="self_paced")(params, [batch])
  assert 0 < record["context_pauses"] < 2
  assert record["perplexity"] != record["constant_perplexity"]
  assert record["perplexity"] == pytest.approx(record["constant_perplexity"], rel=0.2)
  check_text(method, params)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "cyb_looped"
  config = tiny_config(name="cyb_looped", pauses=2, dont_know_prior=0.5)
  config.train.update(steps=4, log_every=2, eval_every=0, last_eval_limit=8)
  record = training.train(configs.freeze(config), folder)
  assert math.isfinite(record["loss"])
  return folder


@pytest.mark.slow
def test_a_run_is_trained_evaluated_scored_and_generates(workdir):
  run = pretrained.load_run(workdir)
  store = runs.open_recorded_store(run.meta)
  evaluator = Evaluator(run.method, one_device(), context="self_paced")
  record = evaluate_split(
    evaluator, run.params, store, run.config, split="validation", step=run.step, meta=run.meta, limit=8
  )
  assert record["context"] == "self_paced"
  assert 0 < record["context_pauses"] < 2
  assert record["inference_slots"] == pytest.approx(record["context_pauses"] + 1)
  assert record["perplexity"] != record["constant_perplexity"]
  assert record["perplexity"] == pytest.approx(record["constant_perplexity"], rel=0.05)
  costs = run.method.costs(16, slots=record["inference_slots"])
  assert record["inference_flops"] == costs.inference.total < costs.forward.total
  check_text(run.method, run.params)


@pytest.mark.slow
def test_the_programs_on_a_run(workdir):
  evaluated, _ = cli.run("evaluate", f"--workdir={workdir}", "--split=validation", "--limit=8", "--context=self_paced")
  assert evaluated["method"] == "cyb_looped"
  assert evaluated["context"] == "self_paced"
  assert 0 < evaluated["context_pauses"] < 2
  assert evaluated["perplexity"] != evaluated["constant_perplexity"]
  generated, _ = cli.run("generate", f"--workdir={workdir}", "--prompt=a=1", "--max_new_tokens=6", "--nostream")
  assert generated["mode"] == "self_paced"
  assert generated["slots"] == generated["tokens"] + sum(map(sum, generated["pauses"]))


def test_cost_of_generated_text():
  """A loop is one pass through the layers, and all loops of a prompt run."""
  pytest.importorskip("lm_eval", reason="the extra harness isn't installed")
  from cyb_jax.generation.harness import CybLM

  config = configs.freeze(tiny_config(name="cyb_looped", pauses=2))
  method = config.build_method(ByteTokenizer.vocab_size)
  params = initial_params(method)
  lm = CybLM(run=runs.Run(config, method, params, ByteTokenizer(), 0, {}))
  pacing = Sampler(lm.run.method).pacing
  score = lm._cost(pacing, 3, [2, 0])
  config = lm.run.method.decoder.config
  # Two prompt tokens with 3 loops, then the last prompt token with 3 loops over 3 tokens, and one loop over 4 tokens.
  keys = 3 * (1 + 2) + 3 * 3 + 4
  assert score.flops == flops.slot_flops(config, slots=6 + 4, keys=keys, slots_read=4)
  assert (score.slots, score.tokens, score.pauses) == (10, 2, 2)


def test_cost_by_hand():
  """D = 16, two layers, 2 heads of size 8 with one kv head, F = 24: per layer 2 D N H + 2 D G H + 3 D F."""
  method, _ = build(name="cyb_looped", pauses=2)
  layer, readout = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24), 2 * 16 * 32
  attention = 4 * 16 * (8 + 1) / 2
  costs = method.costs(8)
  assert costs.forward.total == 3 * 2 * (layer + attention) + 3 * readout
  assert costs.train.total == 3 * costs.forward.total
  assert costs.inference.total == costs.forward.total
  half = method.costs(8, slots=1.5).inference
  assert half.total == 1.5 * 2 * (layer + attention) + 1.5 * readout
  assert (costs.train_slots, costs.forward_slots, costs.evaluation_passes) == (24, 24, 1)
