"""The stopping-time distribution and SlotScores: hand values, a float64 reference, properties, gradients, edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cyb_jax.stopping import (
  SlotScores,
  expected_pauses,
  hard_slot,
  log_stopping_distribution,
  normalize,
  prior_shift,
)


def log_distribution(d, omega=None):
  d = jnp.asarray(d)
  return log_stopping_distribution(jnp.log(d), jnp.log1p(-d), omega)


def test_hand_values():
  # 0:0:1, d = (1/2, 1/4, -): 1/2, then 1/2 * 3/4, then 1/2 * 1/4 for any last d.
  s = jnp.exp(log_distribution([0.5, 0.25, 0.7]))
  np.testing.assert_allclose(s, [0.5, 0.375, 0.125], rtol=1e-6)
  # 1:0:1: with probability 1/2 the budget is one step; otherwise the model decides at slots 1 and 2.
  s = jnp.exp(log_distribution([0.5, 0.25, 0.7], jnp.array([1.0, 0.0, 1.0])))
  np.testing.assert_allclose(s, [0.5 + 0.5 * 0.5, 0.5 * 0.5 * 0.75, 0.5 * 0.5 * 0.25], rtol=1e-6)


def test_a_step_budget_below_w():
  s = jnp.exp(log_distribution([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 0]))
  np.testing.assert_allclose(s, [0.5, 0.5, 0.0, 0.0], rtol=1e-6)


weights = hnp.arrays(np.float64, st.integers(1, 6), elements=st.sampled_from([0.0, 0.1, 1.0, 4.0, 11.0]))


@given(omega=weights.filter(lambda w: w.sum() > 0), data=st.data())
def test_agrees_with_the_reference_and_sums_to_one(omega, data):
  num_slots = len(omega)
  shape = data.draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
  d = data.draw(hnp.arrays(np.float32, (*shape, num_slots), elements=st.floats(0.0078125, 0.9921875, width=32)))
  log_s = log_distribution(d, omega)
  assert log_s.shape == d.shape
  assert log_s.dtype == jnp.float32
  s = np.exp(np.asarray(log_s, np.float64))
  np.testing.assert_allclose(s.sum(-1), 1.0, rtol=2e-6)
  for index in np.ndindex(*shape):
    row = d[index].astype(np.float64)
    np.testing.assert_allclose(s[index], reference.stopping(row, 1 - row, omega), rtol=2e-5, atol=1e-12)


@given(omega=weights.filter(lambda w: w.sum() > 0))
def test_traced_and_per_token_omega_equal_static(omega):
  d = np.random.default_rng(0).uniform(0.05, 0.95, (3, len(omega))).astype(np.float32)
  static = log_distribution(d, omega)
  np.testing.assert_allclose(jax.jit(log_distribution)(d, jnp.asarray(omega, jnp.float32)), static, rtol=1e-5)
  per_token = np.broadcast_to(omega, d.shape) * np.array([[1.0], [2.0], [3.0]])
  np.testing.assert_allclose(log_distribution(d, per_token), static, rtol=1e-5)


@pytest.mark.parametrize("omega", [None, [1, 1, 1], [0, 1, 0], [1, 0, 0], [0, 1, 1]])
@pytest.mark.parametrize("d", [0.0, 1e-30, 1.0])
def test_values_and_gradients_at_the_edges(omega, d):
  """d is exactly 0 and exactly 1: s is still a distribution, and gradients are finite."""
  d = jnp.full((3,), d, jnp.float32)
  log_s = log_distribution(d, omega)
  np.testing.assert_allclose(jnp.exp(log_s).sum(), 1.0, rtol=1e-6)

  def total(log_d, log_a):
    return (jnp.exp(log_stopping_distribution(log_d, log_a, omega)) * jnp.arange(1.0, 4.0)).sum()

  for gradient in jax.grad(total, (0, 1))(jnp.log(d), jnp.log1p(-d)):
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("logit", [-80.0, 0.0, 80.0])
def test_saturated_logits_have_finite_values_and_gradients(logit):
  logits = jnp.array([[logit, 80.0, -80.0, 3.0]] * 3)

  def total(logits):
    scores = SlotScores.from_logits(logits, jnp.array(2), 0)
    log_s = log_stopping_distribution(scores.log_dont_know, scores.log_answer)
    return log_s.sum() + scores.log_target.sum()

  value, gradient = jax.value_and_grad(total)(logits)
  assert np.isfinite(value)
  assert np.isfinite(gradient).all()


def test_one_slot_always_answers():
  np.testing.assert_array_equal(log_distribution([0.3]), [0.0])
  gradient = jax.grad(lambda x: log_stopping_distribution(x, jnp.log1p(-jnp.exp(x)))[0])(jnp.log(jnp.array([0.3])))
  np.testing.assert_array_equal(gradient, [0.0])


@pytest.mark.parametrize("omega", [[0, 0, 1], [1, 1, 1], [0, 1, 1], [3, 0, 1]])
def test_gradient_by_finite_differences(omega):
  z = np.array([0.3, -1.2, 0.8])

  def value(z):
    return float(
      np.dot(reference.stopping(1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z)), omega).astype(float), [1.0, -2.0, 3.0])
    )

  numeric = [(value(z + step) - value(z - step)) / 2e-6 for step in np.eye(3) * 1e-6]

  def ours(z):
    log_s = log_stopping_distribution(jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z), omega)
    return jnp.exp(log_s) @ jnp.array([1.0, -2.0, 3.0])

  np.testing.assert_allclose(jax.grad(ours)(jnp.asarray(z)), numeric, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("prior", [None, 0.9, 0.5])
@pytest.mark.parametrize("vocabulary", [2, 3, 17, 101])
def test_from_logits_agrees_with_the_reference(prior, vocabulary):
  rng = np.random.default_rng(vocabulary)
  logits = rng.normal(0, 4, (5, 3, vocabulary)).astype(np.float32)
  dont_know_id = int(rng.integers(vocabulary))
  targets = (dont_know_id + 1 + rng.integers(vocabulary - 1, size=5)) % vocabulary
  scores = SlotScores.from_logits(logits, targets, dont_know_id, prior)
  for n in range(5):
    for i in range(3):
      t, d, a = reference.probabilities(logits[n, i], targets[n], dont_know_id, prior)
      got = [scores.log_target[n, i], scores.log_dont_know[n, i], scores.log_answer[n, i]]
      np.testing.assert_allclose(np.array(got), np.log(np.array([t, d, a])).astype(float), rtol=2e-5, atol=2e-6)


def test_uniform_logits_abstain_with_the_prior():
  scores = SlotScores.from_logits(jnp.zeros((1, 11)), jnp.array(3), dont_know_id=10, prior=0.9)
  np.testing.assert_allclose(jnp.exp(scores.log_dont_know), 0.9, rtol=1e-6)
  assert prior_shift("token", 0.9, 11) == pytest.approx(np.log(9 * 10))
  assert prior_shift("unit", 0.9, 11) == pytest.approx(np.log(9))


def test_negative_column_counts_from_the_end():
  logits = jax.random.normal(jax.random.key(0), (2, 3, 7))
  a = SlotScores.from_logits(logits, jnp.array([0, 1]), -1)
  b = SlotScores.from_logits(logits, jnp.array([0, 1]), 6)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_bf16_logits_are_scored_in_f32():
  scores = SlotScores.from_logits(jnp.zeros((3, 5), jnp.bfloat16), jnp.array(1), 4)
  assert {x.dtype for x in jax.tree.leaves(scores)} == {jnp.dtype("float32")}


def test_functions_of_the_distribution():
  log_s = jnp.log(jnp.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]))
  np.testing.assert_allclose(expected_pauses(log_s), [0.75, 0.0])
  d = jnp.array([[0.9, 0.5, 0.1], [0.9, 0.9, 0.9], [0.2, 0.9, 0.9]])
  np.testing.assert_array_equal(hard_slot(jnp.log(d)), [1, 2, 0])


def test_scores_are_a_pytree():
  scores = SlotScores.from_logits(jnp.zeros((2, 3, 5)), jnp.array([0, 1]), 4)
  doubled = jax.tree.map(lambda x: 2 * x, scores)
  assert isinstance(doubled, SlotScores)
  assert len(jax.tree.leaves(scores)) == 3


@pytest.mark.parametrize(
  ("omega", "message"),
  [
    ([1.0, 1.0], r"omega: shape \(2,\).* 3 slots"),
    ([1.0, -1.0, 1.0], "not negative"),
    ([0.0, 0.0, 0.0], "all zero"),
    ([1.0, float("nan"), 1.0], "finite"),
    ([1e308, 1e308, 1.0], "with a finite sum"),
    (1.0, r"shape \(\)"),
  ],
)
def test_bad_weights(omega, message):
  with pytest.raises(ValueError, match=message):
    log_distribution([0.5, 0.5, 0.5], omega)


def test_bad_arguments():
  with pytest.raises(ValueError, match="dont_know_id: 5"):
    SlotScores.from_logits(jnp.zeros((3, 5)), jnp.array(0), 5)
  with pytest.raises(ValueError, match=r"prior: 1\.0"):
    SlotScores.from_logits(jnp.zeros((3, 5)), jnp.array(0), 4, prior=1.0)
  with pytest.raises(ValueError, match="form: 'both'"):
    SlotScores.from_readout(jnp.zeros(3), jnp.zeros(3), jnp.zeros(3), form="both")
  with pytest.raises(ValueError, match="positive"):
    normalize([1.0, 0.0], 2, name="rho", positive=True)
