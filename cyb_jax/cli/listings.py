"""The lists of `--list_experiments` and `--list_settings`: names with short descriptions."""

from __future__ import annotations

import ast
import pathlib
import textwrap
from collections.abc import Mapping

from cyb_jax import command_line

WIDTH = 100


def experiments() -> str:
  """The config files of the experiments, with the first paragraphs of their docstrings."""
  files = command_line.experiment_files()
  return _table({f"experiments/{name}": first_paragraph(path) for name, path in files.items()})


def settings() -> str:
  """The named settings, with their descriptions."""
  from cyb_jax.studies.settings import MATCH_MEANINGS, MEANINGS

  return _table(MEANINGS | MATCH_MEANINGS)


def first_paragraph(path: pathlib.Path) -> str:
  """The first paragraph of a file's docstring, in one line; the file isn't executed."""
  docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
  return " ".join(docstring.partition("\n\n")[0].split())


def _table(meanings: Mapping[str, str]) -> str:
  margin = max(map(len, meanings)) + 2
  lines = []
  for name, meaning in meanings.items():
    lines += textwrap.wrap(
      meaning, WIDTH, initial_indent=name.ljust(margin), subsequent_indent=" " * margin, break_on_hyphens=False
    )
  return "\n".join(lines) + "\n"
