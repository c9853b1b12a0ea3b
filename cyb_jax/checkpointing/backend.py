"""What a checkpoint manager needs of the place where checkpoints are stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from cyb_jax.storage import Place


class Backend(Protocol):
  """Stores checkpoints in a folder, each under its step's name from the moment that it is whole.

  Host 0 alone calls the methods that write.

  Attributes:
    retries: how often TensorStore repeats a failed request here; None: as it does by default.
  """

  retries: Mapping[str, Any] | None

  def steps(self) -> list[int]:
    """The steps of the finished checkpoints, damaged ones among them, ascending."""
    ...

  def claim(self) -> None:
    """Makes this run the one that writes here, where nothing can be locked."""
    ...

  def tidy(self) -> None:
    """Deletes what killed runs have left of saves and deletions."""
    ...

  def is_saved(self, step: int) -> bool:
    """Whether a step needs no further save."""
    ...

  def prepare(self, step: int) -> None:
    """Makes way for a save."""
    ...

  def written_to(self, step: int) -> Place:
    """The folder that a save writes to, which must not exist when the save begins."""
    ...

  def commit(self, step: int) -> None:
    """Turns a save whose files are written into a finished checkpoint, at one moment.

    Raises:
      StorageError: another run has claimed the folder.
    """
    ...

  def delete(self, step: int) -> None:
    """Deletes a checkpoint; a deletion that is interrupted leaves nothing that looks like a checkpoint."""
    ...

  def discard(self) -> None:
    """Deletes the files of a save that has failed, where they may be what fills the disk."""
    ...

  def surviving(self, known: Iterable[int]) -> list[int]:
    """The steps of the finished checkpoints after a failed save, ascending.

    Args:
      known: the steps that this run knows of, for a store that has just failed and is not asked again.
    """
    ...

  def close(self, *, failed: bool) -> None:
    """Deletes what is no longer needed at the end of a run.

    Args:
      failed: whether a save has failed.
    """
    ...
