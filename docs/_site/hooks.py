"""Hooks of mkdocs: generated references, pages outside docs/, and the check for missing docstrings."""

from __future__ import annotations

import logging
import pathlib
import re
import sys
import tomllib

from mkdocs.structure.files import File

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import docstrings
import generated_pages as reference

ROOT = pathlib.Path(__file__).parents[2]
# Warnings of this logger fail a strict build.
_log = logging.getLogger("mkdocs.plugins.cyb_jax")
# Pages that are stored next to the files that they describe.
_OUTSIDE = ("experiments/README.md", "launch/README.md")
_MARKER = re.compile(r"<!-- generated: (\w+) -->")


def on_config(config):
  """Reads the repository's address from pyproject.toml, its only source."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  config.repo_url = project.get("urls", {}).get("Repository")
  return config


def on_files(files, config):
  """Adds the pages that are stored outside docs/."""
  for path in _OUTSIDE:
    files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
  return files


def on_page_markdown(markdown, page, config, files):
  """Fills in generated parts, and adapts links that leave docs/ in the repository."""
  path = page.file.src_uri
  for identifier in docstrings.identifiers(markdown):
    for missing in docstrings.without_docstring(identifier):
      _log.warning("%s: %s has no docstring", path, missing)
  for outside in _OUTSIDE:
    markdown = re.sub(rf"\]\(\.\./((?:\.\./)*{re.escape(outside)})", r"](\1", markdown)
  if path in _OUTSIDE:
    markdown = re.sub(r"\]\(\.\./docs/", "](../", markdown)
    markdown = re.sub(r"\]\((?:\.\./)?(?=(?:experiments|launch)/)", "](../", markdown)
  return _MARKER.sub(lambda found: reference.PARTS[found[1]](), markdown)
