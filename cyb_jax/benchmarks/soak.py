"""A soak: runs that are disturbed by faults of many kinds, one in each life, and continued by the same command.

`FAULTS` is the table of the kinds. A new kind is an entry with a function that injects the fault into a life of a run,
and returns the answer of each process: its exit code and its output, next to those that are expected.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import pathlib
import re
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from cyb_jax import jsonl
from cyb_jax.benchmarks import compared_runs, lives
from cyb_jax.benchmarks.disturbed_run import DisturbedRun
from cyb_jax.benchmarks.fault_answers import (
  ALSO_INTERRUPTED,
  COMPLETE,
  DAMAGED,
  DISK_FAILED,
  INTERRUPTED,
  KILLED,
  NOT_KILLED,
  OTHER_HOST_DIED,
  REFUSED,
  Answer,
  Expected,
)
from cyb_jax.errors import Failed, InputError

# The steps of a run, in which about one fault of each kind finds its place.
_STEPS = 700
# The seconds for which a process is stopped beyond the heartbeat.
_BEYOND = 3.0
# The seconds within which a process must have answered. Other programs may use the machine at the same time.
_PATIENCE = 180.0
_LONGEST_END = 1200.0
_SHOWN_PROBLEMS = 20


def _answers(run: DisturbedRun, life: lives.Life, expected: Mapping[int, Expected], rest: Expected) -> list[Answer]:
  """The answers of all hosts of a life that has ended; hosts that still run are killed, which is a wrong answer.

  Args:
    run: the run that the life belongs to.
    life: the life.
    expected: the expected answers of some hosts.
    rest: that of the other hosts.
  """
  running = [host for host in range(life.hosts) if not life.has_ended(host)]
  answers = []
  for host, code in enumerate([life.kill_host(host) for host in range(life.hosts)]):
    wanted = expected.get(host, rest)
    if code == 0 and (run.workdir / "evaluation.json").exists():  # the run was complete before the fault
      wanted = COMPLETE
    elif host in running:
      wanted = NOT_KILLED
    if "error: " in wanted.says:  # another process prints the line if jax has aborted the host
      _wait_until(lambda host=host: "error: " in life.text(host), 5.0)
    answers.append(Answer(code, life.text(host), wanted, life.hosts))
  return answers


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
  until = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > until:
      return False
    time.sleep(0.02)
  return True


def _killed(run: DisturbedRun, life: lives.Life, *, says: str = "", running: bool = False) -> list[Answer]:
  """The answers after one host is killed at a random moment; the others must then exit."""
  run.reach(life, running=running)
  victim = run.some_host()
  life.kill_host(victim)
  others = [host for host in range(life.hosts) if host != victim]
  life.wait(others, _PATIENCE)
  answers = _answers(run, life, {victim: KILLED}, OTHER_HOST_DIED)
  answers[0] = dataclasses.replace(answers[0], expected=dataclasses.replace(answers[0].expected, says=says))
  return answers


def _kill(run: DisturbedRun) -> list[Answer]:
  with run.life() as life:
    return _killed(run, life)


def _terminate(run: DisturbedRun) -> list[Answer]:
  with run.life() as life:
    # Before its first line, a program may not have set the handlers of signals.
    _wait_until(lambda: life.has_logged, _PATIENCE)
    run.reach(life)
    life.signal(signal.SIGTERM, run.some_host())
    life.wait(range(life.hosts), _PATIENCE)
    run.interrupted.update(int(step) for step in re.findall(r"saved at step (\d+) of", life.text(0)))
    return _answers(run, life, {0: INTERRUPTED}, ALSO_INTERRUPTED)


def _stop(run: DisturbedRun) -> list[Answer]:
  """Stops a process for longer than the heartbeat; the same command is started meanwhile, and the process continues."""
  with run.life() as life:
    if not run.reach(life):
      return _answers(run, life, {}, COMPLETE)
    stopped = run.some_host()
    life.signal(signal.SIGSTOP, stopped)
    until = time.monotonic() + lives.HEARTBEAT + _BEYOND
    others = [host for host in range(life.hosts) if host != stopped]
    if others:
      life.wait(others, _PATIENCE)
    with run.life() as second:
      # The second start is refused if the stopped process holds the lock of the folder.
      _wait_until(lambda: second.last_step > 0 or second.wait(range(second.hosts), 0.0), _PATIENCE)
      time.sleep(max(0.0, until - time.monotonic()))
      life.signal(signal.SIGCONT, stopped)
      if others:
        life.wait([stopped], _PATIENCE)
        answers = _answers(run, life, {}, OTHER_HOST_DIED)
        if second.wait(range(second.hosts), 0.0):
          return answers + _refused(run, second)
        return answers + _killed(run, second)
      return _one_is_refused(run, life, second)


def _start_two(run: DisturbedRun) -> list[Answer]:
  with run.life() as first:
    time.sleep(run.rng.random() * 1.2 * (run.durations.median("start_up") or 1.0))
    with run.life() as second:
      return _one_is_refused(run, first, second)


def _one_is_refused(run: DisturbedRun, first: lives.Life, second: lives.Life) -> list[Answer]:
  """The answers of two lives of one run, of which one must be refused; the other is killed in the end."""
  everyone = range(first.hosts)
  _wait_until(lambda: first.wait(everyone, 0.0) or second.wait(everyone, 0.0), _PATIENCE)
  ended, other = (first, second) if first.wait(everyone, 0.0) else (second, first)
  if first.wait(everyone, 0.0) and not any(first.kill_host(host) for host in everyone):  # it has completed the run
    second.wait(everyone, _PATIENCE)
    return _answers(run, first, {}, COMPLETE) + _refused(run, second)
  return _refused(run, ended) + _killed(run, other)


def _refused(run: DisturbedRun, life: lives.Life) -> list[Answer]:
  return _answers(run, life, {0: REFUSED}, Expected(REFUSED.codes))


def _failing_disk(number: int, *, allows_removal: bool) -> Callable[[DisturbedRun], list[Answer]]:
  """A fault: from a random moment on, writes in the run's folder fail with an error of a number."""

  def inject(run: DisturbedRun) -> list[Answer]:
    places = {"folder": str(run.workdir), "marker": str(run.marker)}
    disk = places | {"error": number, "allows_removal": allows_removal}
    with run.life(disk=disk) as life:
      try:
        run.reach(life)
        run.marker.touch()
        life.wait(range(life.hosts), _PATIENCE)
        return _answers(run, life, {}, DISK_FAILED)
      finally:
        life.kill_now()
        run.marker.unlink(missing_ok=True)

  return inject


def _set_clock(run: DisturbedRun) -> list[Answer]:
  with run.life(clock=int(run.rng.integers(2**31))) as life:
    return _killed(run, life, running=True)


def _flip_bit(run: DisturbedRun) -> list[Answer]:
  newest = run.workdir / "checkpoints" / str(run.checkpoints()[-1])
  files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
  flip(files[run.rng.integers(len(files))], run.rng)
  run.cause = "flipped_bit"
  with run.life() as life:
    return _killed(run, life, says=DAMAGED.says, running=True)


def flip(path: pathlib.Path, rng: np.random.Generator) -> None:
  """Flips a random bit of a file."""
  content = bytearray(path.read_bytes())
  content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
  path.write_bytes(content)


def _truncate(run: DisturbedRun) -> list[Answer]:
  truncate(run.workdir / "metrics.jsonl", run.checkpoints()[-1], run.rng)
  run.cause = "truncated_line"
  with run.life() as life:
    return _killed(run, life)


def truncate(path: pathlib.Path, newest: int, rng: np.random.Generator) -> None:
  """Leaves an incomplete last line in metrics.jsonl, as a run that is killed while it writes the line.

  Lines before the newest checkpoint were flushed to the disk, so a kill can't truncate them: if there are no later
  lines, a part of the last line is appended.

  Args:
    path: the file, which has a line.
    newest: the step of the newest checkpoint.
    rng: the source of the length of the line.
  """
  lines = path.read_bytes().splitlines(keepends=True)
  whole = [line for line in lines if line.endswith(b"\n")]
  last = whole[-1]
  if jsonl.loads(last)["step"] > newest:
    whole.pop()
  path.write_bytes(b"".join(whole) + last[: rng.integers(1, len(last) - 1)])


@dataclasses.dataclass(frozen=True)
class Fault:
  """A kind of fault.

  Attributes:
    inject: runs one life of the run or more, injects the fault, and returns the answers of all processes.
    checkpoints: the number of finished checkpoints that the run must have.
  """

  inject: Callable[[DisturbedRun], list[Answer]]
  checkpoints: int = 0


FAULTS: dict[str, Fault] = {
  "kill": Fault(_kill),
  "sigterm": Fault(_terminate),
  "stopped": Fault(_stop),
  "full_disk": Fault(_failing_disk(errno.ENOSPC, allows_removal=True)),
  "read_only_disk": Fault(_failing_disk(errno.EROFS, allows_removal=False)),
  "clock": Fault(_set_clock),
  # The newest checkpoint is damaged, so there must be an earlier one.
  "flipped_bit": Fault(_flip_bit, checkpoints=2),
  "truncated_line": Fault(_truncate, checkpoints=1),
  "two_starters": Fault(_start_two),
}


@dataclasses.dataclass
class Tally:
  """What the faults of one kind have caused.

  Attributes:
    injected: the number of faults.
    missed: the number of lives that ended before the fault, because the run was complete.
    exit_codes: the number of processes by exit code.
    wrong: the number of wrong answers.
  """

  injected: int = 0
  missed: int = 0
  exit_codes: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
  wrong: int = 0

  def record(self, repeated: Sequence[int]) -> dict[str, Any]:
    """The fields of the result; `repeated`: the numbers of steps that the lives after these faults have run again."""
    return {
      "injected": self.injected,
      "missed": self.missed,
      "exit_codes": {str(code): count for code, count in sorted(self.exit_codes.items())},
      "wrong": self.wrong,
      "repeated_steps": sum(repeated),
      "repeated_steps_most": max(repeated, default=0),
    }


def soak() -> dict[str, Any]:
  """Trains undisturbed; then trains the same config again and again, for `--minutes`, with a fault in each life.

  Every kind of fault is injected at least once, in a random order. When the time is over, a life without a fault ends
  the last run. Every folder is compared with that of the undisturbed run, as `kills` does.

  Raises:
    Failed: a folder differs, or an answer is wrong; the result lists the first problems.
    InputError: `--minutes` is invalid, or the program refuses the config.
  """
  args, start = flags.FLAGS, time.perf_counter()
  if args.minutes < 0:
    raise InputError(f"--minutes: {args.minutes} must not be negative")
  with tempfile.TemporaryDirectory(prefix="cyb-soak-") as scratch:
    folder = pathlib.Path(scratch)
    config = compared_runs.write_config(folder, steps=_STEPS)
    with lives.server(folder) as server:
      rng = np.random.default_rng(args.kills_seed)
      run = DisturbedRun(server, config, folder, rng, hosts=args.hosts, devices=args.devices)
      logging.info("training undisturbed")
      with run.life() as life:
        life.end(run.durations)
      logging.info("undisturbed: %d steps in %.0f s", _STEPS, time.perf_counter() - start)
      watch = Watch(run)
      watch.disturb(time.monotonic() + 60 * args.minutes)
  result = {
    "benchmark": "faults",
    "plan": "soak",
    "hosts": run.hosts,
    "minutes": args.minutes,
    "runs": watch.runs,
    "steps": _STEPS,
    "faults": {name: tally.record(run.repeated[name]) for name, tally in watch.tallies.items()},
    "injected": sum(tally.injected for tally in watch.tallies.values()),
    "identical": watch.runs - watch.different,
    "problems": watch.problems[:_SHOWN_PROBLEMS],
    "timing": {"seconds": time.perf_counter() - start, "start_up_seconds": run.durations.median("start_up")},
  }
  if watch.problems:
    raise Failed(f"soak: {len(watch.problems)} problems; the first: {watch.problems[0]}", result)
  return result


class Watch:
  """Disturbs runs, and counts faults, runs and problems.

  Attributes:
    runs: the number of complete runs.
    different: the number of them that differ from the undisturbed run.
    tallies: by kind of fault.
    problems: a line for each wrong answer and each difference.
  """

  def __init__(self, run: DisturbedRun) -> None:
    self.runs, self.different = 0, 0
    self.tallies = {name: Tally() for name in FAULTS}
    self.problems: list[str] = []
    self._disturbed = run
    self._queue: list[str] = []

  def disturb(self, until: float) -> None:
    """Disturbs runs until a time of `time.monotonic`, and until every kind of fault was injected."""
    while not self._is_over(until):
      self._disturbed.begin(self.runs)
      self._run(until)

  def _is_over(self, until: float) -> bool:
    return time.monotonic() > until and all(tally.injected for tally in self.tallies.values())

  def _run(self, until: float) -> None:
    """Disturbs one run until it is complete or the time is over; compares its folder."""
    run, complete = self._disturbed, False
    while not complete and not self._is_over(until):
      complete = self._inject(self._next())
    if not complete:
      with run.life() as life:
        life.wait(range(life.hosts), _LONGEST_END)
        self._judge("the last life", _answers(run, life, {}, COMPLETE))
    self.runs += 1
    difference: str | None = "it is not complete"
    if (run.workdir / "evaluation.json").exists():
      difference = compared_runs.first_difference(run.reference, run.workdir, interrupted=run.interrupted)
    logging.info("run %d is complete: %s", self.runs, difference or "identical")
    if difference is not None:
      self.different += 1
      self.problems.append(f"run {self.runs} differs: {difference}")

  def _next(self) -> str:
    """The kind of the next fault: the next in a random order that the run can have now."""
    for _ in range(2):
      for name in self._queue:
        if FAULTS[name].checkpoints <= len(self._disturbed.checkpoints()):
          self._queue.remove(name)
          return name
      self._queue += [str(name) for name in self._disturbed.rng.permutation(list(FAULTS))]
    raise AssertionError("there are kinds of faults that need no checkpoint")

  def _inject(self, name: str) -> bool:
    """Injects a fault; returns whether the run is complete."""
    run, tally = self._disturbed, self.tallies[name]
    answers = FAULTS[name].inject(run)
    run.cause = name
    codes = [answer.code for answer in answers]
    complete = not any(codes[-run.hosts :])
    if not any(codes):
      tally.missed += 1
      self._queue.insert(0, name)
    else:
      tally.injected += 1
    tally.exit_codes.update(codes)
    logging.info("fault %d: %s, exit codes %s", sum(t.injected for t in self.tallies.values()), name, codes)
    tally.wrong += self._judge(name, answers)
    return complete

  def _judge(self, name: str, answers: Sequence[Answer]) -> int:
    """Adds the problems of answers to the list; returns their number."""
    problems = [(answer, problem) for answer in answers if (problem := answer.problem()) is not None]
    for answer, problem in problems:
      self.problems.append(f"{name}: {problem}")
      logging.warning("%s\n%s", self.problems[-1], answer.text[-3000:])
    return len(problems)
