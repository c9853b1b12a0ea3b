"""The commands that make, fill, use and delete a TPU: nothing is run here, so that what is printed is what is run."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The image that belongs to each generation (https://cloud.google.com/tpu/docs/runtimes).
IMAGES = {
  "v2": "tpu-ubuntu2204-base",
  "v3": "tpu-ubuntu2204-base",
  "v4": "tpu-ubuntu2204-base",
  "v5litepod": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}
# The number in a type counts chips here, and TensorCores, two a chip, elsewhere.
COUNTS_CHIPS = ("v5litepod", "v6e")
CHIPS_PER_HOST = 4
# Where one host has all chips of the type up to here.
CHIPS_OF_ONE_HOST = {"v5litepod": 8, "v6e": 8}

SERVICE_HOME = "/opt/cyb"


@dataclasses.dataclass(frozen=True)
class Step:
  """A command, and why it is run."""

  why: str
  words: Sequence[str]

  def __str__(self) -> str:
    return f"# {self.why}\n{shell(self.words)}"


@dataclasses.dataclass(frozen=True)
class Machine:
  """A queued resource and the TPU nodes (slices) that it stands for; all of it comes from flags of the same names."""

  name: str
  zone: str
  type: str = ""
  project: str = ""
  image: str = ""
  slices: int = 1
  spot: bool = False
  reserved: bool = False
  queue_for: str = ""
  network: str = ""
  subnetwork: str = ""
  internal_ips: bool = False
  iap: bool = False
  service_account: str = ""
  labels: str = ""
  tags: str = ""
  startup: bool = False

  @property
  def nodes(self) -> list[str]:
    """What the slices are called: a single one like the queued resource, several with a number behind it."""
    return [self.name] if self.slices == 1 else [f"{self.name}-{i}" for i in range(self.slices)]

  def where(self) -> list[str]:
    return [f"--zone={self.zone}"] + ([f"--project={self.project}"] if self.project else [])


def family(accelerator: str) -> str:
  """'v5litepod' of 'v5litepod-16'."""
  return accelerator.partition("-")[0]


def hosts(accelerator: str) -> int:
  """How many workers a type has, by its name; once it is there, its own list of addresses says so.

  Args:
    accelerator: such as v4-32 (32 TensorCores, 16 chips, 4 hosts) or v5litepod-16 (16 chips, 4 hosts).
  """
  number = int(accelerator.rpartition("-")[2])
  kind = family(accelerator)
  chips = number if kind in COUNTS_CHIPS else -(-number // 2)
  if chips <= CHIPS_OF_ONE_HOST.get(kind, CHIPS_PER_HOST):
    return 1
  return -(-chips // CHIPS_PER_HOST)


def shell(words: Sequence[str]) -> str:
  """A command as one line for a shell; quotes stand around a flag's value, not around the flag."""

  def quoted(word: str) -> str:
    flag = re.match(r"--[a-z][\w.-]*=", word)
    return flag[0] + shlex.quote(word[flag.end() :]) if flag and word != flag[0] else shlex.quote(word)

  return " ".join(map(quoted, words))


def _queued(verb: str, machine: Machine) -> list[str]:
  return ["gcloud", "compute", "tpus", "queued-resources", verb, machine.name, *machine.where()]


def create(machine: Machine, *, source: str = "", flags_file: str = "", extras: str = "") -> list[str]:
  """Asks for the machine.

  Args:
    source: the archive's gs:// address, where the startup script installs it.
    flags_file: what holds the flags of cyb-train then, one a line.
    extras: what it installs then.
  """
  words = _queued("create", machine)
  words += [f"--accelerator-type={machine.type}", f"--runtime-version={machine.image or IMAGES[family(machine.type)]}"]
  if machine.slices == 1:
    words.append(f"--node-id={machine.name}")
  else:
    words += [f"--node-count={machine.slices}", f"--node-prefix={machine.name}"]
  if machine.spot:
    words.append("--spot")
  if machine.reserved:
    words.append("--reserved")
  for flag in ("network", "subnetwork", "service_account", "labels", "tags"):
    value = getattr(machine, flag)
    if value:
      words.append(f"--{flag.replace('_', '-')}={value}")
  if machine.internal_ips:
    words.append("--internal-ips")
  if machine.queue_for:
    words.append(f"--valid-until-duration={machine.queue_for}")
  if machine.startup:
    startup = ROOT / "launch" / "startup.sh"
    words.append(f"--metadata-from-file=startup-script={startup},cyb-flags={flags_file}")
    # Another separator than the comma, which stands between the extras.
    words.append(f"--metadata=^|^cyb-source={source}|cyb-extras={extras}")
  return [*words, "--quiet"]


def describe(machine: Machine) -> list[str]:
  return [*_queued("describe", machine), "--format=json"]


def describe_node(machine: Machine, node: str) -> list[str]:
  return ["gcloud", "compute", "tpus", "tpu-vm", "describe", node, *machine.where(), "--format=json"]


def delete(machine: Machine) -> list[str]:
  """Deletes the queued resource with its nodes: without --force, one that has nodes can't be deleted."""
  return [*_queued("delete", machine), "--force", "--quiet"]


def delete_node(machine: Machine, node: str) -> list[str]:
  return ["gcloud", "compute", "tpus", "tpu-vm", "delete", node, *machine.where(), "--quiet"]


def archive(checkout: pathlib.Path, path: pathlib.Path) -> list[str]:
  """What git tracks, so that runs, venvs and caches stay here."""
  return ["git", "-C", str(checkout), "archive", "--format=tar.gz", f"--output={path}", "HEAD"]


def to_bucket(path: pathlib.Path, source: str) -> list[str]:
  return ["gcloud", "storage", "cp", str(path), source]


def copy(machine: Machine, node: str, worker: str, path: pathlib.Path) -> list[str]:
  """The archive to workers: 'all', or a number."""
  words = ["gcloud", "compute", "tpus", "tpu-vm", "scp", str(path), f"{node}:cyb_jax.tar.gz", *machine.where()]
  return [*words, f"--worker={worker}", *(["--tunnel-through-iap"] if machine.iap else []), "--quiet"]


def ssh(machine: Machine, node: str, worker: str, command: str = "") -> list[str]:
  """A command on workers: 'all', or a number; without one, a shell on that worker."""
  words = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *machine.where(), f"--worker={worker}"]
  if machine.iap:
    words.append("--tunnel-through-iap")
  return [*words, "--quiet", f"--command={command}"] if command else words


UNPACK = "rm -rf cyb_jax && mkdir cyb_jax && tar -xzf cyb_jax.tar.gz -C cyb_jax"


def on_worker(machine: Machine, verb: str, *words: str) -> str:
  """A verb of worker.sh, as the shell of a worker reads it."""
  script = "cyb_jax/launch/worker.sh"
  program = ["sudo", "bash", f"{SERVICE_HOME}/{script}"] if machine.startup else ["bash", script]
  return shell([*program, verb, *words])
