"""Kills a training again and again, and compares its result with that of an undisturbed one, bit for bit.

Every life is the training program in a process of its own, which dies of SIGKILL; or in several that train as one, of
which one dies so, and the others end by themselves.
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

# The phases in which a life is killed, and the share of the kills in each.
PHASES = {"start_up": 0.2, "step": 0.25, "save": 0.35, "evaluation": 0.2}

# Lives get forward some thirty steps each; the rest is for the last one, which is left alone.
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
  flags.DEFINE_integer("kills", 100, "How often the run is killed.")
  flags.DEFINE_integer("hosts", 1, "How many processes train together; at each kill one of them dies.")
  flags.DEFINE_integer("devices", 0, "CPU devices of each process; 0: what it finds.")
  flags.DEFINE_integer("kills_seed", 0, "Where the moments are drawn from.")
  config_flags.DEFINE_config_file("config", None, "What is trained, if not a tiny model on generated text.")


def faults() -> dict[str, Any]:
  """Trains undisturbed; trains again with `--kills` SIGKILLs at random moments; compares the two folders.

  Compared are config.json, the tokenizer, metrics.jsonl but for `timing` (a line for every step, so that another batch
  would show), evaluation.json, and all arrays and the meta object of every checkpoint that was kept.

  Raises:
    Failed: they differ, or the run ended before all kills; the result names the first difference.
    InputError: bad flags, or a config that the program refuses.
  """
  kills, hosts = _checked_flags()
  check_seed("--kills_seed", flags.FLAGS.kills_seed)
  rng = np.random.default_rng(flags.FLAGS.kills_seed)
  start = time.perf_counter()
  with tempfile.TemporaryDirectory(prefix="cyb-faults-") as scratch:
    folder = pathlib.Path(scratch)
    config = _write_config(folder, steps=_STEPS_PER_KILL * kills)
    whole, broken = folder / "undisturbed", folder / "killed"
    durations = lives.Durations()
    with lives.server(folder) as server:
      logging.info("training undisturbed")
      with _life(server, config, whole) as life:
        life.end(durations)
      undisturbed_seconds = time.perf_counter() - start
      logging.info("undisturbed: %d steps in %.0f s", _STEPS_PER_KILL * kills, undisturbed_seconds)
      phases, victims = _kill_again_and_again(server, config, broken, rng, durations)
      with _life(server, config, broken) as life:
        life.end()
    difference = first_difference(whole, broken)
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
    raise Failed(f"faults: the run ended after {restarts} kills of {kills}", result)
  return result


def _checked_flags() -> tuple[int, int]:
  """The flags `--kills` and `--hosts`."""
  args = flags.FLAGS
  for name, least in (("kills", 1), ("hosts", 1), ("devices", 0)):
    if args[name].value < least:
      raise InputError(f"--{name}: {args[name].value} must be at least {least}")
  return args.kills, args.hosts


def _life(server: lives.Server, config: pathlib.Path, workdir: pathlib.Path) -> Any:
  """A life of a run that trains as the flags say."""
  return server.life(config, workdir, hosts=flags.FLAGS.hosts, devices=flags.FLAGS.devices)


def _kill_again_and_again(
  server: lives.Server,
  config: pathlib.Path,
  workdir: pathlib.Path,
  rng: np.random.Generator,
  durations: lives.Durations,
) -> tuple[dict[str, int], list[int]]:
  """Kills a run `--kills` times, or until it ends by itself.

  Returns:
    How many lives ended in each phase; and how often each host was the one that was killed.
  """
  kills = flags.FLAGS.kills
  phases, victims = dict.fromkeys(PHASES, 0), [0] * flags.FLAGS.hosts
  for number in range(kills):
    # The first life dies before there is anything to continue.
    wanted = str(rng.choice(list(PHASES), p=list(PHASES.values()))) if number else "start_up"
    with _life(server, config, workdir) as life:
      died_in = life.kill(wanted, rng, durations)
    if died_in is None:
      break
    phases[died_in] += 1
    victims[life.victim] += 1
    durations.add("outlived", life.outlived)
    logging.info("kill %d of %d: host %d, in mid-%s", number + 1, kills, life.victim, died_in.replace("_", "-"))
  return phases, victims


def _durations(durations: lives.Durations, hosts: int) -> dict[str, float | None]:
  """The seconds of the result that were measured in the lives."""
  return {
    "start_up_seconds": durations.median("start_up"),
    "save_seconds": durations.median("save"),
    "evaluation_seconds": durations.median("evaluation"),
    # How long the remaining hosts took to end.
    "outlived_seconds": durations.median("outlived") if hosts > 1 else None,
    "outlived_seconds_most": durations.most("outlived") if hosts > 1 else None,
  }


def first_difference(whole: pathlib.Path, other: pathlib.Path) -> str | None:
  """Where two runs' folders differ first, but for what depends on the clock; None where they don't."""
  from cyb_jax.checkpointing.workdir import checkpoints_in
  from cyb_jax.training.metrics import read_metrics

  files = ["config.json", "evaluation.json"]
  files += sorted(str(path.relative_to(whole)) for path in (whole / "tokenizer").iterdir())
  for name in files:
    if not (other / name).exists() or (whole / name).read_bytes() != (other / name).read_bytes():
      return name
  ours, theirs = ([{k: v for k, v in row.items() if k != "timing"} for row in read_metrics(x)] for x in (whole, other))
  for number, (a, b) in enumerate(zip(ours, theirs), start=1):
    if a != b:
      return f"metrics.jsonl, line {number}, {next(k for k in a | b if a.get(k) != b.get(k))}"
  if len(ours) != len(theirs):
    return f"metrics.jsonl: {len(theirs)} lines, not {len(ours)}"
  ours, theirs = (checkpoints_in(x, read_only=True) for x in (whole, other))
  if ours.steps() != theirs.steps():
    return f"checkpoints: {theirs.steps()}, not {ours.steps()}"
  for step in ours.steps():
    for checkpoints in (ours, theirs):
      checkpoints.find(step)  # it isn't damaged
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
  """A config file for the program: what `--config` gives, or the tiny one, on this benchmark's schedule."""
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
