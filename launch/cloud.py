"""One machine as the cloud describes it: its states, its workers, its deletion."""

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
class Worker:
  """One host of one slice; its label stands before its lines."""

  node: str
  index: int
  label: str


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
