"""The step: accumulation, rows of unequal weight; determinism; metrics. Meshes are tested in test_sharding."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import (
  VOCABULARY,
  assert_trees_close,
  assert_trees_equal,
  build,
  constant_initializers,
  random_batch,
  tiny_config,
  with_part,
)  # fmt: skip

from cyb_jax import configs
from cyb_jax.partitioning.mesh import data_shards, make_mesh
from cyb_jax.training import build_strategy, make_optimizer, train_step
from cyb_jax.training.metrics import MetricsLog, summarize
from cyb_jax.training.step import Totals, TrainState
from cyb_jax.training.strategies import devices_by_host

CONFIG = configs.freeze(tiny_config(pauses=2))


def run(config=CONFIG, *, devices=1, steps=3, batches=None, ahead=False):
  """The logical state after some steps of a config on some devices."""
  mesh = make_mesh(config.parallelism, jax.devices()[:devices])
  method = config.build_method(VOCABULARY, data_shards=data_shards(mesh))
  optimizer = make_optimizer(config.optimizer, 10, method.decoder.config.d_model)
  strategy = build_strategy(config, method, optimizer, mesh)
  state = strategy.init()
  with jax.default_matmul_precision("highest"):
    for step in range(steps):
      batch = batches[step] if batches else random_batch(step, 8, 6, uneven=True)
      if ahead and not step:
        program = strategy.compile(state, strategy.shard_batch(batch))
        assert program.memory_analysis().alias_size_in_bytes > 0  # the state is donated
      state = strategy.step(state, strategy.shard_batch(batch))
  return jax.device_get(strategy.global_state(state))


MESHES = {
  "jit 2 data x 2 fsdp x 2 tensor": ({"strategy": "jit", "fsdp": 2, "tensor": 2}, 8),
  "pmap 8": ({"strategy": "pmap"}, 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_step_compiled_ahead_of_time_is_equal(name):
  options, devices = MESHES[name]
  config = with_part(CONFIG, "parallelism", **options)
  assert_trees_equal(run(config, devices=devices, ahead=True), run(config, devices=devices))


def gradient_step(config, *, devices=1):
  """Parameters after one step of plain gradient descent, which show the gradient itself."""
  mesh = make_mesh(config.parallelism, jax.devices()[:devices])
  method = config.build_method(VOCABULARY)
  strategy = build_strategy(config, method, optax.sgd(1.0), mesh)
  with jax.default_matmul_precision("highest"):
    with constant_initializers():
      state = strategy.init()
    state = strategy.step(state, strategy.shard_batch(random_batch(5, 8, 6, uneven=True)))
  return jax.device_get(strategy.global_state(state))


@pytest.mark.parametrize("accumulate", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))])
def test_accumulation_equals_the_large_batch(accumulate):
  whole = gradient_step(CONFIG)
  parts = gradient_step(with_part(CONFIG, "optimizer", accumulate=accumulate))
  assert_trees_close(parts.params, whole.params, rtol=1e-6, atol=1e-6)
  assert_trees_close(parts.totals, whole.totals, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["jit", "pmap"])
@pytest.mark.slow
def test_gradient_over_eight_devices_with_accumulation(strategy):
  whole = gradient_step(CONFIG)
  config = with_part(CONFIG, "parallelism", strategy=strategy)
  assert_trees_close(gradient_step(config, devices=8).params, whole.params, rtol=1e-6, atol=1e-6)
  config = with_part(config, "optimizer", accumulate=2)
  assert_trees_close(gradient_step(config, devices=4).params, whole.params, rtol=1e-6, atol=1e-6)


def state_of(params, optimizer):
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, zero, params, optimizer.init(params), Totals.zeros(2))


def test_loss_is_sum_over_count():
  """By definition, every token has the same weight in any row."""
  method, params = build(name="cyb", pauses=1)
  batch = random_batch(2, 4, 6, uneven=True)

  def objective(params):
    losses = method.loss(params, batch, jax.random.key(0)).loss
    return (losses * batch["weights"]).sum() / batch["weights"].sum()

  optimizer = optax.sgd(1.0)
  state = state_of(params, optimizer)
  step = functools.partial(train_step, method=method, optimizer=optimizer, seed=0)
  after = jax.jit(step)(state, batch)
  loss, gradient = jax.jit(jax.value_and_grad(objective))(params)
  expected = jax.tree.map(lambda p, g: p - g, params, gradient)
  assert_trees_close(after.params, expected, rtol=1e-4, atol=2e-5)
  assert float(after.totals.tokens) == batch["weights"].sum()
  np.testing.assert_allclose(after.totals.loss / after.totals.tokens, loss, rtol=1e-5)


@pytest.mark.slow
def test_a_batch_without_weight_changes_nothing():
  batch = random_batch(0, 8, 6)
  batch["weights"] = np.zeros_like(batch["weights"])
  config = with_part(CONFIG, "optimizer", weight_decay=0.0)
  before = run(config, steps=0)
  after = run(config, steps=1, batches=[batch])
  assert_trees_equal(after.params, before.params)


@pytest.mark.slow
def test_bf16_activations_stay_close():
  config = with_part(CONFIG, "precision", activations="bfloat16")
  ours, theirs = summarize(run(config).totals), summarize(run().totals)
  assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
  assert ours["loss"] != theirs["loss"]
  assert {x.dtype for x in jax.tree.leaves(run(config).params)} == {jnp.dtype("float32")}


def test_same_seed_same_bits():
  first = run()
  assert_trees_equal(first, run())
  other = run(with_part(CONFIG, "train", seed=1))
  assert not np.array_equal(other.params["pause_input"], first.params["pause_input"])


def test_training_learns():
  batch = random_batch(0, 8, 6)
  config = with_part(with_part(CONFIG, "optimizer", learning_rate=0.02, schedule="constant"), "train", steps=40)
  first = summarize(run(config, steps=1, batches=[batch]).totals)["loss"]
  mean = summarize(run(config, steps=40, batches=[batch] * 40).totals)["loss"]
  assert mean < 0.7 * first


def test_metrics_by_hand():
  totals = Totals(
    steps=2.0,
    tokens=10.0,
    loss=20.0,
    log_likelihood=-10.0,
    stopping=np.array([5.0, 3.0, 2.0]),
    slots=25.0,
    dropped=3.0,
    gradient_norm=1.0,
    skipped=2,
    skipped_steps=np.array([7, 9, 0, 0]),
  )
  row = summarize(totals)
  assert row["loss"] == 2.0
  assert row["perplexity"] == pytest.approx(np.e)
  assert row["latency"] == [0.5, 0.3, 0.2]
  assert row["mean_pauses"] == pytest.approx(0.7)
  assert row["gradient_norm"] == 0.5
  assert row["tokens"] == 10
  assert row["slots_per_token"] == 2.5
  assert row["dropped_tokens"] == 3
  assert (row["skipped"], row["skipped_steps"]) == (2, [7, 9])


def test_metrics_of_no_step_are_undefined():
  row = summarize(Totals.zeros(2))
  assert np.isnan([row["loss"], row["perplexity"], row["mean_pauses"], row["gradient_norm"], *row["latency"]]).all()
  assert row["tokens"] == row["skipped"] == 0


@pytest.mark.parametrize(
  ("where", "accumulate"),
  [
    ("loss", 2),
    ("gradient", 1),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [("loss", 1), ("gradient", 2)]),
  ],
)
def test_nonfinite_steps_are_counted_but_not_applied(where, accumulate):
  method, params = build(name="cyb", pauses=1)
  loss = method.loss

  def broken(params, batch, rng, step):
    out = loss(params, batch, rng, step)
    on = (step >= 1) & (step < 3)
    if where == "loss":
      return dataclasses.replace(out, loss=out.loss + jnp.where(on, jnp.inf, 0.0), total=None)
    # At 0, a square root is finite, but its gradient isn't.
    added = jnp.sqrt(jnp.where(on, 0 * params["dont_know"].sum(), 1.0))
    return dataclasses.replace(out, loss=out.loss + added, total=None)

  method.loss = broken
  optimizer = optax.adam(lambda count: 1e-2 / (1 + count))
  step = jax.jit(
    functools.partial(train_step, method=method, optimizer=optimizer, seed=0, accumulate=accumulate, max_skipped=3)
  )
  batches = [random_batch(k) for k in range(4)]
  first = step(state_of(params, optimizer), batches[0])
  assert int(first.skipped_in_a_row) == 0
  bad = step(step(first, batches[1]), batches[2])
  assert_trees_equal((bad.params, bad.opt_state[0]), (first.params, first.opt_state[0]))
  # The schedule depends on the step.
  assert (int(first.opt_state[1].count), int(bad.opt_state[1].count)) == (1, 3)
  assert (int(bad.step), int(bad.skipped_in_a_row), int(bad.totals.skipped)) == (3, 2, 2)
  assert bad.totals.skipped_steps.tolist()[:3] == [2, 3, 0]
  assert float(bad.totals.loss) == float(first.totals.loss)
  good = step(bad, batches[3])
  assert (int(good.skipped_in_a_row), int(good.totals.skipped), float(good.totals.steps)) == (0, 2, 2.0)
  assert np.isfinite(float(good.totals.loss))


@pytest.mark.slow
def test_after_max_skipped_consecutive_steps_nothing_is_applied():
  method, params = build(name="cyb", pauses=1)
  loss = method.loss

  def failing(params, batch, rng, step):
    found = loss(params, batch, rng, step)
    return dataclasses.replace(found, loss=found.loss + jnp.where(step < 20, jnp.nan, 0.0), total=None)

  method.loss = failing
  optimizer = optax.sgd(1.0)
  step = jax.jit(functools.partial(train_step, method=method, optimizer=optimizer, seed=0, max_skipped=18))
  state = state_of(params, optimizer)
  for k in range(22):
    state = step(state, random_batch(k))
  assert int(state.skipped_in_a_row) == 22
  assert_trees_equal(state.params, params)
  # More steps than are recorded are still counted.
  assert int(state.totals.skipped) == 22
  assert state.totals.skipped_steps.tolist() == list(range(1, 17))


def test_metrics_log_drops_lines_that_are_repeated(tmp_path):
  log = MetricsLog(tmp_path, 0, trackers="tensorboard")
  for step in (2, 4, 6):
    log.write({"split": "train", "step": step, "loss": float("nan"), "timing": {"seconds": 1.0}})
  log.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"split": "train", "st')  # incomplete after a kill
  MetricsLog(tmp_path, 4).close()
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [2, 4]
  assert rows[0]["loss"] is None
  assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_tensorboard_reads_the_events(tmp_path):
  from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

  log = MetricsLog(tmp_path, 0, trackers="tensorboard")
  log.write({"split": "train", "step": 3, "loss": 1.5, "latency": [0.25, 0.75]})
  log.close()
  (path,) = (tmp_path / "tensorboard").iterdir()
  values = {}
  for event in EventFileLoader(str(path)).Load():
    for value in event.summary.value:
      number = value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
      values[value.tag] = (event.step, number)
  assert values == {"train/loss": (3, 1.5), "train/latency/0": (3, 0.25), "train/latency/1": (3, 0.75)}


def test_the_devices_of_a_host_are_together_in_pmap():
  # A mesh of 2 x 4 chips in which each host has a square of 2 x 2.
  hosts = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
  chips = np.empty(hosts.shape, object)
  for place, host in np.ndenumerate(hosts):
    chips[place] = types.SimpleNamespace(process_index=host, id=place)
  ordered = devices_by_host(types.SimpleNamespace(devices=chips))
  assert [chip.process_index for chip in ordered] == [0] * 4 + [1] * 4
  assert [chip.id for chip in ordered[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
