"""The data of a run: its token store, its batches, its number of steps, and the size of its vocabulary."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from cyb_jax import runs, storage
from cyb_jax.configs import Config
from cyb_jax.data import (
  MixtureBatches,
  MixtureStore,
  TokenStore,
  TrainBatches,
  is_store,
  open_token_store,
  open_tokenizer,
  prepare,
  prepare_mixture,
  with_segment_ids,
)
from cyb_jax.data.mixtures import check_sources
from cyb_jax.data.tasks import PLACES, settle_options, with_absolute_paths
from cyb_jax.data.tokenizers import trained_pieces, vocabulary_size
from cyb_jax.errors import InputError
from cyb_jax.training.trackers import check_trackers


def check_names(config: Config) -> None:
  """Checks the names of tasks, sources, options, tokenizer and trackers in a config; the data is not searched.

  Raises:
    InputError: a task, source or option is unknown, an option has the wrong type, options are incompatible, or the
      number of pieces is invalid, or a tracker is unknown.
  """
  if config.data.mixture:
    check_sources(config.mixture())
  else:
    settle_options(config.data.task, config.task_options())
  trained_pieces(config.data.tokenizer)
  check_trackers(config.train.trackers)


def open_store(config: Config) -> TokenStore:
  """Opens the token store of a config; a store that does not exist yet is prepared first.

  Raises:
    InputError: the store was not prepared for this config, or is shorter than one window.
  """
  data = config.data
  if data.mixture:
    store = prepare_mixture(config.mixture(), config.tokenizer)
  elif _is_existing_store(data.store):
    store = open_token_store(data.store)
    _check_store(store, config)
  else:
    store = prepare(data.task, config.tokenizer, data.store or None, options=config.task_options())
  store.require("train", data.sequence_length)
  if "validation" not in store.splits:
    raise InputError(
      f"data.task: {data.task!r} has no document in the validation split, which contains 1% of all documents (train has"
      f" {store.description['splits']['train']['documents']}); give more text, or smaller documents (text_files:"
      " data.options=unit=line)"
    )
  return store


def find_store(config: Config) -> TokenStore | None:
  """The token store of a config, or None if it is not prepared yet; nothing is written.

  Raises:
    InputError: the store in data.store was not prepared for this config, or as `check_names`.
  """
  data = config.data
  check_names(config)
  if data.store:
    return open_store(config) if _is_existing_store(data.store) else None
  try:
    if data.mixture:
      return prepare_mixture(config.mixture(), config.tokenizer, write=False)
    return prepare(data.task, config.tokenizer, options=config.task_options(), write=False)
  except InputError as error:  # neither the store nor its source exists
    logging.warning("%s; values that depend on the text are unknown", error)
    return None


def open_recorded_or_new_store(config: Config, meta: dict[str, Any] | None) -> TokenStore:
  """The token store on which a run was trained, or the store of its config if the former is unknown or missing.

  The caller checks the result with `checkpointing.workdir.check_fingerprint`.

  Args:
    config: the config of the run.
    meta: the JSON object of the run's checkpoint; None if there is no checkpoint.

  Raises:
    InputError: as `open_store` and `runs.open_recorded_store`.
  """
  path = config.data.store
  found = runs.open_recorded_store(meta, path)
  if found is None and meta is not None and path and path != storage.absolute(path) and not _is_existing_store(path):
    # Version 0.1 recorded relative paths without the working directory to which they are relative.
    raise InputError(
      f"data.store: the run records the relative path {path!r}, and {storage.absolute(path)} is not a token store; give"
      " the store's folder"
    )
  return found or open_store(config)


def open_batches(config: Config, store: TokenStore, rows: np.ndarray | None = None) -> TrainBatches | MixtureBatches:
  """The batches of a run.

  Args:
    config: the config of the run.
    store: the token store of the run.
    rows: int64[R], the rows of each batch that are read; None means all rows.
  """
  data = config.data
  options = {"batch_size": data.batch_size, "seed": data.seed, "fraction": data.fraction, "rows": rows}
  if isinstance(store, MixtureStore):
    return MixtureBatches(store.sources, sequence_length=data.sequence_length, **options)
  return TrainBatches(store, sequence_length=data.sequence_length, **options)


def batch_reader(config: Config, store: TokenStore, rows: np.ndarray) -> Callable[[int], dict[str, np.ndarray]]:
  """A function that reads the given rows of a step's batch, with `segment_ids` if the config masks documents."""
  batches = open_batches(config, store, rows)
  if not config.data.document_mask:
    return batches
  return lambda step: with_segment_ids(batches(step), store.end_id)


def abstract_batch(config: Config, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of a batch of `rows` windows."""
  names = {"tokens": "int32", "targets": "int32", "weights": "float32"}
  if config.data.document_mask:
    names["segment_ids"] = "int32"
  shape = rows, config.data.sequence_length
  return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in names.items()}


def num_steps(config: Config, batches: TrainBatches | MixtureBatches) -> int:
  """The number of steps of a run: `train.steps`, or the number of steps of `train.epochs` epochs."""
  # The product is rounded to 6 digits before `ceil`, so that rounding errors of the fractions do not add a step.
  return config.train.steps or math.ceil(round(config.train.epochs * batches.steps_per_epoch, 6))


def vocabulary(config: Config, store: TokenStore | None = None) -> tuple[int | None, str]:
  """(size of the vocabulary, a description of its source); the size is None if the tokenizer can't be read.

  Args:
    config: the config of the run.
    store: the token store of the run; None if it is not prepared, so that the tokenizer determines the size.
  """
  if store is not None:
    return store.vocab_size, f"the token store in {store.path}"
  field, spec = ("data.tokenizer" if config.data.tokenizer else "init_from"), config.data.tokenizer or config.init_from
  rows = config.decoder.get("vocab_size")
  try:
    return vocabulary_size(config.tokenizer, rows), f"{field} = {spec!r}"
  except InputError:
    source = "decoder.vocab_size" if rows else "the decoder's own rows"
    return None, f"{source}, because {field} = {spec!r} can't be read"


def _is_existing_store(path: str) -> bool:
  return bool(path) and (pathlib.Path(storage.absolute(path)).exists() or is_store(path))


def _check_store(store: TokenStore, config: Config) -> None:
  """Raises InputError if a store has another task, other options or another tokenizer than the config."""
  data, found = config.data, store.description
  if data.task != found["task"]:
    raise InputError(
      f"data.task: {data.task!r}, but the token store in {store.path} was prepared from {found['task']!r}; give that"
      " task, or another data.store"
    )
  settled, prepared = settle_options(data.task, config.task_options()), with_absolute_paths(found["options"])
  for name in config.task_options():  # options that the config does not set need not match
    if name not in PLACES and settled[name] != prepared[name]:
      raise InputError(
        f"data.options: {name}={settled[name]}, but the token store in {store.path} was prepared with"
        f" {name}={prepared[name]}; give that value, or another data.store"
      )
  spec = config.tokenizer
  if spec == data.store:
    return
  wanted = spec if trained_pieces(spec) else open_tokenizer(spec).describe()["sha256"]
  if wanted != found["tokenizer_from"]:
    raise InputError(
      f"data.tokenizer: {spec!r} ({wanted[:24]}), but the token store in {store.path} was prepared with"
      f" {found['tokenizer_from'][:24]}; give that tokenizer, or another data.store"
    )
