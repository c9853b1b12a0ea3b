"""The start and the end of all programs: flags, logs, the JSON line, exit codes.

A program prints one JSON object as the last line of standard output; logs go to standard error. Exit codes: 0 success;
1 a crash, or, with one line and no traceback, a failing disk, a diverging run or a failed check; 2 bad input, with one
line and no traceback; 75 a signal has ended the program, and the last line of the log says whether the same command
continues or starts again.

SIGTERM and SIGINT are handled here for all programs. The first signal raises Interrupted in the main thread, so the
program removes what it has only partly written. If the main thread compiles a program, which no signal interrupts, the
process ends after two seconds; a second signal ends it at once. Files are written atomically, so nothing is damaged.
Training has its own context, `signals.StopSignals`, because it first saves.
"""

from __future__ import annotations

import logging as python_logging
import os
import pathlib
import signal
import sys
import warnings
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
from cyb_jax.signals import STOPPING, StopSignals, end_process

# What a signal means for a program that leaves nothing to continue.
STARTS_AGAIN = "ended; the same command starts again"


def launch(
  main: Callable[[Sequence[str]], dict[str, Any] | None],
  *,
  interrupted: str = STARTS_AGAIN,
  parts: Mapping[str, Callable[[], None]] | None = None,
) -> None:
  """Runs a program: parses the flags, calls `main`, prints the JSON object that it returns, and exits.

  Args:
    main: a function that takes argv without the flags, and returns the object to print, or None. `--help` prints the
      docstring of its module.
    interrupted: what a signal means: that the program has ended, and what the same command does.
    parts: for a program whose first argument names a part of it: the functions that define the flags of each part.
  """
  if main.__module__ == "__main__" or _is_console_script():
    # Before anything large is imported, because the imports of this process are lost.
    huge_pages.restart_with_huge_pages(sys.argv)
  _set_up_logging()
  for number in STOPPING:  # the second signal of a kind
    signal.signal(number, lambda number, _: end_process(f"signal {number} again: ended without cleaning up"))
  with StopSignals(interrupted, "the result is complete, so it is printed", end_process) as signals:
    signals.at_once = True
    try:
      _run(main, signals, parts or {})
    except Interrupted as error:
      if signals.received:
        end_process(str(error))
      logging.info("%s", error)  # a training that has saved, or a study whose run was interrupted
      sys.exit(EXIT_INTERRUPTED)


def _run(
  main: Callable[[Sequence[str]], dict[str, Any] | None],
  signals: StopSignals,
  parts: Mapping[str, Callable[[], None]],
) -> None:
  """Runs a program in the context of its signals."""
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
    signals.at_once = False
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
  # When a save fails at its start, orbax leaves coroutines that it has not started yet.
  warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
  warnings.showwarning = _log_warning
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


def _log_warning(
  message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
  """Python's warnings, in one line of the log. By default a warning is followed by the line of code that caused it."""
  del file, line
  logging.warning("%s: %s (%s, line %d)", category.__name__, " ".join(str(message).split()), filename, lineno)


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
