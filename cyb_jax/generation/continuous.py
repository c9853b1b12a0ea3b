"""Continuous batching: a fixed number of rows, which requests join and leave while other rows go on.

A row is prefilled alone, by a program for its padded length, and copied into the batch; then all rows advance together.
The tokens of a request are those of `Sampler` for the same prompt, options and seed, whatever the other rows do: the
rows of a program do not interact, and the random draws of a row depend on its seed alone.

    rows       iterations 1-4     iterations 5-8     iterations 9-12
    row 0      request a          request a          request c (a is finished)
    row 1      (free)             request b          request b

The options of a request are arrays with an entry for each row. Options that change the arrangement of slots in the
cache (`Lane`) need a batch of their own.

Letters: B rows, P tokens of a padded prompt, N tokens that one call generates in a row, W slots of a token,
A alternatives of a token, E end tokens, L tokens of the context.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt

from cyb_jax.errors import InputError, check_seed
from cyb_jax.generation.abilities import num_prompt_pauses
from cyb_jax.generation.layout import SlotLayout
from cyb_jax.generation.options import SamplingOptions
from cyb_jax.generation.pacing import Constant, Pacing, SelfPaced, Sequential, choose_pacing
from cyb_jax.generation.prompts import PromptBatch
from cyb_jax.generation.reading import RowReading, StepBudget
from cyb_jax.generation.sampler import begin, iterate
from cyb_jax.generation.state import SamplerState, SlotTrace
from cyb_jax.generation.token_samplers import RowTokenSampler
from cyb_jax.methods import Decoding

# The largest number of alternatives of a token that a request can ask for.
MAX_ALTERNATIVES = 20
# The largest number of end tokens of a request.
_END_IDS = 8
_SHORTEST_PROMPT = 16
_NO_BUDGET = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Lane:
  """The options that all rows of a batch share; hashable.

  Attributes:
    pacing: the class of the pacing policy. Mode none is mode self_paced without pauses.
    layout: the arrangement of slots. In mode self_paced it has space for the most pauses of a request.
  """

  pacing: type[Pacing]
  layout: SlotLayout

  @classmethod
  def of(cls, method: Decoding, options: SamplingOptions) -> Lane:
    """The lane of a request's options.

    Raises:
      InputError: options are incompatible with each other or with the method; or omega is set, which rows cannot have.
    """
    if options.omega is not None:
      raise InputError(
        f"omega: {options.omega} is set, but rows of a running batch share one step budget; leave it out"
      )
    pacing = choose_pacing(method, options)
    if isinstance(pacing, Constant | Sequential):
      return cls(type(pacing), pacing.layout)
    return cls(SelfPaced, dataclasses.replace(pacing.layout, num_slots=method.num_slots))


@dataclasses.dataclass(frozen=True)
class RowRequest:
  """What a row generates.

  Attributes:
    prompt: ids, at least one.
    max_new_tokens: the largest number of generated tokens.
    seed: the seed of the row's random draws.
    options: the options of sampling; `Lane.of(method, options)` is the lane of the batch.
    end_ids: the row ends with one of these tokens.
    alternatives: the number of most likely tokens that are recorded for each token, at most `MAX_ALTERNATIVES`.
  """

  prompt: tuple[int, ...]
  max_new_tokens: int
  seed: int
  options: SamplingOptions
  end_ids: tuple[int, ...] = ()
  alternatives: int = 0


@dataclasses.dataclass(frozen=True)
class NewTokens:
  """The tokens that a row has generated in one call. Lists have one entry for each token.

  Attributes:
    tokens, pauses, log_probs: see `Generation`.
    log_dont_know: for each slot that ran, log d; NaN if it is not known.
    log_targets: for each slot that ran, the log-probability of the token, given that the slot answers; NaN if it is not
      known.
    alternatives: the most likely tokens of the distribution that the token was read from: (id, log-probability).
    finished: whether the row is complete; it is then free.
  """

  tokens: list[int]
  pauses: list[int]
  log_probs: list[float]
  log_dont_know: list[list[float]]
  log_targets: list[list[float]]
  alternatives: list[list[tuple[int, float]]]
  finished: bool


class RunningBatch:
  """A batch of one lane, whose rows requests join and leave.

  The programs are compiled on first use: one for every padded prompt length (`prompt_lengths`), and one for `advance`
  for every number of iterations.

  Args:
    method: a method that decodes slot by slot.
    params: bare arrays.
    lane: the shared options.
    rows: B.
    context: L, the maximum number of tokens of a row, including the prompt.

  Attributes:
    free: the free rows.
  """

  def __init__(self, method: Decoding, params: PyTree, lane: Lane, *, rows: int, context: int):
    self.method, self.params, self.lane, self.context = method, params, lane, context
    self.free = set(range(rows))
    self._stopped = np.zeros(rows, bool)
    self._options = _RowOptions.empty(rows)
    self._alternatives = np.zeros(rows, np.int32)
    self._capacity = _capacity(lane.layout, context, num_prompt_pauses(method))
    # The state is put where the results of the programs are, since another placement would compile them twice.
    state = _empty(method, lane.layout, rows, self._capacity, context)
    self._state = jax.device_put(state, jax.tree.leaves(params)[0].sharding)

  @property
  def nbytes(self) -> int:
    """The bytes of keys and values."""
    return self._state.cache.nbytes

  @property
  def prompt_lengths(self) -> list[int]:
    """The lengths P to which prompts without their last token are padded."""
    return _padded_lengths(self.context)

  def join(self, request: RowRequest) -> int:
    """Prefills a request's prompt into a free row; returns the row.

    Raises:
      InputError: the prompt is empty or fills the context, an id or the seed is out of its range, or there are too many
        end tokens.
    """
    if len(request.end_ids) > _END_IDS:
      raise InputError(f"end_ids: {len(request.end_ids)} tokens; a row ends with one of at most {_END_IDS}")
    before = len(request.prompt) - 1
    padded = next((length for length in self.prompt_lengths if length >= before), None)
    batch = PromptBatch.of(
      [request.prompt],
      max_new_tokens=request.max_new_tokens,
      context=self.context,
      vocab_size=self.method.vocab_size,
      multiple=padded or 1,
    )
    check_seed("seed", request.seed)
    row = min(self.free)
    budget = request.options.pause_budget
    self._state = _join(
      self.method,
      self._pacing(),
      self.params,
      self._state,
      np.int32(row),
      batch,
      np.uint32(request.seed),
      np.array([_NO_BUDGET if budget is None else budget], np.int32),
      np.array([request.alternatives], np.int32),
    )
    self._options = self._options.with_row(row, request, self.method.vocab_size)
    self._alternatives[row] = request.alternatives
    self._stopped = _with_entry(self._stopped, row, False)
    self.free.discard(row)
    return row

  def leave(self, row: int) -> None:
    """Ends the request of a row, which becomes free."""
    self._stopped = _with_entry(self._stopped, row, True)
    self.free.add(row)

  def advance(self, iterations: int) -> dict[int, NewTokens]:
    """Runs `iterations` more iterations of all rows, or fewer if all rows finish earlier.

    Returns:
      For each row that is not free, its new tokens. The rows that are finished become free.
    """
    active = [row for row in range(len(self._stopped)) if row not in self.free]
    self._state, output = _run(
      self.method,
      iterations,
      self._pacing(),
      self._options.token_sampler(),
      self.params,
      self._state,
      self._options.end_ids,
      self._stopped,
    )
    output = jax.device_get(output)
    new = {row: self._new_tokens(output, row) for row in active}
    for row, tokens in new.items():
      if tokens.finished:
        self.leave(row)
    return new

  def _pacing(self) -> Pacing:
    """The pacing policy of all rows, with the options of each row."""
    reading, layout = self._options.reading(), self.lane.layout
    if self.lane.pacing is SelfPaced:
      return SelfPaced(layout=layout, rule=reading, step_budget=StepBudget())
    if self.lane.pacing is Constant:
      return Constant(layout=layout, reading=reading, step_budget=StepBudget())
    return Sequential(layout=layout)

  def _new_tokens(self, output: _Output, row: int) -> NewTokens:
    count, pacing = int(output.counts[row]), self.lane.pacing
    pauses = output.pauses[row, :count].tolist()
    num_slots = self.lane.layout.num_slots
    ran = [count + 1 if pacing is SelfPaced else num_slots for count in pauses]

    def of_slots(values: np.ndarray) -> list[list[float]]:
      # The pauses after a prompt may be more than the slots of a token; their scores are not recorded.
      each = zip(values[row, :count].tolist(), ran)
      return [[*scores[:slots], *[math.nan] * (slots - len(scores))] for scores, slots in each]

    wanted = int(self._alternatives[row])
    ids, log_probs = (x[row, :count, :wanted].tolist() for x in (output.top_ids, output.top_log_probs))
    return NewTokens(
      tokens=output.tokens[row, :count].tolist(),
      pauses=pauses,
      log_probs=output.log_probs[row, :count].tolist(),
      log_dont_know=of_slots(output.log_dont_know),
      log_targets=of_slots(output.log_target),
      alternatives=[list(zip(*each)) for each in zip(ids, log_probs)],
      finished=bool(output.finished[row]),
    )


@dataclasses.dataclass(frozen=True)
class _RowOptions:
  """The options of all rows, on the host; see `SamplingOptions`.

  The arrays are never changed in place, because jax may use the memory of a NumPy array without a copy.
  """

  draws: Bool[np.ndarray, "B"]
  threshold: Float[np.ndarray, "B"]
  mixes: Bool[np.ndarray, "B"]
  max_pauses: Int[np.ndarray, "B"]
  temperature: Float[np.ndarray, "B"]
  top_k: Int[np.ndarray, "B"]
  top_p: Float[np.ndarray, "B"]
  end_ids: Int[np.ndarray, "B E"]

  @classmethod
  def empty(cls, rows: int) -> _RowOptions:
    def full(value: float, dtype: Any) -> np.ndarray:
      return np.full(rows, value, dtype)

    return cls(
      draws=full(0, bool),
      threshold=full(0.5, np.float32),
      mixes=full(0, bool),
      max_pauses=full(0, np.int32),
      temperature=full(0, np.float32),
      top_k=full(1, np.int32),
      top_p=full(1, np.float32),
      end_ids=np.full((rows, _END_IDS), -1, np.int32),
    )

  def with_row(self, row: int, request: RowRequest, vocab_size: int) -> _RowOptions:
    """The options with those of a request, which `Lane.of` has checked, in a row."""
    options = request.options
    pauses = _NO_BUDGET if options.max_pauses is None else options.max_pauses
    values = {
      "draws": options.read == "sample",
      "threshold": options.threshold,
      "mixes": options.read == "mixture",
      "max_pauses": 0 if options.mode == "none" else pauses,
      "temperature": options.temperature,
      "top_k": min(options.top_k or vocab_size, vocab_size),
      "top_p": options.top_p,
      "end_ids": [*request.end_ids, *[-1] * (_END_IDS - len(request.end_ids))],
    }
    return _RowOptions(**{name: _with_entry(getattr(self, name), row, value) for name, value in values.items()})

  def reading(self) -> RowReading:
    return RowReading(self.draws, self.threshold, self.mixes, self.max_pauses)

  def token_sampler(self) -> RowTokenSampler:
    return RowTokenSampler(self.temperature, self.top_k, self.top_p)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Output:
  """The new tokens of all rows, padded; see `NewTokens` and `SlotTrace`."""

  counts: Int[Array, "B"]
  finished: Bool[Array, "B"]
  tokens: Int[Array, "B N"]
  pauses: Int[Array, "B N"]
  log_probs: Float[Array, "B N"]
  log_dont_know: Float[Array, "B N W"]
  log_target: Float[Array, "B N W"]
  top_ids: Int[Array, "B N A"]
  top_log_probs: Float[Array, "B N A"]


def _with_entry(values: np.ndarray, row: int, value: Any) -> np.ndarray:
  """A copy with another value in a row."""
  values = values.copy()
  values[row] = value
  return values


def _padded_lengths(context: int) -> list[int]:
  """0, and powers of two from 16 on, up to the longest prompt without its last token."""
  longest = max(context - 2, 0)
  lengths, length = [0], _SHORTEST_PROMPT
  while lengths[-1] < longest:
    lengths.append(min(length, longest))
    length *= 2
  return lengths


def _capacity(layout: SlotLayout, context: int, prompt_pauses: int) -> int:
  """The number of cache entries of a row, for any prompt that the context has space for."""
  longest = max(_padded_lengths(context))
  # The number is linear in the length of the prompt, so it is largest for the shortest or the longest prompt.
  return max(layout.capacity(0, max(context - 1, 1)), layout.capacity(longest, 1)) + prompt_pauses


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _empty(method: Decoding, layout: SlotLayout, rows: int, capacity: int, context: int) -> SamplerState:
  trace = SlotTrace.empty(rows, context, layout.num_slots, method.vocab_size, MAX_ALTERNATIVES)
  return SamplerState.empty(method.empty_cache(rows, capacity), rows, context, trace)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _join(
  method: Decoding,
  pacing: Pacing,
  params: PyTree,
  state: SamplerState,
  row: Int[Array, ""],
  prompt: PromptBatch,
  seed: UInt[Array, ""],
  budget: Int[Array, "1"],
  alternatives: Int[Array, "1"],
) -> SamplerState:
  """The state with a request in a row; `prompt`, `budget` and `alternatives` have one row."""
  # The key is made in the program, because a dispatch of its own would take as long as the program.
  one = begin(method, 1, pacing, params, prompt, jax.random.key(seed)[None], budget)

  def put(whole: Array, part: Array, axis: int = 0) -> Array:
    """`whole` with `part`, which has one row and may have fewer cache entries, in the row."""
    if jnp.issubdtype(whole.dtype, jax.dtypes.prng_key):
      return whole.at[row].set(part[0])
    start = [row if i == axis else 0 for i in range(whole.ndim)]
    return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), start)

  names = ("token", "slot", "cache_index", "position", "seeds", "pause_budget", "token_limit", "num_generated",
    "finished")  # fmt: skip
  # Entries after the prompt's are of earlier requests; no slot sees them before it overwrites them.
  cache = jax.tree.map(lambda whole, part: put(whole, part, max(whole.ndim - 4, 0)), state.cache, one.cache)
  assert state.trace is not None
  trace = dataclasses.replace(
    state.trace,
    log_dont_know=state.trace.log_dont_know.at[row].set(jnp.nan),
    log_target=state.trace.log_target.at[row].set(jnp.nan),
    log_probs=state.trace.log_probs.at[row].set(jnp.nan),
    num_alternatives=state.trace.num_alternatives.at[row].set(alternatives[0]),
  )
  fields = {name: put(getattr(state, name), getattr(one, name)) for name in names}
  return dataclasses.replace(state, cache=cache, trace=trace, **fields)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _run(
  method: Decoding,
  iterations: int,
  pacing: Pacing,
  token_sampler: RowTokenSampler,
  params: PyTree,
  state: SamplerState,
  end_ids: Int[Array, "B E"],
  stopped: Bool[Array, "B"],
) -> tuple[SamplerState, _Output]:
  # The count would overflow in a batch that runs for weeks.
  state = dataclasses.replace(state, iterations=jnp.zeros_like(state.iterations))
  first = state.num_generated
  state = iterate(method, pacing, token_sampler, params, state, jnp.int32(iterations), end_ids, stopped)
  columns = first[:, None] + jnp.arange(iterations)

  def taken(values: Array) -> Array:
    index = columns.reshape(columns.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, 1, mode="clip")

  trace = state.trace
  return state, _Output(
    counts=state.num_generated - first,
    finished=state.finished,
    tokens=taken(state.tokens),
    pauses=taken(state.pauses),
    log_probs=taken(state.log_probs),
    log_dont_know=taken(trace.log_dont_know),
    log_target=taken(trace.log_target),
    top_ids=taken(trace.top_ids),
    top_log_probs=taken(trace.top_log_probs),
  )
