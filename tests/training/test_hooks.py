"""The hooks of the training loop, tested separately: periods, warnings, signals and timing by hand."""

import subprocess
import sys
import types

import jax.numpy as jnp
import pytest

from cyb_jax.data import tokenizers
from cyb_jax.errors import DivergedError, InputError, Interrupted
from cyb_jax.training import hooks, throughput
from cyb_jax.training.progress import Progress
from cyb_jax.training.start import Start


def progress(step=0, **train):
  """A run of 12 steps at a step."""
  names = {"eval_every": 4, "checkpoint_every": 5, "log_every": 3, "eval_limit": 0, "last_eval_limit": 0} | train
  config = types.SimpleNamespace(train=types.SimpleNamespace(**names))
  return Progress(types.SimpleNamespace(steps=12, config=config), Start(None, step, 0))


class Recorder:
  """Records the names of the methods that are called, and returns a fixed answer."""

  def __init__(self, calls, **answers):
    self.calls, self.answers = calls, answers

  def __getattr__(self, name):
    def called(*arguments, **options):
      self.calls.append(name)
      return self.answers.get(name)

    return called


def test_periods():
  run = progress()
  due = {"first": [], "validation": [], "save": [], "never": []}
  validation = hooks.Validation(None, None, None)
  saver = hooks.Saver(None, None, None, None)
  for _ in range(12):
    run.begin_step(tokens=2)
    for name, here in (
      ("first", run.is_first), ("validation", validation.is_due(run)), ("save", saver.is_due(run)),
      ("never", run.is_due(0)),
    ):  # fmt: skip
      due[name] += [run.step] * here
  assert due == {"first": [1], "validation": [4, 8, 12], "save": [5, 10, 12], "never": []}
  assert (run.step, run.tokens, run.is_last) == (12, 24, True)


@pytest.mark.parametrize(
  ("step", "requested", "calls"),
  [
    (1, False, []),
    (4, False, ["flush", "evaluate", "write", "stops", "restart"]),
    (5, False, ["flush", "meta", "check", "flush", "save", "restart"]),
    # A signal during validation: the run is saved and then ends.
    (4, True, ["flush", "evaluate", "write", "stops", "meta", "check", "flush", "save", "wait"]),
  ],
)
def test_blocking_hooks_run_in_order_when_they_are_due(step, requested, calls):
  run = progress(step - 1)
  run.begin_step(tokens=1)
  seen = []
  record = Recorder(seen, evaluate={"loss": 1.0, "perplexity": 2.0}, stops=requested, check=0)
  run.meta = lambda: seen.append("meta")
  run.state = types.SimpleNamespace(skipped_in_a_row=None)
  run.plan.saved_part = lambda state: state
  interruption = hooks.Interruption(record, types.SimpleNamespace(received=[15] * requested), record)
  validation = hooks.Validation(record.evaluate, record, interruption)
  strategy = types.SimpleNamespace(global_state=lambda state: state)
  saver = hooks.Saver(record, strategy, record, record.check)
  pause = hooks.BlockingHooks(record, record, validation, saver, interruption)
  if requested:
    with pytest.raises(Interrupted, match="signal 15: saved at step 4 of 12"):
      pause(run)
  else:
    pause(run)
  assert seen == calls


def test_collapse_causes_one_warning_until_it_is_over(monkeypatch):
  warnings = []
  monkeypatch.setattr(hooks.logging, "warning", lambda text, *args: warnings.append(args[:3]))
  warn = hooks.CollapseWarning(0.9, is_adaptive=True)
  for step, share in enumerate((0.95, 0.96, 0.5, float("nan"), 0.97), start=1):
    warn(step, [1 - share, share])
  assert warnings == [(1, pytest.approx(95.0), 1), (5, pytest.approx(97.0), 1)]
  hooks.CollapseWarning(0.9, is_adaptive=False)(6, [0.0, 1.0])
  hooks.CollapseWarning(0.9, is_adaptive=True)(6, [1.0])
  assert len(warnings) == 2


def test_divergence_is_counted_and_ends_the_run():
  strategy = types.SimpleNamespace(global_state=lambda state: state)
  check = hooks.DivergenceCheck(strategy, 3, "WORKDIR")
  assert check(7, jnp.int32(2)) == 2
  with pytest.raises(DivergedError, match=r"step 8: .* the last 3 steps isn't finite .*checkpoints in WORKDIR"):
    check(8, jnp.int32(3))


def test_throughput_by_hand(monkeypatch):
  """2 windows of 8 tokens with 3 slots each; 4 devices of 100 FLOPs per second."""
  now = [10.0]
  monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
  monkeypatch.setattr(throughput, "peak_flops", lambda device: 100.0)
  train = types.SimpleNamespace(total=5.0)
  method = types.SimpleNamespace(costs=lambda tokens: types.SimpleNamespace(train_slots=3 * tokens, train=train))
  data = types.SimpleNamespace(batch_size=2, sequence_length=8)
  mesh = types.SimpleNamespace(size=4, devices=types.SimpleNamespace(flat=[None]))
  plan = types.SimpleNamespace(config=types.SimpleNamespace(data=data), method=method, mesh=mesh)
  ahead = types.SimpleNamespace(waited=1.0)
  speed = throughput.Throughput(plan, ahead, 4)
  now[0], ahead.waited = 12.0, 1.5
  lap = speed.lap(9)
  assert (lap.steps, lap.seconds, lap.data_wait) == (5, 2.0, 0.25)
  assert (lap.tokens_per_second, lap.slots_per_second, lap.mfu) == (40.0, 120.0, 0.5)
  now[0] = 13.0
  speed.restart(10)
  assert (speed.lap(10).tokens_per_second, speed.lap(10).slots_per_second) == (None, None)


def test_durations():
  assert tokenizers.vocabulary_size("sentencepiece:300") == 300
  assert tokenizers.vocabulary_size("bytes") == 257
  with pytest.raises(InputError):
    tokenizers.vocabulary_size("nowhere.model")


def test_the_package_imports_its_modules_on_use():
  code = (
    "import sys, cyb_jax.training as training\n"
    "assert not any(name.startswith('cyb_jax.training.') for name in sys.modules)\n"
    "assert 'jax' not in sys.modules\n"
    "assert all(callable(getattr(training, name)) for name in training.__all__)\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
