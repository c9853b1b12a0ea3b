"""What all programs share: flags, logs, the JSON line, exit codes.

A program prints one JSON object on standard output, alone on the last line; logs go to standard error. Exit codes: 0;
1 a crash; a disk that fails, a run that diverges, a check that doesn't hold (one line, no traceback); 2 bad input, one
line and no traceback; 75 interrupted, saved, to be continued.
"""

from __future__ import annotations

import copy
import dataclasses
import logging as python_logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from cyb_jax import jsonl
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

if TYPE_CHECKING:  # imported where they are used, so that bad flags are told of at once
  from jax.sharding import Mesh

  from cyb_jax.configs import Config
  from cyb_jax.data import TokenStore
  from cyb_jax.distributed.hosts import Cluster
  from cyb_jax.runs import Run


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
  # Only orbax uses it, and raises what is logged.
  python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
  logging.get_absl_handler().addFilter(_is_ours_or_warning)
  sys.unraisablehook = _told_of_unraisable(sys.unraisablehook)
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

  def guarded(argv: Sequence[str]) -> int:
    code = 0
    try:
      if len(argv) > 1 + words:
        left = " ".join(argv[1 + words :])
        raise InputError(f"arguments: {left!r} are left over; every option is a flag, --name=value")
      result = main(argv)
    except Failed as error:
      result, code = error.result, told(error)
    except Exception as error:
      code = told(error)
      if code is None:
        raise
      return code
    if result is not None:
      sys.stderr.flush()
      sys.stdout.write(jsonl.dumps(result) + "\n")
      sys.stdout.flush()
    return code

  for name in flags.FLAGS:
    if flags.FLAGS.find_module_defining_flag(name, "").startswith("cyb_jax"):
      # `--help` shows those of the program that is run, which a console script has none of.
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
  app.run(guarded, flags_parser=_parse)


def told(error: BaseException) -> int | None:
  """Says in one line what a program ends with, and gives its exit code; None: a crash, which has a traceback."""
  if isinstance(error, InputError):
    return _complain(str(error))
  if isinstance(error, DivergedError | HostLostError | StorageError | Failed):
    _complain(str(error))
    return EXIT_CRASH
  if isinstance(error, Interrupted):
    logging.info("%s", error)
    return EXIT_INTERRUPTED
  if isinstance(error, BrokenPipeError):
    # Whoever read has gone, `head` for instance; what is left in the buffer would be tried again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_CRASH
  return None


def define_host_flags() -> None:
  """The flags of a program that several hosts run as one; see `on_hosts`."""
  flags.DEFINE_string(
    "coordinator", "", "Where hosts meet: HOST:PORT of process 0; auto: what jax finds by itself (TPU pods, Slurm, Open"
    " MPI, Kubernetes); none: this process is alone. Not given: auto on TPU VMs, else none."
  )  # fmt: skip
  flags.DEFINE_integer("num_processes", -1, "With --coordinator=HOST:PORT: how many processes there are.")
  flags.DEFINE_integer("process_id", -1, "With --coordinator=HOST:PORT: which of them this is, from 0.")
  flags.DEFINE_integer("join_timeout", 300, "Seconds that hosts wait for each other at the start.")
  flags.DEFINE_integer("heartbeat", 60, "Seconds after which a host that says nothing counts as lost.")


def on_hosts(main: Callable[[Cluster], dict[str, Any] | None]) -> dict[str, Any] | None:
  """Runs a program's work on all hosts that the flags name, and sees that they end together.

  Args:
    main: takes the cluster; nothing of jax was used before.

  Returns:
    What `main` has returned, on host 0; None on the others.
  """
  from cyb_jax.distributed import hosts

  args = flags.FLAGS
  names = [field.name for field in dataclasses.fields(hosts.Meeting)]
  cluster = hosts.join(hosts.Meeting(**{name: args[name].value for name in names}))
  if cluster.index:
    logging.set_verbosity(logging.WARNING)  # of what they all do, host 0 tells
  try:
    with hosts.losses_told(cluster):
      result = main(cluster)
  except Interrupted:
    cluster.leave()
    raise
  except BaseException as error:
    if cluster.count > 1:
      code = told(error)
      if code is None:
        traceback.print_exc()
      cluster.abandon(str(error) or repr(error), EXIT_CRASH if code is None else code)
    raise
  cluster.leave()
  return result if cluster.index == 0 else None


def config_flag() -> Any:
  """The ConfigDict of the flag `--config`.

  Raises:
    InputError: the flag isn't given, or its file isn't there.
  """
  config = flags.FLAGS.config
  if config is None:
    raise InputError("--config: not given; experiments/README.md lists the configs")
  try:
    config.to_dict()
  except OSError as error:  # ml_collections keeps it back until the config is used
    raise InputError(f"--config: {_last_line(error)}") from None
  return config


def override(config: ml_collections.ConfigDict, fields: Sequence[str]) -> ml_collections.ConfigDict:
  """A copy of a ConfigDict with each 'a.b=value' applied as the flag `--config.a.b=value` would be.

  Raises:
    InputError: no such field, or a value of another type.
  """
  values = flags.FlagValues()
  words = ["override", *(f"--config.{field}" for field in fields)]
  try:
    config_flags.DEFINE_config_dict("config", copy.deepcopy(config), flag_values=values, sys_argv=words)
    values(words)
    return values.config
  except Exception as error:  # whatever the flags make of it, it is the input
    raise InputError(_said_plainly(error, words)) from None


def shows_colour() -> bool:
  """Whether standard output is a terminal whose user hasn't asked for no colour (https://no-color.org)."""
  return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def show(text: str) -> None:
  """Writes text to standard output at once, with what its encoding hasn't got replaced."""
  encoding = sys.stdout.encoding or "utf-8"
  sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
  sys.stdout.flush()


def required_flag(name: str, wanted: str) -> str:
  """The value of a flag that must be given."""
  value = flags.FLAGS[name].value
  if not value:
    raise InputError(f"--{name}: not given; {wanted}")
  return value


def checkpoint_flag() -> int | str:
  """The flag `--checkpoint`: 'last', 'best', or a step."""
  value = flags.FLAGS.checkpoint
  if value in ("last", "best"):
    return value
  if not value.isdecimal():
    raise InputError(f"--checkpoint: {value!r} is none of 'last', 'best' and a step's number")
  return int(value)


def define_run_flags() -> None:
  """The flags that name a run."""
  flags.DEFINE_string("workdir", None, "The run's folder.")
  flags.DEFINE_string("checkpoint", "last", "last, best, or a step.")


def define_model_flags() -> None:
  """The flags of a program that reads with a trained run, or with what one would start from; see `load_model`."""
  define_run_flags()
  flags.DEFINE_string(
    "init_from", "", "In place of --workdir, what a run would start from: converted weights, a Hugging Face folder, a"
    " GGUF file. Nothing is written there."
  )  # fmt: skip
  flags.DEFINE_string("tokenizer", "", "Of --init_from, where it holds none, or in place of its own.")
  flags.DEFINE_integer(
    "pauses", None, "Pauses between a prompt and what is said, of methods that have such; not given: method.pauses."
  )  # fmt: skip


def load_model(mesh: Mesh | None = None, config: Config | None = None) -> Run:
  """The model of `--workdir` or `--init_from`.

  Args:
    mesh: where the parameters go; None: the default device.
    config: of a run that would start from `--init_from`; None: the method is that of the weights themselves.

  Raises:
    InputError: neither flag, both, or nothing that can be read.
  """
  args = flags.FLAGS
  if bool(args.workdir) == bool(args.init_from):
    found = "both are given" if args.workdir else "not given"
    raise InputError(f"--workdir: {found}; name the run's folder, or --init_from, weights that a run could start from")
  checkpoint = checkpoint_flag()
  from cyb_jax import runs
  from cyb_jax.interop import pretrained

  if args.workdir:
    if args.tokenizer:
      raise InputError(f"--tokenizer: {args.tokenizer!r} goes with --init_from; a run has its own")
    run = runs.load(args.workdir, checkpoint, mesh)
  else:
    found = pretrained.open_pretrained(args.init_from, checkpoint=checkpoint, tokenizer=args.tokenizer)
    run = pretrained.load(found, config, mesh=mesh)
  return run if args.pauses is None else dataclasses.replace(run, method=run.method.with_prompt_pauses(args.pauses))


def weights_flag(name: str) -> tuple[float, ...] | None:
  """The numbers of a flag such as `--omega=1:1:1:1`; None where it is ''."""
  value = flags.FLAGS[name].value
  try:
    return tuple(float(x) for x in value.split(":")) if value else None
  except ValueError:
    raise InputError(f"--{name}: {value!r} aren't numbers with colons between them, such as 1:1:1:1") from None


def define_reading_flags() -> None:
  """The flags of a program that reads a split."""
  flags.DEFINE_string("split", "validation", "validation, test or train.")
  flags.DEFINE_integer("limit", 0, "At most so many windows; 0: the split whole.")
  flags.DEFINE_integer("batch_size", 0, "Windows at a time; 0: as in training.")
  flags.DEFINE_string("store", "", "The token store, where it has moved since the training.")


def check_not_negative(*names: str) -> None:
  """Raises InputError for the first of these flags that is negative."""
  for name in names:
    value = flags.FLAGS[name].value
    if value < 0:
      raise InputError(f"--{name}: {value} is negative")


def reading_mesh() -> Mesh:
  """All devices share the batch: parameters that trained sharded need not be so to be read."""
  from cyb_jax.configs import ParallelismConfig
  from cyb_jax.partitioning.mesh import make_mesh

  return make_mesh(ParallelismConfig())


def open_store(config: Config, meta: dict[str, Any]) -> TokenStore:
  """The token store that a run was trained on, from where it lay or from the flag `--store`.

  Args:
    config: of the run.
    meta: of its checkpoint.
  """
  from cyb_jax import runs, training

  given = flags.FLAGS.store
  if given:
    if not os.path.exists(given):
      raise InputError(f"--store: {given} is not there")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, store=given))
  store = runs.open_recorded_store(meta, config.data.store) or training.open_store(config)
  runs.check_fingerprint(store, meta)
  return store


def rows_at_once(config: Config, mesh: Mesh) -> int:
  """The batch's size by the flag `--batch_size`, rounded up to what the devices share evenly."""
  from cyb_jax.partitioning.mesh import data_shards

  shards = data_shards(mesh)
  # Rows that fill a batch up have weight 0, so that any size will do.
  return -(-(flags.FLAGS.batch_size or config.evaluation_rows) // shards) * shards


def _last_line(error: Exception) -> str:
  return str(error).strip().splitlines()[-1].strip()


def _with_installed_config(argv: Sequence[str]) -> list[str]:
  """`--config=experiments/NAME.py` from elsewhere means the copy that was installed, or the checkout's."""
  package = pathlib.Path(__file__).parents[1]
  words = list(argv)
  for i, word in enumerate(words):
    flag, equals, value = word.partition("=")
    if not equals and i and words[i - 1] == "--config":
      flag, value = "--config", word
    path, colon, rest = value.partition(":")
    if flag == "--config" and path.startswith("experiments/") and not os.path.exists(path):
      for installed in (package / path, package.parent / path):
        if installed.exists():
          words[i] = f"{flag}=" * bool(equals) + f"{installed}{colon}{rest}"
          break
  return words


def _is_ours_or_warning(record: python_logging.LogRecord) -> bool:
  # By the package's own folder: a checkout may well be called cyb_jax and hold a venv.
  ours = str(pathlib.Path(__file__).parents[1]) + os.sep
  # The program itself may be a script of the experiments.
  if record.pathname.startswith(ours) or os.path.abspath(record.pathname) == os.path.abspath(sys.argv[0]):
    return True
  # What orbax logs of a save that fails, a traceback in each of its threads, is raised too.
  raised = record.exc_info is not None and f"{os.sep}orbax{os.sep}" in record.pathname
  return record.levelno >= python_logging.WARNING and not raised


def _told_of_unraisable(told: Callable[[Any], None]) -> Callable[[Any], None]:
  """A hook for errors that nobody can catch, without those of orbax's own loop when a save has failed."""

  def hook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      told(unraisable)

  return hook


def _parse(argv: Sequence[str]) -> list[str]:
  # A config file runs while flags are parsed, so that anything may come up here. Whatever it is, it is the input.
  try:
    return flags.FLAGS(_with_installed_config(argv))
  except Exception as error:
    sys.exit(_complain(_said_plainly(error, argv)))


def _said_plainly(error: Exception, argv: Sequence[str]) -> str:
  """What ml_collections wraps: an override of a field that isn't there, a config file that isn't there."""
  text = str(error.args[0] if error.args else error) or repr(error)
  field = re.search(r"\w+", text)
  if isinstance(error, KeyError | AttributeError) and field:
    for word in argv:
      flag = word.partition("=")[0]
      if flag.startswith("--config.") and field[0] in flag.split("."):
        close = re.search(r'Did you mean "(\w+)"', text)
        return f"{flag}: unknown field" + (f"; did you mean {close[1]}?" if close else "; the config has no such field")
  if "Failed loading config file" in text:
    return f"--config: {_last_line(error)}"
  return text


def _complain(message: str) -> int:
  lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
  # Errors of a config file arrive as a formatted traceback, whose last line is the error itself.
  line = lines[-1] if lines and "Traceback" in message else " ".join(lines)
  for prefix in ("cyb_jax.errors.InputError: ", "InputError: "):
    line = line.removeprefix(prefix)
  sys.stderr.write(f"error: {line}\n")
  return EXIT_BAD_INPUT
