"""The looped control, and the decoder's interface for methods that run some of its layers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, build, random_batch

from cyb_jax import methods
from cyb_jax.decoder import DecoderConfig, KeyWeights
from cyb_jax.decoder.attention import attend
from cyb_jax.errors import InputError
from cyb_jax.generation import Sampler, SamplingOptions
from cyb_jax.methods import configure


def by_hand(method, params, batch):
  """Runs the layers repeatedly on their own output, then the norm once."""
  decoder, variables = method.decoder, {"params": params["decoder"]}
  length = batch["tokens"].shape[1]
  hidden = decoder.apply(variables, batch["tokens"], method="embed")
  for _ in range(method.config.pauses + 1):
    for layer in range(decoder.config.num_layers):
      hidden, _ = decoder.apply(
        variables, hidden, jnp.arange(length)[None], layers=(layer, layer + 1), method="run_layers"
      )
  return decoder.apply(variables, hidden, method="finish")


def test_layers_run_repeatedly(exact):
  method, params = build(name="looped", pauses=2)
  baseline, _ = build(name="baseline")
  batch = random_batch()
  np.testing.assert_allclose(
    method.hidden(params, batch)[:, :, 0], by_hand(method, params, batch), rtol=1e-5, atol=1e-6
  )
  assert not np.allclose(method.hidden(params, batch), baseline.hidden(params, batch), atol=1e-3)
  reading = method.evaluate(params, batch)
  assert reading.scores.log_target.shape == (4, 6, 1)
  np.testing.assert_array_equal(method.loss(params, batch, jax.random.key(0)).loss, reading.loss)


def test_scanned_layers_give_equal_results_and_cannot_be_split():
  scanned, params = build(dataclasses.replace(TINY, scan_layers=True), name="looped", pauses=1)
  plain, _ = build(name="looped", pauses=1)
  layers = {
    f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["decoder"]["layers"]) for i in range(TINY.num_layers)
  }
  unrolled = {"decoder": {k: v for k, v in params["decoder"].items() if k != "layers"} | layers}
  batch = random_batch(1)
  np.testing.assert_allclose(scanned.hidden(params, batch), plain.hidden(unrolled, batch), rtol=1e-5, atol=1e-6)
  with pytest.raises(InputError, match=r"decoder.scan_layers: True"):
    scanned.decoder.apply(
      {"params": params["decoder"]},
      jnp.zeros((1, 2, TINY.d_model)), jnp.arange(2)[None], layers=(0, 1), method="run_layers",
    )  # fmt: skip


def test_no_pass_after_the_first_is_refused():
  with pytest.raises(InputError, match=r"method.pauses: 0 must be a whole number of at least 1"):
    build(name="looped", pauses=0)
  with pytest.raises(InputError, match=r"method.omega: unknown field; method 'looped' has no such option"):
    build(name="looped", pauses=1, omega=(1.0, 1.0))


@pytest.mark.parametrize("masked", [False, True])
def test_key_weights_against_numpy(masked):
  """softmax(q k / sqrt(H) + log w) over the visible keys, with values multiplied by v; grouped heads."""
  rng = np.random.default_rng(0)
  query, key, value = (rng.normal(size=(2, 5, heads, 3)) for heads in (4, 2, 2))
  log, scale = rng.normal(size=(2, 5)), rng.uniform(size=(2, 5))
  seen = np.tril(np.ones((5, 5), bool))
  if masked:
    seen &= rng.uniform(size=(5, 5)) > 0.4
    np.fill_diagonal(seen, True)
  expected = np.zeros((2, 5, 4, 3))
  for b, s, n in np.ndindex(2, 5, 4):
    logits = key[b, :, n // 2] @ query[b, s, n] / np.sqrt(3) + log[b]
    share = np.where(seen[s], np.exp(logits - logits.max()), 0)
    expected[b, s, n] = (share / share.sum()) @ (value[b, :, n // 2] * scale[b, :, None])
  found = attend(
    *(jnp.array(x, jnp.float32) for x in (query, key, value)),
    mask=jnp.array(seen)[None, None] if masked else None,
    weights=KeyWeights(jnp.array(log, jnp.float32), jnp.array(scale, jnp.float32)),
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  with pytest.raises(InputError, match=r"decoder.attention: 'splash' does not support key weights"):
    attend(found, found, found, implementation="splash", weights=KeyWeights(jnp.zeros((2, 5))))


def test_updates_are_scaled():
  """A slot whose updates are multiplied by 0 does not change, and other slots see it unchanged."""
  method, params = build(name="baseline")
  rng = np.random.default_rng(1)
  inputs = jnp.array(rng.normal(size=(1, 4, TINY.d_model)), jnp.float32)

  def run(scale):
    arguments = dict(positions=jnp.arange(4)[None], update_scale=scale, method="run_layers")
    return method.decoder.apply({"params": params["decoder"]}, inputs, **arguments)[0]

  scaled = run(jnp.array([[1.0, 0.0, 1.0, 1.0]]))
  np.testing.assert_array_equal(scaled[0, 1], inputs[0, 1])
  np.testing.assert_array_equal(scaled[0, 0], run(None)[0, 0])
  assert np.abs(scaled[0, 2] - run(None)[0, 2]).max() > 1e-3


def test_cost_by_hand():
  method, _ = build(name="looped", pauses=2)
  plain, _ = build(name="baseline")
  looped, once = method.costs(8).forward, plain.costs(8).forward
  assert (looped.matrices, looped.attention, looped.readout) == (3 * once.matrices, 3 * once.attention, once.readout)
  assert method.costs(8).train_slots == method.costs(8).forward_slots == 24


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.slow
def test_generation_runs_the_prefix_once(scan, exact):
  """The cache has the keys and values of every pass; the reference runs the complete prefix for every token."""
  method, params = build(dataclasses.replace(TINY, scan_layers=scan), name="looped", pauses=1)
  prompt, new = [5, 1, 7], 4
  generation = Sampler(method, SamplingOptions(mode="none", temperature=0.0)).generate(
    params, [prompt, [2]], max_new_tokens=new
  )
  for start, words in zip((prompt, [2]), generation.tokens):
    tokens = list(start)
    for _ in range(new):
      hidden = method.hidden(params, {"tokens": jnp.array([tokens + [0] * (8 - len(tokens))])})[0, len(tokens) - 1, 0]
      logits = method.decoder.apply({"params": params["decoder"]}, method="unembedding")[: method.vocab_size] @ hidden
      tokens.append(int(logits.argmax()))
    assert words == tokens[len(start) :]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_executed_agrees_with_xla(remat):
  sizes = dict(num_layers=1, d_model=256, num_heads=4, num_kv_heads=4, head_size=64, mlp_size=768, remat=remat)
  config = DecoderConfig(vocab_size=512, **sizes)
  method = methods.build(configure(name="looped", pauses=2), config, chunk_size=2**20)
  params = nn.unbox(jax.eval_shape(method.init, jax.random.key(0)))
  rows, weights = jax.ShapeDtypeStruct((2, 16), jnp.int32), jax.ShapeDtypeStruct((2, 16), jnp.float32)

  def loss(params, batch):
    return method.loss(params, batch, jax.random.key(0)).weighted_sum(batch["weights"])

  lowered = jax.jit(jax.grad(loss)).lower(params, {"tokens": rows, "targets": rows, "weights": weights})
  counted = lowered.compile().cost_analysis()["flops"] / (2 * 16)
  assert method.costs(16).train_executed.total == pytest.approx(counted, rel=0.03)
