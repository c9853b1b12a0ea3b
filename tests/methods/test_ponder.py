"""PonderLM-2 and PonderLM-3: against a float64 decoder that runs slot by slot; the fixed point of the Jacobi passes;
decoding; pruning; gradients; costs."""

import dataclasses
import functools
import json

import cli
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, VOCABULARY, assert_trees_close, build, random_batch, tiny_config
from report_page import Page, call
from statistics_example import example

from cyb_jax import configs, methods, training
from cyb_jax.configs import ParallelismConfig
from cyb_jax.data import with_segment_ids
from cyb_jax.decoder import DecoderConfig
from cyb_jax.errors import InputError
from cyb_jax.evaluation import Evaluator
from cyb_jax.generation import Sampler, SamplingOptions, default_mode
from cyb_jax.generation.scoring import Scorer
from cyb_jax.methods import Decoding, configure
from cyb_jax.partitioning.mesh import make_mesh
from cyb_jax.report import single
from cyb_jax.studies import settings

ONE_LAYER = dataclasses.replace(TINY, num_layers=1)
NAMES = ("ponderlm2", "ponderlm3")
# Prunes some of the slots, but not all, of a router with a spread distribution.
BELOW = 0.3


@functools.cache
def model(name, pauses=2, decoder=ONE_LAYER, **options):
  """A model whose distribution over depths is not concentrated."""
  method, params = build(decoder, name=name, pauses=pauses, **options)
  if name == "ponderlm3":
    params["router"] = jax.random.normal(jax.random.key(7), params["router"].shape)
    params["router_bias"] = jnp.zeros(pauses + 1)
  return method, params


class Slow:
  """The decoder in float64 numpy, one slot after the other: a slot sees all slots that have run."""

  def __init__(self, method, params):
    self.config = method.decoder.config
    self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    self.decoder = self.params["decoder"]
    self.slots = method.num_slots

  def embed(self, token):
    return self.decoder["embedding"][token]

  def norm(self, x, name, layer=None):
    scale = (self.decoder if layer is None else layer)[name]["scale"]
    return x / np.sqrt((x * x).mean() + self.config.norm_epsilon) * scale

  def rotate(self, heads, position):
    half = self.config.head_size // 2
    angles = position * self.config.rope_base ** (-np.arange(half) / half)
    a, b = heads[..., :half], heads[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)

  def run(self, x, position, seen, log_weight=0.0, document=0):
    """Runs one slot after the slots in `seen`, and appends the slot to `seen`."""
    config, mine = self.config, []
    seen.append((mine, log_weight, document))
    for number in range(config.num_layers):
      layer = self.decoder[f"layers_{number}"]
      normed = self.norm(x, "attention_norm", layer)
      project = {k: np.einsum("d,dnh->nh", normed, layer["attention"][k]["kernel"]) for k in ("query", "key", "value")}
      query = self.rotate(project["query"], position)
      mine.append((self.rotate(project["key"], position), project["value"]))
      heads = []
      for head in range(config.num_heads):
        group = head // (config.num_heads // config.num_kv_heads)
        visible = [(s[number], weight) for s, weight, where in seen if where == document and weight > -np.inf]
        logits = np.array([key[group] @ query[head] / np.sqrt(config.head_size) + w for (key, _), w in visible])
        shares = np.exp(logits - logits.max())
        heads.append(shares / shares.sum() @ np.array([value[group] for (_, value), _ in visible]))
      x = x + np.einsum("nh,nhd->d", np.array(heads), layer["attention"]["out"]["kernel"])
      normed, mlp = self.norm(x, "mlp_norm", layer), layer["mlp"]
      gate = normed @ mlp["gate"]["kernel"]
      x = x + (gate / (1 + np.exp(-gate)) * (normed @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
    return self.norm(x, "final_norm")

  def depths(self, first):
    """(Pr(depth = k), w_k)."""
    logits = first @ self.params["router"] + self.params["router_bias"]
    shares = np.exp(logits) / np.exp(logits).sum()
    return shares, np.array([shares[k:].sum() for k in range(len(shares))])

  def key_weights(self, first, below):
    if "router" not in self.params:
      return np.zeros(self.slots)
    _, w = self.depths(first)
    return np.array([np.log(x) if x >= below else -np.inf for x in w])

  def stream(self, inputs, weights, segment_ids):
    """One pass: inputs[t][k] -> outputs of the same form."""
    seen, outputs = [], []
    for t, slots in enumerate(inputs):
      outputs.append([self.run(x, t, seen, weights[t][k], segment_ids[t]) for k, x in enumerate(slots)])
    return outputs

  def passes(self, tokens, jacobi, below=0.0, segment_ids=None):
    """f64[T, W, D]: the passes that add slots, the Jacobi passes, and the pass that is read."""
    segment_ids = [0] * len(tokens) if segment_ids is None else segment_ids
    first = [self.embed(token) for token in tokens]
    inputs, weights = [[x] for x in first], [np.zeros(self.slots)] * len(tokens)
    for count in range(1, self.slots):
      outputs = self.stream(inputs, weights, segment_ids)
      if count == 1:
        weights = [self.key_weights(out[0], below) for out in outputs]
      inputs = [[x, *out] for x, out in zip(first, outputs)]
    for _ in range(jacobi):
      outputs = self.stream(inputs, weights, segment_ids)
      weights = [self.key_weights(out[0], below) for out in outputs]
      inputs = [[x, *out[:-1]] for x, out in zip(first, outputs)]
    return np.array(self.stream(inputs, weights, segment_ids))

  def sequential(self, tokens, below=0.0):
    """f64[T, W, D], one slot after the other; nan for pruned slots."""
    seen, result = [], []
    for position, token in enumerate(tokens):
      x, states, weights = self.embed(token), [], np.zeros(1)
      for slot in range(self.slots):
        if slot and weights[slot] == -np.inf:
          states.append(np.full_like(x, np.nan))
          continue
        x = self.run(x, position, seen, weights[slot])
        states.append(x)
        if not slot:
          weights = self.key_weights(x, below)
      result.append(states)
    return np.array(result)

  def read(self, states, below=0.0):
    """Log-probabilities of all vocabulary entries at a token's slots, f64[V]."""
    state = states[-1]
    if "router" in self.params:
      shares, w = self.depths(states[0])
      state = sum(share * x for share, x, weight in zip(shares, states, w) if weight >= below)
    return self.words(state)

  def words(self, states):
    """Log-probabilities of all vocabulary entries from states, f64[..., V]."""
    logits = (states @ self.decoder["embedding"].T)[..., :VOCABULARY]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(
  ("name", "masked"),
  [("ponderlm2", False), pytest.param("ponderlm3", False, marks=pytest.mark.slow), ("ponderlm3", True)],
)
def test_the_schedule_against_a_slow_reference(name, masked, exact):
  """One pass for each number of slots, a Jacobi pass, and the pass that is read; every slot, and the state that is
  read.
  """
  below = BELOW if name == "ponderlm3" else 0.0
  options = {"prune_below": below} if below else {}
  method, params = model(name, decoder=ONE_LAYER if masked else TINY, jacobi=(1, 1), **options)
  batch = random_batch(0, 2, 5)
  segment_ids = [None] * 2
  if masked:
    batch = with_segment_ids(batch, int(batch["tokens"][0, 2]))
    segment_ids = batch["segment_ids"]
    assert segment_ids.max() > 0
  reading = jax.jit(method.evaluate)(params, batch)
  slow = Slow(method, params)

  def read(row, below):
    """f64[T, W + 1], the log-likelihood at each slot and of the state that is read."""
    states, targets = slow.passes(batch["tokens"][row], 1, below, segment_ids[row]), batch["targets"][row]
    return np.array([[*slow.words(x)[:, y], slow.read(x, below)[y]] for x, y in zip(states, targets)])

  for row in range(2):
    expected = read(row, below)
    np.testing.assert_allclose(reading.scores.log_target[row], expected[:, :-1], atol=2e-4)
    np.testing.assert_allclose(reading.log_likelihood[row], expected[:, -1], atol=2e-4)
    if below:
      np.testing.assert_allclose(reading.extra_metrics["unpruned"][row], read(row, 0.0)[:, -1], atol=2e-4)
  if below:  # some slots are kept and some are pruned: otherwise the test shows nothing
    assert len(np.unique(reading.slots)) > 1
  else:
    np.testing.assert_array_equal(np.exp(reading.log_stopping)[0, 0], [0, 0, 1])


@pytest.mark.parametrize("name", NAMES)
def test_jacobi_passes_converge_to_sequential_decoding(name, exact):
  """After at most T*K passes; the error falls with each pass, and the start of the text converges first."""
  length, pauses = 4, 2
  options = {"prune_below": 0.0} if name == "ponderlm3" else {}
  method, params = model(name, jacobi=(0, length * pauses), **options)
  batch = random_batch(1, 1, length)
  expected = Slow(method, params).sequential(batch["tokens"][0])
  hidden = jax.jit(functools.partial(method.slot_model.ponder, is_pruned=False))
  errors = [np.abs(hidden(params, batch, jacobi=j)[0] - expected).max(-1) for j in range(length * pauses + 1)]
  assert errors[0].max() > 1e-2
  assert errors[2].max() < errors[0].max() / 2
  assert errors[4].max() < errors[2].max() / 2
  assert errors[-1].max() < 1e-5
  # The first token is exact as soon as all slots have been added.
  assert errors[0][0].max() < 1e-5


def test_all_rows_have_the_same_number_of_passes(exact):
  method, params = model("ponderlm2", pauses=1, jacobi=(0, 2))
  keys = jax.random.split(jax.random.key(0), 3000)
  drawn = np.asarray(jax.vmap(method.slot_model.draw_passes)(keys))
  counts = np.bincount(drawn, minlength=4)
  assert counts.sum() == counts[:3].sum()
  assert (np.abs(counts[:3] - 1000) < 4 * np.sqrt(3000 * 2 / 9)).all()
  batch, others = random_batch(2, 4, 4), random_batch(3, 4, 4)
  # The other part of the batch has the same number of passes, so its content changes nothing.
  part = {name: np.concatenate([batch[name][:2], others[name][2:]]) for name in batch}
  slow = Slow(method, params)
  for passes in range(3):
    key = keys[int(np.argmax(drawn == passes))]
    loss = method.loss(params, batch, key).loss
    states = slow.passes(batch["tokens"][0], passes)
    expected = [-slow.read(x)[y] for x, y in zip(states, batch["targets"][0])]
    np.testing.assert_allclose(loss[0], expected, atol=1e-4)
    np.testing.assert_allclose(method.loss(params, part, key).loss[:2], loss[:2], rtol=1e-5)
  # Evaluation uses the maximum.
  np.testing.assert_allclose(method.hidden(params, batch)[0], states, atol=1e-4)


def test_gradients_go_through_every_pass(exact):
  """Against differences of the slow reference, in one direction of all parameters; the last pass is a drawn pass."""
  method, params = model("ponderlm3", pauses=1, jacobi=(0, 1))
  batch = random_batch(3, 1, 3)
  direction = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape), params)
  keys = jax.random.split(jax.random.key(1), 10)
  gradient = jax.jit(jax.grad(lambda params, key: method.loss(params, batch, key).loss.sum()))
  for passes in (0, 1):

    def slow(step, passes=passes):
      moved = jax.tree.map(lambda x, d: np.asarray(x, np.float64) + step * d, params, direction)
      reference = Slow(method, moved)
      states = reference.passes(batch["tokens"][0], passes)
      return -sum(reference.read(x)[y] for x, y in zip(states, batch["targets"][0]))

    key = next(key for key in keys if method.slot_model.draw_passes(key) == passes)
    parts = jax.tree.map(lambda g, d: float((g * d).sum()), gradient(params, key), direction)
    assert sum(jax.tree.leaves(parts)) == pytest.approx((slow(1e-5) - slow(-1e-5)) / 2e-5, rel=1e-3)


def test_causality():
  method, params = model("ponderlm3", pauses=1, jacobi=(1, 1))
  length = 3
  batch = {"tokens": jnp.arange(length)[None]}

  def at(table):
    own = params | {"decoder": params["decoder"] | {"embedding": table}}
    return method.hidden(own, batch)[0].sum((-1, -2))

  influence = np.abs(jax.jit(jax.jacrev(at))(params["decoder"]["embedding"])).sum(-1)[:, :length] > 0
  np.testing.assert_array_equal(influence, np.tril(np.ones((length, length), bool)))


# Decoding.

PROMPTS = [[5], [1, 7, 2, 9], [4, 4]]


@pytest.mark.parametrize("name", NAMES)
def test_generation_equals_the_reference(name):
  options = {"prune_below": BELOW} if name == "ponderlm3" else {}
  method, params = model(name, **options)
  assert default_mode(method) == "constant"
  below = options.get("prune_below", 0.0)
  with jax.default_matmul_precision("highest"):
    generation = Sampler(method, SamplingOptions(mode="constant", temperature=0)).generate(
      params, PROMPTS, max_new_tokens=4
    )
  slow, kept = Slow(method, params), set()
  for row, prompt in enumerate(PROMPTS):
    states = slow.sequential(prompt + generation.tokens[row][:-1], below)[len(prompt) - 1 :]
    for number, of_token in enumerate(states):
      words = slow.read(of_token, below)
      assert words.argmax() == generation.tokens[row][number]
      assert generation.log_probs[row][number] == pytest.approx(words.max(), abs=1e-4)
      assert generation.pauses[row][number] == np.isfinite(of_token[:, 0]).sum() - 1
      kept.add(generation.pauses[row][number])
    assert generation.slots[row] == 4 + sum(generation.pauses[row])
  assert (len(kept) > 1) is (name == "ponderlm3")  # otherwise the test shows nothing
  assert generation.iterations == 4


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=pytest.mark.slow) if name == "ponderlm3" else name for name in NAMES]
)
def test_scores_equal_those_of_the_reference(name, exact):
  options = {"prune_below": BELOW} if name == "ponderlm3" else {}
  method, params = model(name, jacobi=(2, 2), **options)
  scorer = Scorer(method, params, context=8, start_id=3, row_slots=64)
  requests = [([3, 1, 7], [2, 9]), ([3, 1, 7], [5]), ([3], [4, 4, 6])]
  scores = scorer.score(requests)
  read = jax.jit(method.evaluate)
  for (context, continuation), score in zip(requests, scores):
    ids = (context + continuation + [0] * 6)[:7]
    reading = read(params, {"tokens": jnp.array([ids[:-1]]), "targets": jnp.array([ids[1:]])})
    scored = slice(len(context) - 1, len(context) + len(continuation) - 1)
    assert score.log_likelihood == pytest.approx(float(reading.log_likelihood[0, scored].sum()), abs=1e-4)
  # The last document: 3 tokens of 3 slots, each with as many passes as in `hidden`.
  assert scores[2].slots == pytest.approx(method.costs(3).forward_slots)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"mode": "self_paced"}, r"mode: 'self_paced', but method 'ponderlm2' always runs .*; use 'constant'"),
    ({"mode": "none"}, r"mode: 'none', but method 'ponderlm2' always runs"),
    ({"mode": "constant", "max_pauses": 1}, r"max_pauses: 1, but method 'ponderlm2' always runs .*, 2 of them"),
    ({"mode": "constant", "prompt_pauses": "none"}, r"prompt_pauses: 'none', but method 'ponderlm2'"),
    ({"mode": "constant", "omega": (1.0, 1.0, 1.0)}, r"omega: .* is set, but method 'ponderlm2'"),
  ],
)
def test_options_of_pauses_are_refused(options, message):
  with pytest.raises(InputError, match=message):
    Sampler(model("ponderlm2")[0], SamplingOptions(**options))


def test_methods_that_cannot_decode_are_refused():
  method, params = build(name="thoughtbubbles")
  assert not isinstance(method, Decoding)
  message = (
    r"method.name: 'thoughtbubbles' doesn't run slot by slot, so it can't generate or score text; use a method with"
    r" a cache, such as 'cyb'"
  )
  with pytest.raises(InputError, match=message):
    Sampler(method)
  with pytest.raises(InputError, match=message):
    Scorer(method, params, context=4, start_id=0)


# PonderLM-3 only.


@pytest.mark.slow
def test_full_depth_comes_first(exact):
  """In a fifth of 10 steps all thoughts are used, without a penalty and without a gradient of the router."""
  options = {"name": "ponderlm3", "pauses": 2, "jacobi": (0, 0), "router_penalty": 0.3}
  plain, params = build(ONE_LAYER, **options)
  method = methods.build(configure(**options, full_depth=0.2), ONE_LAYER, vocab_size=VOCABULARY).with_steps(10)
  batch, key = random_batch(4, 2, 3), jax.random.key(0)

  @jax.jit
  def run(params, step):
    (_, losses), gradient = jax.value_and_grad(
      lambda p: (lambda losses: (losses.loss.sum(), losses))(method.loss(p, batch, key, step)), has_aux=True
    )(params)
    return losses, gradient

  deep = params | {"router_bias": jnp.array([-1e4, -1e4, 0.0])}
  for step in (0, 1):
    losses, gradient = run(params, step)
    np.testing.assert_allclose(losses.loss, -losses.log_likelihood)
    np.testing.assert_allclose(losses.stopping, np.broadcast_to([0, 0, 1], (2, 3, 3)))
    np.testing.assert_allclose(losses.log_likelihood, plain.loss(deep, batch, key).log_likelihood, rtol=1e-5)
    assert not np.any(gradient["router"])
    assert not np.any(gradient["router_bias"])
    assert np.any(gradient["decoder"]["embedding"])
  losses, gradient = run(params, 2)
  assert_trees_close(losses, plain.loss(params, batch, key))
  assert np.any(gradient["router"])
  assert np.any(gradient["router_bias"])
  # If the number of steps is unknown, the loss is that of later steps.
  assert_trees_close(method.with_steps(0).loss(params, batch, key, 0), plain.loss(params, batch, key))


def test_the_router_has_its_own_learning_rate():
  from cyb_jax.training.optimizer import optimizer_of

  config = tiny_config(name="ponderlm3", pauses=1, router_rate=0.1)
  config.tuning.new_rate = 2.0
  moved = {}
  for rate in (0.1, 1.0):
    config.method.router_rate = rate
    frozen = configs.freeze(config)
    method = frozen.build_method(VOCABULARY)
    params = {"decoder": {"embedding": jnp.ones(3)}, "router": jnp.ones(3), "router_bias": jnp.ones(2)}
    optimizer = optimizer_of(frozen, method, 10)
    moved[rate], _ = optimizer.update(params, optimizer.init(params), params)
  for name, factor in (("router", 0.1), ("router_bias", 0.1)):
    np.testing.assert_allclose(moved[0.1][name], factor * moved[1.0][name], rtol=1e-6)
  assert_trees_close(moved[0.1]["decoder"], moved[1.0]["decoder"])


@pytest.mark.slow
def test_training_holds_full_depth(tmp_path):
  """A run passes its number of steps to the method, and so does a resumed run."""
  from cyb_jax.training.metrics import read_metrics

  config = tiny_config(name="ponderlm3", pauses=1, jacobi="1:1", full_depth=0.5)
  config.train.update(steps=4, log_every=1, eval_every=0, checkpoint_every=2)
  training.train(configs.freeze(config), tmp_path / "run")
  rows = [row["latency"] for row in read_metrics(tmp_path / "run") if row["split"] == "train"]
  assert [row[-1] == 1 for row in rows] == [True, True, False, False]


def test_weights_and_penalty_by_hand(exact):
  """Depths of 1/2, 1/3 and 1/6: w is 1, 1/2, 1/6."""
  method, params = build(ONE_LAYER, name="ponderlm3", pauses=2, router_penalty=0.3, jacobi=(0, 0))
  # The initial distribution is concentrated at full depth.
  np.testing.assert_allclose(np.exp(params["router_bias"]), [0.05, 0.05, 0.9], rtol=1e-5)
  params["router_bias"] = jnp.log(jnp.array([3.0, 2.0, 1.0]))
  hidden = jnp.array(np.random.default_rng(0).normal(size=(3, ONE_LAYER.d_model)), jnp.float32)
  log_depth, log_weights = method.slot_model.log_depths(params, hidden[0])
  np.testing.assert_allclose(np.exp(log_depth), [1 / 2, 1 / 3, 1 / 6], rtol=1e-6)
  np.testing.assert_allclose(np.exp(log_weights), [1, 1 / 2, 1 / 6], rtol=1e-6)
  assert float(log_weights[0]) == 0
  fused = hidden[0] / 2 + hidden[1] / 3 + hidden[2] / 6
  np.testing.assert_allclose(method.fuse(params, hidden), fused, rtol=1e-5, atol=1e-6)
  batch = random_batch(4, 2, 3)

  losses = method.loss(params, batch, jax.random.key(0))
  np.testing.assert_allclose(losses.loss + losses.log_likelihood, 0.3 * (1 / 2 + 1 / 6), rtol=1e-5)
  np.testing.assert_allclose(losses.stopping, np.broadcast_to([1 / 2, 1 / 3, 1 / 6], (2, 3, 3)), rtol=1e-5)
  # log w has a lower bound, and gradients stay finite.
  steep = params | {"router_bias": jnp.array([0.0, -50.0, -200.0])}
  np.testing.assert_allclose(method.slot_model.log_depths(steep, hidden[0])[1], [0, -20, -20])
  gradient = jax.grad(lambda params: method.slot_model.log_depths(params, hidden[0])[1].sum())(steep)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_gradients_reach_the_router_through_the_mask_and_through_the_fusion(exact):
  """The router's parameters, separated by their two uses."""
  method, params = model("ponderlm3", pauses=1, jacobi=(0, 0))
  batch = random_batch(5, 2, 4)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradients(of_mask, of_fusion):
    apart = methods.build(method.config, ONE_LAYER, vocab_size=VOCABULARY)
    slots = apart.slot_model
    weigh, fuse = slots.key_weights, slots.fuse
    slots.key_weights = lambda params, *args: weigh(params | {"router": of_mask}, *args)
    slots.fuse = lambda params, *args, **options: fuse(params | {"router": of_fusion}, *args, **options)
    return apart.loss(params, batch, jax.random.key(0)).loss.sum()

  mask, fusion = gradients(params["router"], params["router"])
  assert np.abs(mask).max() > 1e-3
  assert np.abs(fusion).max() > 1e-3
  assert not np.allclose(mask, fusion, rtol=1e-2)


@pytest.mark.slow
def test_the_effect_of_pruning_shrinks_with_its_threshold(exact):
  method, params = model("ponderlm3", pauses=3, jacobi=(0, 0))
  batch, effects, kept = random_batch(6, 4, 6), [], []

  @jax.jit
  def read(below):
    pruning = methods.build(method.config, ONE_LAYER, vocab_size=VOCABULARY)
    pruning.slot_model.kept = lambda log_weights: log_weights >= jnp.log(below)  # one program for all
    return pruning.evaluate(params, batch)

  trained = method.loss(params, batch, jax.random.key(0)).log_likelihood
  for below in (0.6, 0.3, 0.05, 1e-4, 0.0):
    reading = read(below)
    np.testing.assert_allclose(reading.extra_metrics["unpruned"], trained, atol=1e-5)
    np.testing.assert_allclose(reading.extra_metrics["change"], np.abs(reading.fused - trained), atol=1e-5)
    effects.append(float(reading.extra_metrics["change"].mean()))
    kept.append(float(reading.slots.mean()))
    # A slot is kept if its weight, the probability of its depth or a greater one, is large enough.
    tails = np.cumsum(np.exp(reading.log_stopping)[..., ::-1], -1)[..., ::-1]
    np.testing.assert_array_equal(reading.slots, (tails >= below * (1 - 1e-6)).sum(-1))
  assert effects[0] > 1e-2
  assert effects[0] > effects[1] > effects[2] > effects[3]
  assert effects[3] < 1e-3
  assert effects[4] < 1e-6  # rounding differs between the two programs
  assert kept[0] < kept[1] < kept[2] <= kept[3] <= kept[4] == 4


@pytest.mark.parametrize(("below", "expected"), [(0.0, 4), (1e-4, 3), (0.4, 2), (0.6, 1)])
def test_kept_slots_by_hand(below, expected):
  method = methods.build(configure(name="ponderlm3", pauses=3, prune_below=below), TINY)
  weights = jnp.log(jnp.array([1.0, 0.5, 0.3, 1e-5]))
  np.testing.assert_array_equal(method.slot_model.kept(weights), np.arange(4) < expected)


@pytest.mark.slow
def test_evaluation_records_pruning(exact):
  method, params = model("ponderlm3", jacobi=(0, 0), prune_below=BELOW)
  batch = random_batch(7, 8, 4, uneven=True)
  mesh = make_mesh(ParallelismConfig(data=1), jax.devices()[:1])
  record = Evaluator(method, mesh)(params, [batch])
  reading = jax.jit(method.evaluate)(params, batch)
  weights = batch["weights"]

  def mean(values):
    return float((values * weights).sum() / weights.sum())

  assert record["perplexity"] == pytest.approx(np.exp(-mean(reading.fused)), rel=1e-5)
  assert record["pruning"] == {
    "below": BELOW,
    "perplexity_unpruned": pytest.approx(np.exp(-mean(reading.extra_metrics["unpruned"])), rel=1e-5),
    "change": pytest.approx(mean(reading.extra_metrics["change"]), rel=1e-4),
    "slots": pytest.approx(mean(reading.slots), rel=1e-6),
  }
  assert record["perplexity"] != pytest.approx(record["pruning"]["perplexity_unpruned"], rel=1e-4)
  assert record["inference_slots"] == pytest.approx(float(reading.slots[(weights > 0).any(-1)].mean()))
  assert 1 < record["pruning"]["slots"] < 3
  assert record["inference_flops"] == method.costs(4, slots=record["inference_slots"]).inference.total
  assert len(record["slot_perplexity"]) == len(record["latency"]) == 3


# Costs.


def test_cost_by_hand():
  # D = 2, N = 2, H = 4, F = 5, V = 7: a slot's matrices 156, a key 32, a readout 28 (tests/test_flops.py).
  config = DecoderConfig(vocab_size=7, num_layers=1, d_model=2, num_heads=2, num_kv_heads=1, head_size=4, mlp_size=5)
  two = methods.build(configure(name="ponderlm2", pauses=2, jacobi=(1, 2)), config)
  # T = 3: passes over 1 and 2 slots per token, with keys 2 and 3.5; J + 1 passes over 3 slots, with keys 5.
  grown, full = (156 + 32 * 2) + 2 * (156 + 32 * 3.5), 3 * (156 + 32 * 5)
  assert two.costs(3).forward.total == grown + 3 * full + 3 * 28
  assert two.costs(3).train.total == pytest.approx(3 * (grown + 2.5 * full + 28))
  assert two.costs(3).train_slots == 3 * (1 + 2 + 2.5 * 3)
  assert two.costs(3).forward_slots == 3 * (1 + 2 + 3 * 3)
  assert two.costs(3).inference.total == full + 28
  three = methods.build(configure(name="ponderlm3", pauses=2, jacobi=(1, 2), prune_below=0.0), config)
  # The router, 2 D W = 12, after the first pass and after each pass over all slots.
  assert three.costs(3).train.total == pytest.approx(3 * (grown + 2.5 * full + 28 + 3.5 * 12))
  assert three.costs(3).forward.total == grown + 3 * full + 4 * 28 + 4 * 12
  assert three.costs(3).inference.total == full + 28 + 12
  # 2 of 3 slots kept: keys 3.5.
  assert three.costs(3, slots=2.0).inference.total == 2 * (156 + 32 * 3.5) + 28 + 12
  with pytest.raises(ValueError, match=r"slots: 2.0, but all latent thoughts of a token run"):
    two.costs(3, slots=2.0)


@pytest.mark.parametrize(
  ("name", "fields"), [("ponderlm2", {"remat": "full"}), pytest.param("ponderlm3", {}, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_executed_agrees_with_xla(name, fields):
  config = DecoderConfig(
    vocab_size=512, num_layers=1, d_model=256, num_heads=4, num_kv_heads=4, head_size=64, mlp_size=768, **fields
  )
  options = {"prune_below": 0.0} if name == "ponderlm3" else {}
  method = methods.build(configure(name=name, pauses=2, jacobi=(1, 1), **options), config, chunk_size=2**20)
  params = nn.unbox(jax.eval_shape(method.init, jax.random.key(0)))
  rows, weights = jax.ShapeDtypeStruct((2, 16), jnp.int32), jax.ShapeDtypeStruct((2, 16), jnp.float32)

  def counted(function):
    lowered = jax.jit(function).lower(params, {"tokens": rows, "targets": rows, "weights": weights})
    return lowered.compile().cost_analysis()["flops"] / (2 * 16)

  def loss(params, batch):
    return method.loss(params, batch, jax.random.key(0)).weighted_sum(batch["weights"])

  assert method.costs(16).train_executed.total == pytest.approx(counted(jax.grad(loss)), rel=0.03)
  if name == "ponderlm2":
    read = counted(lambda params, batch: method.evaluate(params, batch).loss.sum())
    assert method.costs(16).forward_executed.total == pytest.approx(read, rel=0.03)


# Edge cases and invalid input.


@pytest.mark.parametrize("name", NAMES)
def test_one_token_and_one_thought(name, exact):
  method, params = model(name, pauses=1, jacobi=(0, 0))
  batch = random_batch(8, 2, 1)
  reading = jax.jit(method.evaluate)(params, batch)
  slow = Slow(method, params)
  for row in range(2):
    words = slow.read(slow.sequential(batch["tokens"][row])[0])
    np.testing.assert_allclose(reading.log_likelihood[row, 0], words[batch["targets"][row, 0]], atol=1e-4)


@pytest.mark.slow
def test_scanned_layers(exact):
  decoder = dataclasses.replace(TINY, scan_layers=True, remat="full")
  method, params = model("ponderlm3", decoder=decoder, pauses=1, jacobi=(0, 0))
  layers = {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["decoder"]["layers"]) for i in range(2)}
  batch = random_batch(9, 1, 3)
  found = method.loss(params, batch, jax.random.key(3)).log_likelihood[0]
  slow = Slow(method, params | {"decoder": params["decoder"] | layers})
  states = slow.passes(batch["tokens"][0], 0)
  np.testing.assert_allclose(found, [slow.read(x)[y] for x, y in zip(states, batch["targets"][0])], atol=1e-4)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(name="ponderlm2", pauses=0), r"method.pauses: 0 must be a whole number of at least 1"),
    (
      dict(name="ponderlm2", pauses=1, jacobi=(3, 2)),
      r"method.jacobi: '3:2' must be the minimum and the maximum number of passes",
    ),
    (dict(name="ponderlm2", pauses=1, jacobi=(3,)), r"method.jacobi: '3' must be the minimum"),
    (dict(name="ponderlm2", pauses=1, jacobi=(-1, 2)), r"method.jacobi: '-1:2' must be the minimum"),
    (dict(name="ponderlm2", pauses=1, router_penalty=0.1), r"method.router_penalty: .*'ponderlm2' has no such option"),
    (dict(name="ponderlm3", pauses=1, router_penalty=-1.0), r"method.router_penalty: -1.0 must be not negative"),
    (dict(name="ponderlm3", pauses=1, full_depth=1.5), r"method.full_depth: 1.5 must be in \[0, 1\]"),
    (dict(name="ponderlm3", pauses=1, router_rate=-1.0), r"method.router_rate: -1.0 must be not negative"),
    (dict(name="ponderlm3", pauses=1, prune_below=1.0), r"method.prune_below: 1.0 must be in \[0, 1\)"),
    (dict(name="ponderlm3", pauses=1, omega=(1.0, 1.0)), r"method.omega: .* method 'ponderlm3' has no such option"),
    (dict(name="cyb", pauses=1, jacobi=(1, 1)), r"method.jacobi: .* method 'cyb' has no such option"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(InputError, match=message):
    methods.build(configure(**options), TINY)


def test_kernels_without_key_weights_are_refused():
  decoder = dataclasses.replace(TINY, attention="splash")
  with pytest.raises(InputError, match=r"decoder.attention: 'splash' does not support key weights, which method"):
    methods.build(configure(name="ponderlm3", pauses=1), decoder)


def test_settings_include_their_conditioning():
  config = configs.default()
  settings.apply(config, "ponderlm2", "tiny", "1x1", from_scratch=True)
  frozen = configs.freeze(config)
  assert frozen.method.jacobi == (2, 3)
  decoder = frozen.build_method().decoder.config
  assert (decoder.initializer, decoder.scale_embeddings, decoder.tied_embeddings) == ("small", True, False)
  plain = configs.default()
  settings.apply(plain, "looped", "tiny", "1x1")
  assert configs.freeze(plain).build_method().decoder.config.tied_embeddings


# The programs.


def test_reports_state_what_is_read():
  for name, reading in (("tbys", "mixture over s"), ("ponderlm3", "all slots fused into one state")):
    section = single._perplexity(example(decides=False) | {"method": name})
    assert f"as evaluated ({reading})" in section.body


def test_options_of_pauses_at_inference_are_refused():
  mesh = make_mesh(ParallelismConfig(data=1), jax.devices()[:1])
  with pytest.raises(InputError, match=r"context: 'self_paced', but method 'ponderlm2' can't run with"):
    Evaluator(model("ponderlm2")[0], mesh, context="self_paced")


@pytest.fixture(scope="module", params=NAMES)
def workdir(request, tmp_path_factory):
  """The work directory of a trained run, named after the method."""
  folder = tmp_path_factory.mktemp("runs") / request.param
  config = tiny_config(name=request.param, pauses=1, jacobi="0:1")
  config.data.batch_size, config.optimizer.accumulate = 16, 2
  config.train.update(steps=4, eval_every=0, checkpoint_every=0)
  record = training.train(configs.freeze(config), folder)
  assert record["train_slots"] == 4 * 16 * 16 * (1 + 2 * 1.5)
  assert np.isfinite(record["perplexity"])
  assert ("pruning" in record) is (request.param == "ponderlm3")
  return folder


@pytest.mark.slow
def test_programs(workdir, monkeypatch, tmp_path):
  folder = tmp_path / "report"
  record = call(monkeypatch, workdir=workdir, limit=4, text_windows=1, output=folder)
  text = (folder / "index.html").read_text()
  Page(text)
  assert ("fused into one state" in text) is (workdir.name == "ponderlm3")
  statistics = json.loads((folder / "statistics.json").read_text())
  assert record["perplexity"] == statistics["perplexity"]["mixture"]
  assert statistics["self_paced"] is None
  assert len(statistics["latency"]["mean"]) == 2


@pytest.mark.slow
def test_through_the_programs(workdir):
  process = cli.start("generate", f"--workdir={workdir}", "--prompt=a=1", "--max_new_tokens=3", "--nostream")
  refused = cli.start("evaluate", f"--workdir={workdir}", "--context=self_paced")
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  result = json.loads(out.strip().splitlines()[-1])
  assert (result["mode"], result["tokens"]) == ("constant", 3)
  assert result["slots"] == 3 + sum(result["pauses"][0])
  _, err = refused.communicate(timeout=300)
  assert refused.returncode == 2
  assert f"--context: 'self_paced', but method {workdir.name!r} has no pauses that it can omit" in err
