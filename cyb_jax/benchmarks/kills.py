"""Kills a training repeatedly, and compares its result with an undisturbed training, bit for bit.

Every life is a training program in its own process, which is killed by SIGKILL; or several processes that train
together, one of which is killed and the others then exit.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from typing import Any

import numpy as np
from absl import flags, logging

from cyb_jax.benchmarks import compared_runs, lives
from cyb_jax.errors import Failed, InputError

# A life advances by about thirty steps; the remaining steps are run by the last life, which is not killed.
_STEPS_PER_KILL = 70


def kills() -> dict[str, Any]:
  """Trains undisturbed; trains again with `--kills` SIGKILLs at random moments; compares the two folders.

  The comparison covers config.json, the tokenizer, metrics.jsonl except `timing` (with a line for every step, so that a
  different batch is detected), evaluation.json, and all arrays and the meta object of every kept checkpoint.

  Raises:
    Failed: the folders differ, or the run ended before all kills; the result names the first difference.
    InputError: `--kills` is invalid, or the program refuses the config.
  """
  kills, hosts = flags.FLAGS.kills, flags.FLAGS.hosts
  if kills < 1:
    raise InputError(f"--kills: {kills} must be at least 1")
  rng = np.random.default_rng(flags.FLAGS.kills_seed)
  start = time.perf_counter()
  with tempfile.TemporaryDirectory(prefix="cyb-faults-") as scratch:
    folder = pathlib.Path(scratch)
    config = compared_runs.write_config(folder, steps=_STEPS_PER_KILL * kills)
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
    difference = compared_runs.first_difference(undisturbed, killed)
    restarts = sum(phases.values())
    result = {
      "benchmark": "faults",
      "plan": "kills",
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
  phases, victims = dict.fromkeys(lives.PHASES, 0), [0] * flags.FLAGS.hosts
  for number in range(kills):
    # The first life is killed before there is a checkpoint.
    wanted = str(rng.choice(list(lives.PHASES), p=list(lives.PHASES.values()))) if number else "start_up"
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
