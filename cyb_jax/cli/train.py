"""Starts or continues a training run, and evaluates it at the end.

cyb-train --config=experiments/quickstart.py --workdir=DIR [--config.train.steps=100]
cyb-train --config=experiments/quickstart.py --dry_run      the costs of a run; nothing is written
cyb-train --config=experiments/quickstart.py --config_help  all fields of the config; --config_help=optimizer: a group
cyb-train --list_experiments --list_settings                the values of --config=experiments/NAME.py:SETTING
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_flags

from cyb_jax import command_line
from cyb_jax.cli import flag_values, hosts, launching, listings, terminal
from cyb_jax.errors import InputError

if TYPE_CHECKING:
  from cyb_jax.distributed.cluster import Cluster


# What a signal means outside of training, or a second signal.
INTERRUPTED = "ended; the saved checkpoints are kept, and the same command continues"


def define_flags() -> None:
  config_flags.DEFINE_config_file(
    "config", None, "The config file: experiments/NAME.py, or experiments/NAME.py:ARGUMENTS."
  )
  command_line.define_path("workdir", None, "The run's folder; an interrupted run in it is continued.")
  flags.DEFINE_integer(
    "profile", 0, "The number of steps, after the first ten, that are traced into WORKDIR/profile (TensorBoard,"
    " Perfetto)."
  )  # fmt: skip
  flags.DEFINE_boolean(
    "dry_run", False, "Print the costs of a run (parameters, memory and FLOPs), and write nothing; needs no workdir."
  )
  flags.DEFINE_string(
    "config_help", "", "Describe the fields of the config: type, value, default, accepted values, meaning."
    " --config_help=optimizer or --config_help=optimizer.learning_rate describes only a group or a field. Without"
    " --config, the values are the defaults of the experiments."
  )  # fmt: skip
  flags.DEFINE_boolean("list_experiments", False, "List the config files of the experiments with descriptions.")
  flags.DEFINE_boolean("list_settings", False, "List the settings of the experiments, as in experiments/NAME.py:ap.")
  hosts.define_host_flags()


def main(argv: Sequence[str]) -> dict[str, Any] | None:
  del argv
  if _describes():
    return None
  source = command_line.config_flag()
  if flags.FLAGS.dry_run:
    from cyb_jax import training
    from cyb_jax.studies.resolution import resolve

    return training.dry_run(resolve(source, flags.FLAGS.workdir))
  workdir = flag_values.required_flag("workdir", "give the run's folder")
  profile = flags.FLAGS.profile
  if profile < 0:
    raise InputError(f"--profile: {profile} must not be negative")

  def train(cluster: Cluster) -> dict[str, Any]:
    from cyb_jax import training
    from cyb_jax.studies.resolution import resolve

    config = resolve(source, workdir)
    return training.train(config, workdir, profile=profile, cluster=cluster, owns_process=True)

  return hosts.on_hosts(train, interrupted=INTERRUPTED)


def _describes() -> bool:
  """Prints the lists and descriptions that flags request instead of training; returns whether there was such a flag."""
  args = flags.FLAGS
  if args.list_experiments:
    terminal.show(listings.experiments())
  if args.list_settings:
    terminal.show(listings.settings())
  if args.config_help:
    from cyb_jax.cli.config_help import show_config_help

    terminal.show(show_config_help(None if args.config is None else command_line.config_flag(), args.config_help))
  return bool(args.list_experiments or args.list_settings or args.config_help)


def run() -> None:
  """Console script."""
  define_flags()
  launching.launch(main, interrupted=INTERRUPTED)


if __name__ == "__main__":
  run()
