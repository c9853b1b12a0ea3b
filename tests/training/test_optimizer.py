"""Schedules by hand, and the selection of decayed parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import TINY, build

from cyb_jax.configs import OptimizerConfig
from cyb_jax.decoder import LoraConfig
from cyb_jax.decoder.lora import LEAVES
from cyb_jax.training.optimizer import decayed, make_optimizer, schedule

BASE = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.1, final_fraction=0.01, decay_fraction=0.2)


def rates(steps, width=64, **options):
  """[steps + 1] rates by the number of the update, from 1; entry 0 would be the rate before the first update."""
  rate = schedule(dataclasses.replace(BASE, **options), steps, width)
  return np.array([rate(update - 1) for update in range(steps + 1)])


def test_cosine():
  got = rates(100)
  np.testing.assert_allclose(got[[0, 5, 10]], [0.0, 0.5, 1.0], rtol=1e-6)
  np.testing.assert_allclose(got[55], 0.01 + 0.99 * 0.5, rtol=1e-6)
  np.testing.assert_allclose(got[100], 0.01, rtol=1e-5)
  assert (np.diff(got[10:]) < 0).all()


def test_wsd():
  got = rates(100, schedule="wsd")
  np.testing.assert_allclose(got[10:81], 1.0)
  np.testing.assert_allclose(got[90], 0.505, rtol=1e-5)
  np.testing.assert_allclose(got[100], 0.01, rtol=1e-4)


def test_constant_and_rate_over_width():
  np.testing.assert_allclose(rates(100, schedule="constant")[10:], 1.0)
  np.testing.assert_allclose(rates(100, schedule="constant", rate_over_width=True)[10:], 1 / 64)


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(name, steps):
  got = rates(steps, schedule=name)
  assert (got[1:] > 0).all()
  assert got.max() <= 1.0


def test_only_matrices_have_weight_decay():
  _, params = build(name="cyb", pauses=2, dont_know="unit", pause_offset=True)
  flags = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(decayed(params))}
  assert {k for k, v in flags.items() if v} == {k for k in flags if k.endswith("['kernel']")}
  assert not flags["['pause_input']"]
  assert not flags["['dont_know']"]
  assert not flags["['decoder']['embedding']"]
  lora = LoraConfig(rank=1, alpha=1.0, targets=("query",))
  _, params = build(dataclasses.replace(TINY, lora=lora), name="baseline")
  assert decayed(params)["decoder"]["layers_0"]["attention"]["query"] == dict.fromkeys(("kernel", *LEAVES), True)


def test_one_step_of_adamw_by_hand():
  params = {"kernel": jnp.array([2.0]), "scale": jnp.array([2.0])}
  config = dataclasses.replace(BASE, schedule="constant", warmup_fraction=0.0, clip_norm=0.0, weight_decay=0.1)
  optimizer = make_optimizer(config, 10, 1)
  state = optimizer.init(params)
  gradient = {"kernel": jnp.array([3.0]), "scale": jnp.array([-3.0])}
  updates, state = optimizer.update(gradient, state, params)
  after = optax.apply_updates(params, updates)
  np.testing.assert_allclose(after["kernel"], 2.0 - 1.0 - 0.1 * 2.0, rtol=1e-5)
  np.testing.assert_allclose(after["scale"], 2.0 + 1.0, rtol=1e-5)


def test_clipping():
  optimizer = make_optimizer(dataclasses.replace(BASE, clip_norm=1.0), 10, 1)
  assert len(optimizer.init({"kernel": jnp.zeros(3)})) == 2
