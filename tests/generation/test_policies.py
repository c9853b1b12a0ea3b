"""The parts of the sampler, by hand: layouts of slots, step budgets and token samplers."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cyb_jax.generation.layout import SlotLayout
from cyb_jax.generation.options import SamplingOptions
from cyb_jax.generation.reading import RandomStepBudget, choose_step_budget
from cyb_jax.generation.token_samplers import Greedy, Temperature, TopKTopP, choose_token_sampler


@pytest.mark.parametrize(
  ("hides", "shifts", "in_prompt", "expected"),
  [
    # (slots of a prompt token, stride in the prompt, stride of generated tokens, entries for 4 + 2 tokens)
    (False, False, True, (3, 1, 1, 4 * 3 + 3 + 3)),
    (False, False, False, (1, 1, 1, 4 + 3 + 3)),
    (False, True, True, (3, 3, None, 4 * 3 + 3 + 3)),
    (True, False, True, (1, 1, 1, 4 + 1 + 3)),
    (True, True, False, (1, 3, 3, 4 + 1 + 3)),
  ],
)
def test_layouts(hides, shifts, in_prompt, expected):
  method = types.SimpleNamespace(num_slots=3, hides_pauses=hides, shifts_positions=shifts)
  layout = SlotLayout.of(method, 3, pauses_in_prompt=in_prompt)
  assert (layout.prompt_slots, layout.prompt_stride, layout.stride, layout.capacity(4, 2)) == expected
  positions = layout.positions(np.array([5]), np.arange(3))
  assert positions.tolist() == ([5, 6, 7] if shifts else [5, 5, 5])


def test_a_step_budget_denies_by_its_hazard():
  # omega = (1/2, 0, 1/2): the budget ends at the first slot with probability 1/2, never at the second, and always at
  # the third.
  budget = choose_step_budget(SamplingOptions(omega=(1.0, 0.0, 1.0)), 3)
  assert isinstance(budget, RandomStepBudget)
  drawn = jnp.array([0.49, 0.51, 0.0, 0.99])
  state = types.SimpleNamespace(uniform=lambda purpose: drawn, slot=jnp.array([0, 0, 1, 2]))
  assert budget.denies(state).tolist() == [True, False, False, True]
  unlimited = choose_step_budget(SamplingOptions(), 3)
  assert not unlimited.denies(types.SimpleNamespace(finished=jnp.zeros(2, bool))).any()


def test_a_step_budget_limits_the_slot_that_is_read():
  budget = RandomStepBudget(jnp.array([0.0, 1.0, 0.0]))
  state = types.SimpleNamespace(keys=lambda purpose: jax.random.split(jax.random.key(0), 3))
  assert budget.limit(jnp.array([0, 1, 2]), state).tolist() == [0, 1, 1]


def test_token_samplers_of_options():
  assert choose_token_sampler(SamplingOptions(temperature=0, top_k=3), 9) == Greedy()
  assert isinstance(choose_token_sampler(SamplingOptions(temperature=0.5), 9), Temperature)
  both = choose_token_sampler(SamplingOptions(top_p=0.5), 9)
  assert (type(both), int(both.top_k)) == (TopKTopP, 9)


@pytest.mark.parametrize("top_p", [1e-40, 1e-46, 1e-20])
@pytest.mark.parametrize("temperature", [1.0, 1e-6])
def test_the_most_likely_token_is_always_kept(top_p, temperature):
  """When f32 rounded top_p to 0, all tokens were excluded, and token 0 was drawn."""
  sampler = choose_token_sampler(SamplingOptions(top_p=top_p, temperature=temperature), 4)
  log_probs = jnp.log(jnp.array([[0.1, 0.5, 0.3, 0.1], [0.2, 0.1, 0.0, 0.7]]))
  keys = jax.vmap(jax.random.key)(jnp.arange(2, dtype=jnp.uint32))
  assert sampler.sample(keys, log_probs).tolist() == [1, 3]


@pytest.mark.parametrize(
  ("top_k", "top_p", "kept"),
  [
    (1, 1.0, [1]),
    (2, 1.0, [1, 2]),
    (3, 1.0, [0, 1, 2, 3]),  # the third and the fourth are equally likely
    (4, 0.4, [1]),
    (4, 0.6, [1, 2]),
    (1, 0.9, [1]),
  ],
)
def test_tokens_that_may_be_drawn(top_k, top_p, kept):
  log_probs = jnp.log(jnp.array([[0.1, 0.5, 0.3, 0.1]]))
  logits = TopKTopP(jnp.float32(1.0), jnp.int32(top_k), jnp.float32(top_p)).logits(log_probs)
  assert np.flatnonzero(np.isfinite(logits[0])).tolist() == kept
  np.testing.assert_array_equal(logits[0, np.array(kept)], log_probs[0, np.array(kept)])
