"""A soak: runs that are disturbed by faults of many kinds, one in each life, and continued by the same command.

`FAULTS` is the table of the kinds. A new kind is an entry with a function that injects the fault into a life of a run,
and returns the answer of each process: its exit code and its output, next to those that are expected.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import pathlib
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from cyb_jax import jsonl
from cyb_jax.benchmarks import compared_runs, lives
from cyb_jax.errors import EXIT_BAD_INPUT, EXIT_CRASH, EXIT_INTERRUPTED, Failed, InputError

# The steps of a run, in which about one fault of each kind finds its place.
_STEPS = 700
# A message names its remedy by one of these words.
_REMEDY = re.compile(r"\b(the same command|start |give |wait for|free )")
_LINE_OF_A_LOG = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d|error: |[{]")
# The seconds for which a process is stopped beyond the heartbeat.
_BEYOND = 3.0
# The seconds within which a process must have answered. Other programs may use the machine at the same time.
_PATIENCE = 180.0
_LONGEST_END = 1200.0
_SHOWN_PROBLEMS = 20


@dataclasses.dataclass(frozen=True)
class Expected:
  """What a process answers to a fault.

  Attributes:
    codes: the accepted exit codes.
    says: a regular expression that its output must contain.
  """

  codes: tuple[int, ...]
  says: str = ""


KILLED = Expected((-signal.SIGKILL,))
INTERRUPTED = Expected((EXIT_INTERRUPTED,), r"the same command continues")
ALSO_INTERRUPTED = Expected((EXIT_INTERRUPTED,))
REFUSED = Expected((EXIT_BAD_INPUT,), r"another run (is training|has just trained) in")
# Before its first file is written, a run takes a disk that fails for an invalid folder.
DISK_FAILED = Expected((EXIT_CRASH, EXIT_BAD_INPUT))
DAMAGED = Expected((-signal.SIGKILL,), r"checkpoint \d+ is damaged: .*; it was moved to .*; \d+ is used instead")
# A host whose fellow has died; jax may abort it.
BEREFT = Expected((EXIT_CRASH, EXIT_BAD_INPUT, -signal.SIGABRT), r"error: ")
COMPLETE = Expected((0,))
# A process that still ran when it should have ended, so that the benchmark has killed it.
NOT_KILLED = Expected(())


@dataclasses.dataclass(frozen=True)
class Answer:
  """The exit code and the output of a process, and those that are expected."""

  code: int
  text: str
  expected: Expected
  hosts: int = 1

  def problem(self) -> str | None:
    """What is wrong with the answer; None if nothing is."""
    if not self.expected.codes:
      return "the process has not ended in time"
    if self.code not in self.expected.codes:
      return f"exit code {self.code} instead of {' or '.join(map(str, self.expected.codes))}"
    if "Traceback" in self.text:
      return "a traceback"
    lines = [line for line in self.text.splitlines() if line]
    errors = [line for line in lines if line.startswith("error: ")]
    wanted = int(self.code not in (0, -signal.SIGKILL, EXIT_INTERRUPTED))
    # A host that ends because another host was interrupted reports the line of that host.
    if len(errors) != wanted and not (self.hosts > 1 and self.code == EXIT_INTERRUPTED and len(errors) == 1):
      return f"{len(errors)} error lines instead of {wanted}"
    for line in errors:
      if not _REMEDY.search(line):
        return f"a message that names no remedy: {line}"
    if not re.search(self.expected.says, self.text):
      return f"no message of the form {self.expected.says!r}"
    # The runtime prints lines of its own if a host has died.
    stray = [line for line in lines if not _LINE_OF_A_LOG.match(line)] if self.hosts == 1 else []
    return f"a message of several lines: {stray[0]}" if stray else None


class Scene:
  """A run that is disturbed: the command that starts and continues it, and the source of randomness.

  Args:
    server: the server of the lives.
    config: the config file of the run.
    folder: a folder for the runs.
    rng: the source of randomness.
    hosts, devices: see `lives.Server.life`.

  Attributes:
    workdir: the folder of the run; `reference` is that of the undisturbed run, which comes first.
    rng, durations: see `lives.Life.reach`.
    cause: the kind of the fault that the next life continues after.
    interrupted: the steps at which SIGTERM has made the run save.
    repeated: by kind of fault, the numbers of steps that the lives after it have run again.
  """

  def __init__(
    self,
    server: lives.Server,
    config: pathlib.Path,
    folder: pathlib.Path,
    rng: np.random.Generator,
    *,
    hosts: int = 1,
    devices: int = 0,
  ):
    self.rng, self.durations, self.hosts = rng, lives.Durations(), hosts
    self.workdir = self.reference = folder / "undisturbed"
    self.cause = ""
    self.interrupted: set[int] = set()
    self.repeated: dict[str, list[int]] = collections.defaultdict(list)
    self.marker = folder / "disk_fails"
    self._server, self._config, self._folder, self._devices = server, config, folder, devices
    self._reached = 0

  def begin(self, number: int) -> None:
    """Begins the run of a number, in a new folder."""
    self.workdir, self._reached, self.cause = self._folder / f"disturbed{number}", 0, ""
    self.interrupted = set()

  @contextlib.contextmanager
  def life(self, **injected: Any) -> Iterator[lives.Life]:
    """A life of the run, new or continued; see `lives.Server.life`."""
    with self._server.life(
      self._config, self.workdir, hosts=self.hosts, devices=self._devices, injected=injected
    ) as life:
      yield life
    if life.first_step:
      if self._reached:
        self.repeated[self.cause].append(max(0, self._reached - life.first_step + 1))
      self._reached = max(self._reached, life.last_step)

  def reach(self, life: lives.Life, *, running: bool = False) -> bool:
    """Waits for a random moment of a random phase; returns False if the life has ended before.

    Args:
      life: the life.
      running: whether a step must have been done.
    """
    phases = {name: share for name, share in lives.PHASES.items() if not (running and name == "start_up")}
    shares = np.array(list(phases.values()))
    return life.reach(str(self.rng.choice(list(phases), p=shares / shares.sum())), self.rng, self.durations)

  def some_host(self) -> int:
    """A random host."""
    return int(self.rng.integers(self.hosts))

  def checkpoints(self) -> list[int]:
    """The steps of the finished checkpoints, ascending."""
    folder = self.workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def _answers(scene: Scene, life: lives.Life, expected: Mapping[int, Expected], rest: Expected) -> list[Answer]:
  """The answers of all hosts of a life that has ended; hosts that still run are killed, which is a wrong answer.

  Args:
    scene: the scene of the life.
    life: the life.
    expected: the expected answers of some hosts.
    rest: that of the other hosts.
  """
  running = [host for host in range(life.hosts) if not life.has_ended(host)]
  answers = []
  for host, code in enumerate([life.kill_host(host) for host in range(life.hosts)]):
    wanted = expected.get(host, rest)
    if code == 0 and (scene.workdir / "evaluation.json").exists():  # the run was complete before the fault
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


def _killed(scene: Scene, life: lives.Life, *, says: str = "", running: bool = False) -> list[Answer]:
  """The answers after one host is killed at a random moment; the others must then exit."""
  scene.reach(life, running=running)
  victim = scene.some_host()
  life.kill_host(victim)
  others = [host for host in range(life.hosts) if host != victim]
  life.wait(others, _PATIENCE)
  answers = _answers(scene, life, {victim: KILLED}, BEREFT)
  answers[0] = dataclasses.replace(answers[0], expected=dataclasses.replace(answers[0].expected, says=says))
  return answers


def _kill(scene: Scene) -> list[Answer]:
  with scene.life() as life:
    return _killed(scene, life)


def _terminate(scene: Scene) -> list[Answer]:
  with scene.life() as life:
    # Before its first line, a program may not have set the handlers of signals.
    _wait_until(lambda: life.has_logged, _PATIENCE)
    scene.reach(life)
    life.signal(signal.SIGTERM, scene.some_host())
    life.wait(range(life.hosts), _PATIENCE)
    scene.interrupted.update(int(step) for step in re.findall(r"saved at step (\d+) of", life.text(0)))
    return _answers(scene, life, {0: INTERRUPTED}, ALSO_INTERRUPTED)


def _stop(scene: Scene) -> list[Answer]:
  """Stops a process for longer than the heartbeat; the same command is started meanwhile, and the process continues."""
  with scene.life() as life:
    if not scene.reach(life):
      return _answers(scene, life, {}, COMPLETE)
    stopped = scene.some_host()
    life.signal(signal.SIGSTOP, stopped)
    until = time.monotonic() + lives.HEARTBEAT + _BEYOND
    others = [host for host in range(life.hosts) if host != stopped]
    if others:
      life.wait(others, _PATIENCE)
    with scene.life() as second:
      # The second start is refused if the stopped process holds the lock of the folder.
      _wait_until(lambda: second.last_step > 0 or second.wait(range(second.hosts), 0.0), _PATIENCE)
      time.sleep(max(0.0, until - time.monotonic()))
      life.signal(signal.SIGCONT, stopped)
      if others:
        life.wait([stopped], _PATIENCE)
        answers = _answers(scene, life, {}, BEREFT)
        if second.wait(range(second.hosts), 0.0):
          return answers + _refused(scene, second)
        return answers + _killed(scene, second)
      return _one_is_refused(scene, life, second)


def _start_two(scene: Scene) -> list[Answer]:
  with scene.life() as first:
    time.sleep(scene.rng.random() * 1.2 * (scene.durations.median("start_up") or 1.0))
    with scene.life() as second:
      return _one_is_refused(scene, first, second)


def _one_is_refused(scene: Scene, first: lives.Life, second: lives.Life) -> list[Answer]:
  """The answers of two lives of one run, of which one must be refused; the other is killed in the end."""
  everyone = range(first.hosts)
  _wait_until(lambda: first.wait(everyone, 0.0) or second.wait(everyone, 0.0), _PATIENCE)
  ended, other = (first, second) if first.wait(everyone, 0.0) else (second, first)
  if first.wait(everyone, 0.0) and not any(first.kill_host(host) for host in everyone):  # it has completed the run
    second.wait(everyone, _PATIENCE)
    return _answers(scene, first, {}, COMPLETE) + _refused(scene, second)
  return _refused(scene, ended) + _killed(scene, other)


def _refused(scene: Scene, life: lives.Life) -> list[Answer]:
  return _answers(scene, life, {0: REFUSED}, Expected(REFUSED.codes))


def _failing_disk(number: int, *, allows_removal: bool) -> Callable[[Scene], list[Answer]]:
  """A fault: from a random moment on, writes in the run's folder fail with an error of a number."""

  def inject(scene: Scene) -> list[Answer]:
    places = {"folder": str(scene.workdir), "marker": str(scene.marker)}
    disk = places | {"error": number, "allows_removal": allows_removal}
    with scene.life(disk=disk) as life:
      try:
        scene.reach(life)
        scene.marker.touch()
        life.wait(range(life.hosts), _PATIENCE)
        return _answers(scene, life, {}, DISK_FAILED)
      finally:
        life.kill_now()
        scene.marker.unlink(missing_ok=True)

  return inject


def _set_clock(scene: Scene) -> list[Answer]:
  with scene.life(clock=int(scene.rng.integers(2**31))) as life:
    return _killed(scene, life, running=True)


def _flip_bit(scene: Scene) -> list[Answer]:
  newest = scene.workdir / "checkpoints" / str(scene.checkpoints()[-1])
  files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
  flip(files[scene.rng.integers(len(files))], scene.rng)
  scene.cause = "flipped_bit"
  with scene.life() as life:
    return _killed(scene, life, says=DAMAGED.says, running=True)


def flip(path: pathlib.Path, rng: np.random.Generator) -> None:
  """Flips a random bit of a file."""
  content = bytearray(path.read_bytes())
  content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
  path.write_bytes(content)


def _truncate(scene: Scene) -> list[Answer]:
  truncate(scene.workdir / "metrics.jsonl", scene.checkpoints()[-1], scene.rng)
  scene.cause = "truncated_line"
  with scene.life() as life:
    return _killed(scene, life)


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
    inject: runs one life of the scene's run or more, injects the fault, and returns the answers of all processes.
    checkpoints: the number of finished checkpoints that the run must have.
  """

  inject: Callable[[Scene], list[Answer]]
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
      scene = Scene(server, config, folder, rng, hosts=args.hosts, devices=args.devices)
      logging.info("training undisturbed")
      with scene.life() as life:
        life.end(scene.durations)
      logging.info("undisturbed: %d steps in %.0f s", _STEPS, time.perf_counter() - start)
      watch = Watch(scene)
      watch.disturb(time.monotonic() + 60 * args.minutes)
  result = {
    "benchmark": "faults",
    "plan": "soak",
    "hosts": scene.hosts,
    "minutes": args.minutes,
    "runs": watch.runs,
    "steps": _STEPS,
    "faults": {name: tally.record(scene.repeated[name]) for name, tally in watch.tallies.items()},
    "injected": sum(tally.injected for tally in watch.tallies.values()),
    "identical": watch.runs - watch.different,
    "problems": watch.problems[:_SHOWN_PROBLEMS],
    "timing": {"seconds": time.perf_counter() - start, "start_up_seconds": scene.durations.median("start_up")},
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

  def __init__(self, scene: Scene) -> None:
    self.runs, self.different = 0, 0
    self.tallies = {name: Tally() for name in FAULTS}
    self.problems: list[str] = []
    self._scene = scene
    self._queue: list[str] = []

  def disturb(self, until: float) -> None:
    """Disturbs runs until a time of `time.monotonic`, and until every kind of fault was injected."""
    while not self._is_over(until):
      self._scene.begin(self.runs)
      self._run(until)

  def _is_over(self, until: float) -> bool:
    return time.monotonic() > until and all(tally.injected for tally in self.tallies.values())

  def _run(self, until: float) -> None:
    """Disturbs one run until it is complete or the time is over; compares its folder."""
    scene, complete = self._scene, False
    while not complete and not self._is_over(until):
      complete = self._inject(self._next())
    if not complete:
      with scene.life() as life:
        life.wait(range(life.hosts), _LONGEST_END)
        self._judge("the last life", _answers(scene, life, {}, COMPLETE))
    self.runs += 1
    difference: str | None = "it is not complete"
    if (scene.workdir / "evaluation.json").exists():
      difference = compared_runs.first_difference(scene.reference, scene.workdir, interrupted=scene.interrupted)
    logging.info("run %d is complete: %s", self.runs, difference or "identical")
    if difference is not None:
      self.different += 1
      self.problems.append(f"run {self.runs} differs: {difference}")

  def _next(self) -> str:
    """The kind of the next fault: the next in a random order that the run can have now."""
    for _ in range(2):
      for name in self._queue:
        if FAULTS[name].checkpoints <= len(self._scene.checkpoints()):
          self._queue.remove(name)
          return name
      self._queue += [str(name) for name in self._scene.rng.permutation(list(FAULTS))]
    raise AssertionError("there are kinds of faults that need no checkpoint")

  def _inject(self, name: str) -> bool:
    """Injects a fault; returns whether the run is complete."""
    scene, tally = self._scene, self.tallies[name]
    answers = FAULTS[name].inject(scene)
    scene.cause = name
    codes = [answer.code for answer in answers]
    complete = not any(codes[-scene.hosts :])
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
