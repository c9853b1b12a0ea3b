"""What all programs share: flags, logs, the JSON line, exit codes.

A program prints one JSON object on standard output, alone on the last line; logs go to standard error. Exit codes: 0;
1 a crash; 2 bad input, one line and no traceback; 75 interrupted, saved, to be continued.
"""

from __future__ import annotations

import logging as python_logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from cyb_jax import jsonl
from cyb_jax.errors import InputError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75


class Interrupted(Exception):
  """Stopped by a signal, after everything was saved: the same command continues."""


def launch(main: Callable[[Sequence[str]], dict[str, Any] | None], *, words: int = 0) -> None:
  """Runs a program: parses flags, calls `main` with what is left, prints what it returns, exits.

  Args:
    main: takes argv, returns the object to print, or None.
    words: how many arguments without a flag it takes.
  """
  logging.set_verbosity(logging.INFO)
  logging.set_stderrthreshold(logging.INFO)
  logging.use_absl_handler()
  # Of what other packages say, warnings are enough; orbax alone logs forty lines a checkpoint.
  python_logging.getLogger("jax").setLevel(python_logging.WARNING)
  logging.get_absl_handler().addFilter(_is_ours_or_warning)
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

  def guarded(argv: Sequence[str]) -> int:
    try:
      if len(argv) > 1 + words:
        left = " ".join(argv[1 + words :])
        raise InputError(f"arguments: {left!r} are left over; every option is a flag, --name=value")
      result = main(argv)
    except InputError as error:
      return _complain(str(error))
    except Interrupted as error:
      logging.info("%s", error)
      return EXIT_INTERRUPTED
    if result is not None:
      sys.stderr.flush()
      sys.stdout.write(jsonl.dumps(result) + "\n")
      sys.stdout.flush()
    return 0

  app.run(guarded, flags_parser=_parse)


def config_of(flag: flags.FlagHolder) -> Any:
  """The ConfigDict of a `--config` flag.

  Raises:
    InputError: the flag isn't given, or its file isn't there.
  """
  if flag.value is None:
    raise InputError(f"--{flag.name}: not given; experiments/README.md lists the configs")
  try:
    flag.value.to_dict()
  except OSError as error:  # ml_collections keeps it back until the config is used
    raise InputError(f"--{flag.name}: {str(error).splitlines()[-1].strip()}") from None
  return flag.value


def _with_installed_config(argument: str) -> str:
  """`--config=experiments/NAME.py` outside a checkout means the copy that was installed."""
  flag, _, value = argument.partition("=")
  path, colon, rest = value.partition(":")
  installed = pathlib.Path(__file__).parent / path
  if flag == "--config" and path.startswith("experiments/") and not os.path.exists(path) and installed.exists():
    return f"{flag}={installed}{colon}{rest}"
  return argument


def _is_ours_or_warning(record: python_logging.LogRecord) -> bool:
  # By the package's own folder: a checkout may well be called cyb_jax and hold a venv.
  ours = str(pathlib.Path(__file__).parent) + os.sep
  if record.pathname.startswith(ours):
    return True
  # Orbax warns of every checkpoint that no validation was made for, which is as configured.
  return record.levelno >= python_logging.WARNING and "tracked_metric" not in str(record.msg)


def _parse(argv: Sequence[str]) -> list[str]:
  # A config file runs while flags are parsed, so that anything may come up here. Whatever it is, it is the input.
  try:
    return flags.FLAGS([_with_installed_config(argument) for argument in argv])
  except (flags.Error, InputError, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
    sys.exit(_complain(str(error)))


def _complain(message: str) -> int:
  lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
  # Errors of a config file arrive as a formatted traceback, whose last line is the error itself.
  line = lines[-1] if lines and "Traceback" in message else " ".join(lines)
  for prefix in ("cyb_jax.errors.InputError: ", "InputError: "):
    line = line.removeprefix(prefix)
  sys.stderr.write(f"error: {line}\n")
  return EXIT_BAD_INPUT
