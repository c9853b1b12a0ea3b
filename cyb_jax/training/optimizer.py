"""AdamW and its learning rate schedule, built from optax."""

from __future__ import annotations

import jax
import optax
from jaxtyping import PyTree

from cyb_jax.configs import OptimizerConfig
from cyb_jax.decoder.lora import LEAVES


def schedule(config: OptimizerConfig, steps: int, width: int) -> optax.Schedule:
  """The learning rate by step, from 0.

  A linear warm-up reaches the highest rate at update w = max(1, warmup_fraction * steps). Update k has k/w of that
  rate, so that no update has rate 0. The configured form follows and reaches the final rate at the last update.

  Args:
    config: the config's group `optimizer`.
    steps: the number of steps of the run.
    width: d_model, which divides the rate if `rate_over_width` is set.
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

  Matrices have it, those of adapters included; norms, biases, embeddings and output rows have none.
  """
  names = [jax.tree_util.DictKey(name) for name in ("kernel", *LEAVES)]
  return jax.tree_util.tree_map_with_path(lambda path, _: any(name in path for name in names), params)


def make_optimizer(
  config: OptimizerConfig, steps: int, width: int, *, new_rate: float = 1.0
) -> optax.GradientTransformation:
  """Clipping, Adam, decoupled weight decay, schedule.

  Clipping uses the global norm, over all trained parameters, of the gradient of the mean loss per token of the whole
  batch.

  Args:
    config: the config's group `optimizer`.
    steps, width: see `schedule`.
    new_rate: a factor on the rate of the parameters that are not the decoder's.
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
  if new_rate != 1:
    parts.append(optax.stateless(lambda updates, _: _scaled_outside_decoder(updates, new_rate)))
  return optax.chain(*parts)


def _scaled_outside_decoder(updates: PyTree, factor: float) -> PyTree:
  return {
    name: part if name == "decoder" else jax.tree.map(lambda x: x * factor, part) for name, part in updates.items()
  }
