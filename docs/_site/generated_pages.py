"""Generates parts of the reference: config fields, programs with their flags, settings."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import tomllib
from collections.abc import Callable, Iterable
from typing import Any

from absl import flags

ROOT = pathlib.Path(__file__).parents[2]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """A Markdown table."""
  head = list(head)
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def code(value: Any) -> str:
  return f"`{value}`" if value != "" else "`''`"


def text(raw: str) -> str:
  """The text of a docstring or a flag for a Markdown page: one line, without HTML outside of `code`."""
  parts = " ".join(raw.split()).split("`")
  return "`".join(part if i % 2 else part.replace("<", "&lt;").replace("*", r"\*") for i, part in enumerate(parts))


def sentence(raw: str) -> str:
  """`text` with a capital first letter and a full stop."""
  found = text(raw).rstrip(".")
  return f"{found[:1].upper()}{found[1:]}."


def program_names() -> dict[str, str]:
  """{name of a program: name of its module in cyb_jax.cli}."""
  scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
  return {name: target.partition(":")[0].rpartition(".")[2] for name, target in scripts.items()}


def flags_of(define: Callable[[], Any]) -> dict[str, flags.Flag]:
  """The flags that a function defines; they are removed from absl's global flags afterwards."""
  before = set(flags.FLAGS)
  try:
    define()
    return {name: flags.FLAGS[name] for name in sorted(set(flags.FLAGS) - before)}
  finally:
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)


def programs() -> dict[str, dict[str, flags.Flag]]:
  """{command, for example 'cyb-benchmark train': its flags by name}."""
  found = {}
  for name, module_name in program_names().items():
    module = importlib.import_module(f"cyb_jax.cli.{module_name}")
    if module_name == "benchmark":
      for part, (define, *_) in module.BENCHMARKS.items():
        found[f"{name} {part}"] = flags_of(define)
    else:
      found[name] = flags_of(module.define_flags)
  return found


def _programs_part() -> str:
  modules = program_names()
  parts = []
  for name, defined in programs().items():
    script, _, part = name.partition(" ")
    if not part or part == "readout":
      module = importlib.import_module(f"cyb_jax.cli.{modules[script]}")
      first, _, rest = inspect.cleandoc(module.__doc__).partition("\n\n")
      parts.append(f"## {script}\n\n{text(first)}\n\n```text\n{rest}\n```" if rest else f"## {script}\n\n{text(first)}")
    if part:
      parts.append(f"### {name}")
    rows = [[code(f"--{flag.name}"), flag.flag_type(), _default(flag), text(flag.help)] for flag in defined.values()]
    parts.append(table(["flag", "type", "default", "meaning"], rows))
  return "\n\n".join(parts)


def _default(flag: flags.Flag) -> str:
  if flag.name == "config" or flag.default is None:
    return ""
  if isinstance(flag.default, bool):
    return code(str(flag.default).lower())
  value = flag.default_as_str
  return code(value.strip("'\"") if isinstance(flag.default, str) else value.strip("'"))


def _fields_part() -> str:
  from cyb_jax.configs import documentation

  meanings = documentation.groups()
  fields = documentation.field_reference()
  parts = []
  for group in dict.fromkeys(field.group for field in fields):
    title = f"## {group}\n\n{sentence(meanings[group])}" if group else "## No group"
    rows = []
    for field in fields:
      if field.group == group:
        meaning = text(field.meaning) + (f" Methods: {', '.join(map(code, field.methods))}." if field.methods else "")
        rows.append([code(field.path), text(field.type), code(field.default), meaning, text(field.allowed)])
    parts.append(f"{title}\n\n" + table(["field", "type", "default", "meaning", "accepted values"], rows))
  return "\n\n".join(parts)


def _settings_part() -> str:
  from cyb_jax.decoder import PRESETS, num_params
  from cyb_jax.studies import settings

  rows = []
  for name, fields in settings.SETTINGS.items():
    given = [code(f"{key}={value}") for key, value in fields.items() if key != "name"]
    decoder = [code(f"decoder.{key}={value}") for key, value in settings.DECODERS.get(name, {}).items()]
    rows.append([code(name), text(settings.MEANINGS[name]), code(fields["name"]), ", ".join(given + decoder)])
  sizes = [
    [code(name), f"{num_params(config) / 1e6:,.1f}M", str(config.vocab_size), str(config.num_layers),
     str(config.d_model), str(config.num_heads), str(config.num_kv_heads), str(config.head_size), str(config.mlp_size)]
    for name, config in PRESETS.items()
  ]  # fmt: skip
  regimes = [[code(name), f"{epochs:g}", f"{thirds}/3"] for name, (epochs, thirds) in settings.REGIMES.items()]
  return "\n\n".join(
    [
      "## Settings",
      "`pretrained` takes no training steps. Fields of the decoder are set only if the model is trained from scratch."
      " In addition, `deeper@SETTING` and `wider@SETTING` are plain models with the cost of the setting at inference;"
      " with `/training`, in a training step.",
      table(["setting", "meaning", "`method.name`", "other fields"], rows),
      "## Sizes",
      "These are the values of `decoder.preset`; the parameters are counted at the preset's own vocabulary.",
      table(
        [
          "size",
          "parameters",
          "vocabulary",
          "layers",
          "width",
          "heads",
          "key and value heads",
          "head size",
          "MLP size",
        ],
        sizes,
      ),
      "## Data regimes",
      table(["regime", "passes", "share of the training windows"], regimes),
    ]
  )


PARTS: dict[str, Callable[[], str]] = {
  "fields": _fields_part,
  "programs": _programs_part,
  "settings": _settings_part,
}
