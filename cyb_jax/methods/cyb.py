"""Catch Your Breath: the model abstains until it knows, and is trained over the time at which it stops.

Parameters beside the decoder's and the pauses': `dont_know` f32[D], the output row of `<don't know>`; and in unit form
`dont_know_bias` f32[]. Both forms and the prior shift: method of arXiv 2510.13879, see `cyb_jax.stopping`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from cyb_jax import losses
from cyb_jax.decoder import unembedding_init
from cyb_jax.errors import InputError
from cyb_jax.methods.method import Batch, Params, Reading, TokenLosses
from cyb_jax.methods.paused import PAUSE_OPTIONS, PausedMethod, boxed_row
from cyb_jax.stopping import SlotScores, log_stopping_distribution, normalize

# Which of the options each loss reads, beside those that all of them do.
_OPTIONS_OF_LOSS = {
  "ap": frozenset({"omega", "gamma"}),
  "va": frozenset({"rho"}),
  "dp": frozenset({"rho", "alpha"}),
}
_DEFAULTS = {"omega": None, "gamma": None, "rho": None, "alpha": 0.0}


class Cyb(PausedMethod):
  """CYB-AP, CYB-VA and CYB-DP, picked by `method.loss`."""

  name = "cyb"
  options = PAUSE_OPTIONS | {"loss", "omega", "gamma", "rho", "alpha", "dont_know", "dont_know_prior"}
  decides = True

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
    try:
      normalize(config.omega, self.num_slots, name="omega")
      if config.rho is not None:
        normalize(config.rho, self.num_slots, name="rho", positive=config.loss == "va")
      if config.gamma is not None:
        losses.cyb(_no_scores(self.num_slots), gamma=config.gamma)
    except ValueError as error:
      raise InputError(f"method.{error} (W = pauses + 1 = {self.num_slots})") from None
    if config.omega is not None and config.gamma is not None:
      last = max(i for i, weight in enumerate(config.omega) if weight > 0)
      if not any(config.gamma[: last + 1]):
        raise InputError(
          f"method.gamma: {config.gamma} is zero at every slot that method.omega = {config.omega} reaches"
        )

  def init_own(self, rng: Array) -> Params:
    width = self.decoder.config.d_model
    if self.config.dont_know == "token":
      # As the output rows of words start.
      (row,) = unembedding_init(self.decoder.config)(rng, (1, width), jnp.float32)
      return {"dont_know": boxed_row(row)}
    # A unit starts from its prior alone: zero row, and the bias counts from the prior's shift.
    return {
      "dont_know": boxed_row(jnp.zeros(width)),
      "dont_know_bias": nn.LogicallyPartitioned(jnp.zeros(()), ()),
    }

  def slot_scores(self, params: Params, batch: Batch) -> SlotScores:
    """f32[B, T, W] each, raw."""
    return self.scores(
      params,
      self.hidden(params, batch),
      batch,
      dont_know=params["dont_know"],
      dont_know_bias=params.get("dont_know_bias", 0.0),
    )

  @property
  def objective(self) -> Callable[[SlotScores], Array]:
    """The configured loss as a function of the scores."""
    config = self.config
    return {
      "ap": lambda scores: losses.cyb(scores, config.omega, config.gamma),
      "va": lambda scores: losses.cyb_va(scores, config.rho),
      "dp": lambda scores: losses.cyb_dp(scores, config.rho, config.alpha),
    }[config.loss]

  def losses(self, params: Params, batch: Batch, rng: Array) -> TokenLosses:
    reading = self.read(params, batch, self.config.omega)
    return TokenLosses(
      loss=reading.loss,
      log_likelihood=-losses.cyb(reading.scores, self.config.omega),
      stopping=jnp.exp(reading.log_stopping),
    )

  def read(self, params: Params, batch: Batch, omega: Any = None) -> Reading:
    scores = self.slot_scores(params, batch)
    return Reading(
      loss=self.objective(scores),
      scores=scores,
      log_stopping=log_stopping_distribution(scores.log_dont_know, scores.log_answer, omega),
    )


def _no_scores(num_slots: int) -> SlotScores:
  zeros = jnp.zeros(num_slots)
  return SlotScores(zeros, zeros - 1.0, zeros - 1.0)
