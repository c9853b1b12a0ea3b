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
from jaxtyping import Array, Float, Int, PyTree

from cyb_jax.methods import Batch, Method


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
  """Sums over the steps since the last line of metrics; part of the state, so that a resumed run logs the same lines.

  Attributes:
    steps: f32[].
    tokens: f32[], sum of weights.
    loss: f32[], sum of the training objective, nats.
    log_likelihood: f32[], sum of the targets' log-probabilities, nats.
    stopping: f32[W], sum of s.
    gradient_norm: f32[], sum over steps, before clipping.
  """

  steps: Float[Array, ""]
  tokens: Float[Array, ""]
  loss: Float[Array, ""]
  log_likelihood: Float[Array, ""]
  stopping: Float[Array, "W"]
  gradient_norm: Float[Array, ""]

  @classmethod
  def zeros(cls, num_slots: int) -> Totals:
    def zero() -> Array:
      return jnp.zeros((), jnp.float32)

    return cls(zero(), zero(), zero(), zero(), jnp.zeros(num_slots, jnp.float32), zero())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step changes.

  Attributes:
    step: i32[], how many steps were taken.
    params: the method's parameters, f32.
    opt_state: optax's.
    totals: see `Totals`.
  """

  step: Int[Array, ""]
  params: PyTree
  opt_state: PyTree
  totals: Totals


def init_state(method: Method, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
  """A fresh state, parameters boxed with their logical axes (and with them the optimizer's moments).

  The seed's stream 0 makes the parameters; step k draws from stream k + 1.
  """
  params = method.init(jax.random.fold_in(jax.random.key(seed), 0))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
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
  axis_name: str | None = None,
) -> TrainState:
  """One step.

  Args:
    state: bare arrays.
    batch: [B, T] each; under pmap this device's part.
    method: turns params and batch into losses.
    optimizer: see `optimizer.make_optimizer`.
    seed: of what the method draws; the key of a step depends on seed and step alone.
    accumulate: parts of the batch, worked on one after the other; divides B. The gradient is that of the whole.
    axis_name: pmap's axis; None under jit, where XLA reduces by itself.

  Returns:
    The new state; its totals hold what this step adds to the metrics.
  """
  rng = jax.random.fold_in(jax.random.key(seed), state.step + 1)
  if axis_name is not None:
    rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))

  def sums(params: PyTree, part: Batch, rng: Array) -> tuple[Array, dict[str, Any]]:
    losses = method.losses(params, part, rng)
    weights = part["weights"]
    loss = (losses.loss * weights).sum()
    return loss, {
      "tokens": weights.sum(),
      "loss": loss,
      "log_likelihood": (losses.log_likelihood * weights).sum(),
      # Not an einsum: accelerators would round a matrix product.
      "stopping": (losses.stopping * weights[..., None]).sum((0, 1)),
    }

  gradient_of = jax.grad(sums, has_aux=True)
  if accumulate == 1:
    gradient, aux = gradient_of(state.params, batch, rng)
  else:
    # Row i goes to part i % accumulate: the batch axis stays the major one, so that sharded rows stay where they are.
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch)
    keys = jax.random.split(rng, accumulate)
    shapes = jax.eval_shape(gradient_of, state.params, jax.tree.map(lambda x: x[0], parts), rng)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(carry, part):
      return jax.tree.map(jnp.add, carry, gradient_of(state.params, *part)), None

    (gradient, aux), _ = jax.lax.scan(add, start, (parts, keys))
  if axis_name is not None:
    gradient, aux = jax.lax.psum((gradient, aux), axis_name)
  # A batch without a token of weight has nothing to teach, rather than nan.
  count = jnp.maximum(aux["tokens"], 1.0)
  gradient = jax.tree.map(lambda g: g / count, gradient)
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  totals = Totals(steps=jnp.ones(()), gradient_norm=optax.global_norm(gradient), **aux)
  return TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    totals=jax.tree.map(jnp.add, state.totals, totals),
  )
