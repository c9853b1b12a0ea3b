"""The tasks by name, and their registration with SeqIO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cyb_jax.data.tasks import answers, c4, hf, jsonl, parquet, registered, reviews, seqio_tasks, synthetic, text_files
from cyb_jax.data.tasks.interface import Task, TaskKind
from cyb_jax.data.tasks.options import settle
from cyb_jax.errors import InputError, did_you_mean

TASKS: dict[str, TaskKind] = {
  "imdb_reviews": reviews.KIND,
  "c4_en": c4.KIND,
  "text_files": text_files.KIND,
  "jsonl": jsonl.KIND,
  "parquet": parquet.KIND,
  "hf": hf.KIND,
  **answers.KINDS,
  **synthetic.KINDS,
}


def open_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
  """Completes a task's options and finds its source, without reading the source.

  Args:
    name: one of `TASKS`, or 'seqio:NAME' for a SeqIO task or mixture that the user has registered.
    options: values by name; a string is converted to a number where the option is one.

  Raises:
    InputError: the task or an option is unknown, a value has the wrong type, or the source is missing.
  """
  kind = _kind(name)
  settled = settle(name, kind.defaults, options)
  identity, source = kind.open(settled)
  return Task(name, settled, identity, kind.annotations_of(settled), source)


def settle_options(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Every option of a task with its value; the source is not searched.

  Raises:
    InputError: the task or an option is unknown, a value has the wrong type, or options are incompatible.
  """
  kind = _kind(name)
  settled = settle(name, kind.defaults, options)
  kind.annotations_of(settled)
  return settled


def has_targets(name: str, options: Mapping[str, Any] | None = None) -> bool:
  """Whether only a part of each document has weight 1: the answer, or the assistant's turns.

  Args:
    name: name of a task; the result is False for an unknown task.
    options: the options that the user gives.

  Raises:
    InputError: an option is unknown, or a value has the wrong type.
  """
  if name not in TASKS:
    return False
  kind = TASKS[name]
  found = kind.annotations_of(settle(name, kind.defaults, options))
  return not {"weights", "messages"}.isdisjoint(found)


def default_tokenizer(task: str) -> str:
  """The tokenizer spec for a task if the user gives none."""
  return TASKS[task].tokenizer if task in TASKS else TaskKind.tokenizer


def _kind(name: str) -> TaskKind:
  own = registered.registered_name(name)
  if own is not None:
    return registered.kind(own)
  if name not in TASKS:
    hint = did_you_mean(name, TASKS, listed=[*TASKS, "seqio:NAME"])
    raise InputError(f"data.task={name!r}: unknown; {hint}")
  return TASKS[name]


def register(options: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[str, ...]:
  """Registers every task with SeqIO as `cyb_NAME`; a second call changes nothing.

  The registered tasks yield `targets`, a string that contains a complete document. `text_files` is registered only if
  its option `pattern` is given. A task whose source is missing is skipped, unless it is a key of `options`.

  Args:
    options: options by task, such as {'text_files': {'pattern': 'books/*.txt'}}. A task that is a key of `options`
      replaces a registered task of the same name.

  Returns:
    the names of all registered `cyb_` tasks.

  Raises:
    InputError: a task is unknown, or a task in `options` has invalid options or an invalid source.
  """
  seqio = seqio_tasks.import_seqio()
  options = options or {}
  unknown = sorted(set(options) - set(TASKS))
  if unknown:
    raise InputError(f"data.task={unknown[0]!r}: unknown; choose among {', '.join(TASKS)}")
  for name in TASKS:
    registered_as = f"cyb_{name}"
    if registered_as in seqio.TaskRegistry.names():
      if name not in options:
        continue
      seqio.TaskRegistry.remove(registered_as)
    try:
      task = open_task(name, options.get(name)).provider
    except InputError:
      if name in options:
        raise
      continue
    seqio.TaskRegistry.add_provider(registered_as, task)
  return tuple(name for name in (f"cyb_{task}" for task in TASKS) if name in seqio.TaskRegistry.names())
