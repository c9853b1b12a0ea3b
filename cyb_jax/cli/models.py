"""The model that a program uses: that of a trained run, or of weights that a run could start from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import flags

from cyb_jax import command_line
from cyb_jax.cli import flag_values
from cyb_jax.errors import InputError

if TYPE_CHECKING:  # imported where they are used, so that errors of flags are reported at once
  from jax.sharding import Mesh

  from cyb_jax.configs import Config
  from cyb_jax.interop.pretrained import Pretrained
  from cyb_jax.runs import Run


def define_run_flags() -> None:
  """The flags that name a run."""
  command_line.define_path("workdir", None, "The run's folder.")
  flags.DEFINE_string("checkpoint", "last", "The checkpoint of the run: last, best, or a step.")


def define_model_flags() -> None:
  """The flags of a program that takes a trained run, or weights that a run could start from; see `load_model`."""
  define_run_flags()
  command_line.define_path(
    "init_from", "", "In place of --workdir, weights that a run could start from: converted weights, a Hugging Face"
    " folder, a GGUF file. Nothing is written there."
  )  # fmt: skip
  flags.DEFINE_string("tokenizer", "", "The tokenizer of --init_from, where it contains none or another one is wanted.")
  flags.DEFINE_integer(
    "pauses", None, "Pauses between a prompt and its continuation, of methods that have them; not given: method.pauses."
  )  # fmt: skip


def load_model(mesh: Mesh | None = None, config: Config | None = None) -> Run:
  """The model of `--workdir` or `--init_from`; see `open_model`."""
  return open_model(config)(mesh)


def open_model(config: Config | None = None) -> Callable[[Mesh | None], Run]:
  """Checks that there is a model at `--workdir` or `--init_from`, without reading its parameters.

  Args:
    config: of a run that would start from `--init_from`; None: the method is that of the weights themselves.

  Returns:
    A function that loads the model; it takes the mesh where the parameters go, None: the default device.

  Raises:
    InputError: neither flag, both, or nothing that can be read.
  """
  args = flags.FLAGS
  if bool(args.workdir) == bool(args.init_from):
    found = "both are given" if args.workdir else "not given"
    raise InputError(f"--workdir: {found}; name the run's folder, or --init_from, weights that a run could start from")
  checkpoint = flag_values.checkpoint_flag()
  from cyb_jax import configs, runs
  from cyb_jax.checkpointing.workdir import read_config
  from cyb_jax.generation.abilities import with_prompt_pauses
  from cyb_jax.interop import pretrained

  if args.workdir:
    if args.tokenizer:
      raise InputError(f"--tokenizer: {args.tokenizer!r} goes with --init_from; a run has its own")
    configs.freeze(configs.migrated(read_config(args.workdir)))
    load = functools.partial(runs.load, args.workdir, checkpoint)
  else:
    found = pretrained.open_pretrained(args.init_from, checkpoint=checkpoint, tokenizer=args.tokenizer)
    load = functools.partial(_load_pretrained, found, config)

  def loaded(mesh: Mesh | None) -> Run:
    run = load(mesh=mesh)
    return run if args.pauses is None else dataclasses.replace(run, method=with_prompt_pauses(run.method, args.pauses))

  return loaded


def _load_pretrained(found: Pretrained, config: Config | None, mesh: Mesh | None) -> Run:
  from cyb_jax.interop import pretrained

  return pretrained.load(found, config, mesh=mesh)
