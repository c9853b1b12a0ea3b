import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cyb_jax.costs import flops
from cyb_jax.decoder import Decoder, DecoderConfig, HiddenSlots, LoraConfig, init_params, num_params, preset
from cyb_jax.decoder.config import TARGETS
from cyb_jax.decoder.lora import LEAVES
from cyb_jax.methods import build, configure
from cyb_jax.methods.parameters import trained_part, with_trained


def _config(**fields):
  sizes = dict(num_layers=2, d_model=256, num_heads=4, num_kv_heads=4, head_size=64, mlp_size=768)
  return DecoderConfig(vocab_size=512, **{**sizes, **fields})


def test_by_hand():
  # One layer, D = 2, N = 2, G = 1, H = 4, F = 5, V = 7. Matrices: query and out 16 each, key and value 8 each,
  # mlp 3 x 10: 78 parameters, 156 operations. Per key: 4 N H = 32.
  config = DecoderConfig(vocab_size=7, num_layers=1, d_model=2, num_heads=2, num_kv_heads=1, head_size=4, mlp_size=5)
  # T = 2, W = 2: S = 4, keys 2.5 on average. Readout 2 D V = 28.
  one = dict(tokens=2, slots=2, slots_read=1)
  assert flops.forward_cost(config, **one).total == 2 * (156 + 32 * 2.5) + 28
  assert flops.forward_cost(config, tokens=2, slots=2, slots_read=2).total == 2 * (156 + 32 * 2.5) + 2 * 28
  assert flops.forward_cost(config, **one, executed=True).total == 2 * (156 + 32 * 4) + 28
  assert flops.train_cost(config, **one).total == 3 * (2 * (156 + 32 * 2.5) + 28)
  # With hidden slots a slot sees 1.5 tokens and half a pause on average; as executed, both tokens and the pause.
  assert flops.forward_cost(config, **one, hidden=True).total == 2 * (156 + 32 * (1.5 + 0.5)) + 28
  assert flops.forward_cost(config, **one, hidden=True, executed=True).total == 2 * (156 + 32 * (2 + 1)) + 28
  # As executed the readout of the scores computes the logits twice.
  assert flops.train_cost(config, **one, executed=True).total == 3 * 2 * (156 + 32 * 4) + 3 * 28
  assert flops.train_cost(config, **one, executed=True, reads_twice=True).total == 3 * 2 * (156 + 32 * 4) + 4 * 28


def test_windows_by_hand():
  # T = 3, W = 2, a window of 2: the tokens see 1, 2 and 2 tokens with both slots, of their own on average 1.5 slots.
  config = _config(window=2, global_every=2)
  local, everywhere = (5 / 3 - 1) * 2 + 1.5, 3.5
  assert flops.local_keys(config, 3, 2) == pytest.approx(local)
  assert flops.local_keys(config, 3, 2, hidden=True) == pytest.approx((5 / 3 - 1) + 1.5)
  # One of two layers has the window; 4 N H = 1024 operations per key.
  costs = flops.forward_cost(config, tokens=3, slots=2, slots_read=0)
  assert costs.attention == pytest.approx(2 * 1024 * (local + everywhere))
  assert flops.train_cost(config, tokens=3, slots=2, slots_read=0).attention == pytest.approx(3 * costs.attention)
  # XLA computes the square, and a window that is longer than the row changes nothing.
  assert flops.forward_cost(config, tokens=3, slots=2, slots_read=0, executed=True).attention == 2 * 2 * 1024 * 6
  wide, plain = (flops.forward_cost(c, tokens=3, slots=2, slots_read=0) for c in (_config(window=9), _config()))
  assert wide.attention == pytest.approx(plain.attention)
  # With positions of their own the six slots see 1, 2, 2, ... slots.
  assert flops.local_keys(config, 3, 2, shifting=True) == pytest.approx(11 / 6)
  assert flops.forward_cost(config, tokens=3, slots=2, slots_read=0, shifting=True).attention == pytest.approx(
    2 * 1024 * (11 / 6 + everywhere)
  )


def _seen(positions, window=None):
  """The mean number of keys of slots in order, by their positions."""
  pairs = [
    (i, j) for i, own in enumerate(positions) for j in range(i + 1) if window is None or own - positions[j] < window
  ]
  return len(pairs) / len(positions)


@pytest.mark.parametrize(
  ("options", "attention"),
  [
    # Three loops over 8 tokens.
    (dict(name="looped", pauses=2), 3 * (_seen(range(8), 3) + _seen(range(8)))),
    # Passes with 1 slot, 2 slots, and 3 slots that are refined twice.
    (
      dict(name="ponderlm2", pauses=2, jacobi=(2, 2)),
      sum(n * (_seen(np.repeat(range(8), n), 3) + _seen(range(8 * n))) for n in (1, 2, 3, 3, 3)),
    ),
    # 8 streams in layer 1, which has the window, and 16 in layer 2, which has none.
    (dict(name="thoughtbubbles", fork_layers=(2,), stream_budget=2.0), _seen(range(8), 3) + 2 * _seen(range(16))),
    # A pass without pauses, and one over rows that also fit a pause, which has a position of its own.
    (
      dict(name="pause_training"),
      sum(n / 8 * (_seen(range(n), 3) + _seen(range(n))) for n in (8, 9)) / 2,
    ),
    (dict(name="tbys", pauses=1, pause_positions="shifting"), 2 * (_seen(range(16), 3) + _seen(range(16)))),
    (dict(name="tbys", pauses=1), 2 * (_seen(np.repeat(range(8), 2), 3) + _seen(range(16)))),
  ],
)
def test_windows_of_methods_by_counting(options, attention):
  """The second of two layers is global; 4 N H = 1024 operations per key."""
  method = build(configure(**options), _config(window=3, global_every=2))
  costs = method.costs(8)
  assert costs.forward.attention == pytest.approx(1024 * attention)
  plain = build(configure(**options), _config()).costs(8)
  assert costs.train.attention < plain.train.attention
  assert costs.inference.attention < plain.inference.attention
  # XLA computes the square.
  assert (costs.train_executed, costs.forward_executed) == (plain.train_executed, plain.forward_executed)


@pytest.mark.parametrize("window", [None, 1, 2, 9])
def test_keys_of_a_text_by_counting(window):
  counts = [1, 3, 2, 1]
  tokens = np.repeat(range(4), counts)
  first = np.concatenate([[1], np.diff(tokens)]) > 0

  def seen(own, others):
    """`own`, `others`: whether slot j is a key of slot i of its own token, or of a later token."""
    near = [(i, j) for i in range(7) for j in range(i + 1) if window is None or tokens[i] - tokens[j] < window]
    return sum(own(i, j) if tokens[i] == tokens[j] else others(j) for i, j in near)

  assert flops.total_keys(counts, window) == seen(lambda i, j: True, lambda j: True)
  assert flops.total_keys(counts, window, hidden=True) == seen(lambda i, j: True, lambda j: first[j])
  loops = flops.total_keys(counts, window, hidden=True, of_own=False)
  assert loops == seen(lambda i, j: i == j, lambda j: first[j])


def test_the_operations_of_slots_with_a_window():
  config = _config(window=2, global_every=2)
  everywhere = flops.slot_flops(config, slots=0, keys=10, slots_read=0)
  assert everywhere == 2 * 1024 * 10
  assert flops.slot_flops(config, slots=0, keys=10, local_keys=4, slots_read=0) == 1024 * (10 + 4)


def test_frozen_decoder_by_hand():
  # The layer of the test above, with adapters of rank 3 on query (2 x 8) and down (5 x 2).
  lora = LoraConfig(rank=3, targets=("query", "down"))
  sizes = dict(vocab_size=7, num_layers=1, d_model=2, num_heads=2, num_kv_heads=1, head_size=4, mlp_size=5)
  config = DecoderConfig(**sizes, lora=lora)
  arguments = dict(tokens=2, slots=2, slots_read=1)
  adapters = 2 * 3 * (2 + 8 + 5 + 2)
  forward = flops.forward_cost(config, **arguments)
  assert forward == flops.Cost(matrices=2 * 156, attention=2 * 32 * 2.5, readout=28, adapters=2 * adapters)
  assert forward.total == flops.forward_cost(config, **arguments).total
  trained = flops.train_cost(config, **arguments, frozen=True)
  # A frozen matrix has one product less; attention has no parameters.
  expected = flops.Cost(matrices=2 * 2 * 156, attention=3 * 160, readout=2 * 28, adapters=3 * 2 * adapters)
  assert trained == expected
  executed = flops.train_cost(dataclasses.replace(config, remat="full"), **arguments, frozen=True, executed=True)
  # Everything is recomputed except mlp down (10 parameters) and the second half of its adapter (3 x 2).
  assert executed.matrices == 2 * (3 * 156 - 2 * 10)
  assert executed.attention == 4 * 2 * 32 * 4
  assert executed.adapters == 2 * (4 * adapters - 2 * 6)
  assert executed.readout == 2 * 28


@pytest.mark.parametrize(
  ("fields", "targets"),
  [
    (dict(num_kv_heads=2), TARGETS),
    (dict(), ()),
    (dict(remat="full", gated_mlp=False, parallel_residual=True), ("key", "out", "up", "down")),
    (dict(remat="dots"), TARGETS),
  ],
)
@pytest.mark.slow
def test_executed_agrees_with_xla_if_the_decoder_is_frozen(fields, targets):
  """The complete loss of a method with pauses."""
  lora = LoraConfig(rank=32, targets=targets) if targets else None
  config = _config(num_layers=1, lora=lora, **fields)
  method = build(
    configure(pauses=2, pause_visibility="hidden"), config, chunk_size=2**20, weights="lora" if targets else "new"
  )
  params = nn.unbox(jax.eval_shape(method.init, jax.random.key(0)))
  rows, weights = jax.ShapeDtypeStruct((2, 16), jnp.int32), jax.ShapeDtypeStruct((2, 16), jnp.float32)

  def loss(part, params, batch):
    return method.loss(with_trained(params, part), batch, jax.random.key(0)).weighted_sum(batch["weights"])

  part = trained_part(params, method.is_trained)
  assert any(path[-1].key in LEAVES for path, _ in jax.tree_util.tree_leaves_with_path(part)) == bool(targets)
  lowered = jax.jit(jax.grad(loss)).lower(part, params, {"tokens": rows, "targets": rows, "weights": weights})
  counted = lowered.compile().cost_analysis()["flops"] / (2 * 16)
  assert method.costs(16).train_executed.total == pytest.approx(counted, rel=0.03)


def test_is_about_two_per_parameter():
  config = preset("smollm2_135m")
  # A tied table is multiplied once, in the readout.
  per_token = flops.forward_cost(config, tokens=1, slots=1, slots_read=1).total
  assert per_token == pytest.approx(2 * num_params(config), rel=1e-3)


@pytest.mark.parametrize(
  ("fields", "hides"),
  [
    (dict(gated_mlp=False, norm="layernorm", attention_bias="all", mlp_bias=True), False),
    (dict(remat="full", num_kv_heads=2), False),
    (dict(remat="full", parallel_residual=True), False),
    (dict(remat="dots"), False),
    (dict(remat="dots", num_kv_heads=2), True),
    (dict(remat="full", norm_placement="both", query_key_norm="head", window=4), False),
  ],
)
def test_executed_agrees_with_xla(fields, hides):
  config = _config(num_layers=1, **fields)
  decoder = Decoder(config)
  batch, tokens, slots = 2, 16, 3
  params = jax.eval_shape(lambda rng: nn.unbox(init_params(decoder, rng)), jax.random.key(0))
  ids = jax.ShapeDtypeStruct((batch, tokens * slots), jnp.int32)
  positions = np.repeat(np.arange(tokens), slots)[None]
  mask = HiddenSlots(slots) if hides else None

  def hidden(params, ids):
    variables = {"params": params}
    return decoder.apply(variables, decoder.apply(variables, ids, method="embed"), positions, mask=mask)

  def logits(params, ids):
    last = hidden(params, ids)[:, slots - 1 :: slots]
    return last @ decoder.apply({"params": params}, method="unembedding").T

  def counted(function):
    return jax.jit(function).lower(params, ids).compile().cost_analysis()["flops"] / (batch * tokens)

  arguments = dict(tokens=tokens, slots=slots, hidden=hides, executed=True)
  forward = flops.forward_cost(config, slots_read=1, **arguments).total
  assert forward == pytest.approx(counted(logits), rel=0.03)
  train = flops.train_cost(config, slots_read=0, **arguments).total
  assert train == pytest.approx(counted(jax.grad(lambda params, ids: hidden(params, ids).sum())), rel=0.03)


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-40GB", 312e12),
    ("NVIDIA H100 PCIe", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("TPU v4 lite", None),
    ("cpu", None),
  ],
)
def test_peaks(kind, peak):
  assert flops.peak_flops(types.SimpleNamespace(device_kind=kind)) == peak
