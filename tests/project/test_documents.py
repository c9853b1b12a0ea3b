"""README, docs/ and the reference: their rules, links and commands. `test_tutorials` executes the tutorials."""

import re
import shutil
import subprocess
import sys

import cli
import documents
import pytest

from cyb_jax import configs
from cyb_jax.errors import InputError
from cyb_jax.studies import settings

SITE = cli.ROOT / "docs" / "_site"


@pytest.fixture(scope="module")
def reference():
  sys.path.insert(0, str(SITE))
  try:
    import generated_pages as reference

    yield reference
  finally:
    sys.path.remove(str(SITE))


@pytest.fixture(scope="module")
def programs(reference):
  return reference.programs()


def test_the_readme_is_short():
  lines = documents.README.read_text().splitlines()
  assert len(lines) <= 150
  assert [line for line in lines if len(line) > 100] == []
  assert documents.blocks(documents.README, "sh")[0] == "make quickstart\nmake test\n"


@pytest.mark.parametrize("path", documents.PAGES, ids=documents.name_of)
def test_links_lead_somewhere(path):
  for target, anchor in documents.links(path):
    found = (path.parent / target).resolve() if target else path
    assert found.exists(), target
    assert not anchor or anchor in documents.anchors(found), f"{target}#{anchor}"


def test_every_page_is_in_the_navigation():
  navigation = (cli.ROOT / "mkdocs.yml").read_text()
  for path in (cli.ROOT / "docs").rglob("*.md"):
    assert f" {path.relative_to(cli.ROOT / 'docs')}\n" in navigation, path


def split(words, programs):
  """(the program's name, its other words), as the table of programs has them."""
  if words[:2] == ["python", "-m"] and words[2].startswith("cyb_jax.cli."):
    words = [words[2].replace("cyb_jax.cli.", "cyb-"), *words[3:]]
  if words[0] == "cyb-benchmark":
    return " ".join(words[:2]), words[2:]
  return words[0], words[1:]


def check(words, programs):
  """Fails unless a command would be accepted, as far as that needs no files."""
  name, rest = split(words, programs)
  assert name in programs, f"there is no program {name}"
  fields, source = [], None
  for word in rest:
    flag, equals, value = word.partition("=")
    assert flag.startswith("--"), f"{word!r} is no flag; values are given as --name=value"
    flag = flag.removeprefix("--")
    if flag.startswith("config."):
      fields.append(f"{flag.removeprefix('config.')}={value}")
      continue
    known = programs[name]
    if not equals:
      assert flag in known or flag.removeprefix("no") in known, f"{name} has no flag --{flag}"
      continue
    assert flag in known, f"{name} has no flag --{flag}"
    if flag == "config":
      source = value
    else:
      known[flag].parser.parse(value)
  if source:
    documents.check_config(source, fields)


@pytest.mark.parametrize("path", documents.PAGES, ids=documents.name_of)
def test_commands_would_be_accepted(path, programs, monkeypatch):
  monkeypatch.chdir(cli.ROOT)
  for words in documents.commands(path):
    of_ours = words[0].startswith("cyb-") or (len(words) > 2 and words[2].startswith("cyb_jax.cli."))
    # The method of the guide isn't registered here; test_docs.py registers it, and checks the command.
    if of_ours and "--config.method.name=fading_slots" not in words:
      check(words, programs)
    elif words[0] == "make":
      assert re.search(rf"^{words[1]}:", (cli.ROOT / "Makefile").read_text(), re.MULTILINE), words


def test_commands_that_are_wrong_are_found(programs, monkeypatch):
  monkeypatch.chdir(cli.ROOT)
  config = "--config=experiments/reviews.py:ap"
  with pytest.raises(AssertionError, match="there is no program cyb-trian"):
    check(["cyb-trian"], programs)
  with pytest.raises(AssertionError, match="cyb-train has no flag --workdirs"):
    check(["cyb-train", "--workdirs=x"], programs)
  with pytest.raises(ValueError, match="ten"):
    check(["cyb-evaluate", "--limit=ten"], programs)
  with pytest.raises(InputError, match="learning_rat"):
    check(["cyb-train", config, "--config.optimizer.learning_rat=1"], programs)
  with pytest.raises(InputError, match="sequence_length"):
    check(["cyb-train", config, "--config.data.sequence_length=0"], programs)


def test_the_reference_names_everything(reference, programs):
  fields = reference.PARTS["fields"]()
  frozen = configs.to_dict(configs.default())
  for group, values in frozen.items():
    for name in values if isinstance(values, dict) else ():
      assert f"| `{group}.{name}` |" in fields
  assert "| `init_from` |" in fields
  text = reference.PARTS["programs"]()
  for name, flags in programs.items():
    assert re.search(rf"^##+ {name}$", text, re.MULTILINE)
    for flag in flags:
      assert f"| `--{flag}` |" in text
  assert "| `--config` |" in text
  assert "| `--variant` |" in text
  text = reference.PARTS["settings"]()
  for name in (*settings.SETTINGS, *settings.REGIMES, *settings.PRESETS):
    assert f"| `{name}` |" in text


def test_text_of_the_reference_is_no_html(reference):
  assert reference.text("rows of <pause>, `<dont_know>` and 2 * W") == r"rows of &lt;pause>, `<dont_know>` and 2 \* W"
  assert reference.table(["a"], [["x|y"]]).splitlines()[-1] == r"| x\|y |"


PACKAGE = '''
"""A package."""
import dataclasses
from typing import Protocol

class Reads(Protocol):
  """A protocol."""

  def read(self):
    """Reads."""

class Reader:
  """It implements the protocol."""

  def read(self): ...
  def write(self): ...
  def _private(self): ...

@dataclasses.dataclass
class Options:
  """Options.

  Attributes:
    a, b: documented together.
  """

  a: int
  b: int
  c: int

def undocumented(): ...
'''


def test_missing_docstrings_are_found(tmp_path):
  pytest.importorskip("griffe", reason="griffe is not installed; pip install '.[docs]'")
  sys.path.insert(0, str(SITE))
  try:
    import docstrings
  finally:
    sys.path.remove(str(SITE))
  (tmp_path / "example").mkdir()
  (tmp_path / "example" / "__init__.py").write_text(PACKAGE.lstrip())
  root = docstrings.package(tmp_path, "example")
  assert docstrings.without_docstring("example", root) == [
    "example.Reader.write", "example.Options.c (under Attributes)", "example.undocumented",
  ]  # fmt: skip
  missing = [
    name
    for path in (cli.ROOT / "docs" / "reference" / "api").glob("*.md")
    for identifier in docstrings.identifiers(path.read_text())
    for name in docstrings.without_docstring(identifier)
  ]
  assert missing == []


def build(folder, output):
  pytest.importorskip("mkdocs", reason="mkdocs is not installed; pip install '.[docs]'")
  pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed; pip install '.[docs]'")
  env = cli.environment() | {"NO_MKDOCS_2_WARNING": "1"}
  env["PYTHONPATH"] = f"{folder}:{env['PYTHONPATH']}"
  # With --quiet mkdocs doesn't count warnings, and passes.
  command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={output}"]
  return subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, check=False)


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
  done = build(cli.ROOT, tmp_path / "site")
  assert done.returncode == 0, done.stderr
  page = (tmp_path / "site" / "reference" / "fields.html").read_text()
  assert "optimizer.learning_rate" in page
  # Nothing is fetched when a page is opened.
  assert not re.search(
    r'<(?:script|link|img)[^>]*(?:src|href)="https?:', (tmp_path / "site" / "index.html").read_text()
  )


BROKEN = [
  ("docs/index.md", "(installation.md)", "(instalation.md)", "'instalation.md', but the target is not found"),
  ("docs/guides/training.md", "(evaluation.md#keys)", "(evaluation.md#kees)", "does not contain an anchor '#kees'"),
  ("cyb_jax/losses.py", '  """Returns', '  text = """Returns', "has no docstring"),
]


@pytest.mark.slow
def test_broken_links_and_missing_docstrings_fail_the_build(tmp_path):
  for name in ("cyb_jax", "docs", "experiments", "launch"):
    shutil.copytree(cli.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("mkdocs.yml", "pyproject.toml"):
    shutil.copy(cli.ROOT / name, tmp_path / name)
  for file, old, new, _ in BROKEN:
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
  done = build(tmp_path, tmp_path / "site")
  assert done.returncode != 0
  assert "Aborted with 3 warnings in strict mode" in done.stdout + done.stderr
  for *_, warning in BROKEN:
    assert warning in done.stderr
