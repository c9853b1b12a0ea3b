"""Recipes *sampled* and *on_policy* against a slow reference that lays slots out token by token; packing and drawing;
calibration and the warm-up of d; pauses in the form of earlier work."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from models import (
  TINY,
  VOCABULARY,
  assert_trees_close,
  assert_trees_equal,
  build,
  random_batch,
  tiny_config,
  with_part,
)  # fmt: skip

from cyb_jax import configs, losses, methods, training
from cyb_jax.errors import InputError
from cyb_jax.evaluation import Evaluator
from cyb_jax.interop import pretrained
from cyb_jax.methods import configure
from cyb_jax.partitioning.mesh import data_shards, make_mesh
from cyb_jax.pauses import draw_lengths, pack, packed_row_slots
from cyb_jax.stopping import log_stopping_distribution
from cyb_jax.training.step import Totals, TrainState, train_step

SAMPLED = {"name": "cyb", "pauses": 2, "recipe": "sampled", "omega": (1.0, 2.0, 1.0)}
ON_POLICY = {"name": "cyb", "pauses": 2, "recipe": "on_policy"}
KEY = jax.random.key(7)


# The layout of slots.


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=7), row_slots=st.integers(1, 30))
def test_pack_lays_out_slots_in_order_and_drops_the_rest(lengths, row_slots):
  packing = pack(jnp.array([lengths]), 4, row_slots)
  wanted = [(n, j) for n, count in enumerate(lengths) for j in range(count)]
  laid = list(zip(packing.token[0].tolist(), packing.slot[0].tolist()))
  fits = min(row_slots, len(wanted))
  assert laid[:fits] == wanted[:fits]
  # Indices of padding must be valid.
  assert all(0 <= n < len(lengths) and 0 <= j < 4 for n, j in laid)
  ends = np.cumsum(lengths)
  assert packing.kept[0].tolist() == (ends <= row_slots).tolist()
  for n, count in enumerate(lengths):
    if ends[n] <= row_slots:
      places = packing.places[0, n].tolist()
      assert [laid[place] for place in places] == [(n, min(j, count - 1)) for j in range(4)]


def test_a_draw_depends_only_on_its_row():
  tokens = random_batch(3, 6, 9)["tokens"]
  shares = jnp.array([0.2, 0.5, 0.3])
  drawn = draw_lengths(KEY, tokens, shares)
  np.testing.assert_array_equal(draw_lengths(KEY, tokens[::-1], shares), drawn[::-1])
  np.testing.assert_array_equal(draw_lengths(KEY, tokens[2:4], shares), drawn[2:4])
  np.testing.assert_array_equal(draw_lengths(KEY, tokens, jnp.broadcast_to(shares, (*tokens.shape, 3))), drawn)
  assert (draw_lengths(jax.random.key(8), tokens, shares) != drawn).any()
  # Two rows whose tokens differ only in their order have independent draws.
  swapped = tokens[:, [1, 0, *range(2, 9)]]
  assert (draw_lengths(KEY, swapped, shares) != drawn).any()


def test_draws_have_the_expected_shares():
  tokens = np.random.default_rng(0).integers(0, VOCABULARY, (64, 200)).astype(np.int32)
  shares = np.array([0.1, 0.0, 0.6, 0.3])
  drawn = np.asarray(draw_lengths(KEY, tokens, jnp.asarray(shares)))
  found = np.bincount(drawn.ravel(), minlength=5)[1:] / drawn.size
  assert found[1] == 0
  # Four standard deviations of 12,800 draws.
  np.testing.assert_allclose(found, shares, atol=4 * 0.5 / np.sqrt(drawn.size))
  assert (draw_lengths(KEY, tokens, jnp.array([0.0, 0.0, 1.0])) == 3).all()


def test_rows_are_long_enough_for_the_drawn_slots():
  assert packed_row_slots([0, 0, 0, 1], 17) == 68
  assert packed_row_slots([1, 0], 17) == 17
  assert packed_row_slots([0.3, 0.4, 0.3], 5) == 15  # never more than all slots
  # 1,000 tokens of 1 or 2 slots: 1,500 and four times sqrt(1,000 / 4).
  assert packed_row_slots([0.5, 0.5], 1000) == 1564
  tokens = np.random.default_rng(1).integers(0, VOCABULARY, (4000, 64)).astype(np.int32)
  lengths = draw_lengths(KEY, tokens, jnp.array([0.5, 0.25, 0.25]))
  overflowing = np.asarray(lengths.sum(-1)) > packed_row_slots([0.5, 0.25, 0.25], 64)
  assert overflowing.sum() <= 3


# Results in packed rows.


def slow_row(method, params, tokens, targets, lengths, segment_ids=None):
  """(t, d) of one row: f64 lists by token. Slots run one by one, with an explicit mask and dense logits."""
  config = method.config
  table = params["decoder"]["embedding"]
  inputs, positions, owner, slot, offsets = [], [], [], [], []
  for n, (token, length) in enumerate(zip(tokens.tolist(), lengths.tolist())):
    for j in range(length):
      row = table[token]
      offset = jnp.zeros(TINY.d_model)
      if j:
        row = params["pause_input"][0 if config.pause_shared else j - 1]
        if config.pause_input == "token+pause":
          row = row + table[token]
        if config.pause_offset:
          offset = params["pause_offset"][j - 1]
      positions.append(len(inputs) if config.pause_positions == "shifting" else n)
      inputs.append(row)
      owner.append(n)
      slot.append(j)
      offsets.append(offset)
  size = len(inputs)
  mask = np.zeros((size, size), bool)
  for q in range(size):
    for k in range(q + 1):
      hidden = config.pause_visibility == "hidden" and slot[k] > 0 and owner[k] != owner[q]
      apart = segment_ids is not None and segment_ids[owner[k]] != segment_ids[owner[q]]
      mask[q, k] = not hidden and not apart
  out = method.decoder.apply(
    {"params": params["decoder"]},
    jnp.stack(inputs)[None],
    jnp.array([positions]),
    mask=jnp.asarray(mask)[None, None],
    query_key_offset=jnp.stack(offsets) if config.pause_offset else None,
  )[0]
  if config.slot_heads:
    out = jnp.stack([state @ params["slot_heads"][j] for state, j in zip(out, slot)])
  logits = np.asarray(jnp.concatenate([out @ table[:VOCABULARY].T, (out @ params["dont_know"])[:, None]], -1))
  rows = [([], []) for _ in tokens]
  for place in range(size):
    t, d, _ = reference.probabilities(logits[place], targets[owner[place]], VOCABULARY, prior=0.9)
    rows[owner[place]][0].append(t)
    rows[owner[place]][1].append(d)
  return rows


LAYOUTS = {
  "plain": {},
  "hidden": {"pause_visibility": "hidden"},
  "token+pause, offsets": {"pause_input": "token+pause", "pause_offset": True},
  "shared, shifting": {"pause_shared": True, "pause_positions": "shifting"},
  "heads": {"slot_heads": True},
}


# Each option once; the other combinations are slow tests.
SLOW = pytest.mark.slow
CASES = [
  pytest.param(layout, segment_ids, marks=[] if segment_ids == (number % 2 > 0) else SLOW)
  for number, layout in enumerate(LAYOUTS)
  for segment_ids in (False, True)
]


@pytest.mark.parametrize(("layout", "with_segment_ids"), CASES)
@pytest.mark.slow
def test_sampled_against_slots_laid_out_one_by_one(layout, with_segment_ids, exact):
  method, params = build(**SAMPLED, **LAYOUTS[layout], gamma=(1.0, 0.9, 0.8))
  if "pause_offset" in params:
    params["pause_offset"] += jax.random.normal(KEY, params["pause_offset"].shape)
  if "slot_heads" in params:
    params["slot_heads"] += 0.2 * jax.random.normal(KEY, params["slot_heads"].shape)
  batch = random_batch(1, 3, 7)
  segment_ids = [None] * 3
  if with_segment_ids:
    batch["segment_ids"] = segment_ids = np.cumsum(batch["tokens"] % 5 == 0, -1).astype(np.int32)
  out = method.loss(params, batch, KEY)
  lengths = np.asarray(draw_lengths(KEY, batch["tokens"], jnp.array([0.25, 0.5, 0.25])))
  np.testing.assert_array_equal(out.slots, lengths)
  assert len(np.unique(lengths)) == 3
  kept = np.asarray(out.kept)
  assert kept.sum() > 15
  for b in range(3):
    rows = slow_row(method, params, batch["tokens"][b], batch["targets"][b], lengths[b], segment_ids[b])
    for n, (t, d) in enumerate(rows):
      if not kept[b, n]:
        continue
      # The last slot of a token answers: the formulas with W = W_n and no omega state the same.
      t, d = np.array(t), np.array(d)
      s = reference.stopping(d, 1 - d)
      want = reference.cyb(t, d, 1 - d, gamma=(1.0, 0.9, 0.8)[: len(t)])
      np.testing.assert_allclose(out.loss[b, n], want, rtol=2e-5, atol=2e-5)
      np.testing.assert_allclose(out.log_likelihood[b, n], np.log((s * t).sum()), rtol=2e-5, atol=2e-5)
      np.testing.assert_allclose(out.stopping[b, n, : len(t)], s, rtol=1e-4, atol=1e-6)
      np.testing.assert_array_equal(out.stopping[b, n, len(t) :], 0)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"pause_visibility": "hidden", "pause_offset": True},
    {"dont_know": "unit"},
  ],
)
@pytest.mark.slow
def test_sampled_equals_constant_bit_for_bit_if_all_slots_are_allowed(options):
  """Parameters and moments after steps of training; the packed form is equal up to rounding."""
  steps = {}
  for recipe in ("constant", "sampled"):
    method, params = build(name="cyb", pauses=3, recipe=recipe, **options)
    optimizer = optax.adam(3e-3)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, zero, params, optimizer.init(params), Totals.zeros(4))
    step = jax.jit(functools.partial(train_step, method=method, optimizer=optimizer, seed=0))
    for k in range(4):
      state = step(state, random_batch(k, 4, 9, uneven=True))
    steps[recipe] = jax.device_get(state)
  assert_trees_equal(steps["constant"], steps["sampled"])
  batch = random_batch(4, 4, 9)
  lengths = jnp.full((4, 9), 4)
  packed = method.slot_scores_packed(params, batch, pack(lengths, 4, 36))
  assert_trees_close(packed, method.slot_scores(params, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [pytest.param({}, marks=SLOW), {"pause_visibility": "hidden", "dont_know": "unit"}])
@pytest.mark.slow
def test_gradients_of_packed_rows_by_differences(options, exact):
  method, params = build(**SAMPLED, **options, slot_budget=1.8)
  batch = random_batch(14, 4, 8)

  @jax.jit
  def objective(params):
    out = method.loss(params, batch, KEY)
    return (out.loss * out.kept).sum()

  gradient = jax.jit(jax.grad(objective))(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(leaf).all(), path
    assert np.abs(leaf).max() > 0, path
  # In the direction of the gradient, where a difference is most informative.
  norm = optax.global_norm(gradient)
  h = 1e-2 / norm
  plus, minus = (jax.tree.map(lambda p, g, s=s: p + s * h * g, params, gradient) for s in (1, -1))
  assert float(objective(plus) - objective(minus)) == pytest.approx(float(2 * h * norm**2), rel=2e-2)


@SLOW
def test_tokens_that_do_not_fit_have_no_weight_and_are_counted():
  method, params = build(**SAMPLED, slot_budget=1.5)
  batch = random_batch(2, 4, 8)
  out = method.loss(params, batch, KEY)
  ends = np.cumsum(np.asarray(out.slots), -1)
  np.testing.assert_array_equal(out.kept, ends <= 12)
  assert 0 < (~np.asarray(out.kept)).sum() < 16
  optimizer = optax.sgd(1.0)
  zero = jnp.zeros((), jnp.int32)
  state = TrainState(zero, zero, params, optimizer.init(params), Totals.zeros(3))
  step = jax.jit(functools.partial(train_step, method=method, optimizer=optimizer, seed=0))
  after = step(state, batch)
  rng = jax.random.fold_in(jax.random.key(0), 1)
  kept = np.asarray(method.loss(params, batch, rng).kept)
  assert float(after.totals.dropped) == (~kept).sum() > 0
  assert float(after.totals.tokens) == kept.sum()
  # They have no gradient: other targets there make no difference.
  other = dict(batch, targets=np.where(kept, batch["targets"], (batch["targets"] + 5) % VOCABULARY))
  assert_trees_equal(step(state, other).params, after.params)


@pytest.mark.parametrize("options", [SAMPLED, ON_POLICY])
@pytest.mark.slow
def test_draws_are_the_same_on_all_devices_and_in_all_parts(options):
  config = configs.freeze(tiny_config(**{k: ":".join(map(str, v)) if k == "omega" else v for k, v in options.items()}))

  def state_after(config, devices):
    mesh = make_mesh(config.parallelism, jax.devices()[:devices])
    shards = 1 if config.parallelism.strategy == "pmap" else data_shards(mesh)
    method = config.build_method(VOCABULARY, data_shards=shards)
    strategy = training.build_strategy(config, method, training.make_optimizer(config.optimizer, 10, 16), mesh)
    state = strategy.init()
    with jax.default_matmul_precision("highest"):
      for step in range(2):
        state = strategy.step(state, strategy.shard_batch(random_batch(step, 8, 6, uneven=True)))
    return jax.device_get(strategy.global_state(state))

  one = state_after(config, 1)
  for other in (
    state_after(config, 8),
    state_after(with_part(config, "parallelism", strategy="pmap"), 8),
    state_after(with_part(config, "parallelism", fsdp=2, tensor=2), 8),
    state_after(with_part(config, "optimizer", accumulate=2), 2),
  ):
    assert float(other.totals.slots) == float(one.totals.slots)
    np.testing.assert_allclose(other.totals.loss, one.totals.loss, rtol=1e-5)
    assert_trees_close(other.params, one.params, rtol=1e-3, atol=2e-5)


# On-policy.


@pytest.mark.slow
def test_on_policy_draws_from_the_models_own_distribution(exact):
  method, params = build(**ON_POLICY, policy_floor=0.25)
  batch = random_batch(4, 5, 6)
  out = method.loss(params, batch, KEY)
  scores = methods.build(configure(name="cyb", pauses=2), TINY, vocab_size=VOCABULARY).slot_scores(params, batch)
  d = np.exp(np.asarray(scores.log_dont_know, np.float64))
  shares = np.array([[reference.stopping(row, 1 - row) for row in rows] for rows in d], np.float64)
  lengths = draw_lengths(KEY, batch["tokens"], jnp.asarray(0.75 * shares + 0.25 / 3))
  np.testing.assert_array_equal(out.slots, lengths)
  # Given the layout it equals the recipe sampled: the same losses and gradient, because no gradient flows through the
  # draw.
  laid = methods.build(configure(**SAMPLED, slot_budget=3.0), TINY, vocab_size=VOCABULARY)
  packing = pack(lengths, 3, 18)

  def given_the_layout(params):
    own = laid.slot_scores_packed(params, batch, packing)
    return losses.cyb(own, jax.nn.one_hot(lengths - 1, 3)).sum()

  value, gradient = jax.value_and_grad(lambda params: method.loss(params, batch, KEY).loss.sum())(params)
  want, want_gradient = jax.value_and_grad(given_the_layout)(params)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
  assert_trees_close(gradient, want_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_floor_keeps_every_slot_trained():
  method, params = build(**ON_POLICY, policy_floor=0.3, dont_know="unit")
  # A model that never requests a pause.
  params["dont_know_bias"] -= 100.0
  slots = np.asarray(method.loss(params, random_batch(5, 64, 50), KEY).slots)
  found = np.bincount(slots.astype(int).ravel(), minlength=4)[1:] / slots.size
  np.testing.assert_allclose(found, [0.8, 0.1, 0.1], atol=0.03)
  gradient = jax.grad(lambda p: method.loss(p, random_batch(5), KEY).loss.sum())(params)
  assert np.abs(gradient["pause_input"]).max(-1).min() > 0


# Evaluation.


@pytest.mark.slow
def test_evaluation_draws_by_text_and_drops_no_token(exact):
  method, params = build(**SAMPLED)
  complete = random_batch(6, 8, 7)
  mesh = make_mesh(configs.ParallelismConfig(), jax.devices()[:1])
  evaluator = Evaluator(method, mesh)
  once = evaluator(params, [complete])
  parts = evaluator(params, [{k: v[i : i + 3] for k, v in complete.items()} for i in (0, 3, 5)][:2])
  again = evaluator(params, [{k: v[:6] for k, v in complete.items()}])
  assert once["tokens"] == 56
  np.testing.assert_allclose(parts["training_omega"]["perplexity"], again["training_omega"]["perplexity"], rtol=1e-6)
  # All slots allowed: the constant layout.
  plain, _ = build(name="cyb", pauses=2)
  assert once["perplexity"] == pytest.approx(evaluate(plain, params, complete)["perplexity"], rel=1e-6)
  # Drawn: against slots laid out one by one.
  lengths = np.asarray(draw_lengths(jax.random.key(0), complete["tokens"], jnp.array([0.25, 0.5, 0.25])))
  nats, s_sum, loss = [], np.zeros(3), []
  for b in range(8):
    for t, d in slow_row(method, params, complete["tokens"][b], complete["targets"][b], lengths[b]):
      t, d = np.array(t), np.array(d)
      s = reference.stopping(d, 1 - d)
      nats.append(-np.log((s * t).sum()))
      loss.append(reference.cyb(t, d, 1 - d))
      s_sum[: len(s)] += np.asarray(s, np.float64)
  np.testing.assert_allclose(once["training_omega"]["perplexity"], np.exp(np.mean(nats)), rtol=2e-5)
  np.testing.assert_allclose(once["training_omega"]["latency"], s_sum / 56, rtol=1e-4)
  np.testing.assert_allclose(once["loss"], np.mean(loss), rtol=2e-5)


def evaluate(method, params, batch, omega=None):
  return Evaluator(method, make_mesh(configs.ParallelismConfig(), jax.devices()[:1]), omega)(params, [batch])


def test_evaluation_under_a_given_omega_draws_from_omega(exact):
  method, params = build(**SAMPLED)
  batch = random_batch(7, 4, 6)
  one = evaluate(method, params, batch, omega=(1.0, 0.0, 0.0))
  assert one["mean_pauses"] == 0
  baseline, _ = build(name="baseline")
  alone = evaluate(baseline, {"decoder": params["decoder"]}, batch)
  np.testing.assert_allclose(one["perplexity"], alone["perplexity"], rtol=1e-5)
  # Only some tokens have a later slot; the contexts of both evaluation and training are run.
  assert one["slot_perplexity"] is None
  assert one["calibration"] is None
  assert one["slots"] == 2 * 4 * 6 * 3
  assert one["flops"] == 2 * 4 * 6 * method.costs(6).forward.total


@pytest.mark.slow
def test_on_policy_is_also_evaluated_in_its_own_contexts(exact):
  method, params = build(**ON_POLICY)
  batch = random_batch(8, 4, 6)
  got = evaluate(method, params, batch)
  plain, _ = build(name="cyb", pauses=2)
  assert got["perplexity"] == pytest.approx(evaluate(plain, params, batch)["perplexity"], rel=1e-6)
  scores = plain.slot_scores(params, batch)
  own_stopping = jnp.exp(log_stopping_distribution(scores.log_dont_know, scores.log_answer))
  shares = 0.9 * own_stopping + 0.1 / 3  # with the floor of training
  lengths = np.asarray(draw_lengths(jax.random.key(0), batch["tokens"], shares))
  nats = []
  for b in range(4):
    for t, d in slow_row(method, params, batch["tokens"][b], batch["targets"][b], lengths[b]):
      t, d = np.array(t), np.array(d)
      nats.append(-np.log((reference.stopping(d, 1 - d) * t).sum()))
  np.testing.assert_allclose(got["training_omega"]["perplexity"], np.exp(np.mean(nats)), rtol=2e-5)


# Costs.


def test_slots_and_flops_by_hand():
  sampled, _ = build(name="cyb", pauses=3, recipe="sampled", omega=(1.0, 1.0, 0.0, 0.0))
  constant, _ = build(name="cyb", pauses=1)
  # Half of the tokens have one pause: 1,500 slots and the margin, instead of 2,000.
  assert sampled.costs(1000).train_slots == 1564
  assert constant.costs(1000).train_slots == 2000
  per_slot = 2 * (TINY.d_model * (4 * 16 + 2 * 8) - TINY.d_model * 16) + 0  # query, out; key, value
  per_slot = 2 * TINY.d_model * (2 * 16 + 2 * 8 + 3 * 24)
  attention = 4 * 16 * (1564 + 1) / 2
  readout = 2 * TINY.d_model * TINY.vocab_size
  want = 3 * 1.564 * (2 * (per_slot + attention) + readout)
  assert sampled.costs(1000).train.total == pytest.approx(want)
  # The readout runs once more in the backward pass; attention covers the full square.
  assert sampled.costs(1000).train_executed.total > want + 1.564 * readout
  policy, _ = build(**ON_POLICY, slot_budget=2.0)
  assert policy.costs(10).train_slots == 30 + 20
  forward = 3 * 2 * (per_slot + 4 * 16 * (30 + 1) / 2) + 2 * readout
  assert policy.costs(10).train.total == pytest.approx(
    3 * 2 * (2 * (per_slot + 4 * 16 * (20 + 1) / 2) + readout) + forward
  )


# Initial values.


@pytest.mark.slow
def test_calibration_sets_the_median_of_d(exact):
  method, params = build(name="cyb", pauses=2, calibration_batches=3, dont_know_prior=0.7)
  # Like a pretrained model: d is initially far below its prior.
  params["decoder"]["embedding"] *= 12
  batches = [random_batch(seed, 4, 9, uneven=True) for seed in range(3)]
  before = [np.exp(np.asarray(method.slot_scores(params, b).log_dont_know))[b["weights"] > 0][:, :2] for b in batches]
  assert np.median(np.concatenate(before)) < 0.3
  after = method.calibrate(params, batches)
  odds = []
  for batch in batches:
    scores = method.slot_scores(after, batch)
    odds.append(np.asarray(scores.log_dont_know - scores.log_answer)[batch["weights"] > 0][:, :2])
  assert np.median(np.concatenate(odds)) == pytest.approx(np.log(0.7 / 0.3), abs=1e-4)
  assert_trees_equal(after["decoder"], params["decoder"])
  # A second calibration changes nothing: an existing offset is not added twice.
  again = method.calibrate(after, batches)
  np.testing.assert_allclose(again["dont_know_offset"], after["dont_know_offset"], atol=1e-5)
  gradient = jax.grad(lambda p: method.loss(p, batches[0], KEY).loss.sum())(after)
  assert float(gradient["dont_know_offset"]) == 0
  assert np.abs(gradient["dont_know"]).max() > 0


@SLOW
@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_a_run_is_calibrated_once_and_keeps_the_offset(tmp_path, strategy, caplog):
  caplog.set_level("INFO")
  config = tiny_config(pauses=2, calibration_batches=2)
  config.parallelism.strategy = strategy
  config.train.update(steps=4, checkpoint_every=2, eval_every=0)
  training.train(configs.freeze(config), tmp_path / "run")
  assert caplog.text.count("calibrated: the median of d over 256 tokens") == 1
  first, last = (float(pretrained.load_run(tmp_path / "run", step).params["dont_know_offset"]) for step in (2, 4))
  assert first == last != 0


@pytest.mark.slow
def test_a_fine_tuned_run_starts_at_its_prior(tmp_path):
  plain = tiny_config(name="baseline")
  plain.train.update(eval_every=0)
  training.train(configs.freeze(plain), tmp_path / "plain")
  tuned = tiny_config(pauses=2, calibration_batches=1, dont_know_prior=0.6)
  tuned.init_from = str(tmp_path / "plain")
  tuned.train.update(steps=1, eval_every=0, log_every=1)
  tuned.optimizer.learning_rate = 1e-30
  training.train(configs.freeze(tuned), tmp_path / "tuned")
  run = pretrained.load_run(tmp_path / "tuned")
  assert_trees_equal(run.params["decoder"], pretrained.load_run(tmp_path / "plain").params["decoder"])
  store = training.open_store(run.config)
  from cyb_jax.data import TrainBatches

  batch = TrainBatches(store, sequence_length=16, batch_size=8, seed=0)(0)
  d = np.exp(np.asarray(jax.jit(run.method.slot_scores)(run.params, batch).log_dont_know))[..., :2]
  assert np.median(d) == pytest.approx(0.6, abs=1e-4)


@pytest.mark.slow
def test_a_trained_offset_and_form_of_d_are_kept_or_refused(tmp_path):
  """An offset belongs to the row that was trained with it; and a row has another meaning in the other form."""
  source = tiny_config(pauses=2, calibration_batches=1, dont_know_prior=0.6)
  source.train.update(steps=1, eval_every=0)
  training.train(configs.freeze(source), tmp_path / "source")
  offset = float(pretrained.load_run(tmp_path / "source").params["dont_know_offset"])
  on = tiny_config(pauses=2, calibration_batches=2, dont_know_prior=0.9)
  on.init_from = str(tmp_path / "source")
  on.train.update(steps=1, eval_every=0)
  training.train(configs.freeze(on), tmp_path / "on")
  assert float(pretrained.load_run(tmp_path / "on").params["dont_know_offset"]) == offset
  for field, value, message in (
    ("calibration_batches", 0, r"method.calibration_batches: 0, but init_from = .* was calibrated; set it to 1"),
    ("dont_know", "unit", r"method.dont_know: 'unit', but init_from = .* was trained with 'token'"),
  ):
    bad = on.copy_and_resolve_references()
    bad.method[field] = value
    with pytest.raises(InputError, match=message):
      training.train(configs.freeze(bad), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


@SLOW
def test_d_is_held_during_the_warm_up(exact):
  options = {"name": "cyb", "pauses": 2, "dont_know_prior": 0.8}
  method, params = build(**options, stopping_warmup=5)
  plain, _ = build(**options)
  batch = random_batch(9)
  t = np.exp(np.asarray(plain.slot_scores(params, batch).log_target, np.float64))
  held = np.array([0.2, 0.8 * 0.2, 0.8 * 0.8])
  np.testing.assert_allclose(method.loss(params, batch, KEY, 4).loss, -np.log(t @ held), rtol=1e-5)
  np.testing.assert_allclose(method.loss(params, batch, KEY, 4).stopping[0, 0], held, rtol=1e-5)
  for step in (5, None):
    np.testing.assert_array_equal(method.loss(params, batch, KEY, step).loss, plain.loss(params, batch, KEY).loss)
  gradient = jax.grad(lambda p, step: method.loss(p, batch, KEY, step).loss.sum())
  assert np.abs(gradient(params, 0)["dont_know"]).max() == 0
  assert np.abs(gradient(params, 0)["pause_input"]).max() > 0
  assert np.abs(gradient(params, 5)["dont_know"]).max() > 0


@SLOW
def test_training_counts_the_steps_of_the_warm_up(tmp_path):
  config = tiny_config(pauses=2, stopping_warmup=6)
  config.train.update(log_every=1, eval_every=0, checkpoint_every=0)
  training.train(configs.freeze(config), tmp_path / "run")
  from cyb_jax.training.metrics import read_metrics

  latency = [row["latency"] for row in read_metrics(tmp_path / "run") if row["split"] == "train"]
  for row in latency[:6]:
    np.testing.assert_allclose(row, [0.1, 0.09, 0.81], rtol=1e-6)
  assert abs(latency[6][0] - 0.1) > 1e-5


# The form of earlier work.


def test_one_row_for_all_pauses():
  method, params = build(name="cyb", pauses=3, pause_shared=True)
  assert params["pause_input"].shape == (1, TINY.d_model)
  own, _ = build(name="cyb", pauses=3)
  batch = random_batch(10)
  repeated = params | {"pause_input": jnp.repeat(params["pause_input"], 3, 0)}
  np.testing.assert_allclose(method.hidden(params, batch), own.hidden(repeated, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_shifting_positions(exact):
  """A pause with its own position and the embedding of a token is a token of a longer text."""
  method, params = build(name="tbys", pauses=1, pause_positions="shifting")
  batch = random_batch(11, 2, 5)
  params["pause_input"] = params["decoder"]["embedding"][3][None]
  text = np.stack([batch["tokens"], np.full_like(batch["tokens"], 3)], -1).reshape(2, 10)
  baseline, _ = build(name="baseline")
  plain = baseline.hidden({"decoder": params["decoder"]}, {"tokens": text})[:, :, 0]
  np.testing.assert_allclose(method.hidden(params, batch).reshape(2, 10, -1), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      SAMPLED | {"loss": "va", "omega": None, "rho": (1.0, 1.0, 1.0)},
      r"method.recipe: 'sampled' requires .* 'ap', not 'va'",
    ),
    (ON_POLICY | {"loss": "dp", "rho": (1.0, 1.0, 1.0)}, r"method.recipe: 'on_policy' requires .* not 'dp'"),
    (ON_POLICY | {"omega": (1.0, 1.0, 1.0)}, r"method.omega: .* draws from the model's own"),
    (ON_POLICY | {"policy_floor": 0.0}, r"method.policy_floor: 0.0 must be in \(0, 1\]"),
    (SAMPLED | {"policy_floor": 0.2}, r"method.policy_floor: 0.2 is set, but method.recipe = 'sampled'"),
    (SAMPLED | {"slot_budget": 3.5}, r"method.slot_budget: 3.5 must be in \[1, 3\]"),
    (SAMPLED | {"slot_budget": 0.5}, r"method.slot_budget: 0.5 must be in \[1, 3\]"),
    ({"name": "cyb", "pauses": 1, "slot_budget": 2.0}, r"method.slot_budget: 2 must be 0 if every"),
    (
      SAMPLED | {"omega": None, "slot_budget": 2.0},
      r"method.slot_budget: 2 must be 0 if every token gets all slots",
    ),
    (SAMPLED | {"gamma": (0.0, 1.0, 1.0)}, r"method.gamma: .* is zero at every slot of a token with 1 slots"),
    (ON_POLICY | {"gamma": (0.0, 1.0, 1.0)}, r"method.gamma: .* is zero at every slot of a token with 1 slots"),
    ({"name": "tbys", "pauses": 1, "recipe": "sampled"}, r"method.recipe: unknown field; method 'tbys' has no such"),
    (
      {"name": "tbys", "pauses": 1, "pause_positions": "x"},
      r"method.pause_positions: 'x' must be one of token, shifting",
    ),
    ({"name": "cyb", "pauses": 1, "calibration_batches": -1}, r"method.calibration_batches: -1 must be a whole number"),
    (
      {"name": "cyb", "pauses": 1, "calibration_batches": 1, "dont_know_prior": None},
      r"method.calibration_batches: 1 requires method.dont_know_prior",
    ),
    (
      {"name": "cyb", "pauses": 1, "stopping_warmup": 1, "dont_know_prior": None},
      r"method.stopping_warmup: 1 requires",
    ),
    ({"name": "baseline", "recipe": "sampled"}, r"method.recipe: unknown field; method 'baseline' has no such"),
    ({"name": "constant_stop", "pauses": 0}, r"method.pauses: 0 must be a whole number of at least 1"),
    ({"name": "mean_slots", "pauses": 1, "omega": (1.0, 1.0)}, r"method.omega: .* no such option"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(InputError, match=message):
    methods.build(configure(**options), TINY)


# Controls.


@SLOW
def test_controls_are_mixtures_that_ignore_the_context(exact):
  batch = random_batch(12)
  constant, params = build(name="constant_stop", pauses=2)
  np.testing.assert_allclose(constant.loss(params, batch, KEY).stopping[0, 0], [0.1, 0.09, 0.81], rtol=1e-5)
  params["stopping_logits"] = jnp.array([0.3, -1.0, 0.5]) / 16  # times D = 16
  t = np.exp(np.asarray(constant.evaluate(params, batch).scores.log_target, np.float64))
  weights = np.exp(np.array([0.3, -1.0, 0.5]))
  shares = weights / weights.sum()
  out = constant.loss(params, batch, KEY)
  np.testing.assert_allclose(out.loss, -np.log(t @ shares), rtol=2e-5)
  np.testing.assert_allclose(out.log_likelihood, np.log(t @ shares), rtol=2e-5)
  np.testing.assert_allclose(out.stopping[1, 2], shares, rtol=1e-5)
  # d loss / d logit_i = s_i - r_i, with r_i the share of slot i in the likelihood.
  gradient = jax.grad(lambda p: constant.loss(p, batch, KEY).loss.sum())(params)["stopping_logits"]
  responsible = shares * t / (t @ shares)[..., None]
  np.testing.assert_allclose(gradient, 16 * (shares - responsible).sum((0, 1)), rtol=1e-3, atol=1e-4)
  mean, _ = build(name="mean_slots", pauses=2)
  out = mean.loss(params, batch, KEY)
  np.testing.assert_allclose(out.loss, -np.log(t).mean(-1), rtol=2e-5)
  np.testing.assert_allclose(out.log_likelihood, np.log(t.mean(-1)), rtol=2e-5)
  np.testing.assert_allclose(out.stopping, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_shares_of_the_control_reach_their_optimum(best):
  """Within the steps of a small experiment, at its learning rate: a control that is not trained would make CYB look
  good.
  """
  decoder = dataclasses.replace(TINY, d_model=128)
  method = methods.build(configure(name="constant_stop", pauses=2), decoder, vocab_size=VOCABULARY)
  # One slot predicts two tokens of three, the others one of six each: the optimum of the shares equals these fractions.
  know = np.full(3, 1 / 6)
  know[best] = 2 / 3
  t = jnp.asarray(np.where(np.eye(3), 0.9, 1e-4))
  params = {"stopping_logits": jax.tree.leaves(method.objective.init(KEY))[0]}
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, 400))

  @jax.jit
  def step(params, state):
    def loss(params):
      return -(know * jax.nn.logsumexp(method.objective.log_shares(params) + jnp.log(t), -1)).sum()

    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for _ in range(400):
    params, state = step(params, state)
  np.testing.assert_allclose(jnp.exp(method.objective.log_shares(params)), know, atol=0.01)


@SLOW
def test_controls_are_evaluated_as_mixtures():
  batch = random_batch(13)
  for name in ("constant_stop", "mean_slots"):
    method, params = build(name=name, pauses=2)
    got = evaluate(method, params, batch)
    log_likelihood = np.asarray(method.loss(params, batch, KEY).log_likelihood, np.float64)
    assert got["perplexity"] == pytest.approx(np.exp(-log_likelihood.mean()), rel=1e-5)
    shares = {"constant_stop": [0.1, 0.09, 0.81], "mean_slots": [1 / 3] * 3}[name]
    assert got["latency"] == pytest.approx(shares, rel=1e-5)
    assert got["calibration"] is None
    assert got["hard_perplexity"] is None


def test_fields_of_the_config_reach_the_method():
  config = tiny_config(recipe="sampled", pauses=3, omega="4:1:1:4", slot_budget=2.75)
  method = configs.freeze(config).build_method(VOCABULARY)
  assert method.costs(16).train_slots == 44
  assert dataclasses.replace(method.config, slot_budget=0.0).omega == (4.0, 1.0, 1.0, 4.0)
