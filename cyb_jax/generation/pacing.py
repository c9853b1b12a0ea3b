"""Pacing policies: which slots of a token run in one iteration of the sampler's loop, and when a token is generated.

In every iteration each unfinished row runs one slot (`SelfPaced`, `NoPauses`) or all slots of one token, together
(`Constant`) or one after the other (`Sequential`). A self-paced row that requests a pause runs it in the next
iteration, while other rows of the batch may generate tokens; the number of iterations of a batch is the number of slots
of its longest row:

    iteration      1       2        3        4        5
    first row      the     <p1>     film     <p1>     <p2>      generates "film" after 1 pause, then ...
    second row     a       good     <p1>     one      .         generates "good" without a pause, "one" after 1 pause

A policy is a pytree: its numbers are arguments of the compiled program, while its layout and its class are static.

Letters: B rows, P tokens of the longest prompt, W slots of a token, Q slots that run together.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from cyb_jax.errors import InputError
from cyb_jax.generation.abilities import check_decodes, is_recurrent, num_prompt_pauses
from cyb_jax.generation.layout import SlotLayout
from cyb_jax.generation.options import SamplingOptions, is_count
from cyb_jax.generation.reading import (
  MixtureReading,
  StepBudget,
  StoppingRule,
  choose_reading,
  choose_step_budget,
  choose_stopping_rule,
)
from cyb_jax.generation.state import TOKEN, EndIds, SamplerState, SlotTrace
from cyb_jax.generation.token_samplers import TokenSampler
from cyb_jax.methods import Decoding, SlotInputs
from cyb_jax.readout import TokenScores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pacing(abc.ABC):
  """A pacing policy.

  Attributes:
    layout: the cache indices and positions of slots.
  """

  layout: SlotLayout = dataclasses.field(metadata={"static": True})

  @property
  def slots_per_iteration(self) -> int:
    """The number of slots of a row that one iteration runs."""
    return 1

  @property
  def states_read_per_iteration(self) -> int:
    """The number of hidden states of a row that one iteration multiplies with the unembedding."""
    return 1

  def slots_run(self, pauses: int) -> int:
    """The number of slots that ran for a generated token that was read after `pauses` pauses."""
    return 1 + pauses

  def states_read(self, pauses: int) -> int:
    """The number of these slots that were multiplied with the unembedding."""
    del pauses
    return 1

  def prefill(
    self, method: Decoding, params: PyTree, tokens: Int[Array, "B P"], lengths: Int[Array, "B"], cache: PyTree
  ) -> tuple[PyTree, Int[Array, "B"]]:
    """Runs the prompts without their last tokens, in one forward pass.

    Args:
      method, params: the sampler's method and its parameters.
      tokens: i32[B, P], P >= 1, the prompts without their last tokens, padded on the right.
      lengths: i32[B], the prompts' lengths, including their last tokens.
      cache: an empty cache.

    Returns:
      The cache, and i32[B], the cache index of each row's last token.
    """
    rows, length = tokens.shape
    width = self.layout.prompt_slots
    token, slot = jnp.divmod(jnp.arange(length * width), width)
    positions = self.layout.positions(token * self.layout.prompt_stride, slot)
    # The slots that pad a shorter prompt are never seen, and later slots overwrite them.
    _, cache = method.extend(
      params,
      SlotInputs(
        tokens=jnp.repeat(tokens, width, axis=1),
        slots=jnp.broadcast_to(slot, (rows, len(slot))),
        positions=jnp.broadcast_to(positions, (rows, len(positions))),
      ),
      cache,
      None,
    )
    return cache, (lengths - 1) * width

  @abc.abstractmethod
  def step(
    self, method: Decoding, params: PyTree, token_sampler: TokenSampler, end_ids: EndIds, state: SamplerState
  ) -> SamplerState:
    """One iteration: runs slots of every row, and generates a token in the rows that are ready."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OneSlot(Pacing):
  """Each iteration runs one slot of every row."""

  @abc.abstractmethod
  def pauses(self, scores: TokenScores, state: SamplerState) -> Bool[Array, "B"]:
    """bool[B], whether each row continues with a pause, given the scores [B] of its current slot."""

  def step(
    self, method: Decoding, params: PyTree, token_sampler: TokenSampler, end_ids: EndIds, state: SamplerState
  ) -> SamplerState:
    hidden, cache = method.extend(
      params,
      SlotInputs(
        tokens=state.token[:, None],
        slots=state.slot[:, None],
        positions=self.layout.positions(state.position, state.slot)[:, None],
      ),
      state.cache,
      state.cache_index + state.slot,
    )
    scores = method.token_scores(params, hidden[:, 0], state.slot)
    waits = self.pauses(scores, state) & ~state.finished
    emits = ~waits & ~state.finished
    token, log_prob = _draw(token_sampler, state, scores.log_probs)
    each = jax.tree.map(lambda x: x[:, None], scores)
    trace = _traced(state, state.slot[:, None], each, emits=emits, token=token, log_probs=scores.log_probs)
    after = state.emit(cache, emits, token=token, pauses=state.slot, log_prob=log_prob, end_ids=end_ids, trace=trace)
    return dataclasses.replace(
      self.layout.next_token(state, after, state.slot + 1),
      slot=jnp.where(waits, state.slot + 1, jnp.where(state.finished, state.slot, 0)),
      pause_budget=state.pause_budget - waits,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPauses(_OneSlot):
  """One slot per token, after the method's pauses after the prompt."""

  @classmethod
  def from_options(cls, method: Decoding, options: SamplingOptions) -> NoPauses:
    """
    Raises:
      InputError: an option requires pauses.
    """
    if options.max_pauses:
      raise InputError(
        f"max_pauses: {options.max_pauses} is set, but mode 'none' has no pauses; use 'self_paced' or 'constant'"
      )
    choose_stopping_rule(options)
    choose_step_budget(options, 1)
    return cls(layout=_layout(method, options, 0))

  def pauses(self, scores: TokenScores, state: SamplerState) -> Bool[Array, "B"]:
    return jnp.zeros_like(state.finished)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfPaced(_OneSlot):
  """One slot at a time; a pause runs if the model requests it and no limit denies it.

  Attributes:
    rule: when a pause is requested.
    step_budget: omega.
  """

  rule: StoppingRule
  step_budget: StepBudget

  @classmethod
  def from_options(cls, method: Decoding, options: SamplingOptions) -> SelfPaced | NoPauses:
    """The policy; `NoPauses` if the options or the method allow no pauses.

    Raises:
      InputError: options are incompatible.
    """
    pauses = _max_pauses(method, options)
    rule, step_budget = choose_stopping_rule(options), choose_step_budget(options, pauses + 1)
    layout = _layout(method, options, pauses)
    return cls(layout=layout, rule=rule, step_budget=step_budget) if pauses else NoPauses(layout=layout)

  def states_read(self, pauses: int) -> int:
    return 1 + pauses

  def pauses(self, scores: TokenScores, state: SamplerState) -> Bool[Array, "B"]:
    requests = self.rule.requests_pause(scores.log_dont_know, state)
    denied = (state.slot >= self.layout.num_slots - 1) | (state.pause_budget <= 0) | self.step_budget.denies(state)
    return requests & ~denied


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Pacing):
  """All W slots of a token in one forward pass, as in training.

  Attributes:
    reading: the rule that chooses the slot that is read, or the mixture of all slots.
    step_budget: omega.
  """

  reading: StoppingRule | MixtureReading
  step_budget: StepBudget

  @classmethod
  def from_options(cls, method: Decoding, options: SamplingOptions) -> Constant:
    """
    Raises:
      InputError: options are incompatible with each other or with the method.
    """
    if num_prompt_pauses(method):
      raise InputError(
        f"mode: 'constant' runs the same pauses after every token, but method {method.name!r} has pauses only after the"
        " prompt; use 'none'"
      )
    pauses = _max_pauses(method, options)
    return cls(
      layout=_layout(method, options, pauses),
      reading=choose_reading(options),
      step_budget=choose_step_budget(options, pauses + 1),
    )

  @property
  def slots_per_iteration(self) -> int:
    return self.layout.num_slots

  @property
  def states_read_per_iteration(self) -> int:
    return self.layout.num_slots

  def slots_run(self, pauses: int) -> int:
    return self.layout.num_slots

  def states_read(self, pauses: int) -> int:
    return self.layout.num_slots

  def step(
    self, method: Decoding, params: PyTree, token_sampler: TokenSampler, end_ids: EndIds, state: SamplerState
  ) -> SamplerState:
    rows, width = len(state.token), self.layout.num_slots
    slots = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (rows, width))
    hidden, cache = method.extend(
      params,
      SlotInputs(
        tokens=jnp.broadcast_to(state.token[:, None], (rows, width)),
        slots=slots,
        positions=self.layout.positions(state.position[:, None], slots),
      ),
      state.cache,
      state.cache_index,
    )
    scores = method.token_scores(params, hidden, slots)
    slot, log_probs = self.reading.read(scores, self.step_budget, state)
    token, log_prob = _draw(token_sampler, state, log_probs)
    pauses, emits = slot.astype(jnp.int32), ~state.finished
    trace = _traced(state, slots, scores, emits=emits, token=token, log_probs=log_probs)
    after = state.emit(cache, emits, token=token, pauses=pauses, log_prob=log_prob, end_ids=end_ids, trace=trace)
    return self.layout.next_token(state, after, width)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequential(Pacing):
  """All slots of a token in one iteration, one after the other: each slot's input is the previous slot's output."""

  @classmethod
  def from_options(cls, method: Decoding, options: SamplingOptions) -> Sequential:
    """
    Raises:
      InputError: an option requests another number of slots, or a choice of slots.
    """
    pauses = method.num_slots - 1
    always = f"but method {method.name!r} always runs a token's latent thoughts one after the other"
    if options.mode != "constant":
      raise InputError(f"mode: {options.mode!r}, {always}; use 'constant'")
    if options.max_pauses not in (None, pauses):
      raise InputError(f"max_pauses: {options.max_pauses}, {always}, {pauses} of them; leave it out")
    if options.prompt_pauses == "none":
      raise InputError(f"prompt_pauses: 'none', {always}, in the prompt too; use 'all'")
    if options.omega is not None:
      raise InputError(f"omega: {options.omega} is set, {always}; leave it out")
    return cls(layout=_layout(method, options, pauses))

  @property
  def slots_per_iteration(self) -> int:
    return self.layout.num_slots

  def prefill(
    self, method: Decoding, params: PyTree, tokens: Int[Array, "B P"], lengths: Int[Array, "B"], cache: PyTree
  ) -> tuple[PyTree, Int[Array, "B"]]:
    """See `Pacing.prefill`; runs token by token, which is exact and as slow as generating the tokens."""

    def run(carry: tuple[PyTree, Array], column: tuple[Array, Array]) -> tuple[tuple[PyTree, Array], None]:
      (cache, cache_index), (token, number) = carry, column
      _, cache, ran = method.run_token(
        params, token=token, position=jnp.full_like(cache_index, number), cache=cache, cache_index=cache_index
      )
      # The slots that pad a shorter prompt are never seen, and later slots overwrite them.
      return (cache, cache_index + jnp.where(number < lengths - 1, ran, 0)), None

    columns = tokens.T, jnp.arange(tokens.shape[1], dtype=jnp.int32)
    carry, _ = jax.lax.scan(run, (cache, jnp.zeros_like(lengths)), columns)
    return carry

  def step(
    self, method: Decoding, params: PyTree, token_sampler: TokenSampler, end_ids: EndIds, state: SamplerState
  ) -> SamplerState:
    hidden, cache, ran = method.run_token(
      params, token=state.token, position=state.position, cache=state.cache, cache_index=state.cache_index
    )
    last = jnp.full_like(ran, self.layout.num_slots - 1)
    scores = method.token_scores(params, hidden, last)
    token, log_prob = _draw(token_sampler, state, scores.log_probs)
    each, emits = jax.tree.map(lambda x: x[:, None], scores), ~state.finished
    trace = _traced(state, last[:, None], each, emits=emits, token=token, log_probs=scores.log_probs)
    after = state.emit(cache, emits, token=token, pauses=ran - 1, log_prob=log_prob, end_ids=end_ids, trace=trace)
    return self.layout.next_token(state, after, ran)


_MODES: dict[str, type[SelfPaced] | type[Constant] | type[NoPauses]] = {
  "self_paced": SelfPaced,
  "constant": Constant,
  "none": NoPauses,
}


def choose_pacing(method: Decoding, options: SamplingOptions) -> Pacing:
  """The pacing policy for the options and the method.

  Raises:
    InputError: the method does not decode, an option is out of its range, or options are incompatible.
  """
  check_decodes(method)
  options.check()
  _max_pauses(method, options)
  policy = Sequential if is_recurrent(method) else _MODES[options.mode]
  pacing = policy.from_options(method, options)
  if options.pause_budget is not None:
    if options.mode != "self_paced":
      raise InputError(
        f"pause_budget: {options.pause_budget} is set, but mode {options.mode!r} doesn't request pauses; use"
        " 'self_paced'"
      )
    if options.pause_budget < 0:
      raise InputError(f"pause_budget: {options.pause_budget} must not be negative")
  return pacing


def _max_pauses(method: Decoding, options: SamplingOptions) -> int:
  """K in generation.

  Raises:
    InputError: K is not in 0 .. K of training.
  """
  trained = method.num_slots - 1
  pauses = trained if options.max_pauses is None else options.max_pauses
  if not is_count(pauses) or pauses > trained:
    raise InputError(f"max_pauses: {pauses!r} must be in 0..{trained}, the numbers of pauses that training used")
  return pauses


def _layout(method: Decoding, options: SamplingOptions, pauses: int) -> SlotLayout:
  """The layout of slots, with at most `pauses` pauses after each generated token.

  Raises:
    InputError: pauses are requested for the prompt, but there are none.
  """
  if options.prompt_pauses == "all" and not pauses:
    raise InputError("prompt_pauses: 'all', but the maximum number of pauses is 0; use 'none'")
  default = "all" if options.mode == "constant" else "none"
  in_prompt = (options.prompt_pauses or default) == "all"
  return SlotLayout.of(method, pauses + 1, pauses_in_prompt=in_prompt)


def _traced(state: SamplerState, slots: Int[Array, "B Q"], scores: TokenScores, **emitted: Array) -> SlotTrace | None:
  """The trace after an iteration, if the state has one; see `SlotTrace.record`."""
  return None if state.trace is None else state.trace.record(state, slots, scores, **emitted)


def _draw(
  token_sampler: TokenSampler, state: SamplerState, log_probs: Float[Array, "B V"]
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
  """(i32[B], a token for every row; f32[B], its log-probability at temperature 1 and among all tokens)."""
  token = token_sampler.sample(state.keys(TOKEN), log_probs)
  return token, jnp.take_along_axis(log_probs, token[:, None], 1)[:, 0]
