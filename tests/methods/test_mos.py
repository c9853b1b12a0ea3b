"""mos: a mixture of softmaxes of one hidden state, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_decoder import Float64Decoder
from models import TINY, VOCABULARY, build, random_batch

from cyb_jax.errors import InputError
from cyb_jax.generation import Sampler, SamplingOptions
from cyb_jax.methods import CachedDecoding, Exportable, ExtraMetrics, configure


def model(**options):
  """A model whose heads and gate differ."""
  method, params = build(name="mos", **options)
  keys = jax.random.split(jax.random.key(5), 4)
  for key, name in zip(keys, ("mos_heads", "mos_bias", "mos_gate", "mos_gate_bias")):
    params[name] = params[name] + 0.3 * jax.random.normal(key, params[name].shape)
  return method, params


def slow(method, params, tokens):
  """f64[T, V]: sum_k pi_k softmax(U f(h A_k + b_k)), and f64[T, W]: pi."""
  activation = np.tanh if method.config.head_activation == "tanh" else np.asarray
  decoder = Float64Decoder(method, params)
  states = decoder.finish(decoder.layers(decoder.embed(tokens)))
  own = decoder.params
  gate = np.exp(states @ own["mos_gate"] + own["mos_gate_bias"])
  gate /= gate.sum(-1, keepdims=True)
  heads = [activation(states @ a + b) for a, b in zip(own["mos_heads"], own["mos_bias"])]
  return sum(gate[:, k, None] * decoder.probabilities(head) for k, head in enumerate(heads)), gate


@pytest.mark.parametrize("activation", ["tanh", "none"])
def test_against_float64(activation, exact):
  method, params = model(heads=3, head_activation=activation)
  batch = random_batch(0, 2, 5)
  output = jax.jit(method.evaluate)(params, batch)
  losses = method.loss(params, batch, jax.random.key(0))
  scores = jax.jit(method.token_scores)(params, method.hidden(params, batch)[:, :, 0], jnp.zeros((2, 5), int))
  for row in range(2):
    words, gate = slow(method, params, batch["tokens"][row])
    expected = -np.log(words[np.arange(5), batch["targets"][row]])
    np.testing.assert_allclose(output.loss[row], expected, rtol=1e-5)
    np.testing.assert_allclose(output.log_likelihood[row], -expected, rtol=1e-5)
    np.testing.assert_allclose(losses.loss[row], expected, rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(scores.log_probs[row]), words, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(output.extra_metrics["head_2"][row], gate[:, 1], rtol=1e-4)
  assert np.abs(np.exp(np.asarray(scores.log_probs)).sum(-1) - 1).max() < 1e-5


def test_gradient_against_finite_differences(exact):
  method, params = model(heads=2)
  batch = random_batch(1, 1, 4)
  gradient = jax.jit(jax.grad(lambda p: method.loss(p, batch, jax.random.key(0)).loss.sum()))(params)
  for name, index in (("mos_heads", (1, 2, 3)), ("mos_gate", (4, 0)), ("mos_bias", (0, 5))):

    def loss(delta, name=name, index=index):
      moved = np.asarray(params[name], np.float64).copy()
      moved[index] += delta
      words, _ = slow(method, params | {name: moved}, batch["tokens"][0])
      return -np.log(words[np.arange(4), batch["targets"][0]]).sum()

    numeric = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert gradient[name][index] == pytest.approx(numeric, rel=1e-3, abs=1e-6), name


def test_heads_are_initially_almost_equal():
  method, params = build(name="mos")
  output = jax.jit(method.evaluate)(params, random_batch())
  assert method.num_slots == 1
  assert output.scores.log_target.shape == (4, 6, 1)
  for k in range(4):
    np.testing.assert_allclose(output.extra_metrics[f"head_{k + 1}"], 0.25, rtol=1e-6)
  assert np.abs(params["mos_heads"] - np.eye(TINY.d_model)).max() < 0.05


def test_heads_without_activation_start_at_the_plain_model(exact):
  method, params = build(name="mos", head_activation="none")
  params["mos_heads"] = jnp.broadcast_to(jnp.eye(TINY.d_model), params["mos_heads"].shape)
  plain, _ = build(name="baseline")
  batch = random_batch()
  losses = plain.loss({"decoder": params["decoder"]}, batch, jax.random.key(0)).loss
  np.testing.assert_allclose(method.loss(params, batch, jax.random.key(0)).loss, losses, rtol=1e-5)


def test_greedy_text_follows_the_mixture(exact):
  method, params = model(heads=2)
  generation = Sampler(method, SamplingOptions(mode="none", temperature=0.0)).generate(
    params, [[3, 4]], max_new_tokens=3
  )
  text = [3, 4]
  for token in generation.tokens[0]:
    words, _ = slow(method, params, np.array(text))
    assert words[-1].argmax() == token
    text.append(token)


def test_abilities_cost_and_refusals():
  method, _ = build(name="mos", heads=3)
  for ability in (CachedDecoding, ExtraMetrics):
    assert isinstance(method, ability)
  assert not isinstance(method, Exportable)
  plain = build(name="baseline")[0].costs(6).forward
  forward = method.costs(6).forward
  assert forward.readout == 3 * plain.readout
  assert forward.total == plain.total + 2 * plain.readout + 2 * 3 * (16 * 16 + 16)
  # A token has one slot, whatever the measured number is.
  assert method.costs(6, slots=1.0).inference == method.costs(6).inference == forward
  assert method.costs(6).train.total == 3 * forward.total
  assert method.summarize_metrics({"head_1": 0.5, "head_2": 0.3, "head_3": 0.2}) == {"heads": [0.5, 0.3, 0.2]}
  for heads in (1, True, 2.5):
    with pytest.raises(InputError, match=r"method.heads: .* must be a whole number of at least 2"):
      configure("mos", heads=heads)
  assert VOCABULARY < TINY.vocab_size  # padding rows have no probability in the test above
