"""The flags and functions of programs that read a split of a token store."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from absl import flags

from cyb_jax import command_line
from cyb_jax.errors import InputError

if TYPE_CHECKING:  # imported on use, so that errors in flags are reported quickly
  from jax.sharding import Mesh

  from cyb_jax.configs import Config
  from cyb_jax.data import TokenStore


def define_reading_flags() -> None:
  """Defines the flags of a program that reads a split."""
  flags.DEFINE_string("split", "validation", "The split that is read: validation, test or train.")
  flags.DEFINE_integer("limit", 0, "The largest number of windows that are read; 0: all windows of the split.")
  flags.DEFINE_integer("batch_size", 0, "The number of windows in a batch; 0: as in training.")
  command_line.define_path("store", "", "The token store, if it was moved after training.")


def reading_mesh() -> Mesh:
  """The mesh on which all devices split the batch; the parameters are replicated, even if training sharded them."""
  from cyb_jax.configs import ParallelismConfig
  from cyb_jax.partitioning.mesh import make_mesh

  return make_mesh(ParallelismConfig())


def open_store(config: Config, meta: dict[str, Any]) -> TokenStore:
  """Opens the token store on which a run was trained, at the recorded path or at the path of the flag `--store`.

  Args:
    config: the config of the run.
    meta: the JSON object of the run's checkpoint.
  """
  from cyb_jax.checkpointing.workdir import check_fingerprint
  from cyb_jax.training.run_data import open_recorded_or_new_store

  given = flags.FLAGS.store
  if given:
    if not os.path.exists(given):
      raise InputError(f"--store: {given} does not exist; give the folder of the run's token store")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, store=given))
  store = open_recorded_or_new_store(config, meta)
  check_fingerprint(store, meta)
  return store


def rows_at_once(config: Config, mesh: Mesh) -> int:
  """The batch size of the flag `--batch_size`, rounded up to a multiple of the number of data shards."""
  from cyb_jax.partitioning.mesh import data_shards

  shards = data_shards(mesh)
  # Rows that pad a batch have weight 0, so any size is valid.
  return -(-(flags.FLAGS.batch_size or config.evaluation_rows) // shards) * shards
