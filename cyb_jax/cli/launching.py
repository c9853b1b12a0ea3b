"""The start and the end of all programs: flags, logs, the JSON line, exit codes.

A program prints one JSON object as the last line of standard output; logs go to standard error. Exit codes: 0 success;
1 a crash, or, with one line and no traceback, a failing disk, a diverging run or a failed check; 2 bad input, with one
line and no traceback; 75 interrupted and saved, so the same command continues.
"""

from __future__ import annotations

import logging as python_logging
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags, logging

from cyb_jax import command_line, jsonl
from cyb_jax.cli import compilation_cache, huge_pages
from cyb_jax.cli.program_flags import define_program_flags, described, program_name
from cyb_jax.errors import (
  EXIT_BAD_INPUT,
  EXIT_CRASH,
  EXIT_INTERRUPTED,
  DivergedError,
  Failed,
  HostLostError,
  InputError,
  Interrupted,
  StorageError,
)


def launch(
  main: Callable[[Sequence[str]], dict[str, Any] | None], *, parts: Mapping[str, Callable[[], None]] | None = None
) -> None:
  """Runs a program: parses the flags, calls `main`, prints the JSON object that it returns, and exits.

  Args:
    main: a function that takes argv without the flags, and returns the object to print, or None. `--help` prints the
      docstring of its module.
    parts: for a program whose first argument names a part of it: the functions that define the flags of each part.
  """
  if main.__module__ == "__main__" or _is_console_script():
    # Before anything large is imported, because the imports of this process are lost.
    huge_pages.restart_with_huge_pages(sys.argv)
  _set_up_logging()
  parts = parts or {}
  words = 1 if parts else 0
  # The flags depend on the part, so its flags are defined before the command line is parsed.
  for name in [word for word in sys.argv[1:] if word in parts][:1]:
    parts[name]()
  compilation_cache.define_cache_flag()
  define_program_flags(described(main, sys.argv, parts), program_name(main), parts)

  def guarded(argv: Sequence[str]) -> int:
    code = 0
    try:
      if len(argv) > 1 + words:
        left = " ".join(argv[1 + words :])
        raise InputError(f"arguments: {left!r} is unexpected; give options as flags, --name=value")
      compilation_cache.enable(flags.FLAGS.compilation_cache)
      result = main(argv)
    except Failed as error:
      result, code = error.result, report_error(error)
    except Exception as error:
      code = report_error(error)
      if code is None:
        raise
      return code
    if result is not None:
      sys.stderr.flush()
      sys.stdout.write(jsonl.dumps(result) + "\n")
      sys.stdout.flush()
    return code

  app.run(guarded, flags_parser=_parse)


def _is_console_script() -> bool:
  """Whether this process was started as a program, and not by a program that calls it."""
  return pathlib.PurePath(*sys.orig_argv[1:2]).name.startswith("cyb-")


def report_error(error: BaseException) -> int | None:
  """Writes the final line of a failed program to standard error.

  Returns:
    The exit code; None for a crash, which has a traceback.
  """
  if isinstance(error, InputError):
    return _complain(str(error))
  if isinstance(error, DivergedError | HostLostError | StorageError | Failed):
    _complain(str(error))
    return EXIT_CRASH
  if isinstance(error, Interrupted):
    logging.info("%s", error)
    return EXIT_INTERRUPTED
  if isinstance(error, BrokenPipeError):
    # The reader has closed the pipe, as `head` does. Standard output is redirected, because Python would write the rest
    # of its buffer to the pipe at exit and raise again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_CRASH
  return None


def _set_up_logging() -> None:
  logging.set_verbosity(logging.INFO)
  logging.set_stderrthreshold(logging.INFO)
  logging.use_absl_handler()
  # Other packages may log only warnings; orbax would log forty lines per checkpoint.
  python_logging.getLogger("jax").setLevel(python_logging.WARNING)
  # Only orbax uses asyncio, and it also raises the errors that it logs.
  python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
  logging.get_absl_handler().addFilter(_is_ours_or_warning)
  sys.unraisablehook = _unraisable_hook(sys.unraisablehook)
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _is_ours_or_warning(record: python_logging.LogRecord) -> bool:
  # The full path of the package is compared, because a checkout named cyb_jax may contain a virtual environment.
  ours = str(pathlib.Path(__file__).parents[1]) + os.sep
  # The program itself may be a script of the experiments.
  if record.pathname.startswith(ours) or os.path.abspath(record.pathname) == os.path.abspath(sys.argv[0]):
    return True
  # When a save fails, orbax logs a traceback in each of its threads in addition to raising the error.
  raised = record.exc_info is not None and f"{os.sep}orbax{os.sep}" in record.pathname
  return record.levelno >= python_logging.WARNING and not raised


def _unraisable_hook(report: Callable[[Any], None]) -> Callable[[Any], None]:
  """A hook for unraisable exceptions that ignores the exceptions of orbax's event loop after a failed save."""

  def hook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      report(unraisable)

  return hook


def _parse(argv: Sequence[str]) -> list[str]:
  # A config file is executed while flags are parsed, so any exception can occur here; it is always caused by the input.
  try:
    return flags.FLAGS(command_line.with_optional_values(command_line.with_installed_config(argv)))
  except Exception as error:
    sys.exit(_complain(command_line.explain(error, argv)))


def _complain(message: str) -> int:
  lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
  # Errors in a config file have a formatted traceback as their message; its last line is the error itself.
  line = lines[-1] if lines and "Traceback" in message else " ".join(lines)
  for prefix in ("cyb_jax.errors.InputError: ", "InputError: "):
    line = line.removeprefix(prefix)
  sys.stderr.write(f"error: {line}\n")
  return EXIT_BAD_INPUT
