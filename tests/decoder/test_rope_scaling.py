"""Scaled RoPE against the papers' formulas, dimension by dimension in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from cyb_jax.decoder import DecoderConfig, rope_scaling
from cyb_jax.decoder.rope import rope_factors
from cyb_jax.errors import InputError

_SIZE, _BASE = 16, 10_000.0
_SIZES = dict(vocab_size=9, num_layers=1, d_model=4, num_heads=1, num_kv_heads=1, head_size=8, mlp_size=4)


def parsed(text):
  return rope_scaling.parse("decoder.rope_scaling", text)


def wavelengths(base=_BASE):
  return [2 * math.pi * base ** (2 * i / _SIZE) for i in range(_SIZE // 2)]


def llama3(length, factor, low, high, context):
  """Section 'Scaled RoPE' of Llama 3.1's reference code, one wavelength."""
  if length < context / high:
    return length
  if length > context / low:
    return length * factor
  smooth = (context / length - low) / (high - low)
  return 1 / ((1 - smooth) / (factor * length) + smooth / length)


def yarn(i, length, factor, fast, slow, context, whole):
  """Equations 17 to 19 of the YaRN paper, with the ramp over dimensions of its reference code."""
  ends = [_SIZE * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(_BASE)) for turns in (fast, slow)]
  low, high = (math.floor(ends[0]), math.ceil(ends[1])) if whole else ends
  low, high = max(low, 0), min(high, _SIZE - 1)
  ramp = min(max((i - low) / (high - low), 0), 1)
  return 1 / (ramp / (factor * length) + (1 - ramp) / length)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("linear:factor=4", lambda i, x: 4 * x),
    ("llama3:factor=8,context=128", lambda i, x: llama3(x, 8, 1, 4, 128)),
    ("llama3:factor=3,context=500,low=2,high=3", lambda i, x: llama3(x, 3, 2, 3, 500)),
    ("yarn:factor=4,context=500", lambda i, x: yarn(i, x, 4, 32, 1, 500, True)),
    ("yarn:factor=4,context=500,fast=20,slow=0.5,truncate=0", lambda i, x: yarn(i, x, 4, 20, 0.5, 500, False)),
    ("dynamic:factor=4,context=100", lambda i, x: x),
  ],
)
def test_wavelengths(text, expected):
  found = 2 * np.pi / parsed(text).frequencies(_SIZE, _BASE)
  wanted = [expected(i, x) for i, x in enumerate(wavelengths())]
  np.testing.assert_allclose(found, wanted, rtol=1e-12)
  if "dynamic" not in text:
    assert max(found / wavelengths()) > 2.9  # something is scaled, and with these numbers not everything alike
    assert "linear" in text or min(found / wavelengths()) < 1.1


@pytest.mark.parametrize("text", ["linear:factor=4", "llama3:factor=8,context=128", "yarn:factor=4,context=500"])
def test_factors(text):
  positions = np.array([[0, 7, 900]])
  cosine, sine = rope_factors(jnp.asarray(positions), _SIZE, _BASE, parsed(text))
  angles = positions[..., None] * parsed(text).frequencies(_SIZE, _BASE)
  amplitude = 0.1 * math.log(4) + 1 if "yarn" in text else 1.0
  np.testing.assert_allclose(cosine, amplitude * np.cos(angles), atol=2e-4)
  np.testing.assert_allclose(sine, amplitude * np.sin(angles), atol=2e-4)
  assert cosine.dtype == jnp.float32


def test_dynamic_grows_with_the_highest_position():
  scaling = parsed("dynamic:factor=4,context=100")
  plain = rope_factors(jnp.array([[0, 99]]), _SIZE, _BASE)
  np.testing.assert_allclose(rope_factors(jnp.array([[0, 99]]), _SIZE, _BASE, scaling), plain, atol=1e-5)
  # The base of bloc97's formula for 250 positions: factor * length / context - (factor - 1) = 7.
  base = _BASE * 7 ** (_SIZE / (_SIZE - 2))
  positions = jnp.array([[0, 99, 249]])
  expected = rope_factors(positions, _SIZE, base)
  np.testing.assert_allclose(rope_factors(positions, _SIZE, _BASE, scaling), expected, atol=1e-4)
  assert abs(rope_factors(positions, _SIZE, _BASE, scaling)[0][:, :2] - plain[0]).max() > 0.1


def test_one_scaling_has_one_spelling():
  spelled = DecoderConfig(**_SIZES, rope_scaling="llama3:low=1.0, factor=32.0,context=8192")
  assert spelled.rope_scaling == "llama3:context=8192,factor=32,high=4,low=1"
  assert spelled == DecoderConfig(**_SIZES, rope_scaling="llama3:factor=32,high=4,context=8192")
  assert DecoderConfig(**_SIZES).scaling is None


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("longrope:factor=2", r"'longrope' is not a kind of RoPE scaling; .*linear, dynamic, llama3"),
    ("linear", "'factor' is missing; 'linear' needs factor"),
    ("linear:factor=x", "factor = 'x' must be a number"),
    ("linear:factor=0.5", r"factor = 0\.5 must be at least 1"),
    ("linear:context=8", "'context' is no number of 'linear'"),
    ("linear:factor", "'factor' is not of the form key=value"),
    ("llama3:factor=8,context=-1", "context = '-1' must be positive"),
    ("llama3:factor=8,context=8,low=4", "high = 4 must be above low = 4"),
    ("yarn:factor=8,context=8,fast=1,slow=2", "fast = 1 must be at least slow = 2"),
    ("yarn:factor=8,context=8,truncate=2", "truncate = 2 must be 1 or 0"),
    ("yarn:factor=8,context=8,attention=-1", "attention = -1 must be positive"),
  ],
)
def test_bad_scalings_are_refused(text, message):
  with pytest.raises(InputError, match=rf"^decoder\.rope_scaling: {message}"):
    DecoderConfig(**_SIZES, rope_scaling=text)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(rope_scaling="linear:factor=2"), r"rope_scaling: .* must be '', because decoder\.learned_positions = 4"),
    (dict(window=5), r"window: 5 must be at most decoder\.learned_positions = 4"),
    (dict(global_every=2, global_rope=False), "global_rope: False must be True, because decoder.learned_positions"),
  ],
)
def test_learned_positions_replace_rope(fields, message):
  with pytest.raises(InputError, match=message):
    DecoderConfig(**_SIZES, learned_positions=4, **fields)


def test_dynamic_needs_four_rotated_elements():
  with pytest.raises(InputError, match="must be another kind, because RoPE rotates 2 elements"):
    DecoderConfig(**_SIZES, rope_fraction=0.25, rope_scaling="dynamic:factor=2,context=8")
