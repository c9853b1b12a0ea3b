"""Pause-training: one learned pause, with a position of its own, after some of the tokens (Goyal et al. 2023, "Think
before you speak", https://arxiv.org/abs/2310.02226).

Parameters: `decoder`, and `pause_input` f32[1, D] if the model can pause. A token that is followed by pauses is read
once, at the last pause. `method.pause_places` sets where training inserts pauses and what evaluation does:

- random (pretraining): round(`pause_fraction` * T) pauses are inserted at random places of a window's row, which is
  then cut back to T slots. Tokens that are cut off have no weight, and their number is reported. The loss is at every
  slot whose next slot is a token; the first token of a row is predicted in the previous window, so no pauses precede
  it. Evaluation reads the text without pauses, because the paper evaluates such models only on tasks. It also reads the
  text (`loss`, `training_omega`) with pauses drawn as in training, with a fixed seed, in rows that are long enough for
  all of them.
- prefix (fine-tuning): M = `pauses` pauses are inserted between each prefix, whose tokens have no weight, and its
  target, in training and evaluation. A row has slots for the pauses of 1 + T // 32 prefixes. In training the targets of
  later prefixes have no weight, and their number is reported; evaluation reads later prefixes without pauses.
- none: no pauses in training or evaluation. The combinations of 'random' or 'none' in pretraining with 'prefix' or
  'none' in a run that starts from it are the paper's 2 x 2 of standard and pause pretraining and fine-tuning.

Inference (generation, and the scoring of requests) runs M pauses after the prompt, for every value of `pause_places`.
M may differ from M in training, see `with_prompt_pauses`.

Dimensions: B batch, T tokens, S slots of a row, D model.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from cyb_jax.costs import flops
from cyb_jax.errors import InputError
from cyb_jax.field_rules import INNER_SHARE, one_of
from cyb_jax.methods.abilities import SlotInputs
from cyb_jax.methods.backbone import Backbone, segment_mask
from cyb_jax.methods.composite import CachedSlotMethod
from cyb_jax.methods.interface import Batch, DataFacts, EvalOutput, MethodCosts, Params, TokenLosses
from cyb_jax.methods.objectives.last import LastSlot
from cyb_jax.methods.options import MethodConfig
from cyb_jax.methods.slot_models.pauses import PauseOptions, Pauses
from cyb_jax.pauses import Packing, lengths_after_prefixes, lengths_at_random, pack

_TOKENS_PER_PREFIX = 32
# Evaluation also draws places of pauses; with a fixed seed the draws are the same for the same text.
_EVALUATION_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PauseTrainingConfig(MethodConfig):
  """The options of `pause_training`.

  Attributes:
    pauses: M, the number of pauses between prefix and target, and after a prompt.
    pause_places: where training inserts pauses: 'random', at random places of the text; 'prefix', M between each prefix
      and its target, and only targets have weight; 'none', nowhere (inference is as with 'prefix').
    pause_fraction: with 'random' places, the number of pauses as a share of the window's length, before the row is cut
      back to that length.
  """

  name: ClassVar[str] = "pause_training"
  RULES: ClassVar = {"pause_places": one_of("random", "prefix", "none"), "pause_fraction": INNER_SHARE}

  pauses: int = 10
  pause_places: str = "random"
  pause_fraction: float = 0.1

  def validate(self) -> None:
    super().validate()
    default = type(self).pause_fraction
    if self.pause_places != "random" and self.pause_fraction != default:
      raise InputError(
        f"method.pause_fraction: {self.pause_fraction:g} is set, but method.pause_places = {self.pause_places!r}"
        f" doesn't use it; leave it at {default:g}"
      )

  @property
  def can_pause(self) -> bool:
    """Whether the model has a learned pause."""
    return self.pause_places != "none" or self.pauses > 0

  def build(self, backbone: Backbone) -> PauseTraining:
    return PauseTraining(self, backbone)


class PauseTraining(CachedSlotMethod):
  """Cross-entropy of every token, read at the last pause after the previous token.

  Also implements `abilities.EvaluatedAsTrained` and `abilities.PromptPauses`.
  """

  config: PauseTrainingConfig
  slot_model: Pauses

  def __init__(self, config: PauseTrainingConfig, backbone: Backbone):
    pauses = PauseOptions(pauses=int(config.can_pause), pause_shared=True, pause_positions="shifting")
    super().__init__(config, backbone, Pauses(backbone, pauses, num_slots=1), LastSlot(backbone, 1))

  @property
  def prompt_pauses(self) -> int:
    return self.config.pauses

  @property
  def pauses_in_data(self) -> bool:
    return self.config.pause_places == "prefix"

  def with_prompt_pauses(self, pauses: int) -> PauseTraining:
    if pauses and not self.config.can_pause:
      raise InputError(
        f"--pauses: {pauses} is set, but the run has no learned pause (method.pause_places = 'none' and"
        " method.pauses = 0); leave --pauses out"
      )
    # The number of learned rows does not depend on the number of pauses, so the method keeps the run's slot model.
    method = PauseTraining(self.config, self.backbone)
    method.config = dataclasses.replace(self.config, pauses=pauses)
    return method

  def validate_data(self, data: DataFacts | None, sequence_length: int) -> None:
    places, fraction = self.config.pause_places, self.config.pause_fraction
    if places == "random" and not self._drawn(sequence_length):
      raise InputError(
        f"method.pause_fraction: {fraction:g} of a window of {sequence_length} tokens gives no pause; set at least"
        f" {1 / sequence_length:.2g}"
      )
    if data is None or places != "prefix":
      return
    if not data.has_prefixes("train"):
      raise InputError(
        f"data.task: {data.task!r} has no prefixes and targets, because all of its tokens have weight 1; use a task of"
        " questions and answers, such as 'commonsense_qa' or 'synthetic_questions', or a method.pause_places other than"
        f" {places!r}"
      )
    most = self._most_prefixes(sequence_length)
    for split in data.splits:
      counts = data.prefixes(split, sequence_length)
      beyond = int(np.maximum(counts - most, 0).sum())
      if beyond:
        logging.warning(
          "%s: %d of %d prefixes get no pauses, because a window of %d tokens has slots for the pauses of %d prefixes",
          split, beyond, int(counts.sum()), sequence_length, most,
        )  # fmt: skip

  def loss(self, params: Params, batch: Batch, rng: Array, step: Any = None) -> TokenLosses:
    if self.config.pause_places == "none":
      return super().loss(params, batch, rng, step)
    length = batch["tokens"].shape[1]
    if self.config.pause_places == "random":
      lengths, given = lengths_at_random(rng, batch["tokens"], self._drawn(length)), True
    else:
      lengths, given = self._lengths_after_prefixes(batch)
    output, packing = self._evaluate_packed(params, batch, lengths, self._row_slots(length))
    return TokenLosses(
      loss=output.loss,
      log_likelihood=-output.loss,
      stopping=jnp.ones_like(output.log_stopping),
      slots=lengths.astype(jnp.float32),
      kept=packing.kept & given,
    )

  def evaluate(self, params: Params, batch: Batch, omega: Any = None) -> EvalOutput:
    if self.config.pause_places != "prefix":
      return super().evaluate(params, batch, omega)
    lengths, _ = self._lengths_after_prefixes(batch)
    output, _ = self._evaluate_packed(params, batch, lengths, self._row_slots(batch["tokens"].shape[1]))
    return dataclasses.replace(output, slots=lengths.astype(jnp.float32))

  def evaluate_as_trained(self, params: Params, batch: Batch, output: EvalOutput) -> EvalOutput | None:
    del output
    if self.config.pause_places != "random":
      return None
    tokens = batch["tokens"]
    drawn = self._drawn(tokens.shape[1])
    lengths = lengths_at_random(jax.random.key(_EVALUATION_SEED), tokens, drawn)
    return self._evaluate_packed(params, batch, lengths, tokens.shape[1] + drawn)[0]

  def _drawn(self, length: int) -> int:
    """The number of pauses of a window, before its row is cut."""
    return round(self.config.pause_fraction * length)

  def _most_prefixes(self, length: int) -> int:
    """The number of prefixes whose pauses fit into the row of a window."""
    return 1 + length // _TOKENS_PER_PREFIX

  def _lengths_after_prefixes(self, batch: Batch) -> tuple[Int[Array, "B T"], Array]:
    weights = batch["weights"]
    return lengths_after_prefixes(weights, self.config.pauses, self._most_prefixes(weights.shape[1]))

  def _evaluate_packed(
    self, params: Params, batch: Batch, lengths: Int[Array, "B T"], row_slots: int
  ) -> tuple[EvalOutput, Packing]:
    """Reads every token at the last of its `lengths` slots, which are packed into rows of S = `row_slots`."""
    length = batch["tokens"].shape[1]
    packing = pack(lengths, 1 + max(self.config.pauses, self._drawn(length)), row_slots)
    segment_ids = batch.get("segment_ids")
    inputs = SlotInputs(
      tokens=jnp.take_along_axis(batch["tokens"], packing.token, 1),
      slots=packing.slot,
      positions=jnp.arange(row_slots, dtype=jnp.int32)[None],
    )
    mask = segment_mask(None if segment_ids is None else jnp.take_along_axis(segment_ids, packing.token, 1))
    hidden = self.hidden_slots(params, inputs, mask)
    return self.objective.evaluate(params, _last_slots(hidden, packing), batch["targets"]), packing

  def _row_slots(self, length: int) -> int:
    """S, the number of slots of a row in training."""
    if self.config.pause_places == "prefix":
      return length + self.config.pauses * self._most_prefixes(length)
    return length

  def costs(self, sequence_length: int, *, slots: float | None = None) -> MethodCosts:
    """`slots`: measured on a split that has pauses; None: `inference` is the cost of text without pauses.

    With random places, an evaluation has a pass without pauses and a pass over rows that fit all pauses; `forward` and
    `forward_slots` are the means of both.
    """
    config, row = self.backbone.decoder_config, self._row_slots(sequence_length)
    rows = [row, row + self._drawn(sequence_length)] if self.config.pause_places == "random" else [row]

    def shape(row: int, executed: bool) -> dict[str, float]:
      return {
        "slots": row / sequence_length,
        "keys": flops.causal_keys(row, executed),
        # Every pause has a position of its own.
        "local_keys": flops.local_keys(config, row, executed=executed),
        "slots_read": 1,
      }

    def forward(executed: bool) -> flops.Cost:
      costs = (flops.pass_cost(config, **shape(row, executed)) for row in rows)
      return sum(costs, flops.Cost()).times(1 / len(rows))

    slots = 1 if slots is None else slots
    inference = flops.forward_cost(config, tokens=sequence_length, slots=slots, slots_read=1, shifting=True)
    train = functools.partial(
      flops.train_pass_cost, config, frozen=self.backbone.is_frozen, reads_twice=self.config.pause_places != "none"
    )
    return MethodCosts(
      train=train(**shape(row, False), executed=False),
      train_executed=train(**shape(row, True), executed=True),
      forward=forward(False),
      forward_executed=forward(True),
      inference=inference,
      autoregressive=inference,
      train_slots=row,
      forward_slots=sum(rows) / len(rows),
      evaluation_passes=len(rows),
      trained_tokens=self._trained_tokens(sequence_length),
    )

  def _trained_tokens(self, length: int) -> float:
    # Pauses and tokens are shuffled after the first token. The last token before the cut is cut off too if a pause
    # follows it.
    drawn, others = self._drawn(length), length - 1
    if self.config.pause_places != "random" or not drawn:
      return float(length)
    return 1 + (others * others - drawn) / (others + drawn)


def _last_slots(hidden: Float[Array, "B S D"], packing: Packing) -> Float[Array, "B T 1 D"]:
  return jnp.take_along_axis(hidden, packing.places[..., -1, None], 1)[:, :, None]
