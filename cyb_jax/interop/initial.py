"""The parameters of a run before its first step, if it starts from a pretrained model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from jaxtyping import Array, PyTree

from cyb_jax.configs import Config
from cyb_jax.decoder.lora import LEAVES
from cyb_jax.interop import new_rows
from cyb_jax.methods import Method

if TYPE_CHECKING:
  from cyb_jax.interop.pretrained import Pretrained


def parameters(source: Pretrained, method: Method, wanted: PyTree, config: Config) -> PyTree:
  """A run's parameters before its first step; see `cyb_jax.interop.pretrained`.

  Args:
    source: the source that the run starts from.
    method: the run's method, over its vocabulary.
    wanted: shapes, dtypes and shardings.
    config: the run's config; `train.seed` and `tuning.new_rows` are read.

  Returns:
    Bare arrays, placed on the devices. Parameters of the source are not drawn first, so there is only one copy of them.
  """
  found = source.params(wanted, method.decoder.config.lora)
  absent = {name: leaf for name, leaf in wanted.items() if name not in found}
  seed, choice = config.train.seed, config.tuning.new_rows
  rows = new_rows.start(choice, method, absent, found["decoder"], source.unused_ids, seed)
  missing = [path for path, _ in jax.tree_util.tree_leaves_with_path(wanted) if leaf_at(found, path) is None]
  drawn = [path for path in missing if path[0].key not in rows]
  for path in drawn:
    if path[-1].key not in LEAVES:  # adapters are always freshly initialised
      logging.info("init_from: %s is freshly initialised", jax.tree_util.keystr(path, simple=True, separator="."))
  fresh = _drawn(method, seed, drawn)

  def pick(path, leaf):
    imported = leaf_at(found, path)
    if imported is not None:
      return imported
    value = fresh[path] if path in fresh else rows[path[0].key]
    return _put(value, leaf)

  return jax.tree_util.tree_map_with_path(pick, wanted)


def _drawn(method: Method, seed: int, paths: list[tuple[Any, ...]]) -> dict[tuple[Any, ...], Array]:
  """Some of the fresh parameters of `training.init_state`; XLA removes the computation of the others."""

  def draw():
    params = nn.unbox(method.init(jax.random.fold_in(jax.random.key(seed), 0)))
    return [leaf_at(params, path) for path in paths]

  return dict(zip(paths, jax.jit(draw)())) if paths else {}


def placed(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
  """The arrays of `found` with the name and shape of a wanted array, in the wanted dtype and sharding."""
  arrays = {}
  for name, leaf in wanted.items():
    value = found.get(name)
    if isinstance(leaf, Mapping):
      arrays[name] = placed(value or {}, leaf)
    elif value is not None and value.shape == leaf.shape:
      arrays[name] = _put(value, leaf)
  return arrays


def leaf_at(tree: PyTree, path: tuple[Any, ...]) -> Any:
  """The leaf at a path of dict keys; None if there is no leaf."""
  for key in path:
    tree = tree.get(key.key) if isinstance(tree, Mapping) else None
  return tree


def _put(value: Array, leaf: jax.ShapeDtypeStruct) -> Array:
  """The array in the wanted dtype and sharding."""
  value = value.astype(leaf.dtype)
  if leaf.sharding is None or leaf.sharding.is_fully_addressable or not value.is_fully_addressable:
    return jax.device_put(value, leaf.sharding)
  # Every host has the entire array, and device_put would not accept an array that is on a single host's device.
  host = np.asarray(value)
  return jax.make_array_from_callback(host.shape, leaf.sharding, lambda index: host[index])
