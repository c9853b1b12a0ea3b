"""The interface between the checkpoint manager and the storage of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from cyb_jax.storage import Place


class Backend(Protocol):
  """Stores checkpoints in a folder. A checkpoint has its step's name from the moment when it is complete.

  Only host 0 calls the methods that write.

  Attributes:
    retries: TensorStore's settings for repeating failed requests; None means the defaults.
  """

  retries: Mapping[str, Any] | None

  def steps(self) -> list[int]:
    """The steps of the finished checkpoints, including damaged ones, ascending."""
    ...

  def claim(self) -> None:
    """Registers this run as the only writer, if the storage has no locks."""
    ...

  def tidy(self) -> None:
    """Deletes the remains of saves and deletions of killed runs."""
    ...

  def is_saved(self, step: int) -> bool:
    """Whether the step has a finished checkpoint."""
    ...

  def prepare(self, step: int) -> None:
    """Prepares the folder for a save of this step."""
    ...

  def written_to(self, step: int) -> Place:
    """The folder that a save writes to, which must not exist when the save begins."""
    ...

  def commit(self, step: int) -> None:
    """Atomically turns a save whose files are written into a finished checkpoint.

    Raises:
      StorageError: another run has claimed the folder.
    """
    ...

  def delete(self, step: int) -> None:
    """Deletes a checkpoint; the remains of an interrupted deletion are not taken for a checkpoint."""
    ...

  def discard(self) -> None:
    """Deletes the files of a failed save if they may be the reason that the disk is full."""
    ...

  def surviving(self, known: Iterable[int]) -> list[int]:
    """The steps of the finished checkpoints after a failed save, ascending.

    Args:
      known: the steps that this run knows of, for a bucket that has just failed and is not queried again.
    """
    ...

  def close(self, *, failed: bool) -> None:
    """Deletes temporary files at the end of a run.

    Args:
      failed: whether a save has failed.
    """
    ...
