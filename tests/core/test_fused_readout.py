"""The weighted loss, with its gradients formed in the forward pass: against dense float64 logits and `slot_scores`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_readout import OPTIONS, dense, problem, weighted

from cyb_jax import losses
from cyb_jax.readout import slot_scores, weighted_loss
from cyb_jax.stopping import SlotScores

# Losses of (scores, one factor in [0, 1] per slot).
LOSSES = {
  "ap": lambda scores, factors: losses.cyb(scores, gamma=factors),
  "va": lambda scores, factors: factors[..., 0] * losses.cyb_va(scores, [4.0, 1.0, 1.0, 4.0]),
  "dp": lambda scores, factors: losses.cyb_dp(scores, [1.0, 1.0, 2.0, 1.0], 0.3) + factors[..., 1],
  "last": lambda scores, factors: factors[..., -1] * losses.last_slot_cross_entropy(scores),
}
CASES = [(loss, options, None) for loss in LOSSES for options in ("plain", "cap")]
CASES += [("ap", options, chunk) for options in OPTIONS for chunk in (1, 5, 8)]


def tokens(targets, seed=5):
  """Weights, one of them zero, and factors of slots."""
  rng = np.random.default_rng(seed)
  weights = rng.uniform(0.5, 2.0, targets.shape).astype(np.float32)
  weights[0, -1] = 0.0
  return weights, rng.uniform(0.3, 1.0, (*targets.shape, 4)).astype(np.float32)


@pytest.mark.parametrize(("loss", "name", "chunk_size"), CASES)
def test_agrees_with_the_dense_readout(loss, name, chunk_size, exact):
  hidden, unembedding, targets, row = problem(1)
  weights, factors = tokens(targets)
  options = dict(OPTIONS[name])
  dont_know = options.pop("dont_know", row)
  own = isinstance(dont_know, int)

  @jax.jit
  def ours(hidden, unembedding, weights, factors, row=row):
    return weighted_loss(
      LOSSES[loss], hidden, unembedding, targets, dont_know if own else row, weights, factors, chunk_size=chunk_size,
      **options,
    )  # fmt: skip

  @jax.jit
  def oracle(hidden, unembedding, weights, factors, row=row):
    scores = dense(hidden, unembedding, targets, dont_know if own else row, **options)
    return (weights * LOSSES[loss](scores, factors)).sum(), scores

  arrays = (hidden, unembedding, weights, factors, *(() if own else (row,)))
  argnums = tuple(range(len(arrays)))
  got = jax.value_and_grad(ours, argnums, has_aux=True)(*arrays)
  with jax.enable_x64(True):
    doubles = [jnp.asarray(a, jnp.float64) for a in arrays]
    expected = jax.value_and_grad(oracle, argnums, has_aux=True)(*doubles)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_model_that_cannot_abstain(exact):
  hidden, unembedding, targets, _ = problem(2)
  weights, _ = tokens(targets)

  def ours(hidden, unembedding):
    def loss(scores, _):
      return losses.last_slot_cross_entropy(scores)

    return weighted_loss(loss, hidden, unembedding, targets, None, weights, slots=(-1,), chunk_size=2)

  def dense_loss(hidden, unembedding):
    logits = jax.nn.log_softmax(hidden[..., -1, :] @ unembedding.T)
    return -(weights * jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]).sum()

  (total, scores), gradients = jax.value_and_grad(ours, (0, 1), has_aux=True)(hidden, unembedding)
  assert scores.log_target.shape == (2, 3, 1)
  assert np.all(np.asarray(scores.log_dont_know) == -np.inf)
  expected = jax.value_and_grad(dense_loss, (0, 1))(hidden, unembedding)
  for a, b in zip(jax.tree.leaves((total, gradients)), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("uses", ["both", "scores"])
def test_scores_have_their_own_gradient(uses, exact):
  """A penalty on the scores that is added outside of the sum is trained too."""
  hidden, unembedding, targets, row = problem(3)
  weights, factors = tokens(targets)
  options = {"prior": 0.9, "soft_cap": 3.0, "chunk_size": 5}
  share = {"both": 1.0, "scores": 0.0}[uses]

  def ours(hidden, unembedding, row):
    total, scores = weighted_loss(LOSSES["ap"], hidden, unembedding, targets, row, weights, factors, **options)
    return (total if share else 0.0) + weighted(scores)

  def apart(hidden, unembedding, row):
    scores = slot_scores(hidden, unembedding, targets, row, **options)
    return share * (weights * LOSSES["ap"](scores, factors)).sum() + weighted(scores)

  got, expected = (jax.value_and_grad(f, (0, 1, 2))(hidden, unembedding, row) for f in (ours, apart))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_scaled():
  """By what the sum is multiplied with afterwards, in bfloat16 too."""
  hidden, unembedding, targets, row = problem(4)
  weights, factors = tokens(targets)
  hidden = jnp.asarray(hidden, jnp.bfloat16)

  def total(hidden, unembedding):
    return weighted_loss(LOSSES["ap"], hidden, unembedding, targets, row, weights, factors)[0]

  once, scaled = (jax.grad(lambda *a, k=k: k * total(*a), (0, 1))(hidden, unembedding) for k in (1.0, 0.25))
  assert [x.dtype for x in once] == [jnp.bfloat16, jnp.float32]
  for a, b in zip(once, scaled):
    np.testing.assert_array_equal(0.25 * a, b)


def test_gradient_by_finite_differences():
  with jax.enable_x64(True):
    hidden, unembedding, targets, row = (jnp.asarray(x) for x in problem(3))
    arrays = [x.astype(jnp.float64) for x in (hidden, unembedding, row, *tokens(targets))]
    rng = np.random.default_rng(0)
    directions = [jnp.asarray(rng.normal(size=x.shape)) for x in arrays]

    @jax.jit
    def value(hidden, unembedding, row, weights, factors):
      options = {"prior": 0.9, "soft_cap": 4.0, "chunk_size": 5}
      return weighted_loss(LOSSES["ap"], hidden, unembedding, targets, row, weights, factors, **options)[0]

    gradients = jax.grad(value, range(5))(*arrays)
    step = 1e-6
    up, down = (value(*(x + s * v for x, v in zip(arrays, directions))) for s in (step, -step))
    slope = sum((g * v).sum() for g, v in zip(gradients, directions))
    np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-6)


@settings(max_examples=6)
@given(
  seed=st.integers(0, 1000),
  leading=st.sampled_from([(), (1,), (5,), (2, 3), (0,)]),
  slots=st.integers(1, 3),
  vocabulary=st.sampled_from([3, 17]),
  chunk_size=st.sampled_from([None, 1, 2, 7]),
)
def test_any_shape(seed, leading, slots, vocabulary, chunk_size):
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(*leading, slots, 4)).astype(np.float32)
  unembedding = rng.normal(size=(vocabulary, 4)).astype(np.float32)
  targets, row = rng.integers(0, vocabulary, leading), rng.normal(size=4).astype(np.float32)
  weights = np.ones(leading, np.float32)

  def value(function, hidden):
    return function(lambda scores, _: losses.cyb(scores), hidden, unembedding, targets, row, weights)

  def apart(loss, *arguments):
    scores = slot_scores(*arguments[:-1], prior=0.9)
    return (weights * loss(scores, ())).sum(), scores

  def fused(*arguments):
    return weighted_loss(*arguments, prior=0.9, chunk_size=chunk_size)

  got, expected = (
    jax.jit(jax.value_and_grad(lambda hidden, f=f: value(f, hidden), has_aux=True))(hidden) for f in (fused, apart)
  )
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_ignored_labels_have_no_gradient():
  """Of a loss that is a cross-entropy; a weight of zero does the same for every loss."""
  hidden, unembedding, targets, row = problem(6)
  ignored = np.array(targets)
  ignored[0] = -100
  ones = np.ones(targets.shape, np.float32)

  def gradient(targets, weights):
    def total(hidden):
      return weighted_loss(lambda s, _: losses.cyb(s), hidden, unembedding, targets, row, weights, chunk_size=8)[0]

    return np.asarray(jax.grad(total)(hidden))

  masked = np.array(ones)
  masked[0] = 0.0
  np.testing.assert_allclose(gradient(ignored, ones)[0], 0.0, atol=1e-7)
  np.testing.assert_allclose(gradient(targets, masked), gradient(ignored, ones), atol=1e-7)
  assert np.abs(gradient(targets, ones)[0]).max() > 1e-3


def test_three_products():
  """XLA counts the operations of one chunk."""
  hidden = jax.ShapeDtypeStruct((16, 8, 4, 32), jnp.float32)
  unembedding = jax.ShapeDtypeStruct((512, 32), jnp.float32)
  zeros = jnp.zeros((16, 8), jnp.int32)

  def total(hidden, unembedding):
    def loss(scores, _):
      return losses.cyb(scores)

    return weighted_loss(loss, hidden, unembedding, zeros, None, jnp.ones((16, 8)), chunk_size=10**6)[0]

  counted = jax.jit(jax.grad(total, (0, 1))).lower(hidden, unembedding).compile().cost_analysis()["flops"]
  product = 2 * 16 * 8 * 4 * 32 * 512
  assert 3 * product < counted < 3.5 * product


def test_frozen(exact):
  hidden, unembedding, targets, row = problem(7)
  weights, factors = tokens(targets)

  def gradient(**options):
    def total(hidden, row):
      return weighted_loss(LOSSES["ap"], hidden, unembedding, targets, row, weights, factors, **options)[0]

    return jax.grad(total, (0, 1))(hidden, row)

  for a, b in zip(gradient(frozen=True), gradient()):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("chunk_size", "shards"), [(16, 1), (None, 1), (4, 4)])
def test_padding_has_no_loss(chunk_size, shards):
  """Chunks of four tokens and four shards have padding for six tokens, whose loss with arguments of zero would be
  infinite.
  """
  hidden, unembedding, targets, row = problem(11)
  weights, _ = tokens(targets)
  ones = np.ones((*targets.shape, 4), np.float32)

  def total(hidden, unembedding):
    options = {"chunk_size": chunk_size, "shards": shards}
    return weighted_loss(LOSSES["ap"], hidden, unembedding, targets, row, weights, ones, **options)[0]

  def apart(hidden, unembedding):
    return (weights * losses.cyb(slot_scores(hidden, unembedding, targets, row))).sum()

  got, expected = (jax.value_and_grad(f, (0, 1))(hidden, unembedding) for f in (total, apart))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_mask_is_a_weight():
  hidden, unembedding, targets, row = problem(10)
  mask = np.array([[True, False, True], [False, True, True]])

  def gradient(weights):
    def total(hidden):
      return weighted_loss(lambda s, _: losses.cyb(s), hidden, unembedding, targets, row, weights)[0]

    return jax.value_and_grad(total)(hidden)

  for a, b in zip(gradient(mask), gradient(mask.astype(np.float32))):
    np.testing.assert_array_equal(a, b)


def test_bad_shapes():
  hidden, unembedding, targets, row = problem(8)
  weights, factors = tokens(targets)

  def run(weights, factors, **options):
    weighted_loss(LOSSES["ap"], hidden, unembedding, targets, row, weights, factors, **options)

  with pytest.raises(ValueError, match=r"weights: shape \(2, 2\), but targets has the shape \(2, 3\)"):
    run(weights[:, :2], factors)
  with pytest.raises(ValueError, match=r"arguments: shape \(4,\), but targets has the shape \(2, 3\)"):
    run(weights, factors[0, 0])
  with pytest.raises(ValueError, match=r"chunk_size: 0 must be positive"):
    run(weights, factors, chunk_size=0)


def test_scores_are_those_of_slot_scores():
  hidden, unembedding, targets, row = problem(9)
  weights, factors = tokens(targets)
  _, got = weighted_loss(LOSSES["ap"], hidden, unembedding, targets, row, weights, factors, prior=0.9)
  assert isinstance(got, SlotScores)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(slot_scores(hidden, unembedding, targets, row, prior=0.9))):
    np.testing.assert_array_equal(a, b)
