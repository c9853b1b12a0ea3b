"""PonderLM-2: latent thoughts. Every token owns K + 1 slots, and each slot is fed what came out of the one before it.

E_0 is the token's embedding, and E_i, the input of latent slot i, the decoder's own last hidden state at slot i - 1
behind the final norm, as it is. Attention is causal over the slots in order, those of a token stand at its position,
and slot K is read. https://arxiv.org/abs/2509.23184

Run one after the other, slots can't be trained in parallel. So inputs are guessed and mended: K passes that grow the
stream, pass i over the slots 0 .. i - 1 of all tokens; J Jacobi passes over the whole stream, each of which renews all
inputs at once; and the pass that is read. With K = 2, tokens a and b, o what came out of the slots of the pass before:

    grow 1      a           b
    grow 2      a o0        b o0
    Jacobi      a o0 o1     b o0 o1      J times
    read        a o0 o1     b o0 o1

A pass whose inputs are right up to some slot gives the right input of the next one: after T*K passes at most all are
those that decoding has, one slot after the other (`run_token`). J is drawn for each step, evaluation takes the most.
Gradients flow through all passes.

Dimensions: B batch, T tokens, W slots, K = W - 1 latent ones, S slots of a row, n slots of a token in a pass, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from cyb_jax.costs import flops
from cyb_jax.decoder import KeyWeights, SegmentMask
from cyb_jax.errors import InputError
from cyb_jax.methods.interface import Batch, Params, TokenLosses
from cyb_jax.methods.tbys import Tbys


class PonderLM2(Tbys):
  """Cross-entropy at slot K, which alone is read; what the others would say shows what each thought is worth."""

  name = "ponderlm2"
  options = frozenset({"jacobi"})
  exports = False
  one_pass = False
  self_paces = False
  feeds_back = True

  def validate(self) -> None:
    super().validate()
    jacobi = self.config.jacobi
    if jacobi is None or len(jacobi) != 2 or not 0 <= jacobi[0] <= jacobi[1]:
      raise InputError(
        f"method.jacobi: {':'.join(map(str, jacobi or ()))!r} must be two numbers, the fewest passes and the most, such"
        " as '2:3'"
      )

  @property
  def num_pauses(self) -> int:
    """Latent slots have no embedding of their own."""
    return 0

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T W D"]:
    return self._hidden(params, batch, self.config.jacobi[1], pruned=True)

  def _hidden(
    self, params: Params, batch: Batch, jacobi: int | Int[Array, ""], *, pruned: bool
  ) -> Float[Array, "B T W D"]:
    """What comes out of all slots; `pruned`: as at inference, where that leaves slots out."""
    tokens, segment_ids = batch["tokens"], batch.get("segment_ids")

    def mask(slots: int) -> SegmentMask | None:
      return None if segment_ids is None else SegmentMask(jnp.repeat(segment_ids, slots, 1))

    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return self._ponder(params, tokens, positions, mask, jacobi, pruned)

  def hidden_slots(
    self,
    params: Params,
    tokens: Int[Array, "B S"],
    slots: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    mask: Bool[Array, "B 1 S S"],
  ) -> Float[Array, "B S D"]:
    """As in `PausedMethod`, but by the passes of `hidden`. All slots of a token lie side by side, the first one at a
    multiple of W.
    """
    del slots  # by their places
    width = self.num_slots
    rows, places = tokens.shape
    whole = places - places % width

    def of_pass(count: int) -> Bool[Array, "B 1 T*n T*n"]:
      split = mask[:, 0, :whole, :whole].reshape(len(mask), whole // width, width, whole // width, width)
      return split[:, :, :count, :, :count].reshape(len(mask), 1, -1, whole // width * count)

    first = slice(0, whole, width)
    hidden = self._ponder(params, tokens[:, first], positions[:, first], of_pass, self.config.jacobi[1], pruned=True)
    return jnp.pad(hidden.reshape(rows, whole, -1), ((0, 0), (0, places - whole), (0, 0)))

  def _ponder(
    self,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "#B T"],
    mask: Callable[[int], Any],
    jacobi: int | Int[Array, ""],
    pruned: bool,
  ) -> Float[Array, "B T W D"]:
    """All passes.

    Args:
      params: bare arrays.
      tokens: i32[B, T].
      positions: i32[1 or B, T].
      mask: of a pass over so many slots of each token, see `Decoder.__call__`.
      jacobi: J; traced, it lies in `method.jacobi`.
      pruned: see `_hidden`.
    """

    def run(inputs: Float[Array, "B T n D"], weights: Float[Array, "B T W"] | None) -> Float[Array, "B T n D"]:
      rows, length, count, width = inputs.shape
      if weights is not None:
        weights = KeyWeights(weights[..., :count].reshape(rows, -1))
      outputs = self._run(
        params,
        inputs.reshape(rows, length * count, width),
        jnp.repeat(positions, count, 1),
        mask=mask(count),
        key_weights=weights,
      )
      return outputs.reshape(rows, length, count, width)

    def renewed(state: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
      inputs, weights = state
      outputs = run(inputs, weights)
      inputs = jnp.concatenate([inputs[:, :, :1], outputs[:, :, :-1]], 2)
      return inputs, self._key_weights(params, outputs[:, :, 0], pruned)

    embedded = self.decoder.apply({"params": params["decoder"]}, tokens, method="embed")[:, :, None]
    inputs, weights = embedded, None
    for count in range(1, self.num_slots):
      outputs = run(inputs, weights)
      if count == 1:
        weights = self._key_weights(params, outputs[:, :, 0], pruned)
      inputs = jnp.concatenate([embedded, outputs], 2)
    fewest, most = (jacobi, jacobi) if isinstance(jacobi, int) else self.config.jacobi
    state = inputs, weights
    for number in range(most):
      if number < fewest:
        state = renewed(state)
      else:
        # A pass that isn't drawn isn't run, nor is its gradient.
        state = jax.lax.cond(number < jacobi, renewed, lambda state: state, state)
    return run(*state)

  def _run(self, params: Params, inputs: Array, positions: Array, **options: Any) -> Float[Array, "B S D"]:
    variables = {"params": params["decoder"]}
    hidden, _ = self.decoder.apply(variables, inputs, positions, **options, method="run_layers")
    return self.decoder.apply(variables, hidden, method="finish")

  def _key_weights(self, params: Params, first: Float[Array, "B T D"], pruned: bool) -> Float[Array, "B T W"] | None:
    """Log of how much the slots count as keys, from what came out of the tokens' first ones; None: all alike."""
    del params, first, pruned
    return None

  def draw_passes(self, rng: Array) -> int | Int[Array, ""]:
    """J of a step. It hangs on the step's key alone: all rows of a step are passed as often."""
    fewest, most = self.config.jacobi
    return most if fewest == most else jax.random.randint(rng, (), fewest, most + 1)

  def loss(self, params: Params, batch: Batch, rng: Array, step: Any = None) -> TokenLosses:
    hidden = self._hidden(params, batch, self.draw_passes(rng), pruned=False)
    return self.loss_of(params, hidden, batch)

  def extend(self, *args: Any, **options: Any) -> Any:
    """Not to be had: what a latent slot is fed isn't known before the one before it has run; see `run_token`."""
    raise TypeError(f"method {self.name!r} runs a token's slots one after the other: call run_token")

  def run_token(
    self, params: Params, token: Int[Array, "B"], position: Int[Array, "B"], cache: PyTree, place: Int[Array, "B"]
  ) -> tuple[Float[Array, "B D"], PyTree, Int[Array, "B"]]:
    variables = {"params": params["decoder"]}
    state = self.decoder.apply(variables, token[:, None], method="embed")
    for slot in range(self.num_slots):
      state, cache = self.decoder.apply(variables, state, position[:, None], cache, place + slot, method="extend")
    return state[:, 0], cache, jnp.full_like(place, self.num_slots)

  def _passes(self, jacobi: float) -> list[tuple[int, float]]:
    """(slots of each token, how many passes over so many), of growth and behind it."""
    return [(count, 1.0) for count in range(1, self.num_slots)] + [(self.num_slots, jacobi + 1.0)]

  @property
  def _mean_jacobi(self) -> float:
    return sum(self.config.jacobi) / 2

  def train_slots(self, tokens: int) -> float:
    return tokens * sum(count * times for count, times in self._passes(self._mean_jacobi))

  def forward_slots(self, tokens: int) -> float:
    return tokens * sum(count * times for count, times in self._passes(self.config.jacobi[1]))

  @property
  def times_run(self) -> float:
    return self.forward_slots(1) / self.num_slots

  def _routing_cost(self, jacobi: float) -> flops.Cost:
    """Of what weighs keys, in all passes of a forward."""
    del jacobi
    return flops.Cost()

  @property
  def _slots_read(self) -> float:
    """States read out in one evaluation forward."""
    return self.num_slots

  def forward_cost(self, tokens: int, *, executed: bool = False) -> flops.Cost:
    jacobi = self.config.jacobi[1]
    cost = flops.pass_cost(self.decoder.config, slots=0, keys=0, slots_read=self._slots_read)
    for count, times in self._passes(jacobi):
      keys = flops.causal_keys(count * tokens, executed)
      cost += flops.pass_cost(self.decoder.config, slots=count, keys=keys).times(times)
    return cost + self._routing_cost(jacobi)

  def train_cost(self, tokens: int, *, executed: bool = False) -> flops.Cost:
    options = {"executed": executed, "frozen": self.weights != "all"}
    cost = flops.train_pass_cost(self.decoder.config, slots=0, keys=0, slots_read=1, **options)
    for count, times in self._passes(self._mean_jacobi):
      keys = flops.causal_keys(count * tokens, executed)
      cost += flops.train_pass_cost(self.decoder.config, slots=count, keys=keys, **options).times(times)
    return cost + self._routing_cost(self._mean_jacobi).times(3)

  def inference_cost(self, tokens: int, *, slots: float | None = None) -> flops.Cost:
    """One slot after the other, on a cache; one state a token is read."""
    if slots is not None:
      raise ValueError(f"slots: {slots}, but method {self.name!r} runs all of them")
    return self._decoding_cost(tokens, self.num_slots)

  def _decoding_cost(self, tokens: int, slots: float) -> flops.Cost:
    return flops.pass_cost(self.decoder.config, slots=slots, keys=flops.causal_keys(slots * tokens), slots_read=1)
