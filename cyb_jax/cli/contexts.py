"""The warning of programs that give a model another context than it was trained with.

With visible pauses and the recipe `constant`, every token of the training text is followed by all its pauses, and later
tokens learn to attend to them. A self-paced context has only the pauses that the model requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from absl import logging

from cyb_jax import jsonl, storage
from cyb_jax.errors import StorageError
from cyb_jax.methods import Method


def warn_of_untrained_context(method: Method, found: Mapping[str, Any] | None) -> None:
  """Logs that the model was not trained with self-paced contexts, if it was not.

  Args:
    method: the method of the run.
    found: an evaluation of the run in a self-paced context, or None: its `perplexity` and `constant_perplexity`, those
      of the same windows with all pauses, are part of the message.
  """
  from cyb_jax.generation.abilities import trained_self_paced

  if trained_self_paced(method):
    return
  logging.warning(
    "a self-paced context has only the requested pauses, but the model was trained with all pauses of every token in"
    " the context%s."
    " 'constant' is the context of its training; method.pause_visibility=hidden and method.recipe=on_policy train a"
    " model for self-paced contexts",
    "" if found is None else
    f": its perplexity is {found['perplexity']:.4g} at its own pace, and {found['constant_perplexity']:.4g} with all"
    " pauses on the same windows",
  )  # fmt: skip


def measured(workdir: str | None, step: int) -> dict[str, Any] | None:
  """The self-paced evaluation of a checkpoint that `cyb-evaluate --context=self_paced` or `cyb-report` stored.

  Args:
    workdir: the run's folder; None or '': the model is not a run.
    step: the step of the checkpoint.

  Returns:
    The evaluation, or None if there is none of this step.
  """
  if not workdir:
    return None
  for name, key in (("evaluation.json", None), ("report/statistics.json", "self_paced")):
    try:
      record = jsonl.loads(storage.read_bytes(storage.place(workdir) / name))
    except (OSError, ValueError, StorageError):
      continue
    if not isinstance(record, dict):
      continue
    found = record.get(key) if key else record
    if (
      record.get("step") == step
      and isinstance(found, dict)
      and found.get("perplexity")
      and found.get("constant_perplexity")
    ):
      return found
  return None
