"""Pause-training: one learned pause, at an ordinary position, between some tokens alone (Goyal et al. 2023, "Think
before you speak", https://arxiv.org/abs/2310.02226).

Parameters: `decoder`; where it can pause `pause_input` f32[1, D]. A token with pauses behind it is read once, at the
last of them. Where pauses lie in training (`method.pause_places`), and what evaluation and inference do:

- random (pretraining): a share `pause_fraction` of the window's T tokens, as pauses, at random places of its row, which
  is then cut back to T slots; tokens that are cut off have no weight, and are counted. The loss is at every slot whose
  next one is a token; the first token of a row is predicted in the window before, so that no pauses stand before it.
  Evaluation reads the text without pauses, since the paper measures such models on tasks alone; beside it (`loss`,
  `training_omega`) with pauses drawn as in training, by a fixed seed, in rows that have room for all.
- prefix (fine-tuning): K pauses between each prefix, whose tokens have no weight, and its target. So does evaluation.
  Rows have room for one prefix more than one every 32 tokens. In training targets beyond have no weight, and are
  counted; evaluation loses none, and reads prefixes beyond without pauses.
- none: nowhere, nor in evaluation. With 'prefix' of a run that starts from it, and with 'random' before either, these
  are the paper's 2 x 2 of standard and pause pretraining and fine-tuning.

Inference (text that is said, and requests that are scored) runs K pauses behind the prompt, wherever they lay in
training; with K = 0, none. K there may be another than in training, see `with_prompt_pauses`.

Dimensions: B batch, T tokens, S slots of a row, D model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cyb_jax.costs import flops
from cyb_jax.decoder import SegmentMask
from cyb_jax.errors import InputError
from cyb_jax.losses import last_slot_cross_entropy
from cyb_jax.methods.baseline import Plain
from cyb_jax.methods.interface import Batch, EvalOutput, Method, MethodConfig, Params, TokenLosses
from cyb_jax.pauses import Packing, lengths_at_random, lengths_behind_prefixes, pack

PLACES = ("random", "prefix", "none")
_TOKENS_PER_PREFIX = 32
# Evaluation draws too, the same for the same text.
_EVALUATION_SEED = 0


class PauseTraining(Plain):
  """Cross-entropy of every token, read at the last pause behind the one before it."""

  name = "pause_training"
  exports = False
  options = frozenset({"pause_places", "pause_fraction"})

  def validate(self) -> None:
    super().validate()
    places, fraction = self.config.pause_places, self.config.pause_fraction
    if places not in PLACES:
      raise InputError(f"method.pause_places: {places!r} is none of {', '.join(map(repr, PLACES))}")
    if not 0 < fraction < 1:
      raise InputError(f"method.pause_fraction: {fraction:g} must lie inside (0, 1)")
    if places != "random" and fraction != MethodConfig.pause_fraction:
      raise InputError(
        f"method.pause_fraction: {fraction:g} is set, but method.pause_places = {places!r} doesn't use it; leave it at"
        f" {MethodConfig.pause_fraction:g}"
      )

  def check_length(self, tokens: int) -> None:
    if self.config.pause_places == "random" and not self._drawn(tokens):
      raise InputError(
        f"method.pause_fraction: {self.config.pause_fraction:g} of a window of {tokens} tokens is no pause; give at"
        f" least {1 / tokens:.2g}"
      )

  @property
  def num_pauses(self) -> int:
    return int(self.config.pause_places != "none" or self.config.pauses > 0)

  @property
  def shifts_positions(self) -> bool:
    return True

  @property
  def prompt_pauses(self) -> int:
    return self.config.pauses

  def with_prompt_pauses(self, pauses: int) -> Method:
    if pauses and not self.num_pauses:
      raise InputError(
        f"--pauses: {pauses} is set, but the run has no pause (method.pause_places = 'none' and method.pauses = 0);"
        " leave it out"
      )
    return type(self)(
      dataclasses.replace(self.config, pauses=pauses),
      self.decoder.config,
      vocab_size=self.vocab_size,
      chunk_size=self.chunk_size,
      shards=self.shards,
      weights=self.weights,
    )

  @property
  def learns_targets(self) -> bool:
    return self.config.pause_places == "prefix"

  def prefixes_at_most(self, tokens: int) -> int:
    return 1 + tokens // _TOKENS_PER_PREFIX

  def loss(self, params: Params, batch: Batch, rng: Array, step: Any = None) -> TokenLosses:
    if self.config.pause_places == "none":
      return super().loss(params, batch, rng, step)
    length = batch["tokens"].shape[1]
    if self.config.pause_places == "random":
      lengths, given = lengths_at_random(rng, batch["tokens"], self._drawn(length)), True
    else:
      lengths, given = self._behind_prefixes(batch)
    reading, packing = self._read(params, batch, lengths, self._row_slots(length))
    return TokenLosses(
      loss=reading.loss,
      log_likelihood=-reading.loss,
      stopping=jnp.ones_like(reading.log_stopping),
      slots=lengths.astype(jnp.float32),
      kept=packing.kept & given,
    )

  def evaluate(self, params: Params, batch: Batch, omega: Any = None) -> EvalOutput:
    if self.config.pause_places != "prefix":
      return super().evaluate(params, batch, omega)
    lengths, _ = self._behind_prefixes(batch)
    reading, _ = self._read(params, batch, lengths, self._row_slots(batch["tokens"].shape[1]))
    return dataclasses.replace(reading, slots=lengths.astype(jnp.float32))

  def evaluate_as_trained(self, params: Params, batch: Batch, reading: EvalOutput) -> EvalOutput | None:
    if self.config.pause_places != "random":
      return None
    tokens = batch["tokens"]
    drawn = self._drawn(tokens.shape[1])
    lengths = lengths_at_random(jax.random.key(_EVALUATION_SEED), tokens, drawn)
    return self._read(params, batch, lengths, tokens.shape[1] + drawn)[0]

  def _drawn(self, tokens: int) -> int:
    """Pauses of a window, before its row is cut."""
    return round(self.config.pause_fraction * tokens)

  def _behind_prefixes(self, batch: Batch) -> tuple[Int[Array, "B T"], Array]:
    weights = batch["weights"]
    return lengths_behind_prefixes(weights, self.config.pauses, self.prefixes_at_most(weights.shape[1]))

  def _read(
    self, params: Params, batch: Batch, lengths: Int[Array, "B T"], row_slots: int
  ) -> tuple[EvalOutput, Packing]:
    """Every token at the last of its slots, `lengths` of them, which are packed into rows of S = `row_slots`."""
    length = batch["tokens"].shape[1]
    packing = pack(lengths, 1 + max(self.config.pauses, self._drawn(length)), row_slots)
    segment_ids = batch.get("segment_ids")
    hidden = self.hidden_slots(
      params,
      jnp.take_along_axis(batch["tokens"], packing.token, 1),
      packing.slot,
      jnp.arange(row_slots, dtype=jnp.int32)[None],
      None if segment_ids is None else SegmentMask(jnp.take_along_axis(segment_ids, packing.token, 1)),
    )
    scores = self.scores(params, _last_slots(hidden, packing), batch["targets"])
    reading = EvalOutput(
      loss=last_slot_cross_entropy(scores), scores=scores, log_stopping=jnp.zeros_like(scores.log_target)
    )
    return reading, packing

  def _row_slots(self, tokens: int) -> int:
    """S, slots of a row in training."""
    if self.config.pause_places == "prefix":
      return tokens + self.config.pauses * self.prefixes_at_most(tokens)
    return tokens

  @property
  def passes(self) -> int:
    return 2 if self.config.pause_places == "random" else 1

  def train_slots(self, tokens: int) -> float:
    return self._row_slots(tokens)

  def tokens_learnt(self, tokens: int) -> float:
    if self.config.pause_places != "random":
      return super().tokens_learnt(tokens)
    # Behind the first token pauses and tokens are mixed. Of the tokens that lie before the cut the last one is cut off
    # too where a pause lies behind it.
    drawn, others = self._drawn(tokens), tokens - 1
    return 1 + (others * others - drawn) / (others + drawn) if drawn else float(tokens)

  def forward_slots(self, tokens: int) -> float:
    return self._row_slots(tokens)

  def forward_cost(self, tokens: int, *, executed: bool = False) -> flops.Cost:
    return flops.pass_cost(self.decoder.config, **self._spent(tokens, executed))

  def train_cost(self, tokens: int, *, executed: bool = False) -> flops.Cost:
    return flops.train_pass_cost(
      self.decoder.config, **self._spent(tokens, executed), executed=executed, frozen=self.weights != "all"
    )

  def inference_cost(self, tokens: int, *, slots: float | None = None) -> flops.Cost:
    """Of `slots` a token, where a split was measured to have so many with its pauses; None: of text without pauses."""
    slots = 1 if slots is None else slots
    return flops.pass_cost(self.decoder.config, slots=slots, keys=flops.causal_keys(slots * tokens), slots_read=1)

  def _spent(self, tokens: int, executed: bool) -> dict[str, float]:
    row = self._row_slots(tokens)
    return {"slots": row / tokens, "keys": flops.causal_keys(row, executed), "slots_read": 1}


def _last_slots(hidden: Float[Array, "B S D"], packing: Packing) -> Float[Array, "B T 1 D"]:
  return jnp.take_along_axis(hidden, packing.places[..., -1, None], 1)[:, :, None]
