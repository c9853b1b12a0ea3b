"""The training step: one pure function, run by jit over a mesh or by pmap.

The loss of a batch is the sum over tokens of weight times loss, divided by the sum of weights over the global batch, on
any number of devices. Sums and counts are reduced, never means: if devices have different numbers of tokens, the mean
of the devices' means is a different loss.

Dimensions: B batch, T tokens, W slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from cyb_jax.methods import Batch, Method
from cyb_jax.methods.parameters import trained_part, with_trained

# The number of skipped steps whose numbers are recorded between two lines of metrics; further ones are only counted.
_SKIPS_REMEMBERED = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
  """Sums over the steps since the last line of metrics; part of the state, so that a resumed run logs the same lines.

  Only `skipped` and `skipped_steps` include steps that were not applied.

  Attributes:
    steps: f32[], number of steps.
    tokens: f32[], sum of weights.
    loss: f32[], sum of the training objective, nats.
    log_likelihood: f32[], sum of the targets' log-probabilities, nats.
    stopping: f32[W], sum of the stopping distributions s.
    slots: f32[], sum of the tokens' numbers of slots.
    dropped: f32[], sum of weights of tokens whose slots did not fit into their row; `tokens` does not include them.
    gradient_norm: f32[], sum over steps, before clipping.
    skipped: i32[], number of steps that were not applied because their loss or gradient was not finite.
    skipped_steps: i32[16], the numbers of the first of these steps, padded with 0.
  """

  steps: Float[Array, ""]
  tokens: Float[Array, ""]
  loss: Float[Array, ""]
  log_likelihood: Float[Array, ""]
  stopping: Float[Array, "W"]
  slots: Float[Array, ""]
  dropped: Float[Array, ""]
  gradient_norm: Float[Array, ""]
  skipped: Int[Array, ""]
  skipped_steps: Int[Array, "R"]

  @classmethod
  def zeros(cls, num_slots: int) -> Totals:
    shapes = {"stopping": (num_slots,), "skipped_steps": (_SKIPS_REMEMBERED,)}
    return cls(
      **{
        field.name: jnp.zeros(
          shapes.get(field.name, ()), jnp.int32 if field.name.startswith("skipped") else jnp.float32
        )
        for field in dataclasses.fields(cls)
      }
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The state that a step updates.

  Attributes:
    step: i32[], number of completed steps.
    skipped_in_a_row: i32[], number of consecutive steps until now that were not applied.
    params: the method's parameters.
    opt_state: the optimizer state of the trained parameters (`Method.is_trained`).
    totals: see `Totals`.
  """

  step: Int[Array, ""]
  skipped_in_a_row: Int[Array, ""]
  params: PyTree
  opt_state: PyTree
  totals: Totals


def init_state(
  method: Method, optimizer: optax.GradientTransformation, seed: int, params: PyTree | None = None
) -> TrainState:
  """A new state; parameters and the optimizer's moments are boxed with their logical axes.

  Stream 0 of the seed initialises the parameters; step k uses stream k + 1.

  Args:
    method, optimizer, seed: see `train_step`.
    params: unboxed arrays that replace the newly initialised parameters; the state is then also unboxed.
  """
  if params is None:
    params = method.init(jax.random.fold_in(jax.random.key(seed), 0))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    skipped_in_a_row=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(trained_part(params, method.is_trained)),
    totals=Totals.zeros(method.num_slots),
  )


def unbox(state: TrainState) -> TrainState:
  """The state with unboxed arrays."""
  return jax.tree.map(
    lambda x: x.value if isinstance(x, nn.Partitioned) else x, state, is_leaf=lambda x: isinstance(x, nn.Partitioned)
  )


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  method: Method,
  optimizer: optax.GradientTransformation,
  seed: int,
  accumulate: int = 1,
  max_skipped: int = 1,
  axis_name: str | None = None,
) -> TrainState:
  """One training step. Only trained parameters have a gradient; the other parameters are unchanged.

  A step whose loss or gradient is not finite changes neither parameters nor moments. It is counted, and the next step
  uses the next batch and the next learning rate of the schedule. After `max_skipped` such consecutive steps, no further
  step is applied: the trainer, which reads the counter only periodically, then finds the last good state.

  Args:
    state: the state, with unboxed arrays.
    batch: arrays [B, T]; under pmap, this device's part.
    method: computes losses from parameters and a batch.
    optimizer: see `optimizer.make_optimizer`.
    seed: the seed of the method's random draws. The key of a step depends only on seed and step; all devices have the
      same key.
    accumulate: number of parts of the batch that are processed one after the other; it divides B. The gradient is the
      gradient of the entire batch.
    max_skipped: see above.
    axis_name: the axis of pmap; None under jit, where XLA inserts the reductions.

  Returns:
    The new state, with this step's sums added to its totals.
  """
  rng = jax.random.fold_in(jax.random.key(seed), state.step + 1)
  trained = trained_part(state.params, method.is_trained)

  def sums(trained: PyTree, part: Batch) -> tuple[Array, dict[str, Array]]:
    return _loss_sums(method, with_trained(state.params, trained), part, rng, state.step)

  gradient, aux = _accumulated(jax.grad(sums, has_aux=True), trained, batch, accumulate)
  if axis_name is not None:
    gradient, aux = jax.lax.psum((gradient, aux), axis_name)
  # The gradient of a batch without a token of positive weight is zero instead of nan.
  count = jnp.maximum(aux["tokens"], 1.0)
  gradient = jax.tree.map(lambda g: g / count, gradient)
  norm = optax.global_norm(gradient)
  updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
  updated = optax.apply_updates(trained, updates)
  applied = jnp.isfinite(aux["loss"]) & jnp.isfinite(norm) & (state.skipped_in_a_row < max_skipped)
  return TrainState(
    step=state.step + 1,
    skipped_in_a_row=jnp.where(applied, 0, state.skipped_in_a_row + 1),
    params=with_trained(state.params, _choose(applied, updated, trained)),
    opt_state=_choose_moments(applied, opt_state, state.opt_state),
    totals=_add_step(state.totals, applied, state.step + 1, aux | {"steps": 1.0, "gradient_norm": norm}),
  )


def _loss_sums(
  method: Method, params: PyTree, batch: Batch, rng: Array, step: Int[Array, ""]
) -> tuple[Array, dict[str, Array]]:
  """(the sum of the weighted loss, f32[]; the sums of a batch by their names in `Totals`)."""
  losses = method.loss(params, batch, rng, step)
  given = weights = batch["weights"]
  if losses.kept is not None:
    weights = given * losses.kept
  loss = losses.weighted_sum(weights)
  slots = method.num_slots if losses.slots is None else losses.slots
  return loss, {
    "tokens": weights.sum(),
    "loss": loss,
    "log_likelihood": (losses.log_likelihood * weights).sum(),
    # An einsum is not used, because accelerators would round the operands of a matrix product.
    "stopping": (losses.stopping * weights[..., None]).sum((0, 1)),
    "slots": (slots * weights).sum(),
    "dropped": (given - weights).sum(),
  }


def _accumulated(gradient_of: Callable[..., PyTree], trained: PyTree, batch: Batch, accumulate: int) -> PyTree:
  """The sum of `gradient_of(trained, part)` over the parts of a batch, which are processed one after the other."""
  if accumulate == 1:
    return gradient_of(trained, batch)
  # Row i is in part i % accumulate. The batch axis remains the major axis, so sharded rows stay on their devices.
  parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch)
  shapes = jax.eval_shape(gradient_of, trained, jax.tree.map(lambda x: x[0], parts))
  start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def add(carry, part):
    return jax.tree.map(jnp.add, carry, gradient_of(trained, part)), None

  total, _ = jax.lax.scan(add, start, parts)
  return total


def _choose(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
  return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def _choose_moments(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
  """Like `_choose`, but the schedule also counts skipped steps, so that it ends at the last step of the run."""

  def is_schedule(state: Any) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)

  return jax.tree.map(
    lambda new, old: new if is_schedule(new) else jnp.where(condition, new, old), new, old, is_leaf=is_schedule
  )


def _add_step(totals: Totals, applied: Bool[Array, ""], step: Int[Array, ""], sums: dict[str, Array]) -> Totals:
  added = {name: getattr(totals, name) + jnp.where(applied, value, 0.0) for name, value in sums.items()}
  # An update with an index after the last element is dropped.
  place = jnp.where(applied, len(totals.skipped_steps), totals.skipped)
  return Totals(
    skipped=totals.skipped + ~applied,
    skipped_steps=totals.skipped_steps.at[place].set(step, mode="drop"),
    **added,
  )
