"""Checks of a config's values that need no data: ranges of fields, and combinations of fields."""

from __future__ import annotations

from cyb_jax.configs.schema import Config
from cyb_jax.decoder.config import LORA_RULES
from cyb_jax.decoder.quantization import SCHEMES
from cyb_jax.errors import InputError
from cyb_jax.field_rules import (
  AT_LEAST_1,
  DECAY,
  NOT_NEGATIVE,
  POSITIVE,
  POSITIVE_SHARE,
  SEED,
  SHARE,
  SWITCH,
  Rule,
  check_fields,
  checked_later,
  not_negative,
  one_of,
)
from cyb_jax.methods import WEIGHTS
from cyb_jax.methods.parameters import new_parameters

# Only the first violated rule is reported.
RULES: dict[str, dict[str, Rule]] = {
  "data": {
    "task": checked_later("the name of a task, which cyb-prepare --help lists, or seqio:NAME"),
    "tokenizer": checked_later("sentencepiece:SIZE, bytes, a path, or '' for the tokenizer of init_from"),
    "store": checked_later("a folder, or '' for a folder in the user's cache"),
    "options": checked_later("key=value,key=value, or '' for none"),
    "mixture": checked_later("SOURCE:WEIGHT,SOURCE:WEIGHT, or '' for only data.task"),
    "sequence_length": AT_LEAST_1,
    "batch_size": AT_LEAST_1,
    "document_mask": SWITCH,
    "fraction": POSITIVE_SHARE,
    "seed": SEED,
  },
  "optimizer": {
    "learning_rate": POSITIVE,
    "schedule": one_of("cosine", "wsd", "constant", wanted="'cosine', 'wsd' or 'constant'"),
    "warmup_fraction": SHARE,
    "decay_fraction": SHARE,
    "final_fraction": SHARE,
    "beta1": DECAY,
    "beta2": DECAY,
    "epsilon": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "clip_norm": not_negative("means no clipping"),
    "rate_over_width": SWITCH,
    "accumulate": Rule(AT_LEAST_1.accepts, "at least 1 and a divisor of data.batch_size"),
  },
  "train": {
    "steps": not_negative("means train.epochs"),
    "epochs": not_negative("means that the initial parameters are evaluated without training"),
    "log_every": AT_LEAST_1,
    "max_skipped": AT_LEAST_1,
    "keep": AT_LEAST_1,
    "trackers": checked_later("some of tensorboard, wandb, trackio, mlflow, with commas between them, or '' for none"),
    "collapse_warning": POSITIVE_SHARE,
    "seed": SEED,
    "eval_every": NOT_NEGATIVE,
    "eval_limit": NOT_NEGATIVE,
    "last_eval_limit": NOT_NEGATIVE,
    "checkpoint_every": NOT_NEGATIVE,
  },
  "parallelism": {
    "strategy": one_of("jit", "pmap", wanted="'jit' or 'pmap'"),
    "data": Rule(lambda value: value == -1 or value >= 1, "at least 1, or -1 for the remaining devices"),
    "chunk_size": not_negative("means automatic"),
    "fsdp": AT_LEAST_1,
    "tensor": AT_LEAST_1,
  },
  "precision": {
    "activations": one_of("auto", "float32", "bfloat16"),
    "matmul": one_of("default", "high", "highest"),
    "params": one_of("float32", "bfloat16", *SCHEMES),
  },
  "tuning": {
    **{name: checked_later(rule.wanted) for name, rule in LORA_RULES.items()},  # LoraConfig checks them
    "weights": one_of(*WEIGHTS, wanted="'all', 'lora' or 'new'"),
    "new_rate": not_negative("means that the new rows are not trained"),
    "new_rows": one_of("auto", "zero", "unused", "draws", "mean"),
  },
}


def validate(config: Config) -> None:
  """Checks everything that can be checked before the data is read.

  Raises:
    InputError: a value is invalid; the message names the field, the value, and the accepted values.
  """
  for group, rules in RULES.items():
    check_fields(group, getattr(config, group), rules)
  config.task_options()
  _check_mixture(config)
  _check_optimizer(config)
  _check_pmap(config)
  _check_tuning(config)
  _check_method(config)


def _invalid(config: Config, group: str, name: str, wanted: str) -> InputError:
  return InputError(f"{group}.{name}: {getattr(getattr(config, group), name)!r} must be {wanted}")


def _check_mixture(config: Config) -> None:
  config.mixture()
  for name in ("store", "options"):
    if config.data.mixture and getattr(config.data, name):
      wanted = "'' if data.mixture is set; give stores and options inside the mixture"
      raise _invalid(config, "data", name, wanted)


def _check_optimizer(config: Config) -> None:
  optimizer, batch_size = config.optimizer, config.data.batch_size
  if optimizer.schedule == "wsd" and optimizer.warmup_fraction + optimizer.decay_fraction > 1:
    wanted = f"at most 1 - warmup_fraction = {1 - optimizer.warmup_fraction:g}"
    raise _invalid(config, "optimizer", "decay_fraction", wanted)
  if batch_size % optimizer.accumulate:
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
  tuning.lora  # noqa: B018 - the property checks its fields
  trains = config.train.steps > 0 or config.train.epochs > 0
  if params != "float32" and tuning.weights == "all" and trains:
    wanted = "float32 if tuning.weights = 'all', because small updates would be lost in rounding"
    raise _invalid(config, "precision", "params", wanted)
  if tuning.new_rows == "zero" and getattr(config.method, "pause_input", "pause") != "token+pause":
    wanted = "another option unless method.pause_input = 'token+pause', because the inputs of pauses would be noise"
    raise _invalid(config, "tuning", "new_rows", wanted)
  if tuning.weights != "all" and not config.init_from:
    raise InputError(
      f"init_from: '' with tuning.weights = {tuning.weights!r}, so the decoder would keep its random initial weights;"
      " give a pretrained model, or tuning.weights = 'all'"
    )


def _check_method(config: Config) -> None:
  method = config.build_method()
  method.validate_data(None, config.data.sequence_length)
  if config.tuning.weights == "new" and not any(method.is_trained((name,)) for name in new_parameters(method.init)):
    raise InputError(
      f"tuning.weights: 'new', but method {method.name!r} with these options has no new rows; give 'lora' or 'all'"
    )
