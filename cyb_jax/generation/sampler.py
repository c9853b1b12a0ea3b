"""The sampler generates a batch of rows, each self-paced, in one loop over a cache.

`pacing` describes what an iteration of the loop runs. The random draws of a row depend only on its seed, its number of
generated tokens and the slot: other rows, padding, capacity and the iteration do not change them.

Letters: B rows, P tokens of the longest prompt, N maximum number of new tokens, W maximum number of slots of a token.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Int, PyTree

from cyb_jax.generation.abilities import default_mode, num_prompt_pauses
from cyb_jax.generation.options import SamplingOptions
from cyb_jax.generation.pacing import Pacing, choose_pacing
from cyb_jax.generation.prompts import PromptBatch, random_keys
from cyb_jax.generation.state import EndIds, SamplerState
from cyb_jax.generation.token_samplers import TokenSampler, choose_token_sampler
from cyb_jax.methods import Decoding, SlotInputs

# The end tokens are padded to a multiple of this number; most models have one or two.
_END_IDS = 8
# Prompts are padded to a multiple of this many tokens, so that a few programs suffice for all prompt lengths.
_PROMPT_MULTIPLE = 16

Stop = Callable[[int, list[int]], int | None]
"""(row, its generated tokens) -> the number of tokens to keep, which finishes the row; None: continue."""

OnTokens = Callable[[int, list[int], list[int]], None]
"""(row, its new tokens, the pauses before each) -> None."""


@dataclasses.dataclass(frozen=True)
class Generation:
  """Generated text. Lists have one entry for each prompt.

  Attributes:
    tokens: ids, including the end token if one ended the row.
    pauses: for each token the index, from 0, of the slot that it was read from: in mode self_paced the number of pauses
      that ran for it; for the first token it includes the method's pauses after the prompt. With read 'mixture' all
      slots are read, and this is K.
    log_probs: for each token its log-probability in nats at the slot that it was read from, given that the slot
      answers, at temperature 1 and among all tokens; with read 'mixture' its log-probability in the mixture.
    slots: the number of decoder slots that ran to generate each row: tokens + pauses; in mode constant W slots per
      token. The prompt's slots are not counted.
    iterations: the number of iterations of the loop.
    cache_bytes: the bytes of keys and values.
  """

  tokens: list[list[int]]
  pauses: list[list[int]]
  log_probs: list[list[float]]
  slots: list[int]
  iterations: int
  cache_bytes: int


class Sampler:
  """Generates text with a method's parameters.

  A program is compiled for every combination of number of rows, padded prompt length and `max_new_tokens`. The numeric
  options (threshold, temperature, top_k, top_p, omega) are arguments of the program, so changing them does not
  recompile.

  Args:
    method: a method that decodes slot by slot.
    options: see `SamplingOptions`. None: the default options, in the method's default mode.

  Attributes:
    pacing: the pacing policy of the options.

  Raises:
    InputError: options are incompatible with each other or with the method.

  Example:
    >>> run = cyb_jax.load("runs/ap")
    >>> sampler = Sampler(run.method, SamplingOptions(temperature=0.8))
    >>> prompt = [*run.boundaries.start, *run.tokenizer.encode("The film")]
    >>> generated = sampler.generate(run.params, [prompt], max_new_tokens=20, end_id=run.boundaries.end_ids)
    >>> run.tokenizer.decode(generated.tokens[0]), generated.pauses[0]
  """

  def __init__(self, method: Decoding, options: SamplingOptions | None = None):
    self.method = method
    self.options = SamplingOptions(mode=default_mode(method)) if options is None else options
    self.pacing = choose_pacing(method, self.options)
    self._token_sampler = choose_token_sampler(self.options, method.vocab_size)

  def generate(
    self,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seeds: Sequence[int] | int = 0,
    end_id: int | Sequence[int] | None = None,
    context: int | None = None,
    stop: Stop | None = None,
    callback: OnTokens | None = None,
    chunk: int = 16,
    prompt_multiple: int = _PROMPT_MULTIPLE,
  ) -> Generation:
    """Continues prompts.

    Args:
      params: bare arrays.
      prompts: ids, at least one in each prompt; the lengths may differ. A row is one document, which begins with the
        run's start token: a later separator does not hide earlier tokens, whatever `data.document_mask` is.
      max_new_tokens: N, for every row.
      seeds: one seed for each row; or one number, to which the row's index is added.
      end_id: a row that generates this id, or one of these ids, is finished; None: no such id.
      context: the maximum number of tokens of a row, including the prompt; None: no limit.
      stop: called for each row every `chunk` iterations, until it finishes the row.
      callback: called every `chunk` iterations for each row that has new tokens.
      chunk: the number of iterations between two calls; without `stop` and `callback` the loop is not interrupted.
      prompt_multiple: the longest prompt is padded to a multiple of this number of tokens.

    Raises:
      InputError: no prompt is given, a prompt is empty or fills the context, or an id is outside the vocabulary.
    """
    state = self.start(
      params,
      prompts,
      max_new_tokens=max_new_tokens,
      seeds=seeds,
      context=context,
      prompt_multiple=prompt_multiple,
    )
    every = chunk if stop or callback else max_new_tokens * self.pacing.layout.num_slots
    watcher = _Watcher(len(prompts), stop, callback)
    done = np.zeros(len(prompts), bool)
    while not done.all():
      state = self.advance(params, state, every, end_id, done)
      done = watcher.watch(state)
    return self._generation(state, watcher.counts(state))

  def _generation(self, state: SamplerState, counts: list[int]) -> Generation:
    """The result with the first `counts[row]` tokens of each row."""
    tokens, pauses, log_probs = jax.device_get((state.tokens, state.pauses, state.log_probs))

    def kept(values: np.ndarray) -> list[list[Any]]:
      return [values[row, :count].tolist() for row, count in enumerate(counts)]

    return Generation(
      tokens=kept(tokens),
      pauses=kept(pauses),
      log_probs=kept(log_probs),
      slots=[sum(map(self.pacing.slots_run, row)) for row in kept(pauses)],
      iterations=int(state.iterations),
      cache_bytes=state.cache.nbytes,
    )

  def start(
    self,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seeds: Sequence[int] | int = 0,
    context: int | None = None,
    prompt_multiple: int = _PROMPT_MULTIPLE,
  ) -> SamplerState:
    """The state after the prefill of the prompts.

    One forward pass has run all tokens of the prompts except the last tokens. For a method with pauses after the prompt
    a second pass has run the last token and all of these pauses except the last pause.

    Arguments and errors: see `generate`.
    """
    batch = PromptBatch.of(
      prompts,
      max_new_tokens=max_new_tokens,
      context=context,
      vocab_size=self.method.vocab_size,
      multiple=prompt_multiple,
    )
    keys = random_keys(seeds, len(prompts))
    budget = self.options.pause_budget
    budgets = np.full(len(prompts), np.iinfo(np.int32).max if budget is None else budget, np.int32)
    return _start(self.method, max_new_tokens, self.pacing, params, batch, keys, budgets)

  def advance(
    self,
    params: PyTree,
    state: SamplerState,
    iterations: int,
    end_id: int | Sequence[int] | None = None,
    stopped: Bool[np.ndarray, "B"] | None = None,
  ) -> SamplerState:
    """Runs `iterations` more iterations, or fewer if all rows finish earlier.

    Args:
      params: bare arrays.
      state: the result of `start` or of an earlier call; its buffers are donated.
      iterations: the maximum number of iterations of this call.
      end_id: see `generate`.
      stopped: bool[B], rows that the caller finishes.
    """
    # `stopped` is an argument, because a state that the caller changes may have another sharding, which would compile
    # another program.
    stopped = np.zeros(len(state.token), bool) if stopped is None else stopped
    bounds = np.int32(iterations), _end_ids(end_id)
    return _advance(self.method, self.pacing, self._token_sampler, params, state, *bounds, stopped)

  def compile_abstract(
    self, params: PyTree, rows: int, max_new_tokens: int, row_sharding: Callable[[int], Sharding]
  ) -> jax.stages.Compiled:
    """Compiles the loop of `advance` from abstract shapes, for prompts of one token each.

    Args:
      params: as jax.ShapeDtypeStruct with shardings.
      rows: B.
      max_new_tokens: N; the cache has entries for N tokens with all their pauses.
      row_sharding: the sharding of an array, given the index of its axis of rows; -1: the array has no such axis.
    """

    def start(keys: Array, params: PyTree) -> SamplerState:
      one, none = jnp.ones(rows, jnp.int32), jnp.zeros((rows, 0), jnp.int32)
      return _start(self.method, max_new_tokens, self.pacing, params, PromptBatch(none, one, one, one), keys, one)

    def placed(x: Any, axis: int) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=row_sharding(axis))

    keys = jax.eval_shape(lambda: jax.vmap(jax.random.key)(jnp.zeros(rows, jnp.uint32)))
    state = jax.eval_shape(start, keys, params)
    cache = jax.tree.map(lambda x: placed(x, max(x.ndim - 4, 0)), state.cache)
    others = dataclasses.replace(state, cache=None)
    state = dataclasses.replace(jax.tree.map(lambda x: placed(x, 0 if x.ndim else -1), others), cache=cache)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    policies, ends = (self.pacing, self._token_sampler), jax.eval_shape(lambda: jnp.zeros(_END_IDS, jnp.int32))
    pacing, token_sampler, iterations, end_ids = jax.tree.map(lambda x: placed(x, -1), (*policies, scalar, ends))
    stopped = placed(jax.ShapeDtypeStruct((rows,), bool), 0)
    return _advance.lower(self.method, pacing, token_sampler, params, state, iterations, end_ids, stopped).compile()


def _end_ids(end_id: int | Sequence[int] | None) -> Int[np.ndarray, "E"]:
  """i32[E], the end tokens, padded with -1, so that a change of their number does not recompile."""
  if isinstance(end_id, numbers.Integral):
    end_id = [int(end_id)]
  ids = list(end_id or ())
  return np.array([*ids, *[-1] * (-len(ids) % _END_IDS or _END_IDS * (not ids))], np.int32)


class _Watcher:
  """Calls `stop` and `callback` between chunks of iterations, and keeps track of the rows that `stop` has finished."""

  def __init__(self, rows: int, stop: Stop | None, callback: OnTokens | None):
    self._stop, self._callback = stop, callback
    self._kept: list[int | None] = [None] * rows
    self._reported = [0] * rows

  def counts(self, state: SamplerState) -> list[int]:
    """The number of tokens of each row that belong to the result."""
    generated = np.asarray(state.num_generated).tolist()
    return [count if kept is None else kept for count, kept in zip(generated, self._kept)]

  def watch(self, state: SamplerState) -> Bool[np.ndarray, "B"]:
    """Calls the functions for every row; bool[B], which rows are finished."""
    # The cache is not fetched from the device.
    finished, tokens, pauses, generated = jax.device_get(
      (state.finished, state.tokens, state.pauses, state.num_generated)
    )
    for row, count in enumerate(generated.tolist()):
      if self._stop is not None and self._kept[row] is None:
        self._kept[row] = self._stop(row, tokens[row, :count].tolist())
      count = count if self._kept[row] is None else self._kept[row]
      start = self._reported[row]
      if self._callback is not None and count > start:
        self._callback(row, tokens[row, start:count].tolist(), pauses[row, start:count].tolist())
        self._reported[row] = count
    return finished | np.array([kept is not None for kept in self._kept])


def begin(
  method: Decoding,
  new: int,
  pacing: Pacing,
  params: PyTree,
  prompts: PromptBatch,
  seeds: Array,
  budgets: Int[Array, "B"],
) -> SamplerState:
  """The state after the prefill, see `Sampler.start`; traced into a compiled program.

  Args:
    method, params: the sampler's method and its parameters.
    new: N, the maximum number of new tokens of a row.
    pacing: the pacing policy.
    prompts: the prompts, one for each row.
    seeds: key[B], a random key of each row.
    budgets: i32[B], the largest total of pauses of each row.
  """
  rows, length = prompts.before.shape
  layout, paused = pacing.layout, num_prompt_pauses(method)
  cache = method.empty_cache(rows, layout.capacity(length, new) + paused)
  cache_index, position = jnp.zeros_like(prompts.lengths), (prompts.lengths - 1) * layout.prompt_stride
  if length:
    cache, cache_index = pacing.prefill(method, params, prompts.before, prompts.lengths, cache)
  if paused:
    slots = jnp.broadcast_to(jnp.arange(paused, dtype=jnp.int32), (rows, paused))
    _, cache = method.extend(
      params,
      SlotInputs(
        tokens=jnp.repeat(prompts.last[:, None], paused, 1),
        slots=slots,
        positions=layout.positions(position[:, None], slots),
      ),
      cache,
      cache_index,
    )
  return dataclasses.replace(
    SamplerState.empty(cache, rows, new),
    token=prompts.last,
    slot=jnp.full(rows, paused, jnp.int32),
    cache_index=cache_index,
    position=position,
    seeds=seeds,
    pause_budget=budgets,
    token_limit=prompts.limits,
    finished=jnp.zeros(rows, bool),
  )


def iterate(
  method: Decoding,
  pacing: Pacing,
  token_sampler: TokenSampler,
  params: PyTree,
  state: SamplerState,
  iterations: Int[Array, ""],
  end_ids: EndIds,
  stopped: Bool[Array, "B"],
) -> SamplerState:
  """The state after more iterations, see `Sampler.advance`; traced into a compiled program.

  Args:
    method, params: the sampler's method and its parameters.
    pacing: the pacing policy.
    token_sampler: the sampler of a token from its distribution.
    state: the state before.
    iterations: i32[], the maximum number of iterations.
    end_ids: the end tokens, see `EndIds`.
    stopped: bool[B], rows that the caller finishes.
  """
  state = dataclasses.replace(state, finished=state.finished | stopped)
  until = state.iterations + iterations

  def unfinished(state: SamplerState) -> Bool[Array, ""]:
    return (state.iterations < until) & ~state.finished.all()

  step = functools.partial(pacing.step, method, params, token_sampler, end_ids)
  return jax.lax.while_loop(unfinished, step, state)


_start = jax.jit(begin, static_argnames=("method", "new"))
_advance = jax.jit(iterate, static_argnames="method", donate_argnames="state")
