"""Trains a run, or continues it, and evaluates it.

cyb-train --config=experiments/quickstart.py --workdir=DIR [--config.train.steps=100]
cyb-train --config=experiments/quickstart.py --dry_run      what a run would take; nothing is written
cyb-train --config=experiments/quickstart.py --config_help  every field of the config; --config_help=optimizer: a group
cyb-train --list_experiments --list_settings                what --config=experiments/NAME.py:SETTING may be
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


def define_flags() -> None:
  config_flags.DEFINE_config_file(
    "config", None, "The config file: experiments/NAME.py, or experiments/NAME.py:ARGUMENTS."
  )
  command_line.define_path("workdir", None, "The run's folder; an interrupted run in it is continued.")
  flags.DEFINE_integer("profile", 0, "Trace so many steps, after ten, into WORKDIR/profile (TensorBoard, Perfetto).")
  flags.DEFINE_boolean(
    "dry_run", False, "Print what a run takes, parameters, memory and FLOPs, and write nothing; needs no workdir."
  )
  flags.DEFINE_string(
    "config_help", "", "Describe the fields of the config: type, value here, default, accepted values, meaning. Of a"
    " group or a field with --config_help=optimizer or --config_help=optimizer.learning_rate. Without --config the"
    " values are those that experiments start from."
  )  # fmt: skip
  flags.DEFINE_boolean("list_experiments", False, "List the config files of the experiments, and what each of them is.")
  flags.DEFINE_boolean("list_settings", False, "List the settings that experiments take, as in experiments/NAME.py:ap.")
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
  workdir = flag_values.required_flag("workdir", "name the run's folder")
  profile = flags.FLAGS.profile
  if profile < 0:
    raise InputError(f"--profile: {profile} is negative")

  def train(cluster: Cluster) -> dict[str, Any]:
    from cyb_jax import training
    from cyb_jax.studies.resolution import resolve

    config = resolve(source, workdir)
    return training.train(config, workdir, profile=profile, cluster=cluster, owns_process=True)

  return hosts.on_hosts(train)


def _describes() -> bool:
  """Prints what a flag asks for in place of training; whether there was such a flag."""
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
  launching.launch(main)


if __name__ == "__main__":
  run()
