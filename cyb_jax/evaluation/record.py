"""One evaluation of a run, with all the keys that others read."""

from __future__ import annotations

from typing import Any

from jaxtyping import PyTree

from cyb_jax.config import Config
from cyb_jax.data import TokenStore, evaluation_batches, with_documents
from cyb_jax.errors import InputError
from cyb_jax.evaluation.perplexity import Evaluator


def evaluate_split(
  evaluator: Evaluator,
  params: PyTree,
  store: TokenStore,
  config: Config,
  *,
  split: str,
  step: int,
  meta: dict[str, Any],
  limit: int | None = None,
  batch_size: int | None = None,
) -> dict[str, Any]:
  """Evaluates parameters on a split of a token store.

  Args:
    evaluator: of the config's method.
    params: bare arrays.
    store: read in order, each window once.
    config: gives the window's length and, by default, the batch size.
    split: 'validation', 'test' or 'train'.
    step: that the parameters stem from.
    meta: of the checkpoint: what training has spent.
    limit: at most so many windows; None: the split whole.
    batch_size: windows at a time; changes no number beyond rounding.

  Returns:
    Every evaluation key of design.md, and those that `Evaluator` adds.

  Raises:
    InputError: the store has no such split, or nothing in it.
  """
  if split not in store.splits:
    raise InputError(f"split: {split!r} is not in the token store of {store.path}; it has {', '.join(store.splits)}")
  windows = store.num_windows(split, config.data.sequence_length)
  if windows == 0:
    raise InputError(f"split: {split!r} of {store.path} is empty")
  batches = evaluation_batches(
    store,
    split,
    sequence_length=config.data.sequence_length,
    batch_size=batch_size or config.data.batch_size,
    limit=limit,
  )
  if config.data.document_mask:
    batches = (with_documents(batch, store.end_id) for batch in batches)
  whole = limit is None or limit >= windows
  numbers = evaluator(params, batches, num_bytes=store.num_bytes(split) if whole else None)
  record = {"method": config.method.name, "step": step, "split": split} | numbers
  return record | {key: meta[key] for key in ("train_tokens", "train_slots", "train_flops")}
