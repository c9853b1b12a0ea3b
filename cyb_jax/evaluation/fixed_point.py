"""Exact sums: numbers in units of 2^-30 of their bound, added byte by byte in int32.

The sum of integers is bit-identical for every order of addition, batch size and number of devices; a long sum of f32
numbers on an accelerator is not, and it loses addends that are small relative to the sum. The four bytes of a number
are summed separately, so that int32 holds the sum of 8 million numbers (`MOST`) before the host continues in int64.

Dimensions: B batch, T tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

MOST = (1 << 31) // 255
"""The number of addends that int32 sums can hold."""

_ONE = 1 << 30
_BYTE_WEIGHTS = np.array([1, 1 << 8, 1 << 16, 1 << 24], np.int64)


def fixed(x: Float[Array, "..."], bound: float) -> Int[Array, "... 4"]:
  """The bytes, lowest first, of x in units of bound / 2^30; the highest byte carries the sign.

  Args:
    x: f32, clipped to [-bound, bound]; nan becomes 0.
    bound: a power of two, so that scaling is exact in f32.
  """
  return _bytes(_units(x, bound))


def total(x: Float[Array, "B T ..."], real: Bool[Array, "B T"], bound: float) -> Int[Array, "... 4"]:
  """`fixed(x)` summed over the real tokens."""
  return jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 1)), fixed(x, bound), 0).sum((0, 1))


def value(sums: np.ndarray, bound: float) -> np.ndarray:
  """f64[...]: the sum that int64[..., 4] represents."""
  return (sums * _BYTE_WEIGHTS).sum(-1) * (bound / _ONE)


def moments(x: Float[Array, "..."], bound: float) -> Int[Array, "... 17"]:
  """The exact integer parts of count, sum and sum of squares.

  The square of a 30-bit number has 60 bits: it is composed of the products of its halves.

  Args:
    x: f32, within [0, bound].
    bound: a power of two.
  """
  units = _units(x, bound)
  high, low = units >> 15, units & 0x7FFF
  parts = [_bytes(part) for part in (units, high * high, high * low, low * low)]
  return jnp.concatenate([jnp.ones_like(units)[..., None], *parts], -1)


def mean_and_variance(sums: np.ndarray, bound: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(count int64[...], mean f64[...], population variance f64[...]) from sums int64[..., 17]; nan if the count is 0."""
  count = sums[..., 0]
  x, high, mixed, low = (value(sums[..., i : i + 4], _ONE) for i in (1, 5, 9, 13))
  with np.errstate(invalid="ignore", divide="ignore"):
    mean = x / count / _ONE
    square = (high + mixed * 2.0**-14 + low * 2.0**-30) / count / _ONE
  return count, mean * bound, np.maximum(square - mean**2, 0.0) * bound**2


def _units(x: Float[Array, "..."], bound: float) -> Int[Array, "..."]:
  x = jnp.where(jnp.isnan(x), 0.0, jnp.clip(x, -bound, bound))
  return jnp.round(x * (_ONE / bound)).astype(jnp.int32)


def _bytes(units: Int[Array, "..."]) -> Int[Array, "... 4"]:
  return jnp.stack([units & 255, (units >> 8) & 255, (units >> 16) & 255, units >> 24], -1)
