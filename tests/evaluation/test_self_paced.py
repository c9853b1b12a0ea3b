"""Self-paced evaluation of a text: against a run of the complete prefix for every token, and in the cases where it must
equal the constant evaluation."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, VOCABULARY, build, initial_params, random_batch

from cyb_jax import methods
from cyb_jax.configs import ParallelismConfig
from cyb_jax.data import with_segment_ids
from cyb_jax.evaluation import Evaluator, evaluate_self_paced
from cyb_jax.methods import configure
from cyb_jax.partitioning.mesh import make_mesh
from cyb_jax.pauses import pack
from cyb_jax.stopping import log_stopping_distribution


@functools.cache
def model(name="cyb", **options):
  method, params = build(name=name, pauses=2, **options)
  # The initial weights of training: with them every slot is kept for some token.
  params = jax.jit(lambda: nn.unbox(method.init(jax.random.key(0))))()
  if name == "cyb":  # d spread over (0, 1)
    params["dont_know"] = jax.random.normal(jax.random.key(5), params["dont_know"].shape)
  return method, params


def read(method, params, batch, omega=None, **options):
  return jax.jit(functools.partial(evaluate_self_paced, method, omega=omega, **options))(params, batch)


@pytest.mark.parametrize(
  "options",
  [
    {"dont_know_prior": 0.5},
    {"dont_know": "unit", "dont_know_prior": 0.5, "pause_shared": True, "pause_positions": "shifting"},
  ],
)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.slow
def test_against_a_run_of_every_prefix(options, documents, exact):
  method, params = model(**options)
  batch = random_batch(0, 2, 5)
  if documents:
    batch = with_segment_ids(batch, int(batch["tokens"][0, 2]))
    assert batch["segment_ids"].max() > 0
  reading, kept = read(method, params, batch, kept="stopping")
  assert len(np.unique(kept)) == 3
  scores = jax.jit(method.slot_scores_packed)
  for token in range(5):
    # Earlier tokens with the slots that were kept, this token with all slots; attention is causal, so padding is not
    # seen.
    lengths = jnp.asarray(kept).at[:, token].set(3)
    expected = scores(params, batch, pack(lengths, 3, 15))
    for name in ("log_target", "log_dont_know", "log_answer"):
      got = getattr(reading.scores, name)[:, token]
      np.testing.assert_allclose(got, getattr(expected, name)[:, token], atol=2e-5)
  log_s = log_stopping_distribution(reading.scores.log_dont_know, reading.scores.log_answer)
  np.testing.assert_allclose(reading.loss, -jax.nn.logsumexp(log_s + reading.scores.log_target, -1), atol=1e-6)


@pytest.mark.parametrize(
  ("omega", "options"),
  [
    pytest.param(None, {}, id="None-options0"),
    pytest.param((1.0, 2.0, 1.0), {}, id="omega1-options0"),
    pytest.param(
      None, {"pause_positions": "shifting", "pause_offset": True}, id="None-options1", marks=pytest.mark.slow
    ),
    pytest.param((1.0, 2.0, 1.0), {"pause_positions": "shifting", "pause_offset": True}, id="omega1-options1"),
  ],
)
def test_hidden_pauses_give_the_constant_evaluation(options, omega, exact):
  method, params = model(pause_visibility="hidden", **options)
  batch = with_segment_ids(random_batch(1, 3, 6), 4)
  reading, _ = read(method, params, batch, omega)
  constant = method.evaluate(params, batch, omega)
  np.testing.assert_allclose(reading.log_stopping, constant.log_stopping, atol=2e-5)
  np.testing.assert_allclose(reading.scores.log_target, constant.scores.log_target, atol=2e-5)


def test_a_model_that_always_pauses_gives_the_constant_evaluation(exact):
  method, params = model("tbys")
  batch = random_batch(2, 3, 6)
  reading, kept = read(method, params, batch)
  assert (np.asarray(kept) == 3).all()
  np.testing.assert_allclose(reading.loss, method.evaluate(params, batch).loss, atol=2e-5)


def test_the_likelihood_is_exact_in_expectation(exact):
  """Sums over all texts of three tokens from a vocabulary of three, after a first token, and over all contexts."""
  method = methods.build(configure("cyb", pauses=1, dont_know_prior=None), TINY, vocab_size=3)
  params = initial_params(method)
  # Far from uniform: s, t and the effect of pauses on later tokens all differ.
  params = jax.tree.map(lambda x: 1.5 * x if x.ndim > 1 else x, params)
  params["dont_know"] = 0.5 * jax.random.normal(jax.random.key(5), params["dont_know"].shape)
  targets = np.array(list(itertools.product(range(3), repeat=3)), np.int32)
  tokens = np.concatenate([np.zeros((27, 1), np.int32), targets[:, :2]], 1)
  batch = {"tokens": tokens, "targets": targets, "weights": np.ones((27, 3), np.float32)}

  exact_likelihood, scores = np.zeros(27), jax.jit(method.slot_scores_packed)
  for path in itertools.product((1, 2), repeat=3):  # the slots at which each token may answer
    # The scores of a token do not depend on the number of pauses that it keeps itself.
    product = np.ones(27)
    for token, slot in enumerate(path):
      lengths = jnp.broadcast_to(jnp.array([*path[:token], 2, *path[token + 1 :]]), (27, 3))
      found = scores(params, batch, pack(lengths, 2, 6))
      log_s = log_stopping_distribution(found.log_dont_know, found.log_answer)
      product *= np.exp(np.asarray(log_s + found.log_target, np.float64))[:, token, slot - 1]
    exact_likelihood += product
  assert exact_likelihood.sum() == pytest.approx(1, abs=1e-4)

  def estimates(kept):
    draw = jax.vmap(lambda seed: evaluate_self_paced(method, params, batch, kept=kept, seed=seed)[0].loss.sum(-1))
    found = np.exp(-np.asarray(jax.jit(draw)(jnp.arange(3000)), np.float64))
    return (found.mean(0) - exact_likelihood) / (found.std(0) / np.sqrt(3000) + 1e-6)

  assert np.abs(estimates("posterior")).max() < 4
  assert np.abs(estimates("stopping")).max() > 8


def test_a_target_without_weight_does_not_affect_the_kept_slots():
  method, params = model(dont_know_prior=0.5)
  batch = random_batch(3, 64, 4)
  given = batch | {"weights": np.zeros((64, 4), np.float32)}
  _, kept = read(method, params, given)
  np.testing.assert_array_equal(kept, read(method, params, batch, kept="stopping")[1])
  assert np.any(kept != read(method, params, batch)[1])


@pytest.mark.parametrize("kept", ["posterior", "stopping"])
def test_the_distribution_of_the_kept_slots(kept):
  method, params = model(dont_know_prior=0.5)
  batch = random_batch(3, 512, 4)
  reading, drawn = read(method, params, batch, kept=kept)
  shares = np.asarray(reading.log_stopping, np.float64)
  if kept == "posterior":
    shares = shares + np.asarray(reading.scores.log_target, np.float64)
  shares = np.exp(shares - np.logaddexp.reduce(shares, -1, keepdims=True))
  counts = (np.asarray(drawn)[..., None] == np.arange(1, 4)).sum((0, 1))
  deviation = np.sqrt((shares * (1 - shares)).sum((0, 1)))
  assert (np.abs(counts - shares.sum((0, 1))) < 4 * deviation).all()


def test_kept_slots_may_be_drawn_without_conditioning_on_the_target():
  method, params = model(dont_know_prior=0.5)
  batch = random_batch(3, 64, 4)
  _, kept = read(method, params, batch, kept="stopping")
  other = batch | {"targets": (batch["targets"] + 1) % VOCABULARY}
  np.testing.assert_array_equal(read(method, params, other, kept="stopping")[1], kept)


def test_decoding_reads_one_slot_of_a_token_if_d_needs_no_logits():
  """In unit form, and with a fixed rule of stopping; in token form d is a probability in the softmax over the
  vocabulary.
  """
  for name, options, read_out in (
    ("cyb", {}, 2.5),
    ("cyb", {"dont_know": "unit"}, 1),
    ("cyb_looped", {}, 2.5),
    ("cyb_looped", {"dont_know": "unit"}, 1),
    ("tbys", {}, 1),
    ("constant_stop", {}, 1),
  ):
    method = methods.build(configure(name, pauses=2, **options), TINY)
    assert method.costs(8, slots=2.5).inference.readout == read_out * 2 * 16 * 32


def test_the_evaluator_reports_the_gap(exact):
  method, params = model(dont_know_prior=0.5)
  batch = random_batch(4, 4, 6, uneven=True)
  mesh = make_mesh(ParallelismConfig(), jax.devices()[:2])
  got = Evaluator(method, mesh, context="self_paced")(params, [batch])
  constant = Evaluator(method, mesh)(params, [batch])
  reading, kept = read(method, params, batch)
  weights = batch["weights"]
  assert got["perplexity"] == pytest.approx(np.exp(float((reading.loss * weights).sum() / weights.sum())), rel=1e-5)
  assert got["constant_perplexity"] == pytest.approx(constant["perplexity"], rel=1e-5)
  assert got["perplexity"] != pytest.approx(constant["perplexity"], rel=1e-4)
  assert got["context_pauses"] == pytest.approx(float(((kept - 1) * weights).sum() / weights.sum()), rel=1e-5)
  assert got["slots"] == 2 * constant["slots"]
  assert got["kept_pauses"] == "posterior"
  other = Evaluator(method, mesh, context="self_paced", kept="stopping")(params, [batch])
  reading, _ = read(method, params, batch, kept="stopping")
  assert other["perplexity"] == pytest.approx(np.exp(float((reading.loss * weights).sum() / weights.sum())), rel=1e-5)
  assert other["kept_pauses"] == "stopping"


@pytest.mark.slow
def test_the_constant_evaluation_has_all_slots_even_if_training_drew_them(exact):
  omega = (1.0, 2.0, 1.0)
  method, params = model(recipe="sampled", omega=omega, dont_know_prior=0.5)
  batch = random_batch(5, 4, 6)
  mesh = make_mesh(ParallelismConfig(), jax.devices()[:1])
  got = Evaluator(method, mesh, omega, "self_paced")(params, [batch])
  scores = method.slot_scores(params, batch)
  log_s = log_stopping_distribution(scores.log_dont_know, scores.log_answer, omega)
  nats = -float(jax.nn.logsumexp(log_s + scores.log_target, -1).mean())
  assert got["constant_perplexity"] == pytest.approx(np.exp(nats), rel=1e-5)
