"""AdamW with its schedule, from optax."""

from __future__ import annotations

import jax
import optax
from jaxtyping import PyTree

from cyb_jax.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int, width: int) -> optax.Schedule:
  """The learning rate by step, from 0.

  A linear warm-up that reaches the highest rate at update w = max(1, warmup_fraction * steps), the k-th having k/w of
  it (none has rate 0), then the configured form, which reaches the final rate at the last update.

  Args:
    config: `optimizer`.
    steps: how many there will be.
    width: d_model, which divides the rate where `rate_over_width` is set.
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
  """Which parameters have weight decay: the matrices (`kernel`), not norms, biases, embeddings and output rows."""
  return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.DictKey("kernel") in path, params)


def make_optimizer(config: OptimizerConfig, steps: int, width: int) -> optax.GradientTransformation:
  """Clipping, Adam, decoupled weight decay, schedule.

  The norm that is clipped is that of the gradient of the mean loss per token, over the whole batch and all devices.
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
  return optax.chain(*parts)
