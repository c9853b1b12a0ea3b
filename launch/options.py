"""The flags of launch/tpu.py, and what they must be."""

from __future__ import annotations

import re
from collections.abc import Sequence

import commands
from absl import flags
from cloud import Limits


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
  _define_limits()


def _define_limits() -> None:
  meaning = {
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
  for name, help_text in meaning.items():
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
  for name in Limits.__dataclass_fields__:
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
    if not flag_of(rest, flag):
      raise InputError(f"--{flag}: not among the flags of cyb-train, behind --")
  if any("\n" in word for word in rest):
    raise InputError("--: a flag of cyb-train has a line break, which none needs")
  workdir = flag_of(rest, "workdir")
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


def flag_of(words: Sequence[str], flag: str) -> str:
  """Of --flag=value or --flag value, the last that is given; '' where none is."""
  value = ""
  for i, word in enumerate(words):
    if word.startswith((f"--{flag}=", f"-{flag}=")):
      value = word.partition("=")[2]
    elif word in (f"--{flag}", f"-{flag}") and i + 1 < len(words):
      value = words[i + 1]
  return value
