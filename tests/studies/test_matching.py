"""Plain models of the cost of another method: sizes by hand, costs against an independent formula, invalid names."""

import dataclasses

import pytest
from models import TINY, tiny_config

from cyb_jax import configs
from cyb_jax.decoder import num_params, preset
from cyb_jax.errors import InputError
from cyb_jax.methods import configure
from cyb_jax.studies import matching, settings
from cyb_jax.studies.resolution import resolve


def layer_cost(decoder):
  """Linear in layers and in the mlp: 34 per layer of TINY."""
  return decoder.num_layers * (10 * decoder.num_heads / 2 + decoder.mlp_size)


@pytest.mark.parametrize(
  ("wanted", "layers", "mlp"),
  [
    (340, 10, 24),
    # Ten layers are nearer than eleven, and each lacks 1; no rounder width than 25 is within half a percent.
    (350, 10, 25),
    # Eleven layers are nearer, with an excess of 1.27 each; 23 differs by 0.8 %, and no width is nearer.
    (360, 11, 23),
    (34, 1, 24),
  ],
)
def test_deeper_by_hand(wanted, layers, mlp):
  grown = matching.grow(TINY, "deeper", layer_cost, wanted)
  assert grown == dataclasses.replace(TINY, num_layers=layers, mlp_size=mlp)


def test_wider_by_hand():
  """A single kv head for all heads stays single; otherwise complete groups are added."""
  grown = matching.grow(TINY, "wider", layer_cost, 2 * (5 * 3 + 36))
  assert grown == dataclasses.replace(TINY, num_heads=3, num_kv_heads=1, d_model=24, mlp_size=36)
  grouped = dataclasses.replace(TINY, num_heads=6, num_kv_heads=2)
  grown = matching.grow(grouped, "wider", layer_cost, 2 * (5 * 10 + 40))
  assert (grown.num_heads, grown.num_kv_heads, grown.d_model) == (9, 3, 24)
  assert layer_cost(grown) == 2 * (5 * 10 + 40)


def formula(decoder, tokens, slots, read):
  """Forward FLOPs of a token, written out: two for each weight, and the attention to each key, in each slot."""
  width, heads, keys = decoder.d_model, decoder.num_heads * decoder.head_size, decoder.num_kv_heads * decoder.head_size
  weights = 2 * width * heads + 2 * width * keys + 3 * width * decoder.mlp_size
  attention = 4 * heads * (tokens * slots + 1) / 2
  return slots * decoder.num_layers * (2 * weights + attention) + read * 2 * width * decoder.vocab_size


@pytest.mark.parametrize(("name", "factor"), [("inference", 1), ("training", 3)])
@pytest.mark.parametrize("direction", settings.DIRECTIONS)
def test_cost_equals_the_matched_cost(direction, name, factor):
  config = tiny_config()
  config.decoder.num_layers = 2
  config.method.update(name=f"{direction}@ap/{name}", pause_input=None)
  frozen = resolve(config)
  # config.json has the resolved plain model.
  assert configs.freeze(frozen.source) == frozen
  assert frozen.method == configure("baseline")
  decoder = frozen.decoder_config(257)  # the bytes and the end token
  small = dataclasses.replace(decoder, num_layers=2, d_model=16, num_heads=2, num_kv_heads=2, mlp_size=32)
  assert small.vocab_size == decoder.vocab_size == 384
  wanted = formula(small, 16, 4, 4)
  assert formula(decoder, 16, 1, 1) == pytest.approx(wanted, rel=0.01)
  grown = "num_layers" if direction == "deeper" else "num_heads"
  assert getattr(decoder, grown) > getattr(small, grown)
  kept = {"head_size", "norm", "initializer", "num_heads" if direction == "deeper" else "num_layers"}
  assert all(getattr(decoder, field) == getattr(small, field) for field in kept)
  method = frozen.build_method(257)
  cost = method.costs(16).train if name == "training" else method.costs(16).inference
  assert cost.total == pytest.approx(factor * wanted, rel=0.01)


def test_later_changes_of_the_config_are_matched():
  """Flags are applied after the experiment has created its config, so sizes follow from the frozen config."""
  from experiments import quickstart

  config = quickstart.get_config("deeper@ap,nano")
  layers = resolve(config).source["decoder"]["num_layers"]
  config.data.tokenizer = "sentencepiece:256"  # a smaller readout for each of four slots
  assert resolve(config).source["decoder"]["num_layers"] < layers


def test_nano_is_a_fifth_of_a_million():
  assert num_params(preset("nano")) == 188_864


def test_each_method_has_a_representative_setting():
  from cyb_jax.methods import METHODS

  found = settings.representatives()
  assert [settings.SETTINGS[name]["name"] for name in found] == list(METHODS)
  assert {"baseline", "tbys3", "ap"} <= set(found)


def test_names():
  assert settings.parse_match("ap") is None
  assert settings.parse_match("deeper@ap") == settings.Match("deeper", "ap", "inference")
  assert settings.parse("wider@tbys3/training,,1x2", setting="ap", size="tiny", regime="1x1") == (
    "wider@tbys3/training", "tiny", "1x2",
  )  # fmt: skip


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("deeper@app", r"setting 'app' is unknown; did you mean 'ap'"),
    ("deper@ap", r"setting 'deper' is unknown; did you mean 'deeper'"),
    ("deeper@ap/infrence", r"measure 'infrence' is unknown; did you mean 'inference'"),
    ("deeper@baseline", r"'deeper@baseline' matches 'baseline', which is itself a plain model; .* such as deeper@ap"),
    ("deeper@wider@ap", r"matches 'wider@ap', which is itself a plain model"),
    ("deeper@", r"setting '' is unknown"),
  ],
)
def test_bad_names(name, message):
  with pytest.raises(InputError, match=message):
    settings.check(name)
  with pytest.raises(InputError, match=message):
    resolve({"method": {"name": name}})


def test_no_plain_model_is_cheap_enough(monkeypatch):
  smallest = matching.grow(TINY, "deeper", layer_cost, 5)
  assert (smallest.num_layers, smallest.mlp_size) == (1, 1)
  config = tiny_config()
  config.method.update(name="wider@ap", pause_input=None)
  monkeypatch.setattr(matching, "grow", lambda decoder, *rest: decoder)
  with pytest.raises(InputError, match=r"method\.name: 'wider@ap' must cost [\d,]+ FLOPs per token, but the nearest"):
    resolve(config)
