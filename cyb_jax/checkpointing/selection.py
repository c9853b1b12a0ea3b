"""The choice of a checkpoint: the newest, or the one with the lowest validation loss, among those that are whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from cyb_jax.errors import InputError
from cyb_jax.storage import Place


class _Damage(Protocol):
  def __call__(self, step: int, /, *, quick: bool = False) -> str | None: ...


class Inspection:
  """One inspection of the checkpoints in a folder.

  Args:
    directory: of the checkpoints, for error messages.
    steps: of the finished checkpoints, ascending; at least one.
    damage: what is wrong with the checkpoint of a step; see `integrity.damage`.
    loss: the validation loss of the checkpoint of a step, where it has one.

  Attributes:
    damaged: what was found wrong so far, by step.
  """

  def __init__(self, directory: Place, steps: Sequence[int], damage: _Damage, loss: Callable[[int], float | None]):
    self._directory, self._steps, self._damage, self._loss = directory, steps, damage, loss
    self.damaged: dict[int, str] = {}

  def choose(self, which: int | str, *, quick: bool) -> int | None:
    """The step of the checkpoint that a user asks for; it may be damaged, except of 'last'.

    Args:
      which: a step, 'last' or 'best'.
      quick: see `integrity.damage`.

    Returns:
      The step; None: 'last' was asked for, and all are damaged.

    Raises:
      InputError: there is no such checkpoint.
    """
    if which == "last":
      return self.newest(quick=quick)
    step = self._best() if which == "best" else which
    if step not in self._steps:
      raise InputError(f"checkpoint: {step} is not there; there are {self._listed()}")
    self._is_whole(step, quick=quick)
    return step

  def newest(self, *, quick: bool) -> int | None:
    """The step of the newest whole checkpoint; None where all are damaged."""
    return next((step for step in reversed(self._steps) if self._is_whole(step, quick=quick)), None)

  def check_all(self, newest: int) -> None:
    """Finds all damaged checkpoints; the state, which is large, is read only where it may come to be used.

    Args:
      newest: what `newest` returned.
    """
    losses = {newest: self._loss(newest)}
    for step in set(self._steps) - self.damaged.keys() - {newest}:
      if self._is_whole(step, quick=True):
        losses[step] = self._loss(step)
    while (best := lowest(losses)) not in (None, newest) and not self._is_whole(best, quick=False):
      del losses[best]

  def all_damaged(self) -> InputError:
    """The error that all checkpoints are damaged."""
    found = "; ".join(f"{step}: {self.damaged[step]}" for step in sorted(self.damaged, reverse=True))
    return InputError(
      f"checkpoints: all in {self._directory} are damaged ({found}); put a whole copy in place of one, or start anew in"
      " another folder"
    )

  def _best(self) -> int:
    losses = {}
    for step in self._steps:
      # A damaged checkpoint may have been the best, and then the user must learn of it.
      with contextlib.nullcontext() if self._is_whole(step, quick=True) else contextlib.suppress(Exception):
        losses[step] = self._loss(step)
    best = lowest(losses)
    if best is None:
      raise InputError(
        f"checkpoint: 'best' needs a validation at the step of a checkpoint (train.eval_every), and {self._directory}"
        f" has none; there are {self._listed()}"
      )
    return best

  def _is_whole(self, step: int, *, quick: bool) -> bool:
    found = self._damage(step, quick=quick)
    if found is not None:
      self.damaged[step] = found
    return found is None

  def _listed(self) -> str:
    return ", ".join(map(str, self._steps))


def lowest(losses: Mapping[int, float | None]) -> int | None:
  """The step of the lowest loss, the newest of equals; None where no step has a loss."""
  known = {step: loss for step, loss in losses.items() if loss is not None}
  return min(known, key=lambda step: (known[step], -step), default=None)
