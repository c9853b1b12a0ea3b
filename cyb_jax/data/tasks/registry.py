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
  """Completes a task's options and finds its source, without reading it.

  Args:
    name: one of `TASKS`, or 'seqio:NAME' for a SeqIO task or mixture that the user has registered.
    options: values by name; a string is converted to the number that it spells.

  Raises:
    InputError: an unknown task or option, a value of the wrong kind, or a source that is missing.
  """
  kind = _kind(name)
  settled = settle(name, kind.defaults, options)
  identity, source = kind.open(settled)
  return Task(name, settled, identity, kind.annotations_of(settled), source)


def settle_options(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Every option of a task with its value, without looking for its source.

  Raises:
    InputError: an unknown task or option, a value of the wrong kind, or options that exclude each other.
  """
  kind = _kind(name)
  settled = settle(name, kind.defaults, options)
  kind.annotations_of(settled)
  return settled


def has_targets(name: str, options: Mapping[str, Any] | None = None) -> bool:
  """Whether only a part of each of a task's documents has weight: answers, or an assistant's turns.

  Args:
    name: of a task; an unknown one has none.
    options: those that the user gives.

  Raises:
    InputError: an unknown option, or a value of the wrong kind.
  """
  if name not in TASKS:
    return False
  kind = TASKS[name]
  found = kind.annotations_of(settle(name, kind.defaults, options))
  return not {"weights", "messages"}.isdisjoint(found)


def default_tokenizer(task: str) -> str:
  """The tokenizer spec for a task if the user names none."""
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

  The registered tasks yield `targets`, a string: a whole document. `text_files` needs a pattern, and is registered
  only with one. A task whose source is missing is not registered, unless it is named in `options`.

  Args:
    options: options by task, such as {'text_files': {'pattern': 'books/*.txt'}}. A task that is named here replaces
      the one that is registered already.

  Returns:
    the names of all `cyb_` tasks that are registered now.

  Raises:
    InputError: an unknown task, or one in `options` whose options or source are invalid.
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
