"""Scores of continuations: by hand, against the training forward one request at a time in float64, and independent of
the other requests."""

import dataclasses
import functools

import cli
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, VOCABULARY, build

from cyb_jax import methods
from cyb_jax.benchmarks import scoring as benchmark
from cyb_jax.configs import ParallelismConfig
from cyb_jax.costs import flops
from cyb_jax.decoder import DecoderConfig
from cyb_jax.errors import InputError
from cyb_jax.generation import scoring
from cyb_jax.generation.scoring import Score, Scorer
from cyb_jax.generation.trees import Tree
from cyb_jax.methods import configure
from cyb_jax.partitioning.mesh import make_mesh

START = 0
CONTEXT = 12

MODELS = {
  "baseline": {"name": "baseline"},
  "tbys": {"name": "tbys", "pauses": 2},
  "visible": {"name": "cyb", "pauses": 2, "dont_know_prior": 0.5, "pause_input": "token+pause"},
  "hidden": {"name": "cyb", "pauses": 2, "dont_know_prior": 0.5, "pause_visibility": "hidden", "pause_offset": True},
  "shifting": {
    "name": "cyb", "pauses": 2, "dont_know": "unit", "dont_know_prior": 0.5, "pause_shared": True,
    "pause_positions": "shifting", "pause_visibility": "hidden",
  },
  "sampled": {"name": "cyb", "pauses": 2, "recipe": "sampled", "omega": (1.0, 1.0, 1.0), "pause_positions": "shifting"},
  "on_policy": {"name": "cyb", "pauses": 1, "recipe": "on_policy"},
  "heads": {"name": "cyb", "pauses": 1, "dont_know_prior": 0.5, "slot_heads": True},
  "one_slot": {"name": "cyb", "pauses": 0},
  "constant_stop": {"name": "constant_stop", "pauses": 2},
  "mean_slots": {"name": "mean_slots", "pauses": 2, "pause_visibility": "hidden"},
  "windows": {
    "name": "cyb", "pauses": 2, "dont_know_prior": 0.5,
    "decoder": dataclasses.replace(TINY, window=2, global_every=2, local_rope_base=100.0),
  },
}  # fmt: skip


@functools.cache
def model(name):
  method, params = build(**MODELS[name])
  if "dont_know" in params:  # d spread over (0, 1)
    params["dont_know"] = jax.random.normal(jax.random.key(5), params["dont_know"].shape)
  if "pause_offset" in params:
    params["pause_offset"] = jax.random.normal(jax.random.key(6), params["pause_offset"].shape)
  if "slot_heads" in params:
    params["slot_heads"] += 0.3 * jax.random.normal(jax.random.key(7), params["slot_heads"].shape)
  if "stopping_logits" in params:
    params["stopping_logits"] = jnp.array([0.1, -0.05, 0.02])
  return method, params


def scorer(name, **options):
  method, params = model(name)
  return Scorer(method, params, **{"context": CONTEXT, "start_id": START} | options)


@functools.cache
def requests():
  """Different requests: shared contexts, an empty context, one token, an empty continuation, a long context."""
  rng = np.random.default_rng(0)

  def ids(count):
    return rng.integers(1, VOCABULARY, count).tolist()

  shared, other = ids(5), ids(3)
  return (
    *((shared, ids(count)) for count in (3, 1, 4)),
    ([], ids(2)),
    (other, ids(1)),
    (other, ids(6)),
    (ids(1), ids(1)),
    (ids(4), []),
    (ids(30), ids(3)),
  )


def one_by_one(name, context, continuation):
  """(log-likelihood, greedy, pauses) of a request from the method's evaluation, token by token in float64."""
  method, params = model(name)
  context = (list(context) or [START])[-(CONTEXT + 1 - len(continuation)) :]
  ids = context + list(continuation)
  # Attention is causal, so the padding is not seen by earlier tokens.
  batch = {"tokens": jnp.zeros((1, CONTEXT), jnp.int32).at[0, : len(ids) - 1].set(jnp.array(ids[:-1]))}
  hidden = method.hidden(params, batch)[0]
  total, greedy, pauses = 0.0, True, 0.0
  for place in range(len(context) - 1, len(ids) - 1):
    words = method.token_scores(params, hidden[place], jnp.arange(method.num_slots))
    p, d = np.exp(np.asarray(words.log_probs, np.float64)), np.exp(np.asarray(words.log_dont_know, np.float64))
    waited, marginal = 1.0, np.zeros(VOCABULARY)
    for i in range(method.num_slots):
      last = i == method.num_slots - 1
      s = waited if last else waited * (1 - d[i])
      marginal += s * p[i]
      pauses += i * s
      waited *= d[i]
    total += np.log(marginal[ids[place + 1]])
    greedy &= ids[place + 1] == int(marginal.argmax())
  return total, greedy, pauses


# The other methods use the same code and take as long to compile.
QUICK = ("baseline", "tbys", "visible", "hidden", "mean_slots")
SOME = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.slow
def test_against_the_evaluation_of_one_request(name, exact):
  got = scorer(name).score(requests())
  for (context, continuation), score in zip(requests(), got):
    if not continuation:
      assert score == Score()
      continue
    total, greedy, pauses = one_by_one(name, context, continuation)
    assert score.log_likelihood == pytest.approx(total, abs=1e-5)
    assert score.greedy == greedy
    assert score.pauses == pytest.approx(pauses, abs=1e-5)
    assert score.tokens == len(continuation)


@pytest.mark.parametrize(
  "name", ["visible", *(pytest.param(name, marks=pytest.mark.slow) for name in ("baseline", "shifting"))]
)
def test_other_requests_change_nothing(name, exact):
  together = scorer(name).score(requests())
  tight = scorer(name, slots=40, row_slots=40).score(requests()[::-1])[::-1]
  mesh = make_mesh(ParallelismConfig(), jax.devices()[:2])
  spread = scorer(name, mesh=mesh, slots=100).score(requests())
  alone_scorer = scorer(name)
  for number, request in enumerate(requests()):
    (alone,) = alone_scorer.score([request])
    for score in (together[number], tight[number], spread[number]):
      assert score.log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-5)
      assert (score.greedy, score.tokens) == (alone.greedy, alone.tokens)


@pytest.mark.slow
def test_the_most_likely_continuation_is_greedy_in_any_batch(exact):
  method, params = model("visible")
  greedy = []
  for _ in range(4):  # token by token, from the evaluation of the complete row
    hidden = method.hidden(params, {"tokens": jnp.array([[7, 3, *greedy]])})[0, -1]
    words = method.token_scores(params, hidden, jnp.arange(3))
    d = np.exp(np.asarray(words.log_dont_know))
    s = np.array([1 - d[0], d[0] * (1 - d[1]), d[0] * d[1]])
    greedy.append(int((s[:, None] * np.exp(words.log_probs)).sum(0).argmax()))
  other = [(greedy[0] + 1) % VOCABULARY, *greedy[1:]]
  company = [([7, 3], greedy), ([7, 3], other), ([7, 3], greedy[:2]), *requests()]
  assert [score.greedy for score in scorer("visible").score(company)[:3]] == [True, False, True]
  assert [scorer("visible").score([request])[0].greedy for request in company[:3]] == [True, False, True]


def test_an_untrained_model(exact):
  method, params = model("tbys")
  blank = jax.tree.map(jnp.zeros_like, params)
  (score,) = Scorer(method, blank, context=CONTEXT, start_id=START).score([([1, 2], [3, 4, 5])])
  assert score.log_likelihood == pytest.approx(-3 * np.log(VOCABULARY), rel=1e-6)
  assert score.greedy  # all tokens tie
  assert score.pauses == 3 * 2  # always two, by the method's rule


def test_the_stopping_time_is_summed_over():
  """W = 2 and d = 1/4, by hand: with a constant stop nothing else varies."""
  method, params = build(name="constant_stop", pauses=1)
  params = jax.tree.map(jnp.zeros_like, params)
  params["stopping_logits"] = jnp.log(jnp.array([3.0, 1.0])) / TINY.d_model
  (score,) = Scorer(method, params, context=4, start_id=START).score([([1], [2, 3])])
  assert score.log_likelihood == pytest.approx(-2 * np.log(VOCABULARY), rel=1e-5)
  assert score.pauses == pytest.approx(2 * 0.25, rel=1e-5)


@pytest.mark.parametrize(("name", "of_context"), [("visible", 3), ("hidden", 1)])
def test_costs_by_hand(name, of_context):
  method, _ = model(name)
  context, a, b = [1, 2, 3, 4], [5, 6, 7], [8]
  alone = scorer(name).score([(context, a)])[0]
  first, second = scorer(name).score([(context, a), (context, b)])
  shared = 3 * of_context + 3  # the last token is read
  assert alone.slots == shared + 2 * 3
  assert first.slots == shared / 2 + 2 * 3
  assert second.slots == shared / 2
  config = method.decoder.config
  cost = functools.partial(flops.slot_flops, config)
  if name == "visible":
    keys = sum(range(1, 19))
    # The same window in the costs of the training forward, with all slots read.
    full_cost = flops.forward_cost(config, tokens=6, slots=3, slots_read=3).total * 6
    assert cost(slots=18, keys=keys, slots_read=18) == pytest.approx(full_cost)
  else:
    keys = 1 + 2 + 3 + sum(tokens + slot for tokens in (4, 5, 6) for slot in range(3))
  assert alone.flops == pytest.approx(cost(slots=alone.slots, keys=keys, slots_read=9))
  assert first.flops + second.flops == pytest.approx(alone.flops + cost(slots=0, keys=0, slots_read=3))


@pytest.mark.parametrize("positions", ["token", "shifting"])
@pytest.mark.parametrize("visibility", ["visible", "hidden"])
def test_costs_with_a_window_by_counting(positions, visibility):
  """Six tokens, of which the last three are read, in a decoder whose second layer is global."""
  config = dataclasses.replace(TINY, num_layers=2, window=5, global_every=2)
  options = configure(pauses=2, pause_positions=positions, pause_visibility=visibility)
  method = methods.build(options, config, vocab_size=VOCABULARY)
  ((_, score),) = Tree(method, (1, 2, 3, 4), [(0, (5, 6, 7))], 0).costs
  hidden = visibility == "hidden"
  counts = [1, 1, 1, 3, 3, 3] if hidden else [3] * 6
  slots = [(token, slot) for token, count in enumerate(counts) for slot in range(count)]
  keys = {"all": 0, "local": 0}
  for token, slot in slots:
    for other, at in slots[: slots.index((token, slot)) + 1]:
      if hidden and other != token and at:
        continue
      distance = 3 * (token - other) + slot - at if positions == "shifting" else token - other
      keys["all"] += 1
      keys["local"] += distance < 5
  assert keys["local"] < keys["all"]
  expected = flops.slot_flops(config, slots=len(slots), keys=keys["all"], local_keys=keys["local"], slots_read=9)
  assert score.flops == pytest.approx(expected)


def test_many_branches_are_split_into_several_rows(exact):
  branches = np.random.default_rng(1).integers(1, VOCABULARY, (120, 5)).tolist()
  scores = scorer("visible").score([([1, 2, 3], tokens) for tokens in branches])
  assert len({score.slots for score in scores}) > 1 or sum(s.slots for s in scores) > 120 * 12 + 9
  for number in (0, 60, 119):
    total, _, _ = one_by_one("visible", [1, 2, 3], branches[number])
    assert scores[number].log_likelihood == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("length", [0, 1, 12, 13, 24, 31])
@pytest.mark.parametrize("overlap", [1, 5])
def test_rolling_windows(length, overlap, exact):
  """Every token is scored once, after as much context as the definition gives."""
  text = np.random.default_rng(2).integers(1, VOCABULARY, length).tolist()
  (score,) = scorer("baseline").score_rolling([text], overlap)
  sequence, expected, scored = [START, *text], 0.0, 1
  while scored < len(sequence):
    fresh = CONTEXT if scored == 1 else CONTEXT + 1 - overlap
    end = min(len(sequence), scored + fresh)
    window = sequence[max(0, end - CONTEXT - 1) : end]
    new = end - scored
    expected += one_by_one("baseline", window[:-new], window[-new:])[0]
    scored = end
  assert score.tokens == length
  assert score.log_likelihood == pytest.approx(expected, abs=1e-5)


def test_a_continuation_longer_than_the_context_is_read_in_windows(exact):
  text = np.random.default_rng(3).integers(1, VOCABULARY, 20).tolist()
  (score,) = scorer("baseline").score([([], text)])
  (rolling,) = scorer("baseline").score_rolling([text])
  assert score == rolling
  assert score.tokens == 20


def test_the_readout_stays_within_its_budget():
  """V = 100,000 and W = 3: the token scores of all tokens at once would be ten times the budget."""
  config = DecoderConfig(
    vocab_size=100_000, num_layers=1, d_model=8, num_heads=1, num_kv_heads=1, head_size=8, mlp_size=8
  )
  _, params = build(config, name="tbys", pauses=2)
  method = methods.build(configure("tbys", pauses=2), config)
  big = Scorer(method, params, context=4096, start_id=0)
  reads = {"slots": jnp.zeros((big._chunk, 3), jnp.int32), "targets": jnp.zeros(big._chunk, jnp.int32)}
  hidden = jnp.zeros((1, 8192, 8))
  used = big._read.lower(params, hidden, reads).compile().memory_analysis().temp_size_in_bytes
  assert big._chunk >= 64
  assert used < 1.1 * scoring._READ_BYTES


def test_bad_requests():
  with pytest.raises(InputError, match=r"request: number 2 has the id 29; ids must be in 0\.\.28"):
    scorer("baseline").score([([1], [2]), ([1], [29])])
  with pytest.raises(InputError, match=r"overlap: 13 must be in 1\.\.12"):
    scorer("baseline").score_rolling([[1]], 13)
  with pytest.raises(InputError, match="context: 0 must be at least 1"):
    scorer("baseline", context=0)
  assert scorer("baseline").score([]) == []


@pytest.mark.slow
def test_the_benchmark_measures_three_ways_of_scoring(tmp_path):
  method, params = build(name="cyb", pauses=1)
  requested = benchmark._requests("hellaswag", 6, VOCABULARY)
  assert [context == requested[0][0] for context, _ in requested] == [True] * 4 + [False] * 2
  batched, one_by_one, padded = (way() for way in benchmark._ways(method, params, requested).values())
  np.testing.assert_allclose(batched, one_by_one, atol=1e-4)
  np.testing.assert_allclose(batched, padded, atol=1e-4)
  config = cli.write_config(tmp_path)
  result, _ = cli.run("benchmark", "scoring", f"--config={config}", "--vocabulary=29", "--requests=4", "--repeats=2",
    "--like=lambada")  # fmt: skip
  assert [row["way"] for row in result["timing"]["rows"]] == ["batched", "one_by_one", "padded"]
  for ratio in result["timing"]["ratios"]:
    assert ratio["wall"]["lowest"] <= ratio["wall"]["median"] <= ratio["wall"]["highest"]
  assert "--like: 'x' is not one of" in cli.complaint("benchmark", "scoring", f"--config={config}", "--like=x")
