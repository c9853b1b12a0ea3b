"""Selects an undamaged checkpoint: the newest, or the one with the lowest validation loss."""

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
    directory: the folder of the checkpoints, for error messages.
    steps: the steps of the finished checkpoints, ascending; at least one.
    damage: step -> the damage of its checkpoint, or None; see `integrity.damage`.
    loss: step -> the validation loss of its checkpoint, or None.

  Attributes:
    damaged: the damage that was found until now, by step.
  """

  def __init__(self, directory: Place, steps: Sequence[int], damage: _Damage, loss: Callable[[int], float | None]):
    self._directory, self._steps, self._damage, self._loss = directory, steps, damage, loss
    self.damaged: dict[int, str] = {}

  def choose(self, which: int | str, *, quick: bool) -> int | None:
    """The step of the checkpoint that a user requests; unless `which` is 'last', it may be damaged.

    Args:
      which: a step, 'last' or 'best'.
      quick: see `integrity.damage`.

    Returns:
      The step; None if `which` is 'last' and all checkpoints are damaged.

    Raises:
      InputError: there is no such checkpoint.
    """
    if which == "last":
      return self.newest(quick=quick)
    step = self._best() if which == "best" else which
    if step not in self._steps:
      raise InputError(f"checkpoint: there is no checkpoint {step}; give one of {self._listed()}")
    self._is_complete(step, quick=quick)
    return step

  def newest(self, *, quick: bool) -> int | None:
    """The step of the newest undamaged checkpoint; None if all are damaged."""
    return next((step for step in reversed(self._steps) if self._is_complete(step, quick=quick)), None)

  def check_all(self, newest: int) -> None:
    """Finds all damaged checkpoints; the states, which are large, are read only of checkpoints that may be used.

    Args:
      newest: the result of `newest`.
    """
    losses = {newest: self._loss(newest)}
    for step in set(self._steps) - self.damaged.keys() - {newest}:
      if self._is_complete(step, quick=True):
        losses[step] = self._loss(step)
    while (best := lowest(losses)) not in (None, newest) and not self._is_complete(best, quick=False):
      del losses[best]

  def all_damaged(self) -> InputError:
    """The error for the case that all checkpoints are damaged."""
    found = "; ".join(f"{step}: {self.damaged[step]}" for step in sorted(self.damaged, reverse=True))
    return InputError(
      f"checkpoints: all checkpoints in {self._directory} are damaged ({found}); restore one of them from a copy, or"
      " start again in another folder"
    )

  def _best(self) -> int:
    losses = {}
    for step in self._steps:
      # A damaged checkpoint may be the best; it must be a candidate, so that the user is informed of the damage.
      with contextlib.nullcontext() if self._is_complete(step, quick=True) else contextlib.suppress(Exception):
        losses[step] = self._loss(step)
    best = lowest(losses)
    if best is None:
      raise InputError(
        f"checkpoint: 'best' needs a validation at the step of a checkpoint (train.eval_every), and {self._directory}"
        f" has none; give one of {self._listed()}"
      )
    return best

  def _is_complete(self, step: int, *, quick: bool) -> bool:
    found = self._damage(step, quick=quick)
    if found is not None:
      self.damaged[step] = found
    return found is None

  def _listed(self) -> str:
    return ", ".join(map(str, self._steps))


def lowest(losses: Mapping[int, float | None]) -> int | None:
  """The step of the lowest loss, the newest of equal ones; None if no step has a loss."""
  known = {step: loss for step, loss in losses.items() if loss is not None}
  return min(known, key=lambda step: (known[step], -step), default=None)
