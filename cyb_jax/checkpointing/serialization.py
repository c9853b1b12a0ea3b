"""Writes and reads the arrays of checkpoints; the only module that imports orbax."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jaxtyping import PyTree

from cyb_jax.storage import Place

# The limit of arrays that are read or written concurrently; orbax's own limit for a standard checkpoint.
_CONCURRENT_GB = 96
# Orbax measures the time of a save by the system's clock, so with its own limit, 20 minutes, a save would fail when the
# clock is set forward. Nothing depends on the limit: a bucket's requests and lost hosts have limits of their own. In
# milliseconds, it fits into 32 bits.
_SAVE_SECONDS = 20 * 86400


class Writer:
  """Writes checkpoints in the background, one at a time.

  Args:
    retries: TensorStore's settings for repeating failed requests to a bucket (its context resource
      `gcs_request_retries`); None means the defaults.
  """

  def __init__(self, retries: Mapping[str, Any] | None = None):
    # If creating folders in the background failed, orbax would wait for them for minutes.
    options = ocp.options.AsyncOptions(timeout_secs=_SAVE_SECONDS, create_directories_asynchronously=False)
    handler = ocp.CompositeCheckpointHandler(
      handler_registry=_handlers(retries), composite_options=ocp.CompositeOptions(async_options=options)
    )
    self._checkpointer = ocp.AsyncCheckpointer(handler, async_options=options)

  def start(self, folder: Place, state: PyTree, meta: Mapping[str, Any], loss: float | None) -> None:
    """Starts to write; returns when the state has been copied.

    Args:
      folder: the folder of the checkpoint, which must not exist.
      state: a tree of arrays.
      meta: a JSON object.
      loss: the validation loss at this step; None if there was no validation.
    """
    items = {"state": ocp.args.PyTreeSave(state), "meta": ocp.args.JsonSave(meta)}
    if loss is not None:
      items["validation"] = ocp.args.JsonSave({"loss": loss})
    self._checkpointer.save(folder, args=ocp.args.Composite(**items))

  def wait(self) -> None:
    """Returns when the files are written; raises the error if writing failed."""
    self._checkpointer.wait_until_finished()

  def close(self) -> None:
    """Ends the threads; may raise the last error again."""
    self._checkpointer.close()


class Reader:
  """Reads checkpoints.

  Args:
    retries: see `Writer`.
  """

  def __init__(self, retries: Mapping[str, Any] | None = None):
    self._retries = retries

  def shapes(self, folder: Place) -> PyTree:
    """The tree of a checkpoint's state: `shape` and `dtype` of each array."""
    with self._checkpointer() as checkpointer:
      return checkpointer.metadata(folder).item_metadata["state"].tree

  def read(self, folder: Place, abstract: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """The state and the meta object of a checkpoint.

    Args:
      folder: the folder of the checkpoint.
      abstract: the state, as a tree of ShapeDtypeStruct with shardings.
    """
    state = ocp.args.PyTreeRestore(abstract, ocp.checkpoint_utils.construct_restore_args(abstract))
    restored = self._restore(folder, state=state, meta=ocp.args.JsonRestore())
    return restored["state"], restored["meta"]

  def read_params(self, folder: Place, abstract: PyTree) -> PyTree:
    """The parameters; the optimizer state is not read.

    Args:
      folder: the folder of the checkpoint.
      abstract: the parameters, as a tree of ShapeDtypeStruct with shardings.
    """
    wanted = ocp.args.PyTreeRestore(
      item={"params": abstract},
      restore_args={"params": ocp.checkpoint_utils.construct_restore_args(abstract)},
      partial_restore=True,
    )
    return self._restore(folder, state=wanted)["state"]["params"]

  def _restore(self, folder: Place, **items: Any) -> Any:
    with self._checkpointer() as checkpointer:
      return checkpointer.restore(folder, args=ocp.args.Composite(**items))

  def _checkpointer(self) -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(handler_registry=_handlers(self._retries)))


def _handlers(retries: Mapping[str, Any] | None) -> ocp.CheckpointHandlerRegistry:
  """The handlers of a checkpoint's items; orbax would log warnings for items without a handler."""
  registry = ocp.DefaultCheckpointHandlerRegistry()
  state = _StateHandler(retries)
  registry.add("state", ocp.args.PyTreeSave, state)
  registry.add("state", ocp.args.PyTreeRestore, state)
  for name in ("meta", "validation"):
    item = ocp.JsonCheckpointHandler()
    registry.add(name, ocp.args.JsonSave, item)
    registry.add(name, ocp.args.JsonRestore, item)
  return registry


class _StateHandler(ocp.PyTreeCheckpointHandler):
  """Reads and writes a tree of arrays like orbax's standard handler, with configurable `retries`."""

  def __init__(self, retries: Mapping[str, Any] | None):
    self._resources = None if retries is None else {"gcs_request_retries": dict(retries)}
    options = {} if self._resources is None else {"type_handler_registry": _type_handlers(self._resources)}
    super().__init__(save_concurrent_gb=_CONCURRENT_GB, restore_concurrent_gb=_CONCURRENT_GB, **options)

  @classmethod
  def typestr(cls) -> str:
    """The name that is recorded in a checkpoint: the name of the standard handler, which reads the same files."""
    return ocp.StandardCheckpointHandler.typestr()

  def finalize(self, directory: epath.Path) -> None:
    """Merges the files that the processes have written into one index."""
    if self._resources is None:
      super().finalize(directory)
      return
    # Orbax itself creates the TensorStore context of the merge and offers no way to change it, so the public function
    # that takes a context is called instead.
    context = ts.Context(self._resources, parent=ocp.type_handlers.get_ts_context(use_ocdbt=True))
    asyncio.run(ocp.type_handlers.merge_ocdbt_per_process_files(directory, ts_context=context, use_zarr3=False))


def _type_handlers(resources: Mapping[str, Any]) -> ocp.type_handlers.TypeHandlerRegistry:
  """Orbax's handlers of all types of leaves, with TensorStore context resources in addition to those of orbax."""
  standard = ((type_, ocp.type_handlers.get_type_handler(type_)) for type_ in ocp.type_handlers.supported_types())
  return ocp.type_handlers.create_type_handler_registry(
    *((type_, _TypeHandler(handler, resources)) for type_, handler in standard)
  )


class _TypeHandler(ocp.type_handlers.TypeHandler):
  """Wraps a type handler of orbax and adds context resources to the TensorStore context of each leaf.

  Args:
    handler: the type handler of orbax.
    resources: resources of a TensorStore context.
  """

  def __init__(self, handler: ocp.type_handlers.TypeHandler, resources: Mapping[str, Any]):
    self._handler, self._resources = handler, resources

  def __getattr__(self, name: str) -> Any:
    return getattr(self._handler, name)

  def typestr(self) -> str:
    return self._handler.typestr()

  async def metadata(self, infos: Sequence[ocp.type_handlers.ParamInfo]) -> Sequence[Any]:
    return await self._handler.metadata(self._with_resources(infos))

  async def serialize(
    self, values: Sequence[Any], infos: Sequence[ocp.type_handlers.ParamInfo], args: Any = None
  ) -> Sequence[Any]:
    return await self._handler.serialize(values, self._with_resources(infos), args)

  async def deserialize(self, infos: Sequence[ocp.type_handlers.ParamInfo], args: Any = None) -> Sequence[Any]:
    return await self._handler.deserialize(self._with_resources(infos), args)

  def _with_resources(self, infos: Sequence[ocp.type_handlers.ParamInfo]) -> Sequence[ocp.type_handlers.ParamInfo]:
    # Leaves that share a context, and thereby its cache, must share the new context. A child context inherits its
    # parent's resources.
    children: dict[int, ts.Context] = {}
    for info in infos:
      parent = info.ts_context
      info.ts_context = children.setdefault(id(parent), ts.Context(self._resources, parent=parent))
    return infos
