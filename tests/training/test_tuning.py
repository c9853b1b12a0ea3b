"""Adapters, training only new rows, separate rates: by hand, against the merged decoder, in steps and in runs."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from models import TINY, VOCABULARY, assert_trees_close, assert_trees_equal, random_batch, tiny_config, with_part

from cyb_jax import configs, methods, training
from cyb_jax.checkpointing.manager import Checkpoints
from cyb_jax.decoder import Decoder, LoraConfig, empty_cache, init_params, merge_lora
from cyb_jax.decoder.config import TARGETS
from cyb_jax.decoder.lora import LEAVES
from cyb_jax.errors import InputError
from cyb_jax.interop import pretrained
from cyb_jax.methods import configure
from cyb_jax.methods.parameters import trained_part, with_trained
from cyb_jax.partitioning.mesh import data_shards, make_mesh

LORA = LoraConfig(rank=3, alpha=6.0, targets=TARGETS)
ADAPTED = dataclasses.replace(TINY, lora=LORA)
# Heads, biases and a parallel residual, which other families have.
BIASED = dataclasses.replace(
  ADAPTED, attention_bias="all", mlp_bias=True, parallel_residual=True, gated_mlp=False,
  lora=dataclasses.replace(LORA, targets=("key", "out", "up", "down")),
)  # fmt: skip


def fresh(config, seed=0):
  return jax.jit(lambda: nn.unbox(init_params(Decoder(config), jax.random.key(seed))))()


def taught(params, seed=1):
  """With nonzero B."""
  leaves, tree = jax.tree_util.tree_flatten_with_path(params)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  drawn = [jax.random.normal(k, x.shape) * 0.1 if path[-1].key == "lora_b" else x for k, (path, x) in zip(keys, leaves)]
  return jax.tree.unflatten(tree, drawn)


def without_adapters(params):
  return trained_part(params, lambda path: path[-1] not in LEAVES)


def hidden(config, params, seed=3):
  inputs = jax.random.normal(jax.random.key(seed), (2, 6, config.d_model))
  positions = jnp.arange(6)[None]
  return jax.jit(lambda p: Decoder(config).apply({"params": p}, inputs, positions))(params)


@pytest.mark.slow
@pytest.mark.parametrize("config", [ADAPTED, BIASED, dataclasses.replace(ADAPTED, scan_layers=True)])
def test_equals_the_base_model_at_the_start_and_merges_into_a_plain_decoder(config, exact):
  base = dataclasses.replace(config, lora=None)
  params = fresh(config)
  np.testing.assert_array_equal(hidden(config, params), hidden(base, without_adapters(params)))
  params = taught(params)
  plain, plain_config = merge_lora(params, config)
  assert plain_config == base
  assert jax.tree.structure(plain) == jax.tree.structure(without_adapters(params))
  got = hidden(config, params)
  np.testing.assert_allclose(got, hidden(base, plain), rtol=2e-5, atol=2e-5)
  assert np.abs(got - hidden(base, without_adapters(params))).max() > 0.01


def test_merged_matrices_by_hand():
  params = taught(fresh(ADAPTED))
  out = params["layers_1"]["attention"]["out"]
  assert out["lora_a"].shape == (2, 8, 3)
  assert out["lora_b"].shape == (3, 16)
  plain, _ = merge_lora(params, ADAPTED)
  expected = np.asarray(out["kernel"], np.float64) + 2.0 * np.einsum("nhr,rd->nhd", out["lora_a"], out["lora_b"])
  np.testing.assert_allclose(plain["layers_1"]["attention"]["out"]["kernel"], expected, rtol=1e-5, atol=1e-6)
  unchanged = merge_lora(plain, TINY)
  assert unchanged == (plain, TINY)


def test_a_base_in_bfloat16_merges_into_float32():
  config = dataclasses.replace(ADAPTED, param_dtype="bfloat16")
  params = fresh(config)
  kinds = {path[-1].key: x.dtype.name for path, x in jax.tree_util.tree_leaves_with_path(params)}
  assert (kinds["kernel"], kinds["scale"], kinds["lora_a"], kinds["lora_b"]) == ("bfloat16",) * 2 + ("float32",) * 2
  # A small update that bfloat16 rounding would lose.
  params["layers_0"]["mlp"]["up"]["lora_b"] += 1e-5
  plain, plain_config = merge_lora(params, config)
  assert plain_config.param_dtype == "float32"
  assert {x.dtype.name for x in jax.tree.leaves(plain)} == {"float32"}
  assert (plain["layers_0"]["mlp"]["up"]["kernel"] != params["layers_0"]["mlp"]["up"]["kernel"]).any()


@pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_cached_decoding_uses_the_adapters(scan_layers, exact):
  config = dataclasses.replace(ADAPTED, scan_layers=scan_layers)
  params, decoder = taught(fresh(config)), Decoder(config)
  inputs = jax.random.normal(jax.random.key(3), (2, 6, config.d_model))
  cache = empty_cache(config, 2, 6)
  positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
  extend = jax.jit(functools.partial(decoder.apply, method="extend"))
  first, cache = extend({"params": params}, inputs[:, :4], positions[:, :4], cache, None)
  rest, _ = extend({"params": params}, inputs[:, 4:], positions[:, 4:], cache, jnp.array([4, 4]))
  np.testing.assert_allclose(jnp.concatenate([first, rest], 1), hidden(config, params), rtol=2e-5, atol=2e-5)


def tuned(weights="lora", *, method=None, **changes):
  """A config in which only a part is trained, with the values that flags would set."""
  config = tiny_config(**({"pauses": 2, "dont_know": "unit", "calibration_batches": 1} if method is None else method))
  config.init_from = "runs/plain"
  config.tuning.update(weights=weights, lora_rank=2, lora_targets="query,value,down")
  for path, value in changes.items():
    part, _, name = path.partition("__")
    config[part][name] = value
  return configs.freeze(config)


def flat(tree, path=()):
  """Leaves by path."""
  if not isinstance(tree, dict):
    return {path: tree}
  return {k: v for name, part in tree.items() for k, v in flat(part, (*path, name)).items()}


def test_trained_parameters():
  params = jax.eval_shape(lambda: nn.unbox(tuned().build_method(VOCABULARY).init(jax.random.key(0))))
  new = {"pause_input", "dont_know", "dont_know_bias"}
  places = ("attention/query", "attention/value", "mlp/down")
  adapters = {f"decoder/layers_0/{place}/{leaf}" for place in places for leaf in LEAVES}
  for weights, expected in (("lora", new | adapters), ("new", new)):
    method = tuned(weights).build_method(VOCABULARY)
    # The calibrated offset isn't trained.
    part = trained_part(params, method.is_trained)
    assert {"/".join(path) for path in flat(part)} == expected
    assert with_trained(params, part) == params
  everything = tuned("all").build_method(VOCABULARY)
  assert trained_part(params, everything.is_trained) == params


def run(config, *, devices=1, steps=3):
  """(the logical state at the start, the state after some steps)."""
  mesh = make_mesh(config.parallelism, jax.devices()[:devices])
  method = config.build_method(VOCABULARY, data_shards=data_shards(mesh))
  optimizer = training.make_optimizer(config.optimizer, 10, 16, new_rate=config.tuning.new_rate)
  strategy = training.build_strategy(config, method, optimizer, mesh)
  state = strategy.init()
  start = jax.device_get(strategy.global_state(state))
  with jax.default_matmul_precision("highest"):
    for step in range(steps):
      state = strategy.step(state, strategy.shard_batch(random_batch(step, 8, 6, uneven=True)))
  return start, jax.device_get(strategy.global_state(state))


@pytest.fixture(scope="module")
def one_device():
  return run(tuned())


def test_a_step_changes_only_trained_parameters_and_only_they_have_moments(one_device):
  start, after = one_device
  is_trained = tuned().build_method(VOCABULARY).is_trained
  before, now = flat(start.params), flat(after.params)
  assert {path for path in before if (before[path] != now[path]).any()} == set(filter(is_trained, before))
  size = sum(x.size for x in jax.tree.leaves(trained_part(start.params, is_trained)))
  moments = [x for x in jax.tree.leaves(after.opt_state) if x.ndim or x.dtype != jnp.int32]
  assert sum(x.size for x in moments) == 2 * size < sum(x.size for x in jax.tree.leaves(start.params)) / 2


@pytest.mark.slow
def test_the_gradient_equals_that_of_the_fully_trained_model(exact):
  """With a frozen readout and frozen matrices, the remaining gradients must be equal."""
  frozen = tuned(method={"pauses": 2, "loss": "ap"}).build_method(VOCABULARY)
  whole = methods.build(frozen.config, frozen.decoder.config, vocab_size=VOCABULARY)
  params = nn.unbox(frozen.init(jax.random.key(0)))
  params["decoder"] = taught(params["decoder"])
  batch = random_batch(1)

  def loss(part, method):
    return method.loss(with_trained(params, part), batch, jax.random.key(0)).loss.sum()

  part = trained_part(params, frozen.is_trained)
  got = jax.jit(jax.grad(functools.partial(loss, method=frozen)))(part)
  want = jax.jit(jax.grad(functools.partial(loss, method=whole)))(params)
  assert_trees_close(got, trained_part(want, frozen.is_trained), rtol=1e-4, atol=1e-6)
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(got))


@pytest.mark.slow
def test_scanned_rematerialised_and_accumulated():
  plain = tuned(decoder__num_layers=2, decoder__scan_layers=True)
  _, whole = run(plain)
  config = with_part(with_part(plain, "optimizer", accumulate=2), "parallelism", fsdp=2, tensor=2)
  config = dataclasses.replace(config, decoder=dict(config.decoder) | {"remat": "full"})
  _, parts = run(config, devices=4)
  assert parts.params["decoder"]["layers"]["mlp"]["down"]["lora_a"].shape == (2, 32, 2)
  assert_trees_close(parts.params, whole.params, rtol=1e-4, atol=2e-5)


def test_adapters_are_split_like_their_matrices():
  config = with_part(tuned(), "parallelism", fsdp=2, tensor=2)
  mesh = make_mesh(config.parallelism, jax.devices()[:4])
  optimizer = training.make_optimizer(config.optimizer, 10, 16)
  abstract = training.build_strategy(config, config.build_method(VOCABULARY), optimizer, mesh).abstract()
  query = abstract.params["decoder"]["layers_0"]["attention"]["query"]
  assert query["lora_a"].sharding.spec == P("fsdp", None)
  assert query["lora_b"].sharding.spec == P(None, "tensor", None)


@pytest.mark.slow
def test_nonfinite_steps_are_not_applied():
  method = tuned().build_method(VOCABULARY)
  loss = method.loss
  method.loss = lambda *a: dataclasses.replace(loss(*a), loss=loss(*a).loss + jnp.inf, total=None)
  optimizer = training.make_optimizer(tuned().optimizer, 10, 16)
  start = training.unbox(training.init_state(method, optimizer, 0))
  after = jax.jit(functools.partial(training.train_step, method=method, optimizer=optimizer, seed=0))(
    start, random_batch()
  )
  assert_trees_equal(after.params, start.params)
  assert int(after.totals.skipped) == 1


def test_new_rows_have_their_own_rate():
  params = {"decoder": {"lora_a": jnp.full(3, 0.5)}, "pause_input": jnp.ones((2, 3)), "dont_know": jnp.ones(3)}
  gradient = jax.tree.map(lambda x: 0.1 * x, params)
  config = tuned().optimizer

  def moved(**options):
    optimizer = training.make_optimizer(config, 10, 16, **options)
    state = optimizer.init(params)
    now = params
    for _ in range(2):
      updates, state = optimizer.update(gradient, state, now)
      now = optax.apply_updates(now, updates)
    return jax.tree.map(lambda a, b: a - b, now, params), jax.tree.structure(state)

  (once, plain), (tenfold, _), (still, _) = moved(), moved(new_rate=10.0), moved(new_rate=0.0)
  # At 1, the optimizer is unchanged, including its state.
  assert moved(new_rate=1.0)[1] == plain
  for name in ("pause_input", "dont_know"):
    np.testing.assert_allclose(tenfold[name], 10 * once[name], rtol=1e-5)
    assert (once[name] != 0).all()
    assert (still[name] == 0).all()
  np.testing.assert_array_equal(tenfold["decoder"]["lora_a"], once["decoder"]["lora_a"])


def test_a_base_in_bfloat16_is_not_changed():
  start, after = run(tuned("new", precision__params="bfloat16"), steps=1)
  is_trained = tuned("new").build_method(VOCABULARY).is_trained
  for path, leaf in flat(after.params).items():
    assert leaf.dtype == (jnp.bfloat16 if path[0] == "decoder" else jnp.float32), path
    assert is_trained(path) != np.array_equal(leaf, flat(start.params)[path])
  assert np.isfinite(after.totals.loss)


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("base") / "plain"
  config = tiny_config(name="baseline")
  config.train.update(steps=2, eval_every=0)
  training.train(configs.freeze(config), folder)
  return folder


@pytest.mark.slow
def test_a_run_from_a_run(base_run, tmp_path, monkeypatch):
  """Initialised from a run, stopped and continued bit-exactly; with merged adapters, it can initialise another run."""
  config = tiny_config(pauses=1, calibration_batches=1)
  config.init_from = str(base_run)
  config.tuning.update(weights="lora", lora_rank=2)
  config.precision.params = "bfloat16"
  config.train.update(steps=4, eval_every=0, checkpoint_every=2, log_every=1)
  config = configs.freeze(config)
  whole = training.train(config, tmp_path / "whole")
  # A checkpoint of step 2 is the state of a killed run.
  save = Checkpoints.save

  def dying(self, step, *args, **options):
    save(self, step, *args, **options)
    self.wait()
    raise KeyboardInterrupt

  monkeypatch.setattr(Checkpoints, "save", dying)
  with pytest.raises(KeyboardInterrupt):
    training.train(config, tmp_path / "killed")
  monkeypatch.setattr(Checkpoints, "save", save)
  assert training.train(config, tmp_path / "killed") == whole
  a, b = (pretrained.load_run(tmp_path / name) for name in ("whole", "killed"))
  assert_trees_equal(a.params, b.params)
  base = pretrained.load_run(base_run).params["decoder"]
  kept = without_adapters(a.params["decoder"])
  assert_trees_equal(kept, jax.tree.map(lambda x: x.astype(jnp.bfloat16), base))
  assert a.params["dont_know_offset"] != 0

  following = tiny_config(pauses=1, calibration_batches=1)
  following.init_from = str(tmp_path / "whole")
  following.train.update(steps=0, epochs=0.0, eval_every=0)
  training.train(configs.freeze(following), tmp_path / "next")
  merged, _ = merge_lora(a.params["decoder"], a.method.decoder.config)
  assert_trees_equal(pretrained.load_run(tmp_path / "next").params["decoder"], merged)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"tuning__weights": "some"}, r"tuning\.weights: 'some' must be 'all', 'lora' or 'new'"),
    ({"tuning__lora_rank": 0}, r"tuning\.lora_rank: 0 must be a whole number of at least 1"),
    ({"tuning__lora_alpha": 0.0}, r"tuning\.lora_alpha: 0.0 must be positive"),
    ({"tuning__lora_targets": "query,keys"}, r"tuning\.lora_targets: 'query,keys' must be some of query, key"),
    ({"tuning__lora_targets": ""}, r"tuning\.lora_targets: '' must be some of"),
    ({"tuning__lora_targets": "up,up"}, r"tuning\.lora_targets: 'up,up' must be some of .* each once"),
    ({"tuning__lora_targets": "gate", "decoder__gated_mlp": False}, r"tuning\.lora_targets: 'gate' names 'gate'"),
    ({"tuning__new_rate": -1.0}, r"tuning\.new_rate: -1.0 must be not negative"),
    ({"tuning__new_rate": float("nan")}, r"tuning\.new_rate: nan must be finite"),
    ({"precision__params": "float16"}, r"precision\.params: 'float16' must be one of float32, bfloat16"),
    (
      {"tuning__weights": "all", "precision__params": "bfloat16"},
      r"precision\.params: 'bfloat16' must be float32 if tuning\.weights = 'all'",
    ),
  ],
)
def test_bad_fields(changes, message):
  with pytest.raises(InputError, match=message) as info:
    tuned(**changes)
  assert "\n" not in str(info.value)


@pytest.mark.parametrize("weights", ["lora", "new"])
def test_random_weights_are_not_tuned(weights):
  config = configs.default()
  config.tuning.weights = weights
  with pytest.raises(InputError, match=rf"init_from: '' with tuning\.weights = '{weights}'"):
    configs.freeze(config)


def test_training_only_new_rows_requires_new_rows():
  method = {"name": "baseline"}
  message = r"tuning\.weights: 'new', but method 'baseline' with these options has no new rows; give 'lora' or 'all'"
  with pytest.raises(InputError, match=message):
    tuned("new", method=method)
  tuned("lora", method=method)
  tuned("new", method={"name": "tbys", "pauses": 1})


def test_bfloat16_is_allowed_for_untrained_weights():
  config = tuned("all", precision__params="bfloat16", train__steps=0, train__epochs=0.0)
  assert config.decoder_config(VOCABULARY).param_dtype == "bfloat16"


def test_configs_of_earlier_versions_have_no_tuning():
  source = configs.default().to_dict()
  source.pop("tuning")
  source["precision"].pop("params")
  config = configs.freeze(source)
  assert config.decoder_config(VOCABULARY).lora is None
  assert configs.differences(source, configs.default().to_dict()) == []
  assert methods.build(configure(), TINY).is_trained(("decoder", "embedding"))
