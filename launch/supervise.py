"""Supervises training: requests a machine, waits, installs, runs, follows; after a preemption, it starts again.

create -> queue -> upload -> run -> follow -> done, deleted
   ^        |         |       |       |
   +--------+---------+-------+-------+   preempted: delete, wait, repeat (at most max_retries times in a row)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import commands
from absl import logging
from cloud import GONE, LOST, MEANING, UNKNOWN, Cloud, FailedError, GaveUpError, LostError, RefusedError, Worker
from commands import Step
from follow import Follower
from jobs import Job, run_step, setup_steps
from options import seconds_of
from processes import Done, Interrupted

# Errors that are permanent.
_REFUSED = re.compile(
  r"INVALID_ARGUMENT|PERMISSION_DENIED|UNAUTHENTICATED|unrecognized arguments|does not have permission|invalid choice"
  r"|Invalid value|do not currently have an active account|was not found or access|is not supported|SERVICE_DISABLED"
)
_NO_CAPACITY = re.compile(
  r"RESOURCE_EXHAUSTED|quota (?:limit|'|.*exceeded|.*exhausted)|capacity|stockout|\b429\b", re.IGNORECASE
)
# Errors of the connection, not of the command that was run over it.
_CONNECTION = re.compile(
  r"return code \[255\]|Connection (?:closed|refused|reset|timed out)|no answer in|unusable", re.I
)


class Supervisor:
  """Runs the command `train`, and the commands that are parts of it.

  Args:
    cloud: the machine.
    job: the training job.
    keep: whether the machine is not deleted.
  """

  def __init__(self, cloud: Cloud, job: Job, *, keep: bool = False):
    self.cloud, self.machine, self.limits, self.interrupts = cloud, cloud.machine, cloud.limits, cloud.interrupts
    self.job, self.keep = job, keep
    self.workers: list[Worker] = []
    self.followers: list[Follower] = []
    self.counts = {"retries": 0, "machines_lost": 0, "crashes": 0}
    self.states: list[str] = []
    self._in_a_row = 0
    self._requested = False
    self._queued: float | None = None  # when the machine was first requested; None if there is one
    self._trains = False
    self._begun = 0.0
    self._crashes = 0  # consecutive
    self._checked = 0.0

  # Parts of `train`; each is also a command.

  def create(self) -> None:
    """Requests the machine once.

    Raises:
      RefusedError: the error is permanent.
      LostError: another request may succeed.
    """
    done = self.cloud.call(self.create_words(), to_the_end=True)
    if done.code == 0 or "ALREADY_EXISTS" in done.err:
      return
    if _REFUSED.search(done.err) and not _NO_CAPACITY.search(done.err):
      raise RefusedError(done.message())
    raise LostError(("no capacity: " if _NO_CAPACITY.search(done.err) else "") + done.message())

  def create_words(self) -> list[str]:
    job, machine = self.job, self.machine
    if self._queued is not None and machine.queue_for and self.counts["retries"]:
      # A repeated request only has the rest of the time.
      machine = dataclasses.replace(machine, queue_for=f"{max(1, math.ceil(self._seconds_left()))}s")
    return commands.create(machine, source=job.source, flags_file=str(job.flags_file), extras=job.extras)

  def pack(self) -> None:
    """Packs the checkout's HEAD; for a startup script, also copies the archive to the bucket."""
    self.job.cache.mkdir(parents=True, exist_ok=True)
    steps = [Step("pack", commands.archive(self.job.checkout, self.job.archive))]
    if self.machine.startup:
      self.job.flags_file.write_text("".join(f"{flag}\n" for flag in self.job.flags))
      steps.append(Step("copy to the bucket", commands.to_bucket(self.job.archive, self.job.source)))
    for step in steps:
      for attempt in range(self.limits.ssh_attempts):
        done = self.cloud.call(step.words, seconds=self.limits.step_seconds)
        if not done.code:
          break
        logging.warning("`%s`: %s", commands.shell(step.words), done.message())
        if attempt + 1 < self.limits.ssh_attempts:
          self.interrupts.pause(self.limits.reconnect_seconds)
      else:
        raise FailedError(f"`{commands.shell(step.words)}`: {done.message()}")

  def upload(self) -> None:
    """Copies the checkout to all workers, and installs it."""
    for i in range(len(setup_steps(self.machine, self.job, ""))):
      self.everywhere(lambda node, worker, i=i: setup_steps(self.machine, self.job, node, worker)[i])

  def start(self) -> None:
    self.everywhere(lambda node, worker: run_step(self.machine, self.job, node, worker))

  def check_flags(self) -> None:
    """Raises RefusedError if the machine already trains with other flags, which this job would not change."""
    worker = self.workers[0]
    words = commands.ssh(self.machine, worker.node, str(worker.index), commands.on_worker(self.machine, "trains"))
    done = self.cloud.call(words)
    flags = done.out.splitlines()
    # Without a checkout on the machine, the command fails, and nothing trains.
    if done.code or not flags or flags == list(self.job.flags):
      return
    self._requested = False  # the machine of another job is not deleted
    raise RefusedError(
      f"--name: {self.machine.name} already trains with other flags: cyb-train {commands.shell(flags)}; give these"
      " flags to supervise it, or another --name, or end it first with `stop` and `delete`"
    )

  def everywhere(self, step: Callable[[str, str], Step], *, seconds: float | None = None) -> list[str]:
    """Runs a step on all workers at once; if this fails, on each worker separately, with several attempts.

    Args:
      step: (node, worker) -> the step; the worker is a number or 'all'.
      seconds: the time limit of a command; None means `step_seconds`.

    Returns:
      The output of each command: one for each node, or one for each worker.

    Raises:
      LostError: the machine no longer exists, or a worker is unusable.
      FailedError: the step fails on all workers, and the connection is not the reason.
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
      logging.warning("%s: %s; trying each of its %d workers separately", node, done.message(), len(workers))
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
          logging.warning(
            "%s: %s (attempt %d of %d)", worker.label, done.message(), attempt + 1, self.limits.ssh_attempts
          )
        else:
          failed[worker.label] = done
          if len(failed) < len(workers):
            # A single failure means that another machine is needed. The other workers are still tried, because a
            # failure of all workers has another cause.
            continue
      if failed:
        label, done = next(iter(failed.items()))
        message = f"{label}: {first.why} {done.message()}"
        if len(failed) == len(workers) and not _CONNECTION.search(done.err):
          raise FailedError(message)
        raise LostError(message)
    return printed

  def watch(self) -> None:
    """Checks the machine every `poll_seconds`."""
    now = time.monotonic()
    if now - self._checked >= self.limits.poll_seconds:
      self.cloud.check()
      self._checked = time.monotonic()

  def follow(self, emit: Callable[[str, str], None], workers: Sequence[Worker] | None = None) -> dict[str, str]:
    """Emits the workers' logs until training has ended on all workers.

    Args:
      emit: called with a worker's label and a line.
      workers: the workers that are followed; None means all.

    Returns:
      The exit code of each worker or 'none', possibly followed by ' stopped'.
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
            raise LostError(f"{follower.worker.label} is unreachable")
        if bad_since is None and any(f.exit not in (None, "0") for f in self.followers):
          bad_since = now
        if bad_since is not None and now - bad_since > self.limits.straggler_seconds:
          late = [f.worker.label for f in self.followers if f.exit is None]
          if halted:
            raise LostError(f"{', '.join(late)}: training can't be stopped")
          logging.warning(
            "%s: still running %g s after another worker has ended; stopping", ", ".join(late), now - bad_since
          )
          self.halt()
          halted, bad_since = True, time.monotonic()
        time.sleep(0.02)
    finally:
      for follower in self.followers:
        follower.close()
    return {f.worker.label: f.exit for f in self.followers}

  def halt(self, verb: str = "halt") -> list[str]:
    """Stops training, which saves; returns the output of the workers."""
    seconds = self.limits.stop_seconds
    step = lambda node, worker: Step(  # noqa: E731
      "Stop training, which saves first.",
      commands.ssh(self.machine, node, worker, commands.on_worker(self.machine, verb, f"{max(1, round(seconds))}")),
    )
    outputs = self.everywhere(step, seconds=seconds + self.limits.call_seconds)
    return [line for text in outputs for line in text.splitlines()]

  # The command `train`.

  def train(self, emit: Callable[[str, str], None]) -> dict[str, Any]:
    """Trains until the run is done, has failed too often, or is interrupted; then deletes the machine, unless `keep`.

    Returns:
      `state` (finished, failed, bad_input, gave_up, refused, interrupted, stopped), `reason`, `exit_codes` by worker,
      counts, `evaluation` (the last output of cyb-train), and `left`, the resources that couldn't be deleted.
    """
    codes: dict[str, str] = {}
    try:
      try:
        state, reason, codes = self._run_until_done(emit)
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
      # Even after an unexpected error, the machine must be deleted.
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

  def _run_until_done(self, emit: Callable[[str, str], None]) -> tuple[str, str, dict[str, str]]:
    packed = False
    while True:
      try:
        if not packed:
          self.pack()
          packed = True
        existed = self._acquire()
        self.workers = self.cloud.workers()
        if existed:
          self.check_flags()
        logging.info("%s has %d workers", self.machine.name, len(self.workers))
        self._checked = time.monotonic()
        if not self.machine.startup:
          self.upload()
        while True:
          self._trains, self._begun = True, time.monotonic()
          if not self.machine.startup:
            self.start()
          codes = self.follow(emit)
          self._trains = False
          listed = ", ".join(f"{label} {code}" for label, code in codes.items())
          verdict = judge(codes.values())
          logging.info("training has ended: %s (exit codes: %s)", verdict, listed)
          if verdict != "again":
            if verdict == "crashed":
              self._count_crash(listed)
            else:
              return verdict, "" if verdict == "finished" else f"exit codes: {listed}", codes
          else:
            # This may be the first sign of a preemption of the machine.
            until = time.monotonic() + self.limits.grace_seconds
            while time.monotonic() < until:
              self.cloud.check()
              self.interrupts.pause(min(self.limits.poll_seconds, self.limits.grace_seconds))
            self._count_retry(f"training was interrupted, and the machine still exists (exit codes: {listed})")
          self.cloud.check()
          if self.machine.startup:
            raise LostError("the service on the machine has ended")
          self.halt()
      except LostError as lost:
        logging.warning("%s", lost)
        if self._trains or self.workers:
          self.counts["machines_lost"] += 1
        self._trains = False
        self._delete_for_another()
        self.workers, self.followers = [], []
        self._count_retry(str(lost))

  def _acquire(self) -> bool:
    """Creates the machine or uses an existing one, and waits until it is ACTIVE; returns whether it existed."""
    if self._queued is None:
      self._queued = time.monotonic()
    state, found = self.cloud.state()
    existed = False
    if state in LOST and state != GONE:
      logging.info("%s exists, but it is %s: %s", self.machine.name, state, MEANING[state])
      self._requested = True
      self._delete_for_another()
      state = GONE
    if state == GONE:
      self._requested = True
      logging.info("requesting %s: %s", self.machine.type, commands.shell(self.create_words()))
      try:
        self.create()
      except RefusedError:
        self._requested = False
        raise
    elif state == UNKNOWN:
      if _REFUSED.search(found.get("message", "")):
        raise RefusedError(found["message"])
      raise LostError(f"it is unknown whether {self.machine.name} exists{self.cloud.reason(found)}")
    else:
      kind = found.get("tpu", {}).get("nodeSpec", [{}])[0].get("node", {}).get("acceleratorType", self.machine.type)
      if kind != self.machine.type:
        raise RefusedError(
          f"--name: {self.machine.name} already exists with type {kind}; give another name, or delete it"
        )
      self._requested = existed = True
      logging.info(
        "%s already exists and is used; it will be deleted at the end unless --keep is given", self.machine.name
      )
    self.cloud.wait(self.states.append)
    self._queued = None
    return existed

  def _count_retry(self, reason: str) -> None:
    if self._begun and time.monotonic() - self._begun > self.limits.healthy_seconds:
      self._in_a_row = 0
    self._begun = 0.0
    if self._in_a_row >= self.limits.max_retries:
      raise GaveUpError(
        f"after {self.counts['retries']} retries, {self._in_a_row} of them in a row (--max_retries): {reason}"
      )
    self._in_a_row += 1
    seconds = self.cloud.backoff(self._in_a_row)
    if self._seconds_left() <= seconds:
      raise GaveUpError(f"no machine within --queue_for={self.machine.queue_for}: {reason}")
    self.counts["retries"] += 1
    logging.info("retry %d of %d in a row, in %g s", self._in_a_row, self.limits.max_retries, seconds)
    self.interrupts.pause(seconds)

  def _seconds_left(self) -> float:
    """The seconds of --queue_for that are left for requests; infinity without a limit, or while there is a machine."""
    if not self.machine.queue_for or self._queued is None:
      return math.inf
    return seconds_of(self.machine.queue_for) - (time.monotonic() - self._queued)

  def _count_crash(self, listed: str) -> None:
    self.counts["crashes"] += 1
    if self._begun and time.monotonic() - self._begun > self.limits.healthy_seconds:
      self._crashes = 0
    self._crashes += 1
    # A service restarts after crashes, so when it ends, the limit of restarts was reached.
    if self.machine.startup or self._crashes > self.limits.max_crashes:
      raise FailedError(f"training crashed {self._crashes} times in a row (--max_crashes; exit codes: {listed})")
    logging.info("consecutive crash %d; training is restarted at most %d times", self._crashes, self.limits.max_crashes)
    self.interrupts.pause(self.limits.backoff_seconds)

  def _delete_for_another(self) -> None:
    left = self.cloud.delete()
    if left:
      raise GaveUpError(f"the deletion failed: {', '.join(left)}")

  def _stop_first(self) -> None:
    """Stops training, so that it saves; a second Ctrl-C ends the wait."""
    if not self._trains:
      return
    logging.info("interrupted; training saves first, and then the machine is deleted (Ctrl-C again deletes it now)")
    try:
      logging.info("stopped: %s", ", ".join(self.halt()))
    except Interrupted:
      logging.warning("interrupted again: deleting now")
    except (LostError, FailedError) as error:
      logging.warning("training can't be stopped: %s", error)

  def _leave(self, state: str) -> list[str]:
    """Deletes the machine, unless it is kept; returns the resources that couldn't be deleted."""
    name, delete = self.machine.name, commands.shell(commands.delete(self.machine))
    self.job.clear()
    if not self._requested:
      return []
    if self.keep or state == "stopped":
      logging.warning("%s is kept, and billed; delete it with: %s", name, delete)
      return []
    left = [f"queued resource {name} ({UNKNOWN})"]
    try:
      left = self.cloud.delete()
    except Interrupted:
      logging.warning("interrupted during the deletion; checking once more")
      with contextlib.suppress(Interrupted):
        left = self.cloud.present()
    if left:
      logging.error("not deleted, and billed: %s; delete it with: %s", ", ".join(left), delete)
    else:
      logging.info("%s and its nodes are deleted; nothing is billed", name)
    return left

  def _evaluation(self) -> Any:
    """The last output of cyb-train on the first worker, if it is a JSON object; otherwise None."""
    try:
      found = json.loads(self.followers[0].last)
    except (IndexError, ValueError):
      return None
    return found if isinstance(found, dict) else None


def judge(codes: Sequence[str]) -> str:
  """The meaning of the workers' exit codes: finished, bad_input, stopped, again, or crashed."""
  codes = list(codes)
  if any(code.endswith("stopped") for code in codes):
    return "stopped"
  if all(code == "0" for code in codes):
    return "finished"
  # Exit codes of hosts that lost the others or were stopped with them do not contradict bad input. If other hosts
  # crashed or finished, exit code 2 of a single host may have had a temporary cause.
  if all(code in ("2", "134", "75", "none") for code in codes) and "2" in codes:
    return "bad_input"
  # 75 means interrupted and saved; none means that the session ended without an exit code, for example by a reboot.
  if all(code in ("0", "75", "none") for code in codes):
    return "again"
  return "crashed"
