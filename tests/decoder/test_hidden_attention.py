"""Hidden slots as heads of causal attention, against float64: values, gradients, extreme scores, and 16 bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cyb_jax.decoder import attention, hidden_attention
from cyb_jax.errors import InputError
from cyb_jax.pauses import attention_mask

pytestmark = pytest.mark.usefixtures("exact")


def causal(query, key, value):
  return jax.nn.dot_product_attention(query, key, value, scale=1.0, is_causal=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(num_slots, scale, arrays, weight):
  """The output, and the gradients of its weighted sum by query, key and value, in float32."""

  def weighted(*args):
    out = hidden_attention.attend(*args, num_slots, causal, scale=scale)
    return (out.astype(jnp.float32) * weight).sum(), out

  (_, out), gradients = jax.value_and_grad(weighted, (0, 1, 2), has_aux=True)(*arrays)
  return [x.astype(jnp.float32) for x in (out, *gradients)]


def reference(num_slots, scale, arrays, weight):
  """`run` in float64, head by head, with the formulas of the softmax's derivative."""
  query, key, value, weight = (np.asarray(jnp.asarray(x, jnp.float32), np.float64) for x in (*arrays, weight))
  seen = np.tril(np.ones((query.shape[1],) * 2, bool))
  if num_slots > 1:
    seen = np.asarray(attention_mask(query.shape[1] // num_slots, num_slots, visibility="hidden"))[0, 0]
  shared = query.shape[2] // key.shape[2]
  out, d_query, d_key, d_value = (np.zeros_like(x) for x in (query, query, key, value))
  for n in range(query.shape[2]):
    q, k, v, d = query[:, :, n], key[:, :, n // shared], value[:, :, n // shared], weight[:, :, n]
    scores = np.where(seen, scale * q @ k.swapaxes(1, 2), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out[:, :, n] = p @ v
    d_scores = p * (d @ v.swapaxes(1, 2) - (d * out[:, :, n]).sum(-1, keepdims=True))
    d_query[:, :, n] = scale * d_scores @ k
    d_key[:, :, n // shared] += scale * d_scores.swapaxes(1, 2) @ q
    d_value[:, :, n // shared] += p.swapaxes(1, 2) @ d
  return out, d_query, d_key, d_value


def problem(seed, tokens, num_slots, heads, groups, size, dtype="float32", spread=2.0):
  rng = np.random.default_rng(seed)
  query, weight = rng.normal(size=(2, 2, tokens * num_slots, heads, size))
  key, value = rng.normal(size=(2, 2, tokens * num_slots, groups, size))
  return tuple(jnp.asarray(x, dtype) for x in (spread * query, key, value)), weight.astype(np.float32)


@pytest.mark.parametrize(
  ("tokens", "num_slots", "heads", "groups", "size"),
  [(7, 4, 4, 2, 16), (1, 3, 1, 1, 8), (9, 2, 2, 2, 5), (5, 1, 3, 1, 8), (3, 8, 6, 3, 12)],
)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_output_and_gradients(tokens, num_slots, heads, groups, size, scale):
  arrays, weight = problem(tokens, tokens, num_slots, heads, groups, size)
  got = run(num_slots, scale, arrays, weight)
  for mine, expected in zip(got, reference(num_slots, scale or size**-0.5, arrays, weight), strict=True):
    np.testing.assert_allclose(mine, expected, rtol=2e-5, atol=2e-5)


def test_by_hand():
  """Two tokens of two slots, H = 1, scale 1: the last slot sees the first slots of both, and itself."""
  query = jnp.zeros((1, 4, 1, 1)).at[0, 3].set(1.0)
  key = jnp.log(jnp.array([2.0, 50.0, 3.0, 5.0]))[None, :, None, None]
  value = jnp.array([10.0, 1000.0, 20.0, 30.0])[None, :, None, None]
  out = hidden_attention.attend(query, key, value, 2, causal, scale=1.0)[0, :, 0, 0]
  # Slots 0 to 2 weigh all keys alike: 10; 10 and 1000; 10 and 20. The last weighs 10, 20 and 30 by 2, 3 and 5.
  np.testing.assert_allclose(out, [10.0, 505.0, 15.0, 23.0], rtol=1e-6)


@pytest.mark.parametrize("size", [16, 64])
def test_bfloat16_is_as_exact_as_one_softmax(size):
  arrays, weight = problem(size, 20, 4, 4, 2, size, "bfloat16", spread=4.0)
  expected = reference(4, size**-0.5, arrays, weight)

  def by_xla(*args):
    out = attention.attend(*args, mask=attention.HiddenSlots(4), implementation="xla")
    return (out.astype(jnp.float32) * weight).sum(), out

  (_, out), gradients = jax.jit(jax.value_and_grad(by_xla, (0, 1, 2), has_aux=True))(*arrays)
  for mine, xla, exact in zip(run(4, None, arrays, weight), (out, *gradients), expected, strict=True):
    error, its_error = (np.sqrt(np.mean((np.asarray(x, np.float64) - exact) ** 2)) for x in (mine, xla))
    assert error < 2 * its_error
    assert error < 0.01 * np.abs(exact).max()


def test_the_near_keys_score_is_exact_in_16_bits():
  """A near score of about 300, of which bfloat16 keeps steps of 2: the far keys' weight would be off by up to e."""
  num_slots, size = 2, 8
  query = np.zeros((1, 4, 1, size), np.float32)
  key, value = (np.zeros((1, 4, 1, size), np.float32) for _ in range(2))
  query[0, :, 0, 0] = 16.0
  key[0, :, 0, 0] = [18.75, 18.75, 18.75, 18.625]  # exact in bfloat16; the scores are 300, 300, 300, 298
  value[0, :, 0, 0] = [1.0, 0.0, 0.0, 0.0]
  arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in (query, key, value))
  got = run(num_slots, 1.0, arrays, np.ones_like(query))[0]
  expected = reference(num_slots, 1.0, arrays, np.ones_like(query))[0]
  assert expected[0, 3, 0, 0] == pytest.approx(1 / (2 + np.exp(-2)))
  np.testing.assert_allclose(got[0, :, 0, 0], expected[0, :, 0, 0], rtol=0.01)


@pytest.mark.parametrize("spread", [0.0, 300.0, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extreme_scores(spread, dtype):
  arrays, weight = problem(3, 6, 3, 2, 1, 8, dtype, spread)
  got, expected = run(3, None, arrays, weight), reference(3, 8**-0.5, arrays, weight)
  assert all(np.isfinite(x).all() for x in got)
  if dtype == "float32":
    # Scores of 1e4 have an error of 1e-3 in float32.
    np.testing.assert_allclose(got[0], expected[0], rtol=2e-2, atol=2e-2 * spread / 1e4 + 1e-6)


def test_far_keys_that_outweigh_the_near_ones_and_the_reverse():
  """Scores of +-1e4: one part has no weight at all, and no gradient is lost or invented."""
  query = jnp.ones((1, 6, 1, 8))
  value = jnp.arange(6.0)[None, :, None, None] * jnp.ones((1, 6, 1, 8))
  for sign, expected in ((1.0, [0, 0, 0, 0, 0, 0]), (-1.0, [0, 1, 2, 3, 4, 5])):
    # Two tokens of three slots. The first slot of all has the largest score, or each slot has the largest so far.
    key = (-sign * 1e4 * jnp.arange(6.0))[None, :, None, None] * jnp.ones((1, 6, 1, 8)) / 8
    out, *gradients = run(3, 1.0, (query, key, value), np.ones((1, 6, 1, 8), np.float32))
    np.testing.assert_allclose(out[0, :, 0, 0], expected)
    np.testing.assert_allclose(gradients[0], 0, atol=1e-6)
    assert all(np.isfinite(x).all() for x in gradients)


def test_by_cudnn_where_it_runs(monkeypatch):
  """The call that cuDNN gets: causal, without a mask or a bias, as many keys as queries, head sizes it supports."""
  calls, plain = [], jax.nn.dot_product_attention

  def recorded(query, key, value, *, scale, is_causal, implementation):
    calls.append((query.shape, key.shape, value.shape, query.dtype.name, implementation))
    return plain(query, key, value, scale=scale, is_causal=is_causal)

  monkeypatch.setattr(attention, "_cudnn_objection", lambda *args: None)
  monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
  arrays, _ = problem(1, 5, 3, 4, 2, 16, "bfloat16")
  got = attention.attend(*arrays, mask=attention.HiddenSlots(3), implementation="cudnn")
  assert calls == [((2, 5, 12, 24), (2, 5, 2, 24), (2, 5, 2, 24), "bfloat16", "cudnn")]
  expected = attention.attend(*arrays, mask=attention.HiddenSlots(3), implementation="xla")
  np.testing.assert_allclose(got.astype(jnp.float32), expected.astype(jnp.float32), atol=0.05)


@pytest.mark.parametrize(
  ("segments", "window", "soft_cap", "chosen"),
  [(False, None, None, "cudnn"), (True, None, None, "xla"), (False, 3, None, "xla"), (False, None, 5.0, "xla")],
)
def test_auto_on_a_gpu(monkeypatch, segments, window, soft_cap, chosen):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(attention, "_cudnn_objection", lambda *args: None)
  x = jnp.zeros((1, 8, 1, 16), jnp.bfloat16)
  mask = attention.HiddenSlots(2, jnp.zeros((1, 4), jnp.int32) if segments else None)
  positions = jnp.arange(8)[None] // 2
  options = {"mask": mask, "soft_cap": soft_cap, "interpret": False}
  options["window"] = None if window is None else attention.Window(window, positions, positions, 2)
  assert attention.choose_implementation(x, x, implementation="auto", **options) == chosen
  if chosen != "cudnn":
    with pytest.raises(
      InputError, match=r"'cudnn' (supports hidden slots only without document_mask|does not support)"
    ):
      attention.choose_implementation(x, x, implementation="cudnn", **options)


@pytest.mark.parametrize(("head_size", "fits"), [(252, True), (253, False), (60, True)])
def test_head_sizes_of_cudnn(monkeypatch, head_size, fits):
  class Device:
    compute_capability = "9.0"

  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
  x = jax.ShapeDtypeStruct((1, 8, 1, head_size), jnp.bfloat16)
  choose = functools.partial(
    attention.choose_implementation, x, x, mask=attention.HiddenSlots(2), implementation="cudnn", interpret=False
  )
  if fits:
    assert choose() == "cudnn"
  else:
    with pytest.raises(InputError, match="needs a head size of at most 252 here for hidden slots, not 253"):
      choose()
