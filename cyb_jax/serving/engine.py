"""The engine: one thread that generates the text of all requests on running batches.

Requests wait in a bounded queue. Between two chunks of iterations, waiting requests join the free rows of their batch,
and requests that are finished or cancelled leave. All computation happens in the engine's thread; other threads submit
and cancel requests, and receive results by a function that the engine's thread calls.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
from absl import logging

from cyb_jax.errors import InputError
from cyb_jax.generation import Lane, NewTokens, RowRequest, RunningBatch, default_mode
from cyb_jax.generation.abilities import check_decodes
from cyb_jax.generation.continuous import MAX_ALTERNATIVES
from cyb_jax.generation.options import SamplingOptions
from cyb_jax.generation.prompt_scores import TextScorer, TextScores
from cyb_jax.methods import Decoding

if TYPE_CHECKING:
  from cyb_jax.runs import Run

# Each batch has a cache of its own. If another one is needed, the batch that was used least recently is dropped.
_MAX_BATCHES = 3


class QueueFullError(Exception):
  """The queue has no space for a request; the same request may succeed later."""


class ClosedError(Exception):
  """The engine accepts no more requests."""


@dataclasses.dataclass(frozen=True)
class Work:
  """The work on one row.

  Attributes:
    row: the request; its `max_new_tokens` may be 0, if only the prompt is scored.
    scores_prompt: whether the tokens of the prompt are scored.
  """

  row: RowRequest
  scores_prompt: bool = False


@dataclasses.dataclass(frozen=True)
class Failure:
  """The end of a request that has failed.

  Attributes:
    message: the reason, for the user.
    bad_input: whether the request is the cause.
  """

  message: str
  bad_input: bool = False


Event = TextScores | NewTokens | Failure
"""A result: the scores of the prompt, if they are wanted, then new tokens until they are finished; or a failure, which
is the last event. If no token is generated, the scores are the last event."""


@dataclasses.dataclass
class Stats:
  """Sums since the start; only the engine's thread changes them.

  Attributes:
    prompt_tokens, tokens, pauses: the tokens of prompts; the generated tokens; their pauses.
    finished, cancelled, failed: the numbers of rows by their end; rows that a stop string ends are cancelled.
    chunks: the number of chunks of iterations.
  """

  prompt_tokens: int = 0
  tokens: int = 0
  pauses: int = 0
  finished: int = 0
  cancelled: int = 0
  failed: int = 0
  chunks: int = 0


class Ticket:
  """A request in the engine.

  Attributes:
    work: the request.
    cancelled: whether the request was cancelled.
  """

  def __init__(self, work: Work, deliver: Callable[[Event], None], wake: Callable[[], None]):
    self.work, self.deliver, self.cancelled = work, deliver, False
    self._wake = wake

  def cancel(self) -> None:
    """Ends the request; there may be one more event. Later calls have no effect."""
    if not self.cancelled:
      self.cancelled = True
      self._wake()


class _Batch:
  """A running batch and the tickets of its rows."""

  def __init__(self, batch: RunningBatch):
    self.batch = batch
    self.tickets: dict[int, Ticket] = {}
    self.used = 0


class Engine:
  """Generates the text of requests; `start` starts its thread.

  Args:
    run: the model.
    rows: the number of rows of each batch.
    queue: the maximum number of rows that wait.
    chunk: the number of iterations between which rows join and leave: fewer make the first token come sooner, more
      make all tokens cheaper.

  Raises:
    InputError: the method does not decode.

  Attributes:
    context: the maximum number of tokens of a row, including the prompt.
    stats: `Stats`.
  """

  def __init__(self, run: Run, *, rows: int, queue: int, chunk: int = 4):
    check_decodes(run.method)
    assert isinstance(run.method, Decoding)
    self.run, self.rows, self.queue, self._chunk = run, rows, queue, chunk
    self._method: Decoding = run.method
    self.context = run.config.data.sequence_length
    self.default_mode = default_mode(run.method)
    self.stats = Stats()
    self._scorer = TextScorer(run.method, run.params, context=self.context, alternatives=MAX_ALTERNATIVES)
    # A lane is the same for equal options; finding it makes arrays.
    self._lane = functools.lru_cache(maxsize=1024)(functools.partial(Lane.of, self._method))
    self._batches: dict[Lane, _Batch] = {}
    self._waiting: list[Ticket] = []
    self._changed = threading.Condition()
    self._closing = False
    self._ready = threading.Event()
    self._error: Exception | None = None
    self._thread = threading.Thread(target=self._run, name="cyb-engine", daemon=True)

  @property
  def num_waiting(self) -> int:
    """The number of rows that wait."""
    return len(self._waiting)

  @property
  def num_running(self) -> int:
    """The number of rows that run."""
    return sum(len(each.tickets) for each in list(self._batches.values()))

  @property
  def alive(self) -> bool:
    """Whether the engine generates text."""
    return self._thread.is_alive()

  def start(self) -> None:
    """Starts the thread, and waits until it has compiled the programs of the method's default mode.

    Raises:
      Exception: the reason why the thread has ended, such as too little memory.
    """
    self._thread.start()
    self._ready.wait()
    if self._error is not None:
      raise self._error

  def check(self, options: SamplingOptions) -> None:
    """
    Raises:
      InputError: the options are incompatible with each other or with the method.
    """
    self._lane(options)

  def submit(self, work: Sequence[Work], deliver: Callable[[int, Event], None]) -> list[Ticket]:
    """Puts the rows of a request into the queue: all of them, or none.

    Args:
      work: the rows.
      deliver: called in the engine's thread for each result, with the index of the row; it must not block.

    Raises:
      QueueFullError: the queue has no space.
      ClosedError: the engine is closing.
    """
    tickets = [Ticket(each, functools.partial(deliver, number), self._wake) for number, each in enumerate(work)]
    with self._changed:
      if self._closing or not self.alive:
        raise ClosedError
      if len(self._waiting) + len(tickets) > self.queue:
        raise QueueFullError
      self._waiting += tickets
      self._changed.notify()
    return tickets

  def close(self, *, drain: bool = True, timeout: float | None = None) -> bool:
    """Accepts no more requests and ends the thread.

    Args:
      drain: whether the waiting and running requests are completed; otherwise they fail.
      timeout: the maximum number of seconds to wait for the thread; None: no limit.

    Returns:
      Whether the thread has ended.
    """
    with self._changed:
      self._closing = True
      if not drain:
        for ticket in [*self._waiting, *self._running()]:
          ticket.cancelled = True
          ticket.deliver(Failure("the server is shutting down"))
      self._changed.notify()
    if self._thread.ident is not None and self._thread is not threading.current_thread():
      self._thread.join(timeout)
    return not self.alive

  def _wake(self) -> None:
    with self._changed:
      self._changed.notify()

  def _running(self) -> list[Ticket]:
    return [ticket for each in list(self._batches.values()) for ticket in list(each.tickets.values())]

  def _run(self) -> None:
    try:
      with jax.default_matmul_precision(self.run.config.precision.matmul):
        self._warm_up()
        self._ready.set()
        self._loop()
    except Exception as error:
      self._error = error
      logging.exception("the engine has failed")
      self.close(drain=False)
    finally:
      self._ready.set()

  def _loop(self) -> None:
    while True:
      with self._changed:
        while not self._waiting and not self._running() and not self._closing:
          self._changed.wait()
        if not self._waiting and not self._running():
          return
      self._leave()
      self._admit()
      for lane, batch in list(self._batches.items()):
        if batch.tickets:
          self._advance(lane, batch)

  def _warm_up(self) -> None:
    """Compiles the programs of the default mode, with requests that are not counted."""
    options = SamplingOptions(mode=self.default_mode)
    batch = self._batch(self._lane(options))
    assert batch is not None
    for length in batch.batch.prompt_lengths:
      prompt = (0,) * min(length + 1, self.context - 1)
      batch.batch.leave(batch.batch.join(RowRequest(prompt, 1, seed=0, options=options)))
    batch.batch.join(RowRequest((0,), 1, seed=0, options=options))
    batch.batch.advance(self._chunk)
    for row in set(range(self.rows)) - batch.batch.free:
      batch.batch.leave(row)

  def _leave(self) -> None:
    """Removes the cancelled requests."""
    for each in self._batches.values():
      for row, ticket in list(each.tickets.items()):
        if ticket.cancelled:
          each.batch.leave(row)
          del each.tickets[row]
          self.stats.cancelled += 1
    with self._changed:
      kept = [ticket for ticket in self._waiting if not ticket.cancelled]
      self.stats.cancelled += len(self._waiting) - len(kept)
      self._waiting = kept

  def _admit(self) -> None:
    """Lets waiting requests join, in their order; a request whose batch is full doesn't block those of others."""
    full: set[Lane] = set()
    for ticket in list(self._waiting):
      try:
        started = self._start(ticket, full)
      except Exception as error:
        self._fail(ticket, error)
        started = True
      if started:
        with self._changed:
          self._waiting.remove(ticket)

  def _start(self, ticket: Ticket, full: set[Lane]) -> bool:
    """Begins a request, if it needs no row or a row is free; returns whether it has begun.

    Args:
      ticket: the request.
      full: the lanes that are known to have no free row; a lane is added.
    """
    row, batch = ticket.work.row, None
    if row.max_new_tokens:
      lane = self._lane(row.options)
      batch = None if lane in full else self._batch(lane)
      if batch is None or not batch.batch.free:
        full.add(lane)
        return False
    if ticket.work.scores_prompt:
      ticket.deliver(self._scorer.score(row.prompt, row.alternatives))
    if batch is not None:
      batch.tickets[batch.batch.join(row)] = ticket
      batch.used = self.stats.chunks
    else:
      self.stats.finished += 1
    self.stats.prompt_tokens += len(row.prompt)
    return True

  def _batch(self, lane: Lane) -> _Batch | None:
    """The batch of a lane, which is created if necessary; None if there are too many busy batches."""
    if lane not in self._batches:
      if len(self._batches) >= _MAX_BATCHES:
        idle = [other for other, each in self._batches.items() if not each.tickets]
        if not idle:
          return None
        del self._batches[min(idle, key=lambda other: self._batches[other].used)]
      batch = RunningBatch(self._method, self.run.params, lane, rows=self.rows, context=self.context)
      logging.info("%s: a batch of %d rows, with a cache of %.1f MiB; its programs are compiled on first use",
        lane.pacing.__name__, self.rows, batch.nbytes / 2**20)  # fmt: skip
      self._batches[lane] = _Batch(batch)
    return self._batches[lane]

  def _advance(self, lane: Lane, each: _Batch) -> None:
    """Runs a chunk of iterations of a batch and delivers its new tokens."""
    try:
      results = each.batch.advance(self._chunk)
    except Exception as error:
      # The buffers of the batch are donated, so it can't be used any more.
      del self._batches[lane]
      for ticket in each.tickets.values():
        self._fail(ticket, error)
      return
    self.stats.chunks += 1
    each.used = self.stats.chunks
    for row, new in results.items():
      ticket = each.tickets[row]
      self.stats.tokens += len(new.tokens)
      self.stats.pauses += sum(new.pauses)
      if new.finished:
        del each.tickets[row]
        self.stats.finished += 1
      if (new.tokens or new.finished) and not ticket.cancelled:
        ticket.deliver(new)

  def _fail(self, ticket: Ticket, error: Exception) -> None:
    self.stats.failed += 1
    if isinstance(error, InputError):
      ticket.deliver(Failure(str(error), bad_input=True))
      return
    logging.exception("a request has failed")
    ticket.deliver(Failure("the model failed on this request; the server's log has the reason"))
