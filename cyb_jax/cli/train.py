"""Trains a run, or continues it, and evaluates it.

python -m cyb_jax.cli.train --config=experiments/quickstart.py --workdir=DIR [--config.train.steps=100]
python -m cyb_jax.cli.train --config=experiments/quickstart.py --dry_run     what it would take; nothing is written
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_flags

from cyb_jax import command_line
from cyb_jax.cli import flag_values, hosts, launching
from cyb_jax.errors import InputError

if TYPE_CHECKING:
  from cyb_jax.distributed.cluster import Cluster


def define_flags() -> None:
  config_flags.DEFINE_config_file("config", None, "experiments/NAME.py, or experiments/NAME.py:ARGUMENTS")
  command_line.define_path("workdir", None, "The run's folder; an interrupted run in it is continued.")
  flags.DEFINE_integer("profile", 0, "Trace so many steps, after ten, into WORKDIR/profile (TensorBoard, Perfetto).")
  flags.DEFINE_boolean(
    "dry_run", False, "Print what a run takes, parameters, memory and FLOPs, and write nothing; needs no workdir."
  )
  hosts.define_host_flags()


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
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


def run() -> None:
  """Console script."""
  define_flags()
  launching.launch(main)


if __name__ == "__main__":
  run()
