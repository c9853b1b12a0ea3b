"""The state from which a run starts or continues."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from cyb_jax.checkpointing.manager import Checkpoints
from cyb_jax.costs.memory import bytes_per_device, count_parameters
from cyb_jax.evaluation import Evaluator
from cyb_jax.interop import initial
from cyb_jax.methods import Calibrated
from cyb_jax.training.preflight import RunPlan
from cyb_jax.training.step import TrainState
from cyb_jax.training.strategies import Strategy


@dataclasses.dataclass(frozen=True)
class Start:
  """The state with which the training loop begins.

  Attributes:
    state: the train state, in the strategy's layout.
    step: the number of completed steps.
    tokens: the number of tokens of positive weight in these steps that this host counts.
  """

  state: TrainState
  step: int
  tokens: int


def restore_or_start(
  plan: RunPlan,
  strategy: Strategy,
  evaluator: Evaluator,
  checkpoints: Checkpoints,
  read: Callable[[int], dict[str, Any]],
) -> Start:
  """The state of the newest checkpoint, or a new state; `cyb_jax.interop.pretrained` documents the precedence.

  Args:
    plan: the plan of the run.
    strategy, evaluator, checkpoints: the run's strategy, evaluator and checkpoints.
    read: step -> this host's rows of its batch.
  """
  steps = plan.cluster.broadcast(plan.cluster.index == 0 and checkpoints.steps())
  if not steps:
    params = None
    if plan.start is not None:
      params = initial.parameters(plan.start, plan.method, strategy.abstract().params, plan.config)
    return Start(_calibrated(strategy.init(params), plan, strategy, evaluator, read), 0, 0)
  meta, abstract = checkpoints.meta(steps[-1]), strategy.abstract()
  restored = checkpoints.restore(steps[-1], plan.saved_part(abstract))
  state = restored.state
  if plan.base is not None:
    state = dataclasses.replace(state, params=plan.base.complete(state.params, abstract.params))
  # Each host counts the tokens that it reads; the count of the checkpoint is added on host 0 only.
  tokens = meta["train_tokens"] if plan.cluster.index == 0 else 0
  return Start(strategy.place(state), restored.step, tokens)


def _calibrated(
  state: TrainState, plan: RunPlan, strategy: Strategy, evaluator: Evaluator, read: Callable[[int], dict[str, Any]]
) -> TrainState:
  """A new state; if `calibration_batches` is set, the method adjusts the parameters to the first batches."""
  method = plan.evaluated
  if not isinstance(method, Calibrated):
    return state
  if not method.calibration_batches:
    if plan.start is not None:
      method.log_start(strategy.params(state), [evaluator.shard_batch(read(0))])
    return state
  global_state = strategy.global_state(state)
  batches = (evaluator.shard_batch(read(step)) for step in range(method.calibration_batches))
  params = method.calibrate(strategy.params(state), batches)
  params = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, global_state.params)
  return strategy.place(dataclasses.replace(global_state, params=params))


def log_size(plan: RunPlan, strategy: Strategy) -> None:
  """Logs the size of the run: parameters, memory, steps and FLOPs."""
  data, method, abstract = plan.config.data, plan.method, strategy.abstract()
  counts, costs = count_parameters(method), method.costs(data.sequence_length)
  trained = f" ({counts['trained']:,} trained)" if counts["trained"] < counts["total"] else ""
  logging.info(
    "%s: %s parameters%s, %s MiB of parameters and optimizer state per device; %d steps of %d x %d tokens, %d slots"
    " per token, %s MFLOPs per token (%s executed), on %d %s",
    method.name,
    f"{counts['total']:,}",
    trained,
    f"{(bytes_per_device(abstract.params) + bytes_per_device(abstract.opt_state)) / 2**20:,.1f}",
    plan.steps,
    data.batch_size,
    data.sequence_length,
    method.num_slots,
    f"{costs.train.total / 1e6:,.1f}",
    f"{costs.train_executed.total / 1e6:,.1f}",
    plan.mesh.size,
    jax.devices()[0].device_kind,
  )
