"""Readout, stopping distribution, losses and attention against float64, at extreme values and odd shapes.

Logits of +-10^4 make probabilities that even a long double cannot represent, so the references of this file compute in
float64 in log space, one slot at a time. CYB_JAX_EXAMPLES is the number of examples of every property.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cyb_jax import losses
from cyb_jax.decoder import attention
from cyb_jax.pauses import attention_mask
from cyb_jax.readout import slot_scores, token_scores
from cyb_jax.stopping import SlotScores, log_stopping_distribution

# A compilation for each shape takes most of the time, so there are few shapes; none is a multiple of a block.
FEW = settings(max_examples=int(os.environ.get("CYB_JAX_EXAMPLES", "4")))
SHAPES = st.sampled_from([((), 1, 3), ((1,), 1, 5), ((3, 1), 8, 7), ((2, 3), 4, 31)])
DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
# The largest logits; beyond about 89, the exponential of an f32 overflows.
SCALES = st.sampled_from([0.0, 1.0, 80.0, 1000.0, 1e4])
SEEDS = st.integers(0, 10**6)
WIDTH = 4


def problem(seed, leading, slots, vocabulary, dtype, scale):
  """(hidden, unembedding, targets, row) with logits up to about `scale`, all in `dtype`; some logits are equal."""
  rng = np.random.default_rng(seed)
  hidden = np.round(rng.uniform(-1, 1, (*leading, slots, WIDTH)), 1)
  table = np.round(rng.uniform(-1, 1, (vocabulary + 1, WIDTH)), 1) * scale
  hidden, table = jnp.asarray(hidden, dtype), jnp.asarray(table, dtype)
  return hidden, table[:-1], rng.integers(-1, vocabulary, leading), table[-1]


def doubles(*arrays):
  return [np.asarray(x.astype(jnp.float32), np.float64) for x in arrays]


def lse(x):
  largest = x.max(-1, keepdims=True)
  return (largest + np.log(np.exp(x - largest).sum(-1, keepdims=True)))[..., 0]


def log_sigmoid(x):
  return -np.logaddexp(0.0, -x)


def reference_scores(hidden, table, targets, row, form, shift):
  """float64 (log t, log d, log a)."""
  words, z = hidden @ table.T, hidden @ row + shift
  l = lse(words)
  targets = np.broadcast_to(targets[..., None], l.shape)
  target = np.take_along_axis(words, np.maximum(targets, 0)[..., None], -1)[..., 0]
  odds = z - l if form == "token" else z
  return np.where(targets < 0, 0.0, target - l), log_sigmoid(odds), log_sigmoid(-odds)


@FEW
@given(seed=SEEDS, shape=SHAPES, dtype=DTYPES, scale=SCALES, form=st.sampled_from(["token", "unit"]))
def test_readout(seed, shape, dtype, scale, form):
  leading, slots, vocabulary = shape
  hidden, table, targets, row = problem(seed, leading, slots, vocabulary, dtype, scale)
  prior = 0.9
  shift = np.log(9) + (np.log(vocabulary) if form == "token" else 0)
  compute = functools.partial(slot_scores, targets=targets, form=form, prior=prior, chunk_size=3)

  @jax.jit
  def run(hidden, table, row):
    return compute(hidden, table, dont_know=row), jax.grad(total, (0, 1, 2))(hidden, table, row)

  def total(hidden, table, row):
    scores = compute(hidden, table, dont_know=row)
    return sum(x.sum() for x in jax.tree.leaves(scores)) / 1e4

  scores, gradients = run(hidden, table, row)
  expected = reference_scores(*doubles(hidden, table), targets, *doubles(row), form, shift)
  for ours, wanted in zip((scores.log_target, scores.log_dont_know, scores.log_answer), expected):
    assert ours.dtype == jnp.float32
    assert (np.asarray(ours) <= 0).all()
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=2e-6 * (1 + scale))
  np.testing.assert_allclose(np.exp(scores.log_dont_know) + np.exp(scores.log_answer), 1.0, rtol=1e-5)
  for gradient in gradients:
    assert np.isfinite(np.asarray(gradient, np.float32)).all()
  words = token_scores(hidden, table, row, form=form, prior=prior)
  np.testing.assert_allclose(np.exp(np.asarray(words.log_probs, np.float64)).sum(-1), 1.0, rtol=1e-5)
  for ours, wanted in ((words.log_dont_know, expected[1]), (words.log_answer, expected[2])):
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=2e-6 * (1 + scale))


@FEW
@given(seed=SEEDS, shape=SHAPES, dtype=DTYPES, scale=SCALES)
def test_dense_logits(seed, shape, dtype, scale):
  leading, slots, vocabulary = shape
  rng = np.random.default_rng(seed)
  logits = jnp.asarray(rng.uniform(-scale, scale, (*leading, slots, vocabulary)), dtype)
  targets = rng.integers(-1, vocabulary - 1, leading)
  scores = SlotScores.from_logits(logits, targets, -1)
  (z,) = doubles(logits)
  answers, whole = lse(z[..., :-1]), lse(z)
  broadcast = np.broadcast_to(targets[..., None], answers.shape)
  target = np.take_along_axis(z, np.maximum(broadcast, 0)[..., None], -1)[..., 0] - answers
  expected = np.where(broadcast < 0, 0.0, target), z[..., -1] - whole, answers - whole
  for ours, wanted in zip((scores.log_target, scores.log_dont_know, scores.log_answer), expected):
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=2e-6 * (1 + scale))


def reference_stopping(log_d, log_a, omega):
  """float64 log s of one token, slot after slot."""
  omega = np.asarray(omega, np.float64) / np.sum(omega)
  waited, log_s = 0.0, []
  with np.errstate(divide="ignore"):
    for i, own in enumerate(omega):
      log_s.append(waited + np.logaddexp(np.log(own), log_a[i] + np.log(omega[i + 1 :].sum())))
      waited += log_d[i]
  return np.array(log_s)


@st.composite
def slot_values(draw):
  """(log t, log d, log a) of 1 to 8 slots, float32: log-odds and log-probabilities of any size."""
  slots = draw(st.sampled_from([1, 2, 4, 8]))
  values = st.one_of(st.sampled_from([0.0, 1e-8, 1.0, 17.0, 88.0, 104.0, 1e4, 2e4]), st.floats(0, 50, width=32))
  log_t = [-draw(values) for _ in range(slots)]
  odds = np.array([draw(values) * draw(st.sampled_from([-1, 1])) for _ in range(slots)], np.float64)
  return tuple(np.asarray(x, np.float32) for x in (log_t, log_sigmoid(odds), log_sigmoid(-odds)))


def weights(draw, slots, *, positive=False):
  values = [0.1, 1.0, 4.0, 11.0] if positive else [0.0, 0.0, 0.1, 1.0, 11.0]
  drawn = [draw(st.sampled_from(values)) for _ in range(slots)]
  return drawn if any(drawn) else [*drawn[:-1], 1.0]


_LOSSES = {
  "cyb": lambda scores, omega, gamma, rho: losses.cyb(scores, omega, gamma),
  "va": lambda scores, omega, gamma, rho: losses.cyb_va(scores, rho),
  "dp": lambda scores, omega, gamma, rho: losses.cyb_dp(scores, rho, 0.1),
}
_VALUE_AND_GRADIENT = {name: jax.jit(jax.value_and_grad(loss)) for name, loss in _LOSSES.items()}


@given(values=slot_values(), data=st.data())
def test_stopping_and_losses(values, data):
  log_t, log_d, log_a = values
  slots = len(log_t)
  omega, rho = weights(data.draw, slots), weights(data.draw, slots, positive=True)
  gamma = [data.draw(st.sampled_from([1.0, 0.5, 1e-3])) for _ in range(slots)]
  log_s = log_stopping_distribution(*map(jnp.asarray, (log_d, log_a)), jnp.asarray(omega))
  d, a, t = (np.asarray(x, np.float64) for x in (log_d, log_a, log_t))
  expected = reference_stopping(d, a, omega)
  np.testing.assert_allclose(log_s, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(np.exp(np.asarray(log_s, np.float64)).sum(), 1.0, rtol=1e-5)
  last = reference_stopping(d, a, [0.0] * (slots - 1) + [1.0])
  shares = np.asarray(rho) / np.sum(rho)
  wanted = {
    "cyb": -lse(expected + np.log(gamma) + t),
    "va": (np.exp(last) * (last - t - np.log(shares))).sum(),
    "dp": -lse(last + t) + 0.1 * (shares * (np.log(shares) - last)).sum(),
  }
  arguments = SlotScores(*map(jnp.asarray, values)), *map(jnp.float32, (omega, gamma, rho))
  for name, loss in _VALUE_AND_GRADIENT.items():
    value, gradient = loss(*arguments)
    np.testing.assert_allclose(value, wanted[name], rtol=2e-5, atol=2e-5, err_msg=name)
    for leaf in jax.tree.leaves(gradient):
      assert np.isfinite(leaf).all(), name


def reference_attention(query, key, value, mask):
  """float64 attention, one query at a time; a query that sees no key is not compared."""
  output = np.zeros_like(query)
  for b, q, h in np.ndindex(query.shape[:3]):
    seen = np.flatnonzero(mask[b, q])
    if len(seen) == 0:
      continue
    group = h // (query.shape[2] // key.shape[2])
    scores = key[b, seen, group] @ query[b, q, h] / np.sqrt(query.shape[-1])
    shares = np.exp(scores - lse(scores))
    output[b, q, h] = shares @ value[b, seen, group]
  return output


@FEW
@given(
  seed=SEEDS,
  shape=st.sampled_from([(1, 1, 1), (1, 8, 2), (5, 3, 1), (7, 1, 2)]),
  hidden=st.booleans(),
  dtype=st.sampled_from(["float32", "bfloat16"]),  # jax has no attention of float16 on a CPU
  scale=st.sampled_from([0.0, 1.0, 100.0]),
  documents=st.sampled_from(["none", "one", "padding", "several"]),
)
def test_attention(seed, shape, hidden, dtype, scale, documents):
  """Scores up to 10^4, T = 1, K = 7, documents of one token, and rows that are padding only."""
  tokens, width, groups = shape
  rng = np.random.default_rng(seed)
  segments = {
    "none": None,
    "one": np.ones((2, tokens), np.int32),
    "padding": np.stack([np.zeros(tokens, np.int32), np.ones(tokens, np.int32)]),
    "several": np.arange(2 * tokens, dtype=np.int32).reshape(2, tokens) // 2,  # of one or two tokens
  }[documents]
  heads = 2
  query, key, value = (
    jnp.asarray(rng.normal(size=(2, tokens * width, count, 4)) * size, dtype)
    for count, size in ((heads, scale), (groups, scale), (groups, 1.0))
  )
  seen = _mask(tokens, width, hidden, segments)
  expected = reference_attention(*doubles(query, key, value), seen)
  # The products of scores have a relative error, and the softmax turns their absolute error into a relative one.
  tolerance = {"float32": 1e-5, "bfloat16": 3e-2}[dtype] + 1e-6 * scale**2
  for name, implementation, mask in _masks(tokens, width, hidden, segments, seen):
    got = _ATTEND(query, key, value, mask=mask, implementation=implementation)
    assert got.dtype == jnp.dtype(dtype)
    got = np.asarray(got, np.float32)
    assert np.isfinite(got).all(), name
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance, err_msg=name)


_ATTEND = jax.jit(attention.attend, static_argnames="implementation")


def _masks(tokens, width, hidden, segments, seen):
  """(name, implementation, mask) of every form of the same mask."""
  visibility = "hidden" if hidden else "visible"
  ids = None if segments is None else jnp.asarray(segments)
  dense = attention_mask(tokens, width, visibility=visibility, segment_ids=ids)
  if dense is not None:
    np.testing.assert_array_equal(np.broadcast_to(dense[:, 0], seen.shape), seen)
    yield "dense", "xla", dense
  if hidden:
    mask = attention.HiddenSlots(width, ids)
  else:
    mask = None if ids is None else attention.SegmentMask(jnp.repeat(ids, width, axis=1))
  for implementation in ("xla", "blocks"):
    yield implementation, implementation, mask


def _mask(tokens, width, hidden, segments):
  """bool[2, T W, T W], by the definition of the slots."""
  mask = np.zeros((2, tokens * width, tokens * width), bool)
  for b, q, k in np.ndindex(mask.shape):
    n, (m, j) = q // width, divmod(k, width)
    own_document = segments is None or segments[b, n] == segments[b, m]
    mask[b, q, k] = k <= q and own_document and (n == m or j == 0 or not hidden)
  return mask


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_of_attention_by_hand(dtype):
  """Slot 1 weighs by softmax(log 3 * (1, 0)) = (3/4, 1/4)."""
  query = np.array([[[[1.0]], [[np.log(3.0)]]]])
  key, value = np.array([[[[1.0]], [[0.0]]]]), np.array([[[[4.0]], [[8.0]]]])
  mask = np.tril(np.ones((1, 2, 2), bool))
  np.testing.assert_allclose(reference_attention(query, key, value, mask)[0, :, 0, 0], [4, 5])
