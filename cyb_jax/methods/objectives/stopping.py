"""The stopping-time losses of Catch Your Breath: the model abstains until it knows the answer and then answers.

Parameters: `dont_know` f32[D], the output row of `<don't know>`; in unit form also `dont_know_bias` f32[]; with
calibration also `dont_know_offset` f32[], which is not trained. Both forms and the prior shift follow arXiv 2510.13879,
see `cyb_jax.stopping`.

Dimensions: B batch, T tokens, W slots, D model.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cyb_jax import losses
from cyb_jax.decoder import unembedding_init
from cyb_jax.errors import InputError
from cyb_jax.field_rules import INNER_SHARE, NOT_NEGATIVE, Rule, checked_later, one_of, or_none, whole_number
from cyb_jax.methods.backbone import Backbone, DontKnow, boxed, boxed_row
from cyb_jax.methods.interface import Batch, EvalOutput, Params, TokenLosses
from cyb_jax.methods.options import MethodConfig
from cyb_jax.readout import TokenScores
from cyb_jax.stopping import SlotScores, log_stopping_distribution, normalize

# The options of each loss, in addition to the options that all losses share.
_OPTIONS_OF_LOSS = {
  "ap": frozenset({"omega", "gamma"}),
  "va": frozenset({"rho"}),
  "dp": frozenset({"rho", "alpha"}),
}
_DEFAULTS = {"omega": None, "gamma": None, "rho": None, "alpha": 0.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoppingOptions(MethodConfig):
  """The options of the stopping-time losses. W = `pauses` + 1.

  Attributes:
    pauses: K, the number of slots of a token after its first one.
    loss: the training objective: 'ap' for CYB-AP, 'va' for CYB-VA or 'dp' for CYB-DP, see `cyb_jax.losses`.
    omega: the step budget in training: W weights, in proportion to the probabilities that 1, 2, .. W slots are
      allowed; '': always W.
    gamma: the discount over slots, W factors; '': all ones.
    rho: the prior over slots of the losses 'va' and 'dp', W weights.
    alpha: the coefficient of the penalty of the loss 'dp'.
    dont_know: the form of `<don't know>`: 'token', an output that competes with the vocabulary; 'unit', a separate
      logistic unit.
    dont_know_prior: the probability of abstaining that the prior shift gives to an untrained model; None: no shift.
    calibration_batches: before the first step a constant is added to the `<don't know>` logit, so that over this many
      batches the median of d, the probability of abstaining, is `dont_know_prior`; 0: off.
    stopping_warmup: for this many steps d, the probability of abstaining, is held at `dont_know_prior`, so that slots
      learn to answer before the model learns when to answer; 0: off.
  """

  RULES: ClassVar = {
    "loss": one_of(*_OPTIONS_OF_LOSS),
    "omega": checked_later("W weights that are not negative, such as '1:1:1:1'; '' for the default"),
    "gamma": checked_later("W numbers in [0, 1], 'linear:g0' or 'exponential:g0'; '' for the default"),
    "rho": checked_later("W positive weights, such as '1:1:1:1' (of 'dp': not negative); '' with 'ap'"),
    "alpha": Rule(NOT_NEGATIVE.accepts, "not negative; 0 unless method.loss = 'dp'"),
    "dont_know": one_of("token", "unit"),
    "dont_know_prior": or_none(INNER_SHARE, "for no shift"),
    "calibration_batches": whole_number(note="; 0 is off"),
    "stopping_warmup": whole_number(note="; 0 is off"),
  }

  pauses: int = 3
  loss: str = "ap"
  omega: tuple[float, ...] | None = None
  gamma: tuple[float, ...] | None = None
  rho: tuple[float, ...] | None = None
  alpha: float = 0.0
  dont_know: str = "token"
  dont_know_prior: float | None = 0.9
  calibration_batches: int = 0
  stopping_warmup: int = 0

  @property
  def num_slots(self) -> int:
    """W."""
    return self.pauses + 1

  def validate(self) -> None:
    super().validate()
    for field, default in _DEFAULTS.items():
      value = getattr(self, field)
      if field not in _OPTIONS_OF_LOSS[self.loss] and value != default:
        raise InputError(
          f"method.{field}: {value!r} is set, but method.loss = {self.loss!r} doesn't use it; leave it unset"
        )
    if self.loss != "ap" and self.rho is None:
      raise InputError(f"method.rho: not set, but method.loss = {self.loss!r} requires {self.num_slots} weights")
    self.validate_recipe()
    for field, purpose in (("calibration_batches", "the median of d is set to"), ("stopping_warmup", "d is held at")):
      value = getattr(self, field)
      if value and self.dont_know_prior is None:
        raise InputError(f"method.{field}: {value} requires method.dont_know_prior, which {purpose}; it is None")
    self._validate_weights()

  def validate_recipe(self) -> None:
    """Raises InputError for invalid options of the number of training slots; methods with such options override it."""

  def fewest_slots_reached(self) -> int:
    """The number of first slots of which one must have a positive `gamma`, so that every token can answer.

    The loss sums over omega, so one allowed number of slots with a positive `gamma` suffices.
    """
    allowed = self.omega or (0.0,) * self.pauses + (1.0,)
    return 1 + max(i for i, weight in enumerate(allowed) if weight > 0)

  def _validate_weights(self) -> None:
    try:
      normalize(self.omega, self.num_slots, name="omega")
      if self.rho is not None:
        normalize(self.rho, self.num_slots, name="rho", positive=self.loss == "va")
      if self.gamma is not None:
        losses.cyb(_no_scores(self.num_slots), gamma=self.gamma)
    except ValueError as error:
      raise InputError(f"method.{error} (W = pauses + 1 = {self.num_slots})") from None
    if self.gamma is not None:
      slots = self.fewest_slots_reached()
      if not any(self.gamma[:slots]):
        raise InputError(
          f"method.gamma: {self.gamma} is zero at every slot of a token with {slots} slots; one of the first"
          f" {slots} factors must be positive"
        )


class StoppingTime:
  """CYB-AP, CYB-VA and CYB-DP, chosen by `loss`."""

  def __init__(self, backbone: Backbone, options: StoppingOptions):
    self.backbone, self.options = backbone, options
    self.num_slots = options.num_slots
    self.slots_trained = self.slots_decoded = self.num_slots
    # In unit form `<don't know>` reads the state, so it needs no logits.
    self.decides_by_logits = options.dont_know == "token"

  def init(self, rng: Array) -> Params:
    config = self.backbone.decoder_config
    if self.options.dont_know == "token":
      # The same initialiser as for the output rows of tokens.
      (row,) = unembedding_init(config)(rng, (1, config.d_model), jnp.float32)
      params = {"dont_know": boxed_row(row)}
    else:
      # A unit starts at its prior: its row is zero, and its bias is relative to the prior's shift.
      params = {"dont_know": boxed_row(jnp.zeros(config.d_model)), "dont_know_bias": boxed(jnp.zeros(()))}
    if self.options.calibration_batches:
      params["dont_know_offset"] = boxed(jnp.zeros(()))
    return params

  def dont_know(self, params: Params) -> DontKnow:
    """The output row of `<don't know>` with all terms that are added to its logit."""
    bias = params.get("dont_know_bias", 0.0)
    if "dont_know_offset" in params:
      bias = bias + jax.lax.stop_gradient(params["dont_know_offset"])
    options = self.options
    return DontKnow(params["dont_know"], bias, form=options.dont_know, prior=options.dont_know_prior)

  def scores(self, params: Params, hidden: Float[Array, "... W D"], targets: Int[Array, "..."]) -> SlotScores:
    """f32[..., W] each, raw."""
    return self.backbone.slot_scores(params, hidden, targets, dont_know=self.dont_know(params))

  def token_loss(self, scores: SlotScores) -> Float[Array, "..."]:
    """The configured loss of tokens that have all W slots."""
    options = self.options
    if options.loss == "va":
      return losses.cyb_va(scores, options.rho)
    if options.loss == "dp":
      return losses.cyb_dp(scores, options.rho, options.alpha)
    return losses.cyb(scores, options.omega, options.gamma)

  def loss(self, params: Params, hidden: Float[Array, "B T W D"], batch: Batch, step: Any = None) -> TokenLosses:
    held = self._held(step)
    total, scores = self.backbone.weighted_loss(
      params,
      hidden,
      batch,
      lambda scores, held: self.token_loss(self._held_at_prior(scores, held)),
      None if held is None else jnp.broadcast_to(held, batch["targets"].shape),
      dont_know=self.dont_know(params),
    )
    output = self.as_trained(self._held_at_prior(scores, held))
    return TokenLosses(
      loss=output.loss,
      log_likelihood=-losses.cyb(output.scores, self.options.omega),
      stopping=jnp.exp(output.log_stopping),
      total=total,
    )

  def evaluate(
    self, params: Params, hidden: Float[Array, "B T W D"], targets: Int[Array, "B T"], omega: Any = None
  ) -> EvalOutput:
    scores = self.scores(params, hidden, targets)
    return EvalOutput(
      loss=self.token_loss(scores),
      scores=scores,
      log_stopping=log_stopping_distribution(scores.log_dont_know, scores.log_answer, omega),
    )

  def as_trained(self, scores: SlotScores, lengths: Int[Array, "B T"] | None = None) -> EvalOutput:
    """The scores in the training context; `lengths`: the number of slots that each token has, None: W."""
    omega = self.options.omega
    if lengths is None:
      loss = self.token_loss(scores)
    else:
      # d = 0 at the last slot of a token: a step budget of exactly `lengths` slots.
      omega = jax.nn.one_hot(lengths - 1, self.num_slots, dtype=scores.log_target.dtype)
      loss = losses.cyb(scores, omega, self.options.gamma)
    log_stopping = log_stopping_distribution(scores.log_dont_know, scores.log_answer, omega)
    return EvalOutput(loss=loss, scores=scores, log_stopping=log_stopping)

  def warmed_up(self, scores: SlotScores, step: Any) -> SlotScores:
    """The scores, with d held at its prior during the first `stopping_warmup` steps."""
    return self._held_at_prior(scores, self._held(step))

  def _held(self, step: Any) -> Float[Array, ""] | None:
    """1 if d is held at its prior in this step, otherwise 0; None: it never is. It is an argument of the weighted loss,
    and these are f32.
    """
    if not self.options.stopping_warmup or step is None:
      return None
    return jnp.asarray(step < self.options.stopping_warmup, jnp.float32)

  def _held_at_prior(self, scores: SlotScores, held: Float[Array, "..."] | None) -> SlotScores:
    if held is None:
      return scores
    prior, is_held = self.options.dont_know_prior, held[..., None] > 0
    return SlotScores(
      log_target=scores.log_target,
      log_dont_know=jnp.where(is_held, math.log(prior), scores.log_dont_know),
      log_answer=jnp.where(is_held, math.log1p(-prior), scores.log_answer),
    )

  def decisions(self, params: Params, hidden: Float[Array, "B T W D"], targets: Int[Array, "B T"]) -> SlotScores:
    """Scores with the model's d and a; the last slot is not read, because a token always answers there."""
    scores = self.scores(params, hidden[..., :-1, :], targets)
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 1))), scores)

  def token_scores(self, params: Params, hidden: Float[Array, "... D"], slot: Int[Array, "..."]) -> TokenScores:
    del slot
    return self.backbone.token_scores(params, hidden, self.dont_know(params))


def _no_scores(num_slots: int) -> SlotScores:
  zeros = jnp.zeros(num_slots)
  return SlotScores(zeros, zeros - 1.0, zeros - 1.0)
