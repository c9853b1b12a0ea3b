"""The run that the benchmarks of faults train twice, with and without faults, and the comparison of the two folders."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from absl import flags

_SCHEDULE = {
  "log_every": 1,
  "eval_every": 30,
  "eval_limit": 64,
  "checkpoint_every": 40,
  "keep": 2,
  "trackers": "",
}
_TINY = {
  "method": {"pauses": 2, "pause_input": "token+pause"},
  "data": {
    "task": "synthetic_lookups",
    "tokenizer": "bytes",
    "options": "documents=256",
    "sequence_length": 16,
    "batch_size": 8,
  },
  "decoder": {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "head_size": 8, "mlp_size": 32},
}


def write_config(folder: pathlib.Path, steps: int) -> pathlib.Path:
  """Writes a config file for the program: the config of `--config` or the tiny one, with this benchmark's schedule."""
  from cyb_jax import configs

  source = flags.FLAGS.config
  if source is None:
    source = configs.default()
    source.update(_TINY)
  source.train.update(_SCHEDULE | {"steps": steps})
  if not source.data.store:
    source.data.store = str(folder / "store")
  (folder / "config.json").write_text(json.dumps(source.to_dict()))
  path = folder / "config.py"
  path.write_text(
    "import json, pathlib\n"
    "from ml_collections import ConfigDict\n"
    "def get_config():\n"
    "  return ConfigDict(json.loads(pathlib.Path(__file__).with_name('config.json').read_text()))\n"
  )
  return path


def first_difference(reference: pathlib.Path, other: pathlib.Path, *, interrupted: Collection[int] = ()) -> str | None:
  """The first difference between two runs' folders, except times; None if they are equal.

  Args:
    reference, other: the folders.
    interrupted: the steps at which a signal has made the other run save; it may have these checkpoints in place of
      older ones of the reference.
  """
  from cyb_jax.checkpointing.workdir import checkpoints_in
  from cyb_jax.training.metrics import read_metrics

  files = ["config.json", "evaluation.json"]
  files += sorted(str(path.relative_to(reference)) for path in (reference / "tokenizer").iterdir())
  for name in files:
    if not (other / name).exists() or (reference / name).read_bytes() != (other / name).read_bytes():
      return name
  folders = (reference, other)
  ours, theirs = ([{k: v for k, v in row.items() if k != "timing"} for row in read_metrics(x)] for x in folders)
  for number, (a, b) in enumerate(zip(ours, theirs), start=1):
    if a != b:
      return f"metrics.jsonl, line {number}, {next(k for k in a | b if a.get(k) != b.get(k))}"
  if len(ours) != len(theirs):
    return f"metrics.jsonl: {len(theirs)} lines, not {len(ours)}"
  ours, theirs = (checkpoints_in(x, read_only=True) for x in folders)
  common, more = set(ours.steps()) & set(theirs.steps()), set(theirs.steps()) - set(ours.steps())
  kept = interrupted and more <= set(interrupted) and theirs.steps()[-1:] == ours.steps()[-1:]
  if ours.steps() != theirs.steps() and not kept:
    return f"checkpoints: {theirs.steps()}, not {ours.steps()}"
  for step in sorted(common):
    for checkpoints in (ours, theirs):
      checkpoints.find(step)  # raises if it is damaged
    a, b = ours.read(step), theirs.read(step)
    if a.meta != b.meta:
      return f"checkpoint {step}: meta"
    a, b = dict(_leaves(a.state)), dict(_leaves(b.state))
    for name in sorted(a.keys() | b.keys()):
      if name not in a or name not in b or a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes():
        return f"checkpoint {step}: {name}"
  return None


def _leaves(tree: Any) -> Iterator[tuple[str, np.ndarray]]:
  import jax

  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf)
