"""The commands of launch/tpu.py in order, if there are no failures: to read, or to follow by hand."""

from __future__ import annotations

import commands
import jobs
from absl import flags
from commands import Machine, Step
from jobs import Job


def runbook(command: str, machine: Machine, job: Job) -> list[Step]:
  """The steps of a command of launch/tpu.py.

  Args:
    command: one of its commands.
    machine: the machine.
    job: the training job.
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
    Step("Create a folder for the archive.", ["mkdir", "-p", str(job.cache)]),
    Step(
      "Pack the checkout's last commit, without runs, venvs and caches.",
      commands.archive(job.checkout, job.archive),
    ),
  ]


def _create(command: str, machine: Machine, job: Job) -> list[Step]:
  steps = []
  if machine.startup and command in ("train", "create"):
    steps = [
      Step("Copy the archive to the bucket.", commands.to_bucket(job.archive, job.source)),
      Step(
        "Write the flags of cyb-train, one per line, for the machine's metadata.",
        ["printf", r"%s\n", *job.flags, ">", str(job.flags_file)],
      ),
    ]
  words = (
    commands.create(machine, source=job.source, flags_file=str(job.flags_file), extras=job.extras)
    if machine.type
    else []
  )
  steps.append(
    Step("Request the machine. Without capacity or quota: wait, longer each time, and request it again.", words)
  )
  return steps


def _queue(machine: Machine) -> list[Step]:
  return [
    Step(
      "Wait until state.state is ACTIVE, which is billed. If it is FAILED or SUSPENDED, delete it (the last steps) and"
      " request it again.",
      commands.describe(machine),
    ),
    *(
      Step(
        "Check that the node's state is READY; its networkEndpoints are its workers.",
        commands.describe_node(machine, node),
      )
      for node in machine.nodes
    ),
  ]


def _follow(machine: Machine) -> list[Step]:
  several = machine.slices * commands.hosts(machine.type) if machine.type else 0
  also = f"; likewise for each of the {several} workers" if several > 1 else ""
  return [
    Step(
      f"Follow the log{also}. The last line is the exit code: 0 done; 2 bad input; 1 a crash: start training again; 75"
      " interrupted and saved: start training again, on another machine if this one is preempted.",
      jobs.follow_words(machine, machine.nodes[0], int(flags.FLAGS.worker or 0)),
    )
  ]


def _log(machine: Machine) -> list[Step]:
  args = flags.FLAGS
  words = commands.on_worker(machine, "log", str(args.lines))
  return [
    Step("Print the end of the log.", commands.ssh(machine, node, args.worker or "all", words))
    for node in machine.nodes
  ]


def _shell(machine: Machine, job: Job) -> list[Step]:
  args = flags.FLAGS
  words = commands.ssh(machine, machine.nodes[args.slice], args.worker or "0", commands.shell(job.flags))
  return [Step("Open a shell on the worker.", words)]


def _stop(machine: Machine) -> list[Step]:
  words = commands.on_worker(machine, "stop", str(max(1, round(flags.FLAGS.stop_seconds))))
  return [
    Step(
      "Send SIGTERM: training saves and exits with 75; the machine remains, and is billed.",
      commands.ssh(machine, node, "all", words),
    )
    for node in machine.nodes
  ]


def _delete(machine: Machine) -> list[Step]:
  return [
    Step("Delete the machine with its nodes, which are billed until then.", commands.delete(machine)),
    Step("Check that the machine is deleted: the answer is NOT_FOUND.", commands.describe(machine)),
    *(
      Step("Check that the node is deleted: the answer is NOT_FOUND.", commands.describe_node(machine, node))
      for node in machine.nodes
    ),
  ]
