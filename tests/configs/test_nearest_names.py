"""Hints for unknown names: fields across groups, flags, config files, settings."""

import cli
import pytest

from cyb_jax import command_line, configs
from cyb_jax.errors import InputError, did_you_mean, nearest


@pytest.mark.parametrize(
  ("given", "close"),
  [
    ("optimizer.lr", ["optimizer.learning_rate"]),
    ("learning_rate", ["optimizer.learning_rate"]),
    ("train.learning_rate", ["optimizer.learning_rate"]),
    ("optimizer.learnin_rate", ["optimizer.learning_rate"]),
    ("optimiser.beta_1", ["optimizer.beta1"]),
    ("optimizer.learning-rate", ["optimizer.learning_rate"]),
    ("lr", ["tuning.lora_rank", "optimizer.learning_rate"]),
    ("train.batch_size", ["data.batch_size"]),
    ("bs", ["data.batch_size"]),
    ("seq_len", ["data.sequence_length"]),
    ("seed", ["data.seed", "train.seed"]),
    ("train.sed", ["train.seed"]),
    ("decoder.n_layers", ["decoder.num_layers"]),
    ("decoder.layers", ["decoder.num_layers"]),
    ("method.omgea", ["method.omega"]),
    ("methd.pauses", ["method.pauses"]),
    ("optimizer.decay", ["optimizer.weight_decay"]),
    ("methods", ["method"]),
    ("qqq", []),
    ("x", []),
  ],
)
def test_fields(given, close):
  assert sorted(nearest(given, configs.field_paths())) == sorted(close)


def test_hints():
  assert did_you_mean("ap1", ["baseline", "ap"]) == "did you mean 'ap'?"
  assert did_you_mean("seed", ["a.seed", "b.seed"], written=str) == "did you mean a.seed or b.seed?"
  assert did_you_mean("qqq", ["a", "b"]) == "there are a, b"
  assert did_you_mean("qqq", ["a", "b"], listed=["all of them"]) == "there are all of them"


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"optimizer": {"lr": 1.0}}, r"config\.optimizer\.lr: unknown field; did you mean optimizer\.learning_rate\?"),
    ({"learning_rate": 1.0}, r"config\.learning_rate: unknown field; did you mean optimizer\.learning_rate\?"),
    ({"method": {"learning_rate": 1.0}}, r"config\.method\.learning_rate: .* mean optimizer\.learning_rate\?"),
    ({"train": {"qqq": 1}}, r"config\.train\.qqq: unknown field; there are steps, epochs"),
  ],
)
def test_configs(fields, message):
  with pytest.raises(InputError, match=message):
    configs.freeze(fields)


def test_overrides():
  with pytest.raises(InputError, match=r"--config\.optimizer\.lr: .* did you mean optimizer\.learning_rate\?$"):
    command_line.override(configs.default(), ["optimizer.lr=1"])
  with pytest.raises(InputError, match=r"--config\.qqq: unknown field; there are method, data, optimizer"):
    command_line.override(configs.default(), ["qqq=1"])


@pytest.mark.parametrize(
  ("flag", "hint"),
  [
    ("--workdirr=x", "--workdirr: unknown flag; did you mean --workdir?"),
    ("--batch_size=3", "--batch_size: unknown flag; did you mean --config.data.batch_size?"),
    ("--lr=3", "--lr: unknown flag; did you mean --config.optimizer.learning_rate or --config.tuning.lora_rank?"),
    ("--config.lr=3", "--config.lr: unknown field; did you mean optimizer.learning_rate or tuning.lora_rank?"),
    ("--qqq", "--qqq: unknown flag; --help lists the flags"),
  ],
)
def test_flags(flag, hint):
  assert cli.complaint("train", "--config=experiments/quickstart.py", flag) == hint


def test_programs_without_a_config():
  assert cli.complaint("report", "--wrkdir=x") == "--wrkdir: unknown flag; did you mean --workdir?"
  assert cli.complaint("report", "--learning_rate=1") == "--learning_rate: unknown flag; --help lists the flags"


def test_config_files():
  said = cli.complaint("train", "--config=experiments/quickstrt.py:ap", "--workdir=x")
  assert said.endswith("'experiments/quickstrt.py'; did you mean experiments/quickstart.py?")
  assert "did you mean" not in cli.complaint("train", "--config=nowhere.py", "--workdir=x")
