"""The model that a program uses: a trained run, or pretrained weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import flags

from cyb_jax import command_line
from cyb_jax.cli import flag_values
from cyb_jax.errors import InputError

if TYPE_CHECKING:  # imported on use, so that errors in flags are reported quickly
  from jax.sharding import Mesh

  from cyb_jax.configs import Config
  from cyb_jax.distributed.cluster import Cluster
  from cyb_jax.interop.pretrained import Pretrained
  from cyb_jax.runs import Run


def define_run_flags(*, several_bases: bool = False) -> None:
  """Defines the flags that specify a run; `several_bases`: see `command_line.define_base`."""
  command_line.define_path("workdir", None, "The run's folder.")
  flags.DEFINE_string("checkpoint", "last", "The checkpoint of the run: last, best, or a step.")
  command_line.define_base(several=several_bases)


def define_model_flags() -> None:
  """Defines the flags of a program that takes a trained run or pretrained weights; see `load_model`."""
  define_run_flags()
  command_line.define_path(
    "init_from", "", "Instead of --workdir, pretrained weights: converted weights, a Hugging Face folder, or a GGUF"
    " file. No files are written there."
  )  # fmt: skip
  flags.DEFINE_string("tokenizer", "", "A tokenizer that replaces the tokenizer of --init_from; '': no replacement.")
  flags.DEFINE_integer(
    "pauses", None, "The number of pauses between a prompt and its continuation, for methods that insert them there;"
    " not given: method.pauses."
  )  # fmt: skip


def load_model(mesh: Mesh | None = None, config: Config | None = None, cluster: Cluster | None = None) -> Run:
  """The model of `--workdir` or `--init_from`; see `open_model`."""
  return open_model(config, cluster)(mesh)


def open_model(config: Config | None = None, cluster: Cluster | None = None) -> Callable[[Mesh | None], Run]:
  """Checks that `--workdir` or `--init_from` contains a model, without reading its parameters.

  Args:
    config: the config of a run that starts from `--init_from`; None means the method of the weights themselves.
    cluster: the hosts that load a run together; None means that this process is alone.

  Returns:
    A function that loads the model onto a mesh; for None, onto the default device.

  Raises:
    InputError: neither or both of the flags are given, or the model can't be read.
  """
  args = flags.FLAGS
  if bool(args.workdir) == bool(args.init_from):
    found = "--init_from is also given" if args.workdir else "not given"
    raise InputError(f"--workdir: {found}; give the run's folder as --workdir, or pretrained weights as --init_from")
  checkpoint = flag_values.checkpoint_flag()
  from cyb_jax import configs
  from cyb_jax.checkpointing.workdir import read_config
  from cyb_jax.distributed.cluster import ALONE
  from cyb_jax.generation.abilities import with_prompt_pauses
  from cyb_jax.interop import pretrained

  if args.workdir:
    if args.tokenizer:
      raise InputError(f"--tokenizer: {args.tokenizer!r} requires --init_from; omit it for a run")
    configs.freeze(configs.migrated(read_config(args.workdir)))
    cluster = cluster or ALONE
    load = functools.partial(
      pretrained.load_run, args.workdir, checkpoint, base=args.base, base_option="--base", cluster=cluster
    )
  else:
    found = pretrained.open_pretrained(
      args.init_from, checkpoint=checkpoint, tokenizer=args.tokenizer, base=args.base, base_option="--base"
    )
    load = functools.partial(_load_pretrained, found, config)

  def loaded(mesh: Mesh | None) -> Run:
    run = load(mesh=mesh)
    return run if args.pauses is None else dataclasses.replace(run, method=with_prompt_pauses(run.method, args.pauses))

  return loaded


def _load_pretrained(found: Pretrained, config: Config | None, mesh: Mesh | None) -> Run:
  from cyb_jax.interop import pretrained

  return pretrained.load(found, config, mesh=mesh)
