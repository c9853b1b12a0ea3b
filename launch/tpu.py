#!/usr/bin/env python3
"""Trains on Cloud TPUs: requests a machine, installs this checkout, trains, follows the logs, and deletes the machine.

python launch/tpu.py train --name=NAME --zone=ZONE --type=v5litepod-16 --spot -- FLAGS OF cyb-train
python launch/tpu.py train ... --dry_run -- FLAGS     prints the commands, to read or to follow by hand; runs nothing
python launch/tpu.py create|queue|upload|run|logs|stop|delete|status|ssh --name=NAME --zone=ZONE     single steps

The program needs gcloud (logged in), git and absl-py, but not jax. Exit codes: 0 done; 1 failed, or billed resources
remain; 2 bad input; 75 interrupted or stopped, so the same command continues. The last line of standard output is one
JSON object; logs, including the workers' logs, go to standard error.
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
import follow
import options
from absl import app, flags, logging
from cloud import Cloud, FailedError, Limits, LostError, RefusedError
from commands import Machine
from jobs import Job
from options import InputError, flag_of
from processes import Interrupted, Interrupts
from runbook import runbook
from supervise import Supervisor

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


def _git(checkout: pathlib.Path, *words: str) -> str:
  try:
    done = subprocess.run(
      ["git", "-C", str(checkout), *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
  except OSError as error:
    raise InputError(f"git: it can't be run ({error.strerror}); install git") from None
  if done.returncode:
    raise InputError(
      f"--checkout: {checkout} is not a git checkout with a commit ({done.stderr.strip().splitlines()[-1:]}); give one"
    )
  return done.stdout


def _commit(checkout: pathlib.Path) -> str:
  """The commit that is trained; uncommitted changes are an error, and untracked files cause a warning."""
  commit = _git(checkout, "rev-parse", "HEAD").strip()
  lines = _git(checkout, "status", "--porcelain").splitlines()
  changed = [line[3:] for line in lines if not line.startswith("??")]
  untracked = [line[3:] for line in lines if line.startswith("??")]
  if changed:
    some = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
    message = f"--checkout: {len(changed)} files have changes that are not in the last commit, {commit[:12]} ({some})"
    if not (flags.FLAGS.allow_dirty or flags.FLAGS.dry_run):
      raise InputError(f"{message}; commit them, or give --allow_dirty to train without them")
    logging.warning("%s; the last commit is trained without them", message)
  if untracked:
    logging.warning("%d untracked files are not uploaded: %s", len(untracked), ", ".join(untracked[:5]))
  for needed in ("launch/worker.sh", "constraints.txt"):
    _git(checkout, "cat-file", "-e", f"HEAD:{needed}")
  return commit


def _job(command: str, rest: Sequence[str]) -> Job:
  args = flags.FLAGS
  checkout = pathlib.Path(args.checkout).expanduser()
  packs = command in ("train", "upload") or (command == "create" and args.runner == "startup")
  commit = _commit(checkout) if packs else ""
  caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
  bucket = re.match(r"gs://[^/]+", flag_of(rest, "workdir"))
  return Job(
    flags=tuple(rest),
    checkout=checkout,
    commit=commit,
    extras=args.extras,
    cache=pathlib.Path(args.cache).expanduser() if args.cache else caches / "cyb_jax-launch" / args.name,
    source=args.source or (f"{bucket[0]}/cyb_jax-source/{commit[:12]}.tar.gz" if bucket else ""),
  )


def _machine() -> Machine:
  args = flags.FLAGS
  fields = [field for field in Machine.__dataclass_fields__ if field != "startup"]
  return Machine(**{field: args[field].value for field in fields}, startup=args.runner == "startup")


def _show_runbook(command: str, machine: Machine, job: Job) -> None:
  title = f"{command}: {machine.name} in {machine.zone}"
  if machine.type:
    slices = f"{machine.slices} slices, " if machine.slices > 1 else ""
    title += f", {machine.type} ({slices}{machine.slices * commands.hosts(machine.type)} hosts)"
  steps = [f"# {title}. Nothing was run.", *map(str, runbook(command, machine, job))]
  # A redirection must not be quoted like the words of the command.
  sys.stdout.write("\n\n".join(steps).replace(" '>' ", " > ") + "\n")


def _train(supervisor: Supervisor) -> tuple[dict[str, Any], int]:
  result = supervisor.train(follow.show)
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
        result["training"][worker.label] = done.out.strip() if not done.code else f"unreachable ({done.message()})"
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
  supervisor.check_flags()
  supervisor.start()
  return {"name": supervisor.machine.name, "state": "started", "workers": len(supervisor.workers)}, 0


def _logs(supervisor: Supervisor) -> tuple[dict[str, Any], int]:
  args = flags.FLAGS
  _with_workers(supervisor)
  chosen = [w for w in supervisor.workers if args.worker is None or w.index == int(args.worker)]
  if not chosen:
    raise InputError(f"--worker: {args.worker} must be in 0..{len(supervisor.workers) - 1}")

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
      codes[worker.label] = last.removeprefix(follow.EXIT_MARK) if not done.code else f"unreachable ({done.message()})"
      for line in lines:
        emit(worker.label, line)
  return {"name": supervisor.machine.name, "exit_codes": codes}, 0


def _stop(supervisor: Supervisor) -> tuple[dict[str, Any], int]:
  _with_workers(supervisor)
  said = supervisor.halt("stop")
  delete = commands.shell(commands.delete(supervisor.machine))
  logging.warning("%s still exists, and is billed; delete it with: %s", supervisor.machine.name, delete)
  return {"name": supervisor.machine.name, "state": "stopped", "workers": said}, 0


def _delete(supervisor: Supervisor) -> tuple[dict[str, Any], int]:
  left = supervisor.cloud.delete()
  if left:
    logging.error("not deleted, and billed: %s", ", ".join(left))
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
  """Runs a command.

  Args:
    argv: the name of the program, and the command.
    rest: the words after `--`.

  Returns:
    The exit code.
  """
  command = argv[1] if len(argv) > 1 else ""
  if command not in COMMANDS:
    raise InputError(f"command: {command!r} is unknown; give one of {', '.join(COMMANDS)}")
  if len(argv) > 2:
    raise InputError(f"arguments: {' '.join(argv[2:])!r} is unexpected; give flags of cyb-train after --")
  options.check(command, rest)
  machine, job = _machine(), _job(command, rest)
  if flags.FLAGS.dry_run:
    _show_runbook(command, machine, job)
    return 0
  if shutil.which("gcloud") is None:
    raise InputError(
      "gcloud: not found on PATH; install the Google Cloud CLI (https://cloud.google.com/sdk), or give --dry_run"
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
        "interrupted; %s was not changed, and is billed if it exists; see `status` and `delete`", machine.name
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
  options.define_flags()
  # `--help` shows the flags of the program itself.
  flags.adopt_module_key_flags(options)
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
