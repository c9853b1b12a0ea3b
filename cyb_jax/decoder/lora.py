"""Low-rank adapters of a decoder's matrices: y = x W + (alpha / rank) (x A) B, where W is frozen (LoRA, Hu et al. 2021,
https://arxiv.org/abs/2106.09685, section 4.1).

B starts at zero, so that an adapted decoder initially equals the decoder without adapters. A and B are always f32.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from cyb_jax.decoder.config import DecoderConfig, matrix_shape
from cyb_jax.decoder.quantization import SCALE, dequantize

LEAVES = ("lora_a", "lora_b")


def adapt(
  x: Float[Array, "..."], a: Float[Array, "..."], b: Float[Array, "r ..."], scale: float, num_inputs: int
) -> Float[Array, "..."]:
  """The adapter's addition to a projection, scale (x A) B, in the dtype of x.

  Args:
    x: [..., inputs...].
    a: f32[inputs..., r].
    b: f32[r, outputs...].
    scale: alpha / rank.
    num_inputs: the number of axes of `inputs`.
  """
  inner = jnp.tensordot(x, a.astype(x.dtype), axes=num_inputs)
  # The inner product is the smallest array of the three, so scaling it is cheapest.
  return jnp.tensordot(inner * jnp.asarray(scale, x.dtype), b.astype(x.dtype), axes=1)


def merge_lora(params: PyTree, config: DecoderConfig) -> tuple[PyTree, DecoderConfig]:
  """The plain decoder that equals an adapted or a quantised one: W + (alpha / rank) A B in place of W.

  Args:
    params: the tree `params['decoder']`, bare arrays.
    config: the decoder's config.

  Returns:
    The tree without adapters and quantised matrices, and its config. All leaves are f32, because a bfloat16 W would
    round the adapters' updates away. Without both, the arguments are returned unchanged.
  """
  lora = config.lora
  if lora is None and not config.is_quantized:
    return params, config

  def merge(tree: PyTree, name: str = "") -> PyTree:
    if not isinstance(tree, dict):
      return tree.astype(jnp.float32)
    if SCALE in tree:
      expand = functools.partial(dequantize, inputs=matrix_shape(config, name)[0])
      # Scanned layers are stacked on a leading axis.
      expand = jax.vmap(expand) if config.scan_layers else expand
      tree = tree | {"kernel": expand(tree["kernel"], tree[SCALE])}
      del tree[SCALE]
    plain = {name: merge(leaf, name) for name, leaf in tree.items() if name not in LEAVES}
    if LEAVES[0] in tree:
      a, b = (jnp.asarray(tree[name], jnp.float32) for name in LEAVES)
      layers = a.shape[: int(config.scan_layers)]
      a, b = a.reshape(*layers, -1, lora.rank), b.reshape(*layers, lora.rank, -1)
      product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
      plain["kernel"] = plain["kernel"] + lora.scale * product.reshape(plain["kernel"].shape)
    return plain

  return merge(params), dataclasses.replace(config, lora=None, param_dtype="float32")
