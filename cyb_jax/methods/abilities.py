"""Abilities: what only some methods offer, a small protocol each.

Whoever needs an ability tests for it:

    if isinstance(method, NonCausal):
      log_likelihood = method.autoregressive_log_likelihood(params, batch)

Dimensions: B batch, T tokens, W slots, S slots of a row, Q slots that run together, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int, PyTree

from cyb_jax.decoder import DecoderConfig
from cyb_jax.decoder.attention import Mask
from cyb_jax.methods.interface import Batch, EvalOutput, Method, Params
from cyb_jax.readout import TokenScores


@runtime_checkable
class Adaptive(Protocol):
  """The model itself decides at which slot it answers: d is its own."""

  def median_dont_know(self, params: Params, batches: Iterable[Batch]) -> tuple[float, int] | None:
    """The median of log d - log a over tokens with weight and their slots except the last one, nats; and the number of
    these tokens. None: there is no such token, or W = 1.
    """


@runtime_checkable
class Calibrated(Adaptive, Protocol):
  """Fresh parameters can be adjusted to the first batches, so that the median of d is the configured prior.

  Attributes:
    calibration_batches: on how many batches `calibrate` wants to look before the first step; 0: none.
  """

  @property
  def calibration_batches(self) -> int: ...

  def calibrate(self, params: Params, batches: Iterable[Batch]) -> Params:
    """Fresh parameters, adjusted."""

  def log_start(self, params: Params, batches: Iterable[Batch]) -> None:
    """Logs how a model that has never paused decides, before the first step."""


@runtime_checkable
class EvaluatedAsTrained(Protocol):
  """Training sees other slots, or another omega, than an evaluation by default."""

  def evaluate_as_trained(self, params: Params, batch: Batch, output: EvalOutput) -> EvalOutput | None:
    """The same batch in the training context.

    Args:
      params: as in `Method.evaluate`.
      batch: the batch that was evaluated.
      output: `evaluate(params, batch)`, which is used again where it suffices.

    Returns:
      None where the training context is that of `evaluate`.
    """


@runtime_checkable
class ExtraMetrics(Protocol):
  """Evaluation records more than what all methods have."""

  def summarize_metrics(self, means: dict[str, float]) -> dict[str, Any]:
    """The additional keys of an evaluation, from the means over tokens of `EvalOutput.extra_metrics`."""


@runtime_checkable
class Scheduled(Protocol):
  """The loss depends on how much of the run has passed."""

  def with_steps(self, steps: int) -> Method:
    """The same method, for the same parameters, in a run of so many steps."""


@runtime_checkable
class OwnRates(Protocol):
  """Some parameters outside of the decoder have a learning rate of their own.

  Attributes:
    rate_factors: factors on the learning rate, by the name of the parameter.
  """

  @property
  def rate_factors(self) -> dict[str, float]: ...


@runtime_checkable
class NonCausal(Protocol):
  """`evaluate` predicts a token with knowledge of later ones."""

  def autoregressive_log_likelihood(self, params: Params, batch: Batch) -> Float[Array, "B T"]:
    """f32[B, T], log-probability of every target from the tokens before it alone; costs a pass for each token."""


@runtime_checkable
class FusedSlots(Protocol):
  """One state is read that is made of the states of all slots."""

  def fuse(self, params: Params, hidden: Float[Array, "... W D"]) -> Float[Array, "... D"]:
    """The state that is read."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotInputs:
  """Slots to be run, Q of each row.

  Attributes:
    tokens: i32[B, Q], the token that each slot belongs to.
    slots: i32[B, Q], which slot of its token each is, from 0.
    positions: i32[B or 1, Q], for the rotary embeddings.
  """

  tokens: Int[Array, "B Q"]
  slots: Int[Array, "B Q"]
  positions: Int[Array, "#B Q"]


@runtime_checkable
class Decoding(Protocol):
  """Text can be generated and scored: what the two ways of running slots on a cache have in common.

  Attributes:
    cache_config: a decoder with as many layers as a slot passes that runs on the cache.
    hides_pauses: whether the slots of a token after its first are seen by that token alone.
    shifts_positions: whether each slot takes a position of its own, so that later tokens stand further on.
    keeps_all_pauses: whether the contexts of training hold all W slots of every token.
    layer_passes: how often `hidden_slots` passes a slot through all layers.
  """

  @property
  def cache_config(self) -> DecoderConfig: ...
  @property
  def hides_pauses(self) -> bool: ...
  @property
  def shifts_positions(self) -> bool: ...
  @property
  def keeps_all_pauses(self) -> bool: ...
  @property
  def layer_passes(self) -> float: ...

  def empty_cache(self, rows: int, capacity: int) -> PyTree:
    """A cache without a slot, with room for `capacity` slots in each of `rows` rows."""

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T W D"]:
    """The states of all slots, after the final norm."""

  def hidden_slots(self, params: Params, inputs: SlotInputs, mask: Mask) -> Float[Array, "B Q D"]:
    """The states of slots in any order, under a mask of the caller's; `mask`: see `Decoder.__call__`."""

  def token_scores(self, params: Params, hidden: Float[Array, "... D"], slot: Int[Array, "..."]) -> TokenScores:
    """The distribution over the vocabulary at slots, and whether they abstain.

    Args:
      params: bare arrays.
      hidden: [..., D], states of any slots.
      slot: i32[...], which slot of its token each is, from 0. Methods that stop by a rule abstain by it.
    """

  def mixture_log_probs(
    self, params: Params, hidden: Float[Array, "... W D"]
  ) -> tuple[Float[Array, "... V"], Float[Array, "... W"]]:
    """The distribution over the vocabulary given all slots, log sum_i s_i p_i; and log s."""


@runtime_checkable
class CachedDecoding(Decoding, Protocol):
  """Slots can run on a cache in any number at a time, so that a text can be read with fewer slots than W."""

  def extend(
    self,
    params: Params,
    inputs: SlotInputs,
    cache: Any,
    start: Int[Array, "B"] | None,
    first: Int[Array, "B"] | None = None,
  ) -> tuple[Float[Array, "B Q D"], Any]:
    """Runs some more slots of every row after those in the cache.

    Args:
      params: bare arrays.
      inputs: the slots.
      cache: of `empty_cache`.
      start: see `Decoder.extend`.
      first: see `Decoder.extend`.

    Returns:
      [B, Q, D], after the final norm, and the cache with the new slots.
    """


@runtime_checkable
class SequentialDecoding(Decoding, Protocol):
  """Each slot of a token is fed what the slot before it gave: the slots of a token run one after the other."""

  def run_token(
    self,
    params: Params,
    *,
    token: Int[Array, "B"],
    position: Int[Array, "B"],
    cache: PyTree,
    cache_index: Int[Array, "B"],
  ) -> tuple[Float[Array, "B D"], PyTree, Int[Array, "B"]]:
    """Runs all slots of one token in each row.

    Args:
      params: bare arrays.
      token: i32[B].
      position: i32[B], for the rotary embeddings.
      cache: of `empty_cache`.
      cache_index: i32[B], the index of the token's first slot in the cache; the slots before it are seen.

    Returns:
      [B, D], the state that is read; the cache; and i32[B], how many slots of the token it now holds.
    """


@runtime_checkable
class EarlyExit(Protocol):
  """Slots are passes through the layers, and a token that answers early has no keys of its later passes."""

  def fill_cache(self, cache: PyTree, *, cache_index: Int[Array, "B"], slots: Int[Array, "B"]) -> PyTree:
    """The cache as if the token at `cache_index` had run only its first `slots` slots."""


@runtime_checkable
class PromptPauses(Protocol):
  """Inference runs pauses between a prompt and the text that is generated, once.

  Attributes:
    prompt_pauses: how many.
    pauses_in_data: whether a split of the data has such pauses too, after its prefixes.
  """

  @property
  def prompt_pauses(self) -> int: ...
  @property
  def pauses_in_data(self) -> bool: ...

  def with_prompt_pauses(self, pauses: int) -> Method:
    """The same method, for the same parameters, with another number of pauses.

    Raises:
      InputError: the model has no pause.
    """


@runtime_checkable
class Exportable(Protocol):
  """A Hugging Face folder holds the whole model: a plain decoder, with pauses and `<don't know>` as vocabulary entries.

  Attributes:
    num_pauses: K, the pauses of a token.
  """

  @property
  def num_pauses(self) -> int: ...
