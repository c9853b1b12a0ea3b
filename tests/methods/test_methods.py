"""Methods: the forward pass over slots against an embedding lookup of ids; losses against dense logits; visibility."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, VOCABULARY, assert_trees_close, build, random_batch

from cyb_jax import losses, methods, pauses
from cyb_jax.errors import InputError
from cyb_jax.methods import configure
from cyb_jax.stopping import SlotScores, log_stopping_distribution

CYB = {"name": "cyb", "pauses": 2}


def dense_hidden(method, params, batch, *, token_plus_pause=False):
  """Uses one table of tokens and pauses with the ids of `interleave`, and an explicit mask."""
  slots = pauses.interleave(batch["tokens"], method.config.pauses, TINY.vocab_size)
  table = jnp.concatenate([params["decoder"]["embedding"], params["pause_input"]])
  inputs = table[slots.ids]
  if token_plus_pause:
    inputs = inputs.at[:, :, 1:].add(inputs[:, :, :1])
  batch_size, length, num_slots = slots.ids.shape
  order = jnp.arange(length * num_slots)
  token, slot = order // num_slots, order % num_slots
  mask = (order[:, None] >= order[None, :])[None, None]
  if method.config.pause_visibility == "hidden":
    mask &= (slot == 0) | (token[:, None] == token)
  hidden = method.decoder.apply(
    {"params": params["decoder"]},
    inputs.reshape(batch_size, length * num_slots, -1),
    slots.positions.reshape(batch_size, -1),
    mask=mask,
  )
  return hidden.reshape(batch_size, length, num_slots, -1)


@pytest.mark.parametrize(
  ("pause_input", "visibility"), [("pause", "visible"), ("token+pause", "visible"), ("token+pause", "hidden")]
)
def test_hidden_equals_a_pass_over_the_interleaved_ids(pause_input, visibility, exact):
  method, params = build(**CYB, pause_input=pause_input, pause_visibility=visibility)
  batch = random_batch()
  expected = dense_hidden(method, params, batch, token_plus_pause=pause_input == "token+pause")
  np.testing.assert_allclose(method.hidden(params, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("embeddings", ["scaled", "plain"])
def test_pauses_are_scaled_like_tokens(embeddings):
  """A pause with the row of a token has the same input as the token (Gemma scales its inputs)."""
  decoder = dataclasses.replace(TINY, scale_embeddings=embeddings == "scaled")
  method, params = build(decoder, **CYB | {"pauses": 1})
  batch = random_batch(length=1)
  params["pause_input"] = params["decoder"]["embedding"][5][None]
  both = method.decoder.apply({"params": params["decoder"]}, jnp.array([[5]]), method="embed")
  row = method.decoder.apply({"params": params["decoder"]}, params["pause_input"], method="scale_inputs")
  np.testing.assert_array_equal(both[0], row)
  assert method.hidden(params, batch).shape == (4, 1, 2, 16)


def dense_scores(method, params, batch):
  hidden = method.hidden(params, batch)
  rows = jnp.concatenate([params["decoder"]["embedding"][:VOCABULARY], params["dont_know"][None]])
  return SlotScores.from_logits(hidden @ rows.T, batch["targets"], -1, method.config.dont_know_prior)


VARIANTS = {
  "ap": ({}, lambda s: losses.cyb(s)),
  "ap omega gamma": (
    {"omega": (1.0, 1.0, 2.0), "gamma": (1.0, 0.9, 0.8)},
    lambda s: losses.cyb(s, [1, 1, 2], [1, 0.9, 0.8]),
  ),
  "va": ({"loss": "va", "rho": (1.0, 2.0, 1.0)}, lambda s: losses.cyb_va(s, [1, 2, 1])),
  "dp": ({"loss": "dp", "rho": (0.0, 1.0, 1.0), "alpha": 0.1}, lambda s: losses.cyb_dp(s, [0, 1, 1], 0.1)),
}


@pytest.mark.parametrize(
  "variant", [pytest.param(variant, marks=pytest.mark.slow) if variant == "ap" else variant for variant in VARIANTS]
)
def test_cyb_losses_against_dense_logits(variant, exact):
  options, oracle = VARIANTS[variant]
  method, params = build(**CYB, **options)
  batch = random_batch(1)
  out = method.loss(params, batch, jax.random.key(0))
  scores = dense_scores(method, params, batch)
  np.testing.assert_allclose(out.loss, oracle(scores), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(out.log_likelihood, -losses.cyb(scores, options.get("omega")), rtol=1e-4, atol=1e-5)
  s = jnp.exp(log_stopping_distribution(scores.log_dont_know, scores.log_answer, options.get("omega")))
  np.testing.assert_allclose(out.stopping, s, rtol=1e-4, atol=1e-5)


def test_unit_form_starts_at_the_prior():
  method, params = build(**CYB, dont_know="unit", dont_know_prior=0.8)
  d = jnp.exp(method.slot_scores(params, random_batch()).log_dont_know)
  np.testing.assert_allclose(d, 0.8, rtol=1e-5)


def test_tbys_is_cross_entropy_at_the_last_pause(exact):
  method, params = build(name="tbys", pauses=2)
  batch = random_batch(2)
  logits = method.hidden(params, batch)[:, :, -1] @ params["decoder"]["embedding"][:VOCABULARY].T
  expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
  out = method.loss(params, batch, jax.random.key(0))
  np.testing.assert_allclose(out.loss, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(out.stopping[0, 0], [0, 0, 1])
  reading = method.evaluate(params, batch)
  np.testing.assert_allclose(reading.loss, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(jnp.exp(reading.log_stopping)[0, 0], [0, 0, 1])


def test_baseline_is_a_plain_language_model(exact):
  method, params = build(name="baseline")
  assert set(params) == {"decoder"}
  batch = random_batch(3)
  embedded = params["decoder"]["embedding"][batch["tokens"]]
  hidden = method.decoder.apply({"params": params["decoder"]}, embedded, jnp.arange(6)[None])
  logits = hidden @ params["decoder"]["embedding"][:VOCABULARY].T
  expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
  np.testing.assert_allclose(method.loss(params, batch, jax.random.key(0)).loss, expected, rtol=1e-4, atol=1e-5)


def test_no_pauses_is_the_baseline_for_every_variant(exact):
  baseline, params = build(name="baseline")
  batch = random_batch(4)
  plain = baseline.evaluate(params, batch).loss
  for options in ({}, {"loss": "va", "rho": (1.0,)}, {"loss": "dp", "rho": (1.0,), "alpha": 0.1}):
    method, own = build(name="cyb", pauses=0, **options)
    np.testing.assert_allclose(method.evaluate(own | params, batch).loss, plain, rtol=1e-5, atol=1e-6)


def influence(method, params, batch):
  """[T, T]: does the loss at token t (all its slots) change with the input embedding of token u?"""
  embedding = params["decoder"]["embedding"]
  length = batch["tokens"].shape[1]
  # Every position has a different token, so that a row of the table identifies a position.
  batch = batch | {"tokens": jnp.arange(length)[None], "targets": jnp.full((1, length), 20)}

  def at(table):
    own = params | {"decoder": params["decoder"] | {"embedding": table}}
    return method.hidden(own, batch)[0].sum((-1, -2))

  jacobian = jax.jacobian(at)(embedding)  # [T, V, D]
  return np.abs(jacobian).sum(-1)[:, :length] > 0


@pytest.mark.parametrize("visibility", ["visible", "hidden"])
@pytest.mark.parametrize("pause_input", ["pause", "token+pause"])
def test_causality_through_tokens_and_pauses(visibility, pause_input):
  method, params = build(**CYB, pause_visibility=visibility, pause_input=pause_input)
  np.testing.assert_array_equal(influence(method, params, random_batch(5, 1, 5)), np.tril(np.ones((5, 5), bool)))


@pytest.mark.slow
def test_pauses_are_seen_by_later_tokens_unless_hidden():
  for visibility, seen in (("visible", True), ("hidden", False)):
    method, params = build(**CYB, pause_visibility=visibility)
    batch = random_batch(6, 1, 4)

    def later_token(rows, method=method, params=params, batch=batch):
      return method.hidden(params | {"pause_input": rows}, batch)[0, 1:, 0].sum()

    gradient = jax.grad(later_token)(params["pause_input"])
    assert bool(jnp.abs(gradient).max() > 0) is seen


def test_hidden_pauses_do_not_change_the_first_slots(exact):
  method, params = build(**CYB, pause_visibility="hidden")
  plain, _ = build(name="baseline")
  batch = random_batch(7)
  np.testing.assert_allclose(
    method.hidden(params, batch)[:, :, 0], plain.hidden(params, batch)[:, :, 0], rtol=1e-4, atol=1e-5
  )


def test_offsets_are_initially_zero_and_then_have_an_effect():
  method, params = build(**CYB, pause_offset=True)
  plain, _ = build(**CYB)
  batch = random_batch(8)
  np.testing.assert_allclose(method.hidden(params, batch), plain.hidden(params, batch), rtol=1e-4, atol=1e-5)
  moved = params | {"pause_offset": params["pause_offset"] + jnp.arange(1.0, 17.0) / 8}
  hidden, before = method.hidden(moved, batch), plain.hidden(params, batch)
  assert float(jnp.abs(hidden - before).max()) > 1e-3
  # The first token's first slot sees no pause, so no offset affects it.
  np.testing.assert_allclose(hidden[:, 0, 0], before[:, 0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("visibility", ["visible", "hidden"])
def test_slot_heads_project_the_states(visibility, exact):
  method, params = build(**CYB, slot_heads=True, pause_visibility=visibility)
  plain, _ = build(**CYB, pause_visibility=visibility)
  width = TINY.d_model
  assert params["slot_heads"].shape == (3, width, width)
  noise = params["slot_heads"] - np.eye(width)
  assert 0 < np.abs(noise).max() < 0.05  # equal heads would get equal gradients
  heads = params["slot_heads"] + 0.1 * jax.random.normal(jax.random.key(3), (3, width, width))
  batch = random_batch(12, 2, 5)
  states = np.asarray(plain.hidden(params, batch), np.float64)
  expected = np.stack([states[:, :, i] @ np.asarray(heads[i], np.float64) for i in range(3)], 2)
  np.testing.assert_allclose(method.hidden(params | {"slot_heads": heads}, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", [{}, {"recipe": "sampled", "omega": (0.0, 0.0, 1.0)}, {"recipe": "on_policy"}])
def test_costs_of_slot_heads(recipe):
  width = TINY.d_model
  with_heads, without = (build(**CYB, **recipe, slot_heads=heads)[0].costs(6) for heads in (True, False))
  assert with_heads.forward.total - without.forward.total == 3 * 2 * width**2
  assert with_heads.inference.total - without.inference.total == 3 * 2 * width**2
  slots = with_heads.train_slots / 6
  # The first pass of on_policy has no gradient.
  factor = 3 if recipe.get("recipe") != "on_policy" else 3 * (slots - 3) / slots + 3 / slots
  assert with_heads.train.total - without.train.total == pytest.approx(factor * slots * 2 * width**2)


def test_documents_do_not_see_each_other():
  method, params = build(**CYB)
  batch = random_batch(9, 1, 6)
  batch["tokens"][0, 3] = 0
  segment_ids = np.cumsum(batch["tokens"] == 0, -1).astype(np.int32)
  together = method.hidden(params, batch | {"segment_ids": segment_ids})
  alone = method.hidden(params, {"tokens": batch["tokens"][:, 3:]})
  np.testing.assert_allclose(together[:, 3:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gradients_reach_every_parameter():
  for options in (CYB, CYB | {"dont_know": "unit", "pause_offset": True}, {"name": "tbys", "pauses": 2}):
    method, params = build(**options)
    batch = random_batch(10)
    gradient = jax.grad(lambda p, m=method, b=batch: m.loss(p, b, jax.random.key(0)).loss.sum())(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
      assert np.isfinite(leaf).all(), path
      assert np.abs(leaf).max() > 0, path


def test_padding_of_the_vocabulary_has_no_gradient():
  method, params = build(**CYB)
  gradient = jax.grad(lambda p: method.loss(p, random_batch(11), jax.random.key(0)).loss.sum())(params)
  np.testing.assert_array_equal(gradient["decoder"]["embedding"][VOCABULARY:], 0)


def test_flops_count_the_slots_that_are_read():
  cyb, _ = build(**CYB)
  tbys, _ = build(name="tbys", pauses=2)
  assert cyb.costs(6).forward.total == tbys.costs(6).forward.total
  assert cyb.costs(6).train.total - tbys.costs(6).train.total == 3 * 2 * 2 * TINY.d_model * TINY.vocab_size


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"name": "cby"}, r"method.name: 'cby' is unknown; did you mean 'cyb'"),
    ({"name": "baseline", "pauses": 1}, r"method.pauses: unknown field; method 'baseline' has no such option"),
    ({"name": "tbys", "pauses": 0}, r"method.pauses: 0 must be a whole number of at least 1"),
    ({"name": "tbys", "pauses": 1, "rho": (1.0, 1.0)}, r"method.rho: .* no such option"),
    ({"name": "cyb", "pauses": -1}, r"method.pauses: -1"),
    ({"name": "cyb", "pauses": 1, "loss": "xx"}, r"method.loss: 'xx'"),
    ({"name": "cyb", "pauses": 1, "recipe": "xx"}, r"method.recipe: 'xx' must be one of constant"),
    ({"name": "cyb", "pauses": 1, "dont_know": "xx"}, r"method.dont_know: 'xx'"),
    ({"name": "cyb", "pauses": 1, "dont_know_prior": 1.0}, r"method.dont_know_prior: 1.0"),
    ({"name": "cyb", "pauses": 1, "pause_input": "xx"}, r"method.pause_input: 'xx'"),
    ({"name": "cyb", "pauses": 1, "pause_visibility": "xx"}, r"method.pause_visibility: 'xx'"),
    ({"name": "cyb", "pauses": 1, "omega": (1.0,)}, r"method.omega: shape \(1,\), but there are 2 slots"),
    ({"name": "cyb", "pauses": 1, "omega": (1.0, -1.0)}, r"method.omega: 1:-1 must be finite and not negative"),
    ({"name": "cyb", "pauses": 1, "omega": (0.0, 0.0)}, r"method.omega: 0:0 is all zero"),
    ({"name": "cyb", "pauses": 1, "gamma": (1.0, 2.0)}, r"method.gamma: .* must be in \[0, 1\]"),
    ({"name": "cyb", "pauses": 1, "alpha": 0.1}, r"method.alpha: 0.1 is set, but method.loss = 'ap'"),
    ({"name": "cyb", "pauses": 1, "loss": "va"}, r"method.rho: not set, but method.loss = 'va' requires 2"),
    ({"name": "cyb", "pauses": 1, "loss": "va", "rho": (1.0, 0.0)}, r"method.rho: 1:0 must be positive"),
    (
      {"name": "cyb", "pauses": 1, "loss": "va", "rho": (1.0, 1.0), "omega": (1.0, 1.0)},
      r"method.omega: .* doesn't use",
    ),
    ({"name": "cyb", "pauses": 1, "loss": "dp", "rho": (1.0, 1.0), "alpha": -1.0}, r"method.alpha: -1.0"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(InputError, match=message):
    methods.build(configure(**options), TINY)


def test_dp_accepts_zeros_in_rho():
  methods.build(configure(name="cyb", pauses=1, loss="dp", rho=(0.0, 1.0), alpha=0.1), TINY)


def test_same_seed_same_parameters():
  method, _ = build(**CYB)
  a, b, other = (jax.jit(lambda key: nn.unbox(method.init(key)))(jax.random.key(seed)) for seed in (0, 0, 1))
  assert_trees_close(a, b, rtol=0, atol=0)
  assert not np.array_equal(a["decoder"]["embedding"], other["decoder"]["embedding"])
