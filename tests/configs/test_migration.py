"""Runs of earlier versions: a missing field has the meaning that it had when the run was started."""

import json

import pytest
from models import tiny_config

from cyb_jax import configs, runs, training
from cyb_jax.errors import InputError
from cyb_jax.interop import pretrained


def recorded(config):
  """The config.json of a frozen config, as a dict."""
  return json.loads(configs.to_json(config))


def earlier(written, *fields):
  """The config.json that an earlier version would have written: without these fields, 'group.name'."""
  written = {group: dict(values) if isinstance(values, dict) else values for group, values in written.items()}
  del written["format"]
  for field in fields:
    group, name = field.split(".")
    written[group].pop(name, None)
  return written


def test_a_config_json_of_this_version_is_not_changed():
  config = configs.freeze(tiny_config(pauses=2))
  assert recorded(config)["format"] == 3
  assert configs.migrated(recorded(config)) == dict(config.source)
  assert runs.config_record(config).differences(recorded(config)) == []


@pytest.mark.parametrize("written", [1, 2])
def test_llama_1b_of_an_earlier_run_has_no_scaling(written):
  config = configs.default()
  config.decoder.preset = "llama_1b"
  frozen = configs.freeze(config)
  assert frozen.decoder_config().rope_scaling == "llama3:context=8192,factor=32,high=4,low=1"
  old = earlier(recorded(frozen), "decoder.rope_scaling") | {"format": written}
  assert configs.freeze(configs.migrated(old)).decoder_config().rope_scaling == ""
  # The command that started the run continues it.
  assert runs.config_record(frozen).differences(old) == []


def test_new_rows_of_an_earlier_run_were_initialised_with_the_mean():
  config = tiny_config(pauses=2)
  config.init_from = "somewhere"
  frozen = configs.freeze(config)
  old = earlier(recorded(frozen), "tuning.new_rows")
  assert configs.migrated(old)["tuning"]["new_rows"] == "mean"
  # Another value is a different run, but a command that does not set the field continues this run.
  assert runs.config_record(frozen).differences(old) == []
  config.tuning.new_rows = "draws"
  other = runs.config_record(configs.freeze(config))
  assert other.differences(old) == ["tuning.new_rows: 'mean' -> 'draws'"]
  # A run without init_from has no such rows, so the field is unchanged.
  config.update(init_from="")
  config.tuning.new_rows = "auto"
  frozen = configs.freeze(config)
  assert runs.config_record(frozen).differences(earlier(recorded(frozen), "tuning.new_rows")) == []


@pytest.mark.parametrize(
  ("decoder", "forks"),
  [({"num_layers": 4}, "1:3:4"), ({"preset": "gpt2_124m"}, "3:7:11"), ({"num_layers": 24}, "6:14:22")],
)
def test_streams_of_an_earlier_run_fork_at_the_same_layers(decoder, forks):
  config = configs.default()
  config.method.name = "thoughtbubbles"
  config.decoder.update(decoder)
  frozen = configs.freeze(config)
  old = earlier(recorded(frozen))
  loaded = configs.freeze(configs.migrated(old))
  assert loaded.source["method"]["fork_layers"] == forks
  assert configs.migrated(configs.migrated(old) | {"format": 2}) == dict(loaded.source)
  assert runs.config_record(frozen).differences(old) == []
  config.method.fork_layers = "2"
  assert runs.config_record(configs.freeze(config)).differences(old) == [f"method.fork_layers: {forks!r} -> '2'"]


@pytest.mark.parametrize(("written", "means"), [(True, "tensorboard"), (False, "")])
def test_the_switch_of_tensorboard_is_a_list_of_trackers(written, means):
  """In every format: the field was renamed, and the number that counts absent fields stayed."""
  config = configs.freeze(tiny_config(pauses=2))
  new = recorded(config)
  for old in (earlier(new, "train.trackers"), new):
    old["train"] = {name: value for name, value in old["train"].items() if name != "trackers"}
    old["train"]["tensorboard"] = written
    migrated = configs.migrated(old)
    assert migrated["train"]["trackers"] == means
    assert "tensorboard" not in migrated["train"]
    assert configs.freeze(migrated).train.trackers == means
    assert runs.config_record(config).differences(old) == []  # a run may be continued with other trackers


def test_a_router_of_an_earlier_run_was_trained_from_the_start():
  config = configs.default()
  config.method.name = "ponderlm3"
  method = configs.freeze(configs.migrated(earlier(recorded(configs.freeze(config))))).method
  assert (method.full_depth, method.router_rate, method.router_penalty) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(
  ("choice", "method", "message"),
  [
    ("random", {}, r"tuning.new_rows: 'random' must be one of auto, zero, unused, draws, mean"),
    ("zero", {"pause_input": "pause"}, r"tuning.new_rows: 'zero' must be another"),
  ],
)
def test_rejected_starts(choice, method, message):
  config = tiny_config(pauses=2, **method)
  config.tuning.new_rows = choice
  with pytest.raises(InputError, match=message):
    configs.freeze(config)


def test_the_command_that_has_started_a_run_continues_it(tmp_path):
  """The folder is from an earlier version; its config.json is converted to this version with the run's own values."""
  plain = tiny_config(name="baseline")
  plain.train.update(steps=1, eval_every=0)
  training.train(configs.freeze(plain), tmp_path / "plain")
  config = tiny_config(pauses=1)
  config.init_from = str(tmp_path / "plain")
  config.train.update(steps=2, eval_every=0)
  workdir = tmp_path / "run"
  old = config.copy_and_resolve_references()
  old.tuning.new_rows = "mean"
  first = training.train(configs.freeze(old), workdir)
  written = json.loads((workdir / "config.json").read_text())
  (workdir / "config.json").write_text(json.dumps(earlier(written, "tuning.new_rows")))
  for _ in range(2):
    assert training.train(configs.freeze(config), workdir) == first
    assert json.loads((workdir / "config.json").read_text())["tuning"]["new_rows"] == "mean"
  assert pretrained.load_run(workdir).config.tuning.new_rows == "mean"
