"""One evaluation of a run: a record of evaluation.json."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from absl import logging
from jaxtyping import PyTree

from cyb_jax.configs import Config
from cyb_jax.data import TokenStore, evaluation_batches, with_segment_ids
from cyb_jax.evaluation.abilities import is_causal
from cyb_jax.evaluation.perplexity import Evaluator
from cyb_jax.evaluation.windows import used_windows
from cyb_jax.progress import track

# The number of windows that are also evaluated token by token, with one pass per token, for a non-causal method.
AUTOREGRESSIVE_WINDOWS = 16


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
  autoregressive_windows: int = 0,
) -> dict[str, Any]:
  """Evaluates parameters on a split of a token store.

  Args:
    evaluator: the evaluator of the config's method.
    params: bare arrays.
    store: the token store; its windows are read in order, each once.
    config: sets the window's length and, by default, the batch size, which is the number of rows of a training
      microbatch.
    split: 'validation', 'test' or 'train'.
    step: the training step of the parameters.
    meta: the checkpoint's metadata with the compute cost of training.
    limit: the maximum number of windows; None: the complete split.
    batch_size: the number of windows of a batch; affects results only by rounding.
    autoregressive_windows: for a non-causal method, the maximum number of windows that are also evaluated
      autoregressively; 0: none.

  Returns:
    `method`, `step`, `split`, `limit`, `omega` (of this evaluation; None: all slots, always), `context`, the keys of
    `Evaluator`, `train_tokens`, `train_slots`, `train_flops`, and `autoregressive`, see `read_autoregressively`.

  Raises:
    InputError: the store has no such split, or the split is empty.
  """
  windows, limit = used_windows(store, config, split, limit)
  batch_size = batch_size or config.evaluation_rows
  batches = _batches(evaluator, store, config, split, limit, batch_size)
  logging.info("evaluating %s: %d windows of %d tokens", split, windows, config.data.sequence_length)
  num_bytes = store.num_bytes(split) if limit is None else None
  batches = track(batches, f"evaluating {split}", total=windows, unit="windows", size=batch_size)
  numbers = evaluator(params, batches, num_bytes=num_bytes)
  record = {"method": config.method.name, "step": step, "split": split, "limit": limit}
  record |= {"omega": evaluator.omega, "context": evaluator.context} | numbers
  record |= {key: meta[key] for key in ("train_tokens", "train_slots", "train_flops")}
  found = read_autoregressively(
    evaluator,
    params,
    store,
    config,
    split=split,
    windows=min(windows, autoregressive_windows),
    batch_size=batch_size,
  )
  return record | {"autoregressive": found}


def read_autoregressively(
  evaluator: Evaluator,
  params: PyTree,
  store: TokenStore,
  config: Config,
  *,
  split: str,
  windows: int,
  batch_size: int | None = None,
) -> dict[str, Any] | None:
  """The result of `Evaluator.autoregressive` on the first `windows` windows of a split; None if `windows` is 0 or the
  method is causal, because its evaluation is already autoregressive. Arguments: see `evaluate_split`.
  """
  if is_causal(evaluator.method) or not windows:
    return None
  # A smaller batch, because padding rows would need as many passes as real rows.
  batch_size = min(batch_size or config.evaluation_rows, -(-windows // evaluator.shards) * evaluator.shards)
  length = config.data.sequence_length
  logging.info("evaluating %s token by token: %d windows of %d passes", split, windows, length)
  batches = _batches(evaluator, store, config, split, windows, batch_size)
  what = f"evaluating {split} token by token"
  return evaluator.autoregressive(params, track(batches, what, total=windows, unit="windows", size=batch_size))


def _batches(
  evaluator: Evaluator, store: TokenStore, config: Config, split: str, limit: int | None, batch_size: int
) -> Iterable[dict[str, Any]]:
  batches = evaluation_batches(
    store,
    split,
    sequence_length=config.data.sequence_length,
    batch_size=batch_size,
    limit=limit,
    rows=evaluator.rows(batch_size),
  )
  if config.data.document_mask:
    return (with_segment_ids(batch, store.end_id) for batch in batches)
  return batches
