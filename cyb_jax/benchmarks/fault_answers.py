"""The answers of programs to faults: their exit codes and their output, next to those that are expected."""

from __future__ import annotations

import dataclasses
import re
import signal

from cyb_jax.errors import EXIT_BAD_INPUT, EXIT_CRASH, EXIT_INTERRUPTED

# A message names its remedy by one of these words.
_REMEDY = re.compile(r"\b(the same command|start |give |wait for|free )")
_LINE_OF_A_LOG = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d|error: |[{]")


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
# A host when another host has died; jax may abort it.
OTHER_HOST_DIED = Expected((EXIT_CRASH, EXIT_BAD_INPUT, -signal.SIGABRT), r"error: ")
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
    # A host that ends because another host was interrupted reports the line of that host, and a child process of a host
    # that is killed reports the kill.
    also = self.hosts > 1 and self.code in (-signal.SIGKILL, EXIT_INTERRUPTED)
    if len(errors) != wanted and not (also and len(errors) == 1):
      return f"{len(errors)} error lines instead of {wanted}"
    for line in errors:
      if not _REMEDY.search(line):
        return f"a message that names no remedy: {line}"
    if not re.search(self.expected.says, self.text):
      return f"no message of the form {self.expected.says!r}"
    # The runtime prints lines of its own if a host has died.
    stray = [line for line in lines if not _LINE_OF_A_LOG.match(line)] if self.hosts == 1 else []
    return f"a message of several lines: {stray[0]}" if stray else None
