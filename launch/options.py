"""The flags of launch/tpu.py, and their checks."""

from __future__ import annotations

import re
from collections.abc import Sequence

import commands
from absl import flags
from cloud import Limits


class InputError(ValueError):
  """Bad input; the message is one line that names the flag, its value, and the accepted values."""


def define_flags() -> None:
  text, yes = flags.DEFINE_string, flags.DEFINE_boolean
  text("name", None, "The name of the queued resource and of its node.")
  text("zone", None, "The zone, such as us-central2-b.")
  text("project", "", "The project; '': gcloud's default.")
  text("type", "", "The accelerator type, such as v4-8, v5litepod-16, v5p-8, v6e-16.")
  text("image", "", "The runtime version; '': the default version of the type.")
  flags.DEFINE_integer("slices", 1, "The number of slices, connected by the data centre's network (multi-slice).")
  yes("spot", False, "Request cheaper capacity that may be preempted at any time.")
  yes("reserved", False, "Request capacity of the project's reservation.")
  text(
    "queue_for", "", "The time without a machine after which the request is withdrawn and train gives up, such as 6h;"
    " '': unlimited."
  )  # fmt: skip
  text(
    "data_disk", "", "An existing disk of the zone, for a token store that does not fit on the machine's own disk of"
    " 100 GB. All hosts mount it read-only at /mnt/data; give --config.data.store=/mnt/data/... to cyb-train."
  )  # fmt: skip
  text("network", "", "The network; '': the default network.")
  text("subnetwork", "", "A subnetwork of --network.")
  yes("internal_ips", False, "Use no external addresses; usually combined with --iap.")
  yes("iap", False, "Connect through the Identity-Aware Proxy.")
  text("service_account", "", "The machine's service account, which must have access to the bucket; '': the default.")
  text("labels", "", "Labels for billing, key=value,key=value.")
  text("tags", "", "Network tags for firewall rules, separated by commas.")
  flags.DEFINE_enum(
    "runner", "tmux", ["tmux", "startup"], "tmux: install over ssh and run in tmux; startup: launch/startup.sh installs"
    " and runs a service."
  )  # fmt: skip
  text(
    "source",
    "",
    "With --runner=startup, the URL of the checkout's archive; '': cyb_jax-source/COMMIT.tar.gz in --workdir's bucket.",
  )
  text("extras", "tpu,reviews", "The extras of the package that are installed.")
  text("checkout", str(commands.ROOT), "The git checkout whose last commit is trained.")
  yes("allow_dirty", False, "Train the last commit even if the checkout has uncommitted changes.")
  yes(
    "allow_local_workdir", False, "Allow a --workdir on the machine's own disk even if the machine may be preempted or"
    " has several hosts."
  )  # fmt: skip
  yes("keep", False, "train: never delete the machine.")
  yes("dry_run", False, "Print the commands with explanations, and run none of them.")
  yes("follow", False, "logs: continue until training ends.")
  yes("training", False, "status: also query the workers.")
  text("worker", None, "logs, ssh: the number of a worker of a slice, from 0; by default, logs prints all workers.")
  flags.DEFINE_integer("slice", 0, "ssh: the number of the slice, from 0.")
  flags.DEFINE_integer("lines", 100, "logs: the number of last lines that are printed without --follow.")
  text("cache", "", "The folder for the archive; '': cyb_jax-launch/NAME in the user's cache folder.")
  _define_limits()


def _define_limits() -> None:
  meaning = {
    "max_retries": "train: the largest number of consecutive new requests; training for --healthy_seconds resets it.",
    "max_crashes": "train: the largest number of restarts after crashes (exit code 1); exit code 2 is never retried.",
    "ssh_attempts": "The number of attempts on a failing worker before another machine is requested.",
    "delete_attempts": "The number of attempts to delete.",
    "poll_seconds": "The time between two checks of the machine.",
    "backoff_seconds": "The time before the first retry; it doubles for each further retry.",
    "backoff_limit_seconds": "The longest time before a retry.",
    "reconnect_seconds": "The time before a broken connection is opened again.",
    "call_seconds": "The time limit of a gcloud command.",
    "step_seconds": "The time limit of the upload, and of the installation.",
    "stop_seconds": "The time limit of saving after a request to stop.",
    "grace_seconds": "The time after exit code 75 in which a preemption is detected.",
    "straggler_seconds": "The time that the other workers have to end after one has failed.",
    "unreachable_seconds": "The time for which a worker may be unreachable while the cloud reports a healthy machine.",
    "healthy_seconds": "The duration of training that resets the count of --max_retries.",
    "delete_seconds": "The time limit of a deletion.",
  }
  for name, help_text in meaning.items():
    define = (
      flags.DEFINE_integer
      if isinstance(getattr(Limits, name), int) and not name.endswith("seconds")
      else flags.DEFINE_float
    )
    define(name, getattr(Limits, name), help_text)


# Valid names in Google Cloud: https://cloud.google.com/compute/docs/naming-resources.
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
  "data_disk": (
    re.compile(rf"(projects/[^/\s,]+/zones/[^/\s,]+/disks/)?{_NAME.pattern}"),
    "the name of a disk, or projects/PROJECT/zones/ZONE/disks/NAME",
  ),
  "labels": (re.compile(rf"{_LABEL}(,{_LABEL})*"), "key=value,key=value in lower case"),
  "tags": (re.compile(r"[a-z][-a-z0-9]{0,62}(,[a-z][-a-z0-9]{0,62})*"), "lower-case names separated by commas"),
  "source": (re.compile(r"gs://[a-z0-9][\w.-]+/[^|\s]+\.tar\.gz"), "gs://BUCKET/PATH.tar.gz"),
  "extras": (re.compile(r"[a-z]+(,[a-z]+)*"), "names of extras separated by commas"),
}  # fmt: skip


def check(command: str, rest: Sequence[str]) -> None:
  """Raises InputError for the first invalid flag.

  Args:
    command: one of COMMANDS.
    rest: the words after `--`.
  """
  args = flags.FLAGS
  if not args.name:
    raise InputError("--name: not given; give a name for the machine")
  if not _NAME.fullmatch(args.name):
    raise InputError(
      f"--name: {args.name!r} is invalid; give at most 63 lower-case letters, digits and dashes, with a letter at the"
      " beginning and no dash at the end"
    )
  if not args.zone:
    raise InputError("--zone: not given; give a zone such as us-central2-b")
  for name, (pattern, wanted) in _PATTERNS.items():
    value = args[name].value
    if value and not pattern.fullmatch(value):
      raise InputError(f"--{name}: {value!r} is invalid; give {wanted}")
  for name in Limits.__dataclass_fields__:
    if args[name].value < 0:
      raise InputError(f"--{name}: {args[name].value} must not be negative")
  for name in ("ssh_attempts", "delete_attempts", "slices", "lines"):
    if args[name].value < 1:
      raise InputError(f"--{name}: {args[name].value} must be at least 1")
  if args.slices > 1 and not _NAME.fullmatch(f"{args.name}-{args.slices - 1}"):
    raise InputError(f"--name: {args.name!r} is too long, because the numbers of slices are appended; shorten it")
  if args.worker is not None and not args.worker.isdecimal():
    raise InputError(f"--worker: {args.worker!r} is invalid; give the number of a worker, from 0")
  if not 0 <= args.slice < args.slices:
    raise InputError(f"--slice: {args.slice} must be in 0..{args.slices - 1} for --slices={args.slices}")
  if args.spot and args.reserved:
    raise InputError("--spot: --reserved is also given; give one of them")
  if args.data_disk and "/" not in args.data_disk and not args.project:
    raise InputError(
      f"--data_disk: {args.data_disk!r} requires --project; give it, or projects/PROJECT/zones/ZONE/disks/NAME"
    )
  if args.subnetwork and not args.network:
    raise InputError(f"--subnetwork: {args.subnetwork!r} requires --network; give it too")
  if command in ("train", "create"):
    if not args.type:
      raise InputError(
        f"--type: not given; give a type such as {', '.join(f'{kind}-8' for kind in commands.IMAGES if kind >= 'v4')}"
      )
    if not re.fullmatch(r"v\d+[a-z]*-[1-9]\d*", args.type):
      raise InputError(f"--type: {args.type!r} is invalid; give an accelerator type such as v4-8 or v5litepod-16")
    if not args.image and commands.family(args.type) not in commands.IMAGES:
      raise InputError(
        f"--image: not given, and --type={args.type} has no default; give a runtime version, or one of the types"
        f" {', '.join(commands.IMAGES)}"
      )
  trains = command in ("train", "run") or (command == "create" and args.runner == "startup")
  if trains:
    _check_training(command, rest)
  elif rest and command != "ssh":
    raise InputError(f"arguments: {' '.join(rest)!r} after --, but `{command}` does not train; omit them")


def _check_training(command: str, rest: Sequence[str]) -> None:
  args = flags.FLAGS
  if not rest:
    raise InputError("--: no flags of cyb-train; give them after --: -- --config=... --workdir=gs://...")
  for flag in ("config", "workdir"):
    if not flag_of(rest, flag):
      raise InputError(f"--{flag}: not given; give it among the flags of cyb-train, after --")
  if any("\n" in word for word in rest):
    raise InputError("--: a flag of cyb-train contains a line break; remove it")
  workdir = flag_of(rest, "workdir")
  if workdir.startswith("gs://"):
    if not re.fullmatch(r"gs://[a-z0-9][\w.-]+/\S+", workdir):
      raise InputError(f"--workdir: {workdir!r} is invalid; give gs://BUCKET/FOLDER")
    return
  if not workdir.startswith("/"):
    raise InputError(
      f"--workdir: {workdir!r} would be in the checkout, which the next upload replaces; give gs://BUCKET/FOLDER, or an"
      " absolute path"
    )
  if args.runner == "startup" and not args.source:
    raise InputError(f"--source: not given, and --workdir={workdir} is not in a bucket; give gs://BUCKET/PATH.tar.gz")
  if command == "run" or args.allow_local_workdir:
    return
  several = args.slices * commands.hosts(args.type)
  why = (
    "a machine that may be preempted at any time"
    if args.spot
    else f"a machine of {several} hosts"
    if several > 1
    else ""
  )
  if why:
    raise InputError(
      f"--workdir: {workdir!r} is on the disk of {why}; give gs://BUCKET/FOLDER, or --allow_local_workdir"
    )


def seconds_of(duration: str) -> float:
  """The seconds of a duration such as '6h' or '1h30m'."""
  sizes = {"s": 1, "m": 60, "h": 3600, "d": 86400}
  return float(sum(int(number) * sizes[unit] for number, unit in re.findall(r"(\d+)([smhd])", duration)))


def flag_of(words: Sequence[str], flag: str) -> str:
  """The last value of a flag, given as --flag=value or --flag value; '' if it is not given."""
  value = ""
  for i, word in enumerate(words):
    if word.startswith((f"--{flag}=", f"-{flag}=")):
      value = word.partition("=")[2]
    elif word in (f"--{flag}", f"-{flag}") and i + 1 < len(words):
      value = words[i + 1]
  return value
