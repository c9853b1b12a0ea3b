"""The state of a machine in the cloud, its workers, and its deletion."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import commands
from absl import logging
from commands import Machine
from processes import Done, Interrupts, run

UNKNOWN = "UNKNOWN"
GONE = "NOT_FOUND"
# The states of a queued resource, with descriptions for the log.
MEANING = {
  "CREATING": "the request was received",
  "ACCEPTED": "the request is in the queue",
  "WAITING_FOR_RESOURCES": "the request is in the queue until there is capacity; it is not billed yet",
  "PROVISIONING": "the machines are being created",
  "ACTIVE": "the machines are ready, and billed from now on",
  "FAILED": "the machines could not be created",
  "SUSPENDING": "the machines are being preempted",
  "SUSPENDED": "the machines were preempted",
  "DELETING": "the machines are being deleted",
  GONE: "it does not exist",
  UNKNOWN: "the state is unknown",
}
LOST = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING", GONE)
NODE_LOST = ("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING", GONE)


class LostError(Exception):
  """The machine was preempted or is unusable, so another one is needed."""


class RefusedError(Exception):
  """The cloud rejects the request permanently."""


class FailedError(Exception):
  """A command fails on all workers, and would fail on other machines."""


class GaveUpError(Exception):
  """The limit of retries was reached."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """Numbers of attempts, and times in seconds. Each field is a flag."""

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
class Worker:
  """A host of a slice; its label is the prefix of its log lines."""

  node: str
  index: int
  label: str


class Cloud:
  """A machine in the cloud.

  Args:
    machine: the machine.
    limits: the limits of attempts and times.
    interrupts: the signals that interrupt waiting.
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
      return UNKNOWN, {"message": done.message()}
    try:
      return "", json.loads(done.out)
    except ValueError:
      return UNKNOWN, {"message": f"not JSON: {done.out[:80]!r}"}

  def state(self) -> tuple[str, dict[str, Any]]:
    """(the state of the queued resource, GONE or UNKNOWN; the cloud's description)."""
    problem, found = self._described(commands.describe(self.machine))
    return problem or found.get("state", {}).get("state", UNKNOWN), found

  def node(self, node: str) -> tuple[str, dict[str, Any]]:
    """(the state of a node, GONE or UNKNOWN; the cloud's description)."""
    problem, found = self._described(commands.describe_node(self.machine, node))
    return problem or found.get("state", UNKNOWN), found

  def reason(self, found: dict[str, Any]) -> str:
    """The error message in a description, in brackets; '' if there is none."""
    error = found.get("state", {}).get("failedData", {}).get("error", {})
    message = error.get("message", "") or found.get("message", "")
    return f" ({message})" if message else ""

  def check(self) -> None:
    """Raises LostError if the machine no longer exists."""
    state, found = self.state()
    if state in LOST:
      raise LostError(f"{self.machine.name} is {state}: {MEANING[state]}{self.reason(found)}")
    if state == UNKNOWN:
      logging.warning("the state of %s is unknown%s", self.machine.name, self.reason(found))
      return
    for node in self.machine.nodes:
      state, _ = self.node(node)
      if state in NODE_LOST:
        raise LostError(f"node {node} is {state}")

  def wait(self, on_state: Callable[[str], None]) -> None:
    """Waits until the machine is ACTIVE.

    Args:
      on_state: called with each new state.

    Raises:
      LostError: the request failed, or no longer exists.
    """
    last = ""
    while True:
      state, found = self.state()
      if state != last:
        on_state(state)
        logging.info(
          "%s: %s: %s%s", self.machine.name, state, MEANING.get(state, "an unknown state"), self.reason(found)
        )
        last = state
      if state == "ACTIVE":
        return
      if state in LOST:
        raise LostError(f"{self.machine.name} is {state}: {MEANING[state]}{self.reason(found)}")
      self.interrupts.pause(self.limits.poll_seconds)

  def workers(self) -> list[Worker]:
    """The hosts of all nodes; the cloud's list of addresses determines their number."""
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
    """The resources that exist or may exist: a resource in an unknown state is included."""
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
    """Deletes the queued resource and its nodes, and waits until they are deleted.

    Returns:
      The resources that remain.
    """
    left = self.present()
    for attempt in range(self.limits.delete_attempts):
      if not left:
        break
      if attempt:
        self.interrupts.pause(self.backoff(attempt))
      deletions = []
      if left[0].startswith("queued resource"):
        if "DELETING" not in left[0]:
          deletions.append(commands.delete(self.machine))
      else:
        deletions += [
          commands.delete_node(self.machine, n) for n in self.machine.nodes if any(f"node {n} " in x for x in left)
        ]
      succeeded = True
      for words in deletions:
        logging.info("deleting: %s", commands.shell(words))
        done = self.call(words, seconds=self.limits.delete_seconds)
        if done.code and GONE not in done.err:
          logging.warning("the deletion failed: %s", done.message())
          succeeded = False
      until = time.monotonic() + self.limits.delete_seconds
      while (left := self.present()) and succeeded and time.monotonic() < until:
        # A node that remains after its queued resource was deleted must be deleted separately.
        if not left[0].startswith("queued resource") and not any("DELETING" in x for x in left):
          break
        self.interrupts.pause(self.limits.poll_seconds)
    return left

  def backoff(self, attempt: int) -> float:
    """The seconds to wait before attempt 1, 2, and so on; they double each time, up to a limit."""
    return min(self.limits.backoff_seconds * 2 ** (attempt - 1), self.limits.backoff_limit_seconds)
