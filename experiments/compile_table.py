"""The memory and compute of runs on TPU slices, compiled without a TPU: the table in launch/README.md.

    python experiments/compile_table.py --output=runs/compile_table.jsonl

Compiles every row below with cyb-compile, each in its own process, and prints a table in Markdown and, on the last
line, JSON. Rows that --output already contains are not compiled again, so that an interrupted table continues. A row
takes minutes. Delete the file after changes of the code. --only=gemma compiles and prints only the rows whose name or
topology contains this word.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags, logging

from cyb_jax import command_line, jsonl
from cyb_jax.cli import flag_values, launching, terminal
from cyb_jax.errors import EXIT_CRASH, Failed, InputError

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
  """A compilation.

  Attributes:
    name: the name of the run.
    config: the config file of the run, with arguments.
    topology: the TPU slice.
    overrides: config fields, each 'a.b=value'.
  """

  name: str
  config: str
  topology: str
  overrides: tuple[str, ...] = ()

  @property
  def key(self) -> dict[str, Any]:
    return {"config": self.config, "topology": self.topology, "overrides": list(self.overrides)}


# What differs from experiments/c4.py for the run of 1B parameters: less is recomputed, where there is memory for it and
# the step is not bound by memory traffic.
_LARGE_OVERRIDES = {
  "v5e:4x4": ("decoder.remat=dots", "optimizer.accumulate=8"),
  "v5e:8x8": ("decoder.remat=dots",),
  "v5p:2x2x2": ("decoder.remat=dots",),
  "v6e:4x4": (),
}
# The number of chips of a slice, and the number of windows of the paper's run per chip and pass. All chips are on the
# fsdp axis of the mesh.
_GEMMA_SLICES = {"v5p:2x2x2": (8, 2), "v6e:4x4": (16, 1), "v5e:4x4": (16, 1), "v5e:8x8": (64, 1)}
_GEMMA_SETTINGS = {
  "baseline": "baseline",
  "TBYS-1": "tbys1",
  "TBYS-2": "tbys2",
  "TBYS-3": "tbys3",
  "CYB-AP": "ap",
  "CYB-VA": "va_uniform",
  "CYB-DP": "dp_uniform",
}
_SLICES = {"v5e:4x4": 16, "v5e:8x8": 64, "v5p:2x2x2": 8, "v6e:4x4": 16}


def all_rows() -> list[Row]:
  """The rows of the table."""
  rows = []
  for topology in _SLICES:
    rows.append(Row("124M, CYB-AP", "experiments/c4.py:ap,gpt2_124m", topology))
  rows.append(Row("124M, CYB-AP, pmap", "experiments/c4.py:ap,gpt2_124m", "v5e:4x4", ("parallelism.strategy=pmap",)))
  for topology, chips in _SLICES.items():
    overrides = (f"parallelism.fsdp={chips}", *_LARGE_OVERRIDES[topology])
    rows.append(Row("1B, CYB-AP", "experiments/c4.py:ap,llama_1b", topology, overrides))
  for topology, (chips, windows) in _GEMMA_SLICES.items():
    for name, setting in _GEMMA_SETTINGS.items():
      parts = 256 // (chips * windows)
      overrides = (f"parallelism.fsdp={chips}", f"optimizer.accumulate={parts}")
      if topology.startswith("v5p"):
        overrides += ("decoder.remat=dots",)
      rows.append(Row(f"Gemma 2B, {name}", f"experiments/gemma2b_c4.py:{setting}", topology, overrides))
  return rows


def define_flags() -> None:
  command_line.define_path(
    "output", None, "A file of JSON lines, one for each row; rows in the file are not compiled again."
  )
  flags.DEFINE_string("only", "", "Only rows whose name or topology contains this word; '': all.")
  flags.DEFINE_bool("compile", True, "Whether missing rows are compiled; if not, only the existing rows are shown.")


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  args = flags.FLAGS
  path = pathlib.Path(flag_values.required_flag("output", "name the file of JSON lines that stores the rows"))
  if not path.parent.is_dir():
    raise InputError(f"--output: {path.parent} does not exist; create the folder first")
  rows = [row for row in all_rows() if args.only.lower() in f"{row.name} {row.topology}".lower()]
  if not rows:
    raise InputError(f"--only: no row's name or topology contains {args.only!r}")
  filled = fill(path, rows, compiles=args.compile)
  terminal.show(table(filled) + "\n")
  fit = sorted({row.name for row, result in filled if result["train"]["fits"]})
  return {"rows": len(filled), "missing": len(rows) - len(filled), "training_fits": fit}


def fill(path: pathlib.Path, rows: Sequence[Row], *, compiles: bool = True) -> list[tuple[Row, dict[str, Any]]]:
  """Rows with their results from the file; missing rows are compiled and appended to the file.

  Args:
    path: a file of JSON lines, which is created if it does not exist.
    rows: the rows, in the order of the result.
    compiles: whether missing rows are compiled; if not, they are left out.

  Raises:
    Failed: a compilation failed for a reason other than memory.
  """
  found = _read(path)
  for row in rows if compiles else ():
    if _key(row) not in found:
      found[_key(row)] = _compiled(row)
      # Starts with a newline because an interruption may have left an incomplete line.
      with path.open("a") as file:
        file.write("\n" + jsonl.dumps(row.key | {"name": row.name, "result": found[_key(row)]}) + "\n")
  return [(row, found[_key(row)]) for row in rows if _key(row) in found]


def _key(row: Row) -> str:
  return json.dumps(row.key)


def _read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  found = {}
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      record = json.loads(line)
    except ValueError:  # truncated by an interruption
      continue
    found[json.dumps({name: record[name] for name in ("config", "topology", "overrides")})] = record["result"]
  return found


def _compiled(row: Row) -> dict[str, Any]:
  options = [f"--config={row.config}", f"--topology={row.topology}", *(f"--config.{x}" for x in row.overrides)]
  logging.info("cyb-compile %s", " ".join(options))
  done = subprocess.run([sys.executable, "-m", "cyb_jax.cli.compile", *options], capture_output=True, text=True)
  lines = done.stdout.strip().splitlines()
  if done.returncode not in (0, EXIT_CRASH) or not lines:
    message = "".join(done.stderr.strip().splitlines()[-1:])
    raise Failed(f"cyb-compile {' '.join(options)} exited with code {done.returncode}: {message}", row.key)
  return json.loads(lines[-1])


def table(rows: Sequence[tuple[Row, dict[str, Any]]]) -> str:
  """A Markdown table with one line for each row."""
  head = (
    "run", "slice", "mesh", "accumulate", "remat", "GiB per chip", "train", "evaluate", "decode", "GFLOPs per token",
    "FLOPs per byte", "GB sent per chip", "seconds per step", "MFU", "bound by",
  )  # fmt: skip
  lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
  for row, result in rows:
    train = result["train"]
    mesh = " x ".join(str(size) for size in result["mesh"].values())
    cells = [
      row.name,
      row.topology,
      "pmap" if result["strategy"] == "pmap" else mesh,
      result["accumulate"],
      result["remat"],
      f"{result['hbm_bytes'] / _GIB:.2f}",
      *(_needed(result.get(step)) for step in ("train", "evaluate", "decode")),
      f"{result['flops_per_token']['train']['model'] / 1e9:.3g}",
    ]
    if train["fits"]:
      cells += [
        f"{train['arithmetic_intensity']:.0f}",
        f"{train['sent_bytes'] / 1e9:.3g}",
        f"{train['step_seconds']:.3g}",
        f"{train['roofline_mfu']:.1%}",
        train["bound"],
      ]
    else:
      cells += [""] * 5
    lines.append(f"| {' | '.join(map(str, cells))} |")
  return "\n".join(lines)


def _needed(record: dict[str, Any] | None) -> str:
  if record is None:
    return ""
  peak = record["memory"]["peak"]
  size = "too much" if peak is None else f"{peak / _GIB:.2f}"
  return size if record["fits"] else f"**{size}**"


def run() -> None:
  """Runs the script."""
  define_flags()
  launching.launch(main)


if __name__ == "__main__":
  run()
