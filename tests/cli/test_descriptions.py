"""Descriptions of programs: --help, --version, --config_help, --list_experiments and --list_settings."""

import importlib
import re
import subprocess
import sys

import cli
import pytest
from absl import flags

import cyb_jax
from cyb_jax import command_line, configs
from cyb_jax.cli import benchmark, config_help, listings, program_flags
from cyb_jax.configs import documentation
from cyb_jax.errors import InputError
from cyb_jax.studies import settings

PROGRAMS = ("prepare", "train", "evaluate", "report", "generate", "convert", "compile", "study", "serve")


@pytest.mark.parametrize("program", [*PROGRAMS, *(f"benchmark {part}" for part in benchmark.BENCHMARKS)])
def test_every_flag_has_a_description(program):
  name, _, part = program.partition(" ")
  define = benchmark.BENCHMARKS[part][0] if part else importlib.import_module(f"cyb_jax.cli.{name}").define_flags
  for flag in cli.flags_of(define).values():
    # A sentence or a phrase that is understandable without the code.
    assert len((flag.help or "").split()) >= 3, flag.name
    assert not flag.help.startswith("Of "), flag.name
    assert flag.help[0].isupper(), flag.name


@pytest.mark.parametrize("program", [*PROGRAMS, "benchmark"])
def test_help_of_an_installed_program(program):
  """Each program prints a description with examples, and lists its flags."""
  code, out, err = cli.forked(program, "--help")
  assert (code, err) == (0, "")
  description, _, listed = out.partition("\nflags:\n")
  module = importlib.import_module(f"cyb_jax.cli.{program}")
  assert description.strip() == module.__doc__.strip()
  assert f"cyb-{program} " in description
  assert "python -m" not in description
  assert {"--help", "--version", "--completion"} <= set(listed.split())
  assert all(len(line) <= 100 for line in listed.splitlines())
  if program != "benchmark":
    assert {name for name in cli.flags_of(module.define_flags) if len(name) > 1} <= set(
      re.findall(r"--(?:\[no\])?(\w+)", listed)
    )


def test_help_of_cyb_benchmark_lists_its_parts():
  _, out, _ = cli.forked("benchmark", "--help")
  for part in benchmark.BENCHMARKS:
    assert f"cyb-benchmark {part} " in out
  _, out, _ = cli.forked("benchmark", "decode", "--help")
  assert "--batch_sizes\n" in out


def test_help_imports_no_jax():
  code = (
    "import sys\n"
    "sys.argv[1:] = ['--help']\n"
    "from cyb_jax.cli import train\n"
    "try:\n"
    "  train.run()\n"
    "except SystemExit as error:\n"
    "  assert error.code == 0\n"
    "assert 'jax' not in sys.modules and 'cyb_jax.configs' not in sys.modules\n"
  )
  subprocess.run([sys.executable, "-c", code], env=cli.environment(), cwd=cli.ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("program", [*PROGRAMS, "benchmark"])
def test_version(program):
  assert cli.forked(program, "--version") == (0, f"cyb_jax {cyb_jax.__version__}\n", "")


def test_version_from_a_module():
  done = subprocess.run(cli.command("report", "--version"), env=cli.environment(), capture_output=True, check=False)
  assert done.stdout.decode() == f"cyb_jax {cyb_jax.__version__}\n"


@pytest.mark.parametrize("name", ["ponderlm3", "cyb", "baseline"])
def test_config_help_has_every_field_once(name):
  config = configs.to_dict(configs.default()) | {"method": {"name": name}}
  text = config_help.config_help(config)
  found = re.findall(r"^  --config\.([\w.]+)$", text, re.MULTILINE)
  assert found == [field.path for field in documentation.field_reference(name)]
  assert all(len(line) <= 100 for line in text.splitlines())


def test_config_help_has_type_value_default_rule_and_meaning():
  config = configs.to_dict(command_line.override(configs.default(), ["optimizer.learning_rate=0.5"]))
  assert config_help.config_help(config, "optimizer.learning_rate") == (
    "optimizer: AdamW and its schedule.\n\n"
    "  --config.optimizer.learning_rate\n"
    "      float; here 0.5; default 0.002; accepted: positive\n"
    "      the highest learning rate of the schedule.\n"
  )
  assert "here None (2, of the preset 'tiny')" in config_help.config_help(config, "decoder.num_layers")
  assert "here 0.9; default 0.9" in config_help.config_help(config, "method.dont_know_prior")
  assert "data." not in config_help.config_help(config, "optimizer").replace("data.batch_size", "")


def test_config_help_of_an_invalid_config():
  config = configs.to_dict(
    command_line.override(configs.default(), ["optimizer.learning_rate=-1", "method.name=deeper@ap"])
  )
  assert "here -1.0;" in config_help.config_help(config, "optimizer")
  assert "method.pauses" not in config_help.config_help(config, "method")
  with pytest.raises(InputError, match=r"--config_help: 'optimizer\.lr' .* did you mean 'optimizer\.learning_rate'\?"):
    config_help.config_help(config, "optimizer.lr")
  with pytest.raises(InputError, match=r"--config_help: 'qqq' .* there are method, decoder, data"):
    config_help.config_help(config, "qqq")


def test_config_help_of_the_program():
  code, out, _ = cli.forked("train", "--config=experiments/quickstart.py:ponderlm3", "--config_help=method")
  assert code == 0
  assert "--config.method.router_rate\n      float; here 0.1; default 1.0" in out
  assert "--config.method.omega" not in out
  code, out, _ = cli.forked("train", "--config_help")
  assert code == 0
  assert "--config.init_from" in out
  assert "--config.method.omega" in out


def test_experiments_are_listed():
  text = listings.experiments()
  assert re.search(r"^experiments/quickstart\.py +A tiny self-paced model on film reviews", text, re.MULTILINE)
  assert "compile_table.py" not in text  # a program, not a config
  assert all(len(line) <= 100 for line in text.splitlines())
  names = re.findall(r"^(\S+)  +\S", text, re.MULTILINE)
  assert names == [f"experiments/{path.name}" for path in sorted((cli.ROOT / "experiments").glob("*.py"))
                   if "def get_config" in path.read_text()]  # fmt: skip


def test_settings_are_listed():
  assert list(settings.MEANINGS) == list(settings.SETTINGS)
  code, out, _ = cli.forked("train", "--list_settings")
  assert code == 0
  assert re.search(r"^ap_discount +CYB-AP with the discount 0\.99", out, re.MULTILINE)
  assert re.search(r"^deeper@SETTING +a plain model with more layers", out, re.MULTILINE)


def test_help_text_of_flags():
  values = flags.FlagValues()
  flags.DEFINE_integer("profile", 0, "Steps.", flag_values=values)
  flags.DEFINE_boolean("quiet", False, "No logs.", flag_values=values)
  flags.DEFINE_string("name", "x", "A name.", flag_values=values)
  assert program_flags.help_text("What it does.\n", values) == (
    "What it does.\n\nflags:\n\n"
    "  --name\n      A name. Default: x.\n  --profile\n      Steps. Default: 0.\n  --[no]quiet\n      No logs.\n"
  )
