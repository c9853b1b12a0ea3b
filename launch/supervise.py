"""Sees a training through: asks for a machine, waits, installs, runs, follows; again where it is taken away.

create -> queue -> upload -> run -> follow -> done, deleted
   ^        |         |       |       |
   +--------+---------+-------+-------+   taken away: delete, wait, again (at most max_retries times in a row)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import commands
from absl import logging
from commands import Machine, Step
from processes import Done, Interrupted, Interrupts, Process, run

UNKNOWN = "UNKNOWN"
GONE = "NOT_FOUND"
# Of a queued resource, and what they mean for whoever waits.
MEANING = {
  "CREATING": "the request has arrived",
  "ACCEPTED": "it stands in the queue",
  "WAITING_FOR_RESOURCES": "it stands in the queue until there is capacity; nothing is billed yet",
  "PROVISIONING": "its machines are being made",
  "ACTIVE": "it is there, and billed from now on",
  "FAILED": "it could not be had",
  "SUSPENDING": "it is being taken away",
  "SUSPENDED": "it was taken away",
  "DELETING": "it is being deleted",
  GONE: "it isn't there",
  UNKNOWN: "the cloud doesn't say",
}
LOST = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING", GONE)
NODE_LOST = ("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING", GONE)

# What asking again won't cure.
_REFUSED = re.compile(
  r"INVALID_ARGUMENT|PERMISSION_DENIED|UNAUTHENTICATED|unrecognized arguments|does not have permission|invalid choice"
  r"|Invalid value|do not currently have an active account|was not found or access|is not supported|SERVICE_DISABLED"
)
_NO_ROOM = re.compile(
  r"RESOURCE_EXHAUSTED|quota (?:limit|'|.*exceeded|.*exhausted)|capacity|stockout|\b429\b", re.IGNORECASE
)
# The connection rather than what was run over it.
_CONNECTION = re.compile(
  r"return code \[255\]|Connection (?:closed|refused|reset|timed out)|no answer in|unusable", re.I
)

EXIT_MARK = "cyb-launch: exit "


class LostError(Exception):
  """The machine was taken away, or can't be used: another one is needed."""


class RefusedError(Exception):
  """The cloud won't have what it was asked for, however often."""


class FailedError(Exception):
  """What runs on the workers fails, and would on others."""


class GaveUpError(Exception):
  """Tried often enough."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """How often, and how long; seconds. Each is a flag."""

  max_retries: int = 20
  max_crashes: int = 2
  ssh_attempts: int = 3
  delete_attempts: int = 6
  poll_seconds: float = 20
  backoff_seconds: float = 30
  backoff_limit_seconds: float = 900
  reconnect_seconds: float = 10
  call_seconds: float = 300
  step_seconds: float = 3600
  stop_seconds: float = 300
  grace_seconds: float = 60
  straggler_seconds: float = 300
  unreachable_seconds: float = 1800
  healthy_seconds: float = 1800
  delete_seconds: float = 900


@dataclasses.dataclass(frozen=True)
class Job:
  """What is trained, from what."""

  flags: Sequence[str] = ()
  checkout: pathlib.Path = commands.ROOT
  commit: str = ""
  extras: str = "tpu,reviews"
  cache: pathlib.Path = pathlib.Path()
  source: str = ""

  @property
  def archive(self) -> pathlib.Path:
    return self.cache / "cyb_jax.tar.gz"

  @property
  def flags_file(self) -> pathlib.Path:
    return self.cache / "cyb-flags.txt"

  def clear(self) -> None:
    """Removes what was made to be uploaded."""
    with contextlib.suppress(OSError):
      for path in (self.archive, self.flags_file):
        path.unlink(missing_ok=True)
      self.cache.rmdir()


@dataclasses.dataclass(frozen=True)
class Worker:
  """One host of one slice; its label stands before its lines."""

  node: str
  index: int
  label: str


def setup_steps(machine: Machine, job: Job, node: str, worker: str = "all") -> list[Step]:
  """What brings a checkout onto workers."""
  return [
    Step("The checkout's last commit to the workers.", commands.copy(machine, node, worker, job.archive)),
    Step("Unpack it there.", commands.ssh(machine, node, worker, commands.UNPACK)),
    Step(
      "Python 3.11 and the pinned versions, in a venv beside it; takes some minutes.",
      commands.ssh(machine, node, worker, commands.on_worker(machine, "install", job.extras)),
    ),
  ]


def run_step(machine: Machine, job: Job, node: str, worker: str = "all") -> Step:
  return Step(
    "Train on every worker, in a tmux session that outlives the connection; where one trains already, nothing happens.",
    commands.ssh(machine, node, worker, commands.on_worker(machine, "run", *job.flags)),
  )


def follow_words(machine: Machine, node: str, worker: int, line: int = 1) -> list[str]:
  return commands.ssh(machine, node, str(worker), commands.on_worker(machine, "follow", str(line)))


class Cloud:
  """One machine, as the cloud has it.

  Args:
    interrupts: end whatever waits.
  """

  def __init__(self, machine: Machine, limits: Limits, interrupts: Interrupts):
    self.machine, self.limits, self.interrupts = machine, limits, interrupts

  def call(self, words: Sequence[str], **options: Any) -> Done:
    return run(words, self.interrupts, **{"seconds": self.limits.call_seconds} | options)

  def _described(self, words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    done = self.call(words)
    if done.code:
      if GONE in done.err:
        return GONE, {}
      return UNKNOWN, {"said": done.said()}
    try:
      return "", json.loads(done.out)
    except ValueError:
      return UNKNOWN, {"said": f"no JSON: {done.out[:80]!r}"}

  def state(self) -> tuple[str, dict[str, Any]]:
    """The queued resource's state, GONE or UNKNOWN; and all that is said of it."""
    problem, found = self._described(commands.describe(self.machine))
    return problem or found.get("state", {}).get("state", UNKNOWN), found

  def node(self, node: str) -> tuple[str, dict[str, Any]]:
    """A node's state, GONE or UNKNOWN; and all that is said of it."""
    problem, found = self._described(commands.describe_node(self.machine, node))
    return problem or found.get("state", UNKNOWN), found

  def why(self, found: dict[str, Any]) -> str:
    """What a description says went wrong; '' where it says nothing."""
    said = found.get("state", {}).get("failedData", {}).get("error", {}).get("message", "") or found.get("said", "")
    return f" ({said})" if said else ""

  def check(self) -> None:
    """Raises LostError where the machine isn't there any more."""
    state, found = self.state()
    if state in LOST:
      raise LostError(f"{self.machine.name} is {state}: {MEANING[state]}{self.why(found)}")
    if state == UNKNOWN:
      logging.warning("the cloud doesn't say how %s is%s", self.machine.name, self.why(found))
      return
    for node in self.machine.nodes:
      state, _ = self.node(node)
      if state in NODE_LOST:
        raise LostError(f"node {node} is {state}")

  def wait(self, on_state: Callable[[str], None]) -> None:
    """Returns when it is ACTIVE.

    Raises:
      LostError: it failed, or has gone.
    """
    last = ""
    while True:
      state, found = self.state()
      if state != last:
        on_state(state)
        logging.info(
          "%s: %s: %s%s", self.machine.name, state, MEANING.get(state, "a state of the cloud's own"), self.why(found)
        )
        last = state
      if state == "ACTIVE":
        return
      if state in LOST:
        raise LostError(f"{self.machine.name} is {state}: {MEANING[state]}{self.why(found)}")
      self.interrupts.pause(self.limits.poll_seconds)

  def workers(self) -> list[Worker]:
    """The hosts of all nodes, by the addresses that the cloud gives."""
    workers = []
    for i, node in enumerate(self.machine.nodes):
      state, found = self.node(node)
      if state in NODE_LOST:
        raise LostError(f"node {node} is {state}")
      count = len(found.get("networkEndpoints", ())) or (commands.hosts(self.machine.type) if self.machine.type else 1)
      slice_label = f"s{i}" if self.machine.slices > 1 else ""
      workers += [Worker(node, w, f"{slice_label}w{w}") for w in range(count)]
    return workers

  def present(self) -> list[str]:
    """What there still is, or might be: what the cloud doesn't say counts as there."""
    left = []
    state, _ = self.state()
    if state != GONE:
      left.append(f"queued resource {self.machine.name} ({state})")
    for node in self.machine.nodes:
      state, _ = self.node(node)
      if state != GONE:
        left.append(f"node {node} ({state})")
    return left

  def delete(self) -> list[str]:
    """Deletes the queued resource and its nodes, and looks until they have gone.

    Returns:
      What is left.
    """
    left = self.present()
    for attempt in range(self.limits.delete_attempts):
      if not left:
        break
      if attempt:
        self.interrupts.pause(self.backoff(attempt))
      asked = []
      if left[0].startswith("queued resource"):
        if "DELETING" not in left[0]:
          asked.append(commands.delete(self.machine))
      else:
        asked += [
          commands.delete_node(self.machine, n) for n in self.machine.nodes if any(f"node {n} " in x for x in left)
        ]
      worked = True
      for words in asked:
        logging.info("deleting: %s", commands.shell(words))
        done = self.call(words, seconds=self.limits.delete_seconds)
        if done.code and GONE not in done.err:
          logging.warning("it can't be deleted: %s", done.said())
          worked = False
      until = time.monotonic() + self.limits.delete_seconds
      while (left := self.present()) and worked and time.monotonic() < until:
        # A node that outlives its queued resource is deleted by itself.
        if not left[0].startswith("queued resource") and not any("DELETING" in x for x in left):
          break
        self.interrupts.pause(self.limits.poll_seconds)
    return left

  def backoff(self, attempt: int) -> float:
    """Seconds to wait before attempt 1, 2, ...: doubled each time, up to a limit."""
    return min(self.limits.backoff_seconds * 2 ** (attempt - 1), self.limits.backoff_limit_seconds)


class Follower:
  """A worker's log, read line by line over connections that may break; nothing is shown twice, nothing is left out.

  Args:
    emit: is given each line.
  """

  def __init__(self, machine: Machine, worker: Worker, emit: Callable[[str], None]):
    self._machine, self.worker, self._emit = machine, worker, emit
    self._next = 1
    self.last = ""
    self.forget()

  def forget(self) -> None:
    """Before it trains again: how it ended is to be told anew."""
    self.exit: str | None = None
    self._process: Process | None = None
    self._begun = self._retry = 0.0
    self.silent_since: float | None = None

  def _line(self, line: str) -> None:
    self.silent_since = None
    if line.startswith(EXIT_MARK):
      self.exit = line.removeprefix(EXIT_MARK)
      return
    self._next += 1
    self.last = line
    self._emit(line)

  def tend(self, reconnect_seconds: float) -> bool:
    """Connects where it isn't connected; whether a connection has just broken."""
    now = time.monotonic()
    if self._process is None:
      if now >= self._retry and self.exit is None:
        self._begun = now
        words = follow_words(self._machine, self.worker.node, self.worker.index, self._next)
        self._process = Process(words, self._line)
      return False
    if self._process.running():
      if now - self._begun > 6 * reconnect_seconds:
        self.silent_since = None
      return False
    done = self._process.done()
    self._process = None
    if self.exit is not None:
      return False
    self._retry = now + reconnect_seconds
    if self.silent_since is None:
      self.silent_since = now
    logging.warning("%s: its log broke off (%s); connecting again", self.worker.label, done.said())
    return True

  def close(self) -> None:
    if self._process is not None:
      self._process.kill()
      self._process = None


class Supervisor:
  """Does what `train` does, and its parts.

  Args:
    keep: leave the machine behind.
  """

  def __init__(self, cloud: Cloud, job: Job, *, keep: bool = False):
    self.cloud, self.machine, self.limits, self.interrupts = cloud, cloud.machine, cloud.limits, cloud.interrupts
    self.job, self.keep = job, keep
    self.workers: list[Worker] = []
    self.followers: list[Follower] = []
    self.counts = {"retries": 0, "machines_lost": 0, "crashes": 0}
    self.states: list[str] = []
    self._in_a_row = 0
    self._asked = False
    self._trains = False
    self._begun = 0.0
    self._crashes = 0  # in a row
    self._looked = 0.0

  # Parts, each a command of its own.

  def create(self) -> None:
    """Asks for the machine, once.

    Raises:
      RefusedError: asking again won't help.
      LostError: it may.
    """
    done = self.cloud.call(self.create_words(), to_the_end=True)
    if done.code == 0 or "ALREADY_EXISTS" in done.err:
      return
    if _REFUSED.search(done.err) and not _NO_ROOM.search(done.err):
      raise RefusedError(done.said())
    raise LostError(("no room: " if _NO_ROOM.search(done.err) else "") + done.said())

  def create_words(self) -> list[str]:
    job = self.job
    return commands.create(self.machine, source=job.source, flags_file=str(job.flags_file), extras=job.extras)

  def pack(self) -> None:
    """Packs the checkout's HEAD; for a startup script, lays it into the bucket."""
    self.job.cache.mkdir(parents=True, exist_ok=True)
    steps = [Step("pack", commands.archive(self.job.checkout, self.job.archive))]
    if self.machine.startup:
      self.job.flags_file.write_text("".join(f"{flag}\n" for flag in self.job.flags))
      steps.append(Step("lay into the bucket", commands.to_bucket(self.job.archive, self.job.source)))
    for step in steps:
      for attempt in range(self.limits.ssh_attempts):
        done = self.cloud.call(step.words, seconds=self.limits.step_seconds)
        if not done.code:
          break
        logging.warning("`%s`: %s", commands.shell(step.words), done.said())
        if attempt + 1 < self.limits.ssh_attempts:
          self.interrupts.pause(self.limits.reconnect_seconds)
      else:
        raise FailedError(f"`{commands.shell(step.words)}`: {done.said()}")

  def upload(self) -> None:
    """The checkout onto all workers, and installed there."""
    for i in range(3):
      self.everywhere(lambda node, worker, i=i: setup_steps(self.machine, self.job, node, worker)[i])

  def start(self) -> None:
    self.everywhere(lambda node, worker: run_step(self.machine, self.job, node, worker))

  def everywhere(self, step: Callable[[str, str], Step], *, seconds: float | None = None) -> list[str]:
    """A command on all workers at once; where that fails, on each by itself, so that one that fails is tried again.

    Args:
      step: makes it, of a node and a worker ('all', or a number).

    Returns:
      What they printed, for each node or worker that was asked.

    Raises:
      LostError: the machine has gone, or some worker can't be used.
      FailedError: it fails on all of them, and not for the connection.
    """
    options = {"seconds": seconds or self.limits.step_seconds, "watch": self.watch}
    printed = []
    for node in self.machine.nodes:
      first = step(node, "all")
      logging.info("%s: %s", node, first.why)
      done = self.cloud.call(first.words, **options)
      if not done.code:
        printed.append(done.out)
        continue
      workers = [w for w in self.workers if w.node == node]
      logging.warning("%s: %s; each of its %d workers by itself", node, done.said(), len(workers))
      failed: dict[str, Done] = {}
      for worker in workers:
        for attempt in range(self.limits.ssh_attempts):
          self.cloud.check()
          if attempt:
            self.interrupts.pause(self.limits.reconnect_seconds)
          done = self.cloud.call(step(node, str(worker.index)).words, **options)
          if not done.code:
            printed.append(done.out)
            break
          logging.warning("%s: %s (attempt %d of %d)", worker.label, done.said(), attempt + 1, self.limits.ssh_attempts)
        else:
          failed[worker.label] = done
          if len(failed) < len(workers):
            # One is enough to need another machine; whether all fail alike is worth knowing.
            continue
      if failed:
        label, done = next(iter(failed.items()))
        message = f"{label}: {first.why} {done.said()}"
        if len(failed) == len(workers) and not _CONNECTION.search(done.err):
          raise FailedError(message)
        raise LostError(message)
    return printed

  def watch(self) -> None:
    """Looks after the machine now and then."""
    now = time.monotonic()
    if now - self._looked >= self.limits.poll_seconds:
      self.cloud.check()
      self._looked = time.monotonic()

  def follow(self, emit: Callable[[str, str], None], workers: Sequence[Worker] | None = None) -> dict[str, str]:
    """Shows the workers' logs until all have ended.

    Args:
      emit: is given a worker's label and a line.

    Returns:
      How each has ended: an exit code, 'none', or either with ' stopped' behind it.
    """
    chosen = self.workers if workers is None else workers
    if [f.worker for f in self.followers] != list(chosen):
      self.followers = [Follower(self.machine, w, lambda line, w=w: emit(w.label, line)) for w in chosen]
    for follower in self.followers:
      follower.forget()
    bad_since: float | None = None
    halted = False
    try:
      while True:
        self.interrupts.check()
        for follower in self.followers:
          if follower.tend(self.limits.reconnect_seconds):
            self.cloud.check()
        self.watch()
        now = time.monotonic()
        if all(f.exit is not None for f in self.followers):
          break
        for follower in self.followers:
          if follower.exit is None and now - (follower.silent_since or now) > self.limits.unreachable_seconds:
            raise LostError(f"{follower.worker.label} can't be reached any more")
        if bad_since is None and any(f.exit not in (None, "0") for f in self.followers):
          bad_since = now
        if bad_since is not None and now - bad_since > self.limits.straggler_seconds:
          late = [f.worker.label for f in self.followers if f.exit is None]
          if halted:
            raise LostError(f"{', '.join(late)}: can't be stopped")
          logging.warning(
            "%s: still there %g s after another worker has ended; stopping", ", ".join(late), now - bad_since
          )
          self.halt()
          halted, bad_since = True, time.monotonic()
        time.sleep(0.02)
    finally:
      for follower in self.followers:
        follower.close()
    return {f.worker.label: f.exit for f in self.followers}

  def halt(self, verb: str = "halt") -> list[str]:
    """Stops the training, so that it saves; what the workers say then."""
    seconds = self.limits.stop_seconds
    step = lambda node, worker: Step(  # noqa: E731
      "Stop it; it saves first.",
      commands.ssh(self.machine, node, worker, commands.on_worker(self.machine, verb, f"{max(1, round(seconds))}")),
    )
    said = self.everywhere(step, seconds=seconds + self.limits.call_seconds)
    return [line for text in said for line in text.splitlines()]

  # The whole.

  def train(self, emit: Callable[[str, str], None]) -> dict[str, Any]:
    """All of it, until it is done, has failed too often, or is interrupted; nothing is left behind then, unless `keep`.

    Returns:
      `state` (finished, failed, bad_input, gave_up, refused, interrupted, stopped), `reason`, `exit_codes` by worker,
      counts, `evaluation` (what cyb-train printed last), and `left`, what couldn't be deleted.
    """
    codes: dict[str, str] = {}
    try:
      try:
        state, reason, codes = self._see_through(emit)
      except RefusedError as error:
        state, reason = "refused", str(error)
      except FailedError as error:
        state, reason = "failed", str(error)
      except GaveUpError as error:
        state, reason = "gave_up", str(error)
      except Interrupted:
        state, reason = "interrupted", "by a signal"
        if not self.keep:
          self._stop_first()
      if reason:
        logging.info("%s: %s", state, reason)
    except BaseException:
      # Whatever it was, it mustn't leave a machine behind.
      self._leave("crashed")
      raise
    left = self._leave(state)
    return {
      "name": self.machine.name,
      "state": state,
      "reason": reason,
      "exit_codes": codes,
      **self.counts,
      "queue_states": self.states,
      "evaluation": self._evaluation(),
      "left": left,
      "delete": commands.shell(commands.delete(self.machine)) if left else None,
    }

  def _see_through(self, emit: Callable[[str, str], None]) -> tuple[str, str, dict[str, str]]:
    packed = False
    while True:
      try:
        if not packed:
          self.pack()
          packed = True
        self._acquire()
        self.workers = self.cloud.workers()
        logging.info("%s has %d workers", self.machine.name, len(self.workers))
        self._looked = time.monotonic()
        if not self.machine.startup:
          self.upload()
        while True:
          self._trains, self._begun = True, time.monotonic()
          if not self.machine.startup:
            self.start()
          codes = self.follow(emit)
          self._trains = False
          said = ", ".join(f"{label} {code}" for label, code in codes.items())
          verdict = judge(codes.values())
          logging.info("training has ended: %s (exit codes: %s)", verdict, said)
          if verdict != "again":
            if verdict == "crashed":
              self._count_crash(said)
            else:
              return verdict, "" if verdict == "finished" else f"exit codes: {said}", codes
          else:
            # It may be the first sign that the machine is being taken away.
            until = time.monotonic() + self.limits.grace_seconds
            while time.monotonic() < until:
              self.cloud.check()
              self.interrupts.pause(min(self.limits.poll_seconds, self.limits.grace_seconds))
            self._count_retry(f"it was interrupted, and the machine is still there (exit codes: {said})")
          self.cloud.check()
          if self.machine.startup:
            raise LostError("its service has ended")
          self.halt()
      except LostError as lost:
        logging.warning("%s", lost)
        if self._trains or self.workers:
          self.counts["machines_lost"] += 1
        self._trains = False
        self._delete_for_another()
        self.workers, self.followers = [], []
        self._count_retry(str(lost))

  def _acquire(self) -> None:
    """The machine, created or found, ACTIVE."""
    state, found = self.cloud.state()
    if state in LOST and state != GONE:
      logging.info("%s is there, but %s: %s", self.machine.name, state, MEANING[state])
      self._asked = True
      self._delete_for_another()
      state = GONE
    if state == GONE:
      self._asked = True
      logging.info("asking for %s: %s", self.machine.type, commands.shell(self.create_words()))
      try:
        self.create()
      except RefusedError:
        self._asked = False
        raise
    elif state == UNKNOWN:
      if _REFUSED.search(found.get("said", "")):
        raise RefusedError(found["said"])
      raise LostError(f"the cloud doesn't say whether {self.machine.name} is there{self.cloud.why(found)}")
    else:
      there = found.get("tpu", {}).get("nodeSpec", [{}])[0].get("node", {}).get("acceleratorType", self.machine.type)
      if there != self.machine.type:
        raise RefusedError(
          f"--name: {self.machine.name} is there already, as a {there}; take another name, or delete it"
        )
      self._asked = True
      logging.info("%s is there already and is taken; it will be deleted in the end unless --keep", self.machine.name)
    self.cloud.wait(self.states.append)

  def _count_retry(self, why: str) -> None:
    if self._begun and time.monotonic() - self._begun > self.limits.healthy_seconds:
      self._in_a_row = 0
    self._begun = 0.0
    if self._in_a_row >= self.limits.max_retries:
      raise GaveUpError(
        f"after {self.counts['retries']} retries, {self._in_a_row} of them in a row (--max_retries): {why}"
      )
    self._in_a_row += 1
    self.counts["retries"] += 1
    seconds = self.cloud.backoff(self._in_a_row)
    logging.info("retry %d of %d in a row, in %g s", self._in_a_row, self.limits.max_retries, seconds)
    self.interrupts.pause(seconds)

  def _count_crash(self, said: str) -> None:
    self.counts["crashes"] += 1
    if self._begun and time.monotonic() - self._begun > self.limits.healthy_seconds:
      self._crashes = 0
    self._crashes += 1
    # A service has begun again by itself before it ends.
    if self.machine.startup or self._crashes > self.limits.max_crashes:
      raise FailedError(f"training crashed {self._crashes} times in a row (--max_crashes; exit codes: {said})")
    logging.info("crash %d in a row; %d are begun again", self._crashes, self.limits.max_crashes)
    self.interrupts.pause(self.limits.backoff_seconds)

  def _delete_for_another(self) -> None:
    left = self.cloud.delete()
    if left:
      raise GaveUpError(f"can't be deleted: {', '.join(left)}")

  def _stop_first(self) -> None:
    """So that what was trained since the last checkpoint isn't lost; a second Ctrl-C goes on at once."""
    if not self._trains:
      return
    logging.info("interrupted; training is stopped and saved first, then the machine is deleted (again: delete it now)")
    try:
      logging.info("stopped: %s", ", ".join(self.halt()))
    except Interrupted:
      logging.warning("interrupted again: deleting now")
    except (LostError, FailedError) as error:
      logging.warning("it can't be stopped: %s", error)

  def _leave(self, state: str) -> list[str]:
    """Deletes the machine, unless it is to stay; what is left that shouldn't be."""
    name, delete = self.machine.name, commands.shell(commands.delete(self.machine))
    self.job.clear()
    if not self._asked:
      return []
    if self.keep or state == "stopped":
      logging.warning("%s is kept, and billed; delete it with: %s", name, delete)
      return []
    left = [f"queued resource {name} ({UNKNOWN})"]
    try:
      left = self.cloud.delete()
    except Interrupted:
      logging.warning("interrupted while deleting; it is looked at once more")
      with contextlib.suppress(Interrupted):
        left = self.cloud.present()
    if left:
      logging.error("left, and billed: %s; delete it with: %s", ", ".join(left), delete)
    else:
      logging.info("%s and its nodes have gone; nothing is billed", name)
    return left

  def _evaluation(self) -> Any:
    """What cyb-train printed last, on the first worker."""
    try:
      found = json.loads(self.followers[0].last)
    except (IndexError, ValueError):
      return None
    return found if isinstance(found, dict) else None


def judge(codes: Sequence[str]) -> str:
  """What the workers' exit codes mean together: finished, bad_input, stopped, again, or crashed."""
  codes = list(codes)
  if any(code.endswith("stopped") for code in codes):
    return "stopped"
  if all(code == "0" for code in codes):
    return "finished"
  # A host that only lost the others, or was stopped with them, says nothing of the input; one alone that says so may
  # have met what the others would not.
  if all(code in ("2", "134", "75", "none") for code in codes) and "2" in codes:
    return "bad_input"
  # 75: interrupted, and saved; none: its session has gone without a word, as when a machine boots again.
  if all(code in ("0", "75", "none") for code in codes):
    return "again"
  return "crashed"


def show(label: str, line: str) -> None:
  """A worker's line, at once and whole."""
  # A terminal that has been closed must not end what looks after a machine.
  with contextlib.suppress(OSError):
    sys.stderr.write(f"{label} | {line}\n")
    sys.stderr.flush()
