"""Sums over batches in whole numbers: on the devices in int32, taken over by the host in int64 before they overflow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from cyb_jax.evaluation import fixed_point
from cyb_jax.methods import Batch

# After how many numbers in one sum the host takes over what the devices have summed.
_FLUSH_NUMBERS = fixed_point.MOST // 2

Sums = dict[str, Any]
"""A tree of sums by name: i32 on the devices, int64 on the host."""


class Accumulator:
  """Adds up the contributions of batches.

  Args:
    contributions: (params, ..., batch) -> a tree of int32.
    everywhere: the sharding of the sums.
    most: how many numbers a token adds to one of the sums at most.
  """

  def __init__(self, contributions: Callable[..., Sums], everywhere: NamedSharding, most: int):
    self._contributions, self._everywhere, self._most = contributions, everywhere, most

    def add(sums: Sums, *args: Any) -> Sums:
      return jax.tree.map(jnp.add, sums, contributions(*args))

    # In place: the table of types may be large.
    self._add = jax.jit(add, donate_argnums=0, out_shardings=everywhere)

  def __call__(self, batches: Iterable[Batch], params: PyTree, *args: Any) -> Sums:
    """The sums over the batches, a tree of int64."""
    args = (params, *jax.device_put(args, self._everywhere))
    total = sums = None
    pending = 0
    for batch in batches:
      added = batch["tokens"].size * self._most
      if pending + added > _FLUSH_NUMBERS and sums is not None:
        total, sums, pending = _taken_over(total, sums), None, 0
      if sums is None:
        shapes = jax.eval_shape(self._contributions, *args, batch)
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=self._everywhere), shapes)
      sums = self._add(sums, *args, batch)
      pending += added
    return _taken_over(total, sums)


def _taken_over(total: Sums | None, sums: Sums) -> Sums:
  sums = jax.tree.map(lambda x: np.asarray(x, np.int64), sums)
  return sums if total is None else jax.tree.map(np.add, total, sums)
