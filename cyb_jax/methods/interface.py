"""The interface of a method to the trainer, to evaluation and to the programs, which know no method by name.

A method is a slot model (where the W hidden states of a token come from) and an objective (how these states become a
stopping-time distribution and a loss). Every method implements `Method`; `cyb_jax.methods.abilities` has the protocols
that only some methods implement.

Dimensions: B batch, T tokens, W slots, S slots of a row, Q slots that run together, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from cyb_jax.costs.flops import Cost
from cyb_jax.decoder import Decoder
from cyb_jax.readout import TokenScores
from cyb_jax.stopping import SlotScores

Batch = dict[str, Array]
"""`tokens` i32[B, T], `targets` i32[B, T], `weights` f32[B, T]. With `segment_ids` i32[B, T] attention stays inside a
segment.
"""

Params = PyTree

# Which parameters are trained: all; the adapters and the parameters outside of the decoder; or only the latter.
WEIGHTS = ("all", "lora", "new")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLosses:
  """The per-token results that a training step needs.

  Attributes:
    loss: f32[B, T], the training objective, nats.
    log_likelihood: f32[B, T], log-probability that the model gives the target, without discount or penalty.
    stopping: f32[B, T, W], the probability of reading each slot.
    total: f32[], the sum of weight times `loss` over the batch, where its gradient is cheaper than that of `loss`
      (`readout.weighted_loss`); None: it is not, or tokens are dropped (`kept`). Training takes the gradient of
      `total`, so code that changes `loss` must also change `total` or set it to None.
    slots: f32[B, T], the number of slots of each token; None: W.
    kept: bool[B, T], False if the slots of a token did not fit into its row; the token then has no weight. None: the
      slots of all tokens fit.
  """

  loss: Float[Array, "B T"]
  log_likelihood: Float[Array, "B T"]
  stopping: Float[Array, "B T W"]
  total: Float[Array, ""] | None = None
  slots: Float[Array, "B T"] | None = None
  kept: Bool[Array, "B T"] | None = None

  def weighted_sum(self, weights: Float[Array, "B T"]) -> Float[Array, ""]:
    """Returns the sum of weight times loss, whose gradient is that of training; `weights`: without dropped tokens."""
    return (self.loss * weights).sum() if self.total is None else self.total


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvalOutput:
  """The per-token results that evaluation needs; all slots are read.

  Attributes:
    loss: f32[B, T], the training objective, nats.
    scores: f32[B, T, W] each.
    log_stopping: f32[B, T, W], under the evaluation's omega.
    lengths: i32[B, T], the number of slots of each token; the scores of later slots repeat the scores of its last slot.
      None: all W.
    slots: f32[B, T], the number of slots that inference runs for each token, for methods that decide this number for
      each token; None: see `MethodCosts.inference`.
    fused: f32[B, T], log-probability of the target from the fused state, for methods that read one state computed from
      all slots; None: the slots are a mixture.
    extra_metrics: f32[B, T] each; `abilities.ExtraMetrics.summarize_metrics` gets their means.
  """

  loss: Float[Array, "B T"]
  scores: SlotScores
  log_stopping: Float[Array, "B T W"]
  lengths: Int[Array, "B T"] | None = None
  slots: Float[Array, "B T"] | None = None
  fused: Float[Array, "B T"] | None = None
  extra_metrics: dict[str, Float[Array, "B T"]] = dataclasses.field(default_factory=dict)

  @property
  def log_likelihood(self) -> Float[Array, "B T"]:
    """f32[B, T], log-probability that the model gives the target: log sum_i s_i t_i, or `fused`."""
    if self.fused is not None:
      return self.fused
    return jax.nn.logsumexp(self.log_stopping + self.scores.log_target, -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodCosts:
  """The compute cost of a method on windows of T tokens.

  FLOPs are per real token (`cyb_jax.costs.flops`): model FLOPs count what the method needs, executed FLOPs what the
  compiled program computes. If the number of slots is random, the costs are means.

  Attributes:
    train: cost of a training step.
    train_executed: cost of a training step, as executed.
    forward: cost of one forward pass of evaluation.
    forward_executed: cost of one forward pass of evaluation, as executed.
    inference: cost of decoding a text of T tokens with a cache: every slot passes through the layers once and attends
      to the keys before it.
    autoregressive: cost of generating a text of T tokens one by one: `inference`, except for methods without a cache.
    train_slots: decoder slots of a window in training. A slot counts each time that it passes through all layers.
    forward_slots: decoder slots of a window in one forward pass of evaluation.
    evaluation_passes: number of these forward passes in an evaluation, including `evaluate_as_trained`.
    trained_tokens: tokens of a window that have a training loss.
  """

  train: Cost
  train_executed: Cost
  forward: Cost
  forward_executed: Cost
  inference: Cost
  autoregressive: Cost
  train_slots: float
  forward_slots: float
  evaluation_passes: int
  trained_tokens: float


class DataFacts(Protocol):
  """The facts about training data that methods need; a token store implements it.

  Attributes:
    task: the name of the task.
    splits: the names of the splits; empty before the data is prepared.
  """

  task: str

  @property
  def splits(self) -> Collection[str]: ...

  def has_prefixes(self, split: str) -> bool:
    """Whether the documents are a prefix, whose tokens have no weight, and a target."""

  def prefixes(self, split: str, sequence_length: int) -> np.ndarray:
    """i64[windows], the number of prefixes in each window of `sequence_length` tokens."""


@runtime_checkable
class Method(Protocol):
  """Turns (params, batch) into per-token losses and log-likelihoods, and reports its compute cost.

  Methods hold no state: `init` makes a tree of parameters, and everything else takes it.

  Attributes:
    name: the name of the method in the registry.
    config: the options, an instance of the method's own frozen dataclass.
    decoder: the Linen module that all slots pass through.
    vocab_size: the number of rows of the embedding table that are real vocabulary entries.
    num_slots: W, the number of slots of a token that can be read.
  """

  @property
  def name(self) -> str: ...
  @property
  def config(self) -> Any: ...
  @property
  def decoder(self) -> Decoder: ...
  @property
  def vocab_size(self) -> int: ...
  @property
  def num_slots(self) -> int: ...

  def init(self, rng: Array) -> Params:
    """Fresh parameters, leaves boxed with their logical axes (`flax.linen.LogicallyPartitioned`)."""

  def is_trained(self, path: tuple[str, ...]) -> bool:
    """Whether training changes the parameter at a path of names; other parameters have neither gradient nor moments."""

  def loss(self, params: Params, batch: Batch, rng: Array, step: Int[Array, ""] | int | None = None) -> TokenLosses:
    """The training objective, per token.

    Args:
      params: bare arrays.
      batch: see `Batch`.
      rng: the key of this step. All devices and all parts of an accumulated batch get the same key, so random draws
        must also be keyed by the row's content (`pauses.draw_lengths`).
      step: the number of steps taken before this one; None: all warm-ups are over.
    """

  def evaluate(self, params: Params, batch: Batch, omega: Any = None) -> EvalOutput:
    """Reads every slot; `omega`: see `stopping.log_stopping_distribution`."""

  def costs(self, sequence_length: int, *, slots: float | None = None) -> MethodCosts:
    """The compute cost of windows of `sequence_length` tokens.

    Args:
      sequence_length: T.
      slots: the measured number of slots per token at inference, for `MethodCosts.inference`; None: all slots.
    """

  def validate_data(self, data: DataFacts | None, sequence_length: int) -> None:
    """Checks the options against the data.

    Args:
      data: None: only the length of windows is known.
      sequence_length: T.

    Raises:
      InputError: the options are incompatible with windows of T tokens or with this data.
    """


class SlotModel(Protocol):
  """Where the W hidden states of a token come from.

  Attributes:
    num_slots: W.
  """

  num_slots: int

  def init(self, rng: Array) -> Params:
    """The slot model's parameters outside of the decoder, boxed."""

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T W D"]:
    """The states of all slots of all tokens, after the final norm."""

  def train_slots(self, sequence_length: int) -> float:
    """See `MethodCosts.train_slots`."""

  def forward_slots(self, sequence_length: int) -> float:
    """See `MethodCosts.forward_slots`."""

  def train_cost(self, sequence_length: int, *, slots_read: float, executed: bool) -> Cost:
    """FLOPs per real token of a training step that reads `slots_read` slots of a token."""

  def forward_cost(self, sequence_length: int, *, slots_read: float, executed: bool) -> Cost:
    """FLOPs per real token of a forward pass of evaluation that reads `slots_read` slots of a token."""

  def inference_cost(self, sequence_length: int, *, slots_read: float, slots: float | None) -> Cost:
    """FLOPs per real token of decoding that reads `slots_read` slots of a token, see `MethodCosts.inference`; `slots`:
    see `Method.costs`.
    """


class Objective(Protocol):
  """How the states of a token's slots become a stopping-time distribution and a loss.

  Attributes:
    slots_trained: the number of slots of a token that the loss reads.
    slots_decoded: the number of slots of a token that decoding reads when it runs all slots.
    decides_by_logits: whether the logits of a slot are needed to decide whether the token answers there. If not,
      decoding slot by slot reads out one slot of a token.
  """

  slots_trained: int
  slots_decoded: int
  decides_by_logits: bool

  def init(self, rng: Array) -> Params:
    """The objective's parameters outside of the decoder, boxed."""

  def loss(self, params: Params, hidden: Float[Array, "B T W D"], batch: Batch, step: Any = None) -> TokenLosses:
    """The training objective, per token; `step`: see `Method.loss`."""

  def evaluate(
    self, params: Params, hidden: Float[Array, "B T W D"], targets: Int[Array, "B T"], omega: Any = None
  ) -> EvalOutput:
    """Reads all slots; `omega`: see `Method.evaluate`."""

  def token_scores(self, params: Params, hidden: Float[Array, "... D"], slot: Int[Array, "..."]) -> TokenScores:
    """See `abilities.Decoding`."""
