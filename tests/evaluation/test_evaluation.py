"""The evaluator against a slow reference, one token at a time; rank correlation by hand; padding has no effect."""

import jax
import numpy as np
import pytest
import reference
from models import build, random_batch

from cyb_jax.configs import ParallelismConfig
from cyb_jax.evaluation import Evaluator, spearman
from cyb_jax.partitioning.mesh import make_mesh


def evaluate(method, params, batches, omega=None, **options):
  mesh = make_mesh(ParallelismConfig(), jax.devices()[:1])
  with jax.default_matmul_precision("highest"):
    return Evaluator(method, mesh, omega)(params, batches, **options)


def tokens_of(method, params, batches):
  """(t, d) in float64 of every token of weight 1; f64[N, W] each."""
  rows, scores_of = [], jax.jit(lambda batch: method.evaluate(params, batch).scores)
  for batch in batches:
    scores = scores_of(batch)
    real = batch["weights"] > 0
    rows.append([np.exp(np.asarray(x, np.float64))[real] for x in (scores.log_target, scores.log_dont_know)])
  return (np.concatenate(x) for x in zip(*rows))


@pytest.mark.parametrize(
  ("omega", "train_omega"), [(None, None), (None, (1.0, 1.0, 0.0)), ((1.0, 2.0, 1.0), (1.0, 1.0, 0.0))]
)
def test_against_a_slow_reference(omega, train_omega, exact):
  method, params = build(name="cyb", pauses=2, omega=train_omega)
  batches = [random_batch(seed, 3, 5, uneven=True) for seed in range(3)]
  got = evaluate(method, params, batches, omega, num_bytes=100)
  t, d = tokens_of(method, params, batches)
  s = np.array([reference.stopping(row, 1 - row, omega) for row in d], np.float64)
  count = sum(batch["weights"].sum() for batch in batches)
  assert got["tokens"] == count == len(t)
  nats = -np.log((s * t).sum(-1))
  close = {"rtol": 2e-5}
  np.testing.assert_allclose(got["perplexity"], np.exp(nats.mean()), **close)
  np.testing.assert_allclose(got["bits_per_byte"], nats.sum() / np.log(2) / 100, **close)
  np.testing.assert_allclose(got["slot_perplexity"], np.exp(-np.log(t).mean(0)), **close)
  np.testing.assert_allclose(got["oracle_perplexity"], np.exp(-np.log(t.max(-1)).mean()), **close)
  hard = [next((i for i in range(2) if row[i] <= 0.5), 2) for row in d]
  np.testing.assert_allclose(got["hard_perplexity"], np.exp(-np.log(t[np.arange(len(t)), hard]).mean()), **close)
  np.testing.assert_allclose(got["latency"], s.mean(0), **close)
  np.testing.assert_allclose(got["mean_pauses"], (s @ [0, 1, 2]).mean(), **close)
  loss = [reference.cyb(a, b, 1 - b, omega=train_omega) for a, b in zip(t, d)]
  np.testing.assert_allclose(got["loss"], np.mean(loss), **close)
  if train_omega is None:
    assert got["training_omega"] is None
  else:
    s = np.array([reference.stopping(row, 1 - row, train_omega) for row in d], np.float64)
    np.testing.assert_allclose(got["training_omega"]["latency"], s.mean(0), rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(got["training_omega"]["perplexity"], np.exp(-np.log((s * t).sum(-1)).mean()), **close)
  np.testing.assert_allclose(got["calibration"], spearman(d[:, :2], np.diff(t, axis=-1)), atol=0.02)
  rows_used = sum(int((batch["weights"] > 0).any(-1).sum()) for batch in batches)
  assert got["slots"] == rows_used * 5 * 3
  assert got["flops"] == pytest.approx(method.costs(5).forward.total * rows_used * 5)


@pytest.mark.slow
def test_padding_and_batching_change_nothing(exact):
  method, params = build(name="cyb", pauses=1)
  batch = random_batch(1, 4, 6, uneven=True)
  complete = evaluate(method, params, [batch])
  halves = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]
  padding = {k: np.zeros_like(v[:2]) for k, v in batch.items()}
  parts = evaluate(method, params, [*halves, padding])
  for key in ("loss", "perplexity", "oracle_perplexity", "mean_pauses"):
    assert parts[key] == pytest.approx(complete[key], rel=1e-6)
  assert parts["slots"] == complete["slots"]


def test_spearman_by_hand():
  # Ranks 1 2 3 4 against 1 2.5 2.5 4: the correlation of these ranks.
  d = np.array([[0.1], [0.2], [0.3], [0.4]])
  gain = np.array([[-1.0], [0.5], [0.5], [2.0]])
  expected = np.corrcoef([1, 2, 3, 4], [1, 2.5, 2.5, 4])[0, 1]
  assert spearman(d, gain) == [pytest.approx(expected)]
  assert spearman(d, -(gain**3)) == [pytest.approx(-expected)]
  assert spearman(d, np.zeros((4, 1))) == [None]
  assert spearman(d[:1], gain[:1]) == [None]
