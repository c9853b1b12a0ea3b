"""The flags that all programs have, which print a text and exit: --help, --version and --completion."""

from __future__ import annotations

import pathlib
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags

from cyb_jax import __version__, command_line
from cyb_jax.errors import InputError, did_you_mean

WIDTH = 100
SHELLS = ("bash", "zsh", "fish")


class _EndingFlag(flags.BooleanFlag):
  """A flag without a value that prints a text and ends the program with exit code 0."""

  def __init__(self, name: str, help_text: str, text: Callable[[], str], short_name: str | None = None):
    super().__init__(name, False, help_text, short_name=short_name, allow_override=True)
    self._text = text

  def parse(self, argument: Any) -> None:
    if self._parse(argument):
      _end(self._text())


class _CompletionFlag(flags.Flag):
  """A flag that prints a script for a shell and ends the program with exit code 0."""

  def __init__(self, text: Callable[[str], str]):
    parser, serializer = flags.ArgumentParser(), flags.ArgumentSerializer()
    super().__init__(
      parser, serializer, "completion", None, "Print a script that completes this program's flags in a shell, bash, zsh"
      ' or fish; in bash: eval "$(PROGRAM --completion=bash)".'
    )  # fmt: skip
    self._text = text

  def parse(self, argument: Any) -> None:
    shell = super()._parse(argument)
    if shell not in SHELLS:
      raise InputError(f"--completion: {shell!r} is unknown; {did_you_mean(str(shell), SHELLS)}")
    _end(self._text(shell))


def define_program_flags(description: str, program: str, parts: Mapping[str, Callable[[], None]]) -> None:
  """Defines the flags that all programs have.

  Args:
    description: the text above the flags in `--help`.
    program: its name, such as 'cyb-train'.
    parts: the functions that define the flags of each part of the program, by the word that names the part.
  """
  app.define_help_flags()  # so that absl doesn't define its own later
  flags.DEFINE_flag(_EndingFlag("help", "Show this help.", lambda: help_text(description), "?"))
  flags.DEFINE_flag(_EndingFlag("version", "Print the version of cyb_jax.", version_text))

  def completion(shell: str) -> str:
    # Imported on use, because it lists the fields of the config, which imports jax.
    from cyb_jax.cli.completion import script

    return script(shell, program, parts)

  flags.DEFINE_flag(_CompletionFlag(completion))


def version_text() -> str:
  return f"cyb_jax {__version__}\n"


def help_text(description: str, values: flags.FlagValues = flags.FLAGS) -> str:
  """The description, and all flags of the program with their meanings and defaults."""
  lines = [description.strip(), "", "flags:", ""]
  for name in command_line.own_flags(values):
    flag = values[name]
    is_set = flag.default or (flag.default == 0 and not flag.boolean)
    default = f" Default: {flag.default_as_str.strip(chr(39))}." if is_set else ""
    head = f"  --[no]{name}" if flag.boolean and name not in ("help", "version") else f"  --{name}"
    indent = " " * 6
    lines.append(head)
    lines += textwrap.wrap((flag.help or "").strip() + default, WIDTH, initial_indent=indent, subsequent_indent=indent)
  if command_line.takes_config(values):
    lines += [
      "  --config.GROUP.FIELD=VALUE",
      "      Changes a field of the config; cyb-train --config_help describes all fields.",
    ]
  return "\n".join(lines) + "\n"


def described(main: Callable[..., Any], argv: Sequence[str], parts: Mapping[str, Callable[[], None]]) -> str:
  """The docstring of the program's module, or of the module of the part that `argv` names."""
  for word in argv[1:]:
    if word in parts:
      return sys.modules[parts[word].__module__].__doc__ or ""
  return sys.modules[main.__module__].__doc__ or ""


def program_name(main: Callable[..., Any]) -> str:
  """The program's name, such as 'cyb-train', also if it was started with `python -m cyb_jax.cli.train`."""
  module = main.__module__
  if module == "__main__":
    spec = sys.modules["__main__"].__spec__
    module = spec.name if spec else ""
  if module.startswith("cyb_jax.cli."):
    return f"cyb-{module.rpartition('.')[2]}"
  return pathlib.PurePath(sys.argv[0]).name


def _end(text: str) -> None:
  sys.stdout.write(text)
  sys.stdout.flush()
  sys.exit(0)
