import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType
from models import TINY, assert_trees_close

from cyb_jax.decoder import Decoder, attention, init_params, splash
from cyb_jax.errors import InputError

pytestmark = pytest.mark.usefixtures("exact")


def arrays(seed, batch, length, heads, groups, size):
  """Queries, keys, values, and the weights of the outputs in the loss."""
  rng = np.random.default_rng(seed)
  query, weight = jnp.asarray(rng.normal(size=(2, batch, length, heads, size)), jnp.float32)
  key, value = jnp.asarray(rng.normal(size=(2, batch, length, groups, size)), jnp.float32)
  return (2 * query, key, value), weight


def run(args, weight, mask, implementation, **options):
  """Outputs, and gradients of query, key and value."""

  def weighted(*args):
    out = attention.attend(*args, mask=mask, implementation=implementation, **options)
    return (out * weight).sum(), out

  (_, out), gradients = jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))(*args)
  return out, *gradients


def assert_same(args, weight, mask):
  got = run(args, weight, mask, "splash", interpret=True)
  for mine, expected in zip(got, run(args, weight, mask, "xla"), strict=True):
    np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of 128, so that rows of a few hundred slots have several blocks."""
  monkeypatch.setattr(splash, "_SMALL", 128)
  monkeypatch.setattr(splash, "_LARGE", 128)


@pytest.mark.parametrize(
  ("length", "heads", "groups", "size"),
  [(300, 2, 1, 64), (1, 4, 2, 128)],
)
def test_causal(small_blocks, length, heads, groups, size):
  args, weight = arrays(0, 2, length, heads, groups, size)
  assert_same(args, weight, None)


@pytest.mark.parametrize("fused", [True, False])
def test_both_backward_passes(small_blocks, monkeypatch, fused):
  """One backward kernel for all gradients, and two beyond a number of blocks, both with documents."""
  monkeypatch.setattr(splash, "_MOST_COPIES", {False: 3 if fused else 2})
  made, options = splash.kernels.make_splash_mha, []
  monkeypatch.setattr(splash.kernels, "make_splash_mha", lambda *a, **k: options.append(k) or made(*a, **k))
  args, weight = arrays(2, 2, 300, 4, 2, 64)
  numbers = jnp.asarray(np.stack([np.arange(300) // 140, np.arange(300) // 290]), jnp.int32)
  assert_same(args, weight, attention.SegmentMask(numbers))
  assert [given["block_sizes"].use_fused_bwd_kernel for given in options] == [fused]
  assert splash.plan(300).backward_products == (5 if fused else 7)


def test_one_backward_kernel_by_hand():
  """Eight blocks of 1,024 keys; not with a window or hidden slots, whose kernels skip most blocks."""
  lengths = (1, 1024, 4096, 8192, 8193)
  for kind, products in (("TPU v5p", [5, 5, 5, 5, 7]), ("TPU v6 lite", [5, 5, 5, 7, 7])):
    assert [splash.plan(length, device_kind=kind).backward_products for length in lengths] == products
  assert splash.plan(1024, 4).backward_products == splash.plan(1024, window=128).backward_products == 7


@pytest.mark.parametrize(
  ("device_kind", "blocks"), [("TPU v5 lite", [512, 512, 512, 1024]), ("TPU v6 lite", [512, 512, 1024, 1024])]
)
def test_blocks_of_a_chip(device_kind, blocks):
  assert [splash.plan(n, device_kind=device_kind).block for n in (1024, 2048, 4096, 8192)] == blocks


def test_documents(small_blocks):
  args, weight = arrays(1, 3, 150, 2, 1, 16)
  # A row with one document; a row with one document per slot, where a slot sees only itself; and a row in which
  # segment ids occur again later.
  numbers = np.stack([np.zeros(150), np.arange(150), np.arange(150) // 40 % 2]).astype(np.int32)
  assert_same(args, weight, attention.SegmentMask(jnp.asarray(numbers)))


@pytest.mark.parametrize(
  ("tokens", "width", "heads", "groups", "with_segment_ids"),
  [
    (130, 2, 2, 1, True),  # two blocks of first slots
    (60, 5, 2, 2, False),  # some tokens have slots in two blocks
    (1, 3, 1, 1, True),
    pytest.param(5, 1, 2, 1, True, marks=pytest.mark.slow),
  ],
)
@pytest.mark.slow
def test_hidden_slots(small_blocks, tokens, width, heads, groups, with_segment_ids):
  args, weight = arrays(tokens, 2, tokens * width, heads, groups, 16)
  rng = np.random.default_rng(tokens)
  segment_ids = jnp.asarray(np.cumsum(rng.random((2, tokens)) < 0.1, -1), jnp.int32) if with_segment_ids else None
  assert_same(args, weight, attention.HiddenSlots(width, segment_ids))


def test_bfloat16_keeps_its_dtype_and_stays_finite():
  # Scores of a thousand, and rows that fill up the block.
  query = jnp.full((1, 6, 1, 4), 40.0, jnp.bfloat16).at[:, 2].set(-40.0)
  out, *gradients = run((query,) * 3, 1.0, attention.HiddenSlots(3), "splash", interpret=True)
  assert out.dtype == jnp.bfloat16
  assert all(np.isfinite(x.astype(jnp.float32)).all() for x in (out, *gradients))


@pytest.mark.parametrize(
  ("length", "num_slots", "keys"),
  [
    # One block; three blocks of 768 columns: 6 of the 9.
    (100, 1, 128 * 128 / 100),
    (2100, 1, 6 * 768**2 / 2100),
    # The paper's row: 36 of 64 blocks of 1,024.
    (8192, 1, 36 * 1024**2 / 8192),
    # Hidden: 16 rows of blocks of 512, four to each block of first slots (4 x (1 + 2 + 3 + 4)), and 16 on the diagonal.
    (8192, 4, 56 * 512**2 / 8192),
  ],
)
def test_keys_by_hand(length, num_slots, keys):
  assert splash.plan(length, num_slots).keys == pytest.approx(keys)


@pytest.mark.parametrize(("tokens", "num_slots"), [(1, 2), (50, 3), (300, 2), (513, 4), (129, 7), (400, 5), (1, 300)])
def test_keys_equal_the_kernel_s_count(tokens, num_slots):
  length = tokens * num_slots
  seen = {}

  def make(mask, *, block_sizes, **_):
    block = (block_sizes.block_q, block_sizes.block_kv)
    seen["area"] = (mask_info.process_mask(mask, block)[0].block_mask > 0).sum() * np.prod(block)
    return lambda query, key, value, segments: query

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(splash.kernels, "make_splash_mha", make)
    jax.eval_shape(functools.partial(splash.attend, num_slots=num_slots), *arrays(0, 1, length, 1, 1, 8)[0])
  assert splash.plan(length, num_slots).keys == pytest.approx(seen["area"] / length)


def test_hidden_mask_by_hand():
  mask = splash._HiddenMask(rows=6, firsts=4, num_slots=3)
  expected = np.array(
    [
      [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
      [1, 0, 0, 0, 0, 1, 0, 0, 0, 0],
      [1, 0, 0, 0, 0, 1, 1, 0, 0, 0],
      [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
      [1, 1, 0, 0, 0, 0, 0, 0, 1, 0],
      [1, 1, 0, 0, 0, 0, 0, 0, 1, 1],
    ],
    bool,
  )
  np.testing.assert_array_equal(masks.MultiHeadMask([mask])[0, :, :], expected)


def mesh(data, fsdp, tensor):
  devices, axes = jax.devices()[: data * fsdp * tensor], ("data", "fsdp", "tensor")
  return jax.make_mesh((data, fsdp, tensor), axes, devices=devices, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
  ("shape", "heads", "groups", "hidden"),
  [
    ((2, 2, 2), 4, 2, True),  # one kv head for each device
    pytest.param((1, 2, 4), 4, 1, False, marks=pytest.mark.slow),  # one kv head for all
    ((2, 2, 2), 6, 3, False),  # heads 0-2 read kv heads 0, 0, 1, heads 3-5 kv heads 1, 2, 2
  ],
)
def test_split_over_a_mesh(shape, heads, groups, hidden):
  args, weight = arrays(2, 4, 20, heads, groups, 8)
  segment_ids = jnp.asarray(np.arange(40).reshape(4, 10) // 3, jnp.int32)
  mask = attention.HiddenSlots(2, segment_ids) if hidden else None
  expected = run(args, weight, mask, "xla")
  with jax.set_mesh(mesh(*shape)):
    got = run(args, weight, mask, "splash", interpret=True)
    jaxpr = jax.make_jaxpr(lambda *args: attention.attend(*args, mask=mask, implementation="splash", interpret=True))(
      *args
    )
  for mine, theirs in zip(got, expected, strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
  (call,) = [e for e in jaxpr.eqns if e.primitive.name == "shard_map"]
  local = (4 // (shape[0] * shape[1]), 20, heads // shape[2], 8)
  assert local in [x.aval.shape for x in call.params["jaxpr"].invars]


@pytest.mark.parametrize(
  ("batch", "heads", "reason"),
  [(3, 2, "a batch of 3 rows doesn't divide over 4 devices"), (4, 3, "3 heads don't divide over 2 devices")],
)
def test_shapes_that_do_not_divide_use_xla(monkeypatch, batch, heads, reason):
  warned = []
  monkeypatch.setattr(attention.logging, "log_first_n", lambda level, text, n, *args: warned.append(text % args))
  (query, key, value), _ = arrays(3, batch, 6, heads, heads, 8)
  with jax.set_mesh(mesh(2, 2, 2)):
    got = jax.jit(functools.partial(attention.attend, implementation="splash", interpret=True))(query, key, value)
  np.testing.assert_allclose(got, attention.attend(query, key, value, implementation="xla"), rtol=1e-5, atol=1e-6)
  assert warned == [f"XLA's attention replaces the splash kernel and holds all attention weights: {reason}"]


_ATTEND = attention.attend


def by_xla(*args, **options):
  return _ATTEND(*args, **options | {"implementation": "xla"})


def interpreted(*args, **options):
  return _ATTEND(*args, **options, interpret=True)


def loss_of_decoder(monkeypatch, attend, **fields):
  """A function of (params, inputs), of a decoder on hidden slots, and arguments for it.

  Args:
    attend: replaces `attention.attend`, because no config field selects interpreted kernels.
  """
  monkeypatch.setattr(attention, "attend", attend)
  decoder = Decoder(dataclasses.replace(TINY, attention="splash", **fields))
  params = nn.unbox(jax.jit(lambda: init_params(decoder, jax.random.key(0)))())
  inputs = jnp.asarray(np.random.default_rng(4).normal(size=(4, 20, TINY.d_model)), jnp.float32)

  def loss(params, inputs):
    out = decoder.apply({"params": params}, inputs, jnp.arange(20)[None] // 2, mask=attention.HiddenSlots(2))
    return (out**2 * jnp.cos(jnp.arange(TINY.d_model))).mean()

  return loss, (params, inputs)


@pytest.mark.parametrize(
  "fields",
  [
    {"remat": "dots", "scan_layers": True},
    pytest.param({"remat": "full"}, marks=pytest.mark.slow),
    pytest.param({"scan_layers": True}, marks=pytest.mark.slow),
  ],
  ids=str,
)
@pytest.mark.slow
def test_decoder_over_a_mesh(monkeypatch, fields):
  loss, args = loss_of_decoder(monkeypatch, by_xla, **fields)
  expected = jax.jit(jax.value_and_grad(loss))(*args)
  loss, args = loss_of_decoder(monkeypatch, interpreted, **fields)
  with jax.set_mesh(mesh(2, 1, 2)):
    assert_trees_close(jax.jit(jax.value_and_grad(loss))(*args), expected)


@pytest.mark.slow
def test_decoder_in_pmap(monkeypatch):
  loss, args = loss_of_decoder(monkeypatch, by_xla, num_layers=1)
  expected = jax.jit(jax.value_and_grad(loss))(*args)
  loss, (params, inputs) = loss_of_decoder(monkeypatch, interpreted, num_layers=1)
  step = jax.pmap(jax.value_and_grad(loss), axis_name="data", in_axes=(None, 0), devices=jax.devices()[:2])
  assert_trees_close(jax.tree.map(lambda x: x.mean(0), step(params, inputs.reshape(2, 2, 20, -1))), expected)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_square_array_is_stored_for_the_backward_pass(monkeypatch, remat):
  def squares(attend):
    loss, args = loss_of_decoder(monkeypatch, attend, remat=remat)
    kept = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(loss, *args)[1], *args))
    # The axes of 20 slots, of 10 tokens, and of blocks of 128.
    return [x.shape for x in kept if sum(size in (10, 20, 128, 256) for size in x.shape) > 1]

  assert squares(interpreted) == []
  assert bool(squares(by_xla)) == (remat == "none")


def kernels_in(jaxpr):
  """The number of kernels in a jaxpr, without calls that have no results: compilers remove them."""
  count = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      count += 1
    elif equation.outvars:
      count += sum(map(kernels_in, jaxprs_in_params(equation.params)))
  return count


@pytest.mark.parametrize(("remat", "kernels"), [("none", 3), ("dots", 3), ("full", 4)])
def test_how_often_the_kernels_run(monkeypatch, remat, kernels):
  """Forward, two backward, and with `remat` 'full' forward again."""
  loss, args = loss_of_decoder(monkeypatch, interpreted, num_layers=1, remat=remat)
  assert kernels_in(jax.make_jaxpr(jax.value_and_grad(loss))(*args).jaxpr) == kernels


def chosen(implementation="auto", mask=None, *, length=256, keys=None, size=256, dtype="float32"):
  shapes = [jax.ShapeDtypeStruct((1, n, 1, size), dtype) for n in (length, keys or length)]
  return attention.choose_implementation(*shapes, mask=mask, implementation=implementation, interpret=False)


def test_auto_on_a_tpu(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  segment_ids = attention.SegmentMask(np.zeros((1, 256), np.int32))
  assert chosen() == chosen(mask=attention.HiddenSlots(2)) == chosen(mask=segment_ids) == "splash"
  # A mask that no kernel supports, and a row shorter than a block.
  assert chosen(mask=np.ones((1, 1, 256, 256), bool)) == chosen(dtype="float16") == chosen(size=384) == "xla"
  assert chosen(length=100) == "xla"
  assert chosen("splash", length=100) == "splash"


def test_the_mesh_determines_the_platform(monkeypatch):
  # A program may be compiled for a platform other than that of the compiling machine.
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  with jax.set_mesh(mesh(8, 1, 1)):
    assert chosen() == "xla"
  seen = []
  jax.pmap(lambda x: seen.append(chosen()) or x, axis_name="data")(jnp.zeros((8, 1)))
  assert seen == ["blocks"]  # pmap gives each device its own arrays, so there is no mesh to split them


@pytest.mark.parametrize(
  ("backend", "options", "reason"),
  [
    ("cpu", {}, "needs a TPU, this program is for 'cpu'"),
    ("tpu", {"mask": np.ones((1, 1, 256, 256), bool)}, "supports no boolean mask"),
    ("tpu", {"keys": 300}, "needs as many keys as queries, not 300 and 256"),
    ("tpu", {"size": 384}, "needs a head size of at most 256, not 384"),
    ("tpu", {"dtype": "float16"}, "needs bfloat16 or float32 activations, not float16"),
  ],
)
def test_splash_is_refused_if_it_cannot_run(monkeypatch, backend, options, reason):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  with pytest.raises(InputError, match=f"^decoder.attention: 'splash' {reason}.*; use 'auto' or 'xla'$"):
    chosen("splash", **options)


_COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from cyb_jax.decoder import attention, decoder

devices = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices
mesh = Mesh(np.array(devices).reshape(2, 1, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

def compiled(size, mask, implementation, segment_ids=None, kept=False):
  def loss(query, key, value, segment_ids):
    full_mask = mask if segment_ids is None else attention.HiddenSlots(mask.num_slots, segment_ids)
    return attention.attend(query, key, value, mask=full_mask, implementation=implementation).astype(jnp.float32).sum()

  def shape(heads, axis):
    spec = NamedSharding(mesh, PartitionSpec("data", None, axis))
    return jax.ShapeDtypeStruct((2, 8192, heads, size), jnp.bfloat16, sharding=spec)

  if kept:
    loss = jax.checkpoint(loss, policy=decoder._is_kept)
  with jax.set_mesh(mesh):
    step = jax.jit(jax.grad(loss, (0, 1, 2)))
    program = step.lower(shape(4, "tensor"), shape(1, None), shape(1, None), segment_ids).compile()
  return program.as_text().count("tpu_custom_call"), program.memory_analysis().temp_size_in_bytes

segment_ids = jax.ShapeDtypeStruct((2, 2048), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data")))
print(json.dumps({
  "causal": compiled(64, None, "auto"),
  "kept": compiled(64, None, "auto", kept=True),
  "hidden": compiled(256, attention.HiddenSlots(4), "auto", segment_ids),
  "xla": compiled(256, None, "xla"),
}))
"""


@pytest.mark.slow
def test_compiles_for_a_tpu():
  if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
    pytest.skip("no libtpu (the wheel, or TPU_LIBRARY_PATH): nothing to compile for a TPU with")
  environment = os.environ | {
    "PYTHONPATH": os.pathsep.join((str(pathlib.Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))),
    "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled",
  }  # fmt: skip
  done = subprocess.run(
    [sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True, timeout=300, check=False
  )
  assert done.returncode == 0, done.stderr[-2000:]
  figures = json.loads(done.stdout.splitlines()[-1])
  # Forward, and backward; with hidden slots backward for queries and for keys and values.
  assert (figures["causal"][0], figures["hidden"][0]) == (2, 3)
  # With `remat` 'dots' the forward kernel runs once.
  assert figures["kept"][0] == 2
  assert figures["xla"][0] == 0
  # 2 heads on a device, 8,192 squared weights each.
  assert figures["xla"][1] > 2 * 8192**2 * 2
  assert figures["hidden"][1] < figures["xla"][1] / 8
