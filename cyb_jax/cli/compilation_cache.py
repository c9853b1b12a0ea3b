"""The persistent cache of compiled programs: a program that has run before on this machine compiles nothing again.

The cache is jax's own (https://docs.jax.dev/en/latest/persistent_compilation_cache.html). It is in the user's cache
folder and has a bounded size: the programs that were not used for the longest time are removed.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import sys

from absl import logging

from cyb_jax import command_line
from cyb_jax.errors import InputError
from cyb_jax.storage.paths import in_bucket, user_cache

_FOLDER = "JAX_COMPILATION_CACHE_DIR"
MAX_BYTES = 2 * 2**30
# Reading a program takes a few milliseconds, so only programs that compile faster than this are compiled again.
_MIN_SECONDS = 0.1


def define_cache_flag() -> None:
  """Defines `--compilation_cache`."""
  command_line.define_path(
    "compilation_cache", None, "The folder of compiled programs, which later processes read instead of compiling again;"
    f" '': none. By default the folder of {_FOLDER}, or a folder in the user's cache folder, which keeps at most"
    f" {MAX_BYTES // 2**30} GiB.",
  )  # fmt: skip


def enable(folder: str | None) -> None:
  """Enables the cache in this process and in the processes that it starts.

  Args:
    folder: the value of the flag: a folder or bucket; '': the cache is off; None: the folder of the variable
      JAX_COMPILATION_CACHE_DIR if it is set, otherwise the user's; without a user's folder that can be written, the
      cache is off.

  Raises:
    InputError: the flag names a folder that can't be written.
  """
  if folder is None and _FOLDER in os.environ:
    return
  requested = folder is not None
  if folder is None:
    folder = str(user_cache() / "compiled" / _machine())
  if folder and not in_bucket(folder) and not _is_writable(pathlib.Path(folder)):
    if requested:
      raise InputError(f"--compilation_cache: {folder} can't be written; give another folder, or '' for no cache")
    logging.info("%s can't be written: compiled programs are not kept; --compilation_cache=DIR sets a folder", folder)
    folder = ""
  _set(_FOLDER, folder)
  if folder:
    _set("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", _MIN_SECONDS)
    # jax bounds the size of folders on disks only.
    if not in_bucket(folder):
      _set("JAX_COMPILATION_CACHE_MAX_SIZE", MAX_BYTES)


def _set(variable: str, value: str | float) -> None:
  """Sets an option of jax, which reads the variable when it is imported; a config file may have imported it before."""
  os.environ[variable] = str(value)
  if "jax" in sys.modules:
    import jax

    jax.config.update(variable.lower(), None if value == "" else value)


def _is_writable(folder: pathlib.Path) -> bool:
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    return False
  return os.access(folder, os.W_OK)


def _machine() -> str:
  """A name for the machine's instruction set: programs for a CPU contain instructions that another CPU may lack."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
  return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
