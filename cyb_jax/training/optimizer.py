"""AdamW with its schedule, from optax."""

from __future__ import annotations

import jax
import optax
from jaxtyping import PyTree

from cyb_jax.configs import OptimizerConfig
from cyb_jax.decoder.lora import LEAVES


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
  """Which parameters have weight decay: the matrices, adapters' among them; not norms, biases, embeddings and output
  rows.
  """
  names = [jax.tree_util.DictKey(name) for name in ("kernel", *LEAVES)]
  return jax.tree_util.tree_map_with_path(lambda path, _: any(name in path for name in names), params)


def make_optimizer(
  config: OptimizerConfig, steps: int, width: int, *, new_rate: float = 1.0
) -> optax.GradientTransformation:
  """Clipping, Adam, decoupled weight decay, schedule.

  The norm that is clipped is that of the gradient of the mean loss per token, over the whole batch and all devices, and
  over all that is trained.

  Args:
    config: `optimizer`.
    steps, width: see `schedule`.
    new_rate: a factor on the rate of what stands beside the decoder.
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
    parts.append(optax.stateless(lambda updates, _: _scaled_beside_decoder(updates, new_rate)))
  return optax.chain(*parts)


def _scaled_beside_decoder(updates: PyTree, factor: float) -> PyTree:
  return {
    name: part if name == "decoder" else jax.tree.map(lambda x: x * factor, part) for name, part in updates.items()
  }
