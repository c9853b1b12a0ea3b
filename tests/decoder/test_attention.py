import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from cyb_jax.decoder import attention, blocked_attention
from cyb_jax.decoder.rope import apply_rope, rope_factors
from cyb_jax.errors import InputError
from cyb_jax.pauses import attention_mask

# One compilation instead of one per operation.
_attend = jax.jit(attention.attend)


def test_rope_factors_by_hand():
  # R = 4, base 100: angles p * 1 and p * 100^(-1/2) = p / 10.
  cosine, sine = rope_factors(jnp.array([[0, 3]]), 4, 100.0)
  np.testing.assert_allclose(cosine, [[[1, 1], [np.cos(3.0), np.cos(0.3)]]], rtol=1e-6)
  np.testing.assert_allclose(sine, [[[0, 0], [np.sin(3.0), np.sin(0.3)]]], rtol=1e-6)


def test_apply_rope_by_hand():
  # A quarter turn takes (x0, x2) to (-x2, x0); an angle of 0 leaves (x1, x3); x4 is not rotated at all.
  heads = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])[None, None, None]
  cosine, sine = jnp.array([[[0.0, 1.0]]]), jnp.array([[[1.0, 0.0]]])
  assert apply_rope(heads, cosine, sine)[0, 0, 0].tolist() == [-3.0, 2.0, 1.0, 4.0, 5.0]


def test_rotated_products_depend_only_on_the_distance():
  query, key = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)), jnp.float32)

  @jax.jit
  def product(query_position, key_position):
    rotated = [
      apply_rope(x, *rope_factors(jnp.reshape(position, (1, 1)), 8, 1e4))
      for x, position in ((query, query_position), (key, key_position))
    ]
    return (rotated[0] * rotated[1]).sum()

  np.testing.assert_allclose(product(7, 4), product(103, 100), rtol=1e-4)
  assert abs(product(7, 4) - product(7, 5)) > 1e-2


def test_rope_distinguishes_large_positions_in_bfloat16():
  heads = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
  rotated = apply_rope(heads, *rope_factors(jnp.array([[2048, 2049]]), 4, 1e4))
  assert rotated.dtype == jnp.bfloat16
  expected = [np.cos(2049.0) - np.sin(2049.0), np.cos(20.49) - np.sin(20.49)]
  np.testing.assert_allclose(rotated[0, 1, 0, :2].astype(jnp.float32), expected, atol=1e-2)


def test_attend_by_hand_and_grouped():
  # Two query heads on one kv head; H = 1. Slot 1 of head 0 weighs by softmax(log 3 * (1, 0)) = (3/4, 1/4).
  query = jnp.array([[[[1.0], [1.0]], [[np.log(3.0)], [0.0]]]])  # [1, 2, 2, 1]
  key = jnp.array([[[[1.0]], [[0.0]]]])
  value = jnp.array([[[[4.0]], [[8.0]]]])
  np.testing.assert_allclose(_attend(query, key, value)[0, :, :, 0], [[4, 4], [5, 6]], rtol=1e-6)


def test_groups_are_neighbours():
  # Heads 0 and 1 read kv head 0, heads 2 and 3 kv head 1.
  query = jnp.ones((1, 1, 4, 2))
  value = jnp.array([10.0, 20.0])[None, None, :, None] * jnp.ones((1, 1, 2, 2))
  assert _attend(query, value, value)[0, 0, :, 0].tolist() == [10, 10, 20, 20]


def test_a_boolean_mask_replaces_the_causal_mask():
  query, key, value = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 3, 2, 4)), jnp.float32)
  causal = np.tril(np.ones((3, 3), bool))[None, None]
  np.testing.assert_allclose(_attend(query, key, value, mask=causal), _attend(query, key, value), rtol=1e-6)
  mask = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 1]], bool)[None, None]
  out = _attend(query, key, value, mask=mask)
  np.testing.assert_allclose(out[:, 1], value[:, 1], rtol=1e-6)
  changed = _attend(query, key, value.at[:, 1].set(100.0), mask=mask)
  np.testing.assert_array_equal(out[:, 2], changed[:, 2])
  # Causality is not added to a mask: a mask that is not causal is used unchanged.
  seeing = _attend(query, key, value, mask=np.ones((1, 1, 3, 3), bool))
  assert abs(seeing[:, 0] - value[:, 0]).max() > 0.1


@pytest.mark.parametrize("implementation", ["xla", "blocks"])
@pytest.mark.parametrize(
  ("tokens", "width", "heads", "groups", "with_segment_ids"),
  [
    (5, 4, 2, 2, False), (7, 3, 6, 2, True), (1, 2, 1, 1, False), (4, 1, 2, 1, True), (33, 2, 3, 1, True),
    (70, 3, 4, 2, False),
  ],
)  # fmt: skip
def test_hidden_slots_are_the_dense_mask(implementation, tokens, width, heads, groups, with_segment_ids, exact):
  rng = np.random.default_rng(tokens)
  shape = (2, tokens * width)
  query, weight = jnp.asarray(rng.normal(size=(2, *shape, heads, 8)), jnp.float32)
  key, value = jnp.asarray(rng.normal(size=(2, *shape, groups, 8)), jnp.float32)
  segment_ids = jnp.asarray(np.cumsum(rng.random((2, tokens)) < 0.3, -1), jnp.int32) if with_segment_ids else None
  dense = attention_mask(tokens, width, visibility="hidden", segment_ids=segment_ids)

  structured = attention.HiddenSlots(width, segment_ids)
  arrays = (2 * query, key, value)
  expected = _with_gradients(arrays, weight, mask=dense, implementation="xla")
  for got, wanted in zip(_with_gradients(arrays, weight, mask=structured, implementation=implementation), expected):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def _with_gradients(arrays, weight, **options):
  """The output of attention, and the gradients of its weighted sum by query, key and value."""

  def weighted(*args):
    out = attention.attend(*args, **options)
    return (out * weight).sum(), out

  (_, out), gradients = jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))(*arrays)
  return out, *gradients


# 64 queries are a block: one, several with a shorter last one, and fewer that are longer.
@pytest.mark.parametrize(
  ("length", "heads", "groups", "most", "with_segment_ids"),
  [(64, 1, 1, 16, False), (150, 4, 2, 16, True), (200, 2, 1, 2, False)],
)
def test_blocks_are_causal_attention(monkeypatch, length, heads, groups, most, with_segment_ids, exact):
  monkeypatch.setattr(blocked_attention, "_MOST_BLOCKS", most)
  rng = np.random.default_rng(length)
  query, weight = rng.normal(size=(2, 2, length, heads, 8)).astype(np.float32)
  key, value = rng.normal(size=(2, 2, length, groups, 8)).astype(np.float32)
  mask, seen = None, np.tril(np.ones((1, length, length), bool))
  if with_segment_ids:
    segment_ids = np.cumsum(rng.random((2, length)) < 0.05, -1)
    mask, seen = (
      attention.SegmentMask(jnp.asarray(segment_ids)),
      seen & (segment_ids[:, None] == segment_ids[..., None]),
    )
  arrays = (query, key, value)
  got = _with_gradients(arrays, weight, mask=mask, implementation="blocks")
  # In float64, head by head.
  for n in range(heads):
    k, v = (x[:, :, n // (heads // groups)].astype(np.float64) for x in (key, value))
    scores = np.where(seen, query[:, :, n] @ k.swapaxes(1, 2) / np.sqrt(8), -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    np.testing.assert_allclose(got[0][:, :, n], shares @ v, rtol=1e-5, atol=1e-5)
  for mine, wanted in zip(got, _with_gradients(arrays, weight, mask=mask, implementation="xla")):
    np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=2e-5)


def test_blocks_keep_less_than_the_attention_weights():
  x = jnp.zeros((2, 1024, 2, 8))

  def temporaries(implementation):
    summed = jax.grad(lambda x: attention.attend(x, x, x, implementation=implementation).sum())
    return jax.jit(summed).lower(x).compile().memory_analysis().temp_size_in_bytes

  assert temporaries("blocks") < temporaries("xla") / 4


def test_blocks_take_structured_masks_only():
  x = jnp.zeros((1, 4, 1, 8))
  with pytest.raises(InputError, match=r"decoder\.attention: 'blocks' supports no boolean mask"):
    attention.attend(x, x, x, mask=jnp.ones((1, 1, 4, 4), bool), implementation="blocks")
  with pytest.raises(InputError, match=r"'blocks' needs as many keys as queries, not 4 and 1; use 'auto' or 'xla'"):
    attention.attend(x[:, :1], x, x, implementation="blocks")


@pytest.mark.parametrize("implementation", ["xla", "blocks"])
def test_hidden_slots_stay_finite_and_keep_the_dtype(implementation):
  # Scores of a thousand: exp of them, or of their difference to a slot that isn't seen, would overflow.
  query = jnp.full((1, 6, 1, 4), 40.0, jnp.bfloat16).at[:, 2].set(-40.0)

  def summed(query):
    out = attention.attend(query, query, query, mask=attention.HiddenSlots(3), implementation=implementation)
    return out.astype(jnp.float32).sum(), out

  (_, out), gradient = jax.jit(jax.value_and_grad(summed, has_aux=True))(query)
  assert out.dtype == jnp.bfloat16
  assert np.isfinite(out.astype(jnp.float32)).all()
  assert np.isfinite(gradient.astype(jnp.float32)).all()


class _Device:
  def __init__(self, capability):
    self.compute_capability = capability


@pytest.mark.parametrize(
  ("backend", "capability", "dtype", "head_size", "masked", "chosen"),
  [
    ("cpu", "9.0", "bfloat16", 64, False, "xla"),
    ("gpu", "9.0", "bfloat16", 64, False, "cudnn"),
    ("gpu", "9.0", "bfloat16", 64, True, "xla"),
    ("gpu", "9.0", "float32", 64, False, "xla"),
    ("gpu", "9.0", "bfloat16", 256, False, "cudnn"),
    ("gpu", "8.0", "bfloat16", 256, False, "xla"),
    ("gpu", "8.0", "bfloat16", 128, False, "cudnn"),
    ("gpu", "7.5", "bfloat16", 64, False, "xla"),
    ("gpu", "9.0", "bfloat16", 60, False, "xla"),
    ("gpu", "gfx90a", "bfloat16", 64, False, "xla"),
  ],
)
def test_auto_chooses(monkeypatch, backend, capability, dtype, head_size, masked, chosen):
  seen = {}
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "local_devices", lambda: [_Device(capability)])
  monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, **kwargs: seen.update(kwargs))
  x = np.zeros((1, 2, 1, head_size), dtype)
  attention.attend(x, x, x, mask=np.ones((1, 1, 2, 2), bool) if masked else None)
  assert seen["implementation"] == chosen
  assert seen["is_causal"] is not masked


@pytest.mark.parametrize(("length", "chosen"), [(127, "xla"), (128, "blocks")])
def test_a_cpu_computes_long_rows_in_blocks(length, chosen):
  x = np.zeros((1, length, 1, 8), np.float32)
  choose = attention.choose_implementation
  assert choose(x, x, mask=None, implementation="auto", interpret=False) == chosen
  assert choose(x, x, mask=attention.HiddenSlots(1), implementation="auto", interpret=False) == chosen
  assert choose(x, x, mask=np.ones((1, 1, length, length), bool), implementation="auto", interpret=False) == "xla"
  with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))):
    assert choose(x, x, mask=None, implementation="auto", interpret=False) == "xla"


def test_cudnn_where_it_cannot_run_is_refused(monkeypatch):
  x = jnp.zeros((1, 2, 1, 8), jnp.bfloat16)
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  with pytest.raises(InputError, match=r"decoder\.attention: 'cudnn' needs an NVIDIA GPU.*'cpu'"):
    attention.attend(x, x, x, implementation="cudnn")
  with pytest.raises(InputError, match=r"decoder\.attention: 'flash' is not one of auto, xla, blocks, cudnn"):
    attention.attend(x, x, x, implementation="flash")
