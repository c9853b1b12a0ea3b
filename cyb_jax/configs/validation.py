"""Checks of a config's values that need no data: ranges of the fields, and what two fields require of each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from cyb_jax.configs.schema import Config
from cyb_jax.errors import InputError, is_seed
from cyb_jax.methods import WEIGHTS
from cyb_jax.methods.parameters import new_parameters


@dataclasses.dataclass(frozen=True)
class Rule:
  """What a field's value must be.

  Attributes:
    accepts: whether a value is valid.
    wanted: what would be accepted, after 'must be'.
  """

  accepts: Callable[[Any], bool]
  wanted: str


_AT_LEAST_1 = Rule(lambda value: value >= 1, "at least 1")
_NOT_NEGATIVE = Rule(lambda value: value >= 0, "not negative")
_POSITIVE = Rule(lambda value: value > 0, "positive")
_SHARE = Rule(lambda value: 0 <= value <= 1, "in [0, 1]")
_POSITIVE_SHARE = Rule(lambda value: 0 < value <= 1, "in (0, 1]")
_SEED = Rule(is_seed, "in [0, 2^32)")
_DECAY = Rule(lambda value: 0 <= value < 1, "in [0, 1)")


def _not_negative(zero: str) -> Rule:
  """`zero`: what the value 0 means."""
  return Rule(_NOT_NEGATIVE.accepts, f"not negative; 0 {zero}")


def _one_of(*accepted: str, wanted: str = "") -> Rule:
  return Rule(lambda value: value in accepted, wanted or f"one of {', '.join(accepted)}")


# The first rule that is broken is the one that is reported.
_DATA = {
  "sequence_length": _AT_LEAST_1,
  "batch_size": _AT_LEAST_1,
  "fraction": _POSITIVE_SHARE,
  "seed": _SEED,
}
_OPTIMIZER = {
  "learning_rate": _POSITIVE,
  "schedule": _one_of("cosine", "wsd", "constant", wanted="'cosine', 'wsd' or 'constant'"),
  "warmup_fraction": _SHARE,
  "decay_fraction": _SHARE,
  "final_fraction": _SHARE,
  "beta1": _DECAY,
  "beta2": _DECAY,
  "epsilon": _POSITIVE,
  "weight_decay": _NOT_NEGATIVE,
  "clip_norm": _not_negative("clips nothing"),
}
_TRAIN = {
  "steps": _not_negative("takes train.epochs"),
  "epochs": _not_negative("trains nothing and evaluates what training would start from"),
  "log_every": _AT_LEAST_1,
  "max_skipped": _AT_LEAST_1,
  "keep": _AT_LEAST_1,
  "collapse_warning": _POSITIVE_SHARE,
  "seed": _SEED,
  "eval_every": _NOT_NEGATIVE,
  "eval_limit": _NOT_NEGATIVE,
  "last_eval_limit": _NOT_NEGATIVE,
  "checkpoint_every": _NOT_NEGATIVE,
}
_PARALLELISM = {
  "strategy": _one_of("jit", "pmap", wanted="'jit' or 'pmap'"),
  "data": Rule(lambda value: value == -1 or value >= 1, "at least 1, or -1 for what is left"),
  "chunk_size": _not_negative("picks a size"),
  "fsdp": _AT_LEAST_1,
  "tensor": _AT_LEAST_1,
}
_PRECISION = {
  "activations": _one_of("auto", "float32", "bfloat16"),
  "matmul": _one_of("default", "high", "highest"),
}
_TUNING = {
  "weights": _one_of(*WEIGHTS, wanted="'all', 'lora' or 'new'"),
  "new_rate": _not_negative("leaves the new rows as they start"),
  "new_rows": _one_of("auto", "zero", "unused", "draws", "mean"),
}


def validate(config: Config) -> None:
  """Checks everything that is known before the data is read.

  Raises:
    InputError: one line that names the field, the value, and what would be accepted.
  """
  _check_rules(config, "data", _DATA)
  config.task_options()
  _check_mixture(config)
  _check_rules(config, "optimizer", _OPTIMIZER)
  _check_optimizer(config)
  _check_rules(config, "train", _TRAIN)
  _check_rules(config, "parallelism", _PARALLELISM)
  _check_pmap(config)
  _check_rules(config, "precision", _PRECISION)
  _check_rules(config, "tuning", _TUNING)
  _check_tuning(config)
  _check_method(config)


def _check_rules(config: Config, group: str, rules: dict[str, Rule]) -> None:
  for name, rule in rules.items():
    if not rule.accepts(getattr(getattr(config, group), name)):
      raise _invalid(config, group, name, rule.wanted)


def _invalid(config: Config, group: str, name: str, wanted: str) -> InputError:
  return InputError(f"{group}.{name}: {getattr(getattr(config, group), name)!r} must be {wanted}")


def _check_mixture(config: Config) -> None:
  config.mixture()
  for name in ("store", "options"):
    if config.data.mixture and getattr(config.data, name):
      wanted = "'' where data.mixture is given; name stores and options inside the mixture"
      raise _invalid(config, "data", name, wanted)


def _check_optimizer(config: Config) -> None:
  optimizer, batch_size = config.optimizer, config.data.batch_size
  if optimizer.schedule == "wsd" and optimizer.warmup_fraction + optimizer.decay_fraction > 1:
    wanted = f"at most 1 - warmup_fraction = {1 - optimizer.warmup_fraction:g}"
    raise _invalid(config, "optimizer", "decay_fraction", wanted)
  if optimizer.accumulate < 1 or batch_size % optimizer.accumulate:
    wanted = f"at least 1 and a divisor of data.batch_size = {batch_size}"
    raise _invalid(config, "optimizer", "accumulate", wanted)


def _check_pmap(config: Config) -> None:
  if config.parallelism.strategy != "pmap":
    return
  for name in ("fsdp", "tensor"):
    if getattr(config.parallelism, name) != 1:
      wanted = "1 under parallelism.strategy = 'pmap', which only splits the batch"
      raise _invalid(config, "parallelism", name, wanted)


def _check_tuning(config: Config) -> None:
  tuning, params = config.tuning, config.precision.params
  tuning.lora  # noqa: B018 - it checks its fields, used or not
  _check_rules(config, "precision", {"params": _one_of("float32", "bfloat16")})
  trains = config.train.steps > 0 or config.train.epochs > 0
  if params == "bfloat16" and tuning.weights == "all" and trains:
    wanted = "float32 where tuning.weights = 'all': small updates would be rounded away"
    raise _invalid(config, "precision", "params", wanted)
  if tuning.new_rows == "zero" and getattr(config.method, "pause_input", "pause") != "token+pause":
    wanted = "another of them, unless method.pause_input = 'token+pause': a pause's input would be noise alone"
    raise _invalid(config, "tuning", "new_rows", wanted)
  if tuning.weights != "all" and not config.init_from:
    raise InputError(
      f"init_from: '' with tuning.weights = {tuning.weights!r}, which leaves the decoder's weights as they start, and"
      " random ones can't be taught so; name the model to start from, or take tuning.weights = 'all'"
    )


def _check_method(config: Config) -> None:
  method = config.build_method()
  method.validate_data(None, config.data.sequence_length)
  if config.tuning.weights == "new" and not any(method.is_trained((name,)) for name in new_parameters(method.init)):
    raise InputError(
      f"tuning.weights: 'new', but method {method.name!r} with these options has no new rows; take 'lora' or 'all'"
    )
