"""Descriptions of TPU slices for the TPU compiler, on a machine without TPUs."""

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

if TYPE_CHECKING:  # otherwise imported after the environment is set
  import jax

# libtpu looks for a TPU, queries the cloud's metadata server, and writes logs, unless environment variables disable
# this. Variables that the user has set are kept, except that this process does not compute on a TPU.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  # Another process may train on the same machine.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_LOG_DIR": "disabled",
  # Any value is valid: libtpu warns if the variable is not set, although only the topology matters.
  "TPU_ACCELERATOR_TYPE": "v4-8",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
}
_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SOLIDS = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
# Available slices: https://docs.cloud.google.com/tpu/docs/v5e, and the corresponding pages of v6e, v4 and v5p.
SLICES = {"v4": _SOLIDS, "v5e": _PLANES, "v5p": _SOLIDS, "v6e": _PLANES}


def set_environment() -> None:
  """Sets environment variables for libtpu; call it before jax is imported, in a program that only compiles."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)


def check_topology(name: str) -> tuple[str, tuple[int, ...]]:
  """The generation, and the number of chips along each axis, of a topology such as 'v5e:4x4'.

  Raises:
    InputError: the slice does not exist.
  """
  generation, _, shape = name.partition(":")
  sizes = re.fullmatch(r"\d+x\d+(x\d+)?", shape)
  if generation in SLICES and sizes:
    chips = tuple(map(int, shape.split("x")))
    # Larger slices consist of cubes of 4 x 4 x 4.
    cubes = len(chips) == 3 and SLICES[generation] is _SOLIDS and all(size > 0 and size % 4 == 0 for size in chips)
    if shape in SLICES[generation] or cubes:
      return generation, chips
  raise InputError(
    f"--topology: {name!r} is unknown; v5e and v6e have {', '.join(_PLANES)} (such as v5e:4x4); v4 and v5p have"
    f" {', '.join(_SOLIDS)} (such as v5p:2x2x2) and larger slices whose sides are multiples of 4"
  )


def check_libtpu() -> None:
  """Raises InputError if there is no TPU compiler."""
  path = os.environ.get("TPU_LIBRARY_PATH")
  if path:
    if not os.path.isfile(path):
      raise InputError(f"TPU_LIBRARY_PATH: {path} does not exist; set it to libtpu.so, or unset it")
  elif importlib.util.find_spec("libtpu") is None:
    raise InputError(
      "--topology: requires the TPU compiler, libtpu, which is not installed; pip install 'cyb_jax[tpu-compile]'"
      " (Linux), or set TPU_LIBRARY_PATH to libtpu.so"
    )


def open_topology(name: str) -> list[jax.Device]:
  """The abstract devices of a slice, for compilation only.

  Raises:
    InputError: the slice does not exist, or there is no TPU compiler.
  """
  generation, chips = check_topology(name)
  check_libtpu()
  import jax
  from jax.experimental import topologies

  options: dict[str, object] = {}
  if math.prod(chips) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  if SLICES[generation] is _SOLIDS:
    # The two cores of a chip are one device, as in training on v4 and v5p.
    options["chip_config_name"] = "megacore"
  try:
    with _silence():
      return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices)
  except jax.errors.JaxRuntimeError as error:
    raise InputError(f"--topology: {name!r} is refused by libtpu: {str(error).strip().splitlines()[0]}") from None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
  """Suppresses output of native code to standard error unless the block fails: libtpu reports that there is no TPU."""
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
