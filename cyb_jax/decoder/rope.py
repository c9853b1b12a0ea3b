"""Rotary position embeddings (RoPE): Su et al. 2021, RoFormer, https://arxiv.org/abs/2104.09864

Letters: B batch, S slots in a row (tokens x slots per token, flattened), N heads, H head size, R rotated part of a
head.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cyb_jax.decoder.rope_scaling import RopeScaling


def rope_factors(
  positions: Int[Array, "B S"] | Float[Array, "B S"],
  rotated_size: int,
  base: float,
  scaling: RopeScaling | None = None,
) -> tuple[Float[Array, "B S R/2"], Float[Array, "B S R/2"]]:
  """Cosine and sine of the rotary angles, positions * base^(-2i/R) for i = 0 .. R/2-1.

  Positions are an argument and do not follow from the order of the slots, because a pause has the position of its
  token. Angles are always float32: bfloat16 cannot distinguish position 257 from 258.

  Args:
    positions: i32[B, S], or f32[B, S] for positions between whole numbers.
    rotated_size: R, even: the number of elements of a head, out of H, that are rotated.
    base: the longest wavelength is close to 2 pi base.
    scaling: the scaling of the wavelengths; None: none. 'dynamic' depends on the highest of all these positions, so
      that a pass over new slots alone rotates them as `transformers` does, but not as one pass over all slots does.

  Returns:
    (cosine, sine), both f32[B, S, R/2].
  """
  positions = positions.astype(jnp.float32)
  angles = positions[..., None] * _frequencies(positions, rotated_size, base, scaling)
  if scaling is None:
    return jnp.cos(angles), jnp.sin(angles)
  return scaling.amplitude * jnp.cos(angles), scaling.amplitude * jnp.sin(angles)


def _frequencies(
  positions: Float[Array, "B S"], rotated_size: int, base: float, scaling: RopeScaling | None
) -> Float[Array, "R/2"]:
  if scaling is not None and scaling.kind != "dynamic":
    return jnp.asarray(scaling.frequencies(rotated_size, base), jnp.float32)
  if scaling is not None:
    base = scaling.dynamic_base(rotated_size, base, positions.max() + 1)
  return base ** -(jnp.arange(0, rotated_size, 2, dtype=jnp.float32) / rotated_size)


def apply_rope(
  heads: Float[Array, "B S N H"], cosine: Float[Array, "B S R/2"], sine: Float[Array, "B S R/2"]
) -> Float[Array, "B S N H"]:
  """Rotates the first R elements of every head; the others are unchanged.

  Element i is paired with element i + R/2, as in NeoX, Pythia, Gemma and the Hugging Face Llama (the RoFormer paper
  pairs neighbours; the two conventions differ by a permutation of the projections' columns). With R = 4 of H = 6:

      heads    x0 x1 x2 x3 x4 x5
      pairs    (x0, x2) is rotated by angle 0, (x1, x3) by angle 1; x4 and x5 are unchanged

  Args:
    heads: [B, S, N, H], any float dtype; the rotation is computed in float32.
    cosine, sine: f32[B or 1, S, R/2] from `rope_factors`.

  Returns:
    [B, S, N, H] in the dtype of `heads`.
  """
  half = cosine.shape[-1]
  cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
  first, second, rest = jnp.split(heads, (half, 2 * half), axis=-1)
  dtype = heads.dtype
  first, second = first.astype(jnp.float32), second.astype(jnp.float32)
  rotated = (first * cosine - second * sine).astype(dtype), (second * cosine + first * sine).astype(dtype)
  return jnp.concatenate((*rotated, rest), axis=-1)
