"""Sums that lose nothing: numbers in units of 2^-30 of their bound, added byte by byte in int32.

Whole numbers add up to the same bits in whatever order, over whatever batches and devices; a long sum of f32 on an
accelerator does not, and it drops addends that are small against it. The four bytes of a number are summed apart, so
that int32 holds 8 million of them (`MOST`) before the host has to take over in int64.

Dimensions: B batch, T tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

MOST = (1 << 31) // 255
"""How many numbers may be added in int32."""

_ONE = 1 << 30
_PLACES = np.array([1, 1 << 8, 1 << 16, 1 << 24], np.int64)


def fixed(x: Float[Array, "..."], bound: float) -> Int[Array, "... 4"]:
  """The bytes, lowest first, of x in units of bound / 2^30; the highest one carries the sign.

  Args:
    x: f32, within [-bound, bound]; what is beyond is cut, and nan is 0.
    bound: a power of two, so that f32 loses nothing.
  """
  return _bytes(_units(x, bound))


def total(x: Float[Array, "B T ..."], real: Bool[Array, "B T"], bound: float) -> Int[Array, "... 4"]:
  """`fixed(x)` summed over the tokens that are real."""
  return jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 1)), fixed(x, bound), 0).sum((0, 1))


def value(sums: np.ndarray, bound: float) -> np.ndarray:
  """f64[...]: the sum that int64[..., 4] represents."""
  return (sums * _PLACES).sum(-1) * (bound / _ONE)


def moments(x: Float[Array, "..."], bound: float) -> Int[Array, "... 17"]:
  """What count, sum and sum of squares are made of, exactly.

  The square of a number of 30 bits has 60: it is put together from the products of its halves.

  Args:
    x: f32, within [0, bound].
    bound: a power of two.
  """
  units = _units(x, bound)
  high, low = units >> 15, units & 0x7FFF
  parts = [_bytes(part) for part in (units, high * high, high * low, low * low)]
  return jnp.concatenate([jnp.ones_like(units)[..., None], *parts], -1)


def mean_and_variance(sums: np.ndarray, bound: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(count int64[...], mean f64[...], variance f64[...], that of the numbers themselves) of int64[..., 17]; nan where
  there is none.
  """
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
