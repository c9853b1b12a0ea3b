"""Kills a training repeatedly, and compares its result with an undisturbed training, bit for bit.

Every life is a training program in its own process, which is killed by SIGKILL; or several processes that train
together, one of which is killed and the others then exit.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from cyb_jax.benchmarks import lives
from cyb_jax.errors import Failed, InputError, check_seed

# The phases in which a life is killed, and the share of kills in each phase.
PHASES = {"start_up": 0.2, "step": 0.25, "save": 0.35, "evaluation": 0.2}

# A life advances by about thirty steps; the remaining steps are run by the last life, which is not killed.
_STEPS_PER_KILL = 70
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


def define_flags() -> None:
  flags.DEFINE_integer("kills", 100, "The number of kills.")
  flags.DEFINE_integer("hosts", 1, "The number of processes that train together; each kill kills one of them.")
  flags.DEFINE_integer("devices", 0, "The number of CPU devices of each process; 0: the devices of the machine.")
  flags.DEFINE_integer("kills_seed", 0, "The seed of the random moments of the kills.")
  config_flags.DEFINE_config_file("config", None, "The config to train; without it, a tiny model on generated text.")


def faults() -> dict[str, Any]:
  """Trains undisturbed; trains again with `--kills` SIGKILLs at random moments; compares the two folders.

  The comparison covers config.json, the tokenizer, metrics.jsonl except `timing` (with a line for every step, so that a
  different batch is detected), evaluation.json, and all arrays and the meta object of every kept checkpoint.

  Raises:
    Failed: the folders differ, or the run ended before all kills; the result names the first difference.
    InputError: a flag is invalid, or the program refuses the config.
  """
  kills, hosts = _checked_flags()
  check_seed("--kills_seed", flags.FLAGS.kills_seed)
  rng = np.random.default_rng(flags.FLAGS.kills_seed)
  start = time.perf_counter()
  with tempfile.TemporaryDirectory(prefix="cyb-faults-") as scratch:
    folder = pathlib.Path(scratch)
    config = _write_config(folder, steps=_STEPS_PER_KILL * kills)
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    durations = lives.Durations()
    with lives.server(folder) as server:
      logging.info("training undisturbed")
      with _life(server, config, undisturbed) as life:
        life.end(durations)
      undisturbed_seconds = time.perf_counter() - start
      logging.info("undisturbed: %d steps in %.0f s", _STEPS_PER_KILL * kills, undisturbed_seconds)
      phases, victims = _kill_repeatedly(server, config, killed, rng, durations)
      with _life(server, config, killed) as life:
        life.end()
    difference = first_difference(undisturbed, killed)
    restarts = sum(phases.values())
    result = {
      "benchmark": "faults",
      "kills": restarts,
      "phases": phases,
      "hosts": hosts,
      "killed_hosts": victims,
      "restarts": restarts,
      "steps": _STEPS_PER_KILL * kills,
      "identical": difference is None,
      "difference": difference,
      "timing": {
        "seconds": time.perf_counter() - start,
        "undisturbed_seconds": undisturbed_seconds,
        **_durations(durations, hosts),
      },
    }
  if difference is not None:
    raise Failed(f"faults: after {restarts} kills the run differs: {difference}", result)
  if restarts < kills:
    raise Failed(f"faults: the run ended after {restarts} of {kills} kills", result)
  return result


def _checked_flags() -> tuple[int, int]:
  """The flags `--kills` and `--hosts`."""
  args = flags.FLAGS
  for name, least in (("kills", 1), ("hosts", 1), ("devices", 0)):
    if args[name].value < least:
      raise InputError(f"--{name}: {args[name].value} must be at least {least}")
  return args.kills, args.hosts


def _life(server: lives.Server, config: pathlib.Path, workdir: pathlib.Path) -> Any:
  """A life of a run with the flags' number of hosts and devices."""
  return server.life(config, workdir, hosts=flags.FLAGS.hosts, devices=flags.FLAGS.devices)


def _kill_repeatedly(
  server: lives.Server,
  config: pathlib.Path,
  workdir: pathlib.Path,
  rng: np.random.Generator,
  durations: lives.Durations,
) -> tuple[dict[str, int], list[int]]:
  """Kills a run `--kills` times, or until it is complete.

  Returns:
    The number of lives that ended in each phase; and the number of kills of each host.
  """
  kills = flags.FLAGS.kills
  phases, victims = dict.fromkeys(PHASES, 0), [0] * flags.FLAGS.hosts
  for number in range(kills):
    # The first life is killed before there is a checkpoint.
    wanted = str(rng.choice(list(PHASES), p=list(PHASES.values()))) if number else "start_up"
    with _life(server, config, workdir) as life:
      died_in = life.kill(wanted, rng, durations)
    if died_in is None:
      break
    phases[died_in] += 1
    victims[life.victim] += 1
    durations.add("outlived", life.outlived)
    logging.info("kill %d of %d: host %d, during %s", number + 1, kills, life.victim, died_in.replace("_", "-"))
  return phases, victims


def _durations(durations: lives.Durations, hosts: int) -> dict[str, float | None]:
  """The durations in the result, measured in the lives."""
  return {
    "start_up_seconds": durations.median("start_up"),
    "save_seconds": durations.median("save"),
    "evaluation_seconds": durations.median("evaluation"),
    # The seconds until the remaining hosts exited.
    "outlived_seconds": durations.median("outlived") if hosts > 1 else None,
    "outlived_seconds_most": durations.most("outlived") if hosts > 1 else None,
  }


def first_difference(reference: pathlib.Path, other: pathlib.Path) -> str | None:
  """The first difference between two runs' folders, except times; None if they are equal."""
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
  if ours.steps() != theirs.steps():
    return f"checkpoints: {theirs.steps()}, not {ours.steps()}"
  for step in ours.steps():
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


def _write_config(folder: pathlib.Path, steps: int) -> pathlib.Path:
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
