"""The Markdown files of the repository: their links, commands and Python code."""

import re
import shlex

from cli import ROOT

from cyb_jax import command_line, configs

README = ROOT / "README.md"
PAGES = sorted([
  README, ROOT / "CONTRIBUTING.md", ROOT / "experiments" / "README.md", ROOT / "launch" / "README.md",
  *(ROOT / "docs").rglob("*.md"),
])  # fmt: skip


def name_of(path):
  return str(path.relative_to(ROOT))


def blocks(path, language):
  """The blocks of code in a language."""
  return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def commands(path):
  """The commands of the blocks `sh`, each a list of words; assignments before the program are left out."""
  found = []
  for block in blocks(path, "sh"):
    for line in block.replace("\\\n", " ").splitlines():
      words = shlex.split(line, comments=True)
      while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
      if words:
        found.append(words)
  return found


def prose(path):
  """The text without blocks of code."""
  return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def links(path):
  """The targets of the links and pictures that aren't addresses: (file, anchor)."""
  found = re.findall(r"\]\(([^)\s]+)\)", prose(path))
  return [target.partition("#")[::2] for target in found if not re.match(r"[a-z]+:", target)]


def anchors(path):
  """The anchors of the headings of a page."""
  headings = re.findall(r"^#+ (.*)", prose(path), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def check_config(source, fields):
  """The frozen config of a --config and of fields such as 'train.steps=5'."""
  path, _, argument = source.partition(":")
  namespace = {"__name__": "config"}
  exec((ROOT / path).read_text(), namespace)
  config = command_line.override(namespace["get_config"](argument), fields)
  # Of a pretrained model, which isn't there.
  config.decoder.preset = config.decoder.preset or "tiny"
  config.data.tokenizer = config.data.tokenizer or "bytes"
  return configs.freeze(config)
