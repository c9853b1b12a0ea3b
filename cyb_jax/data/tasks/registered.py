"""`seqio:NAME`: a SeqIO task or mixture that the user has registered."""

from __future__ import annotations

from absl import logging

from cyb_jax.data.tasks import seqio_tasks
from cyb_jax.data.tasks.interface import Source, TaskKind


def registered_name(task: str) -> str | None:
  """The NAME in `seqio:NAME`; None for any other task."""
  prefix, _, name = task.partition(":")
  return name if prefix == "seqio" and name else None


def kind(name: str) -> TaskKind:
  """The kind of `seqio:NAME`."""

  def open_registered(options):
    return {"seqio": name, "module": options["module"]}, lambda: _source(name, options["module"])

  return TaskKind({"module": ""}, open_registered)


def _source(name: str, module: str) -> Source:
  provider = seqio_tasks.registered_task(name, module)
  if hasattr(provider, "tasks"):
    logging.warning(
      "data.task='seqio:%s': a SeqIO mixture ends when the first of its tasks is exhausted; the remaining documents of"
      " the other tasks are not read. data.mixture reads all documents: seqio:TASK:weight,seqio:TASK:weight",
      name,
    )

  # Each split is one piece, because the task's preprocessors may depend on the data outside a part.
  def read(group, part):
    del part
    return seqio_tasks.documents_of(f"seqio:{name}", provider, group)

  if "validation" in provider.splits:
    return Source(tuple(provider.splits), read, provider=lambda: provider)
  return Source(("train", *(("test",) if "test" in provider.splits else ())), read, hash_splits=True)
