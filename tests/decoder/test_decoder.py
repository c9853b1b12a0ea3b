import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cyb_jax.decoder import PRESETS, Decoder, DecoderConfig, empty_cache, init_params, num_params, preset
from cyb_jax.decoder import cache as cache_module
from cyb_jax.decoder.cache import cache_mask, write
from cyb_jax.errors import InputError

_SIZES = dict(vocab_size=19, num_layers=2, d_model=12, num_heads=4, num_kv_heads=2, head_size=8, mlp_size=20)
_STYLES = {
  "llama": dict(rope_base=5e5),
  "llama_untied": dict(tied_embeddings=False, attention_bias="qkv"),
  "gemma": dict(
    norm="rmsnorm_plus_one", norm_epsilon=1e-6, activation="gelu_tanh", scale_embeddings=True, num_kv_heads=1
  ),
  "pythia": dict(
    norm="layernorm", activation="gelu", gated_mlp=False, attention_bias="all", mlp_bias=True,
    parallel_residual=True, rope_fraction=0.25, tied_embeddings=False, num_kv_heads=4,
  ),
  "gpt2": dict(
    norm="layernorm", activation="gelu_tanh", gated_mlp=False, attention_bias="all", mlp_bias=True, num_kv_heads=4
  ),
  "gpt2_learned": dict(
    norm="layernorm", activation="gelu_tanh", gated_mlp=False, attention_bias="all", mlp_bias=True, num_kv_heads=4,
    learned_positions=310,
  ),
  "mistral": dict(window=2),
  "qwen3": dict(query_key_norm="head", rope_scaling="llama3:factor=8,context=100"),
  "gemma2": dict(
    norm="rmsnorm_plus_one", norm_placement="both", activation="gelu_tanh", scale_embeddings=True, query_scalar=5.0,
    attention_soft_cap=1.5, window=2, global_every=2,
  ),
  "gemma3": dict(
    norm="rmsnorm_plus_one", norm_placement="both", activation="gelu_tanh", scale_embeddings=True, window=2,
    global_every=2, query_key_norm="head", local_rope_base=100.0, rope_scaling="linear:factor=8",
  ),
  "olmo2": dict(norm_placement="after", query_key_norm="all"),
  "smollm3": dict(global_every=2, global_rope=False),
  "local_without_rope": dict(window=2, global_every=2, global_rope=False, rope_scaling="yarn:factor=4,context=100"),
}  # fmt: skip


def _make(seed=0, **fields):
  """A decoder and parameters; no parameter is zero, one, or so small that a mistake would go unnoticed."""
  decoder = Decoder(DecoderConfig(**{**_SIZES, **fields}))
  shapes = jax.eval_shape(lambda rng: nn.unbox(init_params(decoder, rng)), jax.random.key(0))
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32), shapes)
  return decoder, {"params": params}


# One compilation instead of one per operation.
_apply = jax.jit(Decoder.apply, static_argnums=0, static_argnames="method")


def _normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _stack(params, num_layers):
  """The parameters of an unrolled decoder in the layout of a scanned decoder."""
  layers = [params[f"layers_{i}"] for i in range(num_layers)]
  others = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
  return {**others, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


# The oracle: float64, one head and one query at a time.


def _oracle_norm(config, params, x):
  if config.norm == "layernorm":
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * params["scale"] + params["bias"]
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon)
  return x * (params["scale"] + (config.norm == "rmsnorm_plus_one"))


def _oracle_rotate(config, x, positions, is_global):  # [S, H]
  if config.learned_positions or (is_global and not config.global_rope):
    return x
  x, base, amplitude = x.copy(), config.rope_base, 1.0
  size = int(config.head_size * config.rope_fraction)
  frequencies = base ** -(np.arange(0, size, 2) / size)
  if not is_global and config.local_rope_base:
    frequencies = config.local_rope_base ** -(np.arange(0, size, 2) / size)
  elif config.scaling:
    frequencies, amplitude = config.scaling.frequencies(size, base), config.scaling.amplitude
  for s, position in enumerate(positions):
    for i in range(size // 2):
      pair = complex(x[s, i], x[s, i + size // 2]) * amplitude * np.exp(1j * position * frequencies[i])
      x[s, i], x[s, i + size // 2] = pair.real, pair.imag
  return x


def _oracle_heads(config, params, name, x):  # [S, heads, H]
  heads = np.einsum("sd,dnh->snh", x, params[name]["kernel"]) + params[name].get("bias", 0)
  if config.query_key_norm == "none" or name == "value":
    return heads
  shape = heads.shape if config.query_key_norm == "head" else (len(x), -1)
  scale = {"scale": params[f"{name}_norm"]["scale"].reshape(-1)}
  return _oracle_norm(config, scale, heads.reshape(shape)).reshape(heads.shape)


def _oracle_attention(config, params, normed, positions, sees, offset, is_global):
  out = np.zeros((len(normed), config.d_model))
  if config.window is not None and not is_global:
    sees = sees & (positions[:, None] - positions < config.window)
  inputs = {"query": normed + offset, "key": normed + offset, "value": normed}
  projected = {name: _oracle_heads(config, params, name, x) for name, x in inputs.items()}
  for n in range(config.num_heads):
    g = n // (config.num_heads // config.num_kv_heads)
    heads = {"query": projected["query"][:, n], "key": projected["key"][:, g], "value": projected["value"][:, g]}
    query, key = (_oracle_rotate(config, heads[name], positions, is_global) for name in ("query", "key"))
    for s in range(len(normed)):
      keys = [j for j in range(len(normed)) if sees[s, j]]
      scores = np.array([query[s] @ key[j] / math.sqrt(config.query_scalar or config.head_size) for j in keys])
      if config.attention_soft_cap:
        scores = config.attention_soft_cap * np.tanh(scores / config.attention_soft_cap)
      weights = np.exp(scores)
      read = sum(weight * heads["value"][j] for weight, j in zip(weights / weights.sum(), keys))
      out[s] += read @ params["out"]["kernel"][n]
  return out + params["out"].get("bias", 0)


def _oracle_mlp(config, params, x):
  act = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
  }[config.activation]
  up = x @ params["up"]["kernel"] + params["up"].get("bias", 0)
  if config.gated_mlp:
    inner = act(x @ params["gate"]["kernel"] + params["gate"].get("bias", 0)) * up
  else:
    inner = act(up)
  return inner @ params["down"]["kernel"] + params["down"].get("bias", 0)


def _oracle(config, variables, tokens, positions, sees, offset=0.0):
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
  x = params["embedding"][tokens] * (math.sqrt(config.d_model) if config.scale_embeddings else 1)
  if config.learned_positions:
    x = x + params["position_embedding"][positions]
  for i in range(config.num_layers):
    layer = params[f"layers_{i}"]
    is_global = config.window is None if config.global_every is None else i % config.global_every == 1

    def norm(name, x, layer=layer):
      return _oracle_norm(config, layer[name], x) if name in layer else x

    normed = norm("attention_norm", x)
    attended = _oracle_attention(config, layer["attention"], normed, positions, sees, offset, is_global)
    attended = norm("attention_post_norm", attended)
    middle = x if config.parallel_residual else x + attended
    mlp = norm("mlp_post_norm", _oracle_mlp(config, layer["mlp"], norm("mlp_norm", middle)))
    x = x + attended + mlp
  return _oracle_norm(config, params["final_norm"], x)


@pytest.mark.parametrize("style", _STYLES)
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_the_oracle(style, masked):
  decoder, variables = _make(**_STYLES[style])
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 19, (2, 6))
  positions = np.array([[0, 0, 1, 1, 2, 2], [5, 5, 6, 6, 300, 301]])  # shared, like the positions of pauses
  sees = np.broadcast_to(np.tril(np.ones((6, 6), bool)), (2, 6, 6)).copy()
  offset, mask = None, None
  if masked:
    sees &= rng.random((2, 6, 6)) < 0.6
    sees |= np.eye(6, dtype=bool)
    offset, mask = rng.normal(size=(2, 6, 12)), sees[:, None]
  with jax.default_matmul_precision("highest"):
    inputs = _apply(decoder, variables, tokens, method="embed")
    hidden = _apply(decoder, variables, inputs, positions, mask=mask, query_key_offset=offset)
  assert hidden.dtype == jnp.float32
  for b in range(2):
    shift = 0.0 if offset is None else offset[b]
    expected = _oracle(decoder.config, variables, tokens[b], positions[b], sees[b], shift)
    np.testing.assert_allclose(hidden[b], expected, rtol=1e-5, atol=1e-5)


def test_final_norm_by_hand_with_layers_switched_off():
  # With its attention and mlp switched off, a decoder is its final norm: (3, 4) has root mean square sqrt(12.5).
  sizes = dict(vocab_size=3, num_layers=1, d_model=2, num_heads=1, num_kv_heads=1, head_size=2, mlp_size=2)
  x, positions = jnp.array([[[3.0, 4.0]]]), jnp.zeros((1, 1), jnp.int32)
  for norm, scale, expected in (
    ("rmsnorm", [2.0, 1.0], [6 / 12.5**0.5, 4 / 12.5**0.5]),
    ("rmsnorm_plus_one", [1.0, 0.0], [6 / 12.5**0.5, 4 / 12.5**0.5]),
    ("layernorm", [2.0, 1.0], [-2.0, 1.0]),
  ):
    decoder = Decoder(DecoderConfig(**sizes, norm=norm, norm_epsilon=1e-12))
    shapes = jax.eval_shape(lambda rng: nn.unbox(init_params(decoder, rng)), jax.random.key(0))  # noqa: B023
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    params["final_norm"]["scale"] = jnp.array(scale)
    np.testing.assert_allclose(_apply(decoder, {"params": params}, x, positions)[0, 0], expected, rtol=1e-6)


def _strength(call, inputs):
  """How much each hidden state depends on each input: [S, S], queries first."""
  return np.asarray(abs(jax.jit(jax.jacobian(lambda x: call(x)[0]))(inputs)[:, :, 0]).sum((1, 3)))


def test_causal_by_gradient():
  decoder, variables = _make()
  inputs = _normal(5, 1, 6, 12)
  positions = jnp.array([[0, 0, 0, 1, 1, 1]])  # tokens and their pauses
  strength = _strength(lambda x: decoder.apply(variables, x, positions), inputs)
  assert (strength[np.triu_indices(6, 1)] == 0).all()
  assert (strength[np.tril_indices(6)] > 1e-6).all()


@pytest.mark.parametrize("fields", [dict(), dict(scan_layers=True, remat="full")])
def test_mask_hides_by_gradient(fields):
  # W = 2; a pause (slots 1, 3, 5) is seen only by itself in every layer, so no indirect path exists either.
  decoder, variables = _make()
  if fields:
    decoder = Decoder(dataclasses.replace(decoder.config, **fields))
    variables = {"params": _stack(variables["params"], 2)}
  mask = np.tril(np.ones((6, 6), bool))
  for pause in (1, 3, 5):
    mask[pause + 1 :, pause] = False
  inputs = _normal(5, 1, 6, 12)
  positions = jnp.array([[0, 0, 1, 1, 2, 2]])
  strength = _strength(lambda x: decoder.apply(variables, x, positions, mask=mask[None, None]), inputs)
  assert ((strength > 1e-6) == mask).all()
  assert (strength[~mask] == 0).all()


def test_explicit_causal_mask_equals_no_mask():
  decoder, variables = _make()
  inputs = _normal(5, 2, 5, 12)
  positions = jnp.arange(5)[None]
  mask = np.tril(np.ones((5, 5), bool))[None, None]
  np.testing.assert_allclose(
    _apply(decoder, variables, inputs, positions, mask=mask),
    _apply(decoder, variables, inputs, positions),
    rtol=1e-6,
    atol=1e-6,
  )


def test_offset_moves_queries_and_keys_not_values():
  decoder, variables = _make()
  inputs = _normal(5, 2, 5, 12)
  positions = jnp.arange(5)[None]
  offset = _normal(6, 5, 12)
  plain = _apply(decoder, variables, inputs, positions)
  moved = _apply(decoder, variables, inputs, positions, query_key_offset=offset)
  # Slot 0 sees only itself: it reads its own value, which has no offset, whatever the attention weights are.
  np.testing.assert_allclose(moved[:, 0], plain[:, 0], rtol=1e-6, atol=1e-6)
  assert abs(moved[:, 1:] - plain[:, 1:]).max(-1).min() > 1e-3
  batched = jnp.broadcast_to(offset, (2, 5, 12))
  again = _apply(decoder, variables, inputs, positions, query_key_offset=batched)
  np.testing.assert_allclose(again, moved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("style", ["llama", "gemma3", "smollm3"])
def test_scan_and_remat_change_nothing(style):
  decoder, variables = _make(**_STYLES[style])
  inputs = _normal(5, 1, 4, 12)
  positions = jnp.arange(4)[None]
  weights = _normal(6, *inputs.shape)
  offset = _normal(7, 4, 12)

  def value_and_gradient(fields, variables):
    built = Decoder(dataclasses.replace(decoder.config, **fields))

    @jax.jit
    @jax.value_and_grad
    def loss(variables):
      return (built.apply(variables, inputs, positions, query_key_offset=offset) * weights).sum()

    return loss(variables)

  expected = value_and_gradient({}, variables)
  stacked = {"params": _stack(variables["params"], 2)}
  expected_stacked = expected[0], {"params": _stack(expected[1]["params"], 2)}
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, value_and_gradient(dict(remat="dots"), variables), expected)
  jax.tree.map(close, value_and_gradient(dict(scan_layers=True, remat="full"), stacked), expected_stacked)


def test_remat_recomputes():
  # Remat saves memory: the forward pass stores fewer residuals for the backward pass.
  inputs, positions = jnp.ones((1, 64, 12)), jnp.arange(64)[None]

  def kept(remat):
    decoder, variables = _make(remat=remat)
    call = functools.partial(decoder.apply, inputs=inputs, positions=positions)
    backward = jax.eval_shape(lambda variables: jax.vjp(call, variables)[1], variables)
    return sum(leaf.size for leaf in jax.tree.leaves(backward))

  assert kept("full") < kept("dots") < kept("none")


@pytest.mark.parametrize("style", ["gemma", "pythia"])
def test_bfloat16(style):
  decoder, variables = _make(**_STYLES[style], dtype="bfloat16", num_layers=1)
  tokens = jnp.arange(6)[None]

  def loss(variables):
    hidden = decoder.apply(variables, decoder.apply(variables, tokens, method="embed"), tokens)
    return hidden.astype(jnp.float32).sum(), hidden

  grads, hidden = jax.jit(jax.grad(loss, has_aux=True))(variables)
  assert hidden.dtype == jnp.bfloat16
  exact = _oracle(decoder.config, variables, tokens[0], tokens[0], np.tril(np.ones((6, 6), bool)))
  difference = np.abs(np.asarray(hidden, np.float32) - exact)
  assert difference.mean() < 0.05 * np.abs(exact).mean()
  for leaf in jax.tree.leaves(grads):
    assert leaf.dtype == jnp.float32
    assert jnp.isfinite(leaf).all()


def test_embed_and_unembedding():
  decoder, variables = _make(scale_embeddings=True)
  table = variables["params"]["embedding"]
  tokens = jnp.array([[[3, 0], [18, 3]]])  # any shape
  embedded = decoder.apply(variables, tokens, method="embed")
  np.testing.assert_allclose(embedded, table[tokens] * math.sqrt(12), rtol=1e-6)
  assert jnp.isnan(decoder.apply(variables, jnp.array([19]), method="embed")).all()
  assert decoder.apply(variables, method="unembedding") is table
  decoder, variables = _make(tied_embeddings=False)
  assert decoder.apply(variables, method="unembedding") is variables["params"]["unembedding"]
  assert "unembedding" in variables["params"]
  assert abs(variables["params"]["unembedding"] - variables["params"]["embedding"]).max() > 0.1


def test_logical_axes():
  decoder = Decoder(preset("tiny", vocab_size=20, scan_layers=True, tied_embeddings=False, norm="layernorm"))
  specs = nn.get_partition_spec(jax.eval_shape(functools.partial(init_params, decoder), jax.random.key(0)))
  specs = jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
  assert specs["embedding"] == specs["unembedding"] == ("vocab", "embed")
  assert specs["final_norm"] == {"scale": ("norm",), "bias": ("norm",)}
  layers = specs["layers"]
  assert layers["attention"]["query"]["kernel"] == ("layers", "embed", "heads", "head_size")
  assert layers["attention"]["value"]["kernel"] == ("layers", "embed", "kv_heads", "head_size")
  assert layers["attention"]["out"]["kernel"] == ("layers", "heads", "head_size", "embed")
  assert layers["mlp"]["up"]["kernel"] == ("layers", "embed", "mlp")
  assert layers["mlp"]["down"]["kernel"] == ("layers", "mlp", "embed")
  assert layers["mlp_norm"]["bias"] == ("layers", "norm")
  # Every axis of every parameter has a name; a bias has the names of the output axes.
  decoder = Decoder(preset("pythia_160m", num_layers=1))
  boxed = jax.eval_shape(functools.partial(init_params, decoder), jax.random.key(0))
  specs = nn.get_partition_spec(boxed)
  assert tuple(specs["layers_0"]["attention"]["query"]["bias"]) == ("heads", "head_size")
  specs = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
  leaves = jax.tree.leaves(nn.unbox(boxed))
  assert len(specs) == len(leaves)
  for spec, leaf in zip(specs, leaves):
    assert len(spec) == len(leaf.shape)
    assert None not in spec


# Scanned, because one layer compiles faster than many; an unrolled decoder has the same modules.
def _initial(**fields):
  sizes = dict(d_model=256, num_heads=4, num_kv_heads=2, head_size=32, mlp_size=512)
  config = DecoderConfig(vocab_size=400, num_layers=3, scan_layers=True, **sizes, **fields)
  params = jax.jit(functools.partial(init_params, Decoder(config)))(jax.random.key(0))
  params = jax.tree.map(np.asarray, nn.unbox(params))
  kernels = {**params["layers"]["attention"], **params["layers"]["mlp"]}
  deviations = {name: leaves["kernel"].std(axis=tuple(range(1, leaves["kernel"].ndim)))
                for name, leaves in kernels.items()}  # per layer  # fmt: skip
  return params, deviations


def test_normal_initial_scales():
  params, deviations = _initial(tied_embeddings=False)
  for name in ("query", "key", "value", "gate", "up"):
    np.testing.assert_allclose(deviations[name], 0.02, rtol=0.03)
  for name in ("out", "down"):
    np.testing.assert_allclose(deviations[name], 0.02 / 6**0.5, rtol=0.03)
  for name in ("embedding", "unembedding"):
    np.testing.assert_allclose(params[name].std(), 0.02, rtol=0.03)
  assert (params["layers"]["mlp_norm"]["scale"] == 1).all()
  kernel = params["layers"]["mlp"]["up"]["kernel"]
  assert abs(kernel[0] - kernel[1]).max() > 0.01  # each layer has its own


def test_scaled_initial_scales():
  params, deviations = _initial(tied_embeddings=False, initializer="scaled", norm="rmsnorm_plus_one")
  for name in ("query", "key", "value", "gate", "up"):
    np.testing.assert_allclose(deviations[name], 256**-0.5, rtol=0.03)
  np.testing.assert_allclose(deviations["out"], 128**-0.5, rtol=0.03)
  np.testing.assert_allclose(deviations["down"], 512**-0.5, rtol=0.03)
  np.testing.assert_allclose(params["embedding"].std(), 1, rtol=0.03)
  np.testing.assert_allclose(params["unembedding"].std(), 256**-0.5, rtol=0.03)
  assert abs(params["embedding"]).max() < 2.3  # truncated
  assert (params["layers"]["mlp_norm"]["scale"] == 0).all()


def test_scaled_tied_inputs_start_at_one():
  config = preset("gemma1_2b", vocab_size=400, num_layers=1, d_model=64, mlp_size=8, head_size=8)
  decoder = Decoder(config)
  # XLA removes the computation of the other parameters.
  table = jax.jit(lambda rng: nn.unbox(init_params(decoder, rng))["embedding"])(jax.random.key(0))
  inputs = _apply(decoder, {"params": {"embedding": table}}, np.arange(400), method="embed")
  np.testing.assert_allclose(np.asarray(inputs).std(), 1, rtol=0.03)


@pytest.mark.parametrize(
  ("name", "count"),
  [
    ("nano", 188_864),
    ("tiny", 1_475_200),
    ("small", 10_490_112),
    ("medium", 31_465_984),
    ("gpt2_124m", 124_439_808 - 1024 * 768),
    ("smollm2_135m", 134_515_008),
    ("pythia_160m", 162_322_944),
    ("pythia_410m", 405_334_016),
    ("llama_1b", 1_235_814_400),
    ("gemma1_2b", 2_506_172_416),
    ("gemma1_7b", 8_537_680_896),
  ],
)
def test_preset_sizes(name, count):
  assert num_params(preset(name, scan_layers=True)) == count
  if name in ("tiny", "small", "gpt2_124m"):
    assert num_params(preset(name)) == count


def test_every_preset_is_tested():
  assert len(PRESETS) == 11


def test_preset_overrides():
  config = preset("tiny", vocab_size=301, dtype="bfloat16")
  assert (config.vocab_size, config.dtype) == (301, "bfloat16")
  assert PRESETS["tiny"].vocab_size == 8192
  # The shapes of a decoder with cuDNN attention can be computed on a machine without cuDNN.
  assert num_params(preset("tiny", dtype="bfloat16", attention="cudnn")) == num_params(preset("tiny"))
  with pytest.raises(InputError, match=r"decoder\.preset: 'tny' is unknown; did you mean 'tiny'\?"):
    preset("tny")
  with pytest.raises(InputError, match=r"decoder\.layers: unknown field, got 3; did you mean 'num_layers'\?"):
    preset("tiny", layers=3)
  with pytest.raises(InputError, match=r"decoder\.num_layers: 0 "):
    preset("tiny", num_layers=0)


@pytest.mark.parametrize(
  ("field", "value", "wanted"),
  [
    ("vocab_size", 0, "at least 1"),
    ("num_layers", 2.0, "a whole number"),
    ("num_heads", True, "a whole number"),
    ("num_kv_heads", 3, r"a divisor of decoder\.num_heads = 4"),
    ("norm", "batchnorm", "rmsnorm, rmsnorm_plus_one, layernorm"),
    ("norm_epsilon", 0, "positive"),
    ("activation", "relu", "silu, gelu, gelu_tanh"),
    ("gated_mlp", 1, "True or False"),
    ("attention_bias", True, "none, qkv, all"),
    ("rope_base", -1.0, "positive"),
    ("rope_base", math.nan, "positive"),
    ("rope_fraction", 1.5, r"in \(0, 1\]"),
    ("rope_fraction", 0.375, r"even part of decoder\.head_size = 8"),
    ("rope_fraction", 0.3, r"even part of decoder\.head_size = 8"),
    ("soft_cap", 0.0, "None for no cap"),
    ("norm_placement", "sandwich", "before, after, both"),
    ("query_key_norm", True, "none, head, all"),
    ("query_scalar", 0, "positive"),
    ("attention_soft_cap", -1.0, "None for no cap"),
    ("window", 0, "None for no window"),
    ("global_every", 1.5, "None if all layers are alike"),
    ("global_rope", False, r"True without decoder\.global_every"),
    ("local_rope_base", 100.0, r"None without decoder\.global_every"),
    ("learned_positions", 0, "None for RoPE"),
    ("initializer", "zeros", "normal, scaled"),
    ("dtype", "float16", "float32, bfloat16"),
    ("param_dtype", "int4", "float32, bfloat16, int8, nf4"),
    ("attention", "flash", "auto, xla, blocks, cudnn"),
    ("attention", "cudnn", "bfloat16"),
    ("remat", "some", "none, full, dots"),
    ("scan_layers", "yes", "True or False"),
  ],
)
def test_bad_fields(field, value, wanted):
  with pytest.raises(InputError, match=wanted) as caught:
    DecoderConfig(**{**_SIZES, field: value})
  message = str(caught.value)
  assert message.startswith(f"decoder.{field}: {value!r} must be ")
  assert "\n" not in message


@pytest.mark.parametrize(
  ("style", "scan_layers"),
  [
    ("llama", False), ("gemma", False), ("pythia", False), ("pythia", True), ("gemma2", False), ("gemma3", True),
    ("gpt2_learned", False), ("local_without_rope", True),
  ],
)  # fmt: skip
@pytest.mark.parametrize("in_parts", [False, True])
def test_slots_run_on_a_cache_equal_slots_run_together(monkeypatch, style, scan_layers, in_parts, exact):
  """Slots run in pieces; rows hold different numbers of slots; one slot is dropped; the first entries are hidden."""
  if in_parts:  # of 1, 2, 4 and all 7 entries
    monkeypatch.setattr(cache_module, "_SHORTEST_PART", 1)
    monkeypatch.setattr(cache_module, "_SMALL_BYTES", 1)
    monkeypatch.setattr(cache_module, "_MULTIPLE", 1)
  decoder, params = _make(**_STYLES[style])
  inputs, positions = _normal(0, 2, 6, 12), jnp.array([[0, 0, 1, 1, 2, 2]] * 2)
  full = _apply(decoder, params, inputs, positions)
  if scan_layers:
    decoder = Decoder(dataclasses.replace(decoder.config, scan_layers=True))
    params = {"params": _stack(params["params"], 2)}
  extend = functools.partial(_apply, decoder, params, method="extend")
  close = {"rtol": 1e-4, "atol": 1e-4}
  hidden, cache = extend(inputs[:, :4], positions[:, :4], empty_cache(decoder.config, 2, 7), None)
  np.testing.assert_allclose(hidden, full[:, :4], **close)
  hidden, _ = extend(inputs[:, 4:], positions[:, 4:], cache, jnp.array([4, 4]))
  np.testing.assert_allclose(hidden, full[:, 4:], **close)
  # The second row drops its fourth slot and runs it again.
  rows, places = jnp.arange(2)[:, None], jnp.array([[4, 5], [3, 4]])
  hidden, cache = extend(inputs[rows, places], positions[rows, places], cache, places[:, 0])
  np.testing.assert_allclose(hidden, full[rows, places], **close)
  # Only the entries from index 2 on are seen.
  hidden, _ = extend(inputs[:, 5:], positions[:, 5:], cache, jnp.array([5, 4]), first=jnp.array([2, 2]))
  # The cached keys and values of deeper layers still depend on the hidden entries.
  assert not np.allclose(hidden[0, 0], full[0, 5], atol=1e-2)
  with pytest.raises(ValueError, match="cache: capacity 7 is too small for 8 new slots"):
    extend(jnp.zeros((2, 8, 12)), jnp.zeros((2, 8), int), cache, None)


@pytest.mark.parametrize(
  ("capacity", "parts"),
  [
    (1, (1,)),
    (1023, (1023,)),
    (1024, (512, 1024)),
    (4104, (576, 1088, 2112, 4104)),
    (40_000, (5056, 10048, 20032, 40_000)),
  ],
)
def test_parts_of_a_cache_by_hand(capacity, parts):
  def of(batch, capacity, *layers):
    return cache_module.parts(jax.ShapeDtypeStruct((*layers, batch, capacity, 4, 16), jnp.float32))

  assert of(8, capacity) == of(8, capacity, 3) == parts
  # Half as many bytes for each entry need twice as many entries.
  assert of(4, 1024) == (1024,)
  assert of(4, 2048) == (1024, 2048)


def test_the_smallest_part_with_all_new_slots_is_read():
  """Rows whose last new slot has the index 511 read 512 of 1,024 entries; one slot more reads all."""

  def read(*start):
    return int(cache_module.read_filled(jnp.asarray, jnp.array(start), 3, (512, 1024)))

  assert [read(0, 509), read(509, 0), read(510, 0), read(0, 1021)] == [512, 512, 1024, 1024]
  assert cache_module.mean_part((512, 1024), 511, 514) == (512 + 512 + 1024 + 1024) / 4


def test_entries_behind_the_filled_part_are_not_read(monkeypatch):
  """NaN behind the part that is read stays unseen, also as a product with a weight of 0."""
  monkeypatch.setattr(cache_module, "_SMALL_BYTES", 1)
  decoder, params = _make()
  cache = empty_cache(decoder.config, 2, 1024)
  poisoned = jax.tree.map(lambda x: x.at[:, 512:].set(jnp.nan), cache)
  inputs, positions = _normal(0, 2, 1, 12), jnp.zeros((2, 1), jnp.int32)
  hidden, _ = _apply(decoder, params, inputs, positions, poisoned, jnp.array([0, 511]), method="extend")
  assert np.isfinite(hidden).all()


def test_cache_mask_by_hand():
  seen = cache_mask(jnp.array([2, 0]), 2, 5, jnp.array([1, 0]))
  assert seen.astype(int).tolist() == [
    [[[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]]],
    [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]],
  ]
  cached = write(jnp.zeros((2, 4, 1, 1)), jnp.array([[1.0, 2.0], [3.0, 4.0]])[..., None, None], jnp.array([1, 2]))
  assert cached[..., 0, 0].tolist() == [[0, 1, 2, 0], [0, 0, 3, 4]]
