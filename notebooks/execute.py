"""Executes the notebooks and stores their outputs in them: python notebooks/execute.py [NAME ...]

It needs the extras `test`, `report` and `reviews`. The notebooks run on the CPU in a temporary folder, with the
parameters that they have. Logs are left out of the outputs: they hold times and paths of one machine.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import tempfile

import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).parent


def execute(notebook: nbformat.NotebookNode, folder: str, env: dict[str, str], seconds: int) -> None:
  """Executes a notebook; its cells then have their outputs.

  Args:
    notebook: of format 4.
    folder: the working directory of the code.
    env: the environment of the kernel.
    seconds: the time limit of a cell.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell fails.
  """
  client = nbclient.NotebookClient(
    notebook, timeout=seconds, kernel_name="python3", record_timing=False, resources={"metadata": {"path": folder}}
  )
  client.execute(env=env)


def kept(output: nbformat.NotebookNode) -> bool:
  """Whether an output is stored: everything except what is written to standard error."""
  return output.get("name") != "stderr"


def main(names: list[str]) -> None:
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(FOLDER.parent)}
  for path in sorted(FOLDER.glob("*.ipynb")):
    if names and path.stem not in names:
      continue
    notebook = nbformat.read(path, as_version=4)
    metadata = json.loads(path.read_text())["metadata"]
    with tempfile.TemporaryDirectory() as folder:
      execute(notebook, folder, env, 7200)
    for cell in notebook.cells:
      if cell.cell_type == "code":
        cell.outputs = [output for output in cell.outputs if kept(output)]
    # As json and Jupyter write it, so that saving it unchanged is no change.
    text = nbformat.writes(notebook)
    path.write_text(json.dumps(json.loads(text) | {"metadata": metadata}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
  main(sys.argv[1:])
