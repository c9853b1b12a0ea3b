"""Configs on the command line: `--config=experiments/NAME.py:ARGUMENTS --config.train.steps=100`.

This module imports neither jax nor the dataclasses of `cyb_jax.configs`, so `--help` is fast.
"""

from __future__ import annotations

import copy
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from cyb_jax.errors import InputError, did_you_mean, nearest
from cyb_jax.option_syntax import parse_mixture
from cyb_jax.storage import absolute


class PathParser(flags.ArgumentParser):
  """The parser of a flag whose value is a path; see `cyb_jax.storage.absolute`."""

  def parse(self, argument: str) -> str:
    return absolute(argument)

  def flag_type(self) -> str:
    return "path"


class PathListParser(flags.ListParser):
  """The parser of a flag whose value is a comma-separated list of paths."""

  def parse(self, argument: Any) -> list[str]:
    return [absolute(path) for path in super().parse(argument)]

  def flag_type(self) -> str:
    return "comma separated list of paths"


def define_path(name: str, default: str | None, description: str) -> None:
  """Defines a flag whose value is a path, which is made absolute; '' is not changed."""
  flags.DEFINE(PathParser(), name, default, description, serializer=flags.ArgumentSerializer())


def define_paths(name: str, default: list[str] | None, description: str) -> None:
  """Defines a flag for a comma-separated list of paths; its value is a list of absolute paths."""
  flags.DEFINE(PathListParser(), name, default, description, serializer=flags.CsvListSerializer(","))


def define_base(*, several: bool = False) -> None:
  """Defines `--base`, the base of a run (`cyb_jax.interop.base`); its value is a path, or `several` a list of paths."""
  text = "The model from which a run with a frozen decoder started, if it has been moved"
  if several:
    define_paths("base", [], f"{text}; with --compare one for all such runs, or one for each folder, '' for none.")
  else:
    define_path("base", "", f"{text}; '': where the run's config.json says.")


def config_flag() -> ml_collections.ConfigDict:
  """The ConfigDict of the flag `--config`; see `_take_tokenizer_of_store`.

  Raises:
    InputError: the flag isn't given, its file doesn't exist, or `data.store` is damaged.
  """
  config = flags.FLAGS.config
  if config is None:
    raise InputError("--config: not given; give a config file, such as those in experiments/README.md")
  try:
    config.to_dict()
  except OSError as error:  # ml_collections raises it when the config is first used
    path = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    raise InputError(f"--config: {_last_line(error)}{_nearest_experiment(path)}") from None
  _take_tokenizer_of_store(config, config_flags.get_override_values(flags.FLAGS["config"]))
  return config


def override(config: ml_collections.ConfigDict, fields: Sequence[str]) -> ml_collections.ConfigDict:
  """A copy of a ConfigDict to which each 'a.b=value' is applied like the flag `--config.a.b=value`.

  Raises:
    InputError: a field doesn't exist, or a value has the wrong type.
  """
  values = flags.FlagValues()
  words = ["override", *(f"--config.{field}" for field in fields)]
  try:
    config_flags.DEFINE_config_dict("config", copy.deepcopy(config), flag_values=values, sys_argv=words)
    values(words)
  except Exception as error:  # flags raise errors of many types, whose cause is always the input
    raise InputError(explain(error, words, values=values)) from None
  _take_tokenizer_of_store(values.config, config_flags.get_override_values(values["config"]))
  return values.config


def _take_tokenizer_of_store(config: ml_collections.ConfigDict, given: Mapping[str, Any]) -> None:
  """Sets `data.tokenizer` to the tokenizer of `data.store` or `data.mixture`, unless the user has set `data.tokenizer`.

  The tokenizer in a config file is for the store that is prepared if the user names none, so it is overridden. Only the
  command line knows which fields the user has set.

  Args:
    config: the config, which is modified.
    given: the fields that the user has set, 'data.store' for example.
  """
  data = config.get("data")
  store, mixture, tokenizer = (data.get(name) if data else None for name in ("store", "mixture", "tokenizer"))
  if not isinstance(tokenizer, str) or "data.tokenizer" in given:
    return
  if isinstance(mixture, str) and mixture:
    store = next((item.name for item in parse_mixture("data.mixture", mixture) if "/" in item.name), "")
  if not (isinstance(store, str) and store):
    return
  if not tokenizer and config.get("init_from"):
    return  # the tokenizer of init_from, which the store must have been prepared with
  from cyb_jax.data.store import is_store, tokenizer_spec

  if is_store(store):
    data.tokenizer = tokenizer_spec(store)
    if data.tokenizer != tokenizer:
      logging.info("data.tokenizer: using %r, the tokenizer of %s, instead of %r", data.tokenizer, store, tokenizer)


def explain(error: Exception, argv: Sequence[str], *, values: flags.FlagValues = flags.FLAGS) -> str:
  """The message of an error that flags raise; if a name doesn't exist, it suggests similar names.

  The names are those of flags, config fields and config files.

  Args:
    error: the error that was raised while `argv` was parsed.
    argv: the words of the command line.
    values: the flags for which it was parsed.
  """
  if isinstance(error, flags.UnrecognizedFlagError):
    return f"--{error.flagname}: unknown flag; {_nearest_flag(error.flagname, values)}"
  text = str(error.args[0] if error.args else error) or repr(error)
  field = re.search(r"\w+", text)
  if isinstance(error, KeyError | AttributeError) and field:
    for word in argv:
      flag = word.partition("=")[0]
      if flag.startswith("--config.") and field[0] in flag.split("."):
        return f"{flag}: unknown field; {_nearest_field(flag.removeprefix('--config.'))}"
  if "Failed loading config file" in text:
    path = _given_config(argv)
    return f"--config: {_last_line(error)}{'' if os.path.exists(installed(path)) else _nearest_experiment(path)}"
  return text


def _nearest_field(path: str) -> str:
  """A hint for a field of the config that doesn't exist."""
  from cyb_jax.configs import field_paths
  from cyb_jax.configs.migration import REPLACED

  if path in REPLACED:
    return f"{REPLACED[path]} replaces it; cyb-train --config_help={REPLACED[path]} describes it"
  fields = field_paths()
  groups = [name for name in fields if "." not in name]
  return did_you_mean(path, fields, written=str, listed=groups)


def _nearest_flag(name: str, values: flags.FlagValues) -> str:
  """A hint for a flag that doesn't exist: another flag of the program, or a field of its config."""
  own = own_flags(values)
  close = nearest(name, own)
  if not close and takes_config(values):
    from cyb_jax.configs import field_paths

    own = [*own, *(f"config.{path}" for path in field_paths() if "." in path)]
    close = [f"config.{path}" for path in nearest(name.removeprefix("config."), field_paths()) if "." in path]
  if close:
    return f"did you mean {' or '.join(f'--{flag}' for flag in close)}?"
  return "--help lists the flags"


def takes_config(values: flags.FlagValues = flags.FLAGS) -> bool:
  """Whether the program has a flag `--config` whose fields `--config.GROUP.FIELD=VALUE` changes."""
  # The class is tested, because attributes of the flag can't be read before it is parsed.
  return "config" in values and hasattr(type(values["config"]), "override_values")


def own_flags(values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """The sorted names of the flags that this package or the program defines, without the fields of a config."""
  own = []
  for name in values:
    module = values.find_module_defining_flag(name, "") or ""
    if name.isidentifier() and not module.startswith(("absl", "ml_collections")):
      own.append(name)
  return sorted(own)


def _given_config(argv: Sequence[str]) -> str:
  """The path in `--config=PATH:ARGUMENTS` or `--config PATH`; '' if there is none."""
  for i, word in enumerate(argv):
    flag, equals, value = word.partition("=")
    if flag == "--config":
      return (value if equals else "".join(argv[i + 1 : i + 2])).partition(":")[0]
  return ""


def _nearest_experiment(path: str) -> str:
  """A hint for a config file that doesn't exist, if an experiment has a similar name."""
  close = nearest(pathlib.PurePath(path).stem, [name.removesuffix(".py") for name in experiment_files()])
  return f"; did you mean {' or '.join(f'experiments/{name}.py' for name in close)}?" if close else ""


def experiment_files() -> dict[str, pathlib.Path]:
  """The config files of the experiments, by name such as 'reviews.py'; a config file defines `get_config`.

  Files in the folder `experiments` of the working directory have precedence over files of the package.
  """
  package = pathlib.Path(__file__).parent
  found = {}
  for folder in (package.parent / "experiments", package / "experiments", pathlib.Path("experiments")):
    for path in sorted(folder.glob("*.py")):
      if "\ndef get_config(" in path.read_text(encoding="utf-8", errors="replace"):
        found[path.name] = path
  return found


def _last_line(error: Exception) -> str:
  return str(error).strip().splitlines()[-1].strip()


def with_installed_config(argv: Sequence[str]) -> list[str]:
  """The words of a command line, with the path in `--config=experiments/NAME.py` replaced by `installed`."""
  words = list(argv)
  for i, word in enumerate(words):
    flag, equals, value = word.partition("=")
    if not equals and i and words[i - 1] == "--config":
      flag, value = "--config", word
    path, colon, rest = value.partition(":")
    if flag == "--config" and path:  # without a path, it is the next word
      words[i] = f"{flag}=" * bool(equals) + f"{installed(path)}{colon}{rest}"
  return words


def with_optional_values(argv: Sequence[str]) -> list[str]:
  """The words of a command line, with `--config_help` replaced by `--config_help=all`."""
  return ["--config_help=all" if word == "--config_help" else word for word in argv]


def installed(path: str) -> str:
  """The path of a config file; `~` is expanded.

  If experiments/NAME.py doesn't exist in the working directory, the result is the copy that was installed with the
  package, or the file in the checkout.
  """
  if path.startswith("~"):
    return absolute(path)
  package = pathlib.Path(__file__).parent
  if path.startswith("experiments/") and not os.path.exists(path):
    for found in (package / path, package.parent / path):
      if found.exists():
        return str(found)
  return path
