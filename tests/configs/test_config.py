"""Configs: defaults are valid, every invalid field is one clear error, lists have colons as separators."""

import json

import ml_collections
import pytest

from cyb_jax import command_line, configs
from cyb_jax.errors import InputError
from cyb_jax.studies import settings


def frozen(**changes):
  config = configs.default()
  for path, value in changes.items():
    part, _, name = path.partition("__")
    config[part][name] = value
  return configs.freeze(config)


def test_default_is_valid_and_survives_json():
  config = frozen()
  assert config.method.pauses == 3
  assert config.method.omega is None
  again = configs.freeze(json.loads(configs.to_json(config)))
  assert again == config


def test_lists_have_colons_as_separators():
  assert frozen(method__omega="1:0:0:1").method.omega == (1.0, 0.0, 0.0, 1.0)
  # The default if it isn't set; VA and DP accept no other value.
  assert frozen(method__omega="0:0:0:2").method.omega is None
  assert frozen(method__gamma="linear:0.9").method.gamma == pytest.approx((1.0, 0.9, 0.8, 0.7))
  assert frozen(method__gamma="exponential:0.5").method.gamma == pytest.approx((1.0, 0.5, 0.25, 0.125))
  assert frozen(method__omega="").method.omega is None


def test_no_prior_shift_can_be_requested():
  assert frozen(method__dont_know_prior=None).method.dont_know_prior is None


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"method__omega": "0:0:1"}, r"method\.omega: shape \(3,\), but there are 4 slots.*W = pauses \+ 1 = 4"),
    ({"method__omega": "0:-1:0:1"}, r"method\.omega: 0:-1:0:1 must be finite and not negative"),
    ({"method__omega": "0:0:0:0"}, r"method\.omega: 0:0:0:0 is all zero"),
    ({"method__omega": "a:b"}, r"method\.omega: 'a:b' must be 4 numbers such as '1:1:1:1'"),
    ({"method__gamma": "linear:x"}, r"method\.gamma: 'linear:x' must be 4 numbers .* 'linear:0.9'"),
    ({"method__gamma": "linear:0.5"}, r"method\.gamma: .*falls to -0.5"),
    ({"method__loss": "va"}, r"method\.rho: not set"),
    ({"method__loss": "va", "method__rho": "1:0:1:1"}, r"method\.rho: 1:0:1:1 must be positive"),
    ({"method__pauses": -1}, r"method\.pauses: -1 must be a whole number"),
    ({"method__name": "cybb"}, r"method\.name: 'cybb' is unknown; did you mean 'cyb'"),
    ({"method__alpha": 0.5}, r"method\.alpha: 0.5 is set"),
    ({"decoder__preset": "huge"}, r"decoder\.preset: 'huge' is unknown; there are nano, tiny, small"),
    ({"decoder__num_heads": 3}, r"decoder\.num_kv_heads"),
    ({"data__sequence_length": 0}, r"data\.sequence_length: 0 must be at least 1"),
    ({"data__batch_size": 0}, r"data\.batch_size: 0 must be at least 1"),
    ({"data__fraction": 0.0}, r"data\.fraction: 0.0 must be in \(0, 1\]"),
    ({"data__options": "pattern"}, r"data\.options: 'pattern' is not of the form key=value"),
    ({"optimizer__learning_rate": 0.0}, r"optimizer\.learning_rate: 0.0 must be positive"),
    ({"optimizer__schedule": "linear"}, r"optimizer\.schedule: 'linear' must be 'cosine', 'wsd' or 'constant'"),
    ({"optimizer__accumulate": 3}, r"optimizer\.accumulate: 3 must be .* divisor of data.batch_size = 16"),
    ({"optimizer__beta2": 1.0}, r"optimizer\.beta2: 1.0"),
    ({"train__steps": -1}, r"train\.steps: -1"),
    ({"train__seed": 2**32}, r"train\.seed: 4294967296 must be in \[0, 2\^32\)"),
    ({"train__seed": 2**63}, r"train\.seed: 9223372036854775808 must be in \[0, 2\^32\)"),
    ({"train__seed": -1}, r"train\.seed: -1 must be in \[0, 2\^32\)"),
    ({"data__seed": 2**32}, r"data\.seed: 4294967296 must be in \[0, 2\^32\)"),
    ({"train__keep": 0}, r"train\.keep: 0"),
    ({"train__epochs": float("inf")}, r"train\.epochs: inf must be finite"),
    ({"train__collapse_warning": -3.0}, r"train\.collapse_warning: -3.0 must be in"),
    ({"optimizer__learning_rate": float("inf")}, r"optimizer\.learning_rate: inf must be finite"),
    (
      {"method__omega": "1:0:0:0", "method__gamma": "0:1:1:1"},
      r"method\.gamma: .* is zero at every slot of a token with 1 slots",
    ),
    ({"method__loss": "va", "method__rho": "1:1e-50:1:1"}, r"method\.rho: 1:1e-50:1:1 must be positive"),
    ({"parallelism__strategy": "xmap"}, r"parallelism\.strategy: 'xmap' must be 'jit' or 'pmap'"),
    ({"parallelism__strategy": "pmap", "parallelism__tensor": 2}, r"parallelism\.tensor: 2 must be 1 under .*'pmap'"),
    ({"precision__activations": "float16"}, r"precision\.activations: 'float16' must be one of auto"),
  ],
)
def test_bad_fields(changes, message):
  with pytest.raises(InputError, match=message) as info:
    frozen(**changes)
  assert "\n" not in str(info.value)


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ({"method": {"pausess": 1}}, r"config\.method\.pausess: unknown field; did you mean method\.pauses\?"),
    ({"methods": {}}, r"config\.methods: unknown field; did you mean method\?"),
    ({"train": {"zzz": 1}}, r"config\.train\.zzz: unknown field; there are steps, epochs"),
    ({"decoder": {"layers": 1}}, r"config\.decoder\.layers: unknown field"),
    ({"train": {"steps": "many"}}, r"train\.steps: 'many' must be int"),
    ({"train": {"steps": True}}, r"train\.steps: True must be int"),
    ({"train": 3}, r"config\.train: 3 must be a group of fields"),
    ({"init_from": 3}, r"init_from: 3 must be a folder or a file"),
  ],
)
def test_unknown_fields_and_types(source, message):
  with pytest.raises(InputError, match=message):
    configs.freeze(source)


def test_integers_are_accepted_for_floats():
  config = configs.freeze({"train": {"epochs": 2}})
  assert config.train.epochs == 2.0


def test_vocabulary_is_rounded_up_for_sharding():
  config = frozen()
  assert config.decoder_config(1000).vocab_size == 1024
  assert config.decoder_config(1024).vocab_size == 1024
  with pytest.raises(InputError, match=r"decoder\.vocab_size: 512, but the tokenizer has 1000"):
    frozen(decoder__vocab_size=512).decoder_config(1000)


def test_differences_omit_fields_that_do_not_affect_results():
  a, b = configs.default(), configs.default()
  b.parallelism.strategy = "pmap"
  b.train.keep = 5
  assert configs.differences(a.to_dict(), b.to_dict()) == []
  b.train.steps = 7
  assert configs.differences(a.to_dict(), b.to_dict()) == ["train.steps: 0 -> 7"]


@pytest.mark.parametrize("setting", settings.SETTINGS)
def test_every_setting_is_valid(setting):
  config = configs.default()
  settings.apply(config, setting, "tiny", "1x1")
  frozen = configs.freeze(config)
  assert frozen.data.fraction == pytest.approx(1 / 3)
  pauses = 0 if setting in ("looped", "pause_training") else settings.SETTINGS[setting].get("pauses", 0)
  assert frozen.build_method().num_slots == pauses + 1


def test_settings_are_the_rows_of_the_paper():
  assert settings.SETTINGS["dp_early_strong"] == {
    "name": "cyb", "loss": "dp", "pauses": 3, "rho": "11:3:3:3", "alpha": 0.1,
  }  # fmt: skip
  assert settings.SETTINGS["va_bimodal"]["rho"] == "4:1:1:4"
  assert settings.SETTINGS["ap_uniform"]["omega"] == "1:1:1:1"
  assert settings.REGIMES == {"1x1": (1, 1), "2x1": (2, 1), "1x2": (1, 2), "1x3": (1, 3)}


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("app", r"setting 'app' is unknown; did you mean 'ap'"),
    ("ap,tinny", r"size 'tinny' is unknown; did you mean 'tiny'"),
    ("ap,tiny,4x4", r"data regime '4x4' is unknown"),
    ("ap,tiny,1x1,0", r"has 4 parts"),
  ],
)
def test_bad_arguments(argument, message):
  with pytest.raises(InputError, match=message):
    settings.parse(argument, setting="ap", size="tiny", regime="1x1")


def test_parse_fills_in():
  assert settings.parse(",small", setting="ap", size="tiny", regime="1x1") == ("ap", "small", "1x1")
  assert settings.parse(None, setting="ap", size="tiny", regime="1x1") == ("ap", "tiny", "1x1")


def test_configs_for_fine_tuning():
  """Their decoder is the decoder of init_from, which is set here."""
  from experiments import smollm2_c4, smollm2_reviews

  for module, argument in ((smollm2_reviews, "ap,lora"), (smollm2_c4, "dp_early"), (smollm2_c4, "pretrained")):
    config = module.get_config(argument)
    config.decoder.preset, config.init_from = "smollm2_135m", "somewhere"
    config = configs.freeze(config)
    assert config.tokenizer == "somewhere"
    assert config.tuning.weights == ("lora" if argument == "ap,lora" else "all")
    assert config.build_method().num_slots == (1 if argument == "pretrained" else 4)
    # The default initial d is one half; the paper's setting has its prior and no calibration. Neither fixes d.
    options = getattr(config.method, "dont_know_prior", None), getattr(config.method, "calibration_batches", 0)
    assert options == {"ap,lora": (0.5, 4), "dp_early": (0.9, 0), "pretrained": (None, 0)}[argument]
    assert getattr(config.method, "stopping_warmup", 0) == 0
  with pytest.raises(InputError, match=r"tuning\.weights 'half' is unknown"):
    smollm2_reviews.get_config("ap,half")
  with pytest.raises(InputError, match="at most the two SETTING,WEIGHTS"):
    smollm2_reviews.get_config("ap,all,x")


@pytest.mark.parametrize("name", ["quickstart", "reviews", "finetune_reviews", "c4", "gemma2b_c4"])
@pytest.mark.parametrize("setting", ["baseline", "ap", "va_early", "pretrained"])
def test_experiments_are_valid(name, setting):
  import importlib

  module = importlib.import_module(f"experiments.{name}")
  config = module.get_config(setting)
  assert isinstance(config, ml_collections.ConfigDict)
  frozen = configs.freeze(config)
  expected = settings.SETTINGS[setting]
  assert (frozen.method.name, getattr(frozen.method, "pauses", None)) == (expected["name"], expected.get("pauses"))
  assert f"experiments/{name}.py" in module.__doc__


@pytest.mark.parametrize("setting", ["baseline", "tbys3", "ap", "dp_early"])
def test_the_papers_run_can_be_traced(setting):
  """Forward and backward pass of the 2B model at full length, with shapes only."""
  import jax
  import jax.numpy as jnp
  from flax import linen as nn

  from experiments import gemma2b_c4

  method = configs.freeze(gemma2b_c4.get_config(setting)).build_method()
  params = nn.unbox(jax.eval_shape(method.init, jax.random.key(0)))
  rows, weights = (jax.ShapeDtypeStruct((2, 2048), dtype) for dtype in (jnp.int32, jnp.float32))

  def loss(params, batch):
    return method.loss(params, batch, jax.random.key(0)).weighted_sum(batch["weights"])

  gradient = jax.eval_shape(jax.grad(loss), params, {"tokens": rows, "targets": rows, "weights": weights})
  assert jax.tree.structure(gradient) == jax.tree.structure(params)
  assert sum(x.size for x in jax.tree.leaves(params)) > 2.5e9


def test_the_papers_run():
  from experiments import gemma2b_c4

  config = configs.freeze(gemma2b_c4.get_config("ap,,1x3"))
  assert config.train.steps == 75_000
  assert config.data.batch_size * config.data.sequence_length == 256 * 2048
  assert config.method.pause_input == "pause"
  assert config.optimizer.rate_over_width
  assert config.decoder_config().d_model == 2048
  twice = configs.freeze(gemma2b_c4.get_config("ap,,2x1"))
  assert twice.train.steps == 50_000
  # Two passes: half of the steps read all windows once.
  assert twice.data.fraction * gemma2b_c4.WINDOWS == pytest.approx(25_000 * 256)


def test_lists_of_integers():
  config = configs.default()
  assert (config.method.jacobi, config.method.fork_layers) == (None, None)
  config.method.update(name="ponderlm2", pauses=1, jacobi="")
  assert configs.freeze(config).method.jacobi == (2, 3)
  config.method.jacobi = "1:4"
  frozen = configs.freeze(config)
  assert frozen.method.jacobi == (1, 4)
  # The written list is equal.
  config.method.update(configs.written_method(frozen.method))
  assert configs.freeze(config).method == frozen.method
  config.method.jacobi = "2.5:3"
  with pytest.raises(InputError, match=r"method\.jacobi: '2\.5:3' must be whole numbers such as '2:3'"):
    configs.freeze(config)


@pytest.mark.parametrize(
  ("method", "message"),
  [
    (
      {"name": "pause_training", "pauses": 0, "pause_fraction": 0.003},
      r"method\.pause_fraction: 0\.003 of a window of 128",
    ),
    ({"name": "thoughtbubbles", "stream_budget": 1.001}, r"method\.stream_budget: 1\.001 streams per token"),
  ],
)
def test_windows_too_short_for_the_method(method, message):
  config = configs.default()
  config.method.update(method)
  with pytest.raises(InputError, match=message):
    configs.freeze(config)


def test_a_field_of_an_earlier_version_names_its_replacement():
  with pytest.raises(InputError, match=r"^--config\.train\.tensorboard: unknown field; train\.trackers replaces it;"):
    command_line.override(configs.default(), ["train.tensorboard=False"])
