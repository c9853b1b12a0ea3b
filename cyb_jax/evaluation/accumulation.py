"""Integer sums over batches: int32 on the devices, moved to int64 on the host before they overflow."""

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

# The number of addends of one sum after which the sums of the devices are moved to the host.
_FLUSH_NUMBERS = fixed_point.MOST // 2

Sums = dict[str, Any]
"""A tree of sums by name: i32 on the devices, int64 on the host."""


class Accumulator:
  """Adds up the contributions of batches.

  Args:
    contributions: (params, ..., batch) -> a tree of int32.
    everywhere: the sharding of the sums, which are replicated.
    most: the maximum number of addends of a token in one of the sums.
  """

  def __init__(self, contributions: Callable[..., Sums], everywhere: NamedSharding, most: int):
    self._contributions, self._everywhere, self._most = contributions, everywhere, most

    def add(sums: Sums, *args: Any) -> Sums:
      return jax.tree.map(jnp.add, sums, contributions(*args))

    # The sums are donated, because the table of types may be large.
    self._add = jax.jit(add, donate_argnums=0, out_shardings=everywhere)

  def __call__(self, batches: Iterable[Batch], params: PyTree, *args: Any) -> Sums:
    """The sums over the batches, a tree of int64."""
    args = (params, *jax.device_put(args, self._everywhere))
    total = sums = None
    pending = 0
    for batch in batches:
      added = batch["tokens"].size * self._most
      if pending + added > _FLUSH_NUMBERS and sums is not None:
        total, sums, pending = _moved_to_host(total, sums), None, 0
      if sums is None:
        shapes = jax.eval_shape(self._contributions, *args, batch)
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=self._everywhere), shapes)
      sums = self._add(sums, *args, batch)
      pending += added
    return _moved_to_host(total, sums)


def _moved_to_host(total: Sums | None, sums: Sums) -> Sums:
  sums = jax.tree.map(lambda x: np.asarray(x, np.int64), sums)
  return sums if total is None else jax.tree.map(np.add, total, sums)
