"""Methods that are composed of a slot model and an objective.

Parameters: `decoder`, and the parameters of the slot model and of the objective under their own names.

Dimensions: B batch, T tokens, W slots, D model, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from cyb_jax.costs.flops import Cost
from cyb_jax.decoder import Decoder, DecoderConfig, init_params
from cyb_jax.decoder.attention import Mask
from cyb_jax.decoder.lora import LEAVES
from cyb_jax.methods.abilities import SlotInputs
from cyb_jax.methods.backbone import Backbone
from cyb_jax.methods.interface import (
  Batch,
  DataFacts,
  EvalOutput,
  MethodCosts,
  Objective,
  Params,
  SlotModel,
  TokenLosses,
)
from cyb_jax.methods.options import MethodConfig
from cyb_jax.readout import TokenScores
from cyb_jax.stopping import log_stopping_distribution


class SlotMethod:
  """Implements `interface.Method` with a slot model and an objective.

  Args:
    config: the options.
    backbone: the decoder and its readout.
    slot_model: computes the states of slots.
    objective: computes the stopping-time distribution and the loss from these states.

  Attributes:
    constants: names of parameters that no step changes.
  """

  constants: ClassVar[frozenset[str]] = frozenset()

  def __init__(self, config: MethodConfig, backbone: Backbone, slot_model: SlotModel, objective: Objective):
    self.config, self.backbone = config, backbone
    self.slot_model, self.objective = slot_model, objective
    self.decoder = Decoder(backbone.decoder_config)
    self.vocab_size = backbone.vocab_size

  @property
  def name(self) -> str:
    return self.config.name

  @property
  def num_slots(self) -> int:
    return self.slot_model.num_slots

  def init(self, rng: Array) -> Params:
    decoder_key, slot_key, objective_key = jax.random.split(rng, 3)
    params = {"decoder": init_params(self.decoder, decoder_key)}
    return params | self.slot_model.init(slot_key) | self.objective.init(objective_key)

  def is_trained(self, path: tuple[str, ...]) -> bool:
    if not self.backbone.is_frozen:
      # Constants count as trained, with a gradient of zero: the optimizer state of such runs has moments for them.
      return True
    if path[0] == "decoder":
      return self.backbone.weights == "lora" and path[-1] in LEAVES
    return path[0] not in self.constants

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T W D"]:
    """The states of all slots, after the final norm."""
    return self.slot_model.hidden(params, batch)

  def loss(self, params: Params, batch: Batch, rng: Array, step: Any = None) -> TokenLosses:
    del rng
    return self.objective.loss(params, self.hidden(params, batch), batch, step)

  def evaluate(self, params: Params, batch: Batch, omega: Any = None) -> EvalOutput:
    return self.objective.evaluate(params, self.hidden(params, batch), batch["targets"], omega)

  def validate_data(self, data: DataFacts | None, sequence_length: int) -> None:
    del data, sequence_length

  def costs(self, sequence_length: int, *, slots: float | None = None) -> MethodCosts:
    model, objective = self.slot_model, self.objective
    slots_read: float = objective.slots_decoded
    if slots is not None:  # they run one at a time
      slots_read = slots if objective.decides_by_logits else 1
    inference = model.inference_cost(sequence_length, slots_read=slots_read, slots=slots)
    return MethodCosts(
      train=self.train_cost(sequence_length, executed=False),
      train_executed=self.train_cost(sequence_length, executed=True),
      forward=self.forward_cost(sequence_length, executed=False),
      forward_executed=self.forward_cost(sequence_length, executed=True),
      inference=inference,
      autoregressive=inference,
      train_slots=self.train_slots(sequence_length),
      forward_slots=model.forward_slots(sequence_length),
      evaluation_passes=self.evaluation_passes,
      trained_tokens=float(sequence_length),
    )

  @property
  def evaluation_passes(self) -> int:
    """See `MethodCosts`."""
    return 1

  def train_slots(self, sequence_length: int) -> float:
    """See `MethodCosts`."""
    return self.slot_model.train_slots(sequence_length)

  def train_cost(self, sequence_length: int, *, executed: bool) -> Cost:
    """The cost of a training step, per real token."""
    slots_read = self.objective.slots_trained
    return self.slot_model.train_cost(sequence_length, slots_read=slots_read, executed=executed)

  def forward_cost(self, sequence_length: int, *, executed: bool) -> Cost:
    """The cost of one forward pass of evaluation, per real token."""
    return self.slot_model.forward_cost(sequence_length, slots_read=self.num_slots, executed=executed)


class DecodingSlotMethod(SlotMethod):
  """Implements `abilities.Decoding` with a slot model that has a cache."""

  @property
  def cache_config(self) -> DecoderConfig:
    return self.slot_model.cache_config

  @property
  def hides_pauses(self) -> bool:
    return self.slot_model.hides_pauses

  @property
  def shifts_positions(self) -> bool:
    return self.slot_model.shifts_positions

  @property
  def keeps_all_pauses(self) -> bool:
    return self.slot_model.keeps_all_pauses

  @property
  def layer_passes(self) -> float:
    return self.slot_model.layer_passes

  def empty_cache(self, rows: int, capacity: int) -> PyTree:
    return self.slot_model.empty_cache(rows, capacity)

  def hidden_slots(self, params: Params, inputs: SlotInputs, mask: Mask) -> Float[Array, "B Q D"]:
    return self.slot_model.hidden_slots(params, inputs, mask)

  def token_scores(self, params: Params, hidden: Float[Array, "... D"], slot: Int[Array, "..."]) -> TokenScores:
    return self.objective.token_scores(params, hidden, slot)

  def mixture_log_probs(
    self, params: Params, hidden: Float[Array, "... W D"]
  ) -> tuple[Float[Array, "... V"], Float[Array, "... W"]]:
    slots = jnp.broadcast_to(jnp.arange(self.num_slots, dtype=jnp.int32), hidden.shape[:-1])
    scores = self.token_scores(params, hidden, slots)
    log_stopping = log_stopping_distribution(scores.log_dont_know, scores.log_answer)
    if self.num_slots == 1:
      return scores.log_probs[..., 0, :], log_stopping
    return jax.nn.logsumexp(log_stopping[..., None] + scores.log_probs, -2), log_stopping


class CachedSlotMethod(DecodingSlotMethod):
  """A method that runs any number of slots on a cache at a time: `abilities.CachedDecoding`."""

  def extend(
    self,
    params: Params,
    inputs: SlotInputs,
    cache: Any,
    start: Int[Array, "B"] | None,
    first: Int[Array, "B"] | None = None,
  ) -> tuple[Float[Array, "B Q D"], Any]:
    return self.slot_model.extend(params, inputs, cache, start, first)


class ExportableSlotMethod(CachedSlotMethod):
  """A method whose complete model a Hugging Face folder can hold: `abilities.Exportable`."""

  @property
  def num_pauses(self) -> int:
    return self.num_slots - 1


class SequentialSlotMethod(DecodingSlotMethod):
  """A method that runs the slots of a token one after the other: `abilities.SequentialDecoding`."""

  def run_token(self, params: Params, **token: Any) -> tuple[Float[Array, "B D"], PyTree, Int[Array, "B"]]:
    return self.slot_model.run_token(params, **token)
