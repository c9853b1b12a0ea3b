"""Heads: matrices that start near the identity, between the states of the decoder and the shared readout."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from cyb_jax.costs import flops
from cyb_jax.methods.backbone import boxed

# Heads without noise would be equal, and would get equal gradients.
_NOISE = 0.02


def init_heads(rng: Array, heads: int, width: int) -> nn.Partitioned:
  """f32[heads, width, width]: the identity plus normal noise with a standard deviation of 0.02 / sqrt(width)."""
  noise = _NOISE / math.sqrt(width) * jax.random.normal(rng, (heads, width, width))
  return boxed(jnp.eye(width) + noise, None, "embed", None)


def heads_cost(width: int, heads: float) -> flops.Cost:
  """The operations of a forward pass in which `heads` heads per token are applied to one state each."""
  return flops.Cost(routing=2 * heads * width * width)
