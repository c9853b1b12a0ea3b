"""Runs a program on several hosts."""

from __future__ import annotations

import dataclasses
import functools
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from cyb_jax.cli.launching import report_error
from cyb_jax.errors import EXIT_CRASH, DivergedError, Interrupted
from cyb_jax.signals import StopSignals, end_process

if TYPE_CHECKING:  # imported on use, so that errors in flags are reported quickly
  from cyb_jax.distributed.cluster import Cluster


def define_host_flags() -> None:
  """Defines the flags of a program that runs on several hosts; see `on_hosts`."""
  flags.DEFINE_string(
    "coordinator", "", "The address at which hosts connect. HOST:PORT: of process 0; auto: the address that jax detects"
    " (TPU pods, Slurm, Open MPI, Kubernetes); none: a single process. Not given: auto on TPU VMs, none elsewhere."
  )  # fmt: skip
  flags.DEFINE_integer("num_processes", -1, "With --coordinator=HOST:PORT: the number of processes.")
  flags.DEFINE_integer("process_id", -1, "With --coordinator=HOST:PORT: the number of this process, from 0.")
  flags.DEFINE_integer("join_timeout", 300, "Seconds for which hosts wait for each other at the start.")
  flags.DEFINE_integer("heartbeat", 60, "Seconds after which a host without heartbeat is considered lost.")


def on_hosts(main: Callable[[Cluster], dict[str, Any] | None], *, interrupted: str) -> dict[str, Any] | None:
  """Connects the hosts that the flags specify, runs a function on all of them, and ends them together.

  Args:
    main: the function, which takes the cluster; jax must not have been used before.
    interrupted: what a signal means for the program, as in `launching.launch`; it ends all hosts.

  Returns:
    The result of `main` on host 0; None on the other hosts.
  """
  from cyb_jax.distributed.cluster import Meeting, join
  from cyb_jax.distributed.watchdog import lost_hosts

  args = flags.FLAGS
  names = [field.name for field in dataclasses.fields(Meeting)]
  cluster = join(Meeting(**{name: args[name].value for name in names}))
  if cluster.index:
    logging.set_verbosity(logging.WARNING)  # all hosts do the same, so only host 0 logs progress
  end = functools.partial(end_process, announce=cluster.abandon)
  try:
    with lost_hosts(cluster.count), StopSignals(interrupted, "all hosts are ending", end) as signals:
      signals.at_once = True
      result = main(cluster)
      signals.at_once = False  # the hosts leave together
  except Interrupted as error:
    if not error.on_all_hosts:
      end(str(error))
    cluster.leave()
    raise
  except DivergedError:
    # All hosts raise it after the same step, and host 0 has then written the last metrics.
    cluster.barrier()
    cluster.leave()
    raise
  except BaseException as error:
    if cluster.count > 1:
      code = report_error(error)
      if code is None:
        traceback.print_exc()
      cluster.abandon(str(error) or repr(error), EXIT_CRASH if code is None else code)
    raise
  cluster.leave()
  return result if cluster.index == 0 else None
