"""Every mesh against one device: losses, metrics, gradients, parameters; shardings and communication; checkpoints that
are moved between meshes, to pmap and back.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from models import VOCABULARY, assert_trees_close, assert_trees_equal, random_batch, tiny_config, with_part

from cyb_jax import configs, losses, readout, tiling
from cyb_jax.checkpointing.manager import Checkpoints
from cyb_jax.configs import ParallelismConfig
from cyb_jax.costs.memory import bytes_per_device
from cyb_jax.errors import InputError
from cyb_jax.evaluation import Evaluator
from cyb_jax.methods import option_names
from cyb_jax.partitioning import rules as placement
from cyb_jax.partitioning.mesh import check_batch, data_shards, make_mesh, replicated
from cyb_jax.training import build_strategy, make_optimizer


def slow(*values):
  return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# data, fsdp, tensor. Two kv heads can only be split over two devices, and four heads over four.
MESHES = {
  "2-2-2": (2, 2, 2),
  "8-1-1": (8, 1, 1),
  "1-8-1": (1, 8, 1),
  "4-2-1": (4, 2, 1),
  "4-1-2": (4, 1, 2),
  "1-2-4": (1, 2, 4),
  "1-1-8": (1, 1, 8),
}


def build(method=None, **parts):
  """A frozen config whose first moments equal the gradients, and whose updates are continuous in small gradients."""
  method = method or {}
  if "pauses" in option_names(method.get("name", "cyb")):
    method = {"pauses": 2} | method
  config = tiny_config(**method)
  config.decoder.update(num_heads=4)
  config.optimizer.update(clip_norm=0.0, epsilon=0.01, learning_rate=0.01, warmup_fraction=0.0, schedule="constant")
  config.parallelism.chunk_size = 16
  for part, fields in parts.items():
    config[part].update(fields) if isinstance(fields, dict) else setattr(config, part, fields)
  return configs.freeze(config)


# Each variant combines several features whose computations are independent.
VARIANTS = {
  "ap": build(),
  "dp, hidden pauses, untied, odd vocabulary, capped": build(
    {"loss": "dp", "rho": "5:3:2", "alpha": 0.1, "pause_visibility": "hidden", "pause_offset": True},
    decoder={"tied_embeddings": False, "vocab_size": VOCABULARY, "soft_cap": 5.0},
  ),
  "sampled, one kv head, odd mlp, accumulated": build(
    {"recipe": "sampled", "omega": "3:3:4"}, decoder={"num_kv_heads": 1, "mlp_size": 33}, optimizer={"accumulate": 2}
  ),
  "lora": build(
    {"dont_know": "unit"},
    init_from="runs/plain",
    tuning={"weights": "lora", "lora_rank": 2, "lora_targets": "query,value,out,down"},
  ),
  "va": build({"loss": "va", "rho": "5:3:2"}),
  "on policy": build({"recipe": "on_policy"}),
  "scanned, rematerialised": build(decoder={"num_layers": 2, "scan_layers": True, "remat": "full"}),
  "parallel residual, biases": build(decoder={"parallel_residual": True, "attention_bias": "all", "mlp_bias": True}),
  "baseline": build({"name": "baseline"}),
  "tbys": build({"name": "tbys"}),
  "thoughtbubbles": build({"name": "thoughtbubbles"}, decoder={"num_layers": 2}),
}


def over(config, name):
  """The config for a mesh, given by name, or for pmap."""
  if name == "pmap":
    return with_part(config, "parallelism", strategy="pmap")
  data, fsdp, tensor = MESHES.get(name, (1, 1, 1))
  return with_part(config, "parallelism", data=data, fsdp=fsdp, tensor=tensor)


def strategy_of(config, devices=8):
  mesh = make_mesh(config.parallelism, jax.devices()[:devices])
  shards = 1 if config.parallelism.strategy == "pmap" else data_shards(mesh)
  method = config.build_method(VOCABULARY, data_shards=shards)
  return build_strategy(config, method, make_optimizer(config.optimizer, 10, 16), mesh)


def take(strategy, state, steps):
  with jax.default_matmul_precision("highest"):
    for step in steps:
      state = strategy.step(state, strategy.shard_batch(random_batch(step, 16, 6, uneven=True)))
  return state


# All gradients of adapters are nonzero from the second step on.
_STEPS = (5, 6)


@functools.cache
def one_device(variant):
  strategy = strategy_of(over(VARIANTS[variant], "one"), 1)
  return jax.device_get(take(strategy, strategy.init(), _STEPS))


def assert_same(state, whole):
  """Relative to the largest value of each array, with tolerance 1e-5."""

  def same(a, b):
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())

  jax.tree.map(same, state, whole)


def check(variant, mesh):
  strategy = strategy_of(over(VARIANTS[variant], mesh))
  state = take(strategy, strategy.init(), _STEPS)
  if mesh != "pmap":
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(strategy.abstract()), strict=True)
    assert all(x.sharding.is_equivalent_to(wanted.sharding, x.ndim) for x, wanted in leaves)
  state, whole = jax.device_get(strategy.global_state(state)), one_device(variant)
  assert float(whole.totals.tokens) > 0
  gradient = optax.tree.get(whole.opt_state, "mu")
  assert min(np.abs(x).max() for x in jax.tree.leaves(gradient)) > 0
  assert_same(optax.tree.get(state.opt_state, "mu"), gradient)
  assert_same(state, whole)


@pytest.mark.parametrize("mesh", ["2-2-2", "pmap", *slow("1-2-4", "8-1-1", "1-8-1", "4-2-1", "4-1-2", "1-1-8")])
def test_the_step_on_every_mesh_equals_one_device(mesh):
  check("ap", mesh)


_QUICK = list(VARIANTS)[1:4]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_step_of_every_variant_equals_one_device(variant):
  check(variant, "2-2-2")


@pytest.mark.parametrize("mesh", slow("1-1-8", "1-8-1", "pmap"))
@pytest.mark.parametrize("variant", _QUICK)
def test_every_variant_on_the_largest_meshes_and_with_pmap(variant, mesh):
  check(variant, mesh)


def test_bytes_on_each_device():
  """By hand: the axes over which each array is split."""
  config = VARIANTS["dp, hidden pauses, untied, odd vocabulary, capped"]
  # V = 29 is not divisible; D = 16, N = 4, G = 2, H = 8, F = 32.
  for name, (_, fsdp, tensor) in MESHES.items():
    abstract = strategy_of(over(config, name)).abstract()
    heads, kv_heads = (n // tensor if n % tensor == 0 else n for n in (4, 2))
    width = 16 // fsdp
    tables = 2 * 29 * width
    layer = width * 8 * (2 * heads + 2 * kv_heads) + 3 * width * 32 // tensor + 2 * 16
    own = (2 + 2 + 1) * width  # pauses, offsets, <don't know>
    assert bytes_per_device(abstract.params) == 4 * (tables + layer + 16 + own), name
    moments = [optax.tree.get(abstract.opt_state, x) for x in ("mu", "nu")]
    assert bytes_per_device(moments) == 2 * bytes_per_device(abstract.params)
  # With padded rows, here 128, the vocabulary is divisible.
  abstract = strategy_of(over(VARIANTS["ap"], "2-2-2")).abstract()
  assert abstract.params["decoder"]["embedding"].sharding.spec == P("tensor", "fsdp")


def test_the_state_has_its_declared_shardings():
  strategy = strategy_of(over(VARIANTS["ap"], "2-2-2"))
  state = strategy.init()
  for part in ("params", "opt_state"):
    arrays = jax.tree.leaves(getattr(state, part))
    for device in range(8):
      there = sum(x.addressable_shards[device].data.nbytes for x in arrays)
      assert there == bytes_per_device(getattr(strategy.abstract(), part))
  table = state.params["decoder"]["embedding"]
  assert {x.data.shape for x in table.addressable_shards} == {(64, 8)}


def collectives(text):
  """(computation, bytes of its largest array, line) of every communication of a program."""
  sent, computation = [], ""
  for line in text.splitlines():
    if line and not line[0].isspace():
      computation = line.split()[0]
    found = re.search(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\(", line)
    if found:
      shapes = re.findall(r"([a-z]+)(\d+)\[([\d,]*)\]", found[1])
      sizes = [int(bits) // 8 * math.prod(map(int, filter(None, dims.split(",")))) for _, bits, dims in shapes]
      sent.append((computation, max(sizes), line.strip()))
  return sent


def test_the_loop_over_chunks_sends_three_numbers_of_a_slot_and_logits_are_never_sent():
  vocabulary, rows = 2000, 2048
  config = with_part(over(VARIANTS["ap"], "2-2-2"), "parallelism", chunk_size=64)
  mesh = make_mesh(config.parallelism)
  method = config.build_method(vocabulary, data_shards=4)
  strategy = build_strategy(config, method, optax.sgd(1.0), mesh)
  batch = random_batch(0, 16, 64)
  program = strategy.compile_abstract({k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()})
  text = program.as_text()
  # 21 tokens have 63 slots, so 4 x 64 tokens of a device are thirteen chunks. The gradients need no second loop.
  assert len(re.findall(r'known_trip_count":\{"n":"13"', text)) == 1
  sent = collectives(text)
  # The bodies of loops are separate computations: there the parts of the vocabulary are joined.
  in_loops = [size for computation, size, _ in sent if computation != "ENTRY"]
  assert in_loops
  assert max(in_loops) == 63 * 4
  chunk = 64 * rows // 2 * 4
  table = rows // 2 * 16 * 4
  hidden = 13 * 63 * 16 * 4
  assert hidden < table < chunk
  largest = [line for _, size, line in sent if size > hidden]
  # The width of the table is gathered once, and no other communication is as large.
  assert len(largest) == 1
  assert "all-gather" in largest[0]
  assert f"f32[{rows // 2},16]" in largest[0]


def problem(seed=0, vocabulary=40, width=16):
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(8, 5, 3, width)).astype(np.float32)
  unembedding = rng.normal(size=(vocabulary, width)).astype(np.float32)
  return hidden, unembedding, rng.integers(0, 37, (8, 5)), rng.normal(size=width).astype(np.float32)


def laid(mesh, *shapes):
  return [jax.device_put(x, NamedSharding(mesh, P(*spec))) for x, spec in shapes]


@pytest.mark.parametrize("kept", [0, 2**26])
@pytest.mark.parametrize("mesh", [(4, 2, 1), (2, 2, 2), (1, 2, 4), *slow((1, 1, 8))])
@pytest.mark.parametrize("dont_know", ["row", 3])
@pytest.mark.slow
def test_readout(mesh, dont_know, kept, exact, monkeypatch):
  """With padded rows, and with parts of the vocabulary without tokens; values and all gradients."""
  monkeypatch.setattr(tiling, "KEPT", kept)
  mesh = make_mesh(ParallelismConfig(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]))
  hidden, unembedding, targets, row = problem()
  targets[0, 0] = -100  # ignored
  real = 37 if mesh.shape["tensor"] < 4 else 30
  targets = np.minimum(targets, real - 1)
  form = {"vocab_size": real, "soft_cap": 4.0, "chunk_size": 4, "prior": 0.9}
  weights = np.random.default_rng(1).normal(size=(3, 8, 5, 3)).astype(np.float32) * (targets >= 0)[..., None]

  def value(hidden, unembedding, row):
    scores = readout.slot_scores(hidden, unembedding, targets, row if dont_know == "row" else dont_know, **form)
    each = jnp.stack([scores.log_target, scores.log_dont_know, scores.log_answer])
    return (each * weights).sum(), each

  def run(*args):
    return jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(*args)

  whole = run(hidden, unembedding, row)
  rows = ("data", "fsdp"), None, None, None
  args = laid(mesh, (hidden, rows), (unembedding, ("tensor", "fsdp")), (row, ("fsdp",)))
  with jax.set_mesh(mesh):
    spread = run(*args)
  assert np.abs(whole[1][1]).max() > 0.1
  assert_trees_close(spread, whole, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("mesh", [(4, 2, 1), (1, 2, 4), *slow((2, 2, 2), (1, 1, 8))])
@pytest.mark.parametrize("dont_know", ["row", *slow(3, None)])
def test_a_weighted_loss(mesh, dont_know, exact):
  """With padded rows, and with parts of the vocabulary without tokens; the sum, the scores, and all gradients."""
  mesh = make_mesh(ParallelismConfig(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]))
  hidden, unembedding, targets, row = problem()
  targets = np.minimum(targets, 29)
  targets[0, 0] = -100  # ignored
  weights, gamma = np.random.default_rng(1).uniform(size=(2, 8, 5)).astype(np.float32)
  weights[3] = 0.0

  def value(hidden, unembedding, row, gamma):
    return readout.weighted_loss(
      lambda scores, gamma: gamma * losses.cyb(scores), hidden, unembedding, targets,
      row if dont_know == "row" else dont_know, weights, gamma,
      vocab_size=30, soft_cap=4.0, chunk_size=4, prior=0.9,
    )  # fmt: skip

  def run(*args):
    return jax.jit(jax.value_and_grad(value, (0, 1, 2, 3), has_aux=True))(*args)

  arrays = hidden, unembedding, row, gamma
  whole = run(*arrays)
  rows = ("data", "fsdp")
  args = laid(
    mesh, (hidden, (rows, None, None, None)), (unembedding, ("tensor", "fsdp")), (row, ("fsdp",)), (gamma, (rows, None))
  )
  with jax.set_mesh(mesh):
    spread = run(*args)
  assert_trees_close(spread, whole, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("mesh", [(4, 2, 1), (1, 2, 4)])
def test_a_frozen_readout(mesh, exact):
  """Of a vocabulary that is split too: the gradient of the hidden states."""
  mesh = make_mesh(ParallelismConfig(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]))
  hidden, unembedding, targets, row = problem()
  targets = np.minimum(targets, 29)
  targets[0, 0] = -100

  def run(hidden, unembedding, row, frozen=True):
    def value(hidden):
      options = {"vocab_size": 30, "soft_cap": 4.0, "chunk_size": 4, "prior": 0.9, "frozen": frozen}
      scores = readout.slot_scores(hidden, unembedding, targets, row, **options)
      return (scores.log_target * scores.log_dont_know).sum()

    return jax.jit(jax.value_and_grad(value))(hidden)

  whole = run(hidden, unembedding, row, frozen=False)
  args = laid(mesh, (hidden, (("data", "fsdp"), None, None, None)), (unembedding, ("tensor", "fsdp")), (row, ("fsdp",)))
  with jax.set_mesh(mesh):
    spread = run(*args)
  assert_trees_close(spread, whole, rtol=1e-5, atol=2e-5)


def test_scores_of_all_tokens(exact):
  """The table is not moved: only sums over parts of the vocabulary are communicated."""
  mesh = make_mesh(ParallelismConfig(data=2, fsdp=1, tensor=4))
  hidden, unembedding, _, row = problem(vocabulary=4096)
  score = jax.jit(lambda h, u, r: readout.token_scores(h, u, r, vocab_size=4093, prior=0.9))
  whole = score(hidden[:, 0, 0], unembedding, row)
  args = laid(mesh, (hidden[:, 0, 0], ("data",)), (unembedding, ("tensor", None)), (row, ()))
  with jax.set_mesh(mesh):
    spread = score(*args)
    best = jax.jit(lambda *args: score(*args).log_probs.max(-1)).lower(*args).compile()
  assert whole.log_probs.shape == (8, 4093)
  assert_trees_close(spread, whole, rtol=1e-5, atol=1e-5)
  sent = [size for _, size, _ in collectives(best.as_text())]
  assert max(sent) <= 8 * 16 * 4  # hidden states; their logits are 64 times as large


def test_invalid_ids_give_nan_on_a_mesh():
  config = VARIANTS["ap"]
  mesh = make_mesh(over(config, "2-2-2").parallelism)
  method = config.build_method(VOCABULARY)
  params = strategy_of(over(config, "2-2-2")).init().params
  tokens = np.arange(16).reshape(8, 2)
  tokens[3, 1] = 128
  with jax.set_mesh(mesh):
    embed = jax.jit(lambda p, t: method.decoder.apply({"params": p}, t, method="embed"))
    rows = np.asarray(embed(params["decoder"], tokens))
  assert np.isnan(rows[3, 1]).all()
  table = np.asarray(params["decoder"]["embedding"])
  np.testing.assert_array_equal(rows[:3], table[tokens[:3]])


def test_inside_pmap_and_shard_map_there_is_no_mesh():
  seen = []

  def look(x):
    seen.append(placement.current_mesh())
    return placement.constrain(x, "batch", None)

  x = jnp.ones((8, 2))
  jax.pmap(look)(x[:, None])
  mesh = make_mesh(ParallelismConfig(tensor=2))
  with jax.set_mesh(mesh):
    jax.jit(look)(x)
    jax.jit(jax.shard_map(look, in_specs=P("data"), out_specs=P("data")))(x)
  with jax.set_mesh(make_mesh(ParallelismConfig(), jax.devices()[:1])):
    assert jax.jit(look).lower(x).as_text().count("sharding_constraint") == 0
  assert [mesh is None for mesh in seen] == [True, False, True, True]


def test_placement_of_arrays():
  mesh = make_mesh(ParallelismConfig(data=2, fsdp=2, tensor=2))
  names = ("batch", None, "heads", None)
  assert placement.spec((8, 5, 4, 8), names, mesh) == P(("data", "fsdp"), None, "tensor", None)
  assert placement.spec((6, 5, 1, 8), names, mesh) == P(None, None, None, None)
  assert placement.spec((128, 16), ("vocab", "embed"), mesh) == P("tensor", "fsdp")
  assert placement.spec((3, 16), ("layers", "norm"), mesh) == P(None, None)


@pytest.mark.parametrize(
  ("fields", "mesh", "message"),
  [
    (
      {"num_kv_heads": 1}, "1-1-8",
      "parallelism.tensor = 8 doesn't divide decoder.num_heads = 4, decoder.num_kv_heads = 1: these axes are replicated"
      " on the devices",
    ),
    (
      {"num_heads": 2, "num_kv_heads": 1, "mlp_size": 33, "vocab_size": VOCABULARY}, "1-1-8",
      "parallelism.tensor = 8 doesn't divide decoder.num_heads = 2, decoder.num_kv_heads = 1, decoder.mlp_size = 33,"
      " decoder.vocab_size = 29: these axes are replicated on the devices, and they repeat the same computation",
    ),
    ({"d_model": 20}, "1-8-1", "parallelism.fsdp = 8 doesn't divide decoder.d_model = 20: these axes are replicated"),
    ({}, "2-2-2", None),
  ],
)  # fmt: skip
def test_replicated_axes_cause_a_warning(fields, mesh, message, caplog):
  strategy_of(over(build(decoder=fields), mesh))
  messages = [record.getMessage() for record in caplog.records if "doesn't divide" in record.getMessage()]
  assert len(messages) == bool(message)
  assert all(text.startswith(message) for text in messages)


def test_meshes():
  assert make_mesh(ParallelismConfig(fsdp=2)).shape == {"data": 4, "fsdp": 2, "tensor": 1}
  with pytest.raises(InputError, match="data = 3, fsdp = 1, tensor = 1; give sizes with data x fsdp x tensor = 8"):
    make_mesh(ParallelismConfig(data=3))
  with pytest.raises(InputError, match="fsdp = 3"):
    make_mesh(ParallelismConfig(fsdp=3))
  with pytest.raises(InputError, match=r"data.batch_size: 12 is not divisible by 8 devices; give 8 or 16"):
    check_batch(12, 8)


@pytest.mark.parametrize("meshes", slow(("2-2-2", "pmap", "1-2-4"), ("1-8-1", "one", "8-1-1", "1-1-8")))
def test_checkpoints_move_between_meshes(meshes, tmp_path):
  """From mesh to mesh, to pmap and back, with two steps on each: arrays are bitwise equal, and training continues."""
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=9)
  config, state = VARIANTS["ap"], None
  for number, mesh in enumerate(meshes):
    strategy = strategy_of(over(config, mesh), 1 if mesh == "one" else 8)
    if state is None:
      placed = strategy.init()
    else:
      restored = checkpoints.restore(2 * number, strategy.abstract())
      placed = strategy.place(restored.state)
      assert_trees_equal(jax.device_get(strategy.global_state(placed)), state)
    placed = take(strategy, placed, [2 * number, 2 * number + 1])
    global_state = strategy.global_state(placed)
    checkpoints.save(2 * number + 2, global_state, {})
    checkpoints.wait()
    state = jax.device_get(global_state)
  checkpoints.close()
  strategy = strategy_of(over(config, "one"), 1)
  whole = jax.device_get(take(strategy, strategy.init(), range(2 * len(meshes))))
  assert int(state.step) == 2 * len(meshes)
  assert_trees_close(state.totals, whole.totals, rtol=1e-5, atol=1e-5)
  assert_same(state.params, whole.params)


@pytest.mark.slow
def test_evaluation_of_sharded_parameters(exact):
  """On the mesh of training, and on one device."""
  config = VARIANTS["ap"]
  strategy = strategy_of(over(config, "2-2-2"))
  params = strategy.init().params
  batches = [random_batch(1, 16, 6, uneven=True)]
  mesh = make_mesh(over(config, "2-2-2").parallelism)
  method = config.build_method(VOCABULARY, data_shards=4)
  here = make_mesh(ParallelismConfig(), jax.devices()[:1])
  whole = Evaluator(config.build_method(VOCABULARY), here)(jax.device_get(params), batches)
  assert len(params["decoder"]["embedding"].addressable_shards[0].data) == 64
  spread = Evaluator(method, mesh)
  for placed in (params, jax.device_put(params, replicated(mesh))):
    found = spread(placed, batches)
    for key in ("loss", "perplexity", "slot_perplexity", "hard_perplexity", "latency", "tokens"):
      assert_trees_close(found[key], whole[key], rtol=1e-5, atol=1e-6)
