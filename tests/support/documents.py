"""The Markdown files of the repository: their links, commands and Python code."""

import re
import shlex

from cli import ROOT

README = ROOT / "README.md"
PAGES = sorted([
  README, ROOT / "CONTRIBUTING.md", ROOT / "experiments" / "README.md", ROOT / "launch" / "README.md",
  *(ROOT / "docs").rglob("*.md"),
])  # fmt: skip


def name_of(path):
  return str(path.relative_to(ROOT))


def blocks(path, language):
  """The code blocks in a language."""
  return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def commands(path):
  """The commands of the `sh` blocks, each a list of words, without assignments before the program."""
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
  """The text without code blocks."""
  return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def links(path):
  """The targets of links and pictures, except URLs: (file, anchor)."""
  found = re.findall(r"\]\(([^)\s]+)\)", prose(path))
  return [target.partition("#")[::2] for target in found if not re.match(r"[a-z]+:", target)]


def anchors(path):
  """The anchors of the headings of a page."""
  headings = re.findall(r"^#+ (.*)", prose(path), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
