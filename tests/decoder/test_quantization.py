"""Quantised matrices against the definitions, and decoders that have them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY
from scipy import stats

from cyb_jax.decoder import Decoder, LoraConfig, init_params, merge_lora, quantization
from cyb_jax.errors import InputError


def kernel(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_int8_by_hand():
  stored, scale = quantization.quantize("int8", np.array([[1.27, 0.0], [-0.64, 0.0]], np.float32), 1)
  np.testing.assert_allclose(scale, [0.01, 1.0], rtol=1e-6)
  assert stored.tolist() == [[127, 0], [-64, 0]]


def test_nf4_by_hand():
  # Two blocks of two inputs: 6 is twice an odd number. The levels 1 and -1 are exact, and 0 is.
  stored, scale = quantization.quantize("nf4", np.array([[2.0], [-2.0], [0.0], [0.5], [3.0], [1.02]], np.float32), 1)
  assert scale[:, 0].tolist() == [2.0, 0.5, 3.0]
  assert stored[:, 0].tolist() == [15 | 0 << 4, 7 | 15 << 4, 15 | 11 << 4]  # 1.02 / 3 is nearest to the level 0.338
  back = quantization.dequantize(jnp.asarray(stored), jnp.asarray(scale), (6,))
  np.testing.assert_allclose(back[:, 0], [2, -2, 0, 0.5, 3, 3 * 0.33791524171829224], rtol=1e-6)


def test_the_levels_are_quantiles():
  """Appendix E of QLoRA: the quantiles of a normal distribution for 8 negative and 9 positive levels, scaled to 1."""
  offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
  positive = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
  negative = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
  levels = np.sort(np.concatenate([positive, [0], negative]))
  np.testing.assert_allclose(quantization._LEVELS, levels / levels.max(), atol=1e-6)


@pytest.mark.parametrize(
  ("scheme", "shape", "num_inputs", "error"),
  [
    ("int8", (24, 4, 6), 1, 0.007), ("int8", (4, 6, 24), 2, 0.007), ("nf4", (128, 5), 1, 0.1),
    ("nf4", (4, 32, 24), 2, 0.1), ("nf4", (24, 3), 1, 0.1),
  ],
)  # fmt: skip
def test_matrices_are_restored_closely(scheme, shape, num_inputs, error):
  """The relative errors: 1/127 of the largest weight, uniform; and those of 16 levels."""
  original = kernel(*shape)
  stored, scale = quantization.quantize(scheme, original, num_inputs)
  inputs, outputs = shape[:num_inputs], shape[num_inputs:]
  assert (stored.shape, scale.shape) == quantization.shapes(scheme, inputs, outputs)
  assert stored.dtype == quantization.storage_dtype(scheme)
  back = quantization.dequantize(jnp.asarray(stored), jnp.asarray(scale), inputs)
  assert back.shape == shape
  assert 0.2 * error < np.sqrt(np.mean((back - original) ** 2)) < error
  # What is restored is stored exactly.
  again, _ = quantization.quantize(scheme, np.asarray(back), num_inputs)
  np.testing.assert_array_equal(again, stored)
  x = kernel(3, *inputs, seed=1)
  expected = np.tensordot(x, np.asarray(back), num_inputs)
  got = quantization.project(jnp.asarray(x), jnp.asarray(stored), jnp.asarray(scale), inputs)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_nf4_needs_an_even_number_of_inputs():
  with pytest.raises(InputError, match=r"precision\.params: 'nf4', but a matrix has 5 inputs, which must be even"):
    quantization.shapes("nf4", (5,), (3,))


def drawn(config):
  """Parameters drawn by NumPy, because compiling the initialisation takes longer than the test."""
  shapes = nn.unbox(jax.eval_shape(lambda: init_params(Decoder(config), jax.random.key(0))))
  rng = np.random.default_rng(0)

  def draw(path, x):
    name = path[-1].key
    if name == "kernel":
      values = rng.integers(-127 if config.param_dtype == "int8" else 0, 128, x.shape)
    else:
      values = {"kernel_scale": 0.003, "scale": 1.0}.get(name) or 0.3 * rng.normal(size=x.shape)
    return jnp.broadcast_to(jnp.asarray(values, x.dtype), x.shape)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize(("scheme", "scan_layers"), [("int8", False), ("nf4", True)])
def test_a_decoder_equals_its_expanded_one(scheme, scan_layers, exact):
  """With adapters too."""
  lora = LoraConfig(rank=2, targets=("query", "out", "down"))
  config = dataclasses.replace(TINY, param_dtype=scheme, scan_layers=scan_layers, lora=lora)
  params = drawn(config)
  names = {path[-1].key: x.dtype for path, x in jax.tree_util.tree_leaves_with_path(params)}
  assert names["kernel"] == quantization.storage_dtype(scheme)
  assert (names["kernel_scale"], names["embedding"], names["lora_a"]) == (jnp.float32, jnp.bfloat16, jnp.float32)
  merged, plain = merge_lora(params, config)
  assert (plain.param_dtype, plain.lora) == ("float32", None)
  tokens = np.arange(6)[None]

  def states(config, params):
    decoder = Decoder(config)
    inputs = decoder.apply({"params": params}, tokens, method="embed").astype(jnp.float32)
    return decoder.apply({"params": params}, inputs, jnp.arange(6)[None])

  got = jax.jit(lambda params: states(config, params))(params)
  assert 0.1 < float(jnp.abs(got).mean()) < 10
  np.testing.assert_allclose(got, jax.jit(lambda params: states(plain, params))(merged), rtol=1e-4, atol=1e-4)
  # The same integers again, as for a run that starts from another run.
  back = quantization.quantize_decoder(scheme, merged, stacked=scan_layers)
  assert quantization.scheme_of(back) == scheme
  restored, _ = merge_lora(back, dataclasses.replace(config, lora=None))
  again = quantization.quantize_decoder(scheme, restored, stacked=scan_layers)
  jax.tree.map(
    np.testing.assert_array_equal, *(jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in (back, again))
  )


def test_bytes():
  """A decoder of 1B parameters in 4 bits: 0.53 bytes for each weight of a matrix, of which 0.06 are scales."""
  config = dataclasses.replace(TINY, d_model=64, mlp_size=128, head_size=32, param_dtype="nf4")
  params = nn.unbox(jax.eval_shape(lambda: init_params(Decoder(config), jax.random.key(0))))
  matrices = params["layers_0"]["mlp"]["up"]
  nbytes = sum(x.size * x.dtype.itemsize for x in (matrices["kernel"], matrices["kernel_scale"]))
  assert nbytes == 64 * 128 * (0.5 + 4 / 64)
