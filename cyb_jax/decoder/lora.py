"""Low-rank adapters beside a decoder's matrices: y = x W + (alpha / rank) (x A) B, with W left as it is (LoRA, Hu et
al. 2021, https://arxiv.org/abs/2106.09685, section 4.1).

B starts at zero, so that an adapted decoder starts as the one that it adapts. A and B are f32 whatever W is.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from cyb_jax.errors import InputError

if TYPE_CHECKING:
  from cyb_jax.decoder.decoder import DecoderConfig

TARGETS = ("query", "key", "value", "out", "gate", "up", "down")
LEAVES = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Which matrices have an adapter, and of what size.

  Attributes:
    rank: the inner size of A and B.
    alpha: what an adapter adds is multiplied by alpha / rank.
    targets: of `TARGETS`; in all layers.

  Raises:
    InputError: a value that will not do; the message names the field of the group `tuning` that it comes from.
  """

  rank: int = 8
  alpha: float = 16.0
  targets: tuple[str, ...] = ("query", "value")

  def __post_init__(self):
    if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
      raise InputError(f"tuning.lora_rank: {self.rank!r} must be a whole number of at least 1")
    if not 0 < self.alpha < math.inf:
      raise InputError(f"tuning.lora_alpha: {self.alpha!r} must be positive and finite")
    known = all(name in TARGETS for name in self.targets)
    if not self.targets or not known or len(set(self.targets)) < len(self.targets):
      raise InputError(
        f"tuning.lora_targets: {','.join(self.targets)!r} must be some of {', '.join(TARGETS)}, each once, with commas"
        " between them"
      )

  @property
  def scale(self) -> float:
    """alpha / rank."""
    return self.alpha / self.rank


def adapt(
  x: Float[Array, "..."], a: Float[Array, "..."], b: Float[Array, "r ..."], scale: float, num_inputs: int
) -> Float[Array, "..."]:
  """scale (x A) B, in the dtype of x: what an adapter adds to a projection.

  Args:
    x: [..., inputs...].
    a: f32[inputs..., r].
    b: f32[r, outputs...].
    scale: alpha / rank.
    num_inputs: how many axes `inputs` are.
  """
  inner = jnp.tensordot(x, a.astype(x.dtype), axes=num_inputs)
  # Scaled where it is smallest.
  return jnp.tensordot(inner * jnp.asarray(scale, x.dtype), b.astype(x.dtype), axes=1)


def merge_lora(params: PyTree, config: DecoderConfig) -> tuple[PyTree, DecoderConfig]:
  """The plain decoder that an adapted one equals: W + (alpha / rank) A B in place of W.

  Args:
    params: the tree `params['decoder']`, bare arrays.
    config: of the decoder.

  Returns:
    The tree without adapters, all of it in f32, since a bfloat16 W would round what it was taught away; and its config.
    Both as they were where there are no adapters.
  """
  lora = config.lora
  if lora is None:
    return params, config

  def merge(tree: PyTree) -> PyTree:
    if not isinstance(tree, dict):
      return tree.astype(jnp.float32)
    plain = {name: merge(leaf) for name, leaf in tree.items() if name not in LEAVES}
    if LEAVES[0] in tree:
      a, b = (jnp.asarray(tree[name], jnp.float32) for name in LEAVES)
      # Stacked layers have a leading axis of their own.
      layers = a.shape[: int(config.scan_layers)]
      a, b = a.reshape(*layers, -1, lora.rank), b.reshape(*layers, lora.rank, -1)
      product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
      plain["kernel"] = plain["kernel"] + lora.scale * product.reshape(plain["kernel"].shape)
    return plain

  return merge(params), dataclasses.replace(config, lora=None, param_dtype="float32")
