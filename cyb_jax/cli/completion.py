"""Scripts that complete the command line of a program in bash, zsh and fish.

A script contains the program's flags, the fields of the config after `--config.`, the experiments after `--config=`,
and their settings after the colon, as they are when the script is generated. Completion therefore starts no program.
The values of other flags are completed as paths.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping

from absl import flags

from cyb_jax import command_line
from cyb_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Words:
  """The words of a program's command line.

  Attributes:
    flags: by part of the program, '' for the program itself: flags such as '--workdir=' or '--dry_run', with their
      help.
    fields: flags such as '--config.train.steps=', with the meaning of the field; empty if the program has no config.
    experiments: config files such as 'experiments/quickstart.py'.
    settings: by experiment, the words that may follow its colon.
  """

  flags: Mapping[str, Mapping[str, str]]
  fields: Mapping[str, str]
  experiments: tuple[str, ...]
  settings: Mapping[str, tuple[str, ...]]


def script(shell: str, program: str, parts: Mapping[str, Callable[[], None]]) -> str:
  """The script for a shell.

  Args:
    shell: 'bash', 'zsh' or 'fish'.
    program: the command that is completed, such as 'cyb-train'; its flags are defined.
    parts: the functions that define the flags of each part of the program.

  Raises:
    InputError: there is no script for this shell.
  """
  scripts = {"bash": _bash, "zsh": _zsh, "fish": _fish}
  if shell not in scripts:
    raise InputError(f"--completion: {shell!r} is unknown; there are {', '.join(scripts)}")
  return scripts[shell](program, words_of(parts))


def words_of(parts: Mapping[str, Callable[[], None]]) -> Words:
  """The words of the program whose flags are defined, and of its parts."""
  own = _flags(command_line.own_flags())
  has_config = command_line.takes_config()
  by_part = {"": own}
  for part, define in parts.items():
    before = set(flags.FLAGS)
    define()
    has_config |= command_line.takes_config()
    by_part[part] = _flags([name for name in command_line.own_flags() if name not in before])
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
  return Words(by_part, _fields(), *_experiments()) if has_config else Words(by_part, {}, (), {})


def _flags(names: list[str]) -> dict[str, str]:
  found = {}
  for name in names:
    flag = flags.FLAGS[name]
    takes_value = not flag.boolean and name != "config_help"
    found[f"--{name}" + "=" * takes_value] = " ".join((flag.help or "").split())
  return found


def _fields() -> dict[str, str]:
  from cyb_jax.configs.documentation import field_reference

  return {f"--config.{field.path}=": field.meaning for field in field_reference()}


def _experiments() -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
  from cyb_jax.studies.settings import PAUSE_RUNS, SETTINGS

  files = tuple(f"experiments/{name}" for name in command_line.experiment_files())
  # The names of pause-training's runs are not in SETTINGS.
  return files, {file: PAUSE_RUNS if file.endswith("pause_training.py") else tuple(SETTINGS) for file in files}


def _function(program: str) -> str:
  return "_" + program.replace("-", "_")


def _by_settings(words: Words) -> dict[tuple[str, ...], list[str]]:
  """The names of the experiments' files, such as '*reviews.py', by the settings that they take."""
  found: dict[tuple[str, ...], list[str]] = {}
  for file, settings in words.settings.items():
    found.setdefault(settings, []).append(f"*{file.rpartition('/')[2]}")
  return found


def _cases(words: Words, case: str) -> str:
  """The settings of each experiment as branches of a shell's `case`; the template `case` formats a branch."""
  return "\n".join(
    case.format(pattern=" | ".join(patterns), settings=" ".join(settings))
    for settings, patterns in _by_settings(words).items()
  )


_BASH = """# Completion of {program} in bash: eval "$({program} --completion=bash)"
{function}() {{
  local word file candidates='' breaks='' cut='' setting
  word=${{COMP_LINE:0:COMP_POINT}}
  word=${{word##* }}
  case $word in
    --config=*:*)
      file=${{word%%:*}}
      case $file in
{settings}
      esac ;;
    --config=*) for file in {experiments}; do candidates+=" --config=$file"; done ;;
    --config.*) candidates={fields} ;;
    --*=*) ;;
    *)
      candidates={flags}
      case ${{COMP_WORDS[1]}} in
{parts}
      esac ;;
  esac
  COMPREPLY=($(compgen -W "$candidates" -- "$word"))
  # Bash replaces only the part of the word after the last = or :.
  [[ $COMP_WORDBREAKS == *=* ]] && breaks+='='
  [[ $COMP_WORDBREAKS == *:* ]] && breaks+=':'
  if [[ -n $breaks && $word == *[$breaks]* ]]; then
    cut=${{word%"${{word##*[$breaks]}}"}}
    COMPREPLY=("${{COMPREPLY[@]#"$cut"}}")
  fi
  if [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *[=y] && $word != --config=*:* ]]; then
    compopt -o nospace 2> /dev/null
  fi
}}
complete -o default -F {function} {program}
"""


def _bash(program: str, words: Words) -> str:
  case = '        {pattern}) for setting in {settings}; do candidates+=" $file:$setting"; done ;;'
  parts = [
    f"        {part}) candidates+={shlex.quote(' ' + ' '.join(found))} ;;"
    for part, found in words.flags.items()
    if part
  ]
  first = [*words.flags[""], *(part for part in words.flags if part)]
  return _BASH.format(
    program=program,
    function=_function(program),
    settings=_cases(words, case) or "        *) ;;",
    experiments=" ".join(words.experiments) or "''",
    fields=shlex.quote(" ".join(words.fields)),
    flags=shlex.quote(" ".join(first)),
    parts="\n".join(parts) or "        *) ;;",
  )


_ZSH = """#compdef {program}
# Completion of {program} in zsh: after compinit, source <({program} --completion=zsh)
{function}() {{
  local -a candidates
  local file
  case $PREFIX in
    --config=*:*)
      file=${{PREFIX%%:*}}
      compset -P '*:'
      case $file in
{settings}
      esac
      compadd -a candidates ;;
    --config=*)
      compset -P '*='
      candidates=({experiments})
      compadd -S '' -a candidates || _files ;;
    --config.*)
      candidates=({fields})
      compadd -S '' -a candidates ;;
    --*=*)
      compset -P '*='
      _files ;;
    *)
      candidates=({flags})
      case $words[2] in
{parts}
      esac
      compadd -S '' -a candidates ;;
  esac
}}
compdef {function} {program}
"""


def _zsh(program: str, words: Words) -> str:
  case = "        {pattern}) candidates=({settings}) ;;"
  parts = [f"        {part}) candidates+=({' '.join(found)}) ;;" for part, found in words.flags.items() if part]
  return _ZSH.format(
    program=program,
    function=_function(program),
    settings=_cases(words, case) or "        *) ;;",
    experiments=" ".join(words.experiments),
    fields=" ".join(words.fields),
    flags=" ".join([*words.flags[""], *(part for part in words.flags if part)]),
    parts="\n".join(parts) or "        *) ;;",
  )


def _fish(program: str, words: Words) -> str:
  function = _function(program) + "_configs"
  lines = [f"# Completion of {program} in fish: {program} --completion=fish | source"]
  if words.experiments:
    lines += [f"function {function}", "  set -l path (string replace -r '^--config=' '' -- (commandline -ct))"]
    lines += ["  set -l experiment (string split -m 1 : -- $path)[1]", "  switch $path"]
    for settings, files in _by_settings(words).items():
      patterns = " ".join(f"'{file}:*'" for file in files)
      lines += [f"    case {patterns}", f'      printf "$experiment:%s\\n" {" ".join(settings)}']
    lines += ["    case '*'", f"      printf '%s\\n' {' '.join(words.experiments)}", "  end", "end"]
  names = [part for part in words.flags if part]
  if names:
    lines.append(f"complete -c {program} -n __fish_is_first_arg -f -a {shlex.quote(' '.join(names))}")
  for part, found in words.flags.items():
    where = f" -n '__fish_seen_subcommand_from {part}'" if part else ""
    for flag, meaning in found.items():
      lines.append(f"complete -c {program}{where} {_fish_flag(flag, meaning, function)}")
  lines += [f"complete -c {program} {_fish_flag(flag, meaning, function)}" for flag, meaning in words.fields.items()]
  return "\n".join(lines) + "\n"


def _fish_flag(flag: str, meaning: str, configs: str) -> str:
  name = flag.removeprefix("--").removesuffix("=")
  text = meaning.replace("\\", "\\\\").replace("'", "\\'")
  value = "" if not flag.endswith("=") else f" -x -a '({configs})'" if name == "config" else " -r"
  return f"-l {name}{value} -d '{text}'"
