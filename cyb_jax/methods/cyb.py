"""Catch Your Breath: the model abstains until it knows the answer; the loss is an expectation over the stopping time.

Slots are pauses, and the objective is a stopping time (arXiv 2510.13879). `method.recipe` sets how many of its W slots
a token gets in training:

- constant: all W slots; the loss sums over omega. All of the paper's experiments use this recipe.
- sampled (described in the paper, without experiments): a token gets W_n ~ Cat(omega) slots, and d = 0 at the last of
  these slots, because omega is one-hot there.
- on_policy (ours): as sampled, but W_n is drawn from the model's own stopping distribution, so that the contexts of
  training are those of self-paced inference. There are two passes. The first pass has no gradient and reads d with all
  W slots after every token. For a share `policy_floor` of the tokens W_n is drawn uniformly from 1..W instead, so that
  late slots and the decision to continue are trained even if the model stops early.

With sampled and on_policy the slots are packed into rows of a fixed number of slots (`pauses.pack`). Evaluation drops
no token: its rows are large enough for all W slots of every token.

Dimensions: B batch, T tokens, W slots, S slots of a row.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cyb_jax.costs import flops
from cyb_jax.errors import InputError
from cyb_jax.field_rules import NOT_NEGATIVE, POSITIVE_SHARE, Rule, one_of
from cyb_jax.methods.backbone import Backbone
from cyb_jax.methods.composite import ExportableSlotMethod
from cyb_jax.methods.interface import Batch, EvalOutput, Params, TokenLosses
from cyb_jax.methods.objectives.stopping import StoppingOptions
from cyb_jax.methods.slot_models.pauses import PauseOptions, Pauses
from cyb_jax.methods.stopping_method import StoppingMethod
from cyb_jax.pauses import Packing, draw_lengths, pack, packed_row_slots
from cyb_jax.stopping import SlotScores, log_stopping_distribution, normalize

# Evaluation also draws numbers of slots; with a fixed seed the draws are the same for the same text.
_EVALUATION_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CybConfig(StoppingOptions, PauseOptions):
  """The options of `cyb`: the options of pauses, of the stopping-time losses, and of the recipe.

  Attributes:
    recipe: how many of its W slots a token gets in training: 'constant', all of them; 'sampled', a number drawn from
      omega; 'on_policy', a number drawn from the model's own stopping distribution (`cyb_jax.methods.cyb`).
    slot_budget: with the recipes 'sampled' and 'on_policy', the number of slots per token that fit into a packed row.
      0: for 'sampled', enough for all but one row in 30,000; for 'on_policy', W.
    policy_floor: with the recipe 'on_policy', the share of tokens whose number of slots is drawn uniformly from 1 .. W
      instead.
  """

  name: ClassVar[str] = "cyb"
  RULES: ClassVar = {
    "recipe": one_of("constant", "sampled", "on_policy"),
    "slot_budget": Rule(NOT_NEGATIVE.accepts, "in [1, W], or 0 for the default"),
    "policy_floor": POSITIVE_SHARE,
  }

  recipe: str = "constant"
  slot_budget: float = 0.0
  policy_floor: float = 0.1

  @property
  def is_ragged(self) -> bool:
    """Whether the number of slots varies in training. If omega always allows W, *sampled* equals *constant*."""
    omega = self.omega
    return self.recipe == "on_policy" or (self.recipe == "sampled" and omega is not None and any(omega[:-1]))

  def validate_recipe(self) -> None:
    if self.recipe != "constant" and self.loss != "ap":
      raise InputError(f"method.recipe: {self.recipe!r} requires method.loss = 'ap', not {self.loss!r}; use 'constant'")
    if self.recipe == "on_policy" and self.omega is not None:
      raise InputError(
        f"method.omega: {self.omega} is set, but method.recipe = 'on_policy' draws from the model's own stopping"
        " distribution; leave method.omega at ''"
      )
    if self.slot_budget and not (self.is_ragged and 1 <= self.slot_budget <= self.num_slots):
      wanted = f"in [1, {self.num_slots}], or 0" if self.is_ragged else "0 if every token gets all slots"
      raise InputError(f"method.slot_budget: {self.slot_budget:g} must be {wanted}")
    if self.recipe != "on_policy" and self.policy_floor != type(self).policy_floor:
      raise InputError(
        f"method.policy_floor: {self.policy_floor:g} is set, but method.recipe = {self.recipe!r} doesn't use it; leave"
        f" it at {type(self).policy_floor:g}"
      )

  def fewest_slots_reached(self) -> int:
    # If the number of slots is drawn, a token must be able to answer with the fewest slots that it may get.
    if self.recipe == "on_policy":
      return 1
    if self.is_ragged:
      return 1 + min(i for i, weight in enumerate(self.omega) if weight > 0)
    return super().fewest_slots_reached()

  def build(self, backbone: Backbone) -> Cyb:
    return Cyb(self, backbone)


class Cyb(StoppingMethod, ExportableSlotMethod):
  """CYB-AP, CYB-VA and CYB-DP over pauses."""

  config: CybConfig
  slot_model: Pauses

  def __init__(self, config: CybConfig, backbone: Backbone):
    super().__init__(config, backbone, Pauses(backbone, config))

  @property
  def keeps_all_pauses(self) -> bool:
    return self.config.recipe == "constant"

  def hidden_packed(self, params: Params, batch: Batch, packing: Packing) -> Float[Array, "B S D"]:
    """See `Pauses.hidden_packed`."""
    return self.slot_model.hidden_packed(params, batch, packing)

  def slot_scores_packed(self, params: Params, batch: Batch, packing: Packing) -> SlotScores:
    """The scores of the slots in the packed rows, f32[B, T, W] each; slots after a token's last slot repeat it."""
    hidden = self.hidden_packed(params, batch, packing)[:, :, None]
    scores = self.objective.scores(params, hidden, jnp.take_along_axis(batch["targets"], packing.token, -1))
    indices = packing.places.reshape(len(packing.places), -1)
    return jax.tree.map(lambda x: jnp.take_along_axis(x[..., 0], indices, -1).reshape(packing.places.shape), scores)

  def loss(self, params: Params, batch: Batch, rng: Array, step: Any = None) -> TokenLosses:
    if not self.config.is_ragged:
      return super().loss(params, batch, rng, step)
    objective = self.objective
    if self.config.recipe == "sampled":
      shares = normalize(self.config.omega, self.num_slots, name="omega")
    else:
      decisions = self.decisions(jax.lax.stop_gradient(params), batch)
      shares = self._policy(objective.warmed_up(decisions, step))
    length = batch["tokens"].shape[1]
    lengths = draw_lengths(rng, batch["tokens"], shares)
    packing = pack(lengths, self.num_slots, self._row_slots(length))
    scores = objective.warmed_up(self.slot_scores_packed(params, batch, packing), step)
    output = objective.as_trained(scores, lengths)
    return TokenLosses(
      loss=output.loss,
      log_likelihood=output.log_likelihood,
      stopping=jnp.exp(output.log_stopping),
      slots=lengths.astype(jnp.float32),
      kept=packing.kept,
    )

  def _policy(self, scores: SlotScores) -> Float[Array, "B T W"]:
    """The distribution of the number of slots that the model would request if all W were allowed, mixed with a uniform
    distribution over 1..W.
    """
    requested = jnp.exp(log_stopping_distribution(scores.log_dont_know, scores.log_answer))
    floor = self.config.policy_floor
    return (1 - floor) * requested + floor / self.num_slots

  def _row_slots(self, length: int) -> int:
    """S, the number of slots of a packed row in training."""
    if self.config.slot_budget:
      return math.ceil(self.config.slot_budget * length)
    if self.config.recipe == "on_policy":
      return length * self.num_slots
    omega = np.asarray(self.config.omega)
    return packed_row_slots(omega / omega.sum(), length)

  def evaluate(self, params: Params, batch: Batch, omega: Any = None) -> EvalOutput:
    if self.config.recipe == "sampled" and omega is not None:
      return self._evaluate_drawn(params, batch, normalize(omega, self.num_slots, name="omega"))
    return super().evaluate(params, batch, omega)

  def _evaluate_drawn(self, params: Params, batch: Batch, shares: Array) -> EvalOutput:
    lengths = draw_lengths(jax.random.key(_EVALUATION_SEED), batch["tokens"], shares)
    packing = pack(lengths, self.num_slots, batch["tokens"].shape[1] * self.num_slots)
    output = self.objective.as_trained(self.slot_scores_packed(params, batch, packing), lengths)
    return dataclasses.replace(output, lengths=lengths)

  def evaluate_as_trained(self, params: Params, batch: Batch, output: EvalOutput) -> EvalOutput | None:
    if self.config.recipe == "on_policy":
      return self._evaluate_drawn(params, batch, self._policy(output.scores))
    if self.config.is_ragged:
      return self.evaluate(params, batch, self.config.omega)
    return super().evaluate_as_trained(params, batch, output)

  @property
  def evaluation_passes(self) -> int:
    return 2 if self.config.is_ragged else 1

  def train_slots(self, sequence_length: int) -> float:
    if not self.config.is_ragged:
      return super().train_slots(sequence_length)
    first_pass = sequence_length * self.num_slots if self.config.recipe == "on_policy" else 0
    return first_pass + self._row_slots(sequence_length)

  def train_cost(self, sequence_length: int, *, executed: bool) -> flops.Cost:
    if not self.config.is_ragged:
      return super().train_cost(sequence_length, executed=executed)
    config, slots = self.backbone.decoder_config, self._row_slots(sequence_length) / sequence_length
    # Packed rows have no structured mask, so hidden pauses reduce the model FLOPs but not the executed FLOPs.
    total = flops.train_cost(
      config,
      tokens=sequence_length,
      slots=slots,
      slots_read=slots,
      hidden=self.hides_pauses and not executed,
      shifting=self.shifts_positions,
      executed=executed,
      frozen=self.backbone.is_frozen,
      reads_twice=True,
    ) + self.slot_model.heads_cost(slots).times(3)
    if self.config.recipe == "on_policy":
      # The first pass reads only d, which needs no logits in unit form.
      read = self.num_slots - 1 if self.config.dont_know == "token" else 0
      total += self.slot_model.forward_cost(sequence_length, slots_read=read, executed=executed)
    return total
