"""The sampler: a batch of rows, each at its own pace, in one loop over a cache.

In every iteration each live row runs one slot (mode self_paced; in mode constant all slots of one token, together, or
one after the other where each is fed with the one before it). A row that
pauses runs its next pause while its neighbour speaks, so a batch takes as many iterations as its longest row has slots:

    iteration      1       2        3        4        5
    first row      the     <p1>     film     <p1>     <p2>      says "film" after 1 pause, then ...
    second row     a       good     <p1>     one      .         says "good" at once, "one" after 1 pause

What a row draws hangs on its seed, on how many tokens it has said and on the slot, and on nothing else: neighbours,
padding, capacity and the iteration change no draw.

Letters: B rows, P tokens of the longest prompt, N new tokens at most, W slots a token may have, Q slots that run
together, C places in the cache, V words.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Int, PyTree

from cyb_jax.decoder import Cache
from cyb_jax.errors import InputError
from cyb_jax.generation.options import Plan, SamplingOptions, default_mode, plan
from cyb_jax.methods.paused import PausedMethod
from cyb_jax.stopping import hard_slot, log_stopping_distribution, normalize

# Prompts are padded to a multiple of this, so that few lengths mean few programs.
_PROMPT_MULTIPLE = 16
# What is drawn for a slot.
_WORLD, _STOP, _WORD = range(3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
  """Where every row stands. What the loop carries, and donates.

  Attributes:
    cache: of the slots that are the rows' contexts.
    token: i32[B], the token whose slots are running: the prompt's last one, then the last one that was said.
    slot: i32[B], which of them runs next: 0 is the token itself, k its k-th pause. In mode constant always 0.
    place: i32[B], where in the cache the token's own slot lies.
    position: i32[B], the rotary position of the token.
    seeds: key[B], of every row.
    budget: i32[B], pauses that the row may still ask for.
    limit: i32[B], tokens that it may say.
    said: i32[B], tokens that it has said.
    finished: bool[B], whether it runs no more.
    tokens: i32[B, N], what it has said; -1 behind.
    pauses: i32[B, N], after how many pauses.
    log_probs: f32[B, N], with what log-probability, see `Generation`.
    iterations: i32[], of the loop.
  """

  cache: Cache
  token: Int[Array, "B"]
  slot: Int[Array, "B"]
  place: Int[Array, "B"]
  position: Int[Array, "B"]
  seeds: Array
  budget: Int[Array, "B"]
  limit: Int[Array, "B"]
  said: Int[Array, "B"]
  finished: Bool[Array, "B"]
  tokens: Int[Array, "B N"]
  pauses: Int[Array, "B N"]
  log_probs: Float[Array, "B N"]
  iterations: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Generation:
  """What was said. Lists have a row for each prompt.

  Attributes:
    tokens: ids, `end_id` included where a row ended with it.
    pauses: of each token, the slot that it was read from, counted from 0: in mode self_paced the pauses that were run
      for it; of the first one, those behind the prompt, where the method has such. With read 'mixture' all slots are
      read, and this is K.
    log_probs: of each token, nats: log p of the token at the slot that it was read from, given an answer, at
      temperature 1 and of all words; with read 'mixture' of the mixture.
    slots: decoder slots that were run to say each row: tokens + pauses; in mode constant W a token. The prompt's are
      not counted.
    iterations: of the loop.
    cache_bytes: of keys and values.
  """

  tokens: list[list[int]]
  pauses: list[list[int]]
  log_probs: list[list[float]]
  slots: list[int]
  iterations: int
  cache_bytes: int


class Sampler:
  """Says text with a method's parameters.

  Compiled once for every number of rows, (padded) prompt length and `max_new_tokens`; the numbers among the options
  (threshold, temperature, top_k, top_p, omega) are arguments of the program and cost no compilation.

  Args:
    method: one that `decodes`.
    options: see there. None: the defaults, in the method's own mode.

  Raises:
    InputError: options that don't go together, or with the method.

  Example:
    >>> run = cyb_jax.load("runs/ap")
    >>> sampler = Sampler(run.method, SamplingOptions(temperature=0.8))
    >>> prompt = [run.tokenizer.end_id, *run.tokenizer.encode("The film")]
    >>> said = sampler.generate(run.params, [prompt], max_new_tokens=20, end_id=run.tokenizer.end_id)
    >>> run.tokenizer.decode(said.tokens[0]), said.pauses[0]
  """

  def __init__(self, method: PausedMethod, options: SamplingOptions | None = None):
    self.method = method
    self.options = SamplingOptions(mode=default_mode(method)) if options is None else options
    self.plan = plan(method, self.options)
    omega = normalize(self.options.omega, self.plan.num_slots, name="omega")
    self._numbers = {
      "threshold": jnp.float32(self.options.threshold),
      "temperature": jnp.float32(self.options.temperature),
      "top_k": jnp.int32(min(self.options.top_k or method.vocab_size, method.vocab_size)),
      "top_p": jnp.float32(self.options.top_p),
      "omega": omega,
    }

  def generate(
    self,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seeds: Sequence[int] | int = 0,
    end_id: int | None = None,
    context: int | None = None,
    stop: Callable[[int, list[int]], int | None] | None = None,
    callback: Callable[[int, list[int], list[int]], None] | None = None,
    chunk: int = 16,
    prompt_multiple: int = _PROMPT_MULTIPLE,
  ) -> Generation:
    """Continues prompts.

    Args:
      params: bare arrays.
      prompts: ids, at least one each; of unequal length as they come. A row is one document, which begins with
        `end_id`: an end token further on hides nothing before it, whatever `data.document_mask` was in training.
      max_new_tokens: N, for every row.
      seeds: one for each row; or one number, to which the row's is added.
      end_id: a row that says it is finished; None: none is.
      context: tokens that a row may have in all, prompt and new ones; None: no limit.
      stop: called with a row's number and all that it has said, every `chunk` iterations; returns how many of the
        tokens are to be kept, which finishes the row, or None to go on.
      callback: called with a row's number, its new tokens and their pauses, every `chunk` iterations.
      chunk: iterations between two calls; without `stop` and `callback` the loop runs through.
      prompt_multiple: tokens that the longest prompt is padded to a multiple of.

    Raises:
      InputError: no prompt, an empty one, one with an id that isn't a word, or one that leaves no room.
    """
    state = self.start(
      params,
      prompts,
      max_new_tokens=max_new_tokens,
      seeds=seeds,
      context=context,
      prompt_multiple=prompt_multiple,
    )
    end = -1 if end_id is None else end_id
    every = chunk if stop or callback else max_new_tokens * self.plan.num_slots
    kept: list[int | None] = [None] * len(prompts)
    told = [0] * len(prompts)
    done = np.zeros(len(prompts), bool)
    while True:
      state = self.advance(params, state, every, end, done)
      # The cache stays where it is.
      said, finished, tokens, pauses, iterations = jax.device_get(
        (state.said, state.finished, state.tokens, state.pauses, state.iterations)
      )
      for row, count in enumerate(said.tolist()):
        if stop is not None and kept[row] is None:
          kept[row] = stop(row, tokens[row, :count].tolist())
        count = count if kept[row] is None else kept[row]
        if callback is not None and count > told[row]:
          callback(row, tokens[row, told[row] : count].tolist(), pauses[row, told[row] : count].tolist())
          told[row] = count
      done = finished | np.array([keep is not None for keep in kept])
      if done.all():
        break
    counts = [int(count) if keep is None else keep for count, keep in zip(said, kept)]
    log_probs = np.asarray(state.log_probs)
    in_all = [pauses[row, :count].tolist() for row, count in enumerate(counts)]
    if self.plan.parallel:
      slots = [count * self.plan.num_slots for count in counts]
    else:
      slots = [count + sum(row) for count, row in zip(counts, in_all)]
    return Generation(
      tokens=[tokens[row, :count].tolist() for row, count in enumerate(counts)],
      pauses=in_all,
      log_probs=[log_probs[row, :count].tolist() for row, count in enumerate(counts)],
      slots=slots,
      iterations=int(iterations),
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
    """The state behind the prompts: all their tokens but the last ones have run, in one forward; and where the method
    has pauses behind a prompt (`Method.prompt_pauses`) in another one the last token and its pauses but the last.

    Arguments and errors: see `generate`.
    """
    limits = _check(prompts, max_new_tokens, context, self.method.vocab_size)
    if isinstance(seeds, numbers.Integral):
      seeds = [int(seeds) + row for row in range(len(prompts))]
    if len(seeds) != len(prompts):
      raise InputError(f"seeds: {len(seeds)} of them, but {len(prompts)} prompts; give one for each")
    if not all(0 <= seed < 2**32 for seed in seeds):
      raise InputError(f"seed: {min(seeds)} .. {max(seeds)} must lie in [0, 2^32)")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    # The last token isn't run here: the loop begins with it.
    padded = -(-(int(lengths.max()) - 1) // prompt_multiple) * prompt_multiple
    before = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in enumerate(prompts):
      before[row, : len(prompt) - 1] = prompt[:-1]
    last = np.array([prompt[-1] for prompt in prompts], np.int32)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))
    budget = self.options.pause_budget
    budgets = np.full(len(prompts), np.iinfo(np.int32).max if budget is None else budget, np.int32)
    return _start(
      self.method, self.plan, max_new_tokens, params, before, last, lengths, keys, budgets, np.array(limits, np.int32)
    )

  def advance(
    self,
    params: PyTree,
    state: SamplerState,
    iterations: int,
    end_id: int = -1,
    stopped: Bool[np.ndarray, "B"] | None = None,
  ) -> SamplerState:
    """So many iterations more, or until all rows are finished; rows that are `stopped` are.

    The state that is given is used up (donated).
    """
    # An argument, since a state that the caller has changed may lie elsewhere, which would be another program.
    stopped = np.zeros(len(state.token), bool) if stopped is None else stopped
    numbers = self._numbers | {"iterations": np.int32(iterations), "end_id": np.int32(end_id)}
    return _advance(self.method, self.plan, params, state, numbers, stopped)

  def compile_abstract(
    self, params: PyTree, rows: int, max_new_tokens: int, row_sharding: Callable[[int], Sharding]
  ) -> jax.stages.Compiled:
    """Compiles the loop of `advance`, from shapes alone, for prompts of one token each.

    Args:
      params: as jax.ShapeDtypeStruct with shardings.
      rows: B.
      max_new_tokens: N; the cache has room for them with all their pauses.
      row_sharding: where an array lies whose axis of rows is the one of this number; -1: it has none.
    """

    def start(keys: Array, params: PyTree) -> SamplerState:
      one, none = jnp.ones(rows, jnp.int32), jnp.zeros((rows, 0), jnp.int32)
      return _start(self.method, self.plan, max_new_tokens, params, none, one, one, keys, one, one)

    def placed(x: Any, axis: int) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=row_sharding(axis))

    keys = jax.eval_shape(lambda: jax.vmap(jax.random.key)(jnp.zeros(rows, jnp.uint32)))
    state = jax.eval_shape(start, keys, params)
    cache = jax.tree.map(lambda x: placed(x, max(x.ndim - 4, 0)), state.cache)
    others = dataclasses.replace(state, cache=None)
    state = dataclasses.replace(jax.tree.map(lambda x: placed(x, 0 if x.ndim else -1), others), cache=cache)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    numbers = self._numbers | {"iterations": scalar, "end_id": scalar}
    numbers = jax.tree.map(lambda x: placed(x, -1), numbers)
    stopped = placed(jax.ShapeDtypeStruct((rows,), bool), 0)
    return _advance.lower(self.method, self.plan, params, state, numbers, stopped).compile()


def _check(prompts: Sequence[Sequence[int]], new: int, context: int | None, vocabulary: int) -> list[int]:
  """How many tokens every row may say.

  Raises:
    InputError: see `Sampler.generate`.
  """
  if new < 1:
    raise InputError(f"max_new_tokens: {new} must be at least 1")
  if not prompts:
    raise InputError("prompt: none given; give at least one")
  limits = []
  for row, prompt in enumerate(prompts):
    if not len(prompt):
      raise InputError(f"prompt: number {row + 1} is empty; give at least one token")
    wrong = [int(token) for token in prompt if not 0 <= token < vocabulary]
    if wrong:
      raise InputError(f"prompt: number {row + 1} has the id {wrong[0]}, but words are 0..{vocabulary - 1}")
    room = new if context is None else context - len(prompt)
    if room < 1:
      raise InputError(
        f"prompt: number {row + 1} has {len(prompt)} tokens, but the context is {context}; give at most {context - 1}"
      )
    limits.append(min(new, room))
  return limits


@functools.partial(jax.jit, static_argnames=("method", "plan", "new"))
def _start(
  method: PausedMethod,
  plan: Plan,
  new: int,
  params: PyTree,
  before: Int[Array, "B P"],
  last: Int[Array, "B"],
  lengths: Int[Array, "B"],
  seeds: Array,
  budgets: Int[Array, "B"],
  limits: Int[Array, "B"],
) -> SamplerState:
  rows, length = before.shape
  slots = plan.prompt_slots
  # Where pauses are seen by their own token alone they are taken back, all but those of the last token.
  of_token = plan.num_slots if plan.keeps_pauses else 1
  paused = method.prompt_pauses
  capacity = length * slots + paused + (new - 1) * of_token + plan.num_slots
  cache = method.empty_cache(rows, capacity)
  place, position = (lengths - 1) * slots, (lengths - 1) * plan.prompt_stride
  if length and plan.in_turn:
    cache, place = _run_in_turn(method, params, before, lengths, cache)
  elif length:
    order = jnp.arange(length * slots)
    token, slot = order // slots, order % slots
    positions = token * plan.prompt_stride + (slot if plan.shifts else 0)
    # Behind a shorter prompt lies what is never seen, and is written over.
    _, cache = method.extend(
      params,
      jnp.repeat(before, slots, axis=1),
      jnp.broadcast_to(slot, (rows, len(slot))),
      jnp.broadcast_to(positions, (rows, len(positions))),
      cache,
      None,
    )
  if paused:
    slot = jnp.broadcast_to(jnp.arange(paused, dtype=jnp.int32), (rows, paused))
    positions = position[:, None] + (slot if plan.shifts else 0)
    _, cache = method.extend(params, jnp.repeat(last[:, None], paused, 1), slot, positions, cache, place)
  return SamplerState(
    cache=cache,
    token=last,
    slot=jnp.full(rows, paused, jnp.int32),
    place=place,
    position=position,
    seeds=seeds,
    budget=budgets,
    limit=limits,
    said=jnp.zeros(rows, jnp.int32),
    finished=jnp.zeros(rows, bool),
    tokens=jnp.full((rows, new), -1, jnp.int32),
    pauses=jnp.zeros((rows, new), jnp.int32),
    log_probs=jnp.zeros((rows, new), jnp.float32),
    iterations=jnp.zeros((), jnp.int32),
  )


def _run_in_turn(
  method: PausedMethod, params: PyTree, tokens: Int[Array, "B P"], lengths: Int[Array, "B"], cache: PyTree
) -> tuple[PyTree, Int[Array, "B"]]:
  """A cache with all tokens of prompts but the last ones; and where these go. Exact, and as slow as saying them."""

  def run(carry: tuple[PyTree, Array], column: tuple[Array, Array]) -> tuple[tuple[PyTree, Array], None]:
    (cache, place), (token, number) = carry, column
    _, cache, ran = method.run_token(params, token, jnp.full_like(place, number), cache, place)
    # Behind a shorter prompt lies what is never seen, and is written over.
    return (cache, place + jnp.where(number < lengths - 1, ran, 0)), None

  columns = tokens.T, jnp.arange(tokens.shape[1], dtype=jnp.int32)
  carry, _ = jax.lax.scan(run, (cache, jnp.zeros_like(lengths)), columns)
  return carry


@functools.partial(jax.jit, static_argnames=("method", "plan"), donate_argnames="state")
def _advance(
  method: PausedMethod,
  plan: Plan,
  params: PyTree,
  state: SamplerState,
  numbers: dict[str, Array],
  stopped: Bool[Array, "B"],
) -> SamplerState:
  state = dataclasses.replace(state, finished=state.finished | stopped)
  until = state.iterations + numbers["iterations"]
  step = _in_turn if plan.in_turn else _all_slots if plan.parallel else _one_slot

  def goes_on(state: SamplerState) -> Bool[Array, ""]:
    return (state.iterations < until) & ~state.finished.all()

  return jax.lax.while_loop(goes_on, functools.partial(step, method, plan, params, numbers), state)


def _one_slot(
  method: PausedMethod, plan: Plan, params: PyTree, numbers: dict[str, Array], state: SamplerState
) -> SamplerState:
  """Every live row runs one slot: and asks for a pause, or says a word."""
  offset = state.slot if plan.shifts else jnp.zeros_like(state.slot)
  hidden, cache = method.extend(
    params,
    state.token[:, None],
    state.slot[:, None],
    (state.position + offset)[:, None],
    state.cache,
    state.place + state.slot,
  )
  scores = method.token_scores(params, hidden[:, 0], state.slot)
  if plan.read == "threshold":
    asks = scores.log_dont_know > jnp.log(numbers["threshold"])
  else:
    asks = _uniform(state, _STOP) < jnp.exp(scores.log_dont_know)
  denied = (state.slot >= plan.num_slots - 1) | (state.budget <= 0)
  if plan.denies:
    # omega_i / Omega_{>=i}: how likely it is that a world which has granted this slot grants no other one.
    tail = jnp.flip(jnp.cumsum(jnp.flip(numbers["omega"])))
    hazard = jnp.where(tail > 0, numbers["omega"] / jnp.where(tail > 0, tail, 1.0), 1.0)
    denied |= _uniform(state, _WORLD) < hazard[state.slot]
  waits = asks & ~denied & ~state.finished
  word = _choose(plan, numbers, _keys(state, _WORD), scores.log_probs)
  log_prob = jnp.take_along_axis(scores.log_probs, word[:, None], 1)[:, 0]
  said = _say(state, cache, numbers["end_id"], ~waits & ~state.finished, word, state.slot, log_prob)
  ran = state.slot + 1
  moved = _move(plan, state, said, ran)
  return dataclasses.replace(
    moved,
    slot=jnp.where(waits, state.slot + 1, jnp.where(state.finished, state.slot, 0)),
    budget=state.budget - waits,
  )


def _all_slots(
  method: PausedMethod, plan: Plan, params: PyTree, numbers: dict[str, Array], state: SamplerState
) -> SamplerState:
  """Every live row runs all slots of its token, and says a word."""
  rows, width = len(state.token), plan.num_slots
  slot = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (rows, width))
  hidden, cache = method.extend(
    params,
    jnp.broadcast_to(state.token[:, None], (rows, width)),
    slot,
    state.position[:, None] + (slot if plan.shifts else jnp.zeros_like(slot)),
    state.cache,
    state.place,
  )
  scores = method.token_scores(params, hidden, slot)
  omega = numbers["omega"] if plan.denies else None
  log_stopping = log_stopping_distribution(scores.log_dont_know, scores.log_answer, omega)
  if plan.read == "mixture":
    read = jnp.full(rows, width - 1, jnp.int32)
    log_probs = jax.nn.logsumexp(log_stopping[..., None] + scores.log_probs, 1)
  else:
    if plan.read == "sample":
      read = jax.vmap(jax.random.categorical)(_keys(state, _STOP), log_stopping)
    else:
      read = hard_slot(scores.log_dont_know, numbers["threshold"])
      if plan.denies:
        log_omega = jnp.broadcast_to(jnp.log(numbers["omega"]), log_stopping.shape)
        read = jnp.minimum(read, jax.vmap(jax.random.categorical)(_keys(state, _WORLD), log_omega))
    log_probs = jnp.take_along_axis(scores.log_probs, read[:, None, None], 1)[:, 0]
  word = _choose(plan, numbers, _keys(state, _WORD), log_probs)
  log_prob = jnp.take_along_axis(log_probs, word[:, None], 1)[:, 0]
  said = _say(state, cache, numbers["end_id"], ~state.finished, word, read.astype(jnp.int32), log_prob)
  return _move(plan, state, said, width)


def _in_turn(
  method: PausedMethod, plan: Plan, params: PyTree, numbers: dict[str, Array], state: SamplerState
) -> SamplerState:
  """Every live row runs the slots of its token one after the other, and says a word."""
  hidden, cache, ran = method.run_token(params, state.token, state.position, state.cache, state.place)
  log_probs = method.token_scores(params, hidden, jnp.full_like(ran, plan.num_slots - 1)).log_probs
  word = _choose(plan, numbers, _keys(state, _WORD), log_probs)
  log_prob = jnp.take_along_axis(log_probs, word[:, None], 1)[:, 0]
  said = _say(state, cache, numbers["end_id"], ~state.finished, word, ran - 1, log_prob)
  return _move(plan, state, said, ran)


def _say(
  state: SamplerState,
  cache: Cache,
  end_id: Array,
  says: Bool[Array, "B"],
  word: Int[Array, "B"],
  pauses: Int[Array, "B"],
  log_prob: Float[Array, "B"],
) -> SamplerState:
  """The state with a word said in the rows that say one."""
  rows = jnp.arange(len(word))
  # Out of bounds is dropped.
  where = jnp.where(says, state.said, state.tokens.shape[1])
  said = state.said + says
  return dataclasses.replace(
    state,
    cache=cache,
    token=jnp.where(says, word, state.token),
    said=said,
    finished=state.finished | (says & ((word == end_id) | (said >= state.limit))),
    tokens=state.tokens.at[rows, where].set(word, mode="drop"),
    pauses=state.pauses.at[rows, where].set(pauses, mode="drop"),
    log_probs=state.log_probs.at[rows, where].set(log_prob, mode="drop"),
    iterations=state.iterations + 1,
  )


def _move(plan: Plan, before: SamplerState, state: SamplerState, ran: Int[Array, "B"] | int) -> SamplerState:
  """Rows that have said a word, and say another one, go on to its place; `ran`: slots of the token that they leave."""
  moves = (state.said > before.said) & ~state.finished
  return dataclasses.replace(
    state,
    place=state.place + jnp.where(moves, ran if plan.keeps_pauses else 1, 0),
    position=state.position + jnp.where(moves, ran if plan.stride is None else plan.stride, 0),
  )


def _keys(state: SamplerState, purpose: int) -> Array:
  """A key for every row, of this token, this slot and this purpose."""

  def key(seed: Array, said: Array, slot: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(seed, said), slot), purpose)

  return jax.vmap(key)(state.seeds, state.said, state.slot)


def _uniform(state: SamplerState, purpose: int) -> Float[Array, "B"]:
  return jax.vmap(jax.random.uniform)(_keys(state, purpose))


def _choose(plan: Plan, numbers: dict[str, Array], keys: Array, log_probs: Float[Array, "B V"]) -> Int[Array, "B"]:
  """A word for every row; i32[B]."""
  if plan.greedy:
    return jnp.argmax(log_probs, -1).astype(jnp.int32)
  logits = log_probs / numbers["temperature"]
  if plan.truncated:
    logits = _truncated(logits, numbers["top_k"], numbers["top_p"])
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _truncated(logits: Float[Array, "B V"], top_k: Int[Array, ""], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
  """-inf for all but the k likeliest words, and of these the likeliest that make up p; words of equal probability stay
  or go together."""
  falling = jnp.flip(jnp.sort(logits, -1), -1)
  rank = jnp.arange(logits.shape[-1])
  falling = jnp.where(rank < top_k, falling, -jnp.inf)
  probabilities = jax.nn.softmax(falling, -1)
  before = jnp.cumsum(probabilities, -1) - probabilities
  kept = (before < top_p) & (rank < top_k)
  lowest = jnp.where(kept, falling, math.inf).min(-1, keepdims=True)
  return jnp.where(logits >= lowest, logits, -jnp.inf)
