"""The engine without HTTP: its queue, cancellation, failures, batches of other options, and its end."""

import threading

import pytest
from served import until

from cyb_jax.generation import NewTokens, RowRequest, SamplingOptions
from cyb_jax.serving import engine as module
from cyb_jax.serving.engine import ClosedError, Engine, Failure, QueueFullError, Work


@pytest.fixture
def engine(run):
  engine = Engine(run, rows=2, queue=5, chunk=3)
  engine.start()
  yield engine
  engine.close(drain=False, timeout=60)


def work(new=4, seed=0, **options):
  return Work(RowRequest((256, 97, 98), new, seed, SamplingOptions(**options)))


class Inbox:
  """Collects the events of a request."""

  def __init__(self, rows):
    self.events, self.left = [], rows
    self.done = threading.Event()

  def __call__(self, number, event):
    self.events.append((number, event))
    if isinstance(event, Failure) or (isinstance(event, NewTokens) and event.finished):
      self.left -= 1
      if not self.left:
        self.done.set()

  def tokens(self, number):
    return [token for row, event in self.events if row == number for token in event.tokens]


def ask(engine, *works):
  inbox = Inbox(len(works))
  engine.submit(works, inbox)
  assert inbox.done.wait(60)
  return inbox


def test_all_rows_of_a_request_or_none_wait(engine):
  inbox = Inbox(5)
  with pytest.raises(QueueFullError):
    engine.submit([work()] * 6, inbox)
  assert inbox.events == []
  with engine._changed:  # the engine's thread admits nobody meanwhile
    engine.submit([work(seed=seed) for seed in range(5)], inbox)
    with pytest.raises(QueueFullError):
      engine.submit([work()], inbox)
    assert engine.num_waiting == 5
  assert inbox.done.wait(60)
  assert [len(inbox.tokens(number)) for number in range(5)] == [4] * 5
  assert len({tuple(inbox.tokens(number)) for number in range(5)}) > 1


def test_cancelled_requests_leave(engine):
  before = engine.stats.cancelled
  inbox = Inbox(5)
  with engine._changed:  # all of them wait
    tickets = engine.submit([work(40, seed) for seed in range(5)], inbox)
    for ticket in [*tickets, tickets[0]]:
      ticket.cancel()
  until(lambda: engine.num_running == engine.num_waiting == 0)
  assert engine.stats.cancelled == before + 5
  assert inbox.events == []
  running = Inbox(2)
  # A request is cancelled as soon as its first tokens arrive.
  tickets = engine.submit([work(40, seed) for seed in range(2)], lambda *got: (running(*got), tickets[got[0]].cancel()))
  until(lambda: engine.stats.cancelled == before + 7)
  assert [1 <= len(running.tokens(number)) < 40 for number in range(2)] == [True, True]


def test_a_failed_request_does_not_stop_the_engine(engine, monkeypatch):
  (_, failure), *_ = ask(engine, Work(RowRequest((999,), 2, 0, SamplingOptions()))).events
  assert failure == Failure("prompt: number 1 has the id 999; ids must be in 0..256", bad_input=True)
  batch = next(iter(engine._batches.values())).batch
  with monkeypatch.context() as patch:
    patch.setattr(type(batch), "advance", lambda *_: 1 / 0)
    inbox = ask(engine, work(), work())
  assert {event.message for _, event in inbox.events} == {
    "the model failed on this request; the server's log has the reason"
  }
  assert engine.stats.failed == 3
  # The batch is made again.
  assert len(ask(engine, work()).tokens(0)) == 4


@pytest.mark.slow
def test_few_batches_exist_at_a_time(engine, monkeypatch):
  monkeypatch.setattr(module, "_MAX_BATCHES", 2)
  modes = [{}, {"mode": "constant"}, {"mode": "constant", "max_pauses": 1}, {"prompt_pauses": "all"}]
  for options in modes:
    ask(engine, work(**options))
    assert len(engine._batches) <= 2
  # Together they wait for each other.
  inbox = ask(engine, *(work(**options) for options in modes))
  assert [len(inbox.tokens(number)) for number in range(4)] == [4] * 4


def test_draining_completes_requests_and_closing_fails_them(run):
  for drain in (True, False):
    engine = Engine(run, rows=2, queue=5, chunk=3)
    with pytest.raises(ClosedError):
      engine.submit([work()], print)
    engine.start()
    inbox = Inbox(4)
    engine.submit([work(30, seed) for seed in range(4)], inbox)
    assert engine.close(drain=drain, timeout=60)
    assert inbox.done.is_set()
    failed = [event for _, event in inbox.events if isinstance(event, Failure)]
    assert bool(failed) != drain
    with pytest.raises(ClosedError):
      engine.submit([work()], print)


def test_an_engine_that_cannot_compile_says_why(run, monkeypatch):
  monkeypatch.setattr(module.RunningBatch, "join", lambda *_: 1 / 0)
  engine = Engine(run, rows=2, queue=5)
  with pytest.raises(ZeroDivisionError):
    engine.start()
  assert not engine.alive
