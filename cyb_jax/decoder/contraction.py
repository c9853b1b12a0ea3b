"""The product of activations and a matrix, with a gradient that is fast on CPUs.

Letters: X the axes of the input that are contracted, Y the axes of the output.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cyb_jax.partitioning.rules import current_mesh, target_platform


def contract(x: Float[Array, "B S *X"], kernel: Float[Array, "*X *Y"], count: int) -> Float[Array, "B S *Y"]:
  """The sum of products over the last `count` axes of `x` and the first `count` axes of `kernel`.

  The gradient is that of `jnp.tensordot`. On a CPU without a mesh it is a product of two matrices: for the general
  gradient, XLA's CPU compiler chooses layouts in which activations are transposed, which takes several times as long.
  """
  if target_platform() == "cpu" and current_mesh() is None:
    return _contract(count, x, kernel)
  return jnp.tensordot(x, kernel, axes=count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(count: int, x: Array, kernel: Array) -> Array:
  return jnp.tensordot(x, kernel, axes=count)


def _contract_forward(count: int, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
  # The product itself, so that the policies of rematerialisation see it.
  return jnp.tensordot(x, kernel, axes=count), (x, kernel)


def _contract_backward(count: int, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
  x, kernel = residuals
  size = math.prod(kernel.shape[:count])
  rows, cotangents, matrix = x.reshape(-1, size), cotangent.reshape(-1, kernel.size // size), kernel.reshape(size, -1)
  return (cotangents @ matrix.T).reshape(x.shape), (rows.T @ cotangents).reshape(kernel.shape)


_contract.defvjp(_contract_forward, _contract_backward)
