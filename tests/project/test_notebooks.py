"""The notebooks: executed whole with the parameters of a fast variant, and stored with clean outputs."""

import ast
import importlib.util
import json
import re
import sys

import cli
import pytest

from cyb_jax import configs
from cyb_jax.methods import METHODS

NOTEBOOKS = sorted((cli.ROOT / "notebooks").glob("*.ipynb"))
# The parameters of the fast variant; an expression over a notebook's variables, and its value in the end.
PARAMETERS = {
  "losses_only": "fast, repository = True, ''",
  "self_paced": "fast, repository, workdir, report = True, '', 'run', False",
}
RESULTS = {
  "losses_only": "sorted(walkers), perplexity['AP'] < perplexity['TBYS'], [len(c) for _, c in decoders.values()]",
  "self_paced": "run.step, len(record['slot_perplexity']) == K + 1 == 4 and len(order) > 0, "
  "[len(a) == len(b) and set(b) <= {0, 1, 2, 3} for a, b in zip(generation.tokens, generation.pauses)], "
  "coloured(ids[0], generation.tokens[0], generation.pauses[0]).count('<span ') == len(generation.tokens[0])",
}
EXPECTED = {
  "losses_only": (["AP", "DP", "TBYS", "VA"], True, [40, 40]),
  "self_paced": (30, True, [True, True, True], True),
}


def cells(path, kind="code"):
  return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell):
  return "".join(cell["source"])


def pinned():
  """{name: version} of constraints.txt, without those that hang on the Python."""
  lines = (cli.ROOT / "constraints.txt").read_text().splitlines()
  return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#") and ";" not in line)


def test_every_notebook_is_executed():
  assert {path.stem for path in NOTEBOOKS} == set(RESULTS) == set(EXPECTED)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_no_metadata_of_a_machine(path):
  notebook = json.loads(path.read_text())
  assert notebook["metadata"] == {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
  }
  for cell in notebook["cells"]:
    assert set(cell["metadata"]) <= {"tags"}
    assert re.fullmatch(r"[a-z][a-z-]+", cell["id"]), "a name, so that it stays"
  assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
  # As json and Jupyter write it, so that saving it unchanged is no change.
  assert path.read_text() == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def shows(cell):
  """Whether a cell ends with a value or draws a figure."""
  last = ast.parse(source(cell)).body[-1]
  is_value = isinstance(last, ast.Expr) and not ast.unparse(last).startswith(("plt.", "np.testing."))
  return is_value or "plt.subplots" in source(cell)


# What an output must not contain: paths of a machine, logs and warnings.
FOREIGN = re.compile(r"/(?:home|root|tmp|usr|work|mnt|opt|var|Users|content)/|[A-Z]:\\\\|Warning|Traceback|tokens/s")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_with_outputs(path):
  """They are those of the stored code in order; notebooks/execute.py writes them."""
  code = cells(path)
  assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run notebooks/execute.py"
  for cell in code:
    assert bool(cell["outputs"]) == shows(cell), cell["id"]
    for output in cell["outputs"]:
      assert output["output_type"] in ("execute_result", "display_data"), cell["id"]
      for kind, value in output["data"].items():
        assert kind == "image/png" or not FOREIGN.search("".join(value)), cell["id"]
  assert path.stat().st_size < 500_000


def test_notebooks_name_what_exists():
  """Modules and names of cyb_jax, in the text as well as in the code."""
  for path in NOTEBOOKS:
    for cell in cells(path):
      for node in ast.walk(ast.parse(source(cell))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("cyb_jax"):
          for name in node.names:
            __import__(node.module, fromlist=[name.name])
            assert hasattr(sys.modules[node.module], name.name), f"{path.stem}: {node.module}.{name.name}"
    known = {module.stem for module in (cli.ROOT / "cyb_jax").rglob("*.py")} | {"cyb_jax"}
    known |= set(configs.all_options()) | {name for name in METHODS}
    text = "".join(source(cell) for cell in cells(path, "markdown"))
    for name in re.findall(r"`([a-z_]+)`", text):
      assert name in known, f"{path.stem}: `{name}` is neither a module nor an option nor a method"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_install_nothing_over_the_runtimes_own_jax(path):
  install = next(source(cell) for cell in cells(path) if cell["id"] == "install")
  assert install.count('"install"') == install.count('"--no-deps"') == 1
  assert re.search(r'^assert (importlib\.metadata\.)?version\("jax"\) == own_jax$', install, re.MULTILINE)
  for node in ast.walk(ast.parse(install)):
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PINNED":
      versions = ast.literal_eval(node.value)
      assert versions.keys().isdisjoint({"jax", "jaxlib", "numpy", "protobuf", "tensorflow"})
      assert versions == {name: pinned()[name] for name in versions}


def execute(name, folder, *replaced):
  """What the expression over a notebook's variables is after it; `replaced`: in its parameters, by what."""
  pytest.importorskip("nbclient", reason="nbclient is not installed; pip install '.[test]'")
  nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed; pip install '.[test]'")
  notebook = nbformat.read(cli.ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
  (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
  parameters.source = PARAMETERS[name].replace(*replaced) if replaced else PARAMETERS[name]
  result = nbformat.v4.new_code_cell(RESULTS[name])
  notebook.cells.append(result)
  spec = importlib.util.spec_from_file_location("execute", cli.ROOT / "notebooks" / "execute.py")
  program = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(program)
  program.execute(notebook, str(folder), cli.environment(), 300)
  return ast.literal_eval(result.outputs[-1]["data"]["text/plain"])


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.slow
def test_notebooks_run(name, tmp_path):
  assert execute(name, tmp_path) == EXPECTED[name]


@pytest.mark.slow
def test_the_report_in_the_notebook(tmp_path):
  assert execute("self_paced", tmp_path, "False", "True") == EXPECTED["self_paced"]
  assert (tmp_path / "run" / "report" / "index.html").exists()
