"""Signals in a process that is not a program; tests/cli/test_interruptions.py tests the programs."""

import contextlib
import hashlib
import os
import signal
import sys
import threading
import time

import pytest

from cyb_jax import signals as signals_module
from cyb_jax.errors import Interrupted
from cyb_jax.signals import StopSignals, restored


def stop_signals(end=None):
  return StopSignals("nothing is lost", "saving", end)


def test_signals_are_recorded_once_and_handlers_are_restored():
  arrived = []
  before = signal.signal(signal.SIGTERM, lambda number, _frame: arrived.append(number))
  try:
    with stop_signals() as signals:
      os.kill(os.getpid(), signal.SIGTERM)
      assert (signals.received, arrived) == ([signal.SIGTERM], [])
      os.kill(os.getpid(), signal.SIGTERM)  # the second signal calls the earlier handler
      assert (signals.received, arrived) == ([signal.SIGTERM], [signal.SIGTERM])
    os.kill(os.getpid(), signal.SIGTERM)
    assert arrived == [signal.SIGTERM] * 2
  finally:
    signal.signal(signal.SIGTERM, before)


def test_a_signal_ends_a_run_immediately_while_nothing_would_be_lost():
  before = signal.getsignal(signal.SIGTERM)
  with stop_signals() as signals:
    signals.at_once = True
    with pytest.raises(Interrupted, match=r"^signal 15: nothing is lost$"):
      os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received == [signal.SIGTERM]
  assert signal.getsignal(signal.SIGTERM) == before


class Signalling:
  """Sends a signal while it is deleted, where Python reports an exception and goes on."""

  def __del__(self):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0)  # the handler runs here


def test_a_signal_is_not_lost_while_an_object_is_deleted(capsys):
  before = sys.unraisablehook
  signals = stop_signals()

  def work():
    signals.at_once = True
    Signalling()
    time.sleep(30)

  with pytest.raises(Interrupted, match=r"^signal 15: nothing is lost$"), signals:
    work()
  assert signals.received == [signal.SIGTERM]
  assert sys.unraisablehook == before
  assert capsys.readouterr().err == ""


def test_other_exceptions_that_nothing_can_catch_are_reported(monkeypatch):
  reported = []
  monkeypatch.setattr(sys, "unraisablehook", lambda lost: reported.append(lost.exc_value))

  class Failing:
    def __del__(self):
      raise ValueError("a fault")

  with stop_signals():
    Failing()
  assert [str(error) for error in reported] == ["a fault"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_thread_ends_the_process_while_the_main_thread_compiles(monkeypatch, at_once):
  """The main thread is in a C function, so Python runs no signal handlers."""
  monkeypatch.setattr(signals_module, "_GRACE_SECONDS", 0.05)
  ended = []
  wakeup = signal.set_wakeup_fd(-1)
  with contextlib.suppress(Interrupted), stop_signals(lambda why: ended.append((why, time.monotonic()))) as signals:
    signals.at_once = at_once
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    start = time.monotonic()
    while time.monotonic() < start + 0.5:  # a single call, which signals do not interrupt
      hashlib.pbkdf2_hmac("sha256", b"", b"", 1 if ended else 1_000_000)
  assert signals.received == [signal.SIGTERM]
  assert signal.set_wakeup_fd(wakeup) == -1
  if at_once:
    assert "nothing is lost" in ended[0][0]
  else:
    assert ended == []


def test_the_innermost_context_receives_signals_and_its_second_signal_the_outer_one():
  ended = []
  with stop_signals(ended.append) as outer:
    outer.at_once = True
    with StopSignals("", "saving") as inner:
      os.kill(os.getpid(), signal.SIGTERM)
      assert (inner.received, outer.received) == ([signal.SIGTERM], [])
      with pytest.raises(Interrupted, match="nothing is lost"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert outer.received == [signal.SIGTERM]
  assert ended == []


def test_a_second_signal_does_not_interrupt_the_cleaning_up():
  """Ctrl-C in a terminal reaches the runs of a study, which then ends them with SIGTERM."""
  with stop_signals() as signals:
    signals.at_once = True
    with pytest.raises(Interrupted, match="signal 2"):
      os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
  assert signals.received == [signal.SIGINT, signal.SIGTERM]


def test_handlers_that_others_set_are_replaced():
  with stop_signals():
    handlers = [signal.getsignal(number) for number in signals_module.STOPPING]
    with restored():
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
      signal.signal(signal.SIGINT, signal.SIG_DFL)
    assert [signal.getsignal(number) for number in signals_module.STOPPING] == handlers


def test_the_end_of_a_process_is_announced_to_other_hosts(monkeypatch):
  calls = []
  monkeypatch.setattr(os, "_exit", lambda code: calls.append(code))
  signals_module.end_process("signal 15: ended", lambda *announced: calls.append(announced))
  signals_module.end_process("signal 15: ended")
  assert calls == [("signal 15: ended", 75), 75, 75]
