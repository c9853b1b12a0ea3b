"""The decoder and its readout, on which every method is built.

Dimensions: ... any leading shape (batch, tokens), W slots, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int

from cyb_jax.decoder import Decoder, DecoderConfig, SegmentMask
from cyb_jax.methods.interface import Batch, Params
from cyb_jax.readout import TokenScores, slot_scores, token_scores, weighted_loss
from cyb_jax.stopping import Form, SlotScores


@dataclasses.dataclass(frozen=True)
class DontKnow:
  """The output row of `<don't know>` with the options of its readout.

  Attributes:
    row: f32[D].
    bias: a scalar that is added to the logit in addition to the prior's shift, nats.
    form: 'token' or 'unit', see `readout.slot_scores`.
    prior: the probability of abstaining at uniform logits, which the shift sets; None: no shift.
  """

  row: Float[Array, "D"]
  bias: Float[Array, ""] | float
  form: Form
  prior: float | None


@dataclasses.dataclass(frozen=True)
class Backbone:
  """A decoder with its readout.

  Attributes:
    decoder_config: the decoder; its vocab_size is the number of rows of the tables, including padding.
    vocab_size: the number of rows that are real vocabulary entries.
    chunk_size: the chunk size of the readout, see `readout.slot_scores`.
    shards: the number of devices over which jit splits a batch, see `readout.slot_scores`.
    weights: which parameters are trained, one of `WEIGHTS`.
  """

  decoder_config: DecoderConfig
  vocab_size: int
  chunk_size: int | None = None
  shards: int = 1
  weights: str = "all"

  @property
  def decoder(self) -> Decoder:
    return Decoder(self.decoder_config)

  @property
  def is_frozen(self) -> bool:
    """Whether the decoder's own parameters are frozen."""
    return self.weights != "all"

  def apply(self, params: Params, *args: Any, method: str | None = None, **options: Any) -> Any:
    """Calls a method of the decoder, by default the forward pass, with the decoder's part of `params`."""
    return self.decoder.apply({"params": params["decoder"]}, *args, method=method, **options)

  def embed(self, params: Params, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
    """See `Decoder.embed`."""
    return self.apply(params, tokens, method="embed")

  def weighted_loss(
    self,
    params: Params,
    hidden: Float[Array, "B T W D"],
    batch: Batch,
    token_loss: Callable[[SlotScores, Any], Float[Array, "B T"]],
    arguments: Any = (),
    *,
    slots: Sequence[int] | None = None,
    dont_know: DontKnow | None = None,
  ) -> tuple[Float[Array, ""], SlotScores]:
    """The sum of weight times loss over a batch, and the scores at `slots`; see `readout.weighted_loss`."""
    row, options = _readout_options(dont_know)
    unembedding = self.apply(params, method="unembedding")
    return weighted_loss(
      token_loss,
      hidden,
      unembedding,
      batch["targets"],
      row,
      batch["weights"],
      arguments,
      slots=slots,
      **self._options,
      **options,
    )

  @property
  def _options(self) -> dict[str, Any]:
    """The options of every readout of targets."""
    return {
      "soft_cap": self.decoder_config.soft_cap,
      "chunk_size": self.chunk_size,
      "shards": self.shards,
      "vocab_size": self.vocab_size,
      "frozen": self.is_frozen,
    }

  def slot_scores(
    self,
    params: Params,
    hidden: Float[Array, "... W D"],
    targets: Int[Array, "..."],
    *,
    slots: Sequence[int] | None = None,
    dont_know: DontKnow | None = None,
  ) -> SlotScores:
    """Reads the target of every token at `slots` (None: all); see `readout.slot_scores`."""
    row, options = _readout_options(dont_know)
    unembedding = self.apply(params, method="unembedding")
    return slot_scores(hidden, unembedding, targets, row, slots=slots, **self._options, **options)

  def token_scores(
    self, params: Params, hidden: Float[Array, "... D"], dont_know: DontKnow | None = None
  ) -> TokenScores:
    """The distribution over the vocabulary at slots; see `readout.token_scores`."""
    row, options = _readout_options(dont_know)
    return token_scores(
      hidden,
      self.apply(params, method="unembedding"),
      row,
      soft_cap=self.decoder_config.soft_cap,
      vocab_size=self.vocab_size,
      **options,
    )


def _readout_options(dont_know: DontKnow | None) -> tuple[Array | None, dict[str, Any]]:
  if dont_know is None:
    return None, {"prior": None}
  return dont_know.row, {"form": dont_know.form, "prior": dont_know.prior, "dont_know_bias": dont_know.bias}


def segment_mask(segment_ids: Int[Array, "B S"] | None) -> SegmentMask | None:
  """The mask that restricts attention to segments; None: plain causal attention."""
  return None if segment_ids is None else SegmentMask(segment_ids)


def boxed(value: Float[Array, "..."], *axes: str | None) -> nn.LogicallyPartitioned:
  """A parameter with the names of its logical axes; without names no axis is split."""
  return nn.LogicallyPartitioned(value, axes or (None,) * value.ndim)


def boxed_row(value: Float[Array, "... D"]) -> nn.LogicallyPartitioned:
  """A parameter whose last axis is the model's width."""
  return boxed(value, *(None,) * (value.ndim - 1), "embed")
