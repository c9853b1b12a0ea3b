"""One program on several hosts."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from cyb_jax.cli.launching import report_error
from cyb_jax.errors import EXIT_CRASH, Interrupted

if TYPE_CHECKING:  # imported where it is used, so that errors of flags are reported at once
  from cyb_jax.distributed.cluster import Cluster


def define_host_flags() -> None:
  """The flags of a program that several hosts run as one; see `on_hosts`."""
  flags.DEFINE_string(
    "coordinator", "", "Where hosts meet: HOST:PORT of process 0; auto: what jax finds by itself (TPU pods, Slurm, Open"
    " MPI, Kubernetes); none: this process is alone. Not given: auto on TPU VMs, else none."
  )  # fmt: skip
  flags.DEFINE_integer("num_processes", -1, "With --coordinator=HOST:PORT: how many processes there are.")
  flags.DEFINE_integer("process_id", -1, "With --coordinator=HOST:PORT: which of them this is, from 0.")
  flags.DEFINE_integer("join_timeout", 300, "Seconds that hosts wait for each other at the start.")
  flags.DEFINE_integer("heartbeat", 60, "Seconds after which a host that says nothing counts as lost.")


def on_hosts(main: Callable[[Cluster], dict[str, Any] | None]) -> dict[str, Any] | None:
  """Runs a program's work on all hosts that the flags name, and ends them together.

  Args:
    main: takes the cluster; jax must not have been used before.

  Returns:
    The result of `main`, on host 0; None on the others.
  """
  from cyb_jax.distributed.cluster import Meeting, join
  from cyb_jax.distributed.watchdog import lost_hosts

  args = flags.FLAGS
  names = [field.name for field in dataclasses.fields(Meeting)]
  cluster = join(Meeting(**{name: args[name].value for name in names}))
  if cluster.index:
    logging.set_verbosity(logging.WARNING)  # host 0 logs what all hosts do
  try:
    with lost_hosts(cluster.count):
      result = main(cluster)
  except Interrupted:
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
