"""The measured model: the model of a trained run, or of a config with fresh parameters, and of variants of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_flags

from cyb_jax import command_line
from cyb_jax.benchmarks import variants
from cyb_jax.errors import InputError

if TYPE_CHECKING:
  import ml_collections

  from cyb_jax.configs import Config


@dataclasses.dataclass(frozen=True)
class Model:
  """A measured model.

  Attributes:
    variant: the variant of the config; '': the run or the config itself.
    method: its method.
    params: the parameters.
    matmul: the precision of matrix products.
  """

  variant: str
  method: Any
  params: Any
  matmul: str


def define_flags() -> None:
  config_flags.DEFINE_config_file(
    "config", None, "A config file, experiments/NAME.py, for a model with fresh parameters; or give --workdir."
  )
  command_line.define_path("workdir", None, "A trained run, which pauses as it was trained to.")
  command_line.define_base()
  flags.DEFINE_integer("vocabulary", 0, "With --config: the vocabulary size; 0: the size of the config or preset.")


def check_flags() -> None:
  """Raises InputError unless exactly one of --workdir and --config is given, and --base with --workdir alone."""
  args = flags.FLAGS
  if bool(args.workdir) == (args.config is not None):
    raise InputError("--workdir: give either --workdir or --config")
  if args.base and not args.workdir:
    raise InputError(f"--base: {args.base!r} requires --workdir; omit it for a model with fresh parameters")


def source() -> str:
  """The run's folder or the config's file."""
  return flags.FLAGS.workdir or config_flags.get_config_filename(flags.FLAGS["config"])


def chosen() -> tuple[Any, Any, str]:
  """(method, parameters, precision of matrix products)."""
  args = flags.FLAGS
  if args.workdir:
    return _loaded(args.workdir)
  config, method, params = fresh(command_line.config_flag(), args.vocabulary or None)
  return method, params, config.precision.matmul


def chosen_variants() -> list[Model]:
  """The model of `chosen`, and those of the flag `--variant`; call `variants.define_flag` in addition.

  Raises:
    InputError: a variant is invalid, or a run has variants.
  """
  args = flags.FLAGS
  if args.workdir:
    if args.variant:
      raise InputError(f"--variant: {args.variant[0]!r} requires --config; omit it for a run")
    return [Model("", *_loaded(args.workdir))]
  source, found = command_line.config_flag(), []
  for variant in ("", *args.variant):
    with variants.named(variant):
      config, method, params = fresh(variants.applied(source, variant), args.vocabulary or None)
      found.append(Model(variant, method, params, config.precision.matmul))
  return found


def _loaded(workdir: str) -> tuple[Any, Any, str]:
  from cyb_jax.interop import pretrained

  run = pretrained.load_run(workdir, base=flags.FLAGS.base, base_option="--base")
  return run.method, run.params, run.config.precision.matmul


def fresh(source: ml_collections.ConfigDict, vocab_size: int | None) -> tuple[Config, Any, Any]:
  """(config, method, new parameters); the vocabulary size None is that of the decoder."""
  import flax.linen as nn
  import jax

  from cyb_jax.studies.resolution import resolve

  config = resolve(source)
  method = config.build_method(vocab_size)
  params = jax.jit(lambda: nn.unbox(method.init(jax.random.key(config.train.seed))))()
  return config, method, params
