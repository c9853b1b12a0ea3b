"""Catch Your Breath: the model abstains until it knows, and is trained over the time at which it stops.

Parameters beside the decoder's and the pauses': `dont_know` f32[D], the output row of `<don't know>`; in unit form
`dont_know_bias` f32[]; and where the start is calibrated `dont_know_offset` f32[], which isn't trained. Both forms and
the prior shift: method of arXiv 2510.13879, see `cyb_jax.stopping`.

How many of its W slots a token gets in training (`method.recipe`):

- constant: all of them, and omega is summed over inside the loss. All of the paper's experiments.
- sampled (described in the paper, not run there): W_n ~ Cat(omega) slots are laid out, and d = 0 on the last of them,
  through an omega that is one-hot there.
- on_policy (ours): as sampled, but W_n is drawn from the model's own stopping distribution, so that training sees the
  contexts that self-paced inference makes. The rule: two passes. The first one, without a gradient, reads d with all W
  slots after every token; a share `policy_floor` of the tokens is drawn from 1..W alike instead, so that late slots and
  the decision to go on are trained however early the model stops.

With sampled and on_policy the slots are packed into rows of a fixed number of slots (`pauses.pack`). Evaluation loses
no token: its rows have room for all W slots of every token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from cyb_jax import losses
from cyb_jax.costs import flops
from cyb_jax.decoder import unembedding_init
from cyb_jax.errors import InputError
from cyb_jax.methods.interface import Batch, EvalOutput, Params, TokenLosses
from cyb_jax.methods.paused import PAUSE_OPTIONS, PausedMethod, boxed_row
from cyb_jax.partitioning import arrays
from cyb_jax.pauses import Packing, draw_lengths, pack, packed_row_slots
from cyb_jax.readout import TokenScores
from cyb_jax.stopping import SlotScores, log_stopping_distribution, normalize

# Which of the options each loss reads, beside those that all of them do.
_OPTIONS_OF_LOSS = {
  "ap": frozenset({"omega", "gamma"}),
  "va": frozenset({"rho"}),
  "dp": frozenset({"rho", "alpha"}),
}
_DEFAULTS = {"omega": None, "gamma": None, "rho": None, "alpha": 0.0}
# Evaluation draws too, the same for the same text.
_EVALUATION_SEED = 0


class Cyb(PausedMethod):
  """CYB-AP, CYB-VA and CYB-DP, picked by `method.loss`."""

  name = "cyb"
  options = PAUSE_OPTIONS | {
    "loss", "omega", "gamma", "rho", "alpha", "slot_budget", "policy_floor",
    "dont_know", "dont_know_prior", "calibration_batches", "stopping_warmup",
  }  # fmt: skip
  decides = True
  constants = frozenset({"dont_know_offset"})
  recipes = ("constant", "sampled", "on_policy")

  def validate(self) -> None:
    super().validate()
    config = self.config
    if config.loss not in _OPTIONS_OF_LOSS:
      raise InputError(f"method.loss: {config.loss!r} is none of {', '.join(map(repr, _OPTIONS_OF_LOSS))}")
    for field, default in _DEFAULTS.items():
      value = getattr(config, field)
      if field not in _OPTIONS_OF_LOSS[config.loss] and value != default:
        raise InputError(f"method.{field}: {value!r} is set, but method.loss = {config.loss!r} doesn't use it")
    if config.loss != "ap" and config.rho is None:
      raise InputError(f"method.rho: not set, but method.loss = {config.loss!r} needs {self.num_slots} weights")
    if not 0 <= config.alpha < math.inf:
      raise InputError(f"method.alpha: {config.alpha!r} must be finite and not negative")
    if config.dont_know not in ("token", "unit"):
      raise InputError(f"method.dont_know: {config.dont_know!r} is none of 'token', 'unit'")
    if config.dont_know_prior is not None and not 0 < config.dont_know_prior < 1:
      raise InputError(f"method.dont_know_prior: {config.dont_know_prior!r} must lie inside (0, 1), or be None")
    self._validate_recipe()
    for field, purpose in (("calibration_batches", "the median of d is set to"), ("stopping_warmup", "d is held at")):
      value = getattr(config, field)
      if value < 0:
        raise InputError(f"method.{field}: {value} must not be negative; 0 is off")
      if value and config.dont_know_prior is None:
        raise InputError(f"method.{field}: {value} needs method.dont_know_prior, which {purpose}; it is None")
    try:
      normalize(config.omega, self.num_slots, name="omega")
      if config.rho is not None:
        normalize(config.rho, self.num_slots, name="rho", positive=config.loss == "va")
      if config.gamma is not None:
        losses.cyb(_no_scores(self.num_slots), gamma=config.gamma)
    except ValueError as error:
      raise InputError(f"method.{error} (W = pauses + 1 = {self.num_slots})") from None
    if config.gamma is not None:
      granted = config.omega or (0.0,) * config.pauses + (1.0,)
      reached = [i for i, weight in enumerate(granted) if weight > 0]
      # Summed over, one number of slots that can be answered from will do; drawn, each of them must.
      last = 0 if config.recipe == "on_policy" else min(reached) if self._ragged else max(reached)
      if not any(config.gamma[: last + 1]):
        raise InputError(
          f"method.gamma: {config.gamma} is zero at every slot of a token that is given {last + 1}; one of the first"
          f" {last + 1} needs weight"
        )

  def _validate_recipe(self) -> None:
    config = self.config
    if config.recipe != "constant" and config.loss != "ap":
      raise InputError(
        f"method.recipe: {config.recipe!r} goes with method.loss = 'ap' alone, not {config.loss!r}; take 'constant'"
      )
    if config.recipe == "on_policy" and config.omega is not None:
      raise InputError(
        f"method.omega: {config.omega} is set, but method.recipe = 'on_policy' draws from the model's own stopping"
        " distribution; leave it at ''"
      )
    if config.slot_budget and not (self._ragged and 1 <= config.slot_budget <= self.num_slots):
      wanted = f"lie in [1, {self.num_slots}], or be 0" if self._ragged else "be 0 where all slots are always given"
      raise InputError(f"method.slot_budget: {config.slot_budget:g} must {wanted}")
    if config.recipe == "on_policy" and not 0 < config.policy_floor <= 1:
      raise InputError(f"method.policy_floor: {config.policy_floor:g} must lie in (0, 1]")
    if config.recipe != "on_policy" and config.policy_floor != type(config).policy_floor:
      raise InputError(
        f"method.policy_floor: {config.policy_floor:g} is set, but method.recipe = {config.recipe!r} doesn't use it"
      )

  def init_own(self, rng: Array) -> Params:
    width = self.decoder.config.d_model
    if self.config.dont_know == "token":
      # As the output rows of words start.
      (row,) = unembedding_init(self.decoder.config)(rng, (1, width), jnp.float32)
      own = {"dont_know": boxed_row(row)}
    else:
      # A unit starts from its prior alone: zero row, and the bias counts from the prior's shift.
      own = {"dont_know": boxed_row(jnp.zeros(width)), "dont_know_bias": _boxed_scalar()}
    if self.config.calibration_batches:
      own["dont_know_offset"] = _boxed_scalar()
    return own

  def slot_scores(self, params: Params, batch: Batch) -> SlotScores:
    """All W slots of every token in one context: f32[B, T, W] each, raw."""
    return self._scores(params, self.hidden(params, batch), batch["targets"])

  def slot_scores_packed(self, params: Params, batch: Batch, packing: Packing) -> SlotScores:
    """The slots that tokens were given, f32[B, T, W] each; slots beyond a token's last one repeat that."""
    hidden = self.hidden_packed(params, batch, packing)[:, :, None]
    scores = self._scores(params, hidden, jnp.take_along_axis(batch["targets"], packing.token, -1))
    places = packing.places.reshape(len(packing.places), -1)
    return jax.tree.map(lambda x: jnp.take_along_axis(x[..., 0], places, -1).reshape(packing.places.shape), scores)

  def _scores(self, params: Params, hidden: Array, targets: Array) -> SlotScores:
    return self.scores(params, hidden, targets, dont_know=params["dont_know"], dont_know_bias=_bias(params))

  def token_scores(self, params: Params, hidden: Float[Array, "... D"], slot: Int[Array, "..."]) -> TokenScores:
    del slot
    return self._token_scores(params, hidden, params["dont_know"], _bias(params))

  @property
  def objective(self) -> Callable[[SlotScores], Array]:
    """The configured loss as a function of the scores, where every token has all W slots."""
    config = self.config
    return {
      "ap": lambda scores: losses.cyb(scores, config.omega, config.gamma),
      "va": lambda scores: losses.cyb_va(scores, config.rho),
      "dp": lambda scores: losses.cyb_dp(scores, config.rho, config.alpha),
    }[config.loss]

  @property
  def _ragged(self) -> bool:
    """Whether the number of slots varies; where all W are granted it is known not to, and *sampled* is *constant*."""
    omega = self.config.omega
    return self.config.recipe == "on_policy" or (
      self.config.recipe == "sampled" and omega is not None and any(omega[:-1])
    )

  def loss(self, params: Params, batch: Batch, rng: Array, step: Any = None) -> TokenLosses:
    if not self._ragged:
      reading = self._reading(self._held(self.slot_scores(params, batch), step))
      return TokenLosses(
        loss=reading.loss,
        log_likelihood=-losses.cyb(reading.scores, self.config.omega),
        stopping=jnp.exp(reading.log_stopping),
      )
    if self.config.recipe == "sampled":
      shares = normalize(self.config.omega, self.num_slots, name="omega")
    else:
      shares = self._policy(self._held(self._decisions(jax.lax.stop_gradient(params), batch), step))
    length = batch["tokens"].shape[1]
    lengths = draw_lengths(rng, batch["tokens"], shares)
    packing = pack(lengths, self.num_slots, self._row_slots(length))
    scores = self._held(self.slot_scores_packed(params, batch, packing), step)
    reading = self._reading(scores, lengths)
    return TokenLosses(
      loss=reading.loss,
      log_likelihood=jax.nn.logsumexp(reading.log_stopping + scores.log_target, -1),
      stopping=jnp.exp(reading.log_stopping),
      slots=lengths.astype(jnp.float32),
      kept=packing.kept,
    )

  def _reading(self, scores: SlotScores, lengths: Int[Array, "B T"] | None = None) -> EvalOutput:
    """As training sees the scores; `lengths`: how many slots each token has, None: all."""
    omega = self.config.omega
    if lengths is None:
      loss = self.objective(scores)
    else:
      omega = jax.nn.one_hot(lengths - 1, self.num_slots, dtype=scores.log_target.dtype)
      loss = losses.cyb(scores, omega, self.config.gamma)
    log_stopping = log_stopping_distribution(scores.log_dont_know, scores.log_answer, omega)
    return EvalOutput(loss=loss, scores=scores, log_stopping=log_stopping)

  def _held(self, scores: SlotScores, step: Any) -> SlotScores:
    """The scores, with d held at its prior while the stopping distribution warms up."""
    if not self.config.stopping_warmup or step is None:
      return scores
    prior = self.config.dont_know_prior
    held = step < self.config.stopping_warmup
    return SlotScores(
      log_target=scores.log_target,
      log_dont_know=jnp.where(held, math.log(prior), scores.log_dont_know),
      log_answer=jnp.where(held, math.log1p(-prior), scores.log_answer),
    )

  def _decisions(self, params: Params, batch: Batch) -> SlotScores:
    """Scores whose d and a are the model's; the last slot, where a token answers whatever its d, isn't read."""
    hidden = self.hidden(params, batch)[..., :-1, :]
    scores = self._scores(params, hidden, batch["targets"])
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 1))), scores)

  def _policy(self, scores: SlotScores) -> Float[Array, "B T W"]:
    """How many slots the model would ask for, were all W granted; for a share of the tokens 1..W alike."""
    asked = jnp.exp(log_stopping_distribution(scores.log_dont_know, scores.log_answer))
    floor = self.config.policy_floor
    return (1 - floor) * asked + floor / self.num_slots

  def _row_slots(self, length: int) -> int:
    """S, slots of a packed row in training; where it is `_ragged`."""
    if self.config.slot_budget:
      return math.ceil(self.config.slot_budget * length)
    if self.config.recipe == "on_policy":
      return length * self.num_slots
    omega = np.asarray(self.config.omega)
    return packed_row_slots(omega / omega.sum(), length)

  def evaluate(self, params: Params, batch: Batch, omega: Any = None) -> EvalOutput:
    if self.config.recipe == "sampled" and omega is not None:
      shares = normalize(omega, self.num_slots, name="omega")
      return self._read_drawn(params, batch, shares)
    scores = self.slot_scores(params, batch)
    return EvalOutput(
      loss=self.objective(scores),
      scores=scores,
      log_stopping=log_stopping_distribution(scores.log_dont_know, scores.log_answer, omega),
    )

  def _read_drawn(self, params: Params, batch: Batch, shares: Array) -> EvalOutput:
    lengths = draw_lengths(jax.random.key(_EVALUATION_SEED), batch["tokens"], shares)
    packing = pack(lengths, self.num_slots, batch["tokens"].shape[1] * self.num_slots)
    reading = self._reading(self.slot_scores_packed(params, batch, packing), lengths)
    return dataclasses.replace(reading, lengths=lengths)

  def evaluate_as_trained(self, params: Params, batch: Batch, reading: EvalOutput) -> EvalOutput | None:
    if self.config.recipe == "on_policy":
      return self._read_drawn(params, batch, self._policy(reading.scores))
    if self.config.omega is None:
      return None
    if self._ragged:
      return self.evaluate(params, batch, self.config.omega)
    return self._reading(reading.scores)

  @property
  def passes(self) -> int:
    return 2 if self._ragged else 1

  @property
  def calibration_batches(self) -> int:
    return self.config.calibration_batches

  def calibrate(self, params: Params, batches: Iterable[Batch]) -> Params:
    """Sets `dont_know_offset` so that the median of d over the tokens' slots but the last is `dont_know_prior`.

    Parameters of a run that was calibrated keep their offset: what they have learned counts from there.
    """
    if not self.config.calibration_batches or self.num_slots == 1:
      return params
    if float(params["dont_know_offset"]):
      logging.info("not calibrated: the offset of %+.3f nats is kept", float(params["dont_know_offset"]))
      return params
    odds = self._median_odds(params, batches)
    if odds is None:
      logging.warning("not calibrated: the first %d batches have no token of weight", self.config.calibration_batches)
      return params
    median, tokens = odds
    offset = self._offset(median)
    logging.info(
      "calibrated: the median of d over %d tokens was %.3g; an offset of %+.3f nats makes it %g",
      tokens, _sigmoid(median), offset, self.config.dont_know_prior,
    )  # fmt: skip
    return params | {"dont_know_offset": jnp.full_like(params["dont_know_offset"], offset)}

  def tell_start(self, params: Params, batches: Iterable[Batch]) -> None:
    odds = None if self.num_slots == 1 else self._median_odds(params, batches)
    if odds is None:
      return
    median, tokens = odds
    text = f"the median of d over {tokens} tokens is {_sigmoid(median):.3g} at the start"
    if self.config.dont_know_prior is not None:
      text += (
        f"; method.calibration_batches would add {self._offset(median):+.3f} nats, which makes it"
        f" {self.config.dont_know_prior:g}"
      )
    logging.info("%s", text)

  def _offset(self, median: float) -> float:
    """From where the median of d is its prior; `median`: log odds."""
    prior = self.config.dont_know_prior
    return math.log(prior) - math.log1p(-prior) - median

  def _median_odds(self, params: Params, batches: Iterable[Batch]) -> tuple[float, int] | None:
    """The median over tokens of weight, and over their slots but the last, of log d - log a; and how many tokens."""

    @jax.jit
    def odds(params: Params, batch: Batch) -> Float[Array, "B T W-1"]:
      scores = self._decisions(params, batch)
      return (scores.log_dont_know - scores.log_answer)[..., :-1]

    found = np.concatenate([arrays.fetch(odds(params, batch))[arrays.fetch(batch["weights"]) > 0] for batch in batches])
    return (float(np.median(found)), len(found)) if len(found) else None

  def train_slots(self, tokens: int) -> int:
    if not self._ragged:
      return super().train_slots(tokens)
    first_pass = tokens * self.num_slots if self.config.recipe == "on_policy" else 0
    return first_pass + self._row_slots(tokens)

  def train_cost(self, tokens: int, *, executed: bool = False) -> flops.Cost:
    if not self._ragged:
      return super().train_cost(tokens, executed=executed)
    slots = self._row_slots(tokens) / tokens
    # Packed rows have no structure but their mask: hidden pauses save nothing of what is executed.
    total = flops.train_cost(
      self.decoder.config,
      tokens=tokens,
      slots=slots,
      slots_read=slots,
      hidden=self.hides_pauses and not executed,
      executed=executed,
      frozen=self.weights != "all",
    )
    if self.config.recipe == "on_policy":
      # The first pass reads d alone, which in unit form needs no logits.
      read = self.num_slots - 1 if self.config.dont_know == "token" else 0
      total += flops.forward_cost(
        self.decoder.config,
        tokens=tokens,
        slots=self.num_slots,
        slots_read=read,
        hidden=self.hides_pauses,
        executed=executed,
      )
    return total


def _bias(params: Params) -> Array | float:
  """What is added to the `<don't know>` logit beside the prior's shift."""
  bias = params.get("dont_know_bias", 0.0)
  if "dont_know_offset" in params:
    bias = bias + jax.lax.stop_gradient(params["dont_know_offset"])
  return bias


def _sigmoid(x: float) -> float:
  return 0.5 * (1 + math.tanh(x / 2))


def _boxed_scalar() -> nn.LogicallyPartitioned:
  return nn.LogicallyPartitioned(jnp.zeros(()), ())


def _no_scores(num_slots: int) -> SlotScores:
  zeros = jnp.zeros(num_slots)
  return SlotScores(zeros, zeros - 1.0, zeros - 1.0)
