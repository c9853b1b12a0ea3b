"""A training job, and the commands that install and start it on workers."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence

import commands
from commands import Machine, Step


@dataclasses.dataclass(frozen=True)
class Job:
  """A training job: the flags of cyb-train, and the checkout that is installed."""

  flags: Sequence[str] = ()
  checkout: pathlib.Path = commands.ROOT
  commit: str = ""
  extras: str = "tpu,reviews"
  cache: pathlib.Path = pathlib.Path()
  source: str = ""

  @property
  def archive(self) -> pathlib.Path:
    return self.cache / "cyb_jax.tar.gz"

  @property
  def flags_file(self) -> pathlib.Path:
    return self.cache / "cyb-flags.txt"

  def clear(self) -> None:
    """Removes the files that were created for the upload."""
    with contextlib.suppress(OSError):
      for path in (self.archive, self.flags_file):
        path.unlink(missing_ok=True)
      self.cache.rmdir()


def setup_steps(machine: Machine, job: Job, node: str, worker: str = "all") -> list[Step]:
  """The steps that install a checkout on workers."""
  return [
    Step("Copy the checkout's last commit to the workers.", commands.copy(machine, node, worker, job.archive)),
    Step("Unpack the archive on the workers.", commands.ssh(machine, node, worker, commands.UNPACK)),
    Step(
      "Install Python 3.11 and the pinned versions in a venv next to the checkout; this takes some minutes.",
      commands.ssh(machine, node, worker, commands.on_worker(machine, "install", job.extras)),
    ),
    *(
      [
        Step(
          "Mount the data disk, read-only, at /mnt/data.",
          commands.ssh(machine, node, worker, commands.on_worker(machine, "mount")),
        )
      ]
      if machine.data_disk
      else []
    ),
  ]


def run_step(machine: Machine, job: Job, node: str, worker: str = "all") -> Step:
  return Step(
    "Start training on every worker that does not train yet, in a tmux session that outlives the connection.",
    commands.ssh(machine, node, worker, commands.on_worker(machine, "run", *job.flags)),
  )


def follow_words(machine: Machine, node: str, worker: int, line: int = 1) -> list[str]:
  return commands.ssh(machine, node, str(worker), commands.on_worker(machine, "follow", str(line)))
