"""The chunked readout against a dense float64 readout: values, gradients, odd sizes, caps, masks, memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cyb_jax import losses, tiling
from cyb_jax.readout import slot_scores, token_scores
from cyb_jax.stopping import SlotScores


def dense(hidden, unembedding, targets, dont_know, form="token", prior=None, soft_cap=None, vocab_size=None, bias=0.0):
  """All logits at once, in the dtype of the inputs; `<don't know>` is the last column (token form)."""
  words = hidden @ unembedding.T
  dk = words[..., dont_know] if isinstance(dont_know, int) else hidden @ dont_know
  if soft_cap:
    words = soft_cap * jnp.tanh(words / soft_cap)
    dk = soft_cap * jnp.tanh(dk / soft_cap) if form == "token" else dk
  real = len(unembedding) if vocab_size is None else vocab_size
  words = jnp.where(jnp.arange(len(unembedding)) < real, words, -jnp.inf)
  if isinstance(dont_know, int):
    words = jnp.where(jnp.arange(len(unembedding)) == dont_know, -jnp.inf, words)
  l = jax.nn.logsumexp(words, -1)
  z_y = jnp.take_along_axis(words, jnp.broadcast_to(targets[..., None, None], (*words.shape[:-1], 1)), -1)[..., 0]
  size = real + (not isinstance(dont_know, int))
  if prior is not None:
    dk = dk + (np.log(prior / (1 - prior)) + (np.log(size - 1) if form == "token" else 0))
  dk = dk + bias
  odds = dk - l if form == "token" else dk
  return SlotScores(z_y - l, -jnp.log1p(jnp.exp(-odds)), -jnp.log1p(jnp.exp(odds)))


def problem(seed, leading=(2, 3), slots=4, width=8, vocabulary=13):
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(*leading, slots, width)).astype(np.float32)
  unembedding = rng.normal(size=(vocabulary, width)).astype(np.float32)
  return (
    hidden,
    unembedding,
    rng.integers(1, vocabulary - 2, leading),
    rng.normal(size=width).astype(np.float32),
  )


def weighted(scores, seed=0):
  """A number that depends on all three scores of every slot, with different coefficients."""
  leaves = jax.tree.leaves(scores)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return sum((x * jax.random.normal(k, x.shape, jnp.float32)).sum() for x, k in zip(leaves, keys))


OPTIONS = {
  "plain": {},
  "prior": {"prior": 0.9},
  "unit": {"form": "unit", "prior": 0.9},
  "cap": {"soft_cap": 3.0, "prior": 0.5},
  "cap unit": {"soft_cap": 3.0, "form": "unit"},
  "padded vocabulary": {"vocab_size": 11},
  "row of the vocabulary": {"dont_know": 0, "prior": 0.9},
  "row of a padded vocabulary": {"dont_know": 10, "vocab_size": 11, "prior": 0.9, "soft_cap": 5.0},
}


@pytest.fixture(params=["kept", "again"])
def softmax(request, monkeypatch):
  """The backward pass takes the softmax that the forward pass kept, or computes it again."""
  monkeypatch.setattr(tiling, "KEPT", {"kept": 2**26, "again": 0}[request.param])
  return request.param


# Chunks of one slot, of a part of the slots of several tokens, and of all slots.
@pytest.mark.parametrize(
  ("path", "chunk_size"), [("kept", 5), ("kept", None), ("again", 1), ("again", 5), ("frozen", 5)]
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_agrees_with_the_dense_readout(options, chunk_size, path, exact, monkeypatch):
  monkeypatch.setattr(tiling, "KEPT", 2**26 if path == "kept" else 0)
  frozen = path == "frozen"
  hidden, unembedding, targets, row = problem(1)
  options = dict(options)
  dont_know = options.pop("dont_know", row)
  arrays = (hidden, unembedding) if isinstance(dont_know, int) else (hidden, unembedding, dont_know)

  def ours(hidden, unembedding, dont_know=dont_know):
    return slot_scores(hidden, unembedding, targets, dont_know, chunk_size=chunk_size, frozen=frozen, **options)

  def oracle(hidden, unembedding, dont_know=dont_know):
    return dense(hidden, unembedding, targets, dont_know, **options)

  # Of a frozen unembedding that is its own `<don't know>` only the other gradients are defined.
  argnums = (0, 2)[: len(arrays) - 1] if frozen else tuple(range(len(arrays)))
  got, got_grad = ours(*arrays), jax.grad(lambda *a: weighted(ours(*a)), argnums)(*arrays)
  with jax.enable_x64(True):
    doubles = [jnp.asarray(a, jnp.float64) for a in arrays]
    expected, expected_grad = oracle(*doubles), jax.grad(lambda *a: weighted(oracle(*a)), argnums)(*doubles)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
    assert np.abs(a - b).max() <= 1e-6 * np.abs(b).max()
  for a, b in zip(got_grad, expected_grad):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@settings(max_examples=6)
@given(
  seed=st.integers(0, 1000),
  leading=st.sampled_from([(), (1,), (5,), (2, 3), (0,)]),
  slots=st.integers(1, 3),
  vocabulary=st.sampled_from([3, 4, 17, 31]),
  chunk_size=st.sampled_from([None, 1, 2, 7]),
)
def test_any_shape(seed, leading, slots, vocabulary, chunk_size):
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(*leading, slots, 4)).astype(np.float32)
  unembedding = rng.normal(size=(vocabulary, 4)).astype(np.float32)
  targets = rng.integers(0, vocabulary, leading)
  row = rng.normal(size=4).astype(np.float32)
  scores = slot_scores(hidden, unembedding, targets, row, prior=0.9, chunk_size=chunk_size)
  assert scores.log_target.shape == (*leading, slots)
  expected = dense(jnp.asarray(hidden), jnp.asarray(unembedding), jnp.asarray(targets), row, prior=0.9)
  for a, b in zip(jax.tree.leaves(scores), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shards", [2, 5])
def test_the_result_does_not_depend_on_shards(shards, exact):
  hidden, unembedding, targets, row = problem(7)

  def run(**options):
    return jax.value_and_grad(
      lambda h, u, r: weighted(slot_scores(h, u, targets, r, prior=0.9, chunk_size=3, **options)), (0, 1, 2)
    )(hidden, unembedding, row)

  for a, b in zip(jax.tree.leaves(run(shards=shards)), jax.tree.leaves(run())):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_sharded_batch_is_reduced_once():
  """The loop over chunks does not communicate, and the unembedding's gradient is reduced once after it."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  hidden = jax.ShapeDtypeStruct((16, 32, 4, 16), jnp.float32, sharding=rows)
  targets = jax.ShapeDtypeStruct((16, 32), jnp.int32, sharding=rows)
  unembedding = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=everywhere)
  row = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=everywhere)

  def value(hidden, unembedding, row, targets):
    return weighted(slot_scores(hidden, unembedding, targets, row, chunk_size=32, shards=8))

  step = jax.jit(jax.grad(value, (0, 1, 2)), out_shardings=(rows, everywhere, everywhere))
  computation, sent = "", []
  for line in step.lower(hidden, unembedding, row, targets).compile().as_text().splitlines():
    if line and not line[0].isspace():
      computation = line.split()[0]
    if re.search(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\(", line):
      sent.append((computation, line))
  assert sent
  assert {where for where, _ in sent} == {"ENTRY"}
  assert not any("all-gather" in line and "[16,32" in line for _, line in sent)


def test_equals_from_logits(exact):
  """The row form equals dense logits with one more column."""
  hidden, unembedding, targets, row = problem(2)
  logits = hidden @ np.concatenate([unembedding, row[None]]).T
  dense_scores = SlotScores.from_logits(logits, targets, -1, prior=0.9)
  for a, b in zip(
    jax.tree.leaves(slot_scores(hidden, unembedding, targets, row, prior=0.9)), jax.tree.leaves(dense_scores)
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradient_by_finite_differences(softmax):
  with jax.enable_x64(True):
    hidden, unembedding, targets, row = (jnp.asarray(x) for x in problem(3))
    arrays = [x.astype(jnp.float64) for x in (hidden, unembedding, row)]
    rng = np.random.default_rng(0)
    directions = [jnp.asarray(rng.normal(size=x.shape)) for x in arrays]

    def value(*arrays):
      hidden, unembedding, row = arrays
      return weighted(slot_scores(hidden, unembedding, targets, row, prior=0.9, soft_cap=4.0, chunk_size=5))

    gradients = jax.grad(value, (0, 1, 2))(*arrays)
    step = 1e-6
    up, down = (value(*(x + s * v for x, v in zip(arrays, directions))) for s in (step, -step))
    slope = sum((g * v).sum() for g, v in zip(gradients, directions))
    np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("slots", [(-1,), (0, 2), (3, 1)])
def test_chosen_slots(slots, exact):
  hidden, unembedding, targets, row = problem(4)
  some = slot_scores(hidden, unembedding, targets, row, slots=slots)
  every = slot_scores(hidden, unembedding, targets, row)
  for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(every)):
    np.testing.assert_allclose(a, b[..., list(slots)], rtol=1e-5, atol=1e-6)


def flops(argnums=(0, 1), chunk_size=1024, **options):
  hidden = jax.ShapeDtypeStruct((16, 8, 4, 32), jnp.float32)
  unembedding = jax.ShapeDtypeStruct((512, 32), jnp.float32)
  targets = jax.ShapeDtypeStruct((16, 8), jnp.int32)
  row = jax.ShapeDtypeStruct((32,), jnp.float32)

  def value(hidden, unembedding, targets, row):
    return slot_scores(hidden, unembedding, targets, row, chunk_size=chunk_size, **options).log_target.sum()

  compiled = jax.jit(jax.grad(value, argnums)).lower(hidden, unembedding, targets, row).compile()
  return compiled.cost_analysis()["flops"]


def test_unused_slots_are_not_computed():
  assert flops(slots=(-1,)) < 0.3 * flops()


def test_products(softmax):
  """Three products with the unembedding if the softmax is kept, or four; two if the unembedding is frozen."""
  product = 2 * 16 * 8 * 4 * 32 * 512
  # XLA shares the logits of the two passes of a single chunk, so there are two, and it counts the body of a loop once.
  products = 2 * flops(chunk_size=256) / product
  assert products == pytest.approx(3 if softmax == "kept" else 4, abs=0.4)
  if softmax == "kept":
    assert 2 * flops((0,), chunk_size=256, frozen=True) / product == pytest.approx(2, abs=0.4)


def test_a_frozen_readout_of_certain_targets_in_bf16(exact):
  """The gradient of a target that is nearly certain is a small difference of large means."""
  hidden, unembedding, targets, _ = problem(10, leading=(64,), slots=1, width=16)
  hidden = jnp.asarray(3.0 * unembedding[targets][:, None], jnp.bfloat16)
  unembedding = jnp.asarray(unembedding, jnp.bfloat16)

  def value(hidden, unembedding, **options):
    return slot_scores(hidden, unembedding, targets, None, **options).log_target.sum()

  ours = np.asarray(jax.grad(value)(hidden, unembedding, frozen=True), np.float64)
  wanted = np.asarray(jax.grad(value)(hidden.astype(jnp.float32), unembedding.astype(jnp.float32)), np.float64)
  scale = np.abs(wanted).max(-1)
  assert scale.min() < 1e-6
  certain = scale[:, 0] > 1e-30
  np.testing.assert_array_less(np.abs(ours - wanted).max(-1)[certain], 0.02 * scale[certain])


def test_saturated_logits_have_finite_gradients(softmax):
  hidden = jnp.full((1, 2, 4), 20.0)
  unembedding = jnp.array([[1.0] * 4, [-1.0] * 4, [0.0] * 4])
  for row in (jnp.ones(4), -jnp.ones(4)):
    value, gradient = jax.value_and_grad(
      lambda h, row=row: sum(x.sum() for x in jax.tree.leaves(slot_scores(h, unembedding, jnp.array([1]), row)))
    )(hidden)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_without_dont_know():
  hidden, unembedding, targets, _ = problem(5)
  scores = slot_scores(hidden, unembedding, targets, None)
  np.testing.assert_array_equal(jnp.exp(scores.log_dont_know), 0.0)
  np.testing.assert_array_equal(scores.log_answer, 0.0)


def test_bf16_gradient_of_f32_unembedding_is_summed_in_f32(softmax):
  """Many small contributions to one row, which would be lost if the sum over chunks were in bf16."""
  hidden = jnp.full((4096, 1, 2), 0.01, jnp.bfloat16)
  unembedding = jnp.zeros((2, 2))
  targets = jnp.zeros(4096, jnp.int32)

  def value(unembedding):
    return slot_scores(hidden, unembedding, targets, None, chunk_size=16).log_target.sum()

  gradient = jax.grad(value)(unembedding)
  assert gradient.dtype == jnp.float32
  np.testing.assert_allclose(gradient[0], 4096 * 0.5 * float(hidden[0, 0, 0]), rtol=1e-3)


def test_bf16_gradient_of_the_dont_know_row_is_summed_in_f32():
  hidden, unembedding, targets, row = problem(8, leading=(64,))
  hidden = hidden.astype(jnp.bfloat16)

  def total(row, hidden):
    return slot_scores(hidden, unembedding.astype(hidden.dtype), targets, row).log_dont_know.sum()

  gradient = jax.grad(total)(row, hidden)
  exact = jax.grad(total)(row, hidden.astype(jnp.float32))
  assert np.abs(gradient - gradient.astype(jnp.bfloat16)).max() > 0
  np.testing.assert_allclose(gradient, exact, rtol=2e-2, atol=2e-2)


def test_numpy_integers_are_valid_rows():
  hidden, unembedding, targets, _ = problem(9)
  for a, b in zip(
    jax.tree.leaves(slot_scores(hidden, unembedding, targets, np.int64(0))),
    jax.tree.leaves(slot_scores(hidden, unembedding, targets, 0)),
  ):
    np.testing.assert_array_equal(a, b)


def memory(leading=(32, 1024, 4), width=768, vocabulary=50304):
  hidden = jax.ShapeDtypeStruct((*leading, width), jnp.float32)
  unembedding = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)
  targets = jax.ShapeDtypeStruct(leading[:-1], jnp.int32)
  row = jax.ShapeDtypeStruct((width,), jnp.float32)

  def value(hidden, unembedding, row, targets):
    return sum(x.sum() for x in jax.tree.leaves(slot_scores(hidden, unembedding, targets, row, prior=0.9)))

  step = jax.jit(jax.value_and_grad(value, (0, 1, 2)))
  return step.lower(hidden, unembedding, row, targets).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("leading", [(32, 1024, 4), (131072, 1), (131071, 1)])
def test_memory_is_bounded(leading):
  """131,072 slots x 768 x 50,304 in f32: dense logits and their gradient would take about 50 GiB."""
  assert memory(leading) <= 2 * 2**30


def test_errors():
  hidden, unembedding, targets, row = problem(6)
  for arguments, options, message in [
    ((hidden, unembedding[:, :3], targets, row), {}, "unembedding: shape"),
    ((hidden, unembedding, targets[:1], row), {}, "targets: shape"),
    ((hidden, unembedding, targets, 13), {}, "dont_know: 13"),
    ((hidden, unembedding, targets, row), {"slots": (4,)}, r"slots: \(4,\)"),
    ((hidden, unembedding, targets, row), {"slots": ()}, "slots"),
    ((hidden, unembedding, targets, row), {"vocab_size": 14}, "vocab_size: 14"),
    ((hidden, unembedding, targets, row), {"prior": 0.0}, "prior: 0.0"),
    ((hidden, unembedding, targets, row), {"chunk_size": 0}, "chunk_size: 0"),
    ((hidden, unembedding, targets, row), {"shards": 0}, "shards: 0"),
    ((hidden, unembedding, targets, row), {"form": "both"}, "form: 'both'"),
  ]:
    with pytest.raises(ValueError, match=message):
      slot_scores(*arguments, **options)


@pytest.mark.parametrize("form", ["token", "unit"])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_scores_of_all_tokens_equal_scores_of_targets(form, soft_cap, exact):
  """`token_scores` against `slot_scores` with each token as the target; padding rows are not tokens."""
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(3, 2, 8)), jnp.float32)
  unembedding = jnp.asarray(rng.normal(size=(11, 8)), jnp.float32)
  row = jnp.asarray(rng.normal(size=8), jnp.float32)
  options = {"form": form, "prior": 0.7, "soft_cap": soft_cap, "vocab_size": 9, "dont_know_bias": 0.3}
  words = token_scores(hidden, unembedding, row, **options)
  assert words.log_probs.shape == (3, 2, 9)
  np.testing.assert_allclose(jnp.exp(words.log_probs).sum(-1), 1.0, rtol=1e-5)
  for word in range(9):
    scores = slot_scores(hidden, unembedding, jnp.full(3, word), row, **options)
    np.testing.assert_allclose(words.log_probs[..., word], scores.log_target, atol=1e-5)
    np.testing.assert_allclose(words.log_dont_know, scores.log_dont_know, atol=1e-5)
    np.testing.assert_allclose(words.log_answer, scores.log_answer, atol=1e-5)
  never = token_scores(hidden, unembedding, None, vocab_size=9)
  assert (never.log_dont_know == -jnp.inf).all()
  assert (never.log_answer == 0).all()


@pytest.mark.parametrize("form", ["dense", "token", "unit", None])
def test_ignored_labels_have_no_loss_and_no_gradient(form):
  """Such labels are -100 in PyTorch and transformers."""
  rng = np.random.default_rng(3)
  hidden = jnp.asarray(rng.normal(size=(2, 3, 2, 5)), jnp.float32)
  unembedding = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
  row = jnp.asarray(rng.normal(size=5), jnp.float32)
  targets = jnp.array([[1, -100, 3], [-1, -100, 6]])

  def loss(hidden, unembedding):
    if form == "dense":
      logits = jnp.concatenate([hidden @ unembedding.T, (hidden @ row)[..., None]], -1)
      scores = SlotScores.from_logits(logits, targets, 7)
    elif form is None:
      scores = slot_scores(hidden, unembedding, targets, None)
    else:
      scores = slot_scores(hidden, unembedding, targets, row, form=form)
    return losses.last_slot_cross_entropy(scores), losses.cyb(scores)

  last, cyb = loss(hidden, unembedding)
  ignored = np.asarray(targets) < 0
  np.testing.assert_array_equal(last[ignored], 0)
  np.testing.assert_allclose(cyb[ignored], 0, atol=1e-6)
  assert (np.asarray(last)[~ignored] > 0).all()
  gradient = jax.grad(lambda h: sum(x.sum() for x in loss(h, unembedding)))(hidden)
  np.testing.assert_allclose(gradient[ignored], 0, atol=1e-6)
  # The unembedding's gradient is that of the other tokens alone.
  together = jax.grad(lambda u: loss(hidden, u)[1].sum())(unembedding)
  alone = jax.grad(lambda u: jnp.where(ignored, 0, loss(hidden, u)[1]).sum())(unembedding)
  np.testing.assert_allclose(together, alone, atol=1e-5)


def test_probabilities_of_large_logits_sum_to_one():
  """Two words with the logits 1000 and 990: 1000 + log(1 + e^-10) is 1000 in float32, which would lose e^-10."""
  scores = token_scores(jnp.array([[1000.0]]), jnp.array([[1.0], [0.99]]), jnp.array([0.0]), form="unit")
  np.testing.assert_allclose(np.exp(np.asarray(scores.log_probs, np.float64)).sum(-1), 1.0, rtol=1e-6)
  np.testing.assert_allclose(scores.log_probs[0, 0], -np.log1p(np.exp(-10.0)), rtol=1e-3)
