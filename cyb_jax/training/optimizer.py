"""AdamW and its learning rate schedule, built from optax."""

from __future__ import annotations

import types
from collections.abc import Mapping

import jax
import optax
from jaxtyping import PyTree

from cyb_jax.configs import Config, OptimizerConfig
from cyb_jax.decoder.lora import LEAVES
from cyb_jax.methods import Method, OwnRates


def schedule(config: OptimizerConfig, steps: int, width: int) -> optax.Schedule:
  """The learning rate by step, from 0.

  A linear warm-up reaches the highest rate at update w = max(1, warmup_fraction * steps). Update k <= w has k/w of that
  rate, so no update has rate 0. The configured schedule follows and reaches the final rate at the last update.

  Args:
    config: the config's group `optimizer`.
    steps: the number of steps of the run.
    width: d_model; the rate is divided by it if `rate_over_width` is set.
  """
  peak = config.learning_rate / (width if config.rate_over_width else 1)
  final = peak * config.final_fraction
  warmup = max(1, round(config.warmup_fraction * steps))
  rest = max(1, steps - warmup)
  parts = [optax.linear_schedule(0.0, peak, warmup)]
  borders = [warmup]
  if config.schedule == "cosine":
    parts.append(optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction))
  elif config.schedule == "wsd":
    decay = max(1, round(config.decay_fraction * steps))
    parts += [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)]
    borders.append(max(warmup, steps - decay))
  else:
    parts.append(optax.constant_schedule(peak))
  joined = optax.join_schedules(parts, borders)
  return lambda step: joined(step + 1)


def decayed(params: PyTree) -> PyTree:
  """A tree of bools: whether a parameter has weight decay.

  Matrices, including the matrices of adapters, have weight decay; norms, biases, embeddings and output rows do not.
  """
  names = [jax.tree_util.DictKey(name) for name in ("kernel", *LEAVES)]
  return jax.tree_util.tree_map_with_path(lambda path, _: any(name in path for name in names), params)


def optimizer_of(config: Config, method: Method, steps: int) -> optax.GradientTransformation:
  """The optimizer of a run with this number of steps."""
  factors = method.rate_factors if isinstance(method, OwnRates) else {}
  width = method.decoder.config.d_model
  return make_optimizer(config.optimizer, steps, width, new_rate=config.tuning.new_rate, factors=factors)


def make_optimizer(
  config: OptimizerConfig,
  steps: int,
  width: int,
  *,
  new_rate: float = 1.0,
  factors: Mapping[str, float] = types.MappingProxyType({}),
) -> optax.GradientTransformation:
  """Gradient clipping, Adam with decoupled weight decay, and the schedule.

  The norm for clipping is the global norm, over all trained parameters, of the gradient of the mean loss per token of
  the global batch.

  Args:
    config: the config's group `optimizer`.
    steps, width: see `schedule`.
    new_rate: a factor on the learning rate of the parameters outside the decoder.
    factors: further factors on the learning rate of some of these parameters, by name; see `methods.OwnRates`.
  """
  parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  parts.append(
    optax.adamw(
      schedule(config, steps, width),
      b1=config.beta1,
      b2=config.beta2,
      eps=config.epsilon,
      weight_decay=config.weight_decay,
      mask=decayed,
    )
  )
  if new_rate != 1 or any(factor != 1 for factor in factors.values()):
    parts.append(optax.stateless(lambda updates, _: _scaled_outside_decoder(updates, new_rate, factors)))
  return optax.chain(*parts)


def _scaled_outside_decoder(updates: PyTree, factor: float, factors: Mapping[str, float]) -> PyTree:
  def scaled(name: str, part: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x * (factor * factors.get(name, 1.0)), part)

  return {name: part if name == "decoder" else scaled(name, part) for name, part in updates.items()}
