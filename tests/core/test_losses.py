"""The losses: hand values, a float64 reference, the bounds between them, gradients, edge cases, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from cyb_jax import losses
from cyb_jax.stopping import SlotScores, log_stopping_distribution


def random_logits(seed, num_slots, vocabulary=7, leading=(4,), scale=3.0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, scale, (*leading, num_slots, vocabulary)).astype(np.float32)
  return logits, rng.integers(vocabulary - 1, size=leading)


def scores_of(logits, targets):
  return SlotScores.from_logits(logits, targets, dont_know_id=-1)


def by_reference(loss, logits, targets, **options):
  rows = []
  for n in range(len(targets)):
    t, d, a = np.array([reference.probabilities(z, targets[n], len(z) - 1) for z in logits[n]]).T
    rows.append(loss(t, d, a, **options))
  return np.array(rows, np.float64)


def from_probabilities(t, d):
  return SlotScores(jnp.log(jnp.array(t)), jnp.log(jnp.array(d)), jnp.log1p(-jnp.array(d)))


def test_hand_values():
  scores = from_probabilities([0.5, 0.8], [0.5, 0.1])
  np.testing.assert_allclose(jnp.exp(-losses.cyb(scores)), 0.5 * 0.5 + 0.5 * 0.8, rtol=1e-6)
  np.testing.assert_allclose(jnp.exp(-losses.cyb(scores, gamma=[1.0, 0.5])), 0.25 + 0.2, rtol=1e-6)
  np.testing.assert_allclose(jnp.exp(-losses.cyb(scores, omega=[1, 1])), 0.75 * 0.5 + 0.25 * 0.8, rtol=1e-6)
  va = -0.5 * np.log(0.5) - 0.5 * np.log(0.8) + 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
  np.testing.assert_allclose(losses.cyb_va(scores, [3, 1]), va, rtol=1e-6)
  dp = -np.log(0.65) + 0.1 * (0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5))
  np.testing.assert_allclose(losses.cyb_dp(scores, [3, 1], 0.1), dp, rtol=1e-6)
  np.testing.assert_allclose(losses.last_slot_cross_entropy(scores), -np.log(0.8), rtol=1e-6)


weight = st.sampled_from([0.0, 0.01, 1.0, 4.0, 11.0])


def weights(num_slots, positive=False):
  element = weight.filter(bool) if positive else weight
  return st.lists(element, min_size=num_slots, max_size=num_slots).filter(lambda w: sum(w) > 0)


@given(seed=st.integers(0, 10**6), num_slots=st.integers(1, 6), data=st.data())
def test_all_losses_agree_with_the_reference(seed, num_slots, data):
  logits, targets = random_logits(seed, num_slots)
  scores = scores_of(logits, targets)
  omega, rho = data.draw(weights(num_slots)), data.draw(weights(num_slots))
  positive_rho = data.draw(weights(num_slots, positive=True))
  alpha = data.draw(st.sampled_from([0.0, 0.01, 0.1, 2.0]))
  kind = data.draw(st.sampled_from(["none", "linear", "exponential"]))
  gamma = losses.discount(kind, num_slots, 0.9)
  checks = [
    (losses.cyb(scores), by_reference(reference.cyb, logits, targets)),
    (
      losses.cyb(scores, omega, gamma),
      by_reference(reference.cyb, logits, targets, omega=omega, gamma=gamma),
    ),
    (losses.cyb_va(scores, positive_rho), by_reference(reference.cyb_va, logits, targets, rho=positive_rho)),
    (
      losses.cyb_dp(scores, rho, alpha),
      by_reference(reference.cyb_dp, logits, targets, rho=rho, alpha=alpha),
    ),
  ]
  for ours, oracle in checks:
    np.testing.assert_allclose(ours, oracle, rtol=2e-5, atol=2e-5)


@given(seed=st.integers(0, 10**6), num_slots=st.integers(1, 5), alpha=st.sampled_from([0.0, 0.01, 1.0]))
def test_bounds(seed, num_slots, alpha):
  """CYB-VA >= -log sum rho t; CYB-DP >= CYB."""
  scores = scores_of(*random_logits(seed, num_slots))
  rho = np.random.default_rng(seed).dirichlet(np.ones(num_slots)) + 1e-3
  rho = rho / rho.sum()
  bound = -jax.nn.logsumexp(jnp.log(rho) + scores.log_target, -1)
  assert (losses.cyb_va(scores, rho) >= bound - 1e-5).all()
  assert (losses.cyb_dp(scores, rho, alpha) >= losses.cyb(scores) - 1e-5).all()


def test_va_is_minimal_if_s_is_proportional_to_rho_times_t():
  t, rho = np.array([0.1, 0.6, 0.3]), np.array([0.5, 0.2, 0.3])
  s = rho * t / (rho * t).sum()
  # The d for which s has these values: s_1 = a_1, s_2 = d_1 a_2.
  d = np.array([1 - s[0], 1 - s[1] / (1 - s[0]), 0.5])
  scores = from_probabilities(t, d)
  np.testing.assert_allclose(losses.cyb_va(scores, rho), -np.log((rho * t).sum()), rtol=1e-6)


@pytest.mark.parametrize("variant", ["ap", "va", "dp", "tbys"])
def test_one_slot_is_plain_cross_entropy(variant):
  logits, targets = random_logits(0, 1)
  scores = scores_of(logits, targets)
  loss = {
    "ap": losses.cyb(scores, [2.0], [1.0]),
    "va": losses.cyb_va(scores, [1.0]),
    "dp": losses.cyb_dp(scores, [1.0], 0.1),
    "tbys": losses.last_slot_cross_entropy(scores),
  }[variant]
  words = logits[:, 0, :-1]
  plain = jax.nn.logsumexp(words, -1) - np.take_along_axis(words, targets[:, None], 1)[:, 0]
  np.testing.assert_allclose(loss, plain, rtol=1e-6)


def test_never_answering_is_tbys_and_always_answering_is_slot_one():
  t = [0.2, 0.5, 0.7]
  always, never = from_probabilities(t, [0.0] * 3), from_probabilities(t, [1.0] * 3)
  np.testing.assert_allclose(losses.cyb(never), losses.last_slot_cross_entropy(never), rtol=1e-6)
  np.testing.assert_allclose(losses.cyb(always), -np.log(0.2), rtol=1e-6)
  np.testing.assert_allclose(losses.cyb_va(always, [1, 1, 2]), -np.log(0.2) + np.log(4), rtol=1e-6)


@pytest.mark.parametrize(
  "loss",
  [
    losses.cyb,
    lambda s: losses.cyb(s, [0, 1, 0, 2], [1.0, 0.0, 0.5, 0.5]),
    lambda s: losses.cyb_va(s, [4, 1, 1, 4]),
    lambda s: losses.cyb_dp(s, [0, 1, 0, 4], 0.1),
  ],
)
def test_gradients_by_finite_differences(loss):
  """Through the logits, in f64, so that the differences are accurate."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(0, 2, (4, 6)))

    def value(logits):
      return loss(scores_of(logits, jnp.array(2)))

    gradient = jax.grad(value)(logits)
    direction = jnp.asarray(rng.normal(size=logits.shape))
    step = 1e-5
    numeric = (value(logits + step * direction) - value(logits - step * direction)) / (2 * step)
    np.testing.assert_allclose((gradient * direction).sum(), numeric, rtol=1e-6)


def test_gradient_of_cyb_in_closed_form():
  """dCYB/dlog t_i = -r_i and dCYB/dlogit(d_i) = -(R_{>i} - R_{>=i} d_i)."""
  rng = np.random.default_rng(2)
  log_t, z = (
    jnp.asarray(np.log(rng.uniform(0.1, 0.9, 4)), jnp.float32),
    jnp.asarray(rng.normal(size=4), jnp.float32),
  )

  def value(log_t, z):
    return losses.cyb(SlotScores(log_t, jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)))

  by_target, by_logit = jax.grad(value, (0, 1))(log_t, z)
  d = np.asarray(jax.nn.sigmoid(z), np.float64)
  r = reference.stopping(d, 1 - d).astype(float) * np.exp(np.asarray(log_t, np.float64))
  r = r / r.sum()
  after = np.array([r[i + 1 :].sum() for i in range(4)])
  np.testing.assert_allclose(by_target, -r, rtol=1e-5)
  expected = -(after - (after + r) * d)
  expected[-1] = 0.0
  np.testing.assert_allclose(by_logit, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("logit", [-80.0, 80.0])
@pytest.mark.parametrize("variant", ["ap", "discount", "va", "dp"])
def test_saturated_logits(variant, logit):
  loss = {
    "ap": lambda s: losses.cyb(s, [1, 0, 1]),
    "discount": lambda s: losses.cyb(s, gamma=losses.discount("exponential", 3, 0.99)),
    "va": lambda s: losses.cyb_va(s, [1, 1, 1]),
    "dp": lambda s: losses.cyb_dp(s, [0, 1, 1], 0.1),
  }[variant]
  for pattern in np.ndindex(2, 2, 2):
    logits = np.zeros((3, 5), np.float32)
    logits[:, -1] = np.where(pattern, logit, -logit)
    logits[:, 1] = -logit
    value, gradient = jax.value_and_grad(lambda z: loss(scores_of(z, jnp.array(0))))(jnp.asarray(logits))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("d", [0.0, 1.0])
def test_exact_zero_and_one_have_finite_gradients(d):
  log_t = jnp.log(jnp.array([0.2, 0.3, 0.5]))
  log_d, log_a = jnp.log(jnp.full(3, d)), jnp.log1p(-jnp.full(3, d))
  for loss in (losses.cyb, lambda s: losses.cyb_va(s, [1, 2, 1])):
    value, gradient = jax.value_and_grad(lambda x, f=loss: f(SlotScores(x, log_d, log_a)))(log_t)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_traced_parameters_and_leading_shapes():
  logits, targets = random_logits(3, 4, leading=(2, 3))
  scores = scores_of(logits, targets)
  omega, gamma = jnp.array([1.0, 0.0, 0.0, 2.0]), jnp.array([1.0, 0.5, 0.0, 0.1])
  np.testing.assert_allclose(jax.jit(losses.cyb)(scores, omega, gamma), losses.cyb(scores, omega, gamma), rtol=1e-5)
  np.testing.assert_allclose(jax.jit(losses.cyb_va)(scores, gamma + 0.1), losses.cyb_va(scores, gamma + 0.1), rtol=1e-5)
  np.testing.assert_allclose(jax.jit(losses.cyb_dp)(scores, omega, 0.1), losses.cyb_dp(scores, omega, 0.1), rtol=1e-5)
  assert losses.cyb(scores).shape == (2, 3)
  # A one-hot omega at the second slot means that the token has two slots.
  short = SlotScores(*(x[..., :2] for x in jax.tree.leaves(scores)))
  per_token = jnp.broadcast_to(jnp.array([0.0, 1.0, 0.0, 0.0]), (2, 3, 4))
  np.testing.assert_allclose(losses.cyb(scores, per_token), losses.cyb(short), rtol=1e-6)


def test_discounts():
  np.testing.assert_allclose(losses.discount("none", 3), [1, 1, 1])
  np.testing.assert_allclose(losses.discount("linear", 4, 0.9), [1, 0.9, 0.8, 0.7])
  np.testing.assert_allclose(losses.discount("exponential", 4, 0.5), [1, 0.5, 0.25, 0.125])
  assert losses.discount("linear", 1, 0.0).tolist() == [1.0]
  for arguments, message in [
    (("linear", 4, 0.5), "falls to -0.5"),
    (("exponential", 4, 1.1), r"1.1 is not in \[0, 1\]"),
    (("cosine", 4, 0.5), "is unknown; give"),
  ]:
    with pytest.raises(ValueError, match=message):
      losses.discount(*arguments)


def test_bad_parameters():
  scores = scores_of(*random_logits(0, 3))
  for call, message in [
    (lambda: losses.cyb_va(scores, [1.0, 0.0, 1.0]), "rho: 1:0:1 must be positive"),
    (lambda: losses.cyb_va(scores, [1.0, 1e-39, 1.0]), "rho: 1:1e-39:1 must be positive"),
    (lambda: losses.cyb_va(scores, [1.0, 1.0]), "rho: shape"),
    (lambda: losses.cyb_dp(scores, [1.0, 1.0, 1.0], float("inf")), "alpha: inf"),
    (lambda: losses.cyb_dp(scores, [0.0, 0.0, 0.0], 0.1), "rho: 0:0:0 is all zero"),
    (lambda: losses.cyb_dp(scores, [1.0, 1.0, 1.0], -0.1), "alpha: -0.1"),
    (lambda: losses.cyb(scores, gamma=[1.0, 1.0, 1.5]), "gamma: .*must be in"),
    (lambda: losses.cyb(scores, gamma=[1.0]), "gamma: shape"),
    (lambda: losses.cyb(scores, gamma=[0.0, 0.0, 0.0]), "gamma: .*all zero"),
  ]:
    with pytest.raises(ValueError, match=message):
      call()


def test_f32_scores_give_f32_losses_in_64_bit_mode():
  scores = scores_of(*random_logits(0, 3))
  with jax.enable_x64(True):
    for loss in (losses.cyb(scores, [1, 2, 3], [1, 0.5, 0.5]), losses.cyb_va(scores, [1, 2, 1])):
      assert loss.dtype == jnp.float32
    assert losses.cyb_dp(scores, [1, 2, 1], 0.1).dtype == jnp.float32


def test_losses_use_the_distribution_of_their_definition():
  scores = scores_of(*random_logits(5, 4))
  log_s = log_stopping_distribution(scores.log_dont_know, scores.log_answer, [1, 2, 3, 4])
  direct = -jnp.log((jnp.exp(log_s) * jnp.exp(scores.log_target)).sum(-1))
  np.testing.assert_allclose(losses.cyb(scores, [1, 2, 3, 4]), direct, rtol=1e-5)
