"""Reading a text at the model's own pace: against the whole prefix run again token by token, and where it must be the
constant reading."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import VOCABULARY, build, random_batch

from cyb_jax.configs import ParallelismConfig
from cyb_jax.data import with_segment_ids
from cyb_jax.evaluation import Evaluator, evaluate_self_paced
from cyb_jax.partitioning.mesh import make_mesh
from cyb_jax.pauses import pack
from cyb_jax.stopping import log_stopping_distribution


@functools.cache
def model(name="cyb", **options):
  method, params = build(name=name, pauses=2, **options)
  if name == "cyb":  # d spread over (0, 1)
    params["dont_know"] = jax.random.normal(jax.random.key(5), params["dont_know"].shape)
  return method, params


def read(method, params, batch, omega=None):
  return jax.jit(functools.partial(evaluate_self_paced, method, omega=omega))(params, batch)


@pytest.mark.parametrize(
  "options",
  [
    {"dont_know_prior": 0.5},
    {"dont_know": "unit", "dont_know_prior": 0.5, "pause_shared": True, "pause_positions": "shifting"},
  ],
)
@pytest.mark.parametrize("documents", [False, True])
def test_against_the_prefix_run_again(options, documents, exact):
  method, params = model(**options)
  batch = random_batch(0, 2, 5)
  if documents:
    batch = with_segment_ids(batch, int(batch["tokens"][0, 2]))
    assert batch["segment_ids"].max() > 0
  reading, kept = read(method, params, batch)
  assert len(np.unique(kept)) == 3
  scores = jax.jit(method.slot_scores_packed)
  for token in range(5):
    # What came before as it was kept, this token whole; later ones are seen by nobody.
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
def test_hidden_pauses_make_it_the_constant_reading(options, omega, exact):
  method, params = model(pause_visibility="hidden", **options)
  batch = with_segment_ids(random_batch(1, 3, 6), 4)
  reading, _ = read(method, params, batch, omega)
  constant = method.evaluate(params, batch, omega)
  np.testing.assert_allclose(reading.log_stopping, constant.log_stopping, atol=2e-5)
  np.testing.assert_allclose(reading.scores.log_target, constant.scores.log_target, atol=2e-5)


def test_what_always_pauses_is_the_constant_reading(exact):
  method, params = model("tbys")
  batch = random_batch(2, 3, 6)
  reading, kept = read(method, params, batch)
  assert (np.asarray(kept) == 3).all()
  np.testing.assert_allclose(reading.loss, method.evaluate(params, batch).loss, atol=2e-5)


def test_kept_slots_are_drawn_from_s():
  method, params = model(dont_know_prior=0.5)
  batch = random_batch(3, 512, 4)
  reading, kept = read(method, params, batch)
  s = np.exp(np.asarray(reading.log_stopping, np.float64))
  counts = (np.asarray(kept)[..., None] == np.arange(1, 4)).sum((0, 1))
  expected = s.sum((0, 1))
  deviation = np.sqrt((s * (1 - s)).sum((0, 1)))
  assert (np.abs(counts - expected) < 4 * deviation).all()
  # Not by the target: another one draws the same.
  other = batch | {"targets": (batch["targets"] + 1) % VOCABULARY}
  np.testing.assert_array_equal(read(method, params, other)[1], kept)


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


def test_the_constant_reading_gives_all_slots_also_where_training_drew_them(exact):
  omega = (1.0, 2.0, 1.0)
  method, params = model(recipe="sampled", omega=omega, dont_know_prior=0.5)
  batch = random_batch(5, 4, 6)
  mesh = make_mesh(ParallelismConfig(), jax.devices()[:1])
  got = Evaluator(method, mesh, omega, "self_paced")(params, [batch])
  scores = method.slot_scores(params, batch)
  log_s = log_stopping_distribution(scores.log_dont_know, scores.log_answer, omega)
  nats = -float(jax.nn.logsumexp(log_s + scores.log_target, -1).mean())
  assert got["constant_perplexity"] == pytest.approx(np.exp(nats), rel=1e-5)
