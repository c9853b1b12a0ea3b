"""The notebooks: executed whole, as they are but for their parameters, and kept without outputs."""

import ast
import json
import re

import cli
import pytest

NOTEBOOKS = sorted((cli.ROOT / "notebooks").glob("*.ipynb"))
# What stands in the place of a notebook's parameters; an expression over its variables, and what it must be in the end.
PARAMETERS = {
  "losses_only": "fast, repository = True, ''",
  "self_paced": "fast, repository, workdir, report = True, '', 'run', False",
}
RESULTS = {
  "losses_only": "sorted(walkers), perplexity['AP'] < perplexity['TBYS'], [len(c) for _, c in decoders.values()]",
  "self_paced": "run.step, len(record['slot_perplexity']) == K + 1 == 4 and len(order) > 0, "
  "[len(a) == len(b) and set(b) <= {0, 1, 2, 3} for a, b in zip(said.tokens, said.pauses)], "
  "coloured(ids[0], said.tokens[0], said.pauses[0]).count('<span ') == len(said.tokens[0])",
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
def test_notebooks_are_kept_without_outputs(path):
  notebook = json.loads(path.read_text())
  assert notebook["metadata"] == {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
  }
  for cell in notebook["cells"]:
    assert set(cell["metadata"]) <= {"tags"}
    assert re.fullmatch(r"[a-z][a-z-]+", cell["id"]), "a name, so that it stays"
    if cell["cell_type"] == "code":
      assert (cell["outputs"], cell["execution_count"]) == ([], None)
  assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
  # As json and Jupyter write it, so that saving it unchanged is no change.
  assert path.read_text() == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


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
  nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed; pip install '.[test]'")
  nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed; pip install '.[test]'")
  notebook = nbformat.read(cli.ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
  (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
  parameters.source = PARAMETERS[name].replace(*replaced) if replaced else PARAMETERS[name]
  result = nbformat.v4.new_code_cell(RESULTS[name])
  notebook.cells.append(result)
  client = nbclient.NotebookClient(
    notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
  )
  client.execute(env=cli.environment())
  return ast.literal_eval(result.outputs[-1]["data"]["text/plain"])


# The one that trains takes a while.
RUN = [name if name == "losses_only" else pytest.param(name, marks=pytest.mark.slow) for name in EXPECTED]


@pytest.mark.parametrize("name", RUN)
@pytest.mark.slow
def test_notebooks_run(name, tmp_path):
  assert execute(name, tmp_path) == EXPECTED[name]


@pytest.mark.slow
def test_the_report_in_the_notebook(tmp_path):
  assert execute("self_paced", tmp_path, "False", "True") == EXPECTED["self_paced"]
  assert (tmp_path / "run" / "report" / "index.html").exists()
