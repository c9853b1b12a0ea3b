"""TPU slices that are described only: what the TPU compiler needs to know of them, on a machine without any."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cyb_jax.errors import InputError

if TYPE_CHECKING:  # imported when the environment is set
  import jax

# libtpu looks for a TPU, asks the cloud's metadata server which, and writes logs, unless environment variables
# forbid it. What the user has set for libtpu stays, but that this process computes nothing on a TPU.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  # Beside a process that trains on the same machine.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_LOG_DIR": "disabled",
  # Any TPU will serve: libtpu warns where the variable isn't set, though only the topology matters.
  "TPU_ACCELERATOR_TYPE": "v4-8",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
}
_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SOLIDS = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
# Slices that can be had: https://docs.cloud.google.com/tpu/docs/v5e, and the same for v6e, v4 and v5p.
SLICES = {"v4": _SOLIDS, "v5e": _PLANES, "v5p": _SOLIDS, "v6e": _PLANES}


def set_environment() -> None:
  """Sets what libtpu reads; to be called before jax is imported, by a program that does nothing but compile."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)


def check_topology(name: str) -> tuple[str, tuple[int, ...]]:
  """The generation, and chips along each axis, of 'v5e:4x4' and the like.

  Raises:
    InputError: there is no such slice.
  """
  generation, _, shape = name.partition(":")
  sizes = re.fullmatch(r"\d+x\d+(x\d+)?", shape)
  if generation in SLICES and sizes:
    chips = tuple(map(int, shape.split("x")))
    # Larger cuboids are made of cubes of 4 x 4 x 4.
    cubes = len(chips) == 3 and SLICES[generation] is _SOLIDS and all(size > 0 and size % 4 == 0 for size in chips)
    if shape in SLICES[generation] or cubes:
      return generation, chips
  raise InputError(
    f"--topology: {name!r} is unknown; v5e and v6e have {', '.join(_PLANES)} (as v5e:4x4), v4 and v5p have"
    f" {', '.join(_SOLIDS)} and larger ones whose sides are multiples of 4 (as v5p:2x2x2)"
  )


def check_libtpu() -> None:
  """Raises InputError where there is no TPU compiler."""
  path = os.environ.get("TPU_LIBRARY_PATH")
  if path:
    if not os.path.isfile(path):
      raise InputError(f"TPU_LIBRARY_PATH: {path} is not there; give libtpu.so, or unset it")
  elif importlib.util.find_spec("libtpu") is None:
    raise InputError(
      "--topology: needs the TPU compiler, libtpu, which isn't installed; pip install 'cyb_jax[tpu-compile]' (Linux),"
      " or name a libtpu.so in TPU_LIBRARY_PATH"
    )


def open_topology(name: str) -> list[jax.Device]:
  """The devices of a slice, to compile for; nothing can be put on them.

  Raises:
    InputError: there is no such slice, or no TPU compiler.
  """
  generation, chips = check_topology(name)
  check_libtpu()
  import jax
  from jax.experimental import topologies

  options: dict[str, object] = {}
  if math.prod(chips) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  if SLICES[generation] is _SOLIDS:
    # A chip's two cores work as one device, as they do where v4 and v5p train.
    options["chip_config_name"] = "megacore"
  try:
    with _silence():
      return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices)
  except jax.errors.JaxRuntimeError as error:
    raise InputError(f"--topology: {name!r} is refused by libtpu: {str(error).strip().splitlines()[0]}") from None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
  """Keeps what native code writes to standard error, unless it fails: that the machine has no TPU is no news."""
  sys.stderr.flush()
  before = os.dup(2)
  with tempfile.TemporaryFile("w+b") as kept:
    os.dup2(kept.fileno(), 2)
    try:
      yield
    except BaseException:
      os.dup2(before, 2)
      kept.seek(0)
      os.write(2, kept.read())
      raise
    finally:
      os.dup2(before, 2)
      os.close(before)
