"""Disturbs a training repeatedly, and compares its result with an undisturbed training, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import config_flags

from cyb_jax.benchmarks import kills, soak
from cyb_jax.errors import InputError, check_seed, did_you_mean

PLANS: dict[str, Callable[[], dict[str, Any]]] = {"kills": kills.kills, "soak": soak.soak}


def define_flags() -> None:
  flags.DEFINE_string(
    "plan", "kills", "What happens. kills: one run is killed --kills times; soak: runs are disturbed for --minutes by"
    " faults of many kinds: kills, signals, stopped processes, disks that fail, steps of the clock, damaged files, two"
    " starters."
  )  # fmt: skip
  flags.DEFINE_integer("kills", 100, "With --plan=kills: the number of kills.")
  flags.DEFINE_float(
    "minutes", 60.0, "With --plan=soak: the minutes of faults; 0: every kind of fault once. The comparison is extra."
  )
  flags.DEFINE_integer("hosts", 1, "The number of processes that train together; each kill kills one of them.")
  flags.DEFINE_integer("devices", 0, "The number of CPU devices of each process; 0: the devices of the machine.")
  flags.DEFINE_integer("kills_seed", 0, "The seed of the random moments of the kills, and of the order of the faults.")
  config_flags.DEFINE_config_file("config", None, "The config to train; without it, a tiny model on generated text.")


def faults() -> dict[str, Any]:
  """Runs the plan of `--plan`; see `kills` and `soak`.

  Raises:
    Failed: a disturbed run differs from the undisturbed run, or its answer to a fault is wrong.
    InputError: a flag is invalid, or the program refuses the config.
  """
  args = flags.FLAGS
  if args.plan not in PLANS:
    raise InputError(f"--plan: {args.plan!r} is unknown; {did_you_mean(args.plan, PLANS)}")
  for name, least in (("hosts", 1), ("devices", 0)):
    if args[name].value < least:
      raise InputError(f"--{name}: {args[name].value} must be at least {least}")
  check_seed("--kills_seed", args.kills_seed)
  return PLANS[args.plan]()
