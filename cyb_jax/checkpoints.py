"""Checkpoints of a run: the one file that imports orbax.

A checkpoint holds the train state and a small JSON object (`meta`). It appears under its step's name only when it is
whole, so that an interrupted save leaves nothing that could be read.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers as policies

from cyb_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint held."""

  step: int
  state: PyTree
  meta: dict[str, Any]


class Checkpoints:
  """The checkpoints in a folder; saves run in the background, one at a time.

  Args:
    directory: local or `gs://`; made when the first checkpoint is saved.
    keep: how many of the newest are kept, beside the one with the lowest validation loss.
    read_only: for evaluation: nothing is written or tidied.
  """

  def __init__(self, directory: epath.PathLike, *, keep: int = 1, read_only: bool = False):
    self.directory = epath.Path(directory)
    best = policies.BestN(
      get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        best_fn=lambda metrics: metrics["loss"],
        best_mode="min",
        read_only=read_only,
        save_interval_steps=0 if read_only else 1,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
      ),
      item_names=("state", "meta"),
    )

  def steps(self) -> list[int]:
    """The steps of the finished checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def find(self, which: int | Literal["last", "best"]) -> int:
    """The step of a checkpoint.

    Raises:
      InputError: there is none, or none such.
    """
    steps = self.steps()
    if not steps:
      raise InputError(f"checkpoints: {self.directory} holds no finished checkpoint")
    if which == "last":
      return steps[-1]
    if which == "best":
      best = self._manager.best_step()
      if best is None or self._manager.metrics(best) is None:
        raise InputError(
          f"checkpoint: 'best' needs a validation at the step of a checkpoint (train.eval_every), and {self.directory}"
          f" has none; there are {', '.join(map(str, steps))}"
        )
      return best
    if which not in steps:
      raise InputError(f"checkpoint: {which} is not there; there are {', '.join(map(str, steps))}")
    return which

  def save(self, step: int, state: PyTree, meta: dict[str, Any], *, loss: float | None = None) -> None:
    """Starts to save; returns when the state was copied, and may be donated.

    Raises:
      Whatever the save before this one failed with.
    """
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
      # A loss that isn't finite must not compete: nan would win.
      metrics={"loss": loss} if loss is not None and math.isfinite(loss) else None,
    )

  def wait(self) -> None:
    """Until the last save is whole; raises what it failed with."""
    self._manager.wait_until_finished()
    self._manager.check_for_errors()

  def restore(self, step: int, abstract: PyTree) -> Restored:
    """The checkpoint of a step, on the devices and in the layout that `abstract` asks for.

    Args:
      step: one of `steps()`.
      abstract: a tree of ShapeDtypeStruct with shardings.

    Raises:
      InputError: the checkpoint holds other arrays than are asked for.
    """
    # Compared here, because orbax would cast another dtype silently and read a part of another shape.
    saved, wanted = _arrays(self._metadata(step)), _arrays(abstract)
    if saved != wanted:
      name = min(k for k in saved.keys() | wanted.keys() if saved.get(k) != wanted.get(k))
      raise InputError(
        f"checkpoint {step} in {self.directory}: {name} is {saved.get(name, 'missing')}, but this config has"
        f" {wanted.get(name, 'no such array')}"
      )
    restored = self._manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
    )
    logging.info("restored step %d from %s", step, self.directory)
    return Restored(step, restored["state"], restored["meta"])

  def restore_params(self, step: int, abstract: PyTree) -> PyTree:
    """The parameters alone, without reading the optimizer's state.

    Args:
      step: one of `steps()`.
      abstract: a tree of ShapeDtypeStruct with shardings, of the parameters.
    """
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      restored = checkpointer.restore(
        self.directory / str(step) / "state",
        args=ocp.args.PyTreeRestore(
          item={"params": abstract},
          restore_args={"params": ocp.checkpoint_utils.construct_restore_args(abstract)},
          partial_restore=True,
        ),
      )
    return restored["params"]

  def meta(self, step: int) -> dict[str, Any]:
    """The JSON object of a checkpoint."""
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

  def _metadata(self, step: int) -> PyTree:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
      return checkpointer.metadata(self.directory / str(step) / "state").item_metadata.tree

  def close(self) -> None:
    self._manager.close()


def _arrays(tree: PyTree) -> dict[str, str]:
  """'f32[2, 3]' and the like, by path; the same for a state and for what orbax says of a saved one."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
