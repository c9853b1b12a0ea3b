"""Continuous batching against the sampler: the same tokens for the same seeds, whatever the other rows do."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from models import TINY, VOCABULARY, build

from cyb_jax.errors import InputError
from cyb_jax.generation import Lane, RowRequest, RunningBatch, Sampler, SamplingOptions
from cyb_jax.generation.continuous import _run
from cyb_jax.methods import option_names

CONTEXT = 24
PROMPTS = [(5,), (1, 7, 2, 9), (4, 4), (8, 6, 0, 11, 12, 13, 2), tuple(range(1, 19))]
SELF_PACED = [
  SamplingOptions(read="threshold", temperature=0),
  SamplingOptions(read="sample", temperature=0.8, top_k=5),
  SamplingOptions(read="threshold", threshold=0.3, pause_budget=3, top_p=0.7),
  SamplingOptions(mode="none", temperature=1.3),
  SamplingOptions(max_pauses=1, temperature=0.6, top_p=1.0, top_k=0),
]
CONSTANT = [
  SamplingOptions(mode="constant", read="mixture", temperature=0),
  SamplingOptions(mode="constant", read="threshold", threshold=0.4),
  SamplingOptions(mode="constant", read="sample", temperature=0.7),
]


@functools.cache
def model(name="cyb", visibility="hidden", pauses=2):
  options = {"pauses": pauses} if "pauses" in option_names(name) else {}
  if name == "cyb":
    options |= {"dont_know_prior": 0.6, "pause_visibility": visibility}
  method, params = build(dataclasses.replace(TINY, scan_layers=name == "cyb"), name=name, **options)
  if name == "cyb":
    # d is spread over (0, 1).
    params["dont_know"] = 2 * jax.random.normal(jax.random.key(5), params["dont_know"].shape)
  return method, params


def request(number, options, **changes):
  prompt = PROMPTS[number % len(PROMPTS)]
  return RowRequest(prompt, 6, seed=100 + number, options=options, **changes)


def alone(method, params, request):
  sampler = Sampler(method, request.options)
  with jax.default_matmul_precision("highest"):
    return sampler.generate(
      params, [request.prompt], max_new_tokens=request.max_new_tokens, seeds=[request.seed],
      end_id=request.end_ids or None, context=CONTEXT,
    )  # fmt: skip


def run(batch, requests, iterations=3):
  """The results of requests, each of which joins as soon as a row is free: lists of `NewTokens` by request."""
  waiting, rows, results = list(enumerate(requests)), {}, [[] for _ in requests]
  with jax.default_matmul_precision("highest"):
    while waiting or rows:
      while waiting and batch.free:
        number, each = waiting.pop(0)
        rows[batch.join(each)] = number
      for row, new in batch.advance(iterations).items():
        results[rows[row]].append(new)
        if new.finished:
          del rows[row]
  return results


def joined(chunks, name):
  return [value for chunk in chunks for value in getattr(chunk, name)]


def check_equal(method, params, options, rows):
  requests = [request(number, each) for number, each in enumerate(options * 2)]
  batch = RunningBatch(method, params, Lane.of(method, options[0]), rows=rows, context=CONTEXT)
  for each, chunks in zip(requests, run(batch, requests)):
    expected = alone(method, params, each)
    assert joined(chunks, "tokens") == expected.tokens[0]
    assert joined(chunks, "pauses") == expected.pauses[0]
    np.testing.assert_allclose(joined(chunks, "log_probs"), expected.log_probs[0], atol=1e-5)
    assert sum(map(len, joined(chunks, "log_dont_know"))) == expected.slots[0]


def test_rows_with_their_own_options_equal_the_sampler():
  method, params = model()
  assert len({Lane.of(method, options) for options in SELF_PACED}) == 1
  check_equal(method, params, SELF_PACED[:2], rows=3)


@pytest.mark.slow
def test_all_self_paced_options_equal_the_sampler():
  method, params = model(visibility="visible")
  check_equal(method, params, SELF_PACED, rows=3)
  check_equal(method, params, [SamplingOptions(prompt_pauses="all")], rows=3)


@pytest.mark.slow
def test_constant_rows_equal_the_sampler():
  method, params = model(visibility="visible")
  assert len({Lane.of(method, options) for options in CONSTANT}) == 1
  assert Lane.of(method, CONSTANT[0]) != Lane.of(method, SELF_PACED[0])
  check_equal(method, params, CONSTANT, rows=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ponderlm3", "pause_training", "baseline", "cyb_looped"])
def test_other_methods_equal_the_sampler(name):
  method, params = model(name=name)
  mode = "constant" if name == "ponderlm3" else "none" if name != "cyb_looped" else "self_paced"
  options = [SamplingOptions(mode=mode, temperature=temperature) for temperature in (0.0, 0.9)]
  check_equal(method, params, options, rows=3)


def test_the_same_bits_whatever_else_runs():
  method, params = model()
  batch = RunningBatch(method, params, Lane.of(method, SELF_PACED[1]), rows=3, context=CONTEXT)
  (first,) = run(batch, [request(1, SELF_PACED[1])])
  crowd = [request(number, SELF_PACED[number % 5]) for number in (7, 2, 3, 1, 4, 8)]
  crowd[3] = request(1, SELF_PACED[1])
  fourth = run(batch, crowd)[3]
  for name in ("tokens", "pauses", "log_probs", "log_dont_know", "log_targets"):
    assert joined(first, name) == joined(fourth, name)


def test_the_trace_of_a_token_is_that_of_its_slots():
  """d and t of each slot against the scores of the complete prefix, with the sampler's layout of slots."""
  method, params = model()
  options = SamplingOptions(temperature=0.9)
  batch = RunningBatch(method, params, Lane.of(method, options), rows=3, context=CONTEXT)
  (chunks,) = run(batch, [dataclasses.replace(request(1, options), alternatives=3)])
  tokens, pauses = joined(chunks, "tokens"), joined(chunks, "pauses")
  assert len(set(pauses)) > 1
  text = [*PROMPTS[1], *tokens]
  with jax.default_matmul_precision("highest"):
    # Hidden pauses do not change what later tokens see, so the training forward has the scores of all slots.
    hidden = method.hidden(params, {"tokens": np.array([text])})[0]
    slots = np.broadcast_to(np.arange(method.num_slots), hidden.shape[:2])
    scores = jax.device_get(method.token_scores(params, hidden, slots))
  for number, (token, count) in enumerate(zip(tokens, pauses)):
    place = len(PROMPTS[1]) - 1 + number
    d, t = joined(chunks, "log_dont_know")[number], joined(chunks, "log_targets")[number]
    assert len(d) == len(t) == count + 1
    np.testing.assert_allclose(d, scores.log_dont_know[place, : count + 1], atol=1e-5)
    np.testing.assert_allclose(t, scores.log_probs[place, : count + 1, token], atol=1e-5)
    best = np.argsort(-scores.log_probs[place, count])[:3]
    alternatives = joined(chunks, "alternatives")[number]
    assert [i for i, _ in alternatives] == best.tolist()
    np.testing.assert_allclose([value for _, value in alternatives], scores.log_probs[place, count, best], atol=1e-5)


def test_rows_end_leave_and_are_used_again():
  method, params = model()
  free = alone(method, params, request(1, SELF_PACED[1])).tokens[0]
  batch = RunningBatch(method, params, Lane.of(method, SELF_PACED[1]), rows=3, context=CONTEXT)
  ended, after = run(batch, [request(1, SELF_PACED[1], end_ids=(free[2], 28)), request(1, SELF_PACED[1])])
  assert joined(ended, "tokens") == free[: free.index(free[2]) + 1]
  assert joined(after, "tokens") == free  # the end tokens of the request before are forgotten
  row = batch.join(request(1, SELF_PACED[1]))
  assert row not in batch.free
  batch.leave(row)
  assert batch.advance(3) == {}
  assert batch.free == {0, 1, 2}
  programs = _run._cache_size()
  (again,) = run(batch, [request(3, SELF_PACED[0])])
  assert joined(again, "tokens") == alone(method, params, request(3, SELF_PACED[0])).tokens[0]
  assert _run._cache_size() == programs


def test_bad_requests():
  method, params = model()
  with pytest.raises(InputError, match="omega: "):
    Lane.of(method, SamplingOptions(omega=(1.0, 1.0, 1.0)))
  with pytest.raises(InputError, match=re.escape("max_pauses: 3 must be in 0..2")):
    Lane.of(method, SamplingOptions(max_pauses=3))
  batch = RunningBatch(method, params, Lane.of(method, SELF_PACED[0]), rows=1, context=CONTEXT)
  for prompt, message in (((), "is empty"), ((1, VOCABULARY), "has the id"), ((1,) * CONTEXT, "but the context is")):
    with pytest.raises(InputError, match=message):
      batch.join(dataclasses.replace(request(0, SELF_PACED[0]), prompt=prompt))
  with pytest.raises(InputError, match="end_ids: 9 tokens"):
    batch.join(request(0, SELF_PACED[0], end_ids=tuple(range(9))))
  assert batch.free == {0}
