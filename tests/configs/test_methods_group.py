"""The group `method`: unset options and None, flags, options of other methods, and configs of version 0.1."""

import dataclasses
import json

import pytest

from cyb_jax import command_line, configs, methods, runs
from cyb_jax.checkpointing.workdir import check_workdir
from cyb_jax.configs import methods_group
from cyb_jax.errors import InputError
from cyb_jax.studies import settings

ON_POLICY = {"recipe": "on_policy"}
VA = {"loss": "va", "rho": "1:2:3:4"}
# For each option: a flag's text other than the default, the value, and the other options that it requires.
BY_FLAG = {
  "alpha": ("0.5", 0.5, VA | {"loss": "dp"}),
  "calibration_batches": ("3", 3, {}),
  "combine": ("states", "states", {}),
  "dont_know": ("unit", "unit", {}),
  "dont_know_prior": ("0.5", 0.5, {}),
  "fork_layers": ("1:2", (1, 2), {}),
  "full_depth": ("0.1", 0.1, {}),
  "gamma": ("linear:0.9", pytest.approx((1.0, 0.9, 0.8, 0.7)), {}),
  "head_activation": ("none", "none", {}),
  "heads": ("2", 2, {}),
  "jacobi": ("1:4", (1, 4), {}),
  "loss": ("va", "va", {"rho": "1:2:3:4"}),
  "omega": ("1:0:0:1", (1.0, 0.0, 0.0, 1.0), {}),
  "pause_fraction": ("0.2", 0.2, {}),
  "pause_input": ("token+pause", "token+pause", {}),
  "pause_offset": ("true", True, {}),
  "pause_places": ("prefix", "prefix", {}),
  "pause_positions": ("shifting", "shifting", {}),
  "pause_shared": ("true", True, {}),
  "pause_visibility": ("hidden", "hidden", {}),
  "pauses": ("2", 2, {}),
  "policy_floor": ("0.2", 0.2, ON_POLICY),
  "prune_below": ("0.001", 0.001, {}),
  "recipe": ("on_policy", "on_policy", {}),
  "rho": ("1:2:3:4", (1.0, 2.0, 3.0, 4.0), {"loss": "va"}),
  "router_penalty": ("1", 1.0, {}),
  "router_rate": ("0.1", 0.1, {}),
  "slot_budget": ("2.5", 2.5, ON_POLICY),
  "slot_heads": ("true", True, {}),
  "stopping_warmup": ("5", 5, {}),
  "stream_budget": ("3", 3.0, {}),
}
OWN = [(name, option) for name in methods.METHODS for option in methods.option_names(name)]


def by_flags(**options):
  """A frozen config whose method is set by flags."""
  fields = [f"method.{option}={value}" for option, value in options.items()]
  return configs.freeze(command_line.override(configs.default(), fields))


def from_json(config):
  return configs.freeze(json.loads(configs.to_json(config)))


def test_all_options_are_unset_by_default():
  config = configs.default()
  assert list(configs.to_dict(config)["method"]) == ["name"]
  assert set(config.method) == {"name", *BY_FLAG} == {"name", *configs.all_options()}
  for name in methods.METHODS:
    config.method.name = name
    frozen = configs.freeze(config)
    assert frozen.method == methods.configure(name)
    assert json.loads(configs.to_json(frozen))["method"] == {"name": name}


def test_unset_and_none_are_different_priors():
  unset, none = configs.default(), configs.default()
  none.method.dont_know_prior = None
  unset, none = configs.freeze(unset), configs.freeze(none)
  assert (unset.method.dont_know_prior, none.method.dont_know_prior) == (0.9, None)
  # In config.json, an unset option is missing and None is null; both are preserved.
  written = [json.loads(configs.to_json(config))["method"] for config in (unset, none)]
  assert written == [{"name": "cyb"}, {"name": "cyb", "dont_know_prior": None}]
  assert [from_json(config).method for config in (unset, none)] == [unset.method, none.method]
  assert configs.differences(unset.source, none.source) == ["method.dont_know_prior: 0.9 -> None"]
  assert configs.differences(none.source, from_json(none).source) == []
  # An option that is set again has the new value; and the written form is read back.
  config = configs.default()
  config.method.update(configs.written_method(none.method))
  assert configs.freeze(config).method == none.method
  config.method.dont_know_prior = 0.5
  assert configs.freeze(config).method.dont_know_prior == 0.5
  # The initial constant shares are those of this prior, or equal.
  config = configs.default()
  config.method.update(name="constant_stop", dont_know_prior=None)
  assert from_json(configs.freeze(config)).method == methods.configure("constant_stop", dont_know_prior=None)


def test_a_flag_can_only_set_the_prior_to_a_number():
  """This holds for all numbers in a config: None can only be set in config files."""
  assert by_flags(dont_know_prior=0.5).method.dont_know_prior == 0.5
  with pytest.raises(InputError, match=r"--config\.method\.dont_know_prior=None: could not convert"):
    by_flags(dont_know_prior=None)


@pytest.mark.parametrize(("name", "option"), OWN)
def test_every_option_can_be_set_by_a_flag(name, option):
  text, value, needed = BY_FLAG[option]
  # Lists have four values, so methods with another default number of slots are skipped.
  frozen = by_flags(name=name, **{option: text}, **needed)
  assert getattr(frozen.method, option) == value
  (default,) = [field.default for field in dataclasses.fields(frozen.method) if field.name == option]
  assert value != default
  assert from_json(frozen).method == frozen.method
  assert configs.differences({"method": {"name": name} | needed}, frozen.source) == [
    f"method.{option}: {methods_group.defaults(name)[option]!r} -> {frozen.source['method'][option]!r}"
  ]


def test_a_boolean_flag_needs_no_value():
  config = command_line.override(configs.default(), ["method.pause_offset"])
  assert configs.freeze(config).method.pause_offset is True


@pytest.mark.parametrize("name", methods.METHODS)
def test_options_of_other_methods_are_rejected(name):
  own = methods.option_names(name)
  for option in set(BY_FLAG) - set(own):
    having = ", ".join(other for other in methods.METHODS if option in methods.option_names(other))
    with pytest.raises(InputError) as info:
      by_flags(name=name, **{option: BY_FLAG[option][0]})
    assert str(info.value) == (
      f"config.method.{option}: unknown field; method {name!r} has no such option;"
      f" it accepts {', '.join(own) or 'none'} (methods with this option: {having})"
    )
    with pytest.raises(InputError, match=rf"^method\.{option}: unknown field; .* has no such option\. It has: "):
      methods.configure(name, **{option: 1})


def test_options_of_no_method():
  with pytest.raises(InputError, match=r"^config\.method\.omgea: unknown field; did you mean method\.omega\?$"):
    configs.freeze({"method": {"omgea": ""}})
  with pytest.raises(InputError, match=r"^--config\.method\.omgea: unknown field; did you mean method\.omega\?$"):
    command_line.override(configs.default(), ["method.omgea=1"])


# The options that version 0.1 wrote for every method.
WRITTEN = {
  "name": "cyb", "loss": "ap", "pauses": 3, "omega": "", "gamma": "", "rho": "", "alpha": 0.0, "recipe": "constant",
  "slot_budget": 0.0, "policy_floor": 0.1, "dont_know": "token", "dont_know_prior": 0.9, "calibration_batches": 0,
  "stopping_warmup": 0, "pause_input": "pause", "pause_visibility": "visible", "pause_offset": False,
  "pause_shared": False, "pause_positions": "token", "pause_places": "random", "pause_fraction": 0.1, "jacobi": "2:3",
  "router_penalty": 0.0, "prune_below": 1e-4, "fork_layers": "", "stream_budget": 2.0, "combine": "probabilities",
}  # fmt: skip
# For each setting: further content of its config.json; and a field in which another run differs, with both values.
OLD = {
  "baseline": ({"name": "baseline", "pauses": 0}, ("name", "baseline", "tbys")),
  "tbys3": ({"name": "tbys"}, ("pause_offset", False, True)),
  "ap": ({}, ("omega", "", "1:0:0:1")),
  "dp_early_strong": ({"loss": "dp", "rho": "11:3:3:3", "alpha": 0.1}, ("alpha", 0.1, 0.2)),
  "thoughtbubbles4": ({"name": "thoughtbubbles", "pauses": 0, "stream_budget": 4.0}, ("stream_budget", 4.0, 3.0)),
  "pause_training": ({"name": "pause_training", "pauses": 10}, ("pause_fraction", 0.1, 0.2)),
  "constant_stop": ({"name": "constant_stop"}, ("dont_know_prior", 0.9, None)),
  "ponderlm2": ({"name": "ponderlm2", "pauses": 1}, ("jacobi", "2:3", "1:2")),
}


@pytest.fixture(params=OLD)
def old(request, tmp_path):
  """(the current ConfigDict of a setting, the work directory of its run under version 0.1, another run's field)."""
  changed, other = OLD[request.param]
  config = configs.default()
  settings.apply(config, request.param, "tiny", "1x1")
  source = configs.to_dict(config) | {"method": WRITTEN | changed}
  (tmp_path / "config.json").write_text(json.dumps(source, indent=2, sort_keys=True) + "\n")
  return config, tmp_path, other


def test_configs_of_version_0_1_load(old):
  config, folder, _ = old
  source = json.loads((folder / "config.json").read_text())
  assert len(source["method"]) == 27
  loaded = configs.freeze(configs.migrated(source))
  today = configs.freeze(config)
  if today.method.name == "thoughtbubbles":  # which forked before other layers in version 0.1
    assert (loaded.method.fork_layers, today.method.fork_layers) == ((1, 2), None)
    today = dataclasses.replace(today, method=dataclasses.replace(today.method, fork_layers=(1, 2)))
  assert loaded.method == today.method
  assert dataclasses.replace(loaded, source=today.source) == today
  # Only the method's own options are written, without those that are newer than the config.
  options = {"name", *methods.option_names(today.method.name)} - {"slot_heads"}
  assert set(json.loads(configs.to_json(loaded))["method"]) == options
  assert from_json(loaded).method == today.method


def test_runs_of_version_0_1_are_continued(old):
  config, folder, (option, before, after) = old
  check_workdir(folder, runs.config_record(configs.freeze(config)))
  # The result is the same if defaults are set explicitly.
  config.method.update(configs.written_method(configs.freeze(config).method))
  check_workdir(folder, runs.config_record(configs.freeze(config)))
  # A run with another field is a different run.
  if option == "name":
    config.method = configs.default().method
  config.method[option] = after
  with pytest.raises(InputError) as info:
    check_workdir(folder, runs.config_record(configs.freeze(config)))
  assert f"contains a run of another config (method.{option}: {before!r} -> {after!r});" in str(info.value)


def test_an_option_that_a_run_of_version_0_1_had_is_kept():
  """Only defaults of options that the method doesn't have are dropped."""
  source = configs.to_dict(configs.default()) | {"method": WRITTEN | {"name": "baseline", "pauses": 0, "alpha": 0.5}}
  with pytest.raises(InputError, match=r"config\.method\.alpha: unknown field; method 'baseline' has no such option"):
    configs.freeze(configs.migrated(source))
  # For an unknown method, nothing is dropped.
  assert configs.migrated(source | {"method": {"name": "x", "alpha": 0.0}})["method"] == {"name": "x", "alpha": 0.0}


def test_another_method_is_reported_by_its_name():
  """Options that only one of two methods has are compared with that method's defaults."""
  assert configs.differences({"method": {"name": "baseline"}}, {"method": {"name": "cyb"}}) == [
    "method.name: 'baseline' -> 'cyb'"
  ]
  changed = {"method": {"name": "cyb", "alpha": 0.1, "loss": "dp", "rho": "1:1:1:1"}}
  assert configs.differences({"method": {"name": "baseline"}}, changed) == [
    "method.alpha: 0.0 -> 0.1", "method.loss: 'ap' -> 'dp'", "method.name: 'baseline' -> 'cyb'",
    "method.rho: '' -> '1:1:1:1'",
  ]  # fmt: skip
  assert configs.differences(
    {"method": {"name": "pause_training"}}, {"method": {"name": "ponderlm2"}}
  ) == ["method.name: 'pause_training' -> 'ponderlm2'", "method.pauses: 10 -> 1"]  # fmt: skip
