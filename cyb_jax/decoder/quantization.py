"""Frozen matrices in 8 or 4 bits: weights only; activations and sums keep their formats.

- int8: an integer in [-127, 127] for each weight, and a scale for each output: W = q * scale.
- nf4: blocks of 64 consecutive inputs of an output share a scale, their largest absolute weight, and each weight is one
  of 16 levels, the quantiles of a normal distribution (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314,
  appendix E). Two weights are packed into a byte, the first one in the lower half. A matrix whose inputs are no
  multiple of 64 has blocks of the largest power of two that divides their number.

In the parameters a matrix is then a `kernel` of integers and a `kernel_scale` in f32. Tables, norms and biases are
bfloat16.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, PyTree, UInt8

from cyb_jax.errors import InputError

SCHEMES = ("int8", "nf4")
SCALE = "kernel_scale"
_BLOCK = 64
# The 16 levels of appendix E.
_LEVELS = np.array([
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
  -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
_LARGEST = 127


def storage_dtype(scheme: str) -> jnp.dtype:
  """The dtype of the stored integers."""
  return jnp.dtype(jnp.int8 if scheme == "int8" else jnp.uint8)


def scheme_of(params: PyTree) -> str | None:
  """The scheme of a decoder's parameters, arrays or shapes; None: they are not quantised."""
  dtypes = {jnp.dtype(leaf.dtype) for leaf in jax.tree.leaves(params)}
  return next((scheme for scheme in SCHEMES if storage_dtype(scheme) in dtypes), None)


def shapes(scheme: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The shapes of the stored integers and of the scales of a matrix.

  Args:
    scheme: one of `SCHEMES`.
    inputs: the axes of the matrix that are contracted.
    outputs: its other axes.

  Raises:
    InputError: nf4 can't pack an odd number of inputs.
  """
  if scheme == "int8":
    return inputs + outputs, outputs
  size = math.prod(inputs)
  if size % 2:
    raise InputError(f"precision.params: 'nf4', but a matrix has {size} inputs, which must be even; use 'int8'")
  return (size // 2, *outputs), (size // _block(size), *outputs)


def quantize(scheme: str, kernel: Float[np.ndarray, "..."], num_inputs: int) -> tuple[np.ndarray, np.ndarray]:
  """The integers and the scales of a matrix.

  Args:
    scheme: one of `SCHEMES`.
    kernel: [inputs..., outputs...], any float dtype.
    num_inputs: the number of axes of the inputs.
  """
  inputs, outputs = kernel.shape[:num_inputs], kernel.shape[num_inputs:]
  kernel = np.asarray(kernel, np.float32)
  if scheme == "int8":
    scale = np.abs(kernel).max(tuple(range(num_inputs))) / _LARGEST
    # A column of zeros has the scale 1, so that no quotient is 0 / 0.
    scale = np.where(scale == 0, np.float32(1), scale).astype(np.float32)
    return np.rint(kernel / scale).astype(np.int8), scale
  stored, scales = shapes(scheme, inputs, outputs)
  blocks = kernel.reshape(scales[0], -1, *outputs)
  scale = np.abs(blocks).max(1)
  scale = np.where(scale == 0, np.float32(1), scale).astype(np.float32)
  # The nearest level: the middles of neighbouring levels are the borders.
  codes = np.searchsorted((_LEVELS[1:] + _LEVELS[:-1]) / 2, blocks / scale[:, None]).astype(np.uint8)
  pairs = codes.reshape(stored[0], 2, *outputs)
  return pairs[:, 0] | pairs[:, 1] << 4, scale


def quantize_decoder(scheme: str, params: PyTree, *, stacked: bool) -> PyTree:
  """The parameters of a decoder with quantised matrices, on the host; other leaves are unchanged.

  Args:
    scheme: one of `SCHEMES`.
    params: the tree `params['decoder']` without adapters.
    stacked: whether layers are stacked on a leading axis.
  """

  def walk(tree: PyTree, name: str) -> PyTree:
    if not isinstance(tree, dict):
      return tree
    if "kernel" not in tree:
      return {key: walk(leaf, key) for key, leaf in tree.items()}
    kernel, num_inputs = np.asarray(jax.device_get(tree["kernel"])), 2 if name == "out" else 1
    if stacked:
      stored, scale = (np.stack(x) for x in zip(*(quantize(scheme, layer, num_inputs) for layer in kernel)))
    else:
      stored, scale = quantize(scheme, kernel, num_inputs)
    return tree | {"kernel": jnp.asarray(stored), SCALE: jnp.asarray(scale)}

  return walk(params, "")


def dequantize(
  stored: Int8[Array, "..."] | UInt8[Array, "..."], scale: Float[Array, "..."], inputs: tuple[int, ...]
) -> Float[Array, "..."]:
  """The matrix, f32[inputs..., outputs...]; the scheme follows from the dtype of the integers.

  Args:
    stored: the integers.
    scale: the scales.
    inputs: the axes of the matrix that are contracted.
  """
  if stored.dtype == jnp.int8:
    return stored.astype(jnp.float32) * scale
  outputs = stored.shape[1:]
  codes = jnp.stack([stored & 15, stored >> 4], 1)
  levels = jnp.asarray(_LEVELS)[codes.astype(jnp.int32)]
  blocks = levels.reshape(scale.shape[0], -1, *outputs) * scale[:, None]
  return blocks.reshape(*inputs, *outputs)


def project(
  x: Float[Array, "..."],
  stored: Int8[Array, "..."] | UInt8[Array, "..."],
  scale: Float[Array, "..."],
  inputs: tuple[int, ...],
) -> Float[Array, "..."]:
  """The product of activations [..., inputs...] with a stored matrix, in the dtype of the activations.

  With int8 the integers are exact in bfloat16, and the scales multiply the f32 sums; nf4 is expanded first.
  """
  if stored.dtype == jnp.int8:
    product = jnp.tensordot(x, stored.astype(x.dtype), axes=len(inputs), preferred_element_type=jnp.float32)
    return (product * scale).astype(x.dtype)
  return jnp.tensordot(x, dequantize(stored, scale, inputs).astype(x.dtype), axes=len(inputs))


def _block(size: int) -> int:
  return math.gcd(size, _BLOCK)
