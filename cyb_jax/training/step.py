"""The training step: one pure function, run by jit over a mesh or by pmap.

The loss of a batch is the sum over tokens of weight times loss, divided by the sum of weights over the whole batch, on
any number of devices. Sums and counts are reduced, never means: a mean of device means is another loss where devices
hold different numbers of tokens.

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

# Between two lines of metrics the numbers of so many skipped steps are kept; further ones are only counted.
_SKIPS_REMEMBERED = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
  """Sums over the steps since the last line of metrics; part of the state, so that a resumed run logs the same lines.

  Only `skipped` and `skipped_steps` include steps that were not applied.

  Attributes:
    steps: f32[].
    tokens: f32[], sum of weights.
    loss: f32[], sum of the training objective, nats.
    log_likelihood: f32[], sum of the targets' log-probabilities, nats.
    stopping: f32[W], sum of s.
    slots: f32[], sum of the tokens' numbers of slots.
    dropped: f32[], sum of weights of tokens whose slots did not fit into their row; `tokens` does not include them.
    gradient_norm: f32[], sum over steps, before clipping.
    skipped: i32[], number of steps that were not applied because their loss or gradient was not finite.
    skipped_steps: i32[16], the numbers of the first of those steps, then 0.
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
  """Everything that a step changes.

  Attributes:
    step: i32[], number of steps so far.
    skipped_in_a_row: i32[], number of the latest steps that were not applied.
    params: the method's parameters.
    opt_state: optax's state of the trained parameters (`Method.is_trained`).
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
  """A fresh state; parameters and the optimizer's moments are boxed with their logical axes.

  The seed's stream 0 initialises the parameters; step k draws from stream k + 1.

  Args:
    method, optimizer, seed: see `train_step`.
    params: replace the fresh parameters. They are bare arrays, and so is the state then.
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
  """The state with bare arrays."""
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
  """One step. Only trained parameters have a gradient; the others pass through.

  A step whose loss or gradient is not finite changes neither parameters nor moments. It is counted, and the next step
  takes the next batch at the rate that the schedule has for it. After `max_skipped` such steps in a row no further step
  is applied, so that the trainer, which reads the count only now and then, finds the last good state.

  Args:
    state: bare arrays.
    batch: [B, T] each; under pmap this device's part.
    method: turns params and batch into losses.
    optimizer: see `optimizer.make_optimizer`.
    seed: of the method's random draws. The key of a step depends on seed and step alone; all devices have the same key.
    accumulate: number of parts of the batch that are processed one after the other; divides B. The gradient is that of
      the whole batch.
    max_skipped: see above.
    axis_name: pmap's axis; None under jit, where XLA places the reductions.

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
  # A batch without a token of positive weight has a gradient of zero rather than nan.
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
  """(f32[] sum of the weighted loss, the sums that `Totals` has of a batch)."""
  losses = method.loss(params, batch, rng, step)
  given = weights = batch["weights"]
  if losses.kept is not None:
    weights = given * losses.kept
  loss = (losses.loss * weights).sum()
  slots = method.num_slots if losses.slots is None else losses.slots
  return loss, {
    "tokens": weights.sum(),
    "loss": loss,
    "log_likelihood": (losses.log_likelihood * weights).sum(),
    # Not an einsum: accelerators would round a matrix product.
    "stopping": (losses.stopping * weights[..., None]).sum((0, 1)),
    "slots": (slots * weights).sum(),
    "dropped": (given - weights).sum(),
  }


def _accumulated(gradient_of: Callable[..., PyTree], trained: PyTree, batch: Batch, accumulate: int) -> PyTree:
  """The sum of `gradient_of(trained, part)` over the parts of a batch, which are processed one after the other."""
  if accumulate == 1:
    return gradient_of(trained, batch)
  # Row i goes to part i % accumulate: the batch axis stays the major one, so that sharded rows stay on their devices.
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
  """As `_choose`, except that the schedule counts skipped steps too: it must reach its end at the end of the run."""

  def is_schedule(state: Any) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)

  return jax.tree.map(
    lambda new, old: new if is_schedule(new) else jnp.where(condition, new, old), new, old, is_leaf=is_schedule
  )


def _add_step(totals: Totals, applied: Bool[Array, ""], step: Int[Array, ""], sums: dict[str, Array]) -> Totals:
  added = {name: getattr(totals, name) + jnp.where(applied, value, 0.0) for name, value in sums.items()}
  # An index beyond the last element drops the update.
  place = jnp.where(applied, len(totals.skipped_steps), totals.skipped)
  return Totals(
    skipped=totals.skipped + ~applied,
    skipped_steps=totals.skipped_steps.at[place].set(step, mode="drop"),
    **added,
  )
