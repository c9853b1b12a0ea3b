"""Fetches arrays whose shards are on several hosts."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import PyTree


def fetch(tree: PyTree) -> PyTree:
  """Returns a tree of arrays as complete numpy arrays on every host; all hosts must call it."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  from jax.experimental import multihost_utils

  def gathered(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return jax.device_get(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(gathered, tree)
