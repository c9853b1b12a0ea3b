"""The commands of launch/tpu.py in order, when all goes well: for a person to read, or to follow by hand."""

from __future__ import annotations

import commands
import jobs
from absl import flags
from commands import Machine, Step
from jobs import Job


def runbook(command: str, machine: Machine, job: Job) -> list[Step]:
  """What a command of launch/tpu.py runs.

  Args:
    command: one of its commands.
    machine: what it asks for.
    job: what is trained there.
  """
  archive = _pack(job)
  upload = [step for node in machine.nodes for step in jobs.setup_steps(machine, job, node)]
  start = [jobs.run_step(machine, job, node) for node in machine.nodes]
  steps = {
    "create": lambda: [*(archive if machine.startup else []), *_create(command, machine, job)],
    "queue": lambda: _queue(machine),
    "upload": lambda: [*archive, *upload],
    "run": lambda: start,
    "logs": lambda: _follow(machine) if flags.FLAGS.follow else _log(machine),
    "status": lambda: _queue(machine),
    "ssh": lambda: _shell(machine, job),
    "stop": lambda: _stop(machine),
    "delete": lambda: _delete(machine),
    "train": lambda: [
      *archive,
      *_create(command, machine, job),
      *_queue(machine),
      *([] if machine.startup else [*upload, *start]),
      *_follow(machine),
      *_delete(machine),
    ],
  }
  return steps[command]()


def _pack(job: Job) -> list[Step]:
  return [
    Step("A folder for the archive.", ["mkdir", "-p", str(job.cache)]),
    Step(
      "Pack the checkout's last commit, so that runs, venvs and caches stay here.",
      commands.archive(job.checkout, job.archive),
    ),
  ]


def _create(command: str, machine: Machine, job: Job) -> list[Step]:
  steps = []
  if machine.startup and command in ("train", "create"):
    steps = [
      Step("Lay it where the machine finds it.", commands.to_bucket(job.archive, job.source)),
      Step(
        "The flags of cyb-train, one a line, for the machine's metadata.",
        ["printf", r"%s\n", *job.flags, ">", str(job.flags_file)],
      ),
    ]
  words = (
    commands.create(machine, source=job.source, flags_file=str(job.flags_file), extras=job.extras)
    if machine.type
    else []
  )
  steps.append(Step("Ask for the machine. No room or no quota: wait, longer each time, and ask again.", words))
  return steps


def _queue(machine: Machine) -> list[Step]:
  return [
    Step(
      "Until its state.state is ACTIVE, which is billed. FAILED, SUSPENDED: delete it (the last steps) and ask again.",
      commands.describe(machine),
    ),
    *(
      Step("Its state is READY; it has as many workers as networkEndpoints.", commands.describe_node(machine, node))
      for node in machine.nodes
    ),
  ]


def _follow(machine: Machine) -> list[Step]:
  several = machine.slices * commands.hosts(machine.type) if machine.type else 0
  also = f", and so for the other workers, {several} in all" if several > 1 else ""
  return [
    Step(
      f"Follow the log{also}. It ends with the exit code: 0 done; 2 bad input; 1 a crash: start it again; 75"
      " interrupted and saved: start it again, on another machine if this one is taken away.",
      jobs.follow_words(machine, machine.nodes[0], int(flags.FLAGS.worker or 0)),
    )
  ]


def _log(machine: Machine) -> list[Step]:
  args = flags.FLAGS
  words = commands.on_worker(machine, "log", str(args.lines))
  return [
    Step("The end of the log.", commands.ssh(machine, node, args.worker or "all", words)) for node in machine.nodes
  ]


def _shell(machine: Machine, job: Job) -> list[Step]:
  args = flags.FLAGS
  words = commands.ssh(machine, machine.nodes[args.slice], args.worker or "0", commands.shell(job.flags))
  return [Step("A shell there.", words)]


def _stop(machine: Machine) -> list[Step]:
  words = commands.on_worker(machine, "stop", str(max(1, round(flags.FLAGS.stop_seconds))))
  return [
    Step(
      "SIGTERM: training saves and exits with 75; the machine stays, and is billed.",
      commands.ssh(machine, node, "all", words),
    )
    for node in machine.nodes
  ]


def _delete(machine: Machine) -> list[Step]:
  return [
    Step("Delete it with its nodes, or it goes on being billed.", commands.delete(machine)),
    Step("It has gone when this says NOT_FOUND.", commands.describe(machine)),
    *(Step("So has its node.", commands.describe_node(machine, node)) for node in machine.nodes),
  ]
