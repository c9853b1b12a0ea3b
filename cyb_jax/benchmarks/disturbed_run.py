"""A run of the soak, whose lives are started one after another by the same command."""

from __future__ import annotations

import collections
import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from cyb_jax.benchmarks import lives


class DisturbedRun:
  """A run that is disturbed: the command that starts and continues it, and the source of randomness.

  Args:
    server: the server of the lives.
    config: the config file of the run.
    folder: a folder for the runs.
    rng: the source of randomness.
    hosts, devices: see `lives.Server.life`.

  Attributes:
    workdir: the folder of the run; `reference` is that of the undisturbed run, which comes first.
    rng, durations: see `lives.Life.reach`.
    cause: the kind of the fault that the next life continues after.
    interrupted: the steps at which SIGTERM has made the run save.
    repeated: by kind of fault, the numbers of steps that the lives after it have run again.
  """

  def __init__(
    self,
    server: lives.Server,
    config: pathlib.Path,
    folder: pathlib.Path,
    rng: np.random.Generator,
    *,
    hosts: int = 1,
    devices: int = 0,
  ):
    self.rng, self.durations, self.hosts = rng, lives.Durations(), hosts
    self.workdir = self.reference = folder / "undisturbed"
    self.cause = ""
    self.interrupted: set[int] = set()
    self.repeated: dict[str, list[int]] = collections.defaultdict(list)
    self.marker = folder / "disk_fails"
    self._server, self._config, self._folder, self._devices = server, config, folder, devices
    self._reached = 0

  def begin(self, number: int) -> None:
    """Begins the run of a number, in a new folder."""
    self.workdir, self._reached, self.cause = self._folder / f"disturbed{number}", 0, ""
    self.interrupted = set()

  @contextlib.contextmanager
  def life(self, **injected: Any) -> Iterator[lives.Life]:
    """A life of the run, new or continued; see `lives.Server.life`."""
    with self._server.life(
      self._config, self.workdir, hosts=self.hosts, devices=self._devices, injected=injected
    ) as life:
      yield life
    if life.first_step:
      if self._reached:
        self.repeated[self.cause].append(max(0, self._reached - life.first_step + 1))
      self._reached = max(self._reached, life.last_step)

  def reach(self, life: lives.Life, *, running: bool = False) -> bool:
    """Waits for a random moment of a random phase; returns False if the life has ended before.

    Args:
      life: the life.
      running: whether a step must have been done.
    """
    phases = {name: share for name, share in lives.PHASES.items() if not (running and name == "start_up")}
    shares = np.array(list(phases.values()))
    return life.reach(str(self.rng.choice(list(phases), p=shares / shares.sum())), self.rng, self.durations)

  def some_host(self) -> int:
    """A random host."""
    return int(self.rng.integers(self.hosts))

  def checkpoints(self) -> list[int]:
    """The steps of the finished checkpoints, ascending."""
    folder = self.workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []
