"""How all programs start and end: flags, logs, the JSON line, exit codes.

A program prints one JSON object on standard output, alone on the last line; logs go to standard error. Exit codes: 0;
1 a crash; a disk that fails, a run that diverges, a check that doesn't hold (one line, no traceback); 2 bad input, one
line and no traceback; 75 interrupted, saved, to be continued.
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
  """Runs a program: parses the flags, calls `main`, prints the JSON object that it returns, exits.

  Args:
    main: takes argv without the flags, returns the object to print, or None. The docstring of its module is the
      description that `--help` prints.
    parts: where the first argument names a part of the program: the functions that define the flags of each part.
  """
  _set_up_logging()
  parts = parts or {}
  words = 1 if parts else 0
  # Before the flags are parsed, since the name of the part decides which there are.
  for name in [word for word in sys.argv[1:] if word in parts][:1]:
    parts[name]()
  define_program_flags(described(main, sys.argv, parts), program_name(main), parts)

  def guarded(argv: Sequence[str]) -> int:
    code = 0
    try:
      if len(argv) > 1 + words:
        left = " ".join(argv[1 + words :])
        raise InputError(f"arguments: {left!r} are left over; every option is a flag, --name=value")
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


def report_error(error: BaseException) -> int | None:
  """Writes the one line that a program ends with to standard error.

  Returns:
    The exit code; None: a crash, which has a traceback.
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
    # The reader has closed the pipe, as `head` does; what is left in the buffer would be written again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_CRASH
  return None


def _set_up_logging() -> None:
  logging.set_verbosity(logging.INFO)
  logging.set_stderrthreshold(logging.INFO)
  logging.use_absl_handler()
  # Other packages log warnings only; orbax would log forty lines a checkpoint.
  python_logging.getLogger("jax").setLevel(python_logging.WARNING)
  # Only orbax uses asyncio, and it raises what it logs.
  python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
  logging.get_absl_handler().addFilter(_is_ours_or_warning)
  sys.unraisablehook = _unraisable_hook(sys.unraisablehook)
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _is_ours_or_warning(record: python_logging.LogRecord) -> bool:
  # The package's own folder, not its name: a checkout may be called cyb_jax and contain a virtual environment.
  ours = str(pathlib.Path(__file__).parents[1]) + os.sep
  # The program itself may be a script of the experiments.
  if record.pathname.startswith(ours) or os.path.abspath(record.pathname) == os.path.abspath(sys.argv[0]):
    return True
  # When a save fails, orbax logs a traceback in each of its threads and raises the error too.
  raised = record.exc_info is not None and f"{os.sep}orbax{os.sep}" in record.pathname
  return record.levelno >= python_logging.WARNING and not raised


def _unraisable_hook(report: Callable[[Any], None]) -> Callable[[Any], None]:
  """A hook for exceptions that can't be raised; it ignores those of orbax's event loop after a failed save."""

  def hook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      report(unraisable)

  return hook


def _parse(argv: Sequence[str]) -> list[str]:
  # A config file is executed while flags are parsed, so any exception may occur here; its cause is the input.
  try:
    return flags.FLAGS(command_line.with_optional_values(command_line.with_installed_config(argv)))
  except Exception as error:
    sys.exit(_complain(command_line.explain(error, argv)))


def _complain(message: str) -> int:
  lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
  # Errors of a config file arrive as a formatted traceback, whose last line is the error itself.
  line = lines[-1] if lines and "Traceback" in message else " ".join(lines)
  for prefix in ("cyb_jax.errors.InputError: ", "InputError: "):
    line = line.removeprefix(prefix)
  sys.stderr.write(f"error: {line}\n")
  return EXIT_BAD_INPUT
