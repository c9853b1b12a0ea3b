"""The architecture as a test: permitted imports between packages and of third-party code, and sizes of modules and
functions.

The modules are parsed but never imported, so the check takes a second; `python tests/project/test_architecture.py
[ROOT]` prints every violation (`make lint` runs it). A unit is a package of `cyb_jax` or a top-level module.

An import counts wherever it is executed: at the top of a module, inside a function (a lazy import is also an import),
or as `importlib.import_module("literal")`. Imports under `if TYPE_CHECKING:` are not executed; they are used only in
annotations, cannot form a circle, and are not counted.

"""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Mapping

PACKAGE = "cyb_jax"
ROOT = pathlib.Path(__file__).parents[2]

# A module has fewer lines than this; a function has at most this many lines, from `def` to its end, with docstring.
MODULE_LINES = 450
FUNCTION_LINES = 60

# The units that each unit may import. Every row names only units of earlier rows, so no circle of units is possible.
READOUT = {"tiling", "chunked_readout", "fused_readout", "readout"}
CORE = READOUT | {"errors", "field_rules", "stopping", "losses", "pauses"}
MODEL = CORE | {"partitioning", "decoder", "costs", "methods"}
FILES = {"errors", "jsonl", "nested", "option_syntax", "distributed", "storage"}
RUN = MODEL | FILES | {"hub", "signals", "progress", "configs", "checkpointing", "data", "runs"}
TRAINING = RUN | {"interop", "evaluation", "generation", "report", "training"}
PROGRAMS = TRAINING | {"command_line"}
ALLOWED: dict[str, set[str]] = {
  "errors": set(),
  "field_rules": {"errors"},
  "jsonl": set(),
  "nested": set(),
  "progress": set(),
  "option_syntax": {"errors"},
  "hub": {"errors"},
  "signals": {"errors"},
  "stopping": set(),
  "losses": {"stopping"},
  "pauses": set(),
  "partitioning": {"errors"},
  "tiling": {"partitioning"},
  "chunked_readout": {"partitioning"},
  "fused_readout": {"chunked_readout", "stopping"},
  "readout": {"chunked_readout", "fused_readout", "stopping", "tiling", "partitioning"},
  "decoder": CORE | {"partitioning", "option_syntax"},
  "costs": {"errors", "decoder"},
  "methods": MODEL - {"methods"},
  "configs": MODEL | {"jsonl", "nested", "option_syntax"},
  "distributed": {"errors", "nested"},
  "storage": {"errors"},
  "checkpointing": FILES,
  "data": {"errors", "hub", "jsonl", "nested", "option_syntax", "progress", "storage"},
  "command_line": {"errors", "option_syntax", "storage", "data", "configs"},
  "runs": RUN - {"runs"},
  "interop": RUN,
  "evaluation": RUN,
  "generation": RUN | {"interop"},
  "report": RUN | {"evaluation"},
  "training": TRAINING - {"training", "generation", "report"},
  "serving": RUN | {"evaluation", "generation"},
  "studies": PROGRAMS,
  "compilation": PROGRAMS | {"studies"},
  "benchmarks": PROGRAMS | {"studies"},
  "cli": PROGRAMS | {"studies", "compilation", "benchmarks", "serving"},
  # The package loads `load` and `losses` on demand.
  PACKAGE: RUN | {"interop"},
}
# Names of the package that any module may import without a dependency on it.
FACTS = {f"{PACKAGE}.__version__"}

# (module, imported module): the reason for an import that the table does not allow.
UPWARD = {
  ("cyb_jax.benchmarks.lives", "cyb_jax.cli.train"): "the measured program; loaded once, then run in forks",
}

# Third-party packages that one unit alone imports.
OWNERS = {
  "seqio": "data",
  "tensorflow": "data",
  "tensorflow_datasets": "data",
  "orbax": "checkpointing",
  "tqdm": "progress",
  **dict.fromkeys(("starlette", "uvicorn"), "serving"),
  **dict.fromkeys(("tensorboard", "wandb", "trackio", "mlflow"), "training"),
}

# (unit, private third-party module): the reason for the import.
PRIVATE = {
  ("distributed", "jax._src.distributed"): "jax offers no public access to the key-value store of its coordinator",
  ("evaluation", "lm_eval.tasks._yaml_loader.load_yaml"): "lm_eval has no public reader of a task's file",
}

# Modules of MODULE_LINES or more, and functions of more than FUNCTION_LINES, that are permitted, with reasons.
LARGE_MODULES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {
  "cyb_jax.readout.slot_scores": "fifteen lines of signature and forty of documentation for 14 public arguments",
}


@dataclasses.dataclass(frozen=True)
class Import:
  """One name that a module imports when it is executed.

  Attributes:
    module: the dotted name of the importing module.
    line: the line of the import.
    name: the dotted name of the imported object; for `from a import b` it is `a.b`, whether b is a module or not.
  """

  module: str
  line: int
  name: str

  def __str__(self) -> str:
    return f"{self.module}:{self.line} imports {self.name}"


class Package:
  """The parsed modules of a package, and their imports.

  Args:
    root: the folder that contains the folder `cyb_jax`.
  """

  def __init__(self, root: pathlib.Path):
    paths = sorted((root / PACKAGE).rglob("*.py"))
    names = [".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    self.sources = {name: path.read_text(encoding="utf-8") for name, path in zip(names, paths)}
    self.trees = {name: ast.parse(source) for name, source in self.sources.items()}
    self.packages = {name for name, path in zip(names, paths) if path.name == "__init__.py"}
    self.imports = [found for name, tree in self.trees.items() for found in _imports(name, tree)]

  def resolve(self, name: str) -> str | None:
    """The module of this package that a dotted name belongs to; None for third-party code."""
    if name.split(".")[0] != PACKAGE:
      return None
    while name not in self.trees and "." in name:
      name = name.rpartition(".")[0]
    return name

  def edges(self) -> dict[str, dict[str, int]]:
    """Importing module -> imported module -> line.

    Importing `a.b` first executes `a`. This counts for a module outside of `a`; inside of `a` it is being executed
    already.
    """
    edges: dict[str, dict[str, int]] = {name: {} for name in self.trees}
    for found in self.imports:
      target = self.resolve(found.name)
      if target is None or found.name in FACTS:
        continue
      parents = [
        name for name in _ancestors(target) if name != PACKAGE and not f"{found.module}.".startswith(f"{name}.")
      ]
      for module in (target, *parents):
        if module != found.module:
          edges[found.module].setdefault(module, found.line)
    return edges


def _imports(module: str, tree: ast.Module) -> Iterator[Import]:
  pending: list[ast.AST] = [tree]
  while pending:
    node = pending.pop()
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
      pending += node.orelse
      continue
    pending += ast.iter_child_nodes(node)
    match node:
      case ast.Import(names=names):
        yield from (Import(module, node.lineno, alias.name) for alias in names)
      case ast.ImportFrom(level=0, module=str(source), names=names):
        yield from (Import(module, node.lineno, f"{source}.{alias.name}") for alias in names)
      case ast.ImportFrom(names=names):
        raise ValueError(f"{module}:{node.lineno}: a relative import; write the package's full name")
      case ast.Call(
        func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"), args=[ast.Constant(value=v)]
      ):
        yield Import(module, node.lineno, str(v))
      case ast.Attribute(attr="_src"):
        yield Import(module, node.lineno, ast.unparse(node))


def _ancestors(module: str) -> list[str]:
  parts = module.split(".")
  return [".".join(parts[:i]) for i in range(1, len(parts))]


def unit(module: str) -> str:
  """The package or top-level module of `cyb_jax` that a module belongs to."""
  return f"{module}.".split(".")[1] or PACKAGE


def circles(package: Package) -> list[str]:
  """Import circles between modules: one line for each strongly connected component of the import graph."""
  edges = package.edges()
  return [
    "import circle: " + ", ".join(f"{name}:{line} -> {target}" for name, target, line in _inner(edges, component))
    for component in _components(edges)
    if len(component) > 1
  ]


def _inner(edges: Mapping[str, Mapping[str, int]], component: set[str]) -> list[tuple[str, str, int]]:
  """The edges inside a component: (importing module, imported module, line)."""
  return [(name, to, line) for name in sorted(component) for to, line in edges[name].items() if to in component]


def _components(edges: Mapping[str, Mapping[str, int]]) -> list[set[str]]:
  """Strongly connected components (Kosaraju): depth-first order of the graph, then a search of the reversed graph."""

  def reach(start: str, graph: Mapping[str, list[str]], seen: set[str]) -> list[str]:
    seen.add(start)
    order, stack = [], [(start, iter(graph[start]))]
    while stack:
      name, targets = stack[-1]
      target = next((t for t in targets if t not in seen), None)
      if target is None:
        order.append(name)
        stack.pop()
      else:
        seen.add(target)
        stack.append((target, iter(graph[target])))
    return order

  forward = {name: list(targets) for name, targets in edges.items()}
  backward: dict[str, list[str]] = {name: [] for name in edges}
  for name, targets in edges.items():
    for target in targets:
      backward[target].append(name)
  seen: set[str] = set()
  order = [name for start in forward if start not in seen for name in reach(start, forward, seen)]
  seen = set()
  return [set(reach(start, backward, seen)) for start in reversed(order) if start not in seen]


def directions(package: Package) -> list[str]:
  """Imports of a unit that `ALLOWED` does not list, and units that `ALLOWED` does not contain."""
  found = [f"{name}: no row of ALLOWED" for name in sorted({unit(module) for module in package.trees} - set(ALLOWED))]
  for each in package.imports:
    source, target = unit(each.module), package.resolve(each.name)
    if target is None or each.name in FACTS or source == unit(target) or source not in ALLOWED:
      continue
    if unit(target) not in ALLOWED[source] and (each.module, target) not in UPWARD:
      found.append(f"{each}: {source} may not import {unit(target)}")
  return found


def third_party(package: Package) -> list[str]:
  """Third-party packages that are imported outside their unit, and private modules of third-party packages."""
  found = []
  for each in package.imports:
    top = each.name.split(".")[0]
    if package.resolve(each.name) is not None:
      continue
    if OWNERS.get(top, unit(each.module)) != unit(each.module):
      found.append(f"{each}: only {OWNERS[top]} may import {top}")
    private = any(part.startswith("_") and not part.startswith("__") for part in each.name.split("."))
    if private and (unit(each.module), each.name) not in PRIVATE:
      found.append(f"{each}: a private module of a third party")
  return found


def sizes(
  package: Package,
  large_modules: Mapping[str, str] = LARGE_MODULES,
  long_functions: Mapping[str, str] = LONG_FUNCTIONS,
) -> list[str]:
  """Modules and functions that are too large without an exception, and exceptions that are no longer needed."""
  lines = {name: len(source.splitlines()) for name, source in package.sources.items()}
  lengths = {name: length for module, tree in package.trees.items() for name, length in _functions(module, tree)}
  large = {name: number for name, number in lines.items() if number >= MODULE_LINES}
  long = {name: number for name, number in lengths.items() if number > FUNCTION_LINES}
  return [
    *(f"{name}: {large[name]} lines, a module has fewer than {MODULE_LINES}" for name in large.keys() - large_modules),
    *(f"{name}: {long[name]} lines, a function has at most {FUNCTION_LINES}" for name in long.keys() - long_functions),
    *(f"{name}: an exception that is not needed" for name in large_modules.keys() - large),
    *(f"{name}: an exception that is not needed" for name in long_functions.keys() - long),
  ]


def _functions(prefix: str, node: ast.AST) -> Iterator[tuple[str, int]]:
  """(dotted name, number of lines) of every function, including functions inside classes and functions."""
  for child in ast.iter_child_nodes(node):
    if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      name = f"{prefix}.{child.name}"
      if not isinstance(child, ast.ClassDef):
        yield name, child.end_lineno - child.lineno + 1
      yield from _functions(name, child)
    else:
      yield from _functions(prefix, child)


CHECKS = (circles, directions, third_party, sizes)


def main(root: pathlib.Path) -> int:
  """Writes all violations to standard output; the exit code is 1 if there are any."""
  package = Package(root)
  found = [line for check in CHECKS for line in sorted(check(package))]
  sys.stdout.writelines(f"{line}\n" for line in found)
  sys.stdout.write(f"architecture: {len(package.trees)} modules, {len(found)} violations\n")
  return int(bool(found))


# Tests of this repository, and of small trees with one violation each.


def test_no_import_circle():
  assert circles(Package(ROOT)) == []


def test_packages_import_only_permitted_units():
  assert directions(Package(ROOT)) == []


def test_third_party_packages_have_one_importer_and_private_modules_none():
  assert third_party(Package(ROOT)) == []


def test_modules_and_functions_are_small():
  assert sizes(Package(ROOT)) == []


def test_the_table_goes_downwards():
  """Every unit imports only units that precede it; `cli` and the package itself are last."""
  above: set[str] = set()
  for name, allowed in ALLOWED.items():
    assert allowed <= above, (name, allowed - above)
    above.add(name)


def _tree(folder: pathlib.Path, **modules: str) -> Package:
  """A package from the sources of its modules; `a__b` is the module b of the package a."""
  for name, source in {"__init__": "", **modules}.items():
    path = folder / PACKAGE / f"{name.replace('__', '/') if name != '__init__' else name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "__init__.py").touch()
    path.write_text(source)
  return Package(folder)


def test_a_lazy_circle_and_a_circle_through_a_package_are_found(tmp_path):
  lazy = _tree(tmp_path / "1", data__a="from cyb_jax.data import b", data__b="def f():\n  import cyb_jax.data.a")
  assert circles(lazy) == [
    "import circle: cyb_jax.data.a:1 -> cyb_jax.data.b, cyb_jax.data.b:2 -> cyb_jax.data.a",
  ]
  package = _tree(tmp_path / "2", data__a="from cyb_jax.data import name")
  (tmp_path / "2/cyb_jax/data/__init__.py").write_text("from cyb_jax.data.a import name")
  assert circles(package) == []
  assert len(circles(Package(tmp_path / "2"))) == 1
  outside = _tree(tmp_path / "3", data__a="", runs="import cyb_jax.data.a")
  (tmp_path / "3/cyb_jax/data/__init__.py").write_text("from cyb_jax import runs")
  assert circles(outside) == []
  assert len(circles(Package(tmp_path / "3"))) == 1
  annotations = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from cyb_jax.data import a"
  assert circles(_tree(tmp_path / "4", data__a="from cyb_jax.data import b", data__b=annotations)) == []


def test_upward_imports_and_unknown_units_are_found(tmp_path):
  package = _tree(
    tmp_path, errors="", stopping="from cyb_jax import errors", odd="", cli__x="from cyb_jax import errors"
  )
  assert directions(package) == [
    "odd: no row of ALLOWED",
    "cyb_jax.stopping:1 imports cyb_jax.errors: stopping may not import errors",
  ]


def test_third_party_packages_in_the_wrong_place_are_found(tmp_path):
  package = _tree(
    tmp_path,
    data__a="import seqio\nimport importlib\nimportlib.import_module('orbax.checkpoint')",
    runs="def f():\n  import tensorflow as tf\n  from jax._src import distributed",
    distributed__a="from jax._src import distributed",
    decoder__a="import jax\nx = jax._src.core",
  )
  assert sorted(third_party(package)) == [
    "cyb_jax.data.a:3 imports orbax.checkpoint: only checkpointing may import orbax",
    "cyb_jax.decoder.a:2 imports jax._src: a private module of a third party",
    "cyb_jax.runs:2 imports tensorflow: only data may import tensorflow",
    "cyb_jax.runs:3 imports jax._src.distributed: a private module of a third party",
  ]


def test_large_modules_and_long_functions_are_found(tmp_path):
  body = "  pass\n" * FUNCTION_LINES
  package = _tree(tmp_path, a="\n" * MODULE_LINES, b=f"def f():\n{body}", c=f"def f():\n{body[7:]}")
  assert [line.partition(":")[0] for line in sizes(package, {}, {})] == ["cyb_jax.a", "cyb_jax.b.f"]
  excepted = sizes(package, {"cyb_jax.a": "why"}, {"cyb_jax.b.f": "why", "cyb_jax.c.f": "why"})
  assert excepted == ["cyb_jax.c.f: an exception that is not needed"]


if __name__ == "__main__":
  sys.exit(main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
