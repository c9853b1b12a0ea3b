"""Abilities: one small protocol for each feature that only some methods offer.

A caller that needs an ability tests for it:

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
  """The model itself decides at which slot it answers: it computes d."""

  def median_dont_know(self, params: Params, batches: Iterable[Batch]) -> tuple[float, int] | None:
    """The median of log d - log a in nats over all slots but the last of the tokens with weight, and the number of
    these tokens. None: there is no such token, or W = 1.
    """


@runtime_checkable
class Calibrated(Adaptive, Protocol):
  """Fresh parameters can be adjusted to the first batches, so that the median of d is the configured prior.

  Attributes:
    calibration_batches: the number of batches that `calibrate` reads before the first step; 0: no calibration.
  """

  @property
  def calibration_batches(self) -> int: ...

  def calibrate(self, params: Params, batches: Iterable[Batch]) -> Params:
    """Returns the adjusted fresh parameters."""

  def log_start(self, params: Params, batches: Iterable[Batch]) -> None:
    """Logs the median of d before the first step, for a model that has not been trained to pause."""


@runtime_checkable
class EvaluatedAsTrained(Protocol):
  """Training runs other slots, or uses another omega, than an evaluation does by default."""

  def evaluate_as_trained(self, params: Params, batch: Batch, output: EvalOutput) -> EvalOutput | None:
    """The same batch in the training context.

    Args:
      params: as in `Method.evaluate`.
      batch: the batch that was evaluated.
      output: the result of `evaluate(params, batch)`, which is reused where it suffices.

    Returns:
      None if the training context equals the context of `evaluate`.
    """


@runtime_checkable
class ExtraMetrics(Protocol):
  """Evaluation records metrics that other methods do not have."""

  def summarize_metrics(self, means: dict[str, float]) -> dict[str, Any]:
    """The additional keys of an evaluation record, from the means of `EvalOutput.extra_metrics` over tokens."""


@runtime_checkable
class Scheduled(Protocol):
  """The loss depends on the completed fraction of the run."""

  def with_steps(self, steps: int) -> Method:
    """The same method, for the same parameters, in a run of `steps` steps."""


@runtime_checkable
class OwnRates(Protocol):
  """Some parameters outside of the decoder have their own learning rate.

  Attributes:
    rate_factors: factors of the learning rate, by parameter name.
  """

  @property
  def rate_factors(self) -> dict[str, float]: ...


@runtime_checkable
class NonCausal(Protocol):
  """`evaluate` predicts a token with knowledge of later ones."""

  def autoregressive_log_likelihood(self, params: Params, batch: Batch) -> Float[Array, "B T"]:
    """f32[B, T], log-probability of every target given only the tokens before it; costs one pass per token."""


@runtime_checkable
class FusedSlots(Protocol):
  """The readout reads one state, which is computed from the states of all slots."""

  def fuse(self, params: Params, hidden: Float[Array, "... W D"]) -> Float[Array, "... D"]:
    """The fused state that is read out."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotInputs:
  """Slots to be run, Q of each row.

  Attributes:
    tokens: i32[B, Q], the token that each slot belongs to.
    slots: i32[B, Q], the index of each slot within its token, from 0.
    positions: i32[B or 1, Q], for the rotary embeddings.
  """

  tokens: Int[Array, "B Q"]
  slots: Int[Array, "B Q"]
  positions: Int[Array, "#B Q"]


@runtime_checkable
class Decoding(Protocol):
  """Text can be generated and scored: the common part of the two ways of running slots on a cache.

  Attributes:
    cache_config: the decoder whose number of layers is the number of layers that a slot passes through on the cache.
    hides_pauses: whether only a token itself sees the slots after its first slot.
    shifts_positions: whether each slot has its own position, which shifts the positions of later tokens.
    keeps_all_pauses: whether training contexts contain all W slots of every token.
    layer_passes: the number of passes of a slot through all layers in `hidden_slots`.
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
    """An empty cache with a capacity of `capacity` slots in each of `rows` rows."""

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T W D"]:
    """The states of all slots, after the final norm."""

  def hidden_slots(self, params: Params, inputs: SlotInputs, mask: Mask) -> Float[Array, "B Q D"]:
    """The states of slots in any order, with a mask from the caller; `mask`: see `Decoder.__call__`."""

  def token_scores(self, params: Params, hidden: Float[Array, "... D"], slot: Int[Array, "..."]) -> TokenScores:
    """The distribution over the vocabulary at slots, and the log-probabilities of abstaining and answering there.

    Args:
      params: bare arrays.
      hidden: [..., D], states of any slots.
      slot: i32[...], the index of each slot within its token, from 0; methods with a fixed rule of stopping use it.
    """

  def mixture_log_probs(
    self, params: Params, hidden: Float[Array, "... W D"]
  ) -> tuple[Float[Array, "... V"], Float[Array, "... W"]]:
    """(log sum_i s_i p_i, log s): the log-distribution over the vocabulary given all slots, and over slots."""


@runtime_checkable
class CachedDecoding(Decoding, Protocol):
  """Any number of slots can run on a cache at a time, so that a text can be read with fewer slots than W."""

  def extend(
    self,
    params: Params,
    inputs: SlotInputs,
    cache: Any,
    start: Int[Array, "B"] | None,
    first: Int[Array, "B"] | None = None,
  ) -> tuple[Float[Array, "B Q D"], Any]:
    """Runs more slots of every row after the slots in the cache.

    Args:
      params: bare arrays.
      inputs: the slots.
      cache: as `empty_cache` returns it.
      start: see `Decoder.extend`.
      first: see `Decoder.extend`.

    Returns:
      [B, Q, D], after the final norm, and the cache with the new slots.
    """


@runtime_checkable
class SequentialDecoding(Decoding, Protocol):
  """The input of a slot is the output of the previous slot: the slots of a token run one after the other."""

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
      cache: as `empty_cache` returns it.
      cache_index: i32[B], the cache index of the token's first slot; the slots before it are seen.

    Returns:
      [B, D], the state that is read out; the cache; and i32[B], the number of slots of the token in the cache.
    """


@runtime_checkable
class EarlyExit(Protocol):
  """Slots are passes through the layers, and a token that answers early has no keys for its later passes."""

  def fill_cache(self, cache: PyTree, *, cache_index: Int[Array, "B"], slots: Int[Array, "B"]) -> PyTree:
    """The cache as if the token at `cache_index` had run only its first `slots` slots."""


@runtime_checkable
class PromptPauses(Protocol):
  """Inference runs pauses once, between a prompt and the generated text.

  Attributes:
    prompt_pauses: the number of these pauses.
    pauses_in_data: whether evaluation also inserts these pauses, after the prefixes of a split.
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
  """A Hugging Face folder can hold the model: a plain decoder with pauses and `<don't know>` as vocabulary entries.

  Attributes:
    num_pauses: K, the pauses of a token.
  """

  @property
  def num_pauses(self) -> int: ...
