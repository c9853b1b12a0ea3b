"""Initialisers of matrices and tables; the docstring of `decoder.init_params` states the rules and their sources."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn

from cyb_jax.decoder.config import DecoderConfig


def matrix_init(config: DecoderConfig, num_inputs: int, *, writes_residual: bool = False) -> Callable:
  """The initialiser of a kernel whose first `num_inputs` axes are contracted with the input.

  Args:
    config: names the rule in `initializer`.
    num_inputs: the number of the kernel's leading axes that are contracted.
    writes_residual: whether the projection writes to the residual stream.
  """
  if config.initializer == "normal":
    std = 0.02 / math.sqrt(2 * config.num_layers) if writes_residual else 0.02
    return nn.initializers.normal(std)
  if config.initializer == "small":
    std = math.sqrt(0.4 / config.d_model)
    return _truncated_normal(std / math.sqrt(2 * config.num_layers) if writes_residual else std)

  def init(rng, shape, dtype):
    return _truncated_normal(1 / math.sqrt(math.prod(shape[:num_inputs])))(rng, shape, dtype)

  return init


def embedding_init(config: DecoderConfig) -> Callable:
  """The initialiser of input rows."""
  if config.tied_embeddings or config.initializer != "scaled":
    return unembedding_init(config)
  return _truncated_normal(1 / math.sqrt(config.d_model) if config.scale_embeddings else 1.0)


def unembedding_init(config: DecoderConfig) -> Callable:
  """The initialiser of output rows."""
  if config.initializer == "normal":
    return nn.initializers.normal(0.02)
  return _truncated_normal(math.sqrt((0.4 if config.initializer == "small" else 1) / config.d_model))


def _truncated_normal(std: float) -> Callable:
  # Cutting a standard normal at two deviations leaves a deviation of 0.8796; `std` is the deviation of the result.
  return nn.initializers.truncated_normal(std / 0.87962566103423978)
