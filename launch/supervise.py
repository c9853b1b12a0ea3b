"""Sees a training through: asks for a machine, waits, installs, runs, follows; again where it is taken away.

create -> queue -> upload -> run -> follow -> done, deleted
   ^        |         |       |       |
   +--------+---------+-------+-------+   taken away: delete, wait, again (at most max_retries times in a row)
"""

from __future__ import annotations

import contextlib
import json
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
from processes import Done, Interrupted

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
