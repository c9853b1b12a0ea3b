"""Sliding windows, soft caps and scales of attention, in every implementation, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cyb_jax.decoder import attention, blocked_attention, splash
from cyb_jax.errors import InputError
from cyb_jax.pauses import attention_mask

pytestmark = pytest.mark.usefixtures("exact")


def reference(query, key, value, seen, scale, soft_cap):
  """Attention in float64, head by head; seen: bool[S, S]."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  out = np.zeros_like(query)
  for n in range(query.shape[2]):
    g = n // (query.shape[2] // key.shape[2])
    scores = query[:, :, n] @ key[:, :, g].swapaxes(1, 2) * scale
    if soft_cap is not None:
      scores = soft_cap * np.tanh(scores / soft_cap)
    shares = np.exp(np.where(seen, scores, -np.inf))
    out[:, :, n] = shares / shares.sum(-1, keepdims=True) @ value[:, :, g]
  return out


def arrays(length, heads, groups, size=8, rows=2):
  rng = np.random.default_rng(length)
  query, weight = jnp.asarray(rng.normal(size=(2, rows, length, heads, size)), jnp.float32)
  key, value = jnp.asarray(rng.normal(size=(2, rows, length, groups, size)), jnp.float32)
  return (2 * query, key, value), weight


def positions_of(tokens, width):
  return jnp.repeat(jnp.arange(tokens), width)[None]


def with_gradients(args, weight, **options):
  def weighted(*args):
    out = attention.attend(*args, **options)
    return (out * weight).sum(), out

  (_, out), gradients = jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))(*args)
  return out, *gradients


def test_a_window_by_hand():
  """Two tokens with a pause each and a window of one position: the diagram of `attention.Window`."""
  positions = jnp.array([[0, 0, 1, 1]])
  window = attention.Window(1, positions, positions)
  seen = window.seen()[0, 0] & np.tril(np.ones((4, 4), bool))
  assert seen.astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


_LONG_WINDOW = (9, 2, True, 100, None, 3.0)
_CASES = [
  (9, 1, False, 4, None, None), _LONG_WINDOW, (6, 3, False, 1, None, None),
  # Several blocks.
  (24, 2, False, 5, 0.2, 1.5), (24, 3, True, 5, 0.2, 1.5),
]  # fmt: skip


@pytest.mark.parametrize(
  ("implementation", "case"),
  [*((name, case) for name in ("xla", "blocks") for case in _CASES), ("splash", _LONG_WINDOW)],
)
def test_every_implementation(monkeypatch, implementation, case):
  monkeypatch.setattr(blocked_attention, "_BLOCK_QUERIES", 24)
  _compare(implementation, *case)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("tokens", "width", "hidden", "size", "soft_cap"),
  [(200, 2, False, 30, 1.5), (300, 1, False, 100, None), (150, 3, True, 40, 1.5), (130, 4, True, 1, None)],
)
def test_splash_over_several_blocks(monkeypatch, tokens, width, hidden, size, soft_cap):
  monkeypatch.setattr(splash, "_SMALL", 128)
  monkeypatch.setattr(splash, "_LARGE", 128)
  _compare("splash", tokens, width, hidden, size, None, soft_cap)


def _compare(implementation, tokens, width, hidden, size, scale, soft_cap):
  length = tokens * width
  args, weight = arrays(length, 4, 2)
  token = np.arange(length) // width
  seen = np.tril(np.ones((length, length), bool)) & (token[:, None] - token < size)
  if hidden:
    seen &= np.asarray(attention_mask(tokens, width, visibility="hidden"))[0, 0]
  positions = positions_of(tokens, width)
  options = dict(scale=scale, soft_cap=soft_cap)
  got = with_gradients(
    args,
    weight,
    mask=attention.HiddenSlots(width) if hidden else None,
    window=attention.Window(size, positions, positions, width),
    implementation=implementation,
    interpret=implementation == "splash",
    **options,
  )
  expected = reference(*args, seen, 8**-0.5 if scale is None else scale, soft_cap)
  np.testing.assert_allclose(got[0], expected, rtol=1e-5, atol=1e-5)
  # Gradients against those of a dense mask and plain operations.
  dense = with_gradients(args, weight, mask=jnp.asarray(seen)[None, None], implementation="xla", **options)
  for mine, wanted in zip(got, dense, strict=True):
    np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("implementation", ["xla", "blocks"])
def test_documents_and_a_window(implementation):
  args, weight = arrays(20, 2, 1)
  segments = np.repeat(np.arange(4), 5)[None].repeat(2, 0)
  order = np.arange(20)
  seen = (order[:, None] >= order) & (order[:, None] - order < 3) & (segments[0][:, None] == segments[0])
  positions = positions_of(20, 1)
  got = with_gradients(
    args,
    weight,
    mask=attention.SegmentMask(jnp.asarray(segments)),
    window=attention.Window(3, positions, positions, 1),
    implementation=implementation,
  )
  np.testing.assert_allclose(got[0], reference(*args, seen, 8**-0.5, None), rtol=1e-5, atol=1e-5)


def test_key_weights_with_a_cap_and_a_window():
  (query, key, value), _ = arrays(6, 2, 1)
  rng = np.random.default_rng(1)
  log, factor = (jnp.asarray(rng.normal(size=(2, 6)), jnp.float32) for _ in range(2))
  order = np.arange(6)
  seen = (order[:, None] >= order) & (order[:, None] - order < 3)
  scores = np.einsum("bsnh,bcgh->bnsc", query, key) * 8**-0.5
  shares = np.exp(np.where(seen, 1.5 * np.tanh(scores / 1.5) + np.asarray(log)[:, None, None], -np.inf))
  shares /= shares.sum(-1, keepdims=True)
  expected = np.einsum("bnsc,bch->bsnh", shares, value[:, :, 0] * factor[..., None])
  positions = positions_of(6, 1)
  out = attention.attend(
    query,
    key,
    value,
    weights=attention.KeyWeights(log, factor),
    window=attention.Window(3, positions, positions, 1),
    soft_cap=1.5,
  )
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_kernels_skip_the_keys_before_the_window():
  x = jnp.zeros((1, 1024, 1, 8))
  positions = positions_of(1024, 1)
  run = functools.partial(attention.attend, implementation="blocks")
  windowed = functools.partial(run, window=attention.Window(32, positions, positions, 1))

  def flops(attend):
    return jax.jit(lambda x: attend(x, x, x)).lower(x).compile().cost_analysis()["flops"]

  # Blocks of 64 queries read 95 keys instead of 544 on average.
  assert flops(windowed) < flops(run) / 4


@pytest.mark.parametrize(
  ("implementation", "mask", "num_slots"),
  [("blocks", None, None), ("splash", None, None), ("blocks", attention.HiddenSlots(2), 1)],
)
def test_kernels_need_equal_tokens(implementation, mask, num_slots):
  x = jnp.zeros((1, 256, 1, 8))
  positions = jnp.arange(256)[None]
  window = attention.Window(4, positions, positions, num_slots)
  with pytest.raises(
    InputError, match=rf"'{implementation}' supports decoder\.window only if all slots of a token have its position"
  ):
    attention.attend(x, x, x, mask=mask, window=window, implementation=implementation, interpret=True)
  choose = functools.partial(attention.choose_implementation, x, x, mask=mask, implementation="auto", interpret=False)
  assert choose(window=window) == "xla"
  assert choose(window=attention.Window(4, positions, positions, 2)) == "blocks"


@pytest.mark.parametrize(
  ("num_slots", "soft_cap", "chosen"), [(1, None, "cudnn"), (2, None, "xla"), (1, 5.0, "xla"), (None, None, "xla")]
)
def test_cudnn_takes_windows_of_single_slots(monkeypatch, num_slots, soft_cap, chosen):
  monkeypatch.setattr(attention, "_cudnn_objection", lambda *args: None)
  monkeypatch.setattr(attention, "target_platform", lambda: "gpu")
  seen = {}
  monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, **kwargs: seen.update(kwargs))
  x = jnp.zeros((1, 4, 1, 8), jnp.bfloat16)
  window = attention.Window(3, positions_of(4, 1), positions_of(4, 1), num_slots)
  options = dict(mask=None, window=window, soft_cap=soft_cap)
  assert attention.choose_implementation(x, x, implementation="auto", interpret=False, **options) == chosen
  attention.attend(x, x, x, **options)
  if chosen == "cudnn":
    assert (seen["local_window_size"], seen["mask"], seen["is_causal"]) == ((2, 0), None, True)
  elif soft_cap is None:
    assert seen["mask"].shape == (1, 1, 4, 4)
  if soft_cap is not None:
    with pytest.raises(InputError, match="'cudnn' does not support attention_soft_cap"):
      attention.attend(x, x, x, implementation="cudnn", **options)
