"""When a token is read: the reading rules, and the step budget omega that may deny a pause.

The numbers are leaves of pytrees, so changing a threshold or omega does not recompile.

Letters: B rows, W slots of a token, V vocabulary.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cyb_jax.errors import InputError
from cyb_jax.generation.options import SamplingOptions
from cyb_jax.generation.state import STEP_BUDGET, STOP, SamplerState
from cyb_jax.readout import TokenScores
from cyb_jax.stopping import hard_slot, log_stopping_distribution, normalize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepBudget:
  """A step budget: the number of allowed slots of a token. This class always allows all W."""

  def denies(self, state: SamplerState) -> Bool[Array, "B"]:
    """bool[B], whether the budget ends at each row's current slot."""
    return jnp.zeros_like(state.finished)

  def log_stopping(self, scores: TokenScores) -> Float[Array, "B W"]:
    """f32[B, W], the log-probability that each slot is read, given the scores [B, W]."""
    return log_stopping_distribution(scores.log_dont_know, scores.log_answer)

  def limit(self, slot: Int[Array, "B"], state: SamplerState) -> Int[Array, "B"]:
    """i32[B], the slot, or the last slot that the budget allows if that slot is earlier."""
    del state
    return slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RandomStepBudget(StepBudget):
  """The number of allowed slots is drawn from omega.

  Attributes:
    omega: f32[W], the probabilities that 1, 2, .. W slots are allowed.
  """

  omega: Float[Array, "W"]

  def denies(self, state: SamplerState) -> Bool[Array, "B"]:
    # The hazard omega_i / Omega_{>=i}: the probability that slot i is the last one, given that it is allowed.
    tail = jnp.flip(jnp.cumsum(jnp.flip(self.omega)))
    hazard = jnp.where(tail > 0, self.omega / jnp.where(tail > 0, tail, 1.0), 1.0)
    return state.uniform(STEP_BUDGET) < hazard[state.slot]

  def log_stopping(self, scores: TokenScores) -> Float[Array, "B W"]:
    return log_stopping_distribution(scores.log_dont_know, scores.log_answer, self.omega)

  def limit(self, slot: Int[Array, "B"], state: SamplerState) -> Int[Array, "B"]:
    log_omega = jnp.broadcast_to(jnp.log(self.omega), (len(slot), len(self.omega)))
    return jnp.minimum(slot, jax.vmap(jax.random.categorical)(state.keys(STEP_BUDGET), log_omega))


class StoppingRule(abc.ABC):
  """A rule that reads one slot of a token."""

  @abc.abstractmethod
  def requests_pause(self, log_dont_know: Float[Array, "B"], state: SamplerState) -> Bool[Array, "B"]:
    """bool[B], whether each row requests another slot, given log d of its current slot."""

  @abc.abstractmethod
  def choose_slot(self, scores: TokenScores, budget: StepBudget, state: SamplerState) -> Int[Array, "B"]:
    """i32[B], the slot to be read, from 0, given the scores [B, W] of all slots."""

  def read(
    self, scores: TokenScores, budget: StepBudget, state: SamplerState
  ) -> tuple[Int[Array, "B"], Float[Array, "B V"]]:
    """(i32[B], the slot that is read, from 0; f32[B, V], its log-probabilities); `scores` [B, W] are of all slots."""
    slot = self.choose_slot(scores, budget, state)
    return slot, jnp.take_along_axis(scores.log_probs, slot[:, None, None], 1)[:, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledStop(StoppingRule):
  """A pause is requested with probability d."""

  def requests_pause(self, log_dont_know: Float[Array, "B"], state: SamplerState) -> Bool[Array, "B"]:
    return state.uniform(STOP) < jnp.exp(log_dont_know)

  def choose_slot(self, scores: TokenScores, budget: StepBudget, state: SamplerState) -> Int[Array, "B"]:
    return jax.vmap(jax.random.categorical)(state.keys(STOP), budget.log_stopping(scores))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThresholdStop(StoppingRule):
  """A pause is requested if d exceeds a threshold.

  Attributes:
    threshold: f32[], in [0, 1].
  """

  threshold: Float[Array, ""]

  def requests_pause(self, log_dont_know: Float[Array, "B"], state: SamplerState) -> Bool[Array, "B"]:
    del state
    return log_dont_know > jnp.log(self.threshold)

  def choose_slot(self, scores: TokenScores, budget: StepBudget, state: SamplerState) -> Int[Array, "B"]:
    return budget.limit(hard_slot(scores.log_dont_know, self.threshold), state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixtureReading:
  """All slots are read: the token distribution is sum_i s_i p_i."""

  def read(
    self, scores: TokenScores, budget: StepBudget, state: SamplerState
  ) -> tuple[Int[Array, "B"], Float[Array, "B V"]]:
    """(i32[B], the last slot; f32[B, V], the mixture's log-probabilities); `scores` [B, W] are of all slots."""
    last = jnp.full(len(state.token), scores.log_dont_know.shape[-1] - 1, jnp.int32)
    return last, jax.nn.logsumexp(budget.log_stopping(scores)[..., None] + scores.log_probs, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowReading(StoppingRule):
  """Each row has its own rule.

  Attributes:
    draws: bool[B], whether a row is read as by `SampledStop`; otherwise as by `ThresholdStop`.
    threshold: f32[B], in [0, 1].
    mixes: bool[B], whether a row is read as by `MixtureReading`, if all slots of a token run together.
    max_pauses: i32[B], the maximum number of pauses of a token, if the slots of a token run one after the other.
  """

  draws: Bool[Array, "B"]
  threshold: Float[Array, "B"]
  mixes: Bool[Array, "B"]
  max_pauses: Int[Array, "B"]

  def requests_pause(self, log_dont_know: Float[Array, "B"], state: SamplerState) -> Bool[Array, "B"]:
    drawn = SampledStop().requests_pause(log_dont_know, state)
    exceeds = ThresholdStop(self.threshold).requests_pause(log_dont_know, state)
    return jnp.where(self.draws, drawn, exceeds) & (state.slot < self.max_pauses)

  def choose_slot(self, scores: TokenScores, budget: StepBudget, state: SamplerState) -> Int[Array, "B"]:
    drawn = SampledStop().choose_slot(scores, budget, state)
    first = budget.limit(hard_slot(scores.log_dont_know, self.threshold[:, None]), state)
    return jnp.where(self.draws, drawn, first)

  def read(
    self, scores: TokenScores, budget: StepBudget, state: SamplerState
  ) -> tuple[Int[Array, "B"], Float[Array, "B V"]]:
    slot, log_probs = super().read(scores, budget, state)
    last, mixture = MixtureReading().read(scores, budget, state)
    return jnp.where(self.mixes, last, slot), jnp.where(self.mixes[:, None], mixture, log_probs)


def choose_stopping_rule(options: SamplingOptions) -> StoppingRule:
  """The rule for `read` = 'sample' or 'threshold'.

  Raises:
    InputError: `read` is 'mixture', which requires all slots of a token.
  """
  if options.read == "mixture":
    raise InputError(
      f"read: 'mixture' reads all slots of a token, but mode {options.mode!r} doesn't run them; use mode 'constant'"
    )
  return ThresholdStop(jnp.float32(options.threshold)) if options.read == "threshold" else SampledStop()


def choose_reading(options: SamplingOptions) -> StoppingRule | MixtureReading:
  """The rule for any value of `read`, for modes that run all slots of a token."""
  return MixtureReading() if options.read == "mixture" else choose_stopping_rule(options)


def choose_step_budget(options: SamplingOptions, num_slots: int) -> StepBudget:
  """The step budget of `options.omega`, over W = `num_slots` slots.

  Raises:
    InputError: omega is not a distribution over `num_slots` slots.
  """
  if options.omega is None:
    return StepBudget()
  try:
    return RandomStepBudget(normalize(options.omega, num_slots, name="omega"))
  except ValueError as error:
    raise InputError(f"{error}; give max_pauses + 1 = {num_slots} weights") from None
