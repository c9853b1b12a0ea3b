#!/usr/bin/env python3
"""Trains on Cloud TPUs: asks for a machine, installs this checkout on it, trains, follows, and deletes it in the end.

python launch/tpu.py train --name=NAME --zone=ZONE --type=v5litepod-16 --spot -- FLAGS OF cyb-train
python launch/tpu.py train ... --dry_run -- FLAGS     the commands, to be read or followed by hand; nothing is run
python launch/tpu.py create|queue|upload|run|logs|stop|delete|status|ssh --name=NAME --zone=ZONE     its parts

Needs gcloud (logged in), git and absl-py; no jax. Exit codes: 0 done; 1 it failed, or something is left that is
billed; 2 bad input; 75 interrupted or stopped, to be continued with the same command. The last line of standard output
is one JSON object; logs, the workers' among them, go to standard error.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import commands
import supervise
from absl import app, flags, logging
from commands import Machine, Step
from processes import Interrupted, Interrupts
from supervise import Cloud, FailedError, Job, Limits, LostError, RefusedError, Supervisor

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75

COMMANDS = ("train", "create", "queue", "upload", "run", "logs", "status", "ssh", "stop", "delete")
_EXIT = {
  "finished": 0,
  "bad_input": EXIT_BAD_INPUT,
  "refused": EXIT_BAD_INPUT,
  "interrupted": EXIT_INTERRUPTED,
  "stopped": EXIT_INTERRUPTED,
}


class InputError(ValueError):
  """Bad input: one line that names the flag, the value, and what would do."""


def define_flags() -> None:
  text, yes = flags.DEFINE_string, flags.DEFINE_boolean
  text("name", None, "The queued resource; its node is called the same.")
  text("zone", None, "Such as us-central2-b.")
  text("project", "", "'': gcloud's own.")
  text("type", "", "The accelerator type, such as v4-8, v5litepod-16, v5p-8, v6e-16.")
  text("image", "", "The runtime version; '': the one that belongs to the type.")
  flags.DEFINE_integer("slices", 1, "So many of the type, joined over the data centre's network (multi-slice).")
  yes("spot", False, "Cheaper capacity that may be taken away at any time.")
  yes("reserved", False, "From the project's reservation.")
  text("queue_for", "", "Give the request up after so long in the queue, such as 6h; '': never.")
  text("network", "", "'': the default network.")
  text("subnetwork", "", "Of --network.")
  yes("internal_ips", False, "No external addresses; mostly with --iap.")
  yes("iap", False, "Connect through the Identity-Aware Proxy.")
  text("service_account", "", "Whose rights the machine has, such as to the bucket; '': the project's default.")
  text("labels", "", "key=value,key=value: for bills.")
  text("tags", "", "Of the network's firewall, with commas between them.")
  flags.DEFINE_enum(
    "runner", "tmux", ["tmux", "startup"], "Installed over ssh and run in tmux, or by launch/startup.sh as a service."
  )
  text(
    "source",
    "",
    "With --runner=startup, where the checkout's archive goes; '': cyb_jax-source/COMMIT.tar.gz in --workdir's bucket.",
  )
  text("extras", "tpu,reviews", "What is installed beside the package itself.")
  text("checkout", str(commands.ROOT), "The git checkout whose last commit is trained.")
  yes("allow_dirty", False, "Train the last commit although the checkout has changes beside it.")
  yes(
    "allow_local_workdir", False, "A --workdir on the machine's own disk although it may vanish, or has several hosts."
  )
  yes("keep", False, "train: leave the machine behind, whatever happens.")
  yes("dry_run", False, "Print the commands, each with a line on why, and run none.")
  yes("follow", False, "logs: go on until training ends.")
  yes("training", False, "status: ask the workers too.")
  text("worker", None, "logs, ssh: one worker of a slice, from 0; logs: all of them by default.")
  flags.DEFINE_integer("slice", 0, "ssh: which slice.")
  flags.DEFINE_integer("lines", 100, "logs: so many of the last, without --follow.")
  text("cache", "", "Where the archive is made; '': cyb_jax-launch/NAME in the user's cache folder.")
  told = {
    "max_retries": "train: so many new machines or requests in a row; training for --healthy_seconds sets it back.",
    "max_crashes": "train: so many new starts after a crash (exit code 1); exit code 2 has none.",
    "ssh_attempts": "So many tries on a worker that fails, before another machine is asked for.",
    "delete_attempts": "So many tries to delete.",
    "poll_seconds": "Between looks at the machine.",
    "backoff_seconds": "Before the first retry; doubled each time.",
    "backoff_limit_seconds": "At most.",
    "reconnect_seconds": "Before a connection that broke is made again.",
    "call_seconds": "How long gcloud may take to answer.",
    "step_seconds": "How long upload and installation may take, each.",
    "stop_seconds": "How long training may take to save once it is told to stop.",
    "grace_seconds": "After exit code 75, how long a preemption may take to show.",
    "straggler_seconds": "How long other workers may go on once one has failed.",
    "unreachable_seconds": "How long a worker may be out of reach while the cloud says that all is well.",
    "healthy_seconds": "Training that went on for so long counts as a success for --max_retries.",
    "delete_seconds": "How long a deletion may take.",
  }
  for name, help_text in told.items():
    define = (
      flags.DEFINE_integer
      if isinstance(getattr(Limits, name), int) and not name.endswith("seconds")
      else flags.DEFINE_float
    )
    define(name, getattr(Limits, name), help_text)


# What Google Cloud takes as a name: https://cloud.google.com/compute/docs/naming-resources.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_LABEL = r"[a-z][-a-z0-9_]{0,62}=[-a-z0-9_]{0,63}"
_PATTERNS = {
  "zone": (re.compile(r"[a-z]+-[a-z]+\d+-[a-z]"), "a zone such as us-central2-b"),
  "project": (re.compile(r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]"), "a project's id"),
  "image": (re.compile(r"[a-z][a-z0-9.-]*"), "a runtime version such as v2-alpha-tpuv6e"),
  "queue_for": (re.compile(r"(\d+[smhd])+"), "a duration such as 6h"),
  "network": (re.compile(r"[a-z0-9][\w./:-]*"), "a network's name or address"),
  "subnetwork": (re.compile(r"[a-z0-9][\w./:-]*"), "a subnetwork's name or address"),
  "service_account": (re.compile(r"[\w.-]+@[\w.-]+"), "the account's email address"),
  "labels": (re.compile(rf"{_LABEL}(,{_LABEL})*"), "key=value,key=value in lower case"),
  "tags": (re.compile(r"[a-z][-a-z0-9]{0,62}(,[a-z][-a-z0-9]{0,62})*"), "names in lower case with commas between them"),
  "source": (re.compile(r"gs://[a-z0-9][\w.-]+/[^|\s]+\.tar\.gz"), "gs://BUCKET/PATH.tar.gz"),
  "extras": (re.compile(r"[a-z]+(,[a-z]+)*"), "names of extras with commas between them"),
}  # fmt: skip


def check(command: str, rest: Sequence[str]) -> None:
  """Raises InputError for the first flag that won't do.

  Args:
    command: which of COMMANDS.
    rest: what stands behind `--`.
  """
  args = flags.FLAGS
  if not args.name:
    raise InputError("--name: not given; name the machine")
  if not _NAME.fullmatch(args.name):
    raise InputError(
      f"--name: {args.name!r} is none: at most 63 lower-case letters, digits and dashes, a letter first, no dash last"
    )
  if not args.zone:
    raise InputError("--zone: not given; such as us-central2-b")
  for name, (pattern, wanted) in _PATTERNS.items():
    value = args[name].value
    if value and not pattern.fullmatch(value):
      raise InputError(f"--{name}: {value!r} isn't {wanted}")
  for name in supervise.Limits.__dataclass_fields__:
    if args[name].value < 0:
      raise InputError(f"--{name}: {args[name].value} is negative")
  for name in ("ssh_attempts", "delete_attempts", "slices", "lines"):
    if args[name].value < 1:
      raise InputError(f"--{name}: {args[name].value}, but there must be one at least")
  if args.slices > 1 and not _NAME.fullmatch(f"{args.name}-{args.slices - 1}"):
    raise InputError(f"--name: {args.name!r} is too long with the number of a slice behind it")
  if args.worker is not None and not args.worker.isdecimal():
    raise InputError(f"--worker: {args.worker!r} isn't a worker's number, from 0")
  if not 0 <= args.slice < args.slices:
    raise InputError(f"--slice: {args.slice}, but --slices={args.slices}")
  if args.spot and args.reserved:
    raise InputError("--spot: True together with --reserved; one of them")
  if args.subnetwork and not args.network:
    raise InputError("--subnetwork: given without --network, which it is part of")
  if command in ("train", "create"):
    if not args.type:
      raise InputError(
        f"--type: not given; such as {', '.join(f'{kind}-8' for kind in commands.IMAGES if kind >= 'v4')}"
      )
    if not re.fullmatch(r"v\d+[a-z]*-[1-9]\d*", args.type):
      raise InputError(f"--type: {args.type!r} is no accelerator type, such as v4-8 or v5litepod-16")
    if not args.image and commands.family(args.type) not in commands.IMAGES:
      raise InputError(
        f"--image: not given, and none is known for --type={args.type}; there are {', '.join(commands.IMAGES)}"
      )
  trains = command in ("train", "run") or (command == "create" and args.runner == "startup")
  if trains:
    _check_training(command, rest)
  elif rest and command != "ssh":
    raise InputError(f"arguments: {' '.join(rest)!r} behind --, but `{command}` trains nothing")


def _check_training(command: str, rest: Sequence[str]) -> None:
  args = flags.FLAGS
  if not rest:
    raise InputError("--: nothing behind it; the flags of cyb-train belong there: -- --config=... --workdir=gs://...")
  for flag in ("config", "workdir"):
    if not _value(rest, flag):
      raise InputError(f"--{flag}: not among the flags of cyb-train, behind --")
  if any("\n" in word for word in rest):
    raise InputError("--: a flag of cyb-train has a line break, which none needs")
  workdir = _value(rest, "workdir")
  if workdir.startswith("gs://"):
    if not re.fullmatch(r"gs://[a-z0-9][\w.-]+/\S+", workdir):
      raise InputError(f"--workdir: {workdir!r} isn't gs://BUCKET/FOLDER")
    return
  if not workdir.startswith("/"):
    raise InputError(
      f"--workdir: {workdir!r} would lie in the checkout, which the next upload replaces; give gs://BUCKET/FOLDER, or a"
      " path from / on"
    )
  if args.runner == "startup" and not args.source:
    raise InputError(f"--source: not given, and --workdir={workdir} names no bucket to take; gs://BUCKET/PATH.tar.gz")
  if command == "run" or args.allow_local_workdir:
    return
  several = args.slices * commands.hosts(args.type)
  why = (
    "a machine that may be taken away at any time"
    if args.spot
    else f"a machine of {several} hosts"
    if several > 1
    else ""
  )
  if why:
    raise InputError(
      f"--workdir: {workdir!r} lies on the disk of {why}; give gs://BUCKET/FOLDER, or --allow_local_workdir"
    )


def _value(words: Sequence[str], flag: str) -> str:
  """Of --flag=value or --flag value, the last that is given; '' where none is."""
  value = ""
  for i, word in enumerate(words):
    if word.startswith((f"--{flag}=", f"-{flag}=")):
      value = word.partition("=")[2]
    elif word in (f"--{flag}", f"-{flag}") and i + 1 < len(words):
      value = words[i + 1]
  return value


def _git(checkout: pathlib.Path, *words: str) -> str:
  try:
    done = subprocess.run(
      ["git", "-C", str(checkout), *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
  except OSError as error:
    raise InputError(f"git: can't be run ({error.strerror})") from None
  if done.returncode:
    raise InputError(
      f"--checkout: {checkout} isn't a git checkout with a commit ({done.stderr.strip().splitlines()[-1:]})"
    )
  return done.stdout


def _commit(checkout: pathlib.Path) -> str:
  """The commit that will be trained; uncommitted changes are an error, untracked files a warning."""
  commit = _git(checkout, "rev-parse", "HEAD").strip()
  lines = _git(checkout, "status", "--porcelain").splitlines()
  changed = [line[3:] for line in lines if not line.startswith("??")]
  untracked = [line[3:] for line in lines if line.startswith("??")]
  if changed:
    some = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
    message = (
      f"--checkout: {len(changed)} files have changes that the last commit, {commit[:12]}, doesn't hold ({some})"
    )
    if not (flags.FLAGS.allow_dirty or flags.FLAGS.dry_run):
      raise InputError(f"{message}; commit them, or --allow_dirty to train without them")
    logging.warning("%s; it is trained without them", message)
  if untracked:
    logging.warning("%d untracked files are not uploaded: %s", len(untracked), ", ".join(untracked[:5]))
  for needed in ("launch/worker.sh", "constraints.txt"):
    _git(checkout, "cat-file", "-e", f"HEAD:{needed}")
  return commit


def _job(command: str, rest: Sequence[str]) -> Job:
  args = flags.FLAGS
  checkout = pathlib.Path(args.checkout)
  packs = command in ("train", "upload") or (command == "create" and args.runner == "startup")
  commit = _commit(checkout) if packs else ""
  caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
  bucket = re.match(r"gs://[^/]+", _value(rest, "workdir"))
  return Job(
    flags=tuple(rest),
    checkout=checkout,
    commit=commit,
    extras=args.extras,
    cache=pathlib.Path(args.cache) if args.cache else caches / "cyb_jax-launch" / args.name,
    source=args.source or (f"{bucket[0]}/cyb_jax-source/{commit[:12]}.tar.gz" if bucket else ""),
  )


def _machine() -> Machine:
  args = flags.FLAGS
  fields = [field for field in Machine.__dataclass_fields__ if field != "startup"]
  return Machine(**{field: args[field].value for field in fields}, startup=args.runner == "startup")


def runbook(command: str, machine: Machine, job: Job) -> list[Step]:
  """What a command runs, in order, when all goes well; for a person to read, or to follow by hand."""
  args = flags.FLAGS
  several = machine.slices * commands.hosts(machine.type) if machine.type else 0
  pack = [
    Step("A folder for the archive.", ["mkdir", "-p", str(job.cache)]),
    Step(
      "Pack the checkout's last commit, so that runs, venvs and caches stay here.",
      commands.archive(job.checkout, job.archive),
    ),
  ]
  create = []
  if machine.startup and command in ("train", "create"):
    create = [
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
  create.append(Step("Ask for the machine. No room or no quota: wait, longer each time, and ask again.", words))
  queue = [
    Step(
      "Until its state.state is ACTIVE, which is billed. FAILED, SUSPENDED: delete it (the last steps) and ask again.",
      commands.describe(machine),
    ),
    *(
      Step("Its state is READY; it has as many workers as networkEndpoints.", commands.describe_node(machine, node))
      for node in machine.nodes
    ),
  ]
  upload = [*(step for node in machine.nodes for step in supervise.setup_steps(machine, job, node))]
  start = [supervise.run_step(machine, job, node) for node in machine.nodes]
  worker = int(args.worker or 0)
  also = f", and so for the other workers, {several} in all" if several > 1 else ""
  follow = [
    Step(
      f"Follow the log{also}. It ends with the exit code: 0 done; 2 bad input; 1 a crash: start it again; 75"
      " interrupted and saved: start it again, on another machine if this one is taken away.",
      supervise.follow_words(machine, machine.nodes[0], worker),
    )
  ]
  delete = [
    Step("Delete it with its nodes, or it goes on being billed.", commands.delete(machine)),
    Step("It has gone when this says NOT_FOUND.", commands.describe(machine)),
    *(Step("So has its node.", commands.describe_node(machine, node)) for node in machine.nodes),
  ]
  seconds = str(max(1, round(args.stop_seconds)))
  steps = {
    "create": [*(pack if machine.startup else []), *create],
    "queue": queue,
    "upload": [*pack, *upload],
    "run": start,
    "logs": follow
    if args.follow
    else [
      Step(
        "The end of the log.",
        commands.ssh(machine, node, args.worker or "all", commands.on_worker(machine, "log", str(args.lines))),
      )
      for node in machine.nodes
    ],
    "status": queue,
    "ssh": [
      Step(
        "A shell there.",
        commands.ssh(machine, machine.nodes[args.slice], args.worker or "0", commands.shell(job.flags)),
      )
    ],
    "stop": [
      Step(
        "SIGTERM: training saves and exits with 75; the machine stays, and is billed.",
        commands.ssh(machine, node, "all", commands.on_worker(machine, "stop", seconds)),
      )
      for node in machine.nodes
    ],
    "delete": delete,
    "train": [*pack, *create, *queue, *([] if machine.startup else [*upload, *start]), *follow, *delete],
  }
  return steps[command]


def _show_runbook(command: str, machine: Machine, job: Job) -> None:
  title = f"{command}: {machine.name} in {machine.zone}"
  if machine.type:
    slices = f"{machine.slices} slices, " if machine.slices > 1 else ""
    title += f", {machine.type} ({slices}{machine.slices * commands.hosts(machine.type)} hosts)"
  steps = [f"# {title}. Nothing was run.", *map(str, runbook(command, machine, job))]
  # A redirection is the shell's, no word of the command.
  sys.stdout.write("\n\n".join(steps).replace(" '>' ", " > ") + "\n")


def _train(supervisor: Supervisor) -> tuple[dict[str, Any], int]:
  result = supervisor.train(supervise.show)
  return result, EXIT_FAILED if result["left"] else _EXIT.get(result["state"], EXIT_FAILED)


def _create(supervisor: Supervisor) -> tuple[dict[str, Any], int]:
  if supervisor.machine.startup:
    supervisor.pack()
  supervisor.create()
  return _queue_state(supervisor), 0


def _queue_state(supervisor: Supervisor) -> dict[str, Any]:
  state, _ = supervisor.cloud.state()
  return {"name": supervisor.machine.name, "state": state}


def _queue(supervisor: Supervisor) -> tuple[dict[str, Any], int]:
  supervisor.cloud.wait(supervisor.states.append)
  return {"name": supervisor.machine.name, "state": "ACTIVE", "queue_states": supervisor.states}, 0


def _status(supervisor: Supervisor) -> tuple[dict[str, Any], int]:
  cloud = supervisor.cloud
  result = _queue_state(supervisor)
  result["nodes"] = []
  for node in cloud.machine.nodes:
    state, found = cloud.node(node)
    result["nodes"].append(
      {"name": node, "state": state, "health": found.get("health"), "workers": len(found.get("networkEndpoints", ()))}
    )
  if flags.FLAGS.training:
    result["training"] = None
    if result["state"] == "ACTIVE":
      supervisor.workers = cloud.workers()
      result["training"] = {}
      for worker in supervisor.workers:
        done = cloud.call(
          commands.ssh(cloud.machine, worker.node, str(worker.index), commands.on_worker(cloud.machine, "state"))
        )
        result["training"][worker.label] = done.out.strip() if not done.code else f"can't be asked ({done.said()})"
  return result, 0


def _with_workers(supervisor: Supervisor) -> None:
  supervisor.cloud.check()
  supervisor.workers = supervisor.cloud.workers()


def _upload(supervisor: Supervisor) -> tuple[dict[str, Any], int]:
  _with_workers(supervisor)
  supervisor.pack()
  try:
    supervisor.upload()
  finally:
    supervisor.job.clear()
  return {
    "name": supervisor.machine.name,
    "state": "uploaded",
    "commit": supervisor.job.commit,
    "workers": len(supervisor.workers),
  }, 0


def _run(supervisor: Supervisor) -> tuple[dict[str, Any], int]:
  _with_workers(supervisor)
  supervisor.start()
  return {"name": supervisor.machine.name, "state": "started", "workers": len(supervisor.workers)}, 0


def _logs(supervisor: Supervisor) -> tuple[dict[str, Any], int]:
  args = flags.FLAGS
  _with_workers(supervisor)
  chosen = [w for w in supervisor.workers if args.worker is None or w.index == int(args.worker)]
  if not chosen:
    raise InputError(f"--worker: {args.worker}, but there are {len(supervisor.workers)} workers, from 0")

  def emit(label: str, line: str) -> None:
    sys.stdout.write(f"{label} | {line}\n")
    sys.stdout.flush()

  if args.follow:
    codes = supervisor.follow(emit, chosen)
  else:
    codes = {}
    for worker in chosen:
      words = commands.on_worker(supervisor.machine, "log", str(args.lines))
      done = supervisor.cloud.call(commands.ssh(supervisor.machine, worker.node, str(worker.index), words))
      *lines, last = done.out.splitlines() or [""]
      codes[worker.label] = (
        last.removeprefix(supervise.EXIT_MARK) if not done.code else f"can't be asked ({done.said()})"
      )
      for line in lines:
        emit(worker.label, line)
  return {"name": supervisor.machine.name, "exit_codes": codes}, 0


def _stop(supervisor: Supervisor) -> tuple[dict[str, Any], int]:
  _with_workers(supervisor)
  said = supervisor.halt("stop")
  delete = commands.shell(commands.delete(supervisor.machine))
  logging.warning("%s is still there, and billed; delete it with: %s", supervisor.machine.name, delete)
  return {"name": supervisor.machine.name, "state": "stopped", "workers": said}, 0


def _delete(supervisor: Supervisor) -> tuple[dict[str, Any], int]:
  left = supervisor.cloud.delete()
  if left:
    logging.error("left, and billed: %s", ", ".join(left))
  return {
    "name": supervisor.machine.name,
    "state": "left" if left else "gone",
    "left": left,
  }, EXIT_FAILED if left else 0


_PARTS: dict[str, Callable[[Supervisor], tuple[dict[str, Any], int]]] = {
  "train": _train,
  "create": _create,
  "queue": _queue,
  "upload": _upload,
  "run": _run,
  "logs": _logs,
  "status": _status,
  "stop": _stop,
  "delete": _delete,
}  # fmt: skip


def main(argv: Sequence[str], rest: Sequence[str]) -> int:
  """Does what a command says.

  Args:
    argv: the program, and the command.
    rest: what stands behind `--`.

  Returns:
    The exit code.
  """
  command = argv[1] if len(argv) > 1 else ""
  if command not in COMMANDS:
    raise InputError(f"command: {command!r} is none of {', '.join(COMMANDS)}")
  if len(argv) > 2:
    raise InputError(f"arguments: {' '.join(argv[2:])!r} are left over; flags of cyb-train go behind --")
  check(command, rest)
  machine, job = _machine(), _job(command, rest)
  if flags.FLAGS.dry_run:
    _show_runbook(command, machine, job)
    return 0
  if shutil.which("gcloud") is None:
    raise InputError(
      "gcloud: not found on PATH; install the Google Cloud CLI (https://cloud.google.com/sdk), or --dry_run"
    )
  if command == "ssh":
    words = runbook("ssh", machine, job)[0].words
    os.execvp(words[0], words)
  limits = Limits(**{name: flags.FLAGS[name].value for name in Limits.__dataclass_fields__})
  with Interrupts() as interrupts:
    supervisor = Supervisor(Cloud(machine, limits, interrupts), job, keep=flags.FLAGS.keep)
    try:
      result, code = _PARTS[command](supervisor)
    except RefusedError as error:
      return _complain(str(error), EXIT_BAD_INPUT)
    except (LostError, FailedError) as error:
      return _complain(str(error), EXIT_FAILED)
    except Interrupted:
      logging.warning(
        "interrupted; %s is as it was, and billed if it is there; `status` tells, `delete` deletes", machine.name
      )
      return EXIT_INTERRUPTED
  sys.stderr.flush()
  sys.stdout.write(json.dumps(result) + "\n")
  sys.stdout.flush()
  return code


def _complain(message: str, code: int) -> int:
  sys.stderr.write(f"error: {' '.join(message.split())}\n")
  return code


def run() -> None:
  logging.set_verbosity(logging.INFO)
  logging.set_stderrthreshold(logging.INFO)
  logging.use_absl_handler()
  define_flags()
  words = sys.argv
  split = words.index("--") if "--" in words else len(words)
  words, rest = words[:split], words[split + 1 :]

  def parsed(argv: Sequence[str]) -> list[str]:
    try:
      return flags.FLAGS(argv)
    except flags.Error as error:
      sys.exit(_complain(str(error), EXIT_BAD_INPUT))

  def guarded(argv: Sequence[str]) -> int:
    try:
      return main(argv, rest)
    except InputError as error:
      return _complain(str(error), EXIT_BAD_INPUT)

  app.run(guarded, argv=words, flags_parser=parsed)


if __name__ == "__main__":
  run()
