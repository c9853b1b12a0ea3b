"""The training step: one pure function, run by jit over a mesh or by pmap.

The loss of a batch is the sum over tokens of weight times loss, divided by the sum of weights over the whole batch,
whatever devices it lies on: sums and counts are reduced, never means (a mean of device means is another loss where
devices hold different numbers of tokens).

Dimensions: B batch, T tokens, W slots.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from cyb_jax.methods import Batch, Method
from cyb_jax.methods.parameters import trained_part, with_trained

# So many numbers of steps that weren't applied are remembered between two lines of metrics; more are only counted.
_SKIPS_REMEMBERED = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
  """Sums over the steps since the last line of metrics; part of the state, so that a resumed run logs the same lines.

  Steps that weren't applied are in `skipped` and `skipped_steps` alone.

  Attributes:
    steps: f32[].
    tokens: f32[], sum of weights.
    loss: f32[], sum of the training objective, nats.
    log_likelihood: f32[], sum of the targets' log-probabilities, nats.
    stopping: f32[W], sum of s.
    slots: f32[], sum of the slots that tokens were given.
    dropped: f32[], sum of weights of tokens whose slots didn't fit into their row; they are not in `tokens`.
    gradient_norm: f32[], sum over steps, before clipping.
    skipped: i32[], steps that weren't applied, since their loss or gradient wasn't finite.
    skipped_steps: i32[16], the numbers of the first of them, then 0.
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
    step: i32[], how many steps were taken.
    skipped_in_a_row: i32[], how many of the last ones weren't applied.
    params: the method's parameters.
    opt_state: optax's, of those that are trained (`Method.is_trained`).
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
  """A fresh state, parameters boxed with their logical axes (and with them the optimizer's moments).

  The seed's stream 0 makes the parameters; step k draws from stream k + 1.

  Args:
    method, optimizer, seed: see `train_step`.
    params: to be taken in place of fresh ones; bare, and then the state is.
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
  """One step. Only what is trained has a gradient; the other parameters pass through.

  A step whose loss or gradient isn't finite changes neither parameters nor moments; it is counted, and the next batch
  is taken, at the rate that the schedule has for it. After `max_skipped` of them in a row nothing is applied any more,
  so that the loop, which looks only now and then, finds the last good state.

  Args:
    state: bare arrays.
    batch: [B, T] each; under pmap this device's part.
    method: turns params and batch into losses.
    optimizer: see `optimizer.make_optimizer`.
    seed: of what the method draws; the key of a step depends on seed and step alone, and is the same on all devices.
    accumulate: parts of the batch, worked on one after the other; divides B. The gradient is that of the whole.
    max_skipped: see above.
    axis_name: pmap's axis; None under jit, where XLA reduces by itself.

  Returns:
    The new state; its totals hold what this step adds to the metrics.
  """
  rng = jax.random.fold_in(jax.random.key(seed), state.step + 1)
  trained = trained_part(state.params, method.is_trained)

  def sums(trained: PyTree, part: Batch) -> tuple[Array, dict[str, Any]]:
    params = with_trained(state.params, trained)
    losses = method.loss(params, part, rng, state.step)
    given = weights = part["weights"]
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

  gradient_of = jax.grad(sums, has_aux=True)
  if accumulate == 1:
    gradient, aux = gradient_of(trained, batch)
  else:
    # Row i goes to part i % accumulate: the batch axis stays the major one, so that sharded rows stay where they are.
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch)
    shapes = jax.eval_shape(gradient_of, trained, jax.tree.map(lambda x: x[0], parts))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(carry, part):
      return jax.tree.map(jnp.add, carry, gradient_of(trained, part)), None

    (gradient, aux), _ = jax.lax.scan(add, start, parts)
  if axis_name is not None:
    gradient, aux = jax.lax.psum((gradient, aux), axis_name)
  # A batch without a token of weight has nothing to teach, rather than nan.
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


def _choose(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
  return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def _choose_moments(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
  """As `_choose`, but that the schedule goes by steps, applied or not: it must reach its end with the run."""

  def is_schedule(state: Any) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)

  return jax.tree.map(
    lambda new, old: new if is_schedule(new) else jnp.where(condition, new, old), new, old, is_leaf=is_schedule
  )


def _add_step(totals: Totals, applied: Bool[Array, ""], step: Int[Array, ""], sums: dict[str, Array]) -> Totals:
  added = {name: getattr(totals, name) + jnp.where(applied, value, 0.0) for name, value in sums.items()}
  # Beyond the last place an update is dropped.
  place = jnp.where(applied, len(totals.skipped_steps), totals.skipped)
  return Totals(
    skipped=totals.skipped + ~applied,
    skipped_steps=totals.skipped_steps.at[place].set(step, mode="drop"),
    **added,
  )
