"""The commands that create, set up, use and delete a TPU.

This module runs nothing, so the runbook prints exactly the commands that are run.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The image of each generation (https://cloud.google.com/tpu/docs/runtimes).
IMAGES = {
  "v2": "tpu-ubuntu2204-base",
  "v3": "tpu-ubuntu2204-base",
  "v4": "tpu-ubuntu2204-base",
  "v5litepod": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}
# The number in the name of these types counts chips; in other types, it counts TensorCores, two per chip.
COUNTS_CHIPS = ("v5litepod", "v6e")
CHIPS_PER_HOST = 4
# Types with at most this number of chips have a single host.
CHIPS_OF_ONE_HOST = {"v5litepod": 8, "v6e": 8}

SERVICE_HOME = "/opt/cyb"


@dataclasses.dataclass(frozen=True)
class Step:
  """A command with an explanation."""

  why: str
  words: Sequence[str]

  def __str__(self) -> str:
    return f"# {self.why}\n{shell(self.words)}"


@dataclasses.dataclass(frozen=True)
class Machine:
  """A queued resource with its TPU nodes (slices); the fields are values of flags of the same names."""

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
  data_disk: str = ""
  labels: str = ""
  tags: str = ""
  startup: bool = False

  @property
  def nodes(self) -> list[str]:
    """The names of the nodes: the name of the queued resource, followed by a number if there are several."""
    return [self.name] if self.slices == 1 else [f"{self.name}-{i}" for i in range(self.slices)]

  def where(self) -> list[str]:
    return [f"--zone={self.zone}"] + ([f"--project={self.project}"] if self.project else [])


def disk_source(machine: Machine) -> str:
  """The full name of the machine's data disk, which is in its zone; '' without a data disk."""
  if not machine.data_disk or "/" in machine.data_disk:
    return machine.data_disk
  return f"projects/{machine.project}/zones/{machine.zone}/disks/{machine.data_disk}"


def family(accelerator: str) -> str:
  """The part of an accelerator type before the number, such as 'v5litepod' for 'v5litepod-16'."""
  return accelerator.partition("-")[0]


def hosts(accelerator: str) -> int:
  """The number of workers of an accelerator type, derived from its name; of an existing node, see `Cloud.workers`.

  Args:
    accelerator: a type such as v4-32 (32 TensorCores, 16 chips, 4 hosts) or v5litepod-16 (16 chips, 4 hosts).
  """
  number = int(accelerator.rpartition("-")[2])
  kind = family(accelerator)
  chips = number if kind in COUNTS_CHIPS else -(-number // 2)
  if chips <= CHIPS_OF_ONE_HOST.get(kind, CHIPS_PER_HOST):
    return 1
  return -(-chips // CHIPS_PER_HOST)


def shell(words: Sequence[str]) -> str:
  """A command as one line for a shell; of a flag, only the value is quoted."""

  def quoted(word: str) -> str:
    flag = re.match(r"--[a-z][\w.-]*=", word)
    return flag[0] + shlex.quote(word[flag.end() :]) if flag and word != flag[0] else shlex.quote(word)

  return " ".join(map(quoted, words))


def _queued(verb: str, machine: Machine) -> list[str]:
  return ["gcloud", "compute", "tpus", "queued-resources", verb, machine.name, *machine.where()]


def create(machine: Machine, *, source: str = "", flags_file: str = "", extras: str = "") -> list[str]:
  """The command that requests the machine.

  Args:
    machine: the machine.
    source: with the startup script, the gs:// URL of the archive that it installs.
    flags_file: with the startup script, the file of the flags of cyb-train, one per line.
    extras: with the startup script, the extras that it installs.
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
  if machine.data_disk:
    # Several machines may attach a disk that is read-only.
    words.append(f"--data-disk=source={disk_source(machine)},mode=read-only")
  if machine.queue_for:
    words.append(f"--valid-until-duration={machine.queue_for}")
  if machine.startup:
    startup = ROOT / "launch" / "startup.sh"
    words.append(f"--metadata-from-file=startup-script={startup},cyb-flags={flags_file}")
    # The separator is |, because the list of extras contains commas.
    disk = "|cyb-disk=1" if machine.data_disk else ""
    words.append(f"--metadata=^|^cyb-source={source}|cyb-extras={extras}{disk}")
  return [*words, "--quiet"]


def describe(machine: Machine) -> list[str]:
  return [*_queued("describe", machine), "--format=json"]


def describe_node(machine: Machine, node: str) -> list[str]:
  return ["gcloud", "compute", "tpus", "tpu-vm", "describe", node, *machine.where(), "--format=json"]


def delete(machine: Machine) -> list[str]:
  """The command that deletes the queued resource with its nodes, which requires --force."""
  return [*_queued("delete", machine), "--force", "--quiet"]


def delete_node(machine: Machine, node: str) -> list[str]:
  return ["gcloud", "compute", "tpus", "tpu-vm", "delete", node, *machine.where(), "--quiet"]


def archive(checkout: pathlib.Path, path: pathlib.Path) -> list[str]:
  """The command that packs the tracked files of a checkout, without runs, venvs and caches."""
  return ["git", "-C", str(checkout), "archive", "--format=tar.gz", f"--output={path}", "HEAD"]


def to_bucket(path: pathlib.Path, source: str) -> list[str]:
  return ["gcloud", "storage", "cp", str(path), source]


def copy(machine: Machine, node: str, worker: str, path: pathlib.Path) -> list[str]:
  """The command that copies the archive to a worker; `worker` is a number or 'all'."""
  words = ["gcloud", "compute", "tpus", "tpu-vm", "scp", str(path), f"{node}:cyb_jax.tar.gz", *machine.where()]
  return [*words, f"--worker={worker}", *(["--tunnel-through-iap"] if machine.iap else []), "--quiet"]


def ssh(machine: Machine, node: str, worker: str, command: str = "") -> list[str]:
  """The command that runs a command on a worker, or opens a shell if it is ''; `worker` is a number or 'all'."""
  words = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *machine.where(), f"--worker={worker}"]
  if machine.iap:
    words.append("--tunnel-through-iap")
  return [*words, "--quiet", f"--command={command}"] if command else words


UNPACK = "rm -rf cyb_jax && mkdir cyb_jax && tar -xzf cyb_jax.tar.gz -C cyb_jax"


def on_worker(machine: Machine, verb: str, *words: str) -> str:
  """The command line that runs a command of worker.sh in the shell of a worker."""
  script = "cyb_jax/launch/worker.sh"
  program = ["sudo", "bash", f"{SERVICE_HOME}/{script}"] if machine.startup else ["bash", script]
  return shell([*program, verb, *words])
