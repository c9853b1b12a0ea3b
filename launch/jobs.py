"""What is trained, and the commands that bring it onto workers and start it."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence

import commands
from commands import Machine, Step


@dataclasses.dataclass(frozen=True)
class Job:
  """What is trained, from what."""

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
    """Removes what was made to be uploaded."""
    with contextlib.suppress(OSError):
      for path in (self.archive, self.flags_file):
        path.unlink(missing_ok=True)
      self.cache.rmdir()


def setup_steps(machine: Machine, job: Job, node: str, worker: str = "all") -> list[Step]:
  """What brings a checkout onto workers."""
  return [
    Step("The checkout's last commit to the workers.", commands.copy(machine, node, worker, job.archive)),
    Step("Unpack it there.", commands.ssh(machine, node, worker, commands.UNPACK)),
    Step(
      "Python 3.11 and the pinned versions, in a venv beside it; takes some minutes.",
      commands.ssh(machine, node, worker, commands.on_worker(machine, "install", job.extras)),
    ),
  ]


def run_step(machine: Machine, job: Job, node: str, worker: str = "all") -> Step:
  return Step(
    "Train on every worker, in a tmux session that outlives the connection; where one trains already, nothing happens.",
    commands.ssh(machine, node, worker, commands.on_worker(machine, "run", *job.flags)),
  )


def follow_words(machine: Machine, node: str, worker: int, line: int = 1) -> list[str]:
  return commands.ssh(machine, node, str(worker), commands.on_worker(machine, "follow", str(line)))
