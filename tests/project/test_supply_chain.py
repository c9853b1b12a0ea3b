"""No file that the project reads can run code: the project's own code calls nothing that executes input.

The modules of `cyb_jax`, `experiments` and `launch` are parsed but never imported. JUSTIFIED lists the calls that are
permitted nevertheless, with the reason.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("cyb_jax", "experiments", "launch")

# Packages whose readers execute code that is in their input.
MODULES = ("pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle")
# Calls that execute input or open a race, with the keyword that makes them safe, if there is one, and its values.
CALLS = {
  "eval": None,
  "exec": None,
  "compile": None,
  "__import__": None,
  "os.system": None,
  "os.popen": None,
  "tempfile.mktemp": None,
  "numpy.load": ("allow_pickle", (False,)),
  "numpy.fromregex": None,
  "yaml.load": None,
  "yaml.full_load": None,
  "yaml.unsafe_load": None,
  "torch.load": ("weights_only", (True,)),
  "pandas.read_pickle": None,
  "jinja2.Environment": None,
  "jinja2.Template": None,
  "shutil.unpack_archive": ("filter", ("data",)),
  "tarfile.extractall": ("filter", ("data",)),
  "tarfile.extract": ("filter", ("data",)),
  "zipfile.extractall": None,
  "urllib.request.urlopen": None,
}
# Methods of archives, whose objects have no module in the source text.
METHODS = {"extractall": ("filter", ("data",)), "extract": ("filter", ("data",))}

# (file, call): the reason.
JUSTIFIED: dict[tuple[str, str], str] = {}


class Names(ast.NodeVisitor):
  """The dotted name that each local name of a module stands for."""

  def __init__(self, tree):
    self.of = {}
    self.visit(tree)

  def visit_Import(self, node):
    for alias in node.names:
      self.of[alias.asname or alias.name.partition(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]

  def visit_ImportFrom(self, node):
    for alias in node.names:
      self.of[alias.asname or alias.name] = f"{node.module}.{alias.name}"

  def dotted(self, node):
    """'numpy.load' for `np.load`; None if the node is not a name."""
    text = ast.unparse(node)
    first, dot, rest = text.partition(".")
    return self.of.get(first, first) + dot + rest if all(part.isidentifier() for part in text.split(".")) else None


def violations(source):
  """(line, call or module) of everything in a module's source that MODULES and CALLS forbid."""
  tree = ast.parse(source)
  names, found = Names(tree), []
  for node in ast.walk(tree):
    match node:
      case ast.Import(names=aliases):
        found += [(node.lineno, a.name) for a in aliases if a.name.partition(".")[0] in MODULES]
      case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in MODULES:
        found.append((node.lineno, module))
      case ast.Call(func=func, args=args, keywords=keywords):
        given = {k.arg: k.value.value for k in keywords if isinstance(k.value, ast.Constant)}
        named = {k.arg for k in keywords}
        call = names.dotted(func)
        literal = args and isinstance(args[0], ast.Constant) and str(args[0].value).partition(".")[0] in MODULES
        if call is not None and call.endswith("import_module") and literal:
          found.append((node.lineno, args[0].value))
        if "shell" in named and given.get("shell") is not False:
          found.append((node.lineno, f"{call}(shell)"))
        method = func.attr if isinstance(func, ast.Attribute) else None
        for name, safe in ((call, CALLS.get(call, ...)), (method, METHODS.get(method, ...))):
          if safe is not ... and not (safe is not None and given.get(safe[0], ...) in safe[1]):
            found.append((node.lineno, name))
            break
  return found


def modules():
  return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_nothing_executes_input():
  found = {
    (str(path.relative_to(ROOT)), name): line
    for path in modules()
    for line, name in violations(path.read_text(encoding="utf-8"))
  }
  assert [f"{file}:{line} {name}" for (file, name), line in found.items() if (file, name) not in JUSTIFIED] == []
  assert [key for key in JUSTIFIED if key not in found] == [], "exceptions that are not needed"


@pytest.mark.parametrize(
  ("source", "name"),
  [
    ("import pickle", "pickle"),
    ("from marshal import loads", "marshal"),
    ("def f():\n  import dill.detect", "dill.detect"),
    ("import importlib\nimportlib.import_module('shelve')", "shelve"),
    ("import numpy as np\nnp.load(path)", "numpy.load"),
    ("import numpy as np\nnp.load(path, allow_pickle=flag)", "numpy.load"),
    ("from numpy import load as read\nread(path, None, flag)", "numpy.load"),
    ("import yaml\nyaml.load(text, yaml.SafeLoader)", "yaml.load"),
    ("eval(text)", "eval"),
    ("exec(text, {})", "exec"),
    ("code = compile(text, 'a', 'exec')", "compile"),
    ("import subprocess as s\ns.run(text, shell=True)", "subprocess.run(shell)"),
    ("import subprocess\nsubprocess.Popen(text, shell=flag)", "subprocess.Popen(shell)"),
    ("import os\nos.system(text)", "os.system"),
    ("import tarfile\ntarfile.open(path).extractall(folder)", "extractall"),
    ("archive.extractall(folder, filter='fully_trusted')", "extractall"),
    ("import tempfile\ntempfile.mktemp()", "tempfile.mktemp"),
    ("import jinja2\njinja2.Environment()", "jinja2.Environment"),
    ("from urllib import request\nrequest.urlopen(url)", "urllib.request.urlopen"),
  ],
)
def test_each_is_found(source, name):
  assert [found for _, found in violations(source)] == [name]


@pytest.mark.parametrize(
  "source",
  [
    "import numpy as np\nnp.load(path, allow_pickle=False)",
    "import yaml\nyaml.safe_load(text)",
    "import re\nre.compile(text)",
    "import subprocess\nsubprocess.run(command, shell=False)",
    "archive.extractall(folder, filter='data')",
    "import tempfile\ntempfile.mkstemp()",
    "import jinja2.sandbox\njinja2.sandbox.ImmutableSandboxedEnvironment()",
    "lowered.compile()",
  ],
)
def test_safe_forms_are_permitted(source):
  assert violations(source) == []
